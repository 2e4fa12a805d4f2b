#!/usr/bin/python3
"""Has clamd look at the files of the mail store; what is found is reported or put into quarantine, never deleted.

Scans what changed since the last whole scan, or everything when that was long ago. A file counts as changed by its
ctime, which a move or a new flag sets too. Each file is opened here and its content sent to clamd, as mail is: clamd
needs no access to the store. A file that goes away meanwhile was read, moved or deleted by its owner; where it went it
has a new ctime, so the next scan meets it there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import batched
from pathlib import Path

SOCKET = "/run/clamav/clamd.ctl"
STATE = Path("/var/lib/clamav-store-scan")
TIMEOUT = 300  # seconds without an answer; clamd ends each scan far earlier
# What clamd cannot look into is not a virus.
UNSEEN = ("Heuristics.Encrypted.", "Heuristics.Limits.Exceeded.")
# Priorities that the journal reads at the beginning of a line.
CRITICAL, ERROR, WARNING = "<2>", "<3>", "<4>"


class ScanError(Exception):
    """A file could not be scanned; the text says why."""


class NoScannerError(Exception):
    """clamd does not answer: nothing can be scanned."""


def files(store: Path, since: float) -> Iterator[Path]:
    """Regular files below a folder that changed after `since` (seconds since the epoch); OSError where one cannot look.

    Folders in reverse order, so that `new` comes before `cur`: a message that is read meanwhile is met once at least.
    What begins with a dot beside the mailboxes is none: in .backup each message has a second name.
    """

    def stop(error: OSError) -> None:
        if error.filename == str(store) or not isinstance(error, FileNotFoundError):
            raise error

    for folder, folders, names in os.walk(store, onerror=stop):
        if folder == str(store):
            folders[:] = [name for name in folders if not name.startswith(".")]
        folders.sort(reverse=True)
        for name in names:
            path = Path(folder, name)
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode) and status.st_ctime >= since:
                yield path


def ask(path: Path, largest: int) -> str | None:
    """What clamd calls a file: a signature's name, an empty string when it finds nothing; None when the file is gone.

    Raises ScanError when clamd gives no such answer, NoScannerError when it gives none, OSError when the file cannot
    be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        return UNSEEN[1] + "MaxFileSize"
    answer = b""
    try:
        with socket.socket(socket.AF_UNIX) as clamd:
            clamd.settimeout(TIMEOUT)
            clamd.connect(SOCKET)
            # Pieces with their length before them, the last one empty.
            clamd.sendall(b"zINSTREAM\0")
            if data:
                clamd.sendall(struct.pack("!I", len(data)) + data)
            clamd.sendall(struct.pack("!I", 0))
            while not answer.endswith(b"\0"):
                if not (received := clamd.recv(4096)):
                    raise ConnectionError("it closed the connection")
                answer += received
    except OSError as error:
        raise NoScannerError(f"clamd does not answer: {error}") from error
    text = answer.rstrip(b"\0").decode(errors="replace")
    if text == "stream: OK":
        return ""
    if text.startswith("stream: ") and text.endswith(" FOUND"):
        return text.removeprefix("stream: ").removesuffix(" FOUND")
    raise ScanError(f"clamd says {text!r}")


def put_away(path: Path, signature: str, folder: Path) -> Path:
    """Move a file into the quarantine, with a record of where it was beside it; its new place.

    The copy and the record are on the disk before the file leaves the store. Raises OSError.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    kept = folder / f"{time.strftime('%Y%m%dT%H%M%S')}-{digest}"
    record = {
        "path": str(path),
        "signature": signature,
        "owner": status.st_uid,
        "group": status.st_gid,
        "mode": oct(stat.S_IMODE(status.st_mode)),
        "modified": status.st_mtime,
    }
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as source, kept.open("xb") as copy:
        shutil.copyfileobj(source, copy)
    kept.with_suffix(".json").write_text(json.dumps(record, ensure_ascii=False, indent=2), encoding="utf-8")
    os.sync()
    path.unlink()
    return kept


def alarm(name: str, text: str) -> None:
    """Raise an alarm."""
    subprocess.run(["/usr/local/sbin/alarm", name, text], check=True)


def last_whole_scan(mark: Path, days: float, now: float) -> float:
    """When the last whole scan began, in seconds since the epoch; 0 when everything is to be scanned now.

    An hour is let pass: the timer does not start each scan at the same minute.
    """
    if not mark.exists() or (began := mark.stat().st_mtime) < now + 3600 - days * 86400:
        return 0
    return began


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True, help="folder of the mail store")
    parser.add_argument("--action", choices=["report", "quarantine"], required=True, help="what becomes of viruses")
    parser.add_argument("--full-days", type=float, required=True, help="days after which everything is scanned again")
    parser.add_argument("--threads", type=int, required=True, help="files at the same time")
    parser.add_argument("--max-octets", type=int, required=True, help="larger files are reported as not looked into")
    arguments = parser.parse_args()

    mark = STATE / "last-whole-scan"
    began = time.time()
    # A second less: the clock of ctime ticks more coarsely than the other.
    since = last_whole_scan(mark, arguments.full_days, began) - 1
    scanned = found = unseen = failed = 0

    def look(path: Path) -> str | None | Exception:
        try:
            return ask(path, arguments.max_octets)
        except (ScanError, OSError) as error:
            return error

    try:
        with ThreadPoolExecutor(arguments.threads) as pool:
            for batch in batched(files(arguments.store, since), 1000):
                for path, answer in zip(batch, pool.map(look, batch), strict=True):
                    if isinstance(answer, Exception):
                        failed += 1
                        print(f"{ERROR}{path}: not scanned: {answer}")
                        continue
                    if answer is None:
                        continue
                    scanned += 1
                    if answer.startswith(UNSEEN):
                        unseen += 1
                        print(f"{WARNING}{path}: not looked into: {answer}")
                    elif answer:
                        found += 1
                        print(f"{CRITICAL}{path}: {answer}")
                        if arguments.action == "quarantine":
                            print(f"{CRITICAL}{path}: moved to {put_away(path, answer, STATE / 'quarantine')}")
        problem = f"{failed} files could not be scanned" if failed else ""
    except (NoScannerError, OSError) as error:
        problem = f"the scan ended early: {error}"

    what = "everything" if since <= 0 else f"what changed since {time.strftime('%Y-%m-%d', time.localtime(since))}"
    print(f"{what}: {scanned} files scanned, {found} with a virus, {unseen} not looked into, {failed} failed")
    where = f"in {arguments.store}, see `journalctl -t clamav-store-scan`"
    if found:
        alarm("store-virus", f"{found} files with a virus {where}")
    if problem:
        print(f"{ERROR}{problem}")
        alarm("store-scan", f"{problem}, {where}")
        return 1
    if since <= 0:
        mark.touch()
        os.utime(mark, (began, began))
    return 0


if __name__ == "__main__":
    sys.exit(main())
