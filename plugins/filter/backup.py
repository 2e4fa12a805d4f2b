"""Filters of the backup role."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

SHOWN = ("mailboxes", "messages", "entries", "files", "octets", "added", "snapshots", "room", "result")

DOCUMENTATION = r"""
name: htpasswd_hash
short_description: Hash of a random password as an htpasswd file has it
description:
  - C({SHA}) and the SHA-1 of the password. The same password gives the same line at each run, and no clear password
    has to be given to a command. Only for a password that is random and long, which no table of hashes has. The server
    checks it with each of thousands of requests, for which bcrypt is too slow.
options:
  _input:
    description: The password.
    type: str
    required: true
"""

EXAMPLES = r"""
- ansible.builtin.debug:
    msg: "mail:{{ backup_server_password | htpasswd_hash }}"
"""

RETURN = r"""
_value:
  description: C({SHA}…).
  type: str
"""


def htpasswd_hash(password: str) -> str:
    """Hash of a random password as an htpasswd file has it.

    >>> htpasswd_hash("password")
    '{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g='
    """
    return "{SHA}" + base64.b64encode(hashlib.sha1(password.encode()).digest()).decode()


def further_backup_files(further: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Files with what is secret of the further repositories, as the backup role writes them.

    >>> [one["path"] for one in further_backup_files([{"name": "far", "url": "s3:https://s3.example/b"}])]
    ['/etc/mail-backup/further/far.location', '/etc/mail-backup/further/far.environment']
    """
    files = []
    for one in further:
        environment = "\n".join(f"{name}={value}" for name, value in sorted(one.get("environment", {}).items()))
        for kind, content in (("location", one["url"]), ("environment", environment)):
            path = f"/etc/mail-backup/further/{one['name']}.{kind}"
            files.append({"path": path, "content": content, "group": "root", "mode": "0600"})
    return files


def backup_table(entries: Mapping[str, Mapping[str, Any]], host: str) -> list[str]:
    """Lines for people of what `mail-backup status` or `backup-server status` answers on a host.

    >>> backup_table({"mail": {"ok": 1, "good": 0, "seconds": 2.5, "messages": 3}}, "mail1")
    ['mail1 mail: last good 1970-01-01 00:00 UTC, took 2.5 s, messages 3']
    >>> backup_table({"mail": {"ok": 0, "error": "It is full."}, "host": {"running": 1, "done": 5, "of": 10}}, "mail1")
    ['mail1 host: never good, running: 50 %', 'mail1 mail: never good, LAST RUN FAILED: It is full.']
    """
    lines = []
    for kind, entry in sorted(entries.items()):
        good = entry.get("good", entry["ended"] if kind == "look" and "ended" in entry else None)
        parts = ["never good" if good is None else f"last good {datetime.fromtimestamp(good, UTC):%Y-%m-%d %H:%M} UTC"]
        if entry.get("running"):
            parts.append(f"running: {100 * entry.get('done', 0) // max(entry.get('of', 0), 1)} %")
        elif not entry.get("ok", 1):
            parts.append(f"LAST RUN FAILED: {entry.get('error', '')}")
        if "seconds" in entry:
            parts.append(f"took {entry['seconds']} s")
        parts += [f"{name} {entry[name]}" for name in SHOWN if name in entry]
        lines.append(f"{host} {kind}: {', '.join(parts)}")
    return lines


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {
            "backup_table": backup_table,
            "further_backup_files": further_backup_files,
            "htpasswd_hash": htpasswd_hash,
        }
