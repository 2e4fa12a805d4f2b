"""What a record looks like on disk, how lines of the log are read, who the final recipients are: no input or output."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

HEADER = "X-Journal-Id"
MAGIC = b"HTJ1"
# Magic, octets of the metadata, octets of the content; after both follows the CRC-32 over both.
HEAD = struct.Struct("!4sIQ")
TAIL = struct.Struct("!I")
PIECE = 1 << 18

# How far a recipient has come; nothing goes back.
RANK = {"delivered": 1, "safe": 2, "outside": 2, "bounced": 2, "replayed": 2}


def new_id(seconds: float, randomness: bytes) -> str:
    """A UUID of version 7 (RFC 9562) from the time in seconds since the epoch and ten random octets."""
    value = int(seconds * 1000) << 80 | int.from_bytes(randomness[:10], "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    text = f"{value:032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


# --- records ---------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where the content of a record stands: number of the segment, first octet, octets."""

    segment: int
    offset: int
    size: int


def pieces(file: BinaryIO, offset: int, size: int) -> Iterator[bytes]:
    """Read `size` octets from `offset` on, a piece at a time; EOFError when they are not there."""
    file.seek(offset)
    while size:
        piece = file.read(min(size, PIECE))
        if not piece:
            raise EOFError(f"{size} octets are missing")
        size -= len(piece)
        yield piece


def encode(meta: dict[str, Any], content: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield a record's octets; `size` is the number of octets in `content`. ValueError when it is not."""
    text = json.dumps(meta, separators=(",", ":")).encode()
    yield HEAD.pack(MAGIC, len(text), size)
    yield text
    crc, seen = zlib.crc32(text), 0
    for piece in content:
        crc = zlib.crc32(piece, crc)
        seen += len(piece)
        yield piece
    if seen != size:
        raise ValueError(f"content has {seen} octets, not {size}")
    yield TAIL.pack(crc)


def content_offset(start: int, meta: dict[str, Any]) -> int:
    """Where the content of a record begins that begins at `start`."""
    return start + HEAD.size + len(json.dumps(meta, separators=(",", ":")).encode())


def scan(file: BinaryIO, start: int) -> Iterator[tuple[dict[str, Any], int, int, int]]:
    """Yield (metadata, offset of the content, its octets, end of the record) from `start` on.

    Ends at the first record that is not whole: what a crash left half written was never acknowledged.
    """
    while True:
        file.seek(start)
        head = file.read(HEAD.size)
        if len(head) < HEAD.size:
            return
        magic, length, size = HEAD.unpack(head)
        if magic != MAGIC:
            return
        text = file.read(length)
        offset = start + HEAD.size + length
        crc = zlib.crc32(text)
        try:
            for piece in pieces(file, offset, size):
                crc = zlib.crc32(piece, crc)
        except EOFError:
            return
        tail = file.read(TAIL.size)
        if len(tail) < TAIL.size or TAIL.unpack(tail)[0] != crc:
            return
        start = offset + size + TAIL.size
        yield json.loads(text), offset, size, start


# --- the log ---------------------------------------------------------------------------------

QUEUED = re.compile(r"([0-9A-Za-z]{6,}): from=<.*>, size=\d+, nrcpt=(\d+) \(queue active\)$")
REMOVED = re.compile(r"([0-9A-Za-z]{6,}): removed$")
DELIVERY = re.compile(
    r"([0-9A-Za-z]{6,}): to=<(.*?)>, (?:orig_to=<(.*?)>, )?relay=.*?, delay=.*?, dsn=[0-9.]+, status=(\w+) \((.*)\)$",
    re.DOTALL,
)
# Dovecot's LMTP answer. Each recipient has a session of its own (ID, ID:R2 …), as in Dovecot's events and log.
SAVED = re.compile(r"250 2\.0\.0 <.*> (\S+) Saved$")
# lmtp(recipient)<process><SESSION>: …
LMTP = re.compile(r"lmtp\((?:.*?)\)<\d+><([^<>]+)>: ")
OURS = frozenset({"postfix/qmgr", "postfix/lmtp", "postfix/smtp", "postfix/relay/smtp", "postfix/error",
                  "postfix/discard", "postfix/postsuper", "postfix/bounce"})  # fmt: skip


def read_line(identifier: str, text: str) -> dict[str, Any] | None:
    """What a line of Postfix or Dovecot means for the journal: an operation without its host; None for most lines."""
    if identifier == "dovecot":
        found = LMTP.match(text)
        return {"op": "here", "session": found[1]} if found else None
    if found := REMOVED.match(text):
        return {"op": "removed", "qid": found[1]}
    if found := QUEUED.match(text):
        return {"op": "queued", "qid": found[1], "recipients": int(found[2])}
    found = DELIVERY.match(text)
    if not found:
        return None
    qid, recipient, original, status, answer = found.groups()
    operation = {"op": "recipient", "qid": qid, "recipient": recipient.lower(), "original": (original or "").lower()}
    if status == "bounced":
        return operation | {"state": "bounced"}
    if status != "sent":
        return None
    if identifier == "postfix/lmtp":
        saved = SAVED.match(answer)
        return operation | {"state": "delivered", "session": saved[1] if saved else ""}
    return operation | {"state": "outside"}


# --- states ----------------------------------------------------------------------------------


def further(old: str | None, new: str) -> str:
    """The state of a recipient after news of it."""
    return new if RANK[new] > RANK.get(old or "", 0) else str(old)


def settled(entry: dict[str, Any], states: Iterable[str]) -> bool:
    """Whether nothing is left to do for an entry: every recipient is settled and the queue file is gone.

    Lines of the log can be lost; fewer recipients than the queue file had leave the entry open.
    """
    if entry["done"]:
        return True
    known = list(states)
    enough = len(known) >= max(entry["expected"], 1)
    return bool(entry["removed"]) and enough and all(RANK[state] == 2 for state in known)


def open_recipients(entry: dict[str, Any], lost: str, here: str, final: Iterable[str]) -> list[str]:
    """The recipients of an entry that a replay on `here` must look at, after `lost` was lost.

    entry: with `host` and `recipients`, a dict of final recipient → {state, here}; final: who the envelope's
    recipients are after aliases, empty when each of them is known. What the own queue still holds is Postfix's to
    deliver; what was delivered into this host's own store is there, or its reader deleted it.
    """
    if entry["done"]:
        return []
    known = entry["recipients"]
    waiting = [address for address, is_at in known.items() if is_at["state"] == "delivered" and not is_at["here"]]
    if entry["host"] not in (lost, here):
        return []
    return waiting + [address for address in final if address not in known]


def gone_unseen(entry: dict[str, Any], here: str, queued: set[str], before: float) -> bool:
    """Whether this host's queue has let go of an entry without a word in the log.

    queued: names of the queue's files at a time, and the log was read to its end afterwards; before: that time.
    """
    return entry["host"] == here and not entry["removed"] and entry["time"] < before and entry["qid"] not in queued


# --- outages ---------------------------------------------------------------------------------


class Outage:
    """When to raise the alarm about a peer that does not answer: after a grace, then once an hour."""

    def __init__(self, grace: float, again: float = 3600.0) -> None:
        """Seconds both."""
        self.grace, self.again = grace, again
        self.since: float | None = None
        self.raised: float | None = None

    def due(self, is_up: bool, now: float) -> bool:
        """Tell whether an alarm is due now; `now` in seconds of a clock that never goes back."""
        if is_up:
            self.since = self.raised = None
            return False
        if self.since is None:
            self.since = now
        if now - self.since < self.grace or (self.raised is not None and now - self.raised < self.again):
            return False
        self.raised = now
        return True


# --- aliases, as Postfix resolves them -------------------------------------------------------


def split_maps(text: str) -> list[str]:
    """The lookup tables in a parameter of main.cf; commas and spaces inside braces do not part them."""
    found, depth, name = [], 0, ""
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if depth == 0 and (letter.isspace() or letter == ","):
            if name:
                found.append(name)
            name = ""
        else:
            name += letter
    return [*found, name] if name else found


def expand(
    addresses: Iterable[str], lookup: Callable[[str], str], origin: str, delimiter: str = "+", depth: int = 100
) -> list[str]:
    """The final recipients behind addresses: virtual_alias_maps(5) applied until nothing changes.

    lookup: answer of the tables for one key, addresses with commas between, empty for none; origin: domain of an
    answer that has none; depth: after so many steps an address stays as it is.
    """
    final: dict[str, None] = {}
    seen: set[str] = set()
    waiting = [(address.lower(), 0) for address in addresses]
    while waiting:
        address, steps = waiting.pop(0)
        if address in seen:
            continue
        seen.add(address)
        local, _, domain = address.rpartition("@")
        base, mark, detail = local.partition(delimiter)
        keys = [(address, "")] + ([(f"{base}@{domain}", mark + detail)] if mark and base else []) + [(f"@{domain}", "")]
        answer, extension = next(((found, rest) for key, rest in keys if (found := lookup(key))), ("", ""))
        targets = []
        for target in (part.strip().lower() for part in answer.split(",")):
            if not target:
                continue
            name, _, where = target.rpartition("@") if "@" in target else (target, "", origin)
            name = name or local
            targets.append(f"{name}{extension if extension and delimiter not in name else ''}@{where}")
        if not targets or targets == [address] or steps >= depth:
            final[address] = None
            continue
        for target in targets:
            if target == address:
                final[address] = None
            else:
                waiting.append((target, steps + 1))
    return list(final)
