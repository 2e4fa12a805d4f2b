"""What a mail store has to do to follow the directory: sessions to end, rights to give, folders to purge, receipts.

Pure: no connection, no clock, no process. The module `mailboxes` does it on the host, the action plugin of that name
writes the receipts on the controller.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

SERVICES = ("imap", "pop3", "managesieve", "submission")
"""Names of the processes that serve a user's session, one process for each session."""

CLOCKS = 2.0
"""Seconds by which a session may have begun after mailboxSessionsSince and still be ended: LDAP counts whole seconds,
and a login that was checked before the change gets its process after it. A session that came honestly in that time
is ended too, and its mail program logs in again."""

_RIGHTS = "kxeilprwts"  # all but a: nobody who shares a unit's mailbox can share it further
_GROUPS = "shared/shared-boxes/group/"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Session:
    """A user's session: login, number of its process, and when the process began (seconds since the epoch)."""

    user: str
    service: str
    pid: int
    began: float


def seconds(time: str) -> float:
    """Return a generalizedTime in UTC, such as 20261121214446Z (RFC 4517 3.3.13), as seconds since the epoch.

    Raises ValueError for another form.
    """
    return datetime.strptime(time, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def to_end(sessions: Iterable[Session], may_log_in: Mapping[str, str | None]) -> list[tuple[Session, str]]:
    """Return the sessions that must end, each with the reason.

    `may_log_in` maps the address of everybody who may log in, in lower case, to mailboxSessionsSince.
    """
    found = []
    for session in sessions:
        user = session.user.lower()
        since = may_log_in.get(user)
        if user not in may_log_in:
            found.append((session, "may not log in"))
        elif since and session.began <= seconds(since) + CLOCKS:
            found.append((session, f"began before {since}"))
    return found


def rights(unit: str) -> str:
    """Return the ACL of a unit's INBOX, in Dovecot's vfile form: the group of the unit's id, and nobody else."""
    return f"group={unit} {_RIGHTS}\n"


def sharing_map(units: Mapping[str, str]) -> str:
    """Return Dovecot's map of shared mailboxes (a dict file: key and value in turn) for `units`, id to address."""
    return "".join(f"{_GROUPS}{unit}/{address}\n1\n" for unit, address in sorted(units.items()))


def same_map(text: str, wanted: str) -> bool:
    """Tell whether two maps hold the same, in whatever order."""
    return sorted(text.splitlines()) == sorted(wanted.splitlines())


def is_folder_name(identity: str) -> bool:
    """Tell whether an id can be the name of a folder as it stands, so that joining it to a path stays below."""
    return bool(_ID.fullmatch(identity))


# --- hand-over ------------------------------------------------------------------------------------


def hand_overs(plan: Iterable[str]) -> list[dict[str, Any]]:
    """Return what plan.json, which has one change a line, says of accepted hand-overs: unit, from, to, grounds."""
    found = []
    for line in plan:
        if '"hand-over"' not in line or not line.startswith('{"action"'):
            continue
        row = json.loads(line.rstrip().rstrip(","))
        if row["refused"] is None and "hand-over" in (row["action"], *row["also"]):
            heads = [next(iter((row[side] or {}).get("mailboxHead") or []), None) for side in ("before", "after")]
            found.append({"unit": row["id"], "from": heads[0], "to": heads[1], "grounds": row["refs"]})
    return found


def verdict(before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]]) -> tuple[str, int]:
    """Compare a mailbox before and after a hand-over (DL-9, LC-10.3): what the receipt says, and messages lost.

    Both map folders to their messages and uidnext. What arrived is what uidnext grew by (RFC 3501 2.3.1.1).
    """
    arrived = sum(max(0, now["uidnext"] - before.get(name, {"uidnext": 1})["uidnext"]) for name, now in after.items())
    there, then = (sum(folder["messages"] for folder in side.values()) for side in (after, before))
    lost = max(0, then + arrived - there)
    text = f"{arrived} arrived meanwhile" if arrived else "equal"
    if lost:
        text = f"{lost} fewer than before" + (f", and {text}" if arrived else "")
    return text, lost


def receipt(pending: Mapping[str, Any], counted: Mapping[str, Any], time: str) -> tuple[dict[str, Any], int]:
    """Return the finished receipt and the number of messages lost.

    `pending` is what was written before the directory was changed, `counted` what the mail store counted afterwards
    (`Counted` in the module), `time` the end of the hand-over (ISO 8601).
    """
    after = counted["folders"]
    text, lost = verdict(pending["folders"], after)
    names = counted["people"]
    folders = [
        {
            "folder": name,
            **{
                moment: {key: side.get(name, {}).get(key, 0) for key in ("messages", "octets")}
                for moment, side in (("before", pending["folders"]), ("after", after))
            },
        }
        for name in sorted(pending["folders"].keys() | after.keys())
    ]
    return {
        "unit": {"id": pending["unit"], "name": counted["name"], "address": counted["address"]},
        "from": {"id": pending["from"], "name": names.get(pending["from"])},
        "to": {"id": pending["to"], "name": names.get(pending["to"])},
        "grounds": pending["grounds"],
        "counted": pending["time"],
        "time": time,
        "folders": folders,
        "verdict": text,
    }, lost
