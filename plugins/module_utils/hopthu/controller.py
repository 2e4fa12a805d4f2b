"""Who runs a playbook, and from which commit of the files. Runs on the controller."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
from pathlib import Path


def operator() -> str:
    """Return who runs this: login name and machine, and the name behind sudo."""
    behind = os.environ.get("SUDO_USER")
    return f"{getpass.getuser()}@{socket.gethostname()}" + (f" (sudo by {behind})" if behind else "")


def commit(folder: Path) -> str:
    """Return the git commit of the files in `folder`, with "+changes" when they differ from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", folder.resolve(), *arguments], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    found = git("rev-parse", "HEAD")
    if found is None:
        return "not under version control"
    return found + ("+changes" if git("status", "--porcelain", "--", ".") else "")
