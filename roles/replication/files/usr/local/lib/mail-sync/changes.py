"""What Dovecot's events say of changed mailboxes, and what still has to be brought to the peer; pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_TARGETED = {"COPY", "UID COPY", "APPEND", "CREATE", "DELETE", "RENAME"}
"""IMAP commands that change only the mailboxes in their arguments, whichever is selected."""
_OWN_WRITES = {"doveadm:cmd_sync", "doveadm:cmd_dsync_server"}

Deed = tuple[str, str, str]
"""Something that doveadm sync does not bring over: a topic, what it is about, and what was done."""


@dataclass(frozen=True)
class Change:
    """A user whose mailbox changed; `session` of a finished delivery; `deeds` to be repeated at the peer."""

    user: str
    session: str = ""
    deeds: tuple[Deed, ...] = ()


def changes(event: Mapping[str, Any], prefix: str) -> list[Change]:
    """Return what an exported event says; `prefix` is what a unit's folders begin with, such as Units/.

    A delegate's change in a unit's folder is a change of the unit: the event has the delegate as its user. The unit is
    named by the local part of its address, its domain is the delegate's.
    """
    name, fields = event.get("event"), event.get("fields") or {}
    user = str(fields.get("user") or "").lower()
    if not user or _OWN_WRITES & set(fields.get("reason_code") or ()):
        return []
    if name == "mail_delivery_finished":
        return [Change(user, "" if fields.get("error") else str(fields.get("session") or ""))]
    if name == "managesieve_command_finished":
        return _sieve(user, fields)
    mailbox = str(fields.get("mailbox") or "")
    if name == "mail_expunged":
        return [Change(_owner(user, mailbox, prefix))]
    if name != "imap_command_finished":
        return []
    command, arguments = str(fields.get("cmd_name") or ""), str(fields.get("cmd_args") or "")
    domain = user.partition("@")[2]
    named = {f"{unit.lower()}@{domain}" for unit in re.findall(re.escape(prefix) + r'([^/"\s]+)', arguments)}
    if command in ("SUBSCRIBE", "UNSUBSCRIBE"):
        # Which units a delegate shows is kept in his own mailbox, and doveadm sync leaves it out.
        return [Change(user, deeds=(("subscription", mailbox, command.lower()),) if named else ())]
    if command in _TARGETED:
        return [Change(one) for one in sorted(named or {user})]
    selected = _owner(user, mailbox, prefix)
    found = [Change(selected)]
    if command.endswith("MOVE"):
        found += [Change(one) for one in sorted((named or {user}) - {selected})]
    if selected != user and command.endswith(("STORE", "FETCH")):
        # What a delegate has read in a unit is his own, outside the unit's mailbox.
        found.append(Change(user, deeds=(("seen", mailbox, ""),)))
    return found


def _owner(user: str, mailbox: str, prefix: str) -> str:
    if not mailbox.startswith(prefix):
        return user
    unit = mailbox.removeprefix(prefix).partition("/")[0].lower()
    return f"{unit}@{user.partition('@')[2]}" if unit else user


def _sieve(user: str, fields: Mapping[str, Any]) -> list[Change]:
    command, script = str(fields.get("cmd_name")), str(fields.get("script_name") or "")
    if fields.get("error"):
        return []
    if command == "DELETESCRIPT":
        return [Change(user, deeds=(("script", script, "delete"),))]
    if command == "RENAMESCRIPT":
        old, new = (str(fields.get(f"{which}_script_name") or "") for which in ("old", "new"))
        return [Change(user, deeds=(("script", old, f"rename {new}"), ("script", new, "keep")))]
    if command == "PUTSCRIPT":
        return [Change(user, deeds=(("script", script, "keep"),))]
    if command == "SETACTIVE":
        return [Change(user, deeds=(("script", script, "keep"),))]
    return []


@dataclass
class Entry:
    """What a user waits for: since when, how often it failed, not before when to try (seconds since the epoch)."""

    since: float
    not_before: float = 0.0
    attempts: int = 0
    full: bool = False
    sessions: list[str] = field(default_factory=list)
    deeds: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, change: Change) -> None:
        """Let a change wait too; of two deeds about one thing the later holds."""
        if change.session:
            self.sessions.append(change.session)
        for topic, about, done in change.deeds:
            self.deeds[topic, about] = done

    def absorb(self, later: Entry) -> None:
        """Take over what came while this one was being tried and failed."""
        self.since = self.since or later.since
        self.sessions += later.sessions
        self.full |= later.full
        self.deeds |= later.deeds

    def as_json(self) -> dict[str, Any]:
        """Return what is kept over a restart."""
        deeds = [[*what, done] for what, done in self.deeds.items()]
        return {"since": self.since, "full": self.full, "sessions": self.sessions, "deeds": deeds}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Entry:
        """Return what `as_json` kept."""
        deeds = {(str(topic), str(about)): str(done) for topic, about, done in row["deeds"]}
        return cls(since=float(row["since"]), full=bool(row["full"]), sessions=list(row["sessions"]), deeds=deeds)


def backoff(attempts: int) -> float:
    """Return how many seconds to wait after so many failures: half a second, doubled up to ten."""
    return float(min(10.0, 0.5 * 2 ** min(attempts - 1, 10)))


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """Return the 50th and 95th percentile and the maximum; zeros of nothing."""
    rows = sorted(values)
    if not rows:
        return {"p50": 0.0, "p95": 0.0, "max": 0.0}
    return {
        "p50": round(rows[len(rows) // 2], 3),
        "p95": round(rows[min(len(rows) - 1, len(rows) * 95 // 100)], 3),
        "max": round(rows[-1], 3),
    }
