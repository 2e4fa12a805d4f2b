"""The directory: who is in it, who may read and write what, and what happens to passwords."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import ldap3
import pytest
import yaml
from ldap3.core.exceptions import LDAPConstraintViolationResult
from service import Mailbox, Service, password

ONE_NAME = ["DL-4"]
PASSWORD_RULES = ["DL-8.1", "HT-4.3c"]
INVENTORIES = Path(__file__).parents[2] / "inventories"


@pytest.mark.requirement("DL-annex", "HT-2.3", "LC-5", *ONE_NAME)
def test_mailboxes_are_those_of_the_files(service: Service) -> None:
    """Dovecot and LDAP list the same mailboxes, and they are the units of the annex as printed."""
    text = (INVENTORIES / service.province / "directory" / "units.yml").read_text(encoding="utf-8")
    units = yaml.safe_load(text)["mail_units"]
    printed = {f"{unit['local_part']}@{service.domain}" for unit in units}
    assert len(printed) == len(units) == 43
    with service.ldap_admin() as admin:
        admin.search(service.base, "(objectClass=hopThuMailbox)", attributes=["mail"])
        in_directory = [entry.mail.value for entry in admin.entries]
    listed = service.run(service.in_group("mailstore")[0], "doveadm user '*'").split()
    assert sorted(listed) == sorted(in_directory) == sorted(printed)


@pytest.mark.requirement(*ONE_NAME)
def test_second_mailbox_of_the_same_name_is_refused(service: Service, new_mailbox: Callable[..., Mailbox]) -> None:
    """By the directory itself, whoever writes: as address and as alias."""
    mailbox = new_mailbox(mailLocalAddress=f"thu-{secrets.token_hex(5)}@{service.domain}")
    with service.ldap_admin() as admin:
        admin.search(mailbox.dn, "(objectClass=*)", attributes=["mailLocalAddress"])
        alias = admin.entries[0].mailLocalAddress.value
    for taken in ({"mail": mailbox.address}, {"mailLocalAddress": alias}):
        with pytest.raises(LDAPConstraintViolationResult):
            new_mailbox(**taken)


def test_anonymous_search_finds_nothing(service: Service, address: str) -> None:
    with service.ldap(None, address=address) as anonymous:
        for base in (service.base, f"ou=units,{service.base}", "cn=accesslog", "cn=config"):
            anonymous.search(base, "(objectClass=*)", attributes=["*", "+"])
            assert anonymous.entries == [], base


# --- passwords


@pytest.mark.requirement(*PASSWORD_RULES)
def test_chosen_password_is_argon2_and_nowhere_in_clear(service: Service, mailbox: Mailbox, address: str) -> None:
    """Changed by its holder (RFC 3062). The audit trail has the change, with the hash only."""
    chosen = password()
    with service.ldap(mailbox.dn, mailbox.password, address) as connection:
        assert connection.extend.standard.modify_password(mailbox.dn, mailbox.password, chosen), connection.result
    with service.ldap(mailbox.dn, chosen, address) as connection:
        assert connection.bound
    with service.ldap_admin() as admin:
        admin.search(mailbox.dn, "(objectClass=*)", attributes=["userPassword"])
        (stored,) = admin.entries[0].entry_raw_attributes["userPassword"]
        admin.search("cn=accesslog", f"(reqDN={mailbox.dn})", attributes=["*"])
        trail = [value for entry in admin.entries for values in entry.entry_raw_attributes.values() for value in values]
    assert stored.startswith(b"{ARGON2}$argon2id$")
    assert b"userPassword:= " + stored in trail
    assert not [value for value in trail if chosen.encode() in value or mailbox.password.encode() in value]


@pytest.mark.requirement(*PASSWORD_RULES)
def test_weak_and_used_passwords_are_refused(service: Service, mailbox: Mailbox) -> None:
    """Too short, the same again, and without knowing the old one."""
    with service.ldap(mailbox.dn, mailbox.password) as connection:
        change = connection.extend.standard.modify_password
        assert not change(mailbox.dn, mailbox.password, "Ngan-1a")
        assert not change(mailbox.dn, mailbox.password, mailbox.password)
        assert not change(mailbox.dn, password(), password())
        assert change(mailbox.dn, mailbox.password, password())


# --- who may do what

# Entries: own and other are unit mailboxes, policy the password policy, service another daemon's identity.
# Attributes read by searching for the entry with them, written by replacing their value.
ACCESS = [
    # identity, entry, attribute, may read, may write
    ("anonymous", "own", "mail", False, False),
    ("anonymous", "own", "userPassword", False, False),
    ("anonymous", "own", "cn", False, False),
    ("unit", "own", "mail", True, False),
    ("unit", "own", "mailboxState", True, False),
    ("unit", "own", "mailboxQuota", True, False),
    ("unit", "own", "mailLocalAddress", True, False),
    ("unit", "own", "ou", True, False),
    ("unit", "own", "businessCategory", True, False),
    ("unit", "own", "userPassword", False, True),
    ("unit", "own", "pwdReset", False, False),
    ("unit", "other", "mail", True, False),
    ("unit", "other", "ou", True, False),
    ("unit", "other", "mailboxQuota", False, False),
    ("unit", "other", "businessCategory", False, False),
    ("unit", "other", "userPassword", False, False),
    ("unit", "other", "pwdReset", False, False),
    ("unit", "policy", "pwdMinLength", False, False),
    ("unit", "service", "userPassword", False, False),
    ("postfix", "own", "mail", True, False),
    ("postfix", "own", "mailLocalAddress", True, False),
    ("postfix", "own", "mailboxState", True, False),
    ("postfix", "own", "mailboxQuota", False, False),
    ("postfix", "own", "uid", False, False),
    ("postfix", "own", "ou", False, False),
    ("postfix", "own", "userPassword", False, False),
    ("postfix", "service", "userPassword", False, False),
    ("dovecot", "own", "mail", True, False),
    ("dovecot", "own", "uid", True, False),
    ("dovecot", "own", "mailboxQuota", True, False),
    ("dovecot", "own", "mailLocalAddress", False, False),
    ("dovecot", "own", "ou", True, False),
    ("dovecot", "own", "userPassword", False, False),
    ("dovecot", "own", "pwdReset", False, False),
    ("loader", "own", "mailLocalAddress", True, True),
    ("loader", "own", "mailboxState", True, True),
    ("loader", "own", "mailboxQuota", True, True),
    ("loader", "own", "ou", True, True),
    ("loader", "own", "userPassword", True, True),
    ("loader", "policy", "pwdMinLength", False, False),
    ("loader", "service", "userPassword", False, False),
    ("loader", "audit", "reqDN", False, False),
    ("unit", "audit", "reqDN", False, False),
    ("dovecot", "audit", "reqDN", False, False),
]
# Values that leave the tree usable; every other attribute gets back a text.
VALUES = {"mailboxState": "active", "mailboxQuota": "1073741824", "pwdReset": "FALSE", "pwdMinLength": "1"}


@pytest.fixture(scope="module")
def pair(service: Service) -> Iterator[tuple[Mailbox, Mailbox]]:
    """Two unit mailboxes with all their attributes."""
    with ExitStack() as stack:
        yield tuple(
            stack.enter_context(
                service.new_mailbox(
                    mailLocalAddress=f"thu-{secrets.token_hex(5)}@{service.domain}",
                    businessCategory="administrative",
                    pwdReset="FALSE",
                )
            )
            for _ in range(2)
        )


@pytest.mark.parametrize(("identity", "entry", "attribute", "may_read", "may_write"), ACCESS)
def test_access_to_the_directory(
    service: Service,
    pair: tuple[Mailbox, Mailbox],
    identity: str,
    entry: str,
    attribute: str,
    may_read: bool,
    may_write: bool,
) -> None:
    own, other = pair
    targets = {
        "own": own.dn,
        "other": other.dn,
        "policy": f"cn=default,ou=policies,{service.base}",
        "service": f"cn={'postfix' if identity != 'postfix' else 'dovecot'},ou=services,{service.base}",
        "audit": "cn=accesslog",
    }
    if identity == "anonymous":
        credentials: tuple[str | None, str | None] = (None, None)
    elif identity == "unit":
        credentials = (own.dn, own.password)
    else:
        dn = f"cn={identity},ou=services,{service.base}"
        credentials = (dn, service.secrets[f"vault_openldap_{identity}_password"])
    value = VALUES.get(attribute, f"thu-{secrets.token_hex(5)}@{service.domain}")
    if attribute == "userPassword":
        value = password()

    with service.ldap(*credentials) as connection:
        assert connection.bound
        scope = ldap3.SUBTREE if entry == "audit" else ldap3.BASE
        connection.search(targets[entry], "(objectClass=*)", scope, attributes=[attribute], size_limit=5)
        read = any(found.entry_raw_attributes.get(attribute) for found in connection.entries)
        connection.modify(targets[entry], {attribute: [(ldap3.MODIFY_REPLACE, [value])]})
        written = connection.result["result"] == 0
    if attribute == "userPassword" and written:
        service.modify(own.dn, userPassword=own.password)
        service.modify(own.dn, pwdReset="FALSE")
    assert (read, written) == (may_read, may_write), connection.result


@pytest.mark.parametrize("identity", ["unit", "postfix", "dovecot"])
def test_only_the_loader_adds_and_removes(service: Service, pair: tuple[Mailbox, Mailbox], identity: str) -> None:
    own, other = pair
    dn = own.dn if identity == "unit" else f"cn={identity},ou=services,{service.base}"
    word = own.password if identity == "unit" else service.secrets[f"vault_openldap_{identity}_password"]
    uid = f"thu-{secrets.token_hex(5)}"
    entry = {"uid": uid, "ou": uid, "mail": f"{uid}@{service.domain}", "mailboxState": "active", "mailboxClass": "unit"}
    with service.ldap(dn, word) as connection:
        assert not connection.add(f"uid={uid},ou=units,{service.base}", ["organizationalUnit", "hopThuMailbox"], entry)
        assert connection.result["result"] == 50, connection.result
        assert not connection.delete(other.dn)
        assert connection.result["result"] == 50, connection.result
