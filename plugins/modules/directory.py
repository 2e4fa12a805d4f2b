#!/usr/bin/python
"""Plan and apply the mailbox directory on the host that runs slapd."""

from __future__ import annotations

DOCUMENTATION = r"""
module: directory
short_description: Bring the mailbox directory in LDAP into the state of a province's files
description:
  - The action plugin of the same name reads and checks the files on the controller, calls this
    module on the host to compare them with the live tree, and calls it again to carry out that
    very plan.
  - Only attributes of a fixed list are compared and written. A mailbox gets an initial password when
    it is made, when its unit is handed over and when a reset is asked for.
  - Initial passwords are written to encrypted slips on the controller before anything is changed.
options:
  step:
    description:
      - C(validate) reads and checks the files. C(plan) compares them with the live tree and writes the plan down.
        C(apply) carries out that plan. C(export) writes the live tree back into files.
    type: str
    choices: [validate, plan, apply, export]
    required: true
  path:
    description: Folder on the controller with policy.yml, units.yml, the people and applications.yml.
    type: path
    required: true
  base:
    description: Suffix of the tree, for example C(dc=daklak,dc=gov,dc=vn).
    type: str
  uri:
    description: Where slapd listens, seen from the host; C(ldapi://) or C(ldaps://).
    type: str
    default: ldapi:///
  bind_dn:
    description: Identity that may write units and people.
    type: str
  password_file:
    description: File on the host that holds the password of O(bind_dn) and nothing else.
    type: path
  peers:
    description:
      - URIs (C(ldaps://)) of the other providers. C(plan) begins when what they have is here, or after a minute.
        C(apply) ends when they have what was written, or after a minute; so long the passwords of the run can still be
        made again. One that does not answer is named in C(behind).
    type: list
    elements: str
    default: []
  ca_file:
    description: File on the host with the authorities that the certificates of O(peers) are from.
    type: path
  slips_path:
    description: Folder on the controller for the slips with initial passwords.
    type: path
  slips_certificates:
    description: Certificates (X.509, PEM) on the controller that the slips are encrypted to.
    type: list
    elements: path
  plan_file:
    description: File on the controller that receives the plan as JSON.
    type: path
  plan_sha256:
    description: SHA-256 of the plan that is to be carried out, as the step C(plan) returned it.
    type: str
  removals:
    description: Allow so many mailboxes to leave or be dissolved at once, whatever the policy's share is.
    type: int
  resets:
    description: Instead of what the files say, give these mailboxes new initial passwords; each has C(id) and C(refs).
    type: list
    elements: dict
  export_to:
    description: Folder on the controller for the exported files.
    type: path
  export_form:
    description: Form of the people's file.
    type: str
    choices: [yml, csv, json]
    default: yml
author: Hộp Thư
"""

EXAMPLES = r"""
- name: Plan
  directory:
    step: plan
    path: inventories/daklak/directory
    base: dc=daklak,dc=gov,dc=vn
    bind_dn: cn=loader,ou=services,dc=daklak,dc=gov,dc=vn
    password_file: /etc/hopthu/directory.secret
    slips_path: build/slips
    plan_file: build/plan.json
  register: planned

- name: Check the files of the directory
  directory:
    step: validate
    path: inventories/daklak/directory
    slips_certificates: [operator.pem]
"""

RETURN = r"""
counts:
  description: Changes by action, C(total) and C(refused).
  type: dict
  returned: when a plan was made
lines:
  description: The changes in the words of the office.
  type: list
  returned: when a plan was made
refused:
  description: The changes that the plan refuses, with the reason.
  type: list
  returned: when a plan was made
plan_sha256:
  description: Names the plan for the step C(apply).
  type: str
  returned: when a plan was made
hand_overs:
  description: Number of unit mailboxes that get a new head.
  type: int
  returned: when a plan was made
domain:
  description: The main domain.
  type: str
  returned: success
domains:
  description: The main domain and the alias domains.
  type: list
  returned: success
units:
  description: Number of units in the files.
  type: int
  returned: success
people:
  description: Number of people in the files.
  type: int
  returned: success
applications:
  description: Number of applications in the files.
  type: int
  returned: success
behind:
  description: The peers that do not have yet what was written.
  type: list
  returned: when a plan was carried out
filled:
  description: Whether an empty tree was filled at once, which peers had better copy as a whole.
  type: bool
  returned: when a plan was carried out
live_unread:
  description: Why the live tree could not be read, and was taken as empty. Only in check mode.
  type: str
  returned: when it could not be read
"""

import base64
import fcntl
import gc
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.hopthu import fill
from ansible.module_utils.hopthu.passwords import initial_password, ssha512
from ansible.module_utils.hopthu.plan import READ, Change, Row, exported, make_plan, make_reset_plan, read_plan
from ansible.module_utils.hopthu.replica import covers, stamps
from ansible.module_utils.hopthu.steps import BRANCHES, Step, first_entry

try:
    import ldap
    import ldap.sasl
    from ldap.controls import SimplePagedResultsControl
    from ldap.filter import escape_filter_chars
except ImportError:
    ldap = None

PAGE = 500  # entries
TIMEOUT = 60  # seconds, for one LDAP operation
WINDOW = 400  # operations under way at a time
COPIED = 60  # seconds that a change is given to come from one host to the other
GONE = 10  # seconds after which a peer that does not answer is not waited for
UNSYNCED = 250  # from so many operations on, slapd writes to disk only at the end
DECISION = 1000  # changes in one entry of the decision log
LOCK = "/run/lock/hopthu-directory"


Addition = tuple[str, list[tuple[str, list[bytes]]]]
"""DN and attributes of an entry to be added, as python-ldap wants them."""


class Refused(Exception):
    """Why the work cannot go on, as one sentence with the way out."""


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


# --- sessions ----------------------------------------------------------------------------------------------------


def connect(uri: str, bind_dn: str, password_file: str) -> Any:
    """Open the loader's session; raises Refused."""
    if ldap is None:
        raise NotSetUp("python3-ldap is not installed on this host: install it")
    if not uri.startswith(("ldapi://", "ldaps://")):
        raise Refused(f"{uri} would show the password on the network: use ldapi:// or ldaps://")
    try:
        with open(password_file, encoding="utf-8") as file:
            password = file.read().rstrip("\r\n")
    except FileNotFoundError:
        raise NotSetUp(f"{password_file} is not there: run the directory role first") from None
    except (OSError, UnicodeDecodeError):
        raise Refused(f"{password_file} cannot be read: run the directory role first") from None
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
def as_root() -> Iterator[Any]:
    """Give a session in which root may change slapd's own configuration."""
    connection = session("ldapi:///")
    try:
        connection.sasl_external_bind_s()
        yield connection
    except ldap.SERVER_DOWN:
        raise Refused("slapd does not answer at ldapi:///: start it") from None
    finally:
        connection.unbind_s()


@contextmanager
def alone() -> Iterator[None]:
    """Keep other runs from planning and applying meanwhile; raises Refused when one is at it."""
    with open(LOCK, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused("another run is working on the directory of this host: wait for it, then run again") from None
        yield


def mend(base: str) -> None:
    """Put right what a killed run has left: slapd stopped, a half-filled copy, databases that are not synced."""
    fill.resume()
    with as_root() as root:
        for dn, values in databases(root):
            if values.get("olcDbNoSync") == [b"TRUE"]:
                root.modify_s(dn, [(ldap.MOD_REPLACE, "olcDbNoSync", [b"FALSE"])])
            if base.encode() in values.get("olcSuffix", []):
                fill.clean(values["olcDbDirectory"][0].decode())


def databases(root: Any) -> list[tuple[str, dict[str, list[bytes]]]]:
    """Return the databases of slapd's configuration that stand in a folder."""
    wanted = ["olcSuffix", "olcDbDirectory", "olcDbNoSync"]
    found: list[tuple[str, dict[str, list[bytes]]]] = root.search_s(
        "cn=config", ldap.SCOPE_ONELEVEL, "(olcDbDirectory=*)", wanted
    )
    return found


# --- reading -----------------------------------------------------------------------------------------------------


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


# --- planning ----------------------------------------------------------------------------------------------------


def plan(module: AnsibleModule) -> dict[str, Any]:
    """Write the plan; return its counts."""
    given, base = module.params, module.params["base"]
    rest = {"base": base, "loader": given["bind_dn"], "now": utc()}
    live: Iterable[Row] = []
    dead: Iterable[Row] = []
    result: dict[str, Any] = {}
    await_arrivals(given)
    try:
        connection = connect(given["uri"], given["bind_dn"], given["password_file"])
        rest["serial"] = serial(connection, base)
        live, dead = mailboxes(connection, base), tombstones(connection, base)
    except NotSetUp as refusal:
        if not module.check_mode:
            raise
        result["live_unread"] = str(refusal)  # the plan is what the first run will do
    with open(given["desired_file"], "rb") as desired:
        if given["resets_file"]:
            with open(given["resets_file"], encoding="utf-8") as file:
                resets = json.load(file)
            if not result:
                ids = "".join(f"(uid={escape_filter_chars(reset['id'])})" for reset in resets)
                live = mailboxes(connection, base, f"(|{ids})")
            made = make_reset_plan(json.loads(desired.readline())["policy"], resets, live, **rest)
        else:
            made = make_plan(desired, live, dead, removals=given["removals"], issued=given["issued"], **rest)
    write_private(given["plan_file"], made.lines())
    return {"changed": False, "counts": made.header["counts"], **result}


def write_private(path: str, lines: Iterable[str]) -> None:
    """Write lines that only the owner of the folder can read, whoever runs the module."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(handle, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    if os.geteuid() == 0:
        owner = os.stat(os.path.dirname(path))
        os.chown(path, owner.st_uid, owner.st_gid)


def export(module: AnsibleModule) -> dict[str, Any]:
    """Write all mailboxes as lines of JSON."""
    given, base = module.params, module.params["base"]
    connection = connect(given["uri"], given["bind_dn"], given["password_file"])
    found = exported(mailboxes(connection, base), base=base, loader=given["bind_dn"], now=utc())
    write_private(given["export_file"], (json.dumps(line, ensure_ascii=False) for line in found))
    return {"changed": False}


# --- applying ----------------------------------------------------------------------------------------------------


def encoded(attributes: dict[str, list[str]]) -> list[tuple[str, list[bytes]]]:
    """Return attributes as python-ldap wants them."""
    return [
        (name, [base64.b64decode(value) if name.endswith(";binary") else value.encode() for value in values])
        for name, values in attributes.items()
    ]


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


def apply(module: AnsibleModule) -> dict[str, Any]:
    """Carry out the plan in the plan file, and only that one."""
    given, base = module.params, module.params["base"]
    path = given["plan_file"]
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise Refused(f"{path} is not there: run again, so that a plan is made") from None
    if found != given["plan_sha256"]:
        raise Refused(f"{path} is not the plan that was shown: run again")
    secrets = Secrets(given["secrets_file"])
    connection = connect(given["uri"], given["bind_dn"], given["password_file"])
    with open(path, "rb") as file:
        header, rows = read_plan(file)
        if header["stop"]:
            raise Refused(header["stop"])
        if header["passwords"] and not secrets.key:
            raise Refused("the plan makes initial passwords and there is no key for them: run again")
        compare_and_swap(connection, base, header["serial"])
        log = DecisionLog(base, header["serial"] + 1, given["decision"])
        try:
            if header["fill"]:
                connection.add_s(*log.opening(header["counts"]))
                connection.unbind_s()
                fill.fill(base, given["bind_dn"], filling(rows, header["now"], secrets, log))
                connection = connect(given["uri"], given["bind_dn"], given["password_file"])
            else:
                carry_out_logged(connection, header, list(rows), secrets, log)
            connection.add_s(*log.closing())
        except ldap.LDAPError as error:
            raise Refused(f"slapd refuses an entry of the decision log: {reason(error)}; mend it, run again") from None
    os.unlink(path)
    # A tree that was filled at once comes to the peers in another way.
    behind = [] if header["fill"] else await_copies(given)
    return {"changed": True, "counts": header["counts"], "filled": bool(header["fill"]), "behind": behind}


def await_copies(given: dict[str, Any]) -> list[str]:
    """Wait until the peers have what this host has; return those that do not."""
    mine = newest(given, given["uri"]) if given["peers"] else {}
    return await_peers(given, lambda theirs: covers(theirs, mine))


def await_arrivals(given: dict[str, Any]) -> None:
    """Wait until this host has what its peers have: a change that is still under way would be planned a second time.

    A peer whose slapd was killed and starts again may have such changes too.
    """
    if given["peers"] and newest(given, given["uri"]):
        await_peers(given, lambda theirs: bool(theirs) and covers(newest(given, given["uri"]), theirs))


def await_peers(given: dict[str, Any], done: Callable[[dict[str, str]], bool]) -> list[str]:
    """Wait until `done` is true for the newest changes of every peer; return those for which it is not.

    None is waited for in vain for long.
    """
    behind, began = list(given["peers"]), time.monotonic()
    while True:
        found = {peer: newest(given, peer) for peer in behind}
        behind = [peer for peer in behind if not done(found[peer])]
        patience = COPIED if any(found[peer] for peer in behind) else GONE
        if not behind or time.monotonic() - began > patience:
            return behind
        time.sleep(0.5)


def newest(given: dict[str, Any], uri: str) -> dict[str, str]:
    """Return the newest change of each provider that a copy has; nothing when it does not answer."""
    try:
        with open(given["password_file"], encoding="utf-8") as file:
            password = file.read().rstrip("\r\n")
        connection = session(uri)
        connection.set_option(ldap.OPT_NETWORK_TIMEOUT, 5)
        connection.set_option(ldap.OPT_TIMEOUT, 10)
        if uri.startswith("ldaps://"):
            connection.set_option(ldap.OPT_X_TLS_CACERTFILE, given["ca_file"])
            connection.set_option(ldap.OPT_X_TLS_REQUIRE_CERT, ldap.OPT_X_TLS_DEMAND)
            connection.set_option(ldap.OPT_X_TLS_NEWCTX, 0)
        connection.simple_bind_s(given["bind_dn"], password)
        found = connection.search_s(given["base"], ldap.SCOPE_BASE, "(contextCSN=*)", ["contextCSN"])
        connection.unbind_s()
        return stamps(found[0][1].get("contextCSN", []))
    except (ldap.LDAPError, IndexError):
        return {}


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
    about = {"action": change.action, "also": change.also, "kind": change.kind, "id": change.id}
    about.update(address=change.address, refs=change.refs)
    if change.before:
        about.update(before=change.before, after=change.after)
    return json.dumps({name: value for name, value in about.items() if value}, ensure_ascii=False)


def filling(
    rows: Iterable[Change | Step], now: str, secrets: Secrets, log: DecisionLog
) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Yield the mailboxes of an empty tree, with ppolicy's own attribute as slapd would set it; then the decisions."""
    texts = []
    for change in rows:
        if isinstance(change, Change) and not change.refused:
            texts.append(text(change))
            content = first_entry(change.kind, change.id, change.after or {}, change.refs, now)
            yield change.dn, {**content, **secrets.attributes(change.kind, change.id), "pwdChangedTime": [now]}
    for dn, content in log.chunks(texts):
        yield dn, {name: [value.decode() for value in values] for name, values in content}


def carry_out_logged(
    connection: Any, header: dict[str, Any], rows: list[Change | Step], secrets: Secrets, log: DecisionLog
) -> None:
    """Write down what will be done, then do it; raises Refused."""
    changes = [row for row in rows if isinstance(row, Change)]
    steps = [row for row in rows if isinstance(row, Step)]
    texts = [text(change) for change in changes if not change.refused]
    few = len(texts) <= DECISION
    connection.add_s(*log.opening(header["counts"], texts if few else None))
    with unsynced(len(steps)):
        for addition in () if few else log.chunks(texts):
            connection.add_s(*addition)
        carry_out(connection, steps, changes, secrets)


@contextmanager
def unsynced(operations: int) -> Iterator[None]:
    """Have slapd leave the disk to itself while many operations run; what follows is written through again."""
    if operations <= UNSYNCED:
        yield
        return
    with as_root() as root:
        names = [dn for dn, _values in databases(root)]
        try:
            for dn in names:
                root.modify_s(dn, [(ldap.MOD_REPLACE, "olcDbNoSync", [b"TRUE"])])
            yield
        finally:
            try:
                for dn in names:
                    root.modify_s(dn, [(ldap.MOD_REPLACE, "olcDbNoSync", [b"FALSE"])])
            except ldap.SERVER_DOWN:
                pass  # what ended the work says so; the next run puts this right


def carry_out(connection: Any, steps: list[Step], changes: list[Change], secrets: Secrets) -> None:
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


def send(connection: Any, step: Step, change: Change, secrets: Secrets) -> int:
    """Send one operation; return its message number."""
    content = {**step.set, **secrets.attributes(change.kind, change.id)} if step.password else step.set
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


MODES = {"plan": plan, "apply": apply, "export": export}


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "mode": {"choices": sorted(MODES), "required": True},
            "base": {"required": True},
            "uri": {"required": True},
            "bind_dn": {"required": True},
            "password_file": {"type": "path", "required": True, "no_log": False},
            "peers": {"type": "list", "elements": "str", "default": []},
            "ca_file": {"type": "path"},
            "desired_file": {"type": "path"},
            "resets_file": {"type": "path"},
            "plan_file": {"type": "path"},
            "plan_sha256": {},
            "removals": {"type": "int"},
            "issued": {"type": "list", "elements": "str", "default": []},
            "secrets_file": {"type": "path", "no_log": False},
            "decision": {"type": "dict", "options": {"by": {"required": True}, "commit": {"required": True}}},
            "export_file": {"type": "path"},
        },
        supports_check_mode=True,
        required_if=[
            ("mode", "plan", ["desired_file", "plan_file"]),
            ("mode", "apply", ["plan_file", "plan_sha256", "secrets_file", "decision"]),
            ("mode", "export", ["export_file"]),
        ],
    )
    gc.disable()  # 100,000 mailboxes are many objects, none of them in a cycle
    given = module.params
    work = MODES[given["mode"]]
    try:
        if module.check_mode or given["mode"] == "export":
            result = work(module)
        else:
            with alone():
                if ldap is not None:
                    mend(given["base"])
                result = work(module)
    except Refused as refusal:
        module.fail_json(msg=str(refusal))
    except fill.FillFailed as failure:
        module.fail_json(msg=str(failure))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
