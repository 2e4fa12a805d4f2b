#!/usr/bin/python3
"""valkey-role primary|replica|current: makes this host's Valkey the primary, or a follower of the holder's.

`current` means: primary where holder.target is active. A Valkey that has just started reads its data first, so this
tries again for a minute. What it knows is never thrown away here: a follower replaces its data when a primary has sent
it all of its own, and not before.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

SOCKET = "/run/valkey/valkey.sock"
PASSWORD = Path("/etc/valkey/password")
# The tunnel to the service address, that is to the holder.
PRIMARY = ("127.0.0.1", "26379")
PATIENCE = 60.0  # seconds


class ValkeyError(Exception):
    """Valkey refused a command; the text is its own."""


def encode(*words: str) -> bytes:
    r"""Return a command as Valkey reads it.

    >>> encode("ROLE")
    b'*1\r\n$4\r\nROLE\r\n'
    """
    parts = [f"*{len(words)}\r\n".encode()]
    for word in words:
        octets = word.encode()
        parts.append(b"$%d\r\n%s\r\n" % (len(octets), octets))
    return b"".join(parts)


def command(*words: str, path: str = SOCKET, password: str) -> None:
    """Give Valkey one command that it answers with a status; ValkeyError when it refuses, OSError when it is away."""
    with socket.socket(socket.AF_UNIX) as session:
        session.settimeout(5)
        session.connect(path)
        answers = session.makefile("rb")
        for line in (encode("AUTH", "keeper", password), encode(*words)):
            session.sendall(line)
            answer = answers.readline().decode(errors="replace").strip()
            if not answer.startswith("+"):
                raise ValkeyError(answer.lstrip("-") or "no answer")


def holds() -> bool:
    """Tell whether this host holds the service."""
    return subprocess.run(["systemctl", "is-active", "--quiet", "holder.target"], check=False).returncode == 0


def main() -> int:
    """Do what the command line says; 75 when Valkey could not be told in time."""
    wanted = sys.argv[1] if len(sys.argv) == 2 else ""
    if wanted not in ("primary", "replica", "current"):
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 64
    deadline = time.monotonic() + PATIENCE
    while True:
        primary = holds() if wanted == "current" else wanted == "primary"
        try:
            command("REPLICAOF", *(("NO", "ONE") if primary else PRIMARY), password=PASSWORD.read_text("utf-8").strip())
        except (OSError, ValkeyError) as error:
            # The text of an error never holds the password: it goes out and does not come back.
            if time.monotonic() > deadline:
                print(f"Valkey could not be told: {error}", file=sys.stderr)
                return 75
            time.sleep(0.5)
        else:
            print("primary" if primary else "follows the holder")
            return 0


if __name__ == "__main__":
    sys.exit(main())
