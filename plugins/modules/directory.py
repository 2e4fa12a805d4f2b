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
  - Only attributes of a fixed list are compared and written. A password is set when a mailbox is
    made and never again.
  - Initial passwords are written to encrypted slips on the controller before the first mailbox is
    made.
options:
  path:
    description: Folder on the controller with policy.yml, units.yml and the people.
    type: path
    required: true
  validate_only:
    description: Read and check the files, and do nothing else. No other option is needed then.
    type: bool
    default: false
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
  slips_path:
    description: Folder on the controller for the slips with initial passwords.
    type: path
  plan_file:
    description: File on the controller that receives the plan as JSON.
    type: path
author: Hộp Thư
"""

EXAMPLES = r"""
- name: Bring units and people into LDAP
  directory:
    path: inventories/daklak/directory
    base: dc=daklak,dc=gov,dc=vn
    bind_dn: cn=loader,ou=services,dc=daklak,dc=gov,dc=vn
    password_file: /etc/hopthu/directory.secret
    slips_path: build/slips
    plan_file: build/plan.json

- name: Check the files of the directory
  directory:
    path: inventories/daklak/directory
    validate_only: true
"""

RETURN = r"""
counts:
  description: Changes by action (add, change, remove) and by action and kind (add_unit, …).
  type: dict
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
live_unread:
  description: Why the live tree could not be read, and was taken as empty. Only in check mode.
  type: str
  returned: when it could not be read
plan_file:
  description: Where the whole plan stands.
  type: str
  returned: when a plan was made
slips_file:
  description: The encrypted slips with the initial passwords of this run.
  type: str
  returned: when mailboxes were made
"""

import json
import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.hopthu.plan import (
    BRANCHES,
    MANAGED,
    OBJECT_CLASSES,
    Change,
    Entry,
    LiveEntry,
    Plan,
    Step,
    counts,
    make_plan,
)

try:
    import ldap
    from ldap.controls import SimplePagedResultsControl
except ImportError:
    ldap = None

PAGE = 1000  # entries
TIMEOUT = 60  # seconds, for one LDAP operation


class Refused(Exception):
    """Why the work cannot go on, as one sentence with the way out."""


class NotSetUp(Refused):
    """The host has never been through the playbook; with check mode its tree counts as empty."""


def connect(uri: str, bind_dn: str, password_file: str) -> Any:
    """Open the LDAP session; raises Refused."""
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
    connection = ldap.initialize(uri)
    connection.set_option(ldap.OPT_PROTOCOL_VERSION, ldap.VERSION3)
    connection.set_option(ldap.OPT_REFERRALS, 0)
    connection.set_option(ldap.OPT_NETWORK_TIMEOUT, 10)
    connection.set_option(ldap.OPT_TIMEOUT, TIMEOUT)
    try:
        connection.simple_bind_s(bind_dn, password)
    except ldap.SERVER_DOWN:
        raise Refused(f"slapd does not answer at {uri}: start it") from None
    except ldap.INVALID_CREDENTIALS:
        raise Refused(f"slapd refuses {bind_dn} with the password in {password_file}") from None
    except ldap.LDAPError as error:
        raise Refused(f"slapd at {uri} refuses the session: {reason(error)}") from None
    return connection


def reason(error: Any) -> str:
    """Return what slapd said, on one line."""
    detail = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
    said = [str(detail.get(key, "")).strip() for key in ("desc", "info")]
    return ", ".join(text for text in said if text) or type(error).__name__


def read_live(connection: Any, base: str) -> list[LiveEntry]:
    """Return all mailboxes of the tree, page by page; raises Refused."""
    found = []
    for kind, branch in BRANCHES.items():
        where = f"{branch},{base}"
        page = SimplePagedResultsControl(True, size=PAGE, cookie="")
        names = {name.lower(): name for name in MANAGED[kind]}
        while True:
            try:
                message = connection.search_ext(
                    where,
                    ldap.SCOPE_ONELEVEL,
                    "(objectClass=hopThuMailbox)",
                    ["uid", *MANAGED[kind]],
                    serverctrls=[page],
                )
                _type, rows, _message, controls = connection.result3(message, timeout=TIMEOUT)
            except ldap.NO_SUCH_OBJECT:
                text = f"slapd has no {where} for this identity: run the openldap role first"
                raise Refused(text) from None
            except ldap.LDAPError as error:
                raise Refused(f"slapd does not list {where}: {reason(error)}") from None
            for dn, values in rows:
                if dn is None:
                    continue
                attributes = {
                    names[name.lower()]: [value.decode("utf-8", "replace") for value in raw]
                    for name, raw in values.items()
                    if name.lower() in names
                }
                identity = values["uid"][0].decode("utf-8", "replace")
                found.append(LiveEntry(kind, identity, dn, attributes))
            page.cookie = next(
                control.cookie for control in controls if control.controlType == SimplePagedResultsControl.controlType
            )
            if not page.cookie:
                break
    return found


def encoded(values: list[str]) -> list[bytes]:
    """Return values as python-ldap wants them."""
    return [value.encode() for value in values]


def run_step(connection: Any, step: Step, change: Change, password_hash: str | None) -> None:
    """Do one LDAP operation."""
    if change.action == "remove":
        connection.delete_s(change.dn)
    elif change.action == "add":
        entry = {
            "objectClass": OBJECT_CLASSES[change.kind],
            "uid": [change.id],
            **(change.after or {}),
            "userPassword": [password_hash or ""],
            "pwdReset": ["TRUE"],
        }
        rows = [(name, encoded(values)) for name, values in entry.items()]
        connection.add_s(change.dn, rows)
    else:
        changes = [
            (ldap.MOD_REPLACE, name, encoded(values) or None) for name, values in (step.attributes or {}).items()
        ]
        connection.modify_s(change.dn, changes)


def apply(connection: Any, plan: Plan, hashes: dict[str, str]) -> None:
    """Carry out the steps in order; raises Refused at the first that slapd refuses."""
    missing = sum(change.action == "add" and change.id not in hashes for change in plan.changes)
    if missing:
        raise Refused(f"{missing} new mailboxes have no password: run again")
    for done, step in enumerate(plan.steps):
        change = plan.changes[step.change]
        try:
            run_step(connection, step, change, hashes.get(change.id))
        except ldap.LDAPError as error:
            progress = f"{done} of {len(plan.steps)} steps are done: mend it and run again"
            text = f"slapd refuses to {change.action} {change.dn}: {reason(error)}; {progress}"
            raise Refused(text) from None


def write_private(path: str, value: Any) -> None:
    """Write JSON that only the owner of its folder can read, whoever runs the module."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(handle, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False)
    if os.geteuid() == 0:
        owner = os.stat(os.path.dirname(path))
        os.chown(path, owner.st_uid, owner.st_gid)


def read_json(path: str) -> Any:
    """Read a JSON file that the action plugin or an earlier call has put there."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "mode": {"choices": ["plan", "apply"], "required": True},
            "base": {"required": True},
            "uri": {"required": True},
            "bind_dn": {"required": True},
            "password_file": {"type": "path", "required": True, "no_log": False},
            "desired_file": {"type": "path"},
            "plan_file": {"type": "path", "required": True},
            "hashes_file": {"type": "path"},
        },
        supports_check_mode=True,
        required_if=[("mode", "plan", ["desired_file"]), ("mode", "apply", ["hashes_file"])],
    )
    given = module.params
    session = (given["uri"], given["bind_dn"], given["password_file"])
    result: dict[str, Any] = {"changed": False}
    try:
        if given["mode"] == "apply":
            plan = Plan.from_json(read_json(given["plan_file"]))
            apply(connect(*session), plan, read_json(given["hashes_file"]))
            module.exit_json(changed=True)
        try:
            live = read_live(connect(*session), given["base"])
        except NotSetUp as refusal:
            if not module.check_mode:
                raise
            # The plan is what the first run will do.
            live, result["live_unread"] = [], str(refusal)
        desired = [Entry(**entry) for entry in read_json(given["desired_file"])]
        plan = make_plan(desired, live, given["base"])
        write_private(given["plan_file"], plan.to_json())
    except Refused as refusal:
        module.fail_json(msg=str(refusal))
    module.exit_json(counts=counts(plan.changes), **result)


if __name__ == "__main__":
    main()
