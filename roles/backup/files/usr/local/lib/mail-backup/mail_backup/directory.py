"""The directory out of a snapshot: entry by entry over LDAP, or the whole tree into a slapd that has none yet."""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import ldap
except ImportError:  # only where nothing of it is used, as in unit tests
    ldap = None

from mail_backup.pick import Refused
from mail_backup.tree import Step, as_ldif, parse

CONFIG = Path("/etc/ldap/slapd.d")
LOCK = Path("/run/lock/hopthu-directory")
"""The lock of the loader, which must not write meanwhile."""
USER = "openldap"


class Stopped(Exception):
    """What slapd did not take, as one sentence. What it took before stays."""


@contextmanager
def alone() -> Iterator[None]:
    """Keep every other run that writes to the directory out; raises Refused when one is at it."""
    with LOCK.open("a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused("Another run is working on the directory of this host: wait for it") from None
        yield


def slapcat(*arguments: str, config: Path = CONFIG) -> str:
    """Return what slapcat writes; the slapd of that configuration may run. Raises Refused."""
    return run(["/usr/sbin/slapcat", "-F", str(config), "-o", "ldif-wrap=no", *arguments])


def run(command: Sequence[str], stdin: str | None = None, user: str | None = None) -> str:
    """Return what a program writes; raises Refused with its last line."""
    as_user: dict[str, Any] = {"user": user, "group": user, "extra_groups": [], "cwd": "/"} if user else {}
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, **as_user)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise Refused(f"{command[0]} failed, nothing was changed: {said}")
    return done.stdout


def mailboxes(base: str, kind: str = "*") -> dict[str, str]:
    """Return id and address of the mailboxes that receive mail, of the kind unit, person or both; raises Refused.

    From the database itself: `doveadm user` would be a process and three questions for each.
    """
    receives = "(|(mailboxState=active)(mailboxState=suspended)(mailboxState=legacy))"
    found = slapcat("-b", base, "-a", f"(&(objectClass=hopThuMailbox)(mailboxClass={kind}){receives})")
    return {
        attributes["uid"][0].decode(): attributes["mail"][0].decode().lower()
        for _dn, attributes in parse(found.splitlines())
    }


# --- entry by entry ----------------------------------------------------------------------------------------------


def carry_out(steps: Iterable[Step]) -> tuple[int, list[str]]:
    """Do the steps as root on this host's slapd; return how many were done, and what was refused and why."""
    connection = ldap.initialize("ldapi:///")
    connection.set_option(ldap.OPT_TIMEOUT, 60)
    connection.sasl_external_bind_s()
    done, refused = 0, []
    for step in steps:
        try:
            if step.do == "add":
                connection.add_s(step.dn, list(step.attributes.items()))
            elif step.do == "delete":
                connection.delete_s(step.dn)
            else:
                changes = [(ldap.MOD_REPLACE, name, values or None) for name, values in step.attributes.items()]
                connection.modify_s(step.dn, changes)
            done += 1
        except ldap.SERVER_DOWN:
            raise Stopped(f"slapd went away after {done} changes: start it and run this again") from None
        except ldap.LDAPError as error:
            detail = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
            refused.append(f"{step}: {detail.get('desc', error)} {detail.get('info', '')}".rstrip())
    connection.unbind_s()
    return done, refused


# --- the whole tree ----------------------------------------------------------------------------------------------


def folder_of(config: str, base: str) -> Path:
    """Return the folder of the database that holds `base`, from a configuration as LDIF; raises Refused."""
    for entry in config.split("\n\n"):
        found = re.search(r"^olcDbDirectory: (.*)$", entry, re.MULTILINE)
        if found and re.search(rf"^olcSuffix: {re.escape(base)}$", entry, re.MULTILINE | re.IGNORECASE):
            return Path(found[1])
    raise Refused(f"slapd has no database for {base}: run playbooks/site.yml with the tag openldap first")


def unfolded(text: str) -> str:
    """Return an LDIF with every line whole (RFC 2849: one that begins with a space goes on)."""
    return text.replace("\n ", "")


def load(config: str, base: str, content: str, work: Path, database: Path, user: str | None) -> None:
    """Fill a database in the new folder `database` with the LDIF `content`; raises Refused.

    `config` is the configuration as LDIF, `work` the new folder for a copy of it in which the database is there.
    """
    folder = folder_of(config, base)
    for path in (work, database):
        shutil.rmtree(path, ignore_errors=True)  # most often it is not there; mkdir fails when it stays
        path.mkdir(mode=0o700, parents=True)
        if user:
            shutil.chown(path, user, user)
    # The other databases, such as the audit log, stay where they are: nobody opens them here.
    text = config.replace(f"olcDbDirectory: {folder}\n", f"olcDbDirectory: {database}\n")
    run(["/usr/sbin/slapadd", "-n", "0", "-F", str(work)], text, user)
    run(["/usr/sbin/slapadd", "-F", str(work), "-b", base, "-q", "-w"], content, user)


def see_empty(base: str, few: int) -> None:
    """Refuse to replace a tree with more than `few` mailboxes."""
    have = sum(1 for _dn, attributes in parse(slapcat("-b", base).splitlines()) if "mailboxState" in attributes)
    if have > few:
        raise Refused(
            f"The directory of this host has {have} mailboxes and is not replaced: without empty=true it is restored"
            " entry by entry"
        )


def fill(base: str, content: str, decisions: Iterable[tuple[str, dict[str, list[str]]]]) -> tuple[int, str]:
    """Put the tree of an LDIF in the place of this host's; return its number of entries and where the old one is.

    The decisions are written into it: the loader, who writes them otherwise, is only known when it is there. Raises
    Refused.
    """
    config = slapcat("-n", "0")
    folder = folder_of(config, base)
    written = [(dn, {n: [v.encode() for v in values] for n, values in one.items()}) for dn, one in decisions]
    content += "".join(as_ldif(dn, attributes) for dn, attributes in written)
    work, copy = Path("/run/mail-restore-slapd"), folder.with_name(folder.name + ".restore")
    try:
        load(config, base, content, work, copy, USER)
        run(["sync", str(copy / "data.mdb")])  # slapadd -q leaves that to whoever comes after it
        old = folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
        run(["systemctl", "stop", "slapd.service"])
        try:
            folder.rename(old)
            copy.rename(folder)
        finally:
            run(["systemctl", "start", "slapd.service"])
    finally:
        # What is left hinders nobody, and must not hide why the work failed; the next run removes it.
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(copy, ignore_errors=True)
    return sum(1 for _entry in parse(content.splitlines())), str(old)
