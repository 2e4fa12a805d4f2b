#!/usr/bin/python3
"""mailbox-copy: copy messages out of a mailbox for whom playbooks/mailbox-access.yml has noted, and encrypted only.

Reads the mail store's files, so that a mailbox of which nobody can log in any more is read too, and nothing in it
changes. What is read goes through a pipe to openssl and nowhere else.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import syslog
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser
from pathlib import Path
from typing import IO

SETTINGS = Path("/etc/hopthu/mailboxes.json")
COLUMNS = ("file", "folder", "received", "date", "from", "to", "subject", "message_id", "octets")
PARSER = BytesParser(policy=policy.default)


class Refused(Exception):
    """Why nothing is copied, as one sentence with the way out."""


def folders(maildir: Path) -> dict[str, Path]:
    """Return a mailbox's folders: name as people write it (A/B) → where it lies."""
    found = {"INBOX": maildir}
    for path in maildir.iterdir():
        if path.name.startswith(".") and (path / "cur").is_dir():
            found[path.name[1:].replace(".", "/")] = path
    return found


def header(message: EmailMessage, name: str) -> str:
    """Return a header as text on one line; what cannot be read as it is."""
    try:
        return " ".join(str(message.get(name, "")).split())
    except Exception:  # the parser of the standard library stumbles over some forged ones
        return "(unreadable)"


def row(path: Path, folder: str) -> dict[str, str]:
    """Return what the list says of a message."""
    with path.open("rb") as file:
        message = PARSER.parse(file, headersonly=True)
    received = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return {
        "folder": folder,
        "received": received.isoformat(timespec="seconds"),
        "date": header(message, "Date"),
        "from": header(message, "From"),
        "to": header(message, "To"),
        "subject": header(message, "Subject"),
        "message_id": header(message, "Message-ID"),
        "octets": str(path.stat().st_size),
    }


def wanted(about: dict[str, str], given: argparse.Namespace) -> bool:
    """Tell whether a message is one of those that were asked for."""
    day = about["received"][:10]
    return (
        (not given.sender or given.sender.casefold() in about["from"].casefold())
        and (not given.subject or given.subject.casefold() in about["subject"].casefold())
        and (not given.message_id or given.message_id.strip("<>") == about["message_id"].strip("<>"))
        and (not given.since or day >= given.since.isoformat())
        and (not given.before or day < given.before.isoformat())
    )


def found(maildir: Path, given: argparse.Namespace) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield the messages that were asked for, oldest first in each folder; raises Refused for an unknown folder."""
    known = folders(maildir)
    if given.folder != "*" and given.folder not in known:
        raise Refused(f"there is no folder {given.folder}: it has {', '.join(sorted(known))}")
    for name in sorted(known) if given.folder == "*" else [given.folder]:
        paths = [path for part in ("cur", "new") for path in (known[name] / part).iterdir() if path.is_file()]
        for path in sorted(paths, key=lambda path: path.name):
            about = row(path, name)
            if wanted(about, given):
                yield path, about


def encrypted(target: Path, certificates: list[str], write: Callable[[IO[bytes]], None]) -> None:
    """Let `write` write to what becomes `target`, as CMS (RFC 5652, RFC 5083) to each certificate."""
    options = ["-binary", "-stream", "-outform", "DER", "-aes-256-gcm", "-out", str(target)]
    process = subprocess.Popen(["openssl", "cms", "-encrypt", *options, *certificates], stdin=subprocess.PIPE)
    try:
        write(process.stdin)
        process.stdin.close()
    except BrokenPipeError:
        pass  # openssl has ended; its exit code says so
    except BaseException:
        process.kill()
        raise
    if process.wait():
        raise Refused("openssl cannot encrypt to these certificates: give X.509 ones, PEM")


def copy(given: argparse.Namespace, maildir: Path) -> dict[str, int]:
    """Write the encrypted copy; return how much is in it."""
    count = {"messages": 0, "octets": 0}

    def write(out: IO[bytes]) -> None:
        rows = []
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, about in found(maildir, given):
                count["messages"] += 1
                count["octets"] += int(about["octets"])
                name = ""
                if given.what == "messages":
                    name = f"{count['messages']:06}.eml"
                    archive.write(path, name)
                rows.append({"file": name, **about})
            table = io.StringIO()
            lines = csv.DictWriter(table, COLUMNS)
            lines.writeheader()
            lines.writerows(rows)
            archive.writestr("list.csv", "\ufeff" + table.getvalue())

    encrypted(Path(given.to), given.certificate, write)
    return count


def main() -> int:
    """Entry point; 1 when it is refused, in one sentence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decision", required=True, help="entry of the decision log that it is done on")
    parser.add_argument("--id", required=True, help="id of the mailbox")
    parser.add_argument("--what", choices=["list", "messages"], required=True)
    parser.add_argument("--folder", default="INBOX", help="* for all")
    parser.add_argument("--sender", default="")
    parser.add_argument("--subject", default="")
    parser.add_argument("--message-id", default="")
    parser.add_argument("--since", type=date.fromisoformat)
    parser.add_argument("--before", type=date.fromisoformat)
    parser.add_argument("--certificate", action="append", required=True)
    parser.add_argument("--to", required=True, help="file to be written")
    given = parser.parse_args()
    root = Path(json.loads(SETTINGS.read_text(encoding="utf-8"))["mail_root"])
    maildir = root / given.id / "Maildir"
    os.umask(0o077)
    syslog.openlog("mailbox-access", 0, syslog.LOG_AUTHPRIV)
    syslog.syslog(syslog.LOG_NOTICE, f"{given.id}: {given.what} of {given.folder} read, decision {given.decision}")
    try:
        if "/" in given.id or given.id.startswith(".") or not maildir.is_dir():
            raise Refused(f"this host keeps nothing of {given.id}: nothing has come yet, or its retention is over")
        began = time.monotonic()
        count = copy(given, maildir)
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return 1
    print(json.dumps({**count, "seconds": round(time.monotonic() - began, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
