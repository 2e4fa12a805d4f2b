#!/usr/bin/python3
"""directory-purge: end the retention of those who have left, when its time is over.

    directory-purge            tombstone instead of entry, as playbooks/directory.yml does; mailbox-purge does the rest
    directory-purge --report   who is kept until when, and who is only in backups and until when, as JSON

0 when nothing is overdue; 1 when slapd or the policy does not let it end, 75 when a run of the playbook is at work.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, "/usr/local/lib/hopthu")

from hopthu.plan import Plan, make_purge_plan
from hopthu.slapd import (
    Busy,
    DecisionLog,
    Refused,
    alone,
    carry_out,
    compare_and_swap,
    connect,
    mailboxes,
    pages,
    serial,
    text,
    tombstones,
    utc,
)

SETTINGS = Path("/etc/hopthu/purge.json")
BUSY = 75  # as the unit knows it
GONE = "(|(mailboxState=left)(mailboxState=dissolved))"
KEPT = ["uid", "mail", "mailboxClass", "mailboxState", "mailboxStateSince", "mailboxRetainUntil"]
PURGED = ["uid", "mailboxClass", "mailboxStateSince", "mailboxBackupsUntil"]


def plan(connection: Any, settings: dict[str, Any], now: str) -> Plan:
    """Return what has to be done now."""
    base = settings["base"]
    return make_purge_plan(
        settings["rules"],
        mailboxes(connection, base, f"{GONE}(mailboxRetainUntil<={now})"),
        tombstones(connection, base),
        base=base,
        loader=settings["bind_dn"],
        now=now,
        serial=serial(connection, base),
    )


def purge(connection: Any, settings: dict[str, Any]) -> list[str]:
    """End what is to end, with a line in the decision log; return why something could not."""
    due = plan(connection, settings, utc())
    done = [change for change in due.changes if not change.refused]
    if done:
        compare_and_swap(connection, settings["base"], due.header["serial"])
        decision = {"by": f"directory-purge@{socket.gethostname()}", "commit": "the policy that this host was given"}
        log = DecisionLog(settings["base"], due.header["serial"] + 1, decision)
        connection.add_s(*log.opening(due.header["counts"], [text(change) for change in done]))
        carry_out(connection, due.steps, due.changes, None)
        connection.add_s(*log.closing())
    for change in done:
        print(f"{change.id} {change.address}: retention is over, purged")
    return [f"{change.id}: {change.refused}" for change in due.changes if change.refused]


def report(connection: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return who is kept and who is purged, each with the times of its entry."""
    base, found = settings["base"], []
    for branch in ("units", "people"):
        found += list(pages(connection, f"ou={branch},{base}", f"(&(objectClass=hopThuMailbox){GONE})", KEPT))
    gone = pages(connection, f"ou=released,{base}", "(objectClass=hopThuReleased)", PURGED)
    return {
        "now": utc(),
        "kept": sorted((flat(values) for _dn, values in found), key=lambda row: row["uid"]),
        "purged": sorted((flat(values) for _dn, values in gone), key=lambda row: row["uid"]),
    }


def flat(values: dict[str, list[bytes]]) -> dict[str, str]:
    """Return the first value of each attribute as text."""
    return {name: value[0].decode() for name, value in values.items()}


def main() -> int:
    """Entry point."""
    settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
    try:
        if sys.argv[1:] == ["--report"]:
            connection = connect("ldapi:///", settings["bind_dn"], settings["password_file"])
            print(json.dumps(report(connection, settings), ensure_ascii=False))
            return 0
        with alone():
            connection = connect("ldapi:///", settings["bind_dn"], settings["password_file"])
            refused = purge(connection, settings)
    except Refused as refusal:
        print(f"directory-purge: {refusal}", file=sys.stderr)
        return BUSY if isinstance(refusal, Busy) else 1
    for line in refused:
        message = f"retention is over and the mailbox still there: {line}; then run playbooks/directory.yml"
        print(message, file=sys.stderr)
        # Outside this unit's confinement: it may have to send mail.
        command = ["systemd-run", "--quiet", "--collect", "/usr/local/sbin/alarm", "retention-overdue", message]
        subprocess.run(command, check=True, timeout=60)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
