"""Two passwords for one identity while one takes the place of the other.

The whole rotation, with mail flowing, is the campaign tests/rotation.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from playbook import CHECKOUT, Province
from service import Service, password


@pytest.fixture
def identity(service: Service) -> Iterator[str]:
    """The DN of an identity that the playbooks do not know; it goes when the test ends."""
    dn = f"cn=thu-xoay-vong,ou=services,{service.base}"
    yield dn
    with service.ldap_admin() as admin:
        admin.delete(dn)


def test_an_identity_takes_the_passwords_that_it_is_given_and_no_others(
    service: Service, lab: dict[str, Any], identity: str, tmp_path: Path
) -> None:
    """First one, then two, then the new one alone; each time a second run changes nothing."""
    province = Province(lab, tmp_path / "inventory")
    old, new = password(), password()
    name = identity.split(",")[0].removeprefix("cn=")
    ldif = f"dn: {identity}\nobjectClass: organizationalRole\nobjectClass: simpleSecurityObject\ncn: {name}\n"
    ldif += f"pwdPolicySubentry: cn=services,ou=policies,{service.base}\n"
    host = service.in_group("directory")[0]
    for words in ([old], [new, old], [new]):
        task = {"openldap_entries": {"ldif": ldif, "passwords": {identity: words}}}
        play = tmp_path / "play.yml"
        play.write_text(yaml.safe_dump([{"hosts": host, "gather_facts": False, "tasks": [task]}]), encoding="utf-8")
        for changed in (1, 0):
            run = province.run(os.path.relpath(play, CHECKOUT / "playbooks"))
            assert (run.status, run.changed[host]) == (0, changed), run.output
        for word in (old, new):
            with service.ldap(identity, word) as connection:
                assert connection.bound == (word in words)
