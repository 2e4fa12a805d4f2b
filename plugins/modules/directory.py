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

import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.hopthu import fill
from ansible.module_utils.hopthu.plan import Change, Row, exported, make_plan, make_reset_plan, read_plan
from ansible.module_utils.hopthu.replica import covers, stamps
from ansible.module_utils.hopthu.slapd import (
    DECISION,
    DecisionLog,
    NotSetUp,
    Refused,
    Secrets,
    alone,
    carry_out,
    compare_and_swap,
    connect,
    mailboxes,
    reason,
    serial,
    session,
    text,
    tombstones,
    utc,
)
from ansible.module_utils.hopthu.steps import Step, first_entry

try:
    import ldap
    from ldap.filter import escape_filter_chars
except ImportError:
    ldap = None

COPIED = 60  # seconds that a change is given to come from one host to the other
GONE = 10  # seconds after which a peer that does not answer is not waited for


# --- slapd's own configuration -----------------------------------------------------------------------------------


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


def mend(base: str) -> None:
    """Put right what a killed run has left: slapd stopped, a half-filled copy."""
    fill.resume()
    with as_root() as root:
        for _dn, values in root.search_s(
            "cn=config", ldap.SCOPE_ONELEVEL, "(olcDbDirectory=*)", ["olcSuffix", "olcDbDirectory"]
        ):
            if base.encode() in values.get("olcSuffix", []):
                fill.clean(values["olcDbDirectory"][0].decode())


# --- planning ----------------------------------------------------------------------------------------------------


def plan(module: AnsibleModule) -> dict[str, Any]:
    """Write the plan; return its counts."""
    given, base = module.params, module.params["base"]
    rest = {"base": base, "loader": given["bind_dn"], "now": utc()}
    live: Iterable[Row] = []
    dead: Iterable[Row] = []
    result: dict[str, Any] = {}
    try:
        connection = connect(given["uri"], given["bind_dn"], given["password_file"])
        await_arrivals(given)
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
    for addition in () if few else log.chunks(texts):
        connection.add_s(*addition)
    # Nothing is changed in cn=config meanwhile, such as olcDbNoSync for speed: a change there waits until no thread is
    # at work, and slapd hangs for good when one of them waits to send an entry to the peer.
    carry_out(connection, steps, changes, secrets)


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
