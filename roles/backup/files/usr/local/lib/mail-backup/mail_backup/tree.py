"""Trees of LDAP entries as slapcat writes them, and how one differs from another. Pure."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

Attributes = dict[str, list[bytes]]
Tree = Mapping[str, tuple[str, Attributes]]
"""DN in small letters to the DN as it is written and the attributes by name, as they are written."""

BRANCHES = ("ou=units", "ou=people", "ou=applications", "ou=groups", "ou=released")
"""What a restore touches. Services, policies, the serial and the decisions are the playbooks' own: a password of before
would shut a daemon out, and a decision that was taken stays on record."""

OPERATIONAL = frozenset(
    {
        "structuralobjectclass",
        "entryuuid",
        "creatorsname",
        "createtimestamp",
        "entrycsn",
        "modifiersname",
        "modifytimestamp",
        "contextcsn",
        "entrydn",
        "subschemasubentry",
        "hassubordinates",
        "pwdchangedtime",
        "pwdhistory",
        "pwdfailuretime",
        "pwdaccountlockedtime",
        "pwdgraceusetime",
        "pwdlastsuccess",
        "authtimestamp",
    }
)
"""Attributes that slapd writes itself."""

MOVING = OPERATIONAL - {
    "structuralobjectclass",
    "entryuuid",
    "creatorsname",
    "createtimestamp",
    "entrycsn",
    "modifiersname",
    "modifytimestamp",
    "pwdchangedtime",
    "pwdhistory",
}
"""Those of them that change without modifyTimestamp."""

SECRET = frozenset({"userpassword", "pwdreset", "mailboxslip"})
"""A password that was changed since is not set back unless that is asked for: the old one may be why it was changed."""


def parse(lines: Iterable[str]) -> Iterator[tuple[str, Attributes]]:
    """Yield the entries of an LDIF (RFC 2849) of content: DN and attributes. Raises ValueError for what is none."""
    entry: list[str] = []
    for raw in lines:
        line = raw.rstrip("\n")
        if line.startswith(" ") and entry:
            entry[-1] += line[1:]
        elif line.startswith("#"):
            continue
        elif line:
            entry.append(line)
        elif entry:
            yield _entry(entry)
            entry = []
    if entry:
        yield _entry(entry)


def _entry(lines: list[str]) -> tuple[str, Attributes]:
    name, dn = _value(lines[0])
    if name.lower() != "dn":
        raise ValueError(f"an entry begins with {name} and not with dn")
    found: Attributes = {}
    for line in lines[1:]:
        name, value = _value(line)
        found.setdefault(name, []).append(value)
    return dn.decode(), found


def _value(line: str) -> tuple[str, bytes]:
    name, colon, rest = line.partition(":")
    if not colon:
        raise ValueError(f"'{line[:40]}' is no line of an LDIF")
    if rest.startswith(":"):
        return name, base64.b64decode(rest[1:].strip(), validate=True)
    return name, rest.removeprefix(" ").encode()


def as_ldif(dn: str, attributes: Mapping[str, list[bytes]]) -> str:
    """Return an entry as LDIF, every value in base64."""
    lines = [f"dn:: {base64.b64encode(dn.encode()).decode()}"]
    lines += [f"{name}:: {base64.b64encode(v).decode()}" for name, values in attributes.items() for v in values]
    return "\n".join(lines) + "\n\n"


def tree(entries: Iterable[tuple[str, Attributes]]) -> dict[str, tuple[str, Attributes]]:
    """Return entries by their DN."""
    return {dn.lower(): (dn, attributes) for dn, attributes in entries}


def below(found: Tree, base: str, only: str = "") -> dict[str, tuple[str, Attributes]]:
    """Return the entries below BRANCHES of `base`; with `only`, that one and what is below it."""
    tops = [f",{branch},{base}".lower() for branch in BRANCHES]
    wanted = only.lower()
    return {
        dn: entry
        for dn, entry in found.items()
        if any(dn.endswith(top) for top in tops) and (not wanted or dn == wanted or dn.endswith("," + wanted))
    }


def plain(attributes: Mapping[str, list[bytes]], leave: frozenset[str] = OPERATIONAL) -> dict[str, list[bytes]]:
    """Return attributes as they are compared: name in small letters to its sorted values, without those in `leave`."""
    return {name.lower(): sorted(values) for name, values in attributes.items() if name.lower() not in leave}


@dataclass(frozen=True)
class Step:
    """One change of the live tree: what is done ("add", "modify", "delete") to which entry, with which attributes."""

    do: str
    dn: str
    attributes: Mapping[str, list[bytes]]
    """Of an entry to add, all; to modify, those that differ with the values that they get (none: it goes)."""

    def __str__(self) -> str:
        """Say it without values: some are secret."""
        names = sorted(self.attributes) if self.do == "modify" else []
        return f"{self.do} {self.dn}" + (f": {', '.join(names)}" if names else "")


def steps(then: Tree, now: Tree, *, passwords: bool, remove: bool) -> list[Step]:
    """Return what makes the tree `now` what it was `then`, in an order that slapd takes: parents before children.

    `passwords`: those of entries that are there are set back too. `remove`: entries that came since are deleted.
    """
    gone = [Step("delete", now[dn][0], {}) for dn in sorted(now.keys() - then.keys(), key=_depth, reverse=True)]
    added = [
        Step("add", then[dn][0], {n: v for n, v in then[dn][1].items() if n.lower() not in OPERATIONAL})
        for dn in sorted(then.keys() - now.keys(), key=_depth)
    ]
    changed = []
    leave = OPERATIONAL if passwords else OPERATIONAL | SECRET
    for dn in sorted(then.keys() & now.keys()):
        old, new = plain(then[dn][1], leave), plain(now[dn][1], leave)
        if old != new:
            differing = {name: old.get(name, []) for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
            changed.append(Step("modify", now[dn][0], differing))
    return (gone if remove else []) + added + changed


def _depth(dn: str) -> tuple[int, str]:
    return dn.count(","), dn


def stamp(attributes: Mapping[str, list[bytes]]) -> str:
    """Return when an entry was changed last, as 20261126101542Z."""
    return next((values[0].decode() for name, values in attributes.items() if name.lower() == "modifytimestamp"), "")


def unlike(then: Tree, now: Tree, moment: str) -> list[str]:
    """Return what `then`, a snapshot of `moment` (20261126101542Z), should hold as `now` does and does not.

    An entry that was changed since, or is there no more, says nothing.
    """
    found = []
    for dn, (name, attributes) in now.items():
        if stamp(attributes) < moment:
            if dn not in then:
                found.append(f"{name} is in the directory since {stamp(attributes)} and not in the snapshot")
            elif plain(then[dn][1], MOVING) != plain(attributes, MOVING):
                found.append(f"{name} is unchanged since {stamp(attributes)} and another in the snapshot")
    return found
