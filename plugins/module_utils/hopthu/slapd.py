"""The engine's way to slapd: sessions, reading mailboxes, the decision log, carrying out the steps of a plan.

Runs on the managed host, in the module `directory` and in the programs that end a retention or open a mailbox.
"""

from __future__ import annotations

import base64
import fcntl
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .passwords import initial_password, ssha512
from .plan import READ, Change, Row
from .steps import BRANCHES, Step

try:
    import ldap
    import ldap.sasl
    from ldap.controls import SimplePagedResultsControl
except ImportError:
    ldap = None

PAGE = 500  # entries
TIMEOUT = 60  # seconds, for one LDAP operation
WINDOW = 400  # operations under way at a time
DECISION = 1000  # changes in one entry of the decision log
LOCK = "/run/lock/hopthu-directory"

Addition = tuple[str, list[tuple[str, list[bytes]]]]
"""DN and attributes of an entry to be added, as python-ldap wants them."""


class Refused(Exception):
    """Why the work cannot go on, as one sentence with the way out."""


class Busy(Refused):
    """Another run is working on the directory of this host."""


class NotSetUp(Refused):
    """The host has never been through the playbook; with check mode its tree counts as empty."""


def utc() -> str:
    """Return the time as generalizedTime."""
    return time.strftime("%Y%m%d%H%M%SZ", time.gmtime())


def reason(error: Any) -> str:
    """Return what slapd said, on one line."""
    detail = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
    said = [str(detail.get(key, "")).strip() for key in ("desc", "info")]
    return ", ".join(text for text in said if text) or type(error).__name__


# --- sessions ---------------------------------------------------------------------------------------------------------


def connect(uri: str, bind_dn: str, password_file: str) -> Any:
    """Open the loader's session; raises Refused."""
    if ldap is None:
        raise NotSetUp("python3-ldap is not installed on this host: run playbooks/site.yml first")
    if not uri.startswith(("ldapi://", "ldaps://")):
        raise Refused(f"{uri} would show the password on the network: use ldapi:// or ldaps://")
    try:
        with open(password_file, encoding="utf-8") as file:
            password = file.read().rstrip("\r\n")
    except FileNotFoundError:
        raise NotSetUp(f"{password_file} is not there: run playbooks/site.yml first") from None
    except (OSError, UnicodeDecodeError):
        raise Refused(f"{password_file} cannot be read: run playbooks/site.yml first") from None
    if not password:
        raise Refused(f"{password_file} is empty: put the password of {bind_dn} into it")
    connection = session(uri)
    try:
        connection.simple_bind_s(bind_dn, password)
    except ldap.SERVER_DOWN:
        raise Refused(f"slapd does not answer at {uri}: start it") from None
    except ldap.INVALID_CREDENTIALS:
        raise Refused(f"slapd refuses {bind_dn} with the password in {password_file}") from None
    except ldap.LDAPError as error:
        raise Refused(f"slapd at {uri} refuses the session: {reason(error)}") from None
    return connection


def session(uri: str) -> Any:
    """Return an unbound session with this module's limits."""
    connection = ldap.initialize(uri)
    connection.set_option(ldap.OPT_PROTOCOL_VERSION, ldap.VERSION3)
    connection.set_option(ldap.OPT_REFERRALS, 0)
    connection.set_option(ldap.OPT_NETWORK_TIMEOUT, 10)
    connection.set_option(ldap.OPT_TIMEOUT, TIMEOUT)
    return connection


@contextmanager
def alone() -> Iterator[None]:
    """Keep other runs from planning and applying meanwhile; raises Refused when one is at it."""
    with open(LOCK, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy("another run is working on the directory of this host: wait for it, then run again") from None
        yield


# --- reading ----------------------------------------------------------------------------------------------------------


def pages(connection: Any, where: str, about: str, attributes: Sequence[str]) -> Iterator[Row]:
    """Yield the entries one level below `where`, page by page; raises Refused.

    The next page is asked for before this one is worked on, so slapd and this program work at the same time.
    """
    page = SimplePagedResultsControl(True, size=PAGE, cookie="")
    message: int | None = None
    try:
        message = connection.search_ext(where, ldap.SCOPE_ONELEVEL, about, list(attributes), serverctrls=[page])
        while message is not None:
            _type, rows, _message, controls = connection.result3(message, timeout=TIMEOUT)
            page.cookie = next(
                control.cookie for control in controls if control.controlType == SimplePagedResultsControl.controlType
            )
            message = None
            if page.cookie:
                message = connection.search_ext(where, ldap.SCOPE_ONELEVEL, about, list(attributes), serverctrls=[page])
            for dn, values in rows:
                if dn is not None:
                    yield dn, as_text(values)
    except ldap.NO_SUCH_OBJECT:
        raise Refused(f"slapd has no {where} for this identity: run the openldap role first") from None
    except ldap.LDAPError as error:
        raise Refused(f"slapd does not list {where}: {reason(error)}") from None


def as_text(values: dict[str, list[bytes]]) -> dict[str, list[bytes]]:
    """Return attributes with certificates as base64: the engine handles nothing but text."""
    for name in values:
        if name.endswith(";binary"):
            values[name] = [base64.b64encode(value) for value in values[name]]
    return values


def mailboxes(connection: Any, base: str, about: str = "") -> Iterator[Row]:
    """Yield all mailboxes, or those that match a filter, units first and applications last."""
    for kind, branch in BRANCHES.items():
        wanted = "hopThuApplication" if kind == "application" else "hopThuMailbox"
        yield from pages(connection, f"{branch},{base}", f"(&(objectClass={wanted}){about})", READ[kind])


def tombstones(connection: Any, base: str) -> Iterator[Row]:
    """Yield what is left of purged mailboxes."""
    wanted = ["uid", "mailboxClass", "mailboxFormerAddress"]
    return pages(connection, f"ou=released,{base}", "(objectClass=hopThuReleased)", wanted)


def serial(connection: Any, base: str) -> int:
    """Return the number of plans that were applied so far."""
    try:
        rows = connection.search_s(f"cn=directory,{base}", ldap.SCOPE_BASE, attrlist=["directorySerial"])
        return int(rows[0][1]["directorySerial"][0])
    except (ldap.NO_SUCH_OBJECT, KeyError):
        raise Refused(f"slapd has no cn=directory,{base}: run the openldap role first") from None


# --- the decision log -------------------------------------------------------------------------------------------------


def encoded(attributes: dict[str, list[str]]) -> list[tuple[str, list[bytes]]]:
    """Return attributes as python-ldap wants them."""
    return [
        (name, [base64.b64decode(value) if name.endswith(";binary") else value.encode() for value in values])
        for name, values in attributes.items()
    ]


class DecisionLog:
    """Who applied which plan from which commit on which grounds, as entries that nobody may change."""

    def __init__(self, base: str, number: int, decision: dict[str, str]) -> None:
        self.time = utc()
        self.name, self.base, self.decision = f"{self.time}-{number}", base, decision

    def _entry(self, suffix: str, attributes: dict[str, list[str]]) -> Addition:
        name = self.name + suffix
        content = {"objectClass": ["hopThuDecision"], "cn": [name], **attributes}
        return f"cn={name},ou=decisions,{self.base}", encoded(content)

    def opening(self, counts: dict[str, int], texts: list[str] | None = None) -> Addition:
        """Return the entry that is written before anything is done; it holds the changes when they are few."""
        about = {
            "decisionBy": [self.decision["by"]],
            "decisionCommit": [self.decision["commit"]],
            "decisionTime": [self.time],
            "decisionCounts": [json.dumps(counts)],
            "decisionChange": texts or [],
        }
        return self._entry("", {name: values for name, values in about.items() if values})

    def chunks(self, texts: list[str]) -> Iterator[Addition]:
        """Yield the entries with the changes of a large plan."""
        for number, start in enumerate(range(0, len(texts), DECISION), 1):
            about = {"decisionTime": [self.time], "decisionChange": texts[start : start + DECISION]}
            yield self._entry(f"-{number:04}", about)

    def closing(self) -> Addition:
        """Return the entry that says that all was done."""
        return self._entry("-done", {"decisionTime": [utc()]})


def text(change: Change) -> str:
    """Return a change as the decision log holds it: of a new mailbox the entry itself tells the rest."""
    about: dict[str, Any] = {"action": change.action, "also": change.also, "kind": change.kind, "id": change.id}
    about.update(address=change.address, refs=change.refs)
    if change.before:
        about.update(before=change.before, after=change.after)
    return json.dumps({name: value for name, value in about.items() if value}, ensure_ascii=False)


# --- carrying out -----------------------------------------------------------------------------------------------------


def compare_and_swap(connection: Any, base: str, number: int) -> None:
    """Count this plan; raises Refused when another one was applied since it was made."""
    change = [
        (ldap.MOD_DELETE, "directorySerial", [str(number).encode()]),
        (ldap.MOD_ADD, "directorySerial", [str(number + 1).encode()]),
    ]
    try:
        connection.modify_s(f"cn=directory,{base}", change)
    except ldap.NO_SUCH_ATTRIBUTE:
        raise Refused("the directory has changed since this plan was made: run again") from None
    except ldap.LDAPError as error:
        raise Refused(f"slapd refuses to count this plan in cn=directory,{base}: {reason(error)}") from None


class Secrets:
    """The key and the slip run of the initial passwords of one apply."""

    def __init__(self, path: str) -> None:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
        self.key, self.run = bytes.fromhex(value["key"]), value["run"]

    def attributes(self, kind: str, identity: str) -> dict[str, list[str]]:
        """Return what gives a mailbox its initial password, which must be changed (LC-11.1, HT-6.1).

        An application keeps its own: a machine cannot change it.
        """
        found = {"userPassword": [ssha512(initial_password(self.key, identity))], "mailboxSlip": [self.run]}
        return found if kind == "application" else {**found, "pwdReset": ["TRUE"]}


def carry_out(connection: Any, steps: list[Step], changes: list[Change], secrets: Secrets | None) -> None:
    """Send the steps, a window of them at a time, each when those that it waits for are done.

    The first that slapd refuses ends it: those under way are waited for, and Refused says how far it came.
    """
    missing = [len(step.after) for step in steps]
    followers: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        for earlier in step.after:
            followers.setdefault(earlier, []).append(index)
    ready = deque(index for index, count in enumerate(missing) if not count)
    under_way: dict[int, int] = {}
    done = 0
    refusal: str | None = None
    try:
        while under_way or (ready and refusal is None):
            while ready and refusal is None and len(under_way) < WINDOW:
                index = ready.popleft()
                under_way[send(connection, steps[index], changes[steps[index].change], secrets)] = index
            try:
                message = connection.result4(ldap.RES_ANY, 0, TIMEOUT)[2]
            except ldap.LDAPError as error:
                message = error.args[0].get("msgid") if error.args and isinstance(error.args[0], dict) else None
                if message not in under_way:
                    raise
                index = under_way.pop(message)
                refusal = refusal or f"slapd refuses to {steps[index].step} {steps[index].dn}: {reason(error)}"
                continue
            index = under_way.pop(message)
            done += 1
            for follower in followers.get(index, ()):
                missing[follower] -= 1
                if not missing[follower]:
                    ready.append(follower)
    except ldap.LDAPError as error:
        refusal = f"the session with slapd broke off: {reason(error)}"
    if refusal is not None:
        raise Refused(f"{refusal}; {done} of {len(steps)} steps are done: mend it and run again")


def send(connection: Any, step: Step, change: Change, secrets: Secrets | None) -> int:
    """Send one operation; return its message number."""
    content = {**step.set, **secrets.attributes(change.kind, change.id)} if step.password and secrets else step.set
    if "mailboxSessionsSince" in content:
        # Who logs in between plan and change is still let in as before, and so must be ended too.
        content = {**content, "mailboxSessionsSince": [utc()]}
    message: int
    if step.step == "delete":
        message = connection.delete_ext(step.dn)
    elif step.step == "modify":
        message = connection.modify_ext(
            step.dn, [(ldap.MOD_REPLACE, name, values or None) for name, values in encoded(content)]
        )
    else:
        message = connection.add_ext(step.dn, encoded(content))
    return message
