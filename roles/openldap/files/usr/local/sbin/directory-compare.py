#!/usr/bin/python3
"""directory-compare: compares this host's tree with each peer's, entry by entry.

Equal contextCSN proves nothing after a crash. What differs is looked at again later: only what lasts counts. Names of
entries and attributes are printed, values never. Exit code 0: equal; 1: they differ; 2: a tree cannot be read.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import ldap
from ldap.controls import SimplePagedResultsControl
from ldap.controls.simple import ManageDSAITControl

SETTINGS = Path("/etc/ldap/copies.json")
STATUS = Path("/run/directory-compare/status.json")
PAGE = 1000  # entries
AGAIN = 30  # seconds between the looks
SINGLY = 500  # so many entries are asked for one by one at the second look; of more, the whole tree
SHOWN = 20  # lines
# Made up by each slapd when it answers, or its own mark of how far it is.
OWN = frozenset({"contextcsn", "entrydn", "subschemasubentry", "hassubordinates", "auditcontext"})


class Unreadable(Exception):
    """Which tree cannot be read, and why, as one sentence."""


def connect(uri, settings):
    """Open a session as the replicator, which reads everything; raises ldap.LDAPError."""
    session = ldap.initialize(uri)
    session.set_option(ldap.OPT_NETWORK_TIMEOUT, 5)
    session.set_option(ldap.OPT_TIMEOUT, 60)
    if uri.startswith("ldaps:"):
        session.set_option(ldap.OPT_X_TLS_CACERTFILE, settings["ca"])
        session.set_option(ldap.OPT_X_TLS_REQUIRE_CERT, ldap.OPT_X_TLS_DEMAND)
        session.set_option(ldap.OPT_X_TLS_NEWCTX, 0)
    session.simple_bind_s(settings["dn"], settings["password"])
    return session


def entries(session, base):
    """Yield (DN, attributes) of a whole tree as it is stored, operational attributes too."""
    page = SimplePagedResultsControl(True, size=PAGE, cookie="")
    while True:
        # Without what the dynlist overlay computes.
        controls = [page, ManageDSAITControl()]
        message = session.search_ext(base, ldap.SCOPE_SUBTREE, attrlist=["*", "+"], serverctrls=controls)
        _type, rows, _message, answered = session.result3(message, timeout=60)
        yield from rows
        page.cookie = next((c.cookie for c in answered if c.controlType == page.controlType), "")
        if not page.cookie:
            return


def plain(attributes):
    """Return attributes as they are compared: name in small letters to its sorted values."""
    return {name.lower(): sorted(values) for name, values in attributes.items() if name.lower() not in OWN}


def digest(attributes):
    """Return what stands for an entry: equal digests, equal entries."""
    return hashlib.blake2b(repr(sorted(plain(attributes).items())).encode(), digest_size=16).digest()


def differences(here, there):
    """Compare two trees, iterables of (DN, attributes); return ({DN: (digest here, digest there)}, entries here).

    The digest of an entry that a side does not have is None.
    """
    found = {dn.lower(): digest(attributes) for dn, attributes in here}
    number, differing = len(found), {}
    for dn, attributes in there:
        own, other = found.pop(dn.lower(), None), digest(attributes)
        if own != other:
            differing[dn.lower()] = (own, other)
    differing.update({dn: (own, None) for dn, own in found.items()})
    return differing, number


def single(session, dn):
    """Return the attributes of one entry, None when it is not there."""
    try:
        return session.search_ext_s(dn, ldap.SCOPE_BASE, attrlist=["*", "+"], serverctrls=[ManageDSAITControl()])[0][1]
    except ldap.NO_SUCH_OBJECT:
        return None


def lasting(first, second):
    """Return the DNs that differ at both looks and of which one side at least has stood still in between.

    Where both have moved, a change is only under way.
    """
    return sorted(
        dn for dn, (own, other) in second.items() if dn in first and (own == first[dn][0] or other == first[dn][1])
    )


def line(dn, here, there, peer):
    """Say how an entry differs; `here` and `there` are its attributes or None."""
    if here is None or there is None:
        return f"only on {peer if here is None else 'this host'}: {dn}"
    one, other = plain(here), plain(there)
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return f"different: {dn}: {', '.join(names)}"


def compare(settings, peer, pause):
    """Compare with one peer; return (lines that say what differs, how many, entries here); raises Unreadable."""
    where = "this host"
    try:
        own = connect("ldapi:///", settings)
        where = peer
        other = connect(peer, settings)
        where = "one of both trees"
        base = settings["base"]
        first, number = differences(entries(own, base), entries(other, base))
        if not first:
            return [], 0, number
        time.sleep(pause)
        if len(first) > SINGLY:
            second = differences(entries(own, base), entries(other, base))[0]
        else:
            pairs = {dn: (single(own, dn), single(other, dn)) for dn in first}
            digests = {dn: tuple(None if side is None else digest(side) for side in pair) for dn, pair in pairs.items()}
            second = {dn: pair for dn, pair in digests.items() if pair[0] != pair[1]}
        names = lasting(first, second)
        said = [line(dn, single(own, dn), single(other, dn), peer) for dn in names[:SHOWN]]
        return said, len(names), number
    except ldap.LDAPError as error:
        detail = error.args[0].get("desc", "") if error.args and isinstance(error.args[0], dict) else str(error)
        raise Unreadable(f"{where} cannot be read: {detail}") from None


def main():
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", type=float, default=AGAIN, metavar="SECONDS", help="between the two looks")
    arguments = parser.parse_args()
    settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
    code, status, began = 0, {}, time.monotonic()
    for peer in settings["peers"]:
        try:
            said, number, size = compare(settings, peer, arguments.again)
        except Unreadable as failure:
            print(failure)
            code = max(code, 2) if code != 1 else code
            continue
        print("\n".join(said))
        if number > len(said):
            print(f"and {number - len(said)} more")
        print(f"{number} of {size} entries differ from {peer}")
        status[peer] = {"entries": size, "differing": number}
        code = 1 if number else code
    if STATUS.parent.is_dir():
        text = json.dumps(
            {"time": int(time.time()), "seconds": round(time.monotonic() - began, 1), "code": code, "peers": status}
        )
        new = STATUS.with_suffix(".new")
        new.write_text(text + "\n", encoding="utf-8")
        os.replace(new, STATUS)
    return code


if __name__ == "__main__":
    sys.exit(main())
