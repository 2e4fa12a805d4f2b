#!/usr/bin/python
"""Write down, in the log that nobody can change, that somebody opens a mailbox."""

from __future__ import annotations

DOCUMENTATION = r"""
module: decision
short_description: Write into the decision log who opens a mailbox on which grounds
description:
  - The action plugin of the same name adds who runs the playbook and from which commit.
  - Runs on the host of the directory that holds the service. In check mode the mailbox is looked up, nothing written.
options:
  step:
    description:
      - C(open) looks the mailbox up and writes the entry, before anything is read. C(close) says that it was done.
    type: str
    choices: [open, close]
    required: true
  path:
    description: Folder on the controller with the files of the directory, whose commit is noted.
    type: path
    required: true
  base:
    description: Suffix of the tree.
    type: str
    required: true
  bind_dn:
    description: Identity that may add entries to the log.
    type: str
    required: true
  password_file:
    description: File on the host that holds its password and nothing else.
    type: path
    required: true
  mailbox:
    description: Address or id of the mailbox; for C(open).
    type: str
  action:
    description: What is done; for C(open).
    type: str
    default: access
  grounds:
    description: The document on which it is done; for C(open).
    type: str
  about:
    description: What of the mailbox; for C(open).
    type: dict
    default: {}
  name:
    description: The decision; for C(close).
    type: str
author: Hộp Thư
"""

EXAMPLES = r"""
- name: Write down that a mailbox is opened
  decision:
    step: open
    path: inventories/daklak/directory
    base: dc=daklak,dc=gov,dc=vn
    bind_dn: cn=loader,ou=services,dc=daklak,dc=gov,dc=vn
    password_file: /etc/hopthu/directory.secret
    mailbox: soyte@daklak.gov.vn
    grounds: 123/QĐ-UBND
  register: opened
"""

RETURN = r"""
name:
  description: The decision, as cn below ou=decisions.
  type: str
  returned: with step open
mailbox:
  description: Id, kind, address and state of the mailbox.
  type: dict
  returned: with step open
"""

import json
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.hopthu.slapd import DecisionLog, Refused, connect, mailboxes, reason, serial

try:
    import ldap
    from ldap.filter import escape_filter_chars
except ImportError:
    ldap = None


def found(connection: Any, base: str, name: str) -> dict[str, str]:
    """Return the mailbox with this address or id; raises Refused when there is none."""
    value = escape_filter_chars(name)
    for _dn, values in mailboxes(connection, base, f"(|(uid={value})(mail={value})(mailLocalAddress={value}))"):
        first = {key: values[key][0].decode() for key in ("uid", "mail", "mailboxState", "mailboxClass")}
        if first["mailboxClass"] != "application":
            return {
                "id": first["uid"],
                "kind": first["mailboxClass"],
                "address": first["mail"],
                "state": first["mailboxState"],
            }
    raise Refused(f"there is no mailbox {name}: give the address or the id of a unit or person. Nothing has been read.")


def work(module: AnsibleModule) -> dict[str, Any]:
    """Do the step; raises Refused."""
    given, base = module.params, module.params["base"]
    connection = connect("ldapi:///", given["bind_dn"], given["password_file"])
    decision = {"by": given["by"], "commit": given["commit"]}
    try:
        if given["step"] == "close":
            log = DecisionLog(base, 0, decision)
            log.name = given["name"]
            if not module.check_mode:
                connection.add_s(*log.closing())
            return {"changed": True}
        mailbox = found(connection, base, given["mailbox"])
        log = DecisionLog(base, serial(connection, base), decision)
        log.name += f"-{given['action']}-{mailbox['id']}"
        change = {"action": given["action"], **mailbox, **given["about"], "refs": {"grounds": given["grounds"]}}
        if not module.check_mode:
            connection.add_s(*log.opening({given["action"]: 1, "total": 1}, [json.dumps(change, ensure_ascii=False)]))
    except ldap.LDAPError as error:
        raise Refused(f"slapd refuses an entry of the decision log, {reason(error)}: nothing has been read") from None
    return {"changed": True, "name": log.name, "mailbox": mailbox}


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "step": {"choices": ["open", "close"], "required": True},
            "base": {"required": True},
            "bind_dn": {"required": True},
            "password_file": {"type": "path", "required": True, "no_log": False},
            "mailbox": {},
            "action": {"default": "access"},
            "grounds": {},
            "about": {"type": "dict", "default": {}},
            "name": {},
            "by": {"required": True},
            "commit": {"required": True},
        },
        required_if=[("step", "open", ["mailbox", "grounds"]), ("step", "close", ["name"])],
        supports_check_mode=True,
    )
    try:
        result = work(module)
    except Refused as refusal:
        module.fail_json(msg=str(refusal))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
