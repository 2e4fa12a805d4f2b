"""What an operator means, and what of a snapshot a mailbox lacks. Pure: no file, no clock, no process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

Message = Mapping[str, Any]
"""A message as a catalogue has it: folder, guid, flags, octets, received, date, message_id, body and more."""

SET_ASIDE = frozenset({"Trash", "Junk"})
"""Folders for what people do not want. What lies there only is missing in the folder where it was."""


class Refused(Exception):
    """Why nothing was changed, as one sentence with the way out, without a full stop."""


def moment(text: str) -> datetime:
    """Return the time that an operator wrote in this host's own time, such as 2026-11-20 or 2026-11-20 12:00.

    A day without an hour means its end, an hour with minutes and an offset (ISO 8601) that very moment. Raises Refused.
    """
    text = text.strip()
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise Refused(f"'{text}' is no time: write it as 2026-11-20 or '2026-11-20 12:00'") from None
    if len(text) == 10:
        found = found.replace(hour=23, minute=59, second=59)
    return found.astimezone()


def shown(at: datetime | None) -> str:
    """Return a time as operators read it: this host's own, to the minute."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M") if at else "now"


def identity(message: Message) -> tuple[str, ...]:
    """Return what two copies of a message have in common wherever they lie. Bodies alone do not do: many are equal."""
    return tuple(str(message.get(name) or "") for name in ("body", "message_id", "date", "subject"))


def lacking(wanted: Iterable[Message], present: Iterable[Message]) -> list[Message]:
    """Return the messages of `wanted` that are not among `present`.

    A message that lies in another folder than it did was moved there since and is not lost, unless it was set aside.
    Two copies are two messages.
    """
    here, anywhere = Counter[tuple[Any, ...]](), Counter[tuple[Any, ...]]()
    for message in present:
        name = identity(message)
        here[message["folder"], *name] += 1
        if message["folder"] not in SET_ASIDE:
            anywhere[name] += 1
    left = []
    for message in wanted:
        name = identity(message)
        if here[message["folder"], *name] > 0:
            here[message["folder"], *name] -= 1
            anywhere[name] -= message["folder"] not in SET_ASIDE
        else:
            left.append(message)
    found = []
    for message in left:
        if anywhere[identity(message)] > 0:
            anywhere[identity(message)] -= 1
        else:
            found.append(message)
    return found


def chosen(messages: Iterable[Message], folder: str = "", message: str = "") -> list[Message]:
    """Return the messages of a folder and its subfolders ("" for all), and of these the one that is named.

    `message` is a Message-ID, with or without its brackets, or a guid.
    """
    bare = message.strip().strip("<>")
    return [
        one
        for one in messages
        if (not folder or one["folder"] == folder or one["folder"].startswith(folder + "/"))
        and (not bare or bare in (one["guid"], str(one.get("message_id") or "").strip().strip("<>")))
    ]


def matches(message: Message, sender: str = "", subject: str = "", date: str = "") -> bool:
    """Tell whether a message is looked for: parts of sender and subject without regard to case, day as 2026-11-20.

    The day may be the one in its header or the one of its arrival, in this host's time.
    """
    if date:
        days = {datetime.fromtimestamp(message["received"]).astimezone().strftime("%Y-%m-%d")}
        days |= _header_day(str(message.get("date") or ""))
        if date not in days:
            return False
    return (
        sender.casefold() in str(message.get("from") or "").casefold()
        and subject.casefold() in str(message.get("subject") or "").casefold()
    )


def _header_day(text: str) -> set[str]:
    try:
        return {parsedate_to_datetime(text).strftime("%Y-%m-%d")}
    except (TypeError, ValueError, IndexError):
        return set()
