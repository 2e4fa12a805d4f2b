"""Compare LDAP entries as they are with entries as they should be.

Used for slapd's configuration (cn=config) and for the fixed part of the tree (organizational units,
service identities, password policies). Pure: no connection, no clock, no randomness.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

Attributes = dict[str, list[bytes]]
"""Attribute name to its values, as python-ldap gives and takes them."""

_ORDER = re.compile(rb"^\{-?\d+\}")
_RDN_ORDER = re.compile(r"\{\d+\}")
_NUMBERED_RDN = ("olcoverlay=", "cn=")
_SECRET = re.compile(r"\{secret:(\w+)\}")
_CREDENTIALS = re.compile(r'credentials=("(?:[^"\\]|\\.)*"|\S+)')


@dataclass(frozen=True)
class Change:
    """One LDAP operation that is still to be done.

    ``before`` and ``after`` hold only the attributes that differ: ``after`` with an empty list means that
    the attribute goes, and an added entry has an empty ``before``.
    """

    action: Literal["add", "modify"]
    dn: str
    before: Attributes
    after: Attributes


def canonical_dn(dn: str) -> str:
    """Return `dn` in lower case, without the order numbers that slapd puts into overlays and schemas.

    Databases keep theirs (``olcDatabase={1}mdb``): it is what tells two of a kind apart.

    >>> canonical_dn("olcOverlay={2}ppolicy,olcDatabase={1}mdb,cn=config")
    'olcoverlay=ppolicy,olcdatabase={1}mdb,cn=config'
    """
    rdns = [part.strip() for part in dn.lower().split(",")]
    return ",".join(_RDN_ORDER.sub("", rdn) if rdn.startswith(_NUMBERED_RDN) else rdn for rdn in rdns)


def _plain(values: list[bytes]) -> list[bytes]:
    """Values without order numbers and with white space folded; sorted unless slapd keeps their order."""
    plain = [b" ".join(_ORDER.sub(b"", value).split()) for value in values]
    ordered = any(_ORDER.match(value) for value in values)
    return plain if ordered else sorted(plain)


def _same(live: list[bytes], wanted: list[bytes]) -> bool:
    if any(_ORDER.match(value) for value in live):
        return _plain(live) == [b" ".join(_ORDER.sub(b"", value).split()) for value in wanted]
    return _plain(live) == _plain(wanted)


def changes(
    live: dict[str, Attributes], wanted: list[tuple[str, Attributes]], initial: Collection[str] = ()
) -> list[Change]:
    """Return the operations that turn `live` into `wanted`, in the order of `wanted`.

    `live` maps DNs to user attributes; entries that `wanted` does not name are left alone. Of an entry that
    it names, every user attribute is compared and one that it does not list is removed, but for the attribute
    of the RDN, which an entry keeps for life, userPassword, which no text holds, and the attributes in
    `initial`, which count only when an entry is made. Object classes are added, never taken away.
    """
    known = {canonical_dn(dn): (dn, attributes) for dn, attributes in live.items()}
    result: list[Change] = []
    for dn, attributes in wanted:
        if canonical_dn(dn) not in known:
            result.append(Change("add", dn, {}, attributes))
            continue
        live_dn, present = known[canonical_dn(dn)]
        fixed = {"objectclass", "userpassword", dn.split("=", 1)[0].lower(), *(name.lower() for name in initial)}
        have = {name.lower(): (name, values) for name, values in present.items()}
        want = {name.lower(): (name, values) for name, values in attributes.items()}
        before: Attributes = {}
        after: Attributes = {}
        if not want.keys() - fixed:  # such as cn=schema: it has to be there, its content is slapd's own
            continue
        classes = have.get("objectclass", ("objectClass", []))[1]
        known_classes = {value.lower() for value in classes}
        more = [value for value in want.get("objectclass", ("", []))[1] if value.lower() not in known_classes]
        if more:
            before["objectClass"], after["objectClass"] = classes, [*classes, *more]
        # First what goes, then the rest as the text has it: slapd takes some attributes only after others.
        for name in [*sorted(have.keys() - want.keys() - fixed), *(name for name in want if name not in fixed)]:
            old = have.get(name, (name, []))[1]
            new = want.get(name, (name, []))[1]
            if not _same(old, new):
                label = want.get(name, have.get(name, (name, [])))[0]
                before[label], after[label] = old, new
        if after:
            result.append(Change("modify", live_dn, before, after))
    return result


def insert(text: str, secrets: Mapping[str, str]) -> str:
    """Return `text` with each ``{secret:NAME}`` replaced, as it must stand between quotation marks.

    Raises KeyError for a name that `secrets` does not have.

    >>> insert('credentials="{secret:a}"', {"a": 'b"c'})
    'credentials="b\\\\"c"'
    """
    return _SECRET.sub(lambda found: re.sub(r'(["\\])', r"\\\1", secrets[found[1]]), text)


def without_credentials(text: str) -> str:
    """Return text of slapd's configuration without the passwords with which it logs in elsewhere.

    >>> without_credentials('binddn="cn=a" credentials="b c" timeout=1')
    'binddn="cn=a" credentials=(hidden) timeout=1'
    """
    return _CREDENTIALS.sub("credentials=(hidden)", text)


def as_text(change: Change, side: Literal["before", "after"], hidden: frozenset[str]) -> str:
    """Return one side of `change` as LDIF-like text for a diff; values of `hidden` attributes are masked."""
    attributes = change.before if side == "before" else change.after
    lines = [f"dn: {change.dn}"] if attributes else []
    for name in sorted(attributes):
        for value in attributes[name]:
            shown = "(hidden)" if name.lower() in hidden else without_credentials(value.decode("utf-8", "replace"))
            lines.append(f"{name}: {shown}")
    return "\n".join(lines) + "\n" if lines else ""
