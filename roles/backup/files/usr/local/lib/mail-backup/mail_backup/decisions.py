"""Grounds in the directory's decision log: before anything is done, and once more when it is done (decision 0014)."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import ldap
except ImportError:  # only where nothing of it is used, as in unit tests
    ldap = None

from mail_backup.pick import Refused

PASSWORD = Path("/etc/hopthu/directory.secret")
"""Password of the loader, which may add decisions and neither read nor change them; on every host of the directory."""
URI = "ldapi:///"


def entries(base: str, by: str, grounds: str, what: Mapping[str, Any], commit: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the entry to write before and the one to write afterwards: DN and attributes.

    `what` says what is done, without content and secrets. Raises Refused when there are no grounds.
    """
    if not grounds.strip():
        raise Refused("No grounds are given: name the request or order that this stands on, -e grounds='…'")
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    name = f"{now}-{what['action']}-{secrets.token_hex(3)}"
    first: dict[str, Any] = {
        "objectClass": ["hopThuDecision"],
        "cn": [name],
        "decisionBy": [by],
        "decisionTime": [now.replace("T", "")],
        "decisionChange": [json.dumps({**what, "grounds": grounds.strip()}, ensure_ascii=False)],
    }
    if commit:
        first["decisionCommit"] = [commit]
    last = {"objectClass": ["hopThuDecision"], "cn": [f"{name}-done"]}
    return [(f"cn={one['cn'][0]},ou=decisions,{base}", one) for one in (first, last)]


@contextmanager
def decided(base: str, by: str, grounds: str, what: Mapping[str, Any], commit: str = "") -> Iterator[dict[str, Any]]:
    """Write down what will be done, and after the block that it is done, with what was put into the yielded dict.

    Raises Refused when it cannot be written: then nothing may be done.
    """
    opening, closing = entries(base, by, grounds, what, commit)
    _add(base, *opening)
    result: dict[str, Any] = {}
    yield result
    closing[1]["decisionTime"] = [datetime.now(UTC).strftime("%Y%m%d%H%M%SZ")]
    if result:
        closing[1]["decisionChange"] = [json.dumps(result, ensure_ascii=False)]
    _add(base, *closing)


def _add(base: str, dn: str, attributes: Mapping[str, list[str]]) -> None:
    try:
        password = PASSWORD.read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        raise Refused(f"{PASSWORD} cannot be read ({error.strerror}), so the grounds cannot be written down") from None
    try:
        connection = ldap.initialize(URI)
        connection.set_option(ldap.OPT_TIMEOUT, 30)
        connection.simple_bind_s(f"cn=loader,ou=services,{base}", password)
        connection.add_s(dn, [(name, [value.encode() for value in values]) for name, values in attributes.items()])
        connection.unbind_s()
    except ldap.LDAPError as error:
        detail = error.args[0].get("desc", "") if error.args and isinstance(error.args[0], dict) else str(error)
        raise Refused(f"The grounds cannot be written to the decision log of this host's slapd ({detail})") from None
