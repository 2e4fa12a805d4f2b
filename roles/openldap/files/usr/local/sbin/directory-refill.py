#!/usr/bin/python3
"""directory-refill HOST: makes this host's tree equal to that of HOST, a peer. What it had is kept, under another name.

The copy is made beside the live database, while slapd runs; slapd is stopped for the exchange of two folders, so that
nobody is told from half a tree that a mailbox does not exist. What was written on this host alone is then in the old
folder only.
"""

import argparse
import base64
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import ldap

CONFIG = Path("/etc/ldap/slapd.d")
WORK = Path("/run/directory-refill")
LOCK = "/run/lock/hopthu-directory"  # the one of the loader, which must not write meanwhile
USER = "openldap"


def program(path):
    """Return the program in a file as a module."""
    loader = SourceFileLoader(Path(path).stem.replace("-", "_"), path)
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


sys.dont_write_bytecode = True
compare = program("/usr/local/sbin/directory-compare")


class Refused(Exception):
    """Why this host's tree stays as it is, as one sentence."""


def run(command, **options):
    """Run a program; return what it says; raises Refused with its last line."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise Refused(f"{command[0]} failed: {said}")
    return done.stdout


def folder_of(config, base):
    """Return the folder of the database that holds `base`, from slapd's configuration as LDIF."""
    for entry in config.split("\n\n"):
        found = re.search(r"^olcDbDirectory: (.*)$", entry, re.MULTILINE)
        if found and re.search(rf"^olcSuffix: {re.escape(base)}$", entry, re.MULTILINE | re.IGNORECASE):
            return Path(found[1])
    raise Refused(f"slapd has no database for {base}: run playbooks/site.yml")


def server_id(config):
    """Return the number of this provider, from slapd's configuration as LDIF."""
    found = re.search(r"^olcServerID: (\S+)", config, re.MULTILINE)
    return str(int(found[1], 0)) if found else "0"


def empty(folder):
    """Make an empty folder of slapd's user."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    shutil.chown(folder, USER, USER)


def stored(attributes):
    """Return the attributes of an entry that belong into a database; contextCSN says how new the copy is."""
    own = compare.OWN - {"contextcsn"}
    return {name: values for name, values in attributes.items() if name.lower() not in own}


def as_ldif(dn, attributes):
    """Return an entry as LDIF (RFC 2849), every value in base64."""
    lines = [b"dn:: " + base64.b64encode(dn.encode())]
    lines += [
        name.encode() + b":: " + base64.b64encode(value) for name, values in attributes.items() for value in values
    ]
    return b"\n".join(lines) + b"\n\n"


def load(session, base, sid):
    """Copy a peer's tree into the database of the configuration in WORK; return the number of entries."""
    command = ["/usr/sbin/slapadd", "-F", str(WORK), "-b", base, "-q", "-S", sid]
    number = 0
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        user=USER,
        group=USER,
        extra_groups=[],
        cwd="/",
    ) as process:
        try:
            for dn, attributes in compare.entries(session, base):
                process.stdin.write(as_ldif(dn, stored(attributes)))
                number += 1
            process.stdin.close()
        except BrokenPipeError:
            pass  # its own words follow
        said = process.stderr.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        raise Refused(f"slapadd refuses the copy, nothing was changed: {said[-1] if said else 'without a word'}")
    return number


def size(settings):
    """Return the number of entries of this host's tree, 0 when slapd does not answer or has none."""
    try:
        session = compare.connect("ldapi:///", settings)
        return sum(1 for _entry in session.search_s(settings["base"], ldap.SCOPE_SUBTREE, attrlist=["1.1"]))
    except ldap.LDAPError:
        return 0


def refill(settings, uri, force):
    """Do it; return a sentence. Raises Refused when nothing was changed."""
    base = settings["base"]
    config = run(["/usr/sbin/slapcat", "-F", str(CONFIG), "-n", "0", "-o", "ldif-wrap=no"])
    folder = folder_of(config, base)
    copy = folder.with_name(folder.name + ".refill")
    try:
        session = compare.connect(uri, settings)
    except ldap.LDAPError as error:
        raise Refused(f"{uri} cannot be read, nothing was changed: {error.args[0].get('desc', '')}") from None
    try:
        empty(WORK)
        empty(copy)
        text = config.replace(f": {folder}\n", f": {copy}\n")
        run(["/usr/sbin/slapadd", "-n", "0", "-F", str(WORK)], input=text, user=USER, group=USER, cwd="/")
        theirs, ours = load(session, base, server_id(config)), size(settings)
        if theirs < ours - settings["smaller"] and not force:
            raise Refused(
                f"{uri} has {theirs} entries and this host {ours}: nothing was changed; say force when that is meant"
            )
        os.sync()  # slapadd -q leaves that to whoever comes after it
        old = folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
        run(["systemctl", "stop", "slapd.service"])
        try:
            folder.rename(old)
            copy.rename(folder)
        finally:
            run(["systemctl", "start", "slapd.service"])
    except ldap.LDAPError as error:
        raise Refused(f"{uri} broke off, nothing was changed: {error.args[0].get('desc', '')}") from None
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
        shutil.rmtree(copy, ignore_errors=True)
    return f"{theirs} entries came from {uri}; what was here before is in {old}"


def main():
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host", help="name or URI of the peer whose tree is the right one")
    parser.add_argument("--force", action="store_true", help="even when its tree is smaller")
    arguments = parser.parse_args()
    settings = json.loads(compare.SETTINGS.read_text(encoding="utf-8"))
    uris = [uri for uri in settings["peers"] if arguments.host in (uri, re.split(r"[/:.]+", uri)[1])]
    with open(LOCK, "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not uris:
                raise Refused(f"{arguments.host} is no peer of this host's directory: {', '.join(settings['peers'])}")
            print(refill(settings, uris[0], arguments.force))
        except BlockingIOError:
            print("another run is working on the directory of this host: wait for it", file=sys.stderr)
            return 1
        except Refused as refusal:
            print(refusal, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
