"""Alarms of programs that may not raise any themselves: a sandbox lets nobody send mail."""

from __future__ import annotations

import subprocess
from pathlib import Path

ALARM = "/usr/local/sbin/alarm"


def lay(state: str | Path, name: str, text: str) -> None:
    """Lay an alarm down in a state folder; `raise_all` (ExecStopPost= of the unit) raises it."""
    folder = Path(state, "alarms")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def raise_all(state: str | Path) -> int:
    """Raise what was laid down; return how many alarms that were."""
    paths = sorted(Path(state, "alarms").glob("*"))
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        path.unlink()
        subprocess.run([ALARM, path.name, text], check=True)
    return len(paths)
