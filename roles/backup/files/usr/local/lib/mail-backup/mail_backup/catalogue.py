"""The catalogue of a mailbox: a line for each message, by which it is found, compared and told from others.

It stands in the snapshot beside the mailbox, so that a search opens no message, and a restore can prove that each is
what it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import Any, BinaryIO

from mail_backup.store import INFO, Listing, read_uidlist

BLOCK = 1 << 18
HEADER_OCTETS = 1 << 18  # what of a header is looked at
TEXT = 500  # characters of a header field that are kept
CONTENT = ("octets", "date", "from", "to", "subject", "message_id", "body")


def folder_name(path: str) -> str:
    """Return the mailbox that a folder of a home is: Maildir is INBOX, Maildir/.A.B is A/B."""
    name = os.path.basename(path)
    return name[1:].replace(".", "/") if name.startswith(".") else "INBOX"


def body_hash(file: BinaryIO) -> tuple[bytes, str]:
    """Return a message's header and the SHA-256 of what comes after its first empty line, in hexadecimal.

    Line ends count as LF, so that a message is the same whichever way it came into a store.
    """
    header = bytearray()
    for line in file:
        if line in (b"\n", b"\r\n"):
            break
        if len(header) < HEADER_OCTETS:
            header += line
    digest = hashlib.sha256()
    rest = b""
    while block := file.read(BLOCK):
        block = rest + block
        rest = b"\r" if block.endswith(b"\r") else b""
        digest.update(block[: len(block) - len(rest)].replace(b"\r\n", b"\n"))
    digest.update(rest)
    return bytes(header), digest.hexdigest()


def decoded(value: Any) -> str:
    """Return a header field as people read it, on one line."""
    text = str(value or "")
    try:
        # Raw UTF-8 came as surrogates; what says that it is encoded (RFC 2047) is decoded.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        text = str(make_header(decode_header(text)))
    except (HeaderParseError, LookupError, UnicodeError, ValueError):
        pass
    return " ".join(text.split())[:TEXT]


def content(path: Path) -> dict[str, Any]:
    """Return the fields of a message's line that its content alone decides; raises OSError."""
    with path.open("rb") as file:
        header, digest = body_hash(file)
        octets = os.fstat(file.fileno()).st_size
    # As they stand there: `get` puts question marks in the place of raw UTF-8. The first of each name counts.
    raw = {name.lower(): value for name, value in reversed(list(BytesHeaderParser().parsebytes(header).raw_items()))}
    values = {name: decoded(raw.get(name)) for name in ("date", "from", "to", "subject", "message-id")}
    return {
        "octets": octets,
        "date": values["date"],
        "from": values["from"],
        "to": values["to"],
        "subject": values["subject"],
        "message_id": values["message-id"],
        "body": digest,
    }


def keywords(folder: Path) -> dict[str, str]:
    """Return what the small letters among a folder's flags stand for (dovecot-keywords)."""
    found: dict[str, str] = {}
    try:
        lines = (folder / "dovecot-keywords").read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return found
    for line in lines:
        number, space, name = line.partition(" ")
        if space and number.isdigit() and int(number) < 26:
            found[chr(ord("a") + int(number))] = name
    return found


def lines(tree: Path, seen: Listing, known: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a mailbox's messages in the tree, sorted by folder and base name.

    `known`: lines of the last catalogue by base name; a message of the same size is not read again.
    """
    numbers: dict[str, dict[str, tuple[int, str]]] = {}
    names: dict[str, dict[str, str]] = {}
    for (folder, base), (path, _inode) in sorted(seen.messages.items()):
        if folder not in numbers:
            numbers[folder] = {name: (uid, guid) for name, uid, guid in read_uidlist(tree / folder)}
            names[folder] = keywords(tree / folder)
        status = os.stat(tree / path)
        flags = path.partition(INFO)[2]
        old = known.get(base)
        same = old is not None and old["octets"] == status.st_size
        found = {name: old[name] for name in CONTENT} if same and old is not None else content(tree / path)
        uid, guid = numbers[folder].get(base, (None, base))
        yield {
            "folder": folder_name(folder),
            "guid": base,
            "flags": "".join(letter for letter in flags if letter.isupper()),
            "keywords": [names[folder].get(letter, letter) for letter in flags if letter.islower()],
            "received": int(status.st_mtime),
            **found,
            "uid": uid,
            "dovecot_guid": guid,
            "file": path,
        }


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a catalogue's first line and those of the messages; raises OSError or ValueError."""
    with path.open(encoding="utf-8") as file:
        head, *rest = [json.loads(line) for line in file]
    return head, rest


def fingerprint(tree: Path, seen: Listing) -> str:
    """Return what stays the same as long as a mailbox's lines do: names, files, Dovecot's numbers and keywords."""
    digest = hashlib.sha256()
    for path, inode in sorted(seen.messages.values()):
        digest.update(f"{path}\0{inode}\0".encode("utf-8", "surrogateescape"))
    for path in sorted(seen.others):
        if path.endswith(("/dovecot-uidlist", "/dovecot-keywords")):
            status = os.stat(tree / path)
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def write(path: Path, identifier: str, address: str, tree: Path, seen: Listing) -> tuple[int, int]:
    """Bring a catalogue up to date; return how many messages and octets it has.

    One whose mailbox is unchanged is left alone, its time too: restic would store it anew.
    """
    wanted = {"id": identifier, "address": address, "state": fingerprint(tree, seen)}
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(file.readline())
            if head.items() >= wanted.items():
                return head["messages"], head["octets"]
            old = [json.loads(line) for line in file]
    except (OSError, ValueError, KeyError, AttributeError):
        old = []
    now = list(lines(tree, seen, {line["guid"]: line for line in old}))
    octets = sum(line["octets"] for line in now)
    head = wanted | {"taken": datetime.now(UTC).isoformat(timespec="seconds"), "messages": len(now), "octets": octets}
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for line in [head, *now]:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    partial.chmod(0o600)
    os.replace(partial, path)
    return len(now), octets
