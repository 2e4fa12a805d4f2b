"""How long what is stored is kept: section `retention` of policy.yml. Pure.

All times are whole days; the defaults are those of inventories/schema/policy.schema.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

_PRUNED_DAYS = 7  # from the end of a backup's time until its octets are gone: the repository is pruned weekly
_KEEP = {
    "within": "all_days",
    "within-daily": "daily_days",
    "within-weekly": "weekly_days",
    "within-monthly": "monthly_days",
}


def backup_days(retention: Mapping[str, Any]) -> int:
    """Return for how many days after it is gone from the mail store backups may still hold something."""
    return int(max(retention["backups"].values())) + _PRUNED_DAYS


def backup_keep(retention: Mapping[str, Any]) -> dict[str, str]:
    """Return what `restic forget` is told, as durations: `--keep-within` and the three finer ones.

    >>> backup_keep({"backups": {"all_days": 3, "daily_days": 31, "weekly_days": 92, "monthly_days": 366}})
    {'within': '3d', 'within-daily': '31d', 'within-weekly': '92d', 'within-monthly': '366d'}
    """
    return {name: f"{retention['backups'][days]}d" for name, days in _KEEP.items()}


# --- the report --------------------------------------------------------------------------------------------------

_LATE = timedelta(hours=3)  # who ends a leaver's retention looks every hour
_WORDS = {"left": "left", "dissolved": "was dissolved"}


def report(
    retention: Mapping[str, Any], directory: Mapping[str, Any], hosts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what is kept, for how long, and what should be gone by now (`overdue`: sentences with the way out).

    `directory` is what `directory-purge --report` said, `hosts` what was found on each host: `logs` (days of which it
    has some, "2026-11-26"), `journal` (number of files of its message journal that are too old), `folders`
    ({"Junk": number of messages that are too old}) and `purged` (ids of purged mailboxes of which it has something).
    """
    now = _time(directory["now"])
    kept = [
        _kept(
            "logs",
            retention["logs_days"],
            oldest=min((day for one in hosts.values() for day in one["logs"]), default=None),
        ),
        _kept("message journal", retention["journal_days"]),
        _kept("Junk", retention["junk_days"]),
        _kept("Trash", retention["trash_days"]),
        _kept("mailboxes of leavers", retention["leaver_days"]),
        _kept("backups", max(retention["backups"].values()), gone_after_days=backup_days(retention)),
    ]
    leavers = [_leaver(row, now) for row in directory["kept"]]
    purged = [_purged(row, now) for row in directory["purged"]]
    return {
        "checked": now.isoformat(),
        "kept": kept,
        "leavers": leavers,
        "purged": purged,
        "overdue": [*_overdue_mailboxes(leavers), *_overdue_on_hosts(retention, hosts, now)],
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return a report in words."""
    text = [
        f"{row['what']}: {row['days']} days" if row["days"] else f"{row['what']}: until the holder deletes it"
        for row in found["kept"]
    ]
    text += [
        f"{row['id']} <{row['address']}> {_WORDS[row['state']]} {row['since']}, kept until {row['until']}"
        for row in found["leavers"]
    ]
    text += [
        f"{row['id']} was purged {row['since']}, in backups until {row['backups_until']}"
        for row in found["purged"]
        if row["in_backups"]
    ]
    return text


def _kept(what: str, days: int, **more: Any) -> dict[str, Any]:
    return {"what": what, "days": days, **more}


def _time(text: str) -> datetime:
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def _leaver(row: Mapping[str, str], now: datetime) -> dict[str, Any]:
    until = row.get("mailboxRetainUntil")
    return {
        "id": row["uid"],
        "address": row["mail"],
        "kind": row["mailboxClass"],
        "state": row["mailboxState"],
        "since": _day(row.get("mailboxStateSince")),
        "until": _day(until),
        "overdue": until is None or _time(until) + _LATE < now,
    }


def _purged(row: Mapping[str, str], now: datetime) -> dict[str, Any]:
    until = row.get("mailboxBackupsUntil")
    return {
        "id": row["uid"],
        "kind": row["mailboxClass"],
        "since": _day(row.get("mailboxStateSince")),
        "backups_until": _day(until),
        "in_backups": until is not None and _time(until) > now,
    }


def _day(text: str | None) -> str | None:
    return None if text is None else _time(text).date().isoformat()


def _overdue_mailboxes(leavers: Iterable[Mapping[str, Any]]) -> list[str]:
    return [
        f"{row['id']} <{row['address']}> should have been purged on {row['until']}: journalctl -u directory-purge on "
        "the host that holds the service tells why not"
        if row["until"]
        else f"{row['id']} <{row['address']}> is kept without an end: run playbooks/directory.yml"
        for row in leavers
        if row["overdue"]
    ]


def _overdue_on_hosts(retention: Mapping[str, Any], hosts: Mapping[str, Mapping[str, Any]], now: datetime) -> list[str]:
    oldest = (now - timedelta(days=retention["logs_days"] + 2)).date().isoformat()
    found = []
    for host, one in sorted(hosts.items()):
        if logs := [day for day in one["logs"] if day < oldest]:
            found.append(f"{host} has logs of {min(logs)}: journalctl -u logs-age there tells why")
        if one["journal"]:
            found.append(
                f"{host} has {one['journal']} old files in its message journal: journalctl -u mail-journal there"
            )
        found += [
            f"{count} messages in {folder} should be gone: journalctl -u junk-expiry on {host} tells why"
            for folder, count in one["folders"].items()
            if count
        ]
        found += [
            f"{host} still has mail of {name}, who was purged: journalctl -u mailbox-purge there"
            for name in one["purged"]
        ]
    return found
