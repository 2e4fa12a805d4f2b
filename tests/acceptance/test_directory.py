"""The directory: who is in it, who may read and write what, and what happens to passwords."""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

DAEMONS = ("postfix", "dovecot", "guard", "auditor", "loader", "replicator", "probe")
IDENTITIES = ("anonymous", "unit", "person", "head", "application", *DAEMONS, "admin")
# What stands in an entry, and so what somebody might read or write there.
PUBLIC = {"objectClass", "uid", "mail", "mailLocalAddress", "mailboxState", "mailboxClass", "userCertificate;binary"}
OWN = {"mailboxQuota", "businessCategory", "mailboxInternal", "mailboxGrounds", "mailboxDigest"}
CLOSED = {"userPassword", "pwdReset", "pwdAccountLockedTime"}
HELD = {
    "unit": PUBLIC | OWN | CLOSED | {"ou", "mailboxHead", "mailboxAgent"},
    "person": PUBLIC | OWN | CLOSED | {"cn", "sn", "givenName", "title", "departmentNumber", "mailboxActsFor"},
    "application": {"objectClass", "uid", "cn", "mail", "mailboxState", "mailboxClass", "departmentNumber"}
    | {"applicationHost", "applicationSender", "mailboxGrounds", "userPassword"},
    "service": {"cn", "userPassword"},
    "policy": {"cn", "pwdMinLength"},
    "directory": {"directorySerial"},
    "audit": {"reqDN", "reqMod"},
}
BOOK = {"unit": PUBLIC | {"ou"}, "person": PUBLIC | {"cn", "sn", "givenName", "title", "departmentNumber"}}
"""The address book: what everybody who logs in reads of everybody."""
ROUTE = {"objectClass", "mail", "mailLocalAddress", "mailboxState", "mailboxClass", "mailboxInternal"}
STORE = {"objectClass", "uid", "mail", "mailboxState", "mailboxClass", "mailboxQuota"}
# identity → entry → what it may read; entries that are not named: nothing. `self` is the identity's own entry.
READ: dict[str, dict[str, set[str]]] = {
    "unit": {**BOOK, "self": HELD["unit"] - CLOSED},
    "person": {**BOOK, "self": HELD["person"] - CLOSED},
    "head": BOOK,
    "postfix": {
        "unit": ROUTE | {"mailboxAgent"},
        "person": ROUTE,
        "application": {"objectClass", "mail", "mailboxState"},
    },
    "dovecot": {
        "unit": STORE | {"ou", "mailboxHead"},
        "person": STORE | {"cn", "mailboxActsFor"},
        "application": {"objectClass", "mail", "mailboxState", "applicationHost"},
    },
    "guard": {kind: {"objectClass", "uid", "mail", "pwdAccountLockedTime"} for kind in ("unit", "person")},
    "loader": {**{kind: HELD[kind] for kind in ("unit", "person", "application")}, "directory": HELD["directory"]},
    # A copy has everything.
    "replicator": {kind: names for kind, names in HELD.items() if kind != "audit"},
    "admin": HELD,
}
# The same for writing. The guard only deletes.
WRITE: dict[str, dict[str, set[str]]] = {
    "unit": {"self": {"userPassword"}},
    "person": {"self": {"userPassword"}},
    "loader": {**{kind: HELD[kind] for kind in ("unit", "person", "application")}, "directory": HELD["directory"]},
    "admin": {kind: names for kind, names in HELD.items() if kind != "audit"},
}


@dataclass
class Cast:
    """Entries with every attribute, and who logs in as whom."""

    entries: dict[str, str]
    logins: dict[str, tuple[str | None, str | None]]


@pytest.fixture(scope="module")
def cast(service: Service) -> Iterator[Cast]:
    """A unit with its head, a person, an application; and a unit and a person that log in and are somebody else."""
    tag, word = secrets.token_hex(5), password()
    certificate = ssl.PEM_cert_to_DER_cert(Path(service.ca_file).read_text(encoding="utf-8"))
    common = {"mailboxState": "active", "mailboxQuota": 1 << 30, "businessCategory": "administrative"}
    common |= {"mailboxInternal": "TRUE", "mailboxGrounds": "request_ref 1", "mailboxDigest": "0"}
    common |= {"userCertificate;binary": certificate, "pwdReset": "FALSE", "pwdAccountLockedTime": "20200101000000Z"}
    mailbox = ["hopThuMailbox", "inetLocalMailRecipient"]
    entries: dict[str, str] = {}
    added = []
    with service.ldap_admin() as admin:
        for name in ("unit", "other-unit", "person", "head", "other-person", "application"):
            kind = name.rpartition("-")[2].replace("head", "person")
            uid = f"thu-{name}-{tag}"
            content = {"uid": uid, "mail": f"{uid}@{service.domain}", "mailboxClass": kind, "userPassword": word}
            if kind == "application":
                classes = ["hopThuApplication"]
                content |= {"cn": uid, "mailboxState": "active", "departmentNumber": tag, "mailboxGrounds": "x 1"}
                content |= {"applicationHost": "192.0.2.1", "applicationSender": f"{uid}@{service.domain}"}
                content["pwdPolicySubentry"] = f"cn=services,ou=policies,{service.base}"
            elif kind == "unit":
                classes = ["organizationalUnit", *mailbox]
                content |= {**common, "ou": uid, "mailLocalAddress": f"{uid}.a@{service.domain}"}
                content |= {"mailboxHead": f"thu-head-{tag}", "mailboxAgent": f"thu-head-{tag}@{service.domain}"}
            else:
                classes = ["inetOrgPerson", *mailbox]
                content |= {**common, "cn": uid, "sn": "Lê", "givenName": "An", "title": "x", "departmentNumber": tag}
                content |= {"mailLocalAddress": f"{uid}.a@{service.domain}", "mailboxActsFor": f"thu-unit-{tag}"}
            branch = {"unit": "units", "person": "people", "application": "applications"}[kind]
            entries[name] = f"uid={uid},ou={branch},{service.base}"
            # An account that has to log in is not locked.
            lock = {} if name in ("unit", "person") else {"pwdAccountLockedTime"}
            admin.add(entries[name], classes, {key: value for key, value in content.items() if key not in lock})
            added.append(entries[name])
    targets = {"unit": entries["unit"], "person": entries["person"], "application": entries["application"]}
    targets |= {"service": f"cn=auditor,ou=services,{service.base}", "audit": "cn=accesslog"}
    targets |= {"policy": f"cn=default,ou=policies,{service.base}", "directory": f"cn=directory,{service.base}"}
    logins: dict[str, tuple[str | None, str | None]] = {"anonymous": (None, None)}
    logins |= {"unit": (entries["other-unit"], word), "person": (entries["other-person"], word)}
    logins |= {"head": (entries["head"], word), "application": (entries["application"], word)}
    for name in DAEMONS:
        logins[name] = (f"cn={name},ou=services,{service.base}", service.secrets[f"vault_openldap_{name}_password"])
    logins["admin"] = (service.admin_dn, service.secrets["vault_openldap_admin_password"])
    try:
        yield Cast(targets, logins)
    finally:
        with service.ldap_admin() as admin:
            for dn in added:
                admin.delete(dn)


def held(service: Service, dn: str, kind: str) -> dict[str, list[bytes]]:
    """The values of an entry (of the audit log: of one of its entries), as the administrator reads them."""
    with service.ldap_admin() as admin:
        scope = ldap3.LEVEL if kind == "audit" else ldap3.BASE
        admin.search(dn, "(objectClass=*)", scope, attributes=["*", "+"])
        found: dict[str, list[bytes]] = dict(admin.entries[-1].entry_raw_attributes)
        return found


@pytest.mark.parametrize("entry", HELD)
@pytest.mark.parametrize("identity", IDENTITIES)
def test_access_to_the_directory(service: Service, cast: Cast, identity: str, entry: str) -> None:
    """Each identity reads and writes, attribute by attribute, exactly what the tables above name."""
    own = identity in ("unit", "person") and entry == identity
    _look(service, cast, identity, entry, cast.entries[entry], entry)
    if own:
        _look(service, cast, identity, entry, str(cast.logins[identity][0]), "self")


def _look(service: Service, cast: Cast, identity: str, kind: str, dn: str, entry: str) -> None:
    """Compare what an identity may do at an entry with the tables."""
    values = {} if kind == "audit" else held(service, dn, kind)
    readable, writable, answers = set(), set(), {}
    with service.ldap(*cast.logins[identity]) as connection:
        assert connection.bound, connection.result
        for name in HELD[kind]:
            scope = ldap3.LEVEL if kind == "audit" else ldap3.BASE
            connection.search(dn, "(objectClass=*)", scope, attributes=[name], size_limit=5)
            if any(found.entry_raw_attributes.get(name) for found in connection.entries):
                readable.add(name)
        for name in HELD[kind]:
            # The value that it has, so that who may write it changes nothing; or else one that fits. A new password
            # where nobody needs the old one, and where it must not come to that.
            value: list[Any] = values.get(name, ["20200101000000Z" if name == "pwdAccountLockedTime" else dn])
            if name == "userPassword" and (kind in BOOK or identity not in ("admin", "loader")):
                value = [password()]
            connection.modify(dn, {name: [(ldap3.MODIFY_REPLACE, value)]})
            answers[name] = connection.result
            if connection.result["result"] == 0:
                writable.add(name)
                if entry == "self":
                    cast.logins[identity] = (dn, value[0])
    present = {name for name in HELD[kind] if name in values} if values else HELD[kind]
    assert readable == READ.get(identity, {}).get(entry, set()) & present
    assert writable == WRITE.get(identity, {}).get(entry, set()), answers


def test_the_guard_ends_a_lock_and_makes_none(service: Service, mailbox: Mailbox) -> None:
    """It deletes what locks an account, and can neither set it nor touch anything else."""
    service.modify(mailbox.dn, pwdAccountLockedTime="000001010000Z")
    with service.ldap(mailbox.dn, mailbox.password) as connection:
        assert not connection.bound
    dn = f"cn=guard,ou=services,{service.base}"
    with service.ldap(dn, service.secrets["vault_openldap_guard_password"]) as guard:
        guard.search(f"ou=units,{service.base}", "(pwdAccountLockedTime=*)", attributes=["mail"])
        assert mailbox.address in [entry.mail.value for entry in guard.entries]
        assert guard.modify(mailbox.dn, {"pwdAccountLockedTime": [(ldap3.MODIFY_DELETE, [])]}), guard.result
        for name, value in (("pwdAccountLockedTime", "000001010000Z"), ("mailboxState", "suspended")):
            assert not guard.modify(mailbox.dn, {name: [(ldap3.MODIFY_ADD, [value])]})
            assert guard.result["result"] == 50, guard.result
    with service.ldap(mailbox.dn, mailbox.password) as connection:
        assert connection.bound


@pytest.fixture(scope="module")
def pair(service: Service) -> Iterator[tuple[Mailbox, Mailbox]]:
    """Two unit mailboxes."""
    with ExitStack() as stack:
        yield (stack.enter_context(service.new_mailbox()), stack.enter_context(service.new_mailbox()))


@pytest.mark.parametrize("identity", ["unit", "postfix", "dovecot", "guard", "auditor"])
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
