#!/usr/bin/python3
"""Says whether the virus signatures are too old, raises the alarm, and stops clamd where policy wants that."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

DATABASES = Path("/var/lib/clamav")
FETCHED = ("main.cvd", "main.cld", "daily.cvd", "daily.cld")
UNIT = "clamav-daemon.service"


def made(path: Path) -> float:
    """When a file of signatures was made, in seconds since the epoch.

    A .cvd or .cld says so in the last field of its header (512 octets, separated by colons); of other files the time
    of their last change is taken. Raises ValueError when a header holds no such time.
    """
    if path.suffix not in (".cvd", ".cld"):
        return path.stat().st_mtime
    with path.open("rb") as file:
        fields = file.read(512).split(b":")
    if fields[0] != b"ClamAV-VDB" or len(fields) < 9:
        raise ValueError(f"{path} does not begin as a file of signatures does")
    return float(fields[8].split()[0])


def complaint(folder: Path, days: float, fetched: bool, now: float) -> str:
    """What is wrong with the age of a folder's newest signatures, one sentence; empty when nothing is.

    `days` is the highest age, 0 for any. Only what freshclam fetches counts where it does.
    """
    files = [folder / name for name in FETCHED] if fetched else list(folder.iterdir())
    times = [made(path) for path in files if path.is_file()]
    if not times:
        return f"there are no virus signatures in {folder}"
    age = (now - max(times)) / 86400
    if days and age > days:
        return f"the newest virus signatures are {age:.1f} days old, more than {days:g}"
    return ""


def show(name: str) -> str:
    """A property of clamd's unit."""
    command = ["systemctl", "show", "--value", "--property", name, UNIT]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=float, required=True, help="highest age; 0: any")
    parser.add_argument("--fetched", action="store_true", help="only what freshclam fetches counts")
    parser.add_argument("--defer", action="store_true", help="stop clamd when they are too old, start it when no more")
    parser.add_argument("--only-tell", action="store_true", help="do nothing; exit code 1 when they are too old")
    arguments = parser.parse_args()
    text = complaint(DATABASES, arguments.days, arguments.fetched, time.time())
    print(text or "the virus signatures are new enough")
    if arguments.only_tell:
        return 1 if text else 0
    if text:
        waits = "; mail waits until there are newer ones" if arguments.defer else ""
        subprocess.run(["/usr/local/sbin/alarm", "virus-database-old", text + waits], check=True)
    # clamd's unit asks this program before it starts: what is too old ends it, what is not lets it run again.
    if arguments.defer and (show("ActiveState") == "active" if text else show("Result") == "exec-condition"):
        subprocess.run(["systemctl", "restart", UNIT], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
