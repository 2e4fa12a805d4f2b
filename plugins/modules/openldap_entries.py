#!/usr/bin/python
"""Bring entries of the local slapd into the state that an LDIF text describes."""

from __future__ import annotations

DOCUMENTATION = r"""
module: openldap_entries
short_description: Bring entries of the local slapd into the state that an LDIF text describes
description:
  - Reads the named entries over C(ldapi:///) as root (SASL EXTERNAL), compares and writes only what differs.
  - Entries that the text does not name are left alone; attributes that it does not name are removed
    from the entries that it does name.
  - With I(configuration) it owns C(cn=config). A host whose slapd still has the configuration that Debian's
    package makes gets a new one, built beside the old and moved into place in one step.
options:
  ldif:
    description: Entries in LDIF (RFC 2849), parents first. C(include:) lines count only for a new configuration.
    type: str
    required: true
  configuration:
    description: The text is slapd's whole configuration.
    type: bool
    default: false
  initial:
    description: Attributes that are written when an entry is made, and then left alone.
    type: list
    elements: str
    default: []
  passwords:
    description:
      - DN to clear password, or to a list of them while one takes the place of another; empty ones do not count.
      - The entry then takes exactly these, as salted SHA-512 hashes; it is written only when it takes others.
    type: dict
    default: {}
  secrets:
    description:
      - What stands in the text as C({secret:NAME}), by name. Neither a diff nor a log shows it.
    type: dict
    default: {}
  peers:
    description:
      - URIs of the other providers of the tree. One host, the O(writer), writes; the others wait until it has come to
        them. A host without a tree makes none while a peer has one, but waits until that has come.
    type: list
    elements: str
    default: []
  writer:
    description: This host is the one that writes.
    type: bool
    default: true
  alone:
    description: A peer that does not answer is gone for good, and a host without a tree need not wait for it.
    type: bool
    default: false
  base:
    description: Suffix of the tree, to ask O(peers) for.
    type: str
  replicator_dn:
    description: Identity that O(peers) know this host by.
    type: str
  ca_file:
    description: The authorities that the certificates of O(peers) are from.
    type: path
  wait_seconds:
    description: How long to wait for the tree, seconds.
    type: int
    default: 900
author: Hộp Thư
"""

EXAMPLES = r"""
- name: Configure slapd
  openldap_entries:
    ldif: "{{ lookup('ansible.builtin.template', 'etc/ldap/config.ldif.j2') }}"
    configuration: true
"""

RETURN = r"""
changes:
  description: The DNs that were written, or would be.
  type: list
  returned: always
"""

import io
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible.module_utils.hopthu.entries import as_text, changes, insert, without_credentials
from ansible.module_utils.hopthu.passwords import accepted, differences, ssha512
from ansible.module_utils.hopthu.replica import ABSENT, SILENT, next_step, stamps

try:
    import ldap
    import ldap.sasl
    import ldif
    from ldap.controls.simple import ManageDSAITControl

    LDAP_MISSING = False
except ImportError:
    LDAP_MISSING = True

URI = "ldapi:///"
CONFIG = Path("/etc/ldap/slapd.d")
HIDDEN = frozenset({"userpassword", "olcrootpw"})
POLL = 0.5  # seconds
GRACE = 5  # seconds that a small tree is given to come by itself


def parse(text, secrets):
    """Return [(dn, attributes)] from LDIF `text` with its `secrets`; C(include:) lines are left out."""
    kept = "\n".join(line for line in insert(text, secrets).splitlines() if not line.startswith(("include:", "#")))
    records = ldif.LDIFRecordList(io.BytesIO(kept.encode()))
    records.parse()
    return [(dn, dict(attributes)) for dn, attributes in records.all_records]


def connect():
    """Open ldapi and bind as root by SASL EXTERNAL."""
    connection = ldap.initialize(URI)
    connection.set_option(ldap.OPT_NETWORK_TIMEOUT, 10)
    connection.sasl_external_bind_s()
    return connection


def own_stamps(connection, base):
    """Return how new the tree of this host is; None when there is none."""
    try:
        found = connection.search_s(base, ldap.SCOPE_BASE, attrlist=["contextCSN"])
    except ldap.NO_SUCH_OBJECT:
        return None
    return stamps(found[0][1].get("contextCSN", []))


def peer_stamps(uri, base, replicator, words, ca_file):
    """Return how new the tree of a peer is, ABSENT when it answers and has none, SILENT when it does not answer.

    Raises ldap.LDAPError when it has a tree and does not show it.
    """
    connection = ldap.initialize(uri)
    connection.set_option(ldap.OPT_NETWORK_TIMEOUT, 5)
    connection.set_option(ldap.OPT_TIMEOUT, 10)
    connection.set_option(ldap.OPT_X_TLS_CACERTFILE, ca_file)
    connection.set_option(ldap.OPT_X_TLS_REQUIRE_CERT, ldap.OPT_X_TLS_DEMAND)
    connection.set_option(ldap.OPT_X_TLS_NEWCTX, 0)
    try:
        try:
            connection.search_s(base, ldap.SCOPE_BASE, attrlist=["1.1"])
        except ldap.NO_SUCH_OBJECT:
            return ABSENT
        except ldap.INSUFFICIENT_ACCESS:
            pass  # there is one; who asks without a name learns no more
        for word in words:
            try:
                connection.simple_bind_s(replicator, word)
            except ldap.INVALID_CREDENTIALS:
                continue
            return stamps(
                connection.search_s(base, ldap.SCOPE_BASE, attrlist=["contextCSN"])[0][1].get("contextCSN", [])
            )
        return {}  # it does not know the identity yet
    except (ldap.SERVER_DOWN, ldap.TIMEOUT, ldap.CONNECT_ERROR):
        return SILENT
    finally:
        connection.unbind_s()


def copy(module, peer):
    """Replace the tree that this host does not have whole by a peer's: much faster than entry by entry."""
    status, _out, error = module.run_command(["/usr/local/sbin/directory-refill", peer])
    if status:
        module.fail_json(msg=f"the tree does not come from {peer}: {error.strip()}")


def may_write(module, passwords):
    """Wait until this host has the tree, and, when it is not the writer, what the writer wrote.

    Return whether it may write, and whether the tree was copied. In check mode nothing is waited for, and what has
    still to come counts as no change of this host's.
    """
    given, was_copied = module.params, False
    words = passwords[given["replicator_dn"]]
    began = time.monotonic()
    while True:
        passed = time.monotonic() - began
        peers = {
            uri: peer_stamps(uri, given["base"], given["replicator_dn"], words, given["ca_file"])
            for uri in given["peers"]
        }
        connection = connect()
        step, why = next_step(
            own_stamps(connection, given["base"]), peers, writer=given["writer"], alone=given["alone"]
        )
        if step == "refuse":
            module.fail_json(
                msg=f"{why}: start it; only when it is gone for good, with all that it had, run again with "
                "-e openldap_alone=true"
            )
        if step == "write":
            if given["writer"]:
                return True, was_copied
            todo, stale = differing(module, connection, parse(given["ldif"], {}), passwords)
            if not todo and not stale:
                return False, was_copied
            why = f"{([change.dn for change in todo] + stale)[0]} has not come from the host that writes"
        if module.check_mode:
            return False, False
        if step == "copy":
            if not was_copied and passed > GRACE:
                copy(module, why)
                was_copied = True
            why = f"the tree has not come from {why}"
        if passed > given["wait_seconds"]:
            module.fail_json(
                msg=f"{why}, within {given['wait_seconds']} s: journalctl -u slapd.service on both hosts tells why"
            )
        time.sleep(POLL)


def connect_when_up(module):
    """Connect as root, starting slapd when an earlier run stopped half-way left it down."""
    try:
        return connect()
    except ldap.SERVER_DOWN:
        if module.check_mode:
            raise
        module.run_command(["systemctl", "start", "slapd.service"], check_rc=True)
        return connect()


def live_entries(connection, wanted, configuration):
    """Return {dn: user attributes} of the entries of `wanted` that exist.

    In C(cn=config) slapd has put numbers into their names, so all that stands below their parents is read; elsewhere
    that may be a hundred thousand mailboxes.
    """
    attributes = ["*", "pwdPolicySubentry"]
    as_stored = [ManageDSAITControl()]  # without what the dynlist overlay computes
    names = {dn for dn, _attributes in wanted}
    questions = {(dn, ldap.SCOPE_BASE) for dn in names}
    if configuration:
        bases = names | {dn.split(",", 1)[-1] for dn in names}
        questions |= {(dn, scope) for dn in bases for scope in (ldap.SCOPE_BASE, ldap.SCOPE_ONELEVEL)}
    found = {}
    for base, scope in questions:
        try:
            rows = connection.search_ext_s(base, scope, "(objectClass=*)", attributes, serverctrls=as_stored)
        except ldap.NO_SUCH_OBJECT:
            continue
        found.update({dn: values for dn, values in rows if dn})
    return found


def apply(connection, change):
    """Write one change."""
    if change.action == "add":
        connection.add_s(change.dn, list(change.after.items()))
    else:
        connection.modify_s(
            change.dn, [(ldap.MOD_REPLACE, name, values or None) for name, values in change.after.items()]
        )


def password_differences(connection, dn, words):
    """Return what `differences` says of an entry, or that all `words` are missing when there is no entry yet."""
    try:
        stored = connection.search_s(dn, ldap.SCOPE_BASE, attrlist=["userPassword"])[0][1].get("userPassword", [])
    except ldap.NO_SUCH_OBJECT:
        stored = []
    return differences(stored, words)


def differing(module, connection, wanted, passwords):
    """Return the changes that are still to be made, and the DNs of entries that take other passwords than they should.

    An entry that is new has its password in it.
    """
    live = live_entries(connection, wanted, module.params["configuration"])
    todo = [
        replace(change, after=change.after | {"userPassword": [ssha512(passwords[change.dn][0]).encode()]})
        if change.action == "add" and change.dn in passwords
        else change
        for change in changes(live, wanted, module.params["initial"])
    ]
    new = {change.dn for change in todo if change.action == "add"}
    stale = sorted(
        dn for dn, words in passwords.items() if dn not in new and any(password_differences(connection, dn, words))
    )
    return todo, stale


def set_passwords(connection, dn, words):
    """Have an entry take exactly `words`; meanwhile, and after a crash, it still takes those that stay.

    ppolicy lets one operation set one password, and counts those that are there already as no matter of its own.
    """
    missing, unwanted = password_differences(connection, dn, words)
    for word in missing:
        connection.modify_s(dn, [(ldap.MOD_ADD, "userPassword", [ssha512(word).encode()])])
    if unwanted:
        connection.modify_s(dn, [(ldap.MOD_DELETE, "userPassword", unwanted)])


def ours(wanted):
    """Tell whether slapd's configuration directory holds the databases of `wanted`."""
    names = [dn.split(",", 1)[0] for dn, _attributes in wanted if dn.startswith("olcDatabase=")]
    return all((CONFIG / "cn=config" / (name + ".ldif")).exists() for name in names) and not (
        CONFIG.with_suffix(".new").exists()
    )


def bootstrap(module, text, wanted):
    """Build slapd's configuration directory from `text` and put it in place of Debian's own."""
    new, old = CONFIG.with_suffix(".new"), CONFIG.with_suffix(".debian")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o750)
    for _dn, attributes in wanted:
        for directory in attributes.get("olcDbDirectory", []):
            Path(directory.decode()).mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.chown(directory.decode(), "openldap", "openldap")
    status, _out, error = module.run_command(["/usr/sbin/slapadd", "-n", "0", "-F", str(new)], data=text)
    if status:
        shutil.rmtree(new)
        module.fail_json(msg="slapadd refuses the configuration: " + without_credentials(error.strip())[-800:])
    for folder, _folders, files in os.walk(new):
        shutil.chown(folder, "openldap", "openldap")
        for name in files:
            shutil.chown(os.path.join(folder, name), "openldap", "openldap")
    module.run_command(["systemctl", "stop", "slapd.service"], check_rc=True)
    if CONFIG.exists():
        shutil.rmtree(old, ignore_errors=True)
        CONFIG.rename(old)
    new.rename(CONFIG)
    module.run_command(["systemctl", "daemon-reload"], check_rc=True)
    module.run_command(["systemctl", "start", "slapd.service"], check_rc=True)


def main():
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "ldif": {"type": "str", "required": True},
            "configuration": {"type": "bool", "default": False},
            "initial": {"type": "list", "elements": "str", "default": []},
            "passwords": {"type": "dict", "default": {}, "no_log": True},
            "secrets": {"type": "dict", "default": {}, "no_log": True},
            "peers": {"type": "list", "elements": "str", "default": []},
            "writer": {"type": "bool", "default": True},
            "alone": {"type": "bool", "default": False},
            "base": {"type": "str"},
            "replicator_dn": {"type": "str"},
            "ca_file": {"type": "path"},
            "wait_seconds": {"type": "int", "default": 900},
        },
        supports_check_mode=True,
    )
    text = module.params["ldif"]
    passwords = {dn: accepted(words) for dn, words in module.params["passwords"].items()}
    if LDAP_MISSING:
        if module.check_mode:
            module.exit_json(changed=True, changes=[], diff={"before": "", "after": text})
        module.fail_json(msg=missing_required_lib("python-ldap"))
    wanted = parse(text, module.params["secrets"])
    if module.params["configuration"] and not ours(wanted):
        if not module.check_mode:
            bootstrap(module, insert(text, module.params["secrets"]), wanted)
        module.exit_json(changed=True, changes=[dn for dn, _a in wanted], diff={"before": "", "after": text})

    todo, stale, writes, was_copied = [], [], True, False
    try:
        connection = connect_when_up(module)
        if module.params["peers"]:
            writes, was_copied = may_write(module, passwords)
            connection = connect()
        if writes:
            todo, stale = differing(module, connection, wanted, passwords)
            if not module.check_mode:
                for change in todo:
                    apply(connection, change)
                for dn, words in passwords.items():
                    set_passwords(connection, dn, words)
    except ldap.LDAPError as error:
        detail = error.args[0] if error.args and isinstance(error.args[0], dict) else {"desc": str(error)}
        module.fail_json(msg=f"slapd refused over {URI}: {detail.get('desc', '')} {detail.get('info', '')}".strip())
    secret = "".join(f"dn: {dn}\nuserPassword: (hidden, set anew)\n" for dn in stale)
    module.exit_json(
        changed=bool(todo or stale or was_copied),
        changes=[change.dn for change in todo] + stale,
        diff={
            "before": "".join(as_text(change, "before", HIDDEN) for change in todo),
            "after": "".join(as_text(change, "after", HIDDEN) for change in todo) + secret,
        },
    )


if __name__ == "__main__":
    main()
