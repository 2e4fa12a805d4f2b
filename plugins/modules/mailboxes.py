#!/usr/bin/python
"""Let the mail store of this host follow the directory."""

from __future__ import annotations

DOCUMENTATION = r"""
module: mailboxes
short_description: Let the mail store of this host follow the directory
description:
  - The action plugin of the same name calls it and keeps the receipts of hand-overs on the controller.
  - Everything follows from the directory and from what the host is like now, so a run that was killed is
    put right by the next.
options:
  step:
    description:
      - C(count) counts messages and octets in the folders of units that are about to be handed over.
      - C(follow) ends the sessions of those who may not log in any more or whose rights have changed since, lets the
        head and the delegates of each unit open its mailbox, and finishes receipts.
    choices: [count, follow]
    type: str
    required: true
  plan_file:
    description: The plan on the controller that names the hand-overs; for C(count).
    type: path
  receipts_path:
    description: Folder on the controller for the receipts of hand-overs.
    type: path
    required: true
author: Hộp Thư
"""

EXAMPLES = r"""
- name: Follow the directory
  mailboxes:
    step: follow
    receipts_path: "{{ inventory_dir }}/receipts"
"""

RETURN = r"""
ended:
  description: Sessions that were ended, with user, service and reason.
  type: list
  returned: with step follow
rights:
  description: Units whose mailbox was opened to its head and delegates.
  type: list
  returned: with step follow
receipts:
  description: Receipts that were written.
  type: list
  returned: success
"""

import json
import os
import pwd
import select
import signal
import tempfile
from itertools import batched
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.hopthu.mailboxes import (
    SERVICES,
    Session,
    is_folder_name,
    rights,
    same_map,
    sharing_map,
    to_end,
)

try:
    import ldap
    from ldap.controls import SimplePagedResultsControl
    from ldap.filter import escape_filter_chars
except ImportError:
    ldap = None

SETTINGS = Path("/etc/hopthu/mailboxes.json")
PAGE = 1000  # entries
BATCH = 200  # names in one question to the directory, and processes ended at once
PATIENCE = 5  # seconds that a process has to end by itself
ROUNDS = 3  # looks for sessions; one that was being opened during the first is in the second
MAILBOX = "(objectClass=hopThuMailbox)"
# As Dovecot's passdb and userdb have it.
LOGS_IN = MAILBOX + "(mailboxState=active)(!(pwdReset=TRUE))"
RECEIVES = MAILBOX + "(|(mailboxState=active)(mailboxState=suspended)(mailboxState=legacy))"


class Refused(Exception):
    """Why the work cannot go on, as one sentence with the way out."""


class NotSetUp(Refused):
    """The host has never been through the playbook; in check mode there is nothing to follow yet."""


class Directory:
    """The directory, as Dovecot's own identity sees it."""

    def __init__(self, settings):
        if ldap is None:
            raise NotSetUp("python3-ldap is not installed on this host: run playbooks/site.yml first")
        self.base = settings["base"]
        self.uris = " ".join(settings["uris"])
        self.connection = ldap.initialize(self.uris)
        self.connection.set_option(ldap.OPT_NETWORK_TIMEOUT, 10)
        self.connection.set_option(ldap.OPT_TIMEOUT, 60)
        self.connection.set_option(ldap.OPT_X_TLS_CACERTFILE, settings["tls_ca_file"])
        self.connection.set_option(ldap.OPT_X_TLS_REQUIRE_CERT, ldap.OPT_X_TLS_DEMAND)
        self.connection.set_option(ldap.OPT_X_TLS_NEWCTX, 0)
        try:
            self.connection.simple_bind_s(settings["dn"], settings["password"])
        except ldap.SERVER_DOWN as error:
            raise Refused(f"The directory at {self.uris} does not answer ({said(error)}): start slapd there.") from None
        except ldap.LDAPError as error:
            raise Refused(
                f"The directory at {self.uris} refuses {settings['dn']}, {said(error)}: run playbooks/site.yml."
            ) from None

    def find(self, filter_text, attributes, below=""):
        """Yield {attribute: first value} of the entries that match, page by page; raises Refused."""
        page = SimplePagedResultsControl(True, size=PAGE, cookie="")
        while True:
            try:
                message = self.connection.search_ext(
                    below + self.base, ldap.SCOPE_SUBTREE, filter_text, attributes, serverctrls=[page]
                )
                _type, rows, _id, controls = self.connection.result3(message)
            except ldap.LDAPError as error:
                raise Refused(
                    f"The directory at {self.uris} does not list {below + self.base}: {said(error)};"
                    " run the openldap role first."
                ) from None
            for dn, values in rows:
                if dn is not None:
                    yield {name: values[name][0].decode() for name in attributes if name in values}
            page.cookie = next(c.cookie for c in controls if c.controlType == page.controlType)
            if not page.cookie:
                return

    def named(self, filter_text, attribute, names, attributes):
        """Yield what `find` finds of those whose `attribute` is one of `names`."""
        for some in batched(sorted(names), BATCH):
            which = "".join(f"({attribute}={escape_filter_chars(name)})" for name in some)
            yield from self.find(f"(&{filter_text}(|{which}))", attributes)


def said(error):
    """Return what the LDAP library said, on one line."""
    detail = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
    return ", ".join(str(detail[key]).strip() for key in ("desc", "info") if key in detail) or type(error).__name__


def doveadm(module, *arguments):
    """Return what doveadm prints as JSON; raises Refused."""
    status, out, error = module.run_command(["doveadm", "-f", "json", *arguments])
    if status:
        reason = (error or out).strip().splitlines()
        raise Refused(
            f"doveadm {' '.join(arguments[:2])} fails, {reason[-1] if reason else 'without a reason'}:"
            " see that Dovecot runs on this host, and run again."
        )
    return json.loads(out or "[]")


# --- sessions -------------------------------------------------------------------------------------


def began(pid):
    """Return when a session's process began, seconds since the epoch; None when there is no such process."""
    try:
        service = Path(f"/proc/{pid}/comm").read_text().strip()
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(
            int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime ")
        )
    except (FileNotFoundError, ProcessLookupError):
        return None
    return boot + ticks / os.sysconf("SC_CLK_TCK") if service in SERVICES else None


def sessions(module):
    """Return the sessions that Dovecot serves now."""
    found = []
    for row in doveadm(module, "who", "-1"):
        pid = int(row["pid"])
        start = began(pid)
        if start is not None:
            found.append(Session(row["username"], row["service"], pid, start))
    return found


def sessions_to_end(module, directory):
    """Return the sessions that must end now, each with the reason."""
    present = sessions(module)
    rows = directory.named(LOGS_IN, "mail", {session.user for session in present}, ["mail", "mailboxSessionsSince"])
    return to_end(present, {row["mail"].lower(): row.get("mailboxSessionsSince") for row in rows})


def end(some):
    """End sessions: SIGTERM, so that the client is told, and SIGKILL to a process that does not heed it.

    Not `doveadm kick`: a session that has opened a unit's folders survives that (Dovecot 2.4.1).
    """
    watched = {}
    for session in some:
        try:
            handle = os.pidfd_open(session.pid)
        except ProcessLookupError:
            continue
        # The number may have gone to another process since; the handle cannot.
        if began(session.pid) == session.began:
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            watched[handle] = session
        else:
            os.close(handle)
    poll = select.poll()
    for handle in watched:
        poll.register(handle, select.POLLIN)
    left = set(watched)
    while left and (ready := poll.poll(PATIENCE * 1000)):
        for handle, _event in ready:
            poll.unregister(handle)
            left.discard(handle)
    for handle in left:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    for handle in watched:
        os.close(handle)


def end_sessions(module, directory):
    """End whose time is over; return what was ended, or would be."""
    ended = []
    for _round in range(ROUNDS):
        due = sessions_to_end(module, directory)
        ended += [{"user": one.user, "service": one.service, "reason": reason} for one, reason in due]
        if not due or module.check_mode:
            break
        for some in batched((session for session, _reason in due), BATCH):
            end(some)
    return ended


# --- rights ---------------------------------------------------------------------------------------


def read(path):
    """Return a file's text, empty when there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def write(path, text, owner):
    """Replace a file of the mail store's owner as a whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".hopthu-")
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chown(name, owner.pw_uid, owner.pw_gid)
    os.replace(name, path)


def open_units(module, directory, root, owner):
    """Let each unit's group open its INBOX and, by inheritance, its folders; return the units that lacked it.

    Written as files, in Dovecot's own form, because one call of doveadm for each of thousands of units takes minutes.
    """
    found = {
        row["uid"]: row["mail"]
        for row in directory.find(f"(&{RECEIVES}(mailboxClass=unit))", ["uid", "mail"], "ou=units,")
        if is_folder_name(row["uid"])
    }
    lacking = [unit for unit in sorted(found) if read(root / unit / "Maildir" / "dovecot-acl") != rights(unit)]
    shared = root / "shared-mailboxes.db"
    map_differs = not same_map(read(shared), sharing_map(found))
    if not module.check_mode:
        for unit in lacking:
            # Whole, as Dovecot makes it: to a delegate an INBOX without these three does not exist yet.
            inbox = root / unit / "Maildir"
            for folder in (root / unit, inbox, inbox / "cur", inbox / "new", inbox / "tmp"):
                if not folder.is_dir():
                    folder.mkdir(mode=0o700)
                    os.chown(folder, owner.pw_uid, owner.pw_gid)
            write(inbox / "dovecot-acl", rights(unit), owner)
        if map_differs:
            write(shared, sharing_map(found), owner)
    return lacking, map_differs


# --- content --------------------------------------------------------------------------------------


def counted(module, directory, units, people):
    """Return what is in the mailboxes of `units`, who heads them, and the names of `people`, by id."""
    names = {row["uid"]: row.get("cn") for row in directory.named(MAILBOX, "uid", people, ["uid", "cn"])}
    found = {}
    for row in directory.named(RECEIVES, "uid", units, ["uid", "mail", "ou", "mailboxHead"]):
        folders = doveadm(module, "mailbox", "status", "-u", row["mail"], "messages vsize uidnext", "*")
        found[row["uid"]] = {
            "address": row["mail"],
            "name": row.get("ou"),
            "head": row.get("mailboxHead"),
            "people": names,
            "folders": {
                folder["mailbox"]: {
                    "messages": int(folder["messages"]),
                    "octets": int(folder["vsize"]),
                    "uidnext": int(folder["uidnext"]),
                }
                for folder in folders
            },
        }
    return found


def follow(module, directory, settings):
    """Do the step `follow`; return the result."""
    root = Path(settings["mail_root"])
    try:
        owner = pwd.getpwnam("vmail")
    except KeyError:
        raise NotSetUp("There is no user vmail on this host: run the dovecot role first.") from None
    lacking, map_differs = open_units(module, directory, root, owner)
    ended = end_sessions(module, directory)
    lines = [f"{one['user']} {one['service']}: session ended, {one['reason']}" for one in ended]
    lines += [f"{unit}: opened to head and delegates" for unit in lacking]
    lines += ["map of shared mailboxes: written anew"] if map_differs else []
    return {
        "changed": bool(lines),
        "ended": ended,
        "rights": lacking,
        "diff": {"prepared": "".join(f"{line}\n" for line in lines)},
    }


def main():
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "step": {"choices": ["count", "follow"], "required": True},
            "units": {"type": "list", "elements": "str", "default": []},
            "people": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    given = module.params
    result = {"changed": False}
    try:
        try:
            settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise NotSetUp(f"{SETTINGS} is not there: run playbooks/site.yml first.") from None
        directory = Directory(settings)
        if given["step"] == "follow":
            result = follow(module, directory, settings)
        if given["units"]:
            result["counted"] = counted(module, directory, given["units"], given["people"])
    except NotSetUp as refusal:
        if not module.check_mode:
            module.fail_json(msg=str(refusal))
        result = {"changed": True, "msg": str(refusal)}
    except Refused as refusal:
        module.fail_json(msg=str(refusal))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
