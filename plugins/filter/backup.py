"""Filters of the backup role."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

DOCUMENTATION = r"""
name: htpasswd_hash
short_description: Hash of a random password as an htpasswd file has it
description:
  - C({SHA}) and the SHA-1 of the password. The same password gives the same line at each run, and no clear password has
    to be given to a command. Only for a password that is random and long, which no table of hashes has. The server checks
    it with each of thousands of requests, for which bcrypt is too slow.
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

    >>> further_backup_files([{"name": "far", "url": "s3:https://s3.example/b", "environment": {"AWS_ACCESS_KEY_ID": "k"}}])
    ... # doctest: +NORMALIZE_WHITESPACE
    [{'path': '/etc/mail-backup/further/far.location', 'content': 's3:https://s3.example/b', 'group': 'root', 'mode': '0600'},
     {'path': '/etc/mail-backup/further/far.environment', 'content': 'AWS_ACCESS_KEY_ID=k', 'group': 'root', 'mode': '0600'}]
    """
    files = []
    for one in further:
        environment = "\n".join(f"{name}={value}" for name, value in sorted(one.get("environment", {}).items()))
        for kind, content in (("location", one["url"]), ("environment", environment)):
            path = f"/etc/mail-backup/further/{one['name']}.{kind}"
            files.append({"path": path, "content": content, "group": "root", "mode": "0600"})
    return files


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"htpasswd_hash": htpasswd_hash, "further_backup_files": further_backup_files}
