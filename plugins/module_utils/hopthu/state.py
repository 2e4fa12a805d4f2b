"""Checks over all records, and the LDAP entries that shall exist."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .files import Problem, Record, short
from .names import NameRefused, check_local_part, fill_pattern
from .plan import Attributes, Entry
from .schema import Directory, Person, Policy, Unit

_ADDRESS_OCTETS = 254  # RFC 5321, 4.5.3.1.3, without the angle brackets


@dataclass
class _Addresses:
    """Who has which address, over units, people, aliases, reserved names and all domains (DL-4)."""

    policy: Policy
    problems: list[Problem]
    owners: dict[str, tuple[str, Record, str]] = field(default_factory=dict)

    def full(self, text: str, record: Record, name: str) -> str:
        """Complete a local part with the main domain; return "" after noting a fault."""
        local, sign, domain = text.partition("@")
        try:
            if not sign:
                domain = self.policy.domain
            elif domain not in self.policy.domains:
                known = ", ".join(self.policy.domains)
                raise NameRefused(f'"{short(text)}" is outside the domains: use {known}')
            elif name == "local_part":
                raise NameRefused(f'"{short(text)}" is an address: write what stands before the @')
            address = f"{check_local_part(local)}@{domain}"
            if len(address) > _ADDRESS_OCTETS:
                raise NameRefused(f'"{short(address)}" is longer than 254 octets: shorten it')
        except NameRefused as error:
            self.problems.append(record.problem(name, str(error)))
            return ""
        if local in self.policy.reserved:
            text = f'"{local}" is reserved in policy.yml: choose another name'
            self.problems.append(record.problem(name, text))
            return ""
        return address

    def claim(self, address: str, owner: str, record: Record, name: str) -> None:
        """Note that `owner` has `address`, or that somebody else has it already."""
        first = self.owners.setdefault(address, (owner, record, name))
        if first[1] is not record or first[2] != name:
            line = first[1].lines.get(first[2], first[1].line)
            place = f"{first[0]} ({first[1].file}:{line})"
            text = f"{address} is already an address of {place}: choose another local_part or alias"
            self.problems.append(record.problem(name, text))


def build(directory: Directory, problems: list[Problem]) -> list[Entry]:
    """Check what concerns several records and return the entries that shall exist.

    Faults are added to `problems`; the entries are complete only when there are none. Where a
    file could not be read at all, nothing is checked: every reference to it would seem wrong.
    """
    if not directory.complete:
        return []
    units = {unit.id.lower(): unit for unit in directory.units}
    people = {person.id.lower() for person in directory.people}
    _check_ids(directory, problems)
    _check_references(directory, units, people, problems)

    policy = directory.policy
    if not policy.domain:
        return []
    addresses = _Addresses(policy, problems)
    reserved: dict[str, list[str]] = {}
    if policy.reserved_record:
        for name, unit_id in policy.reserved.items():
            _check_reserved(name, unit_id, units, policy.reserved_record, problems)
            if unit_id is not None:
                names = [f"{name}@{domain}" for domain in policy.domains]
                reserved.setdefault(unit_id.lower(), []).extend(names)

    entries: list[Entry] = []
    holders: list[tuple[str, Unit | Person]] = [("unit", unit) for unit in directory.units]
    holders += [("person", person) for person in directory.people]
    taken: list[tuple[str, list[str]]] = []
    for kind, holder in holders:
        primary = _primary(kind, holder, units, addresses)
        if primary:
            addresses.claim(primary, f"{kind} {holder.id}", holder.record, "local_part")
        taken.append((primary, []))
    for (kind, holder), (primary, aliases) in zip(holders, taken, strict=True):
        for alias in holder.aliases:
            address = addresses.full(alias, holder.record, "aliases")
            if address and (address == primary or address in aliases):
                text = f"{address} stands twice in this record: keep one"
                problems.append(holder.record.problem("aliases", text))
            elif address:
                addresses.claim(address, f"{kind} {holder.id}", holder.record, "aliases")
                aliases.append(address)
        if kind == "unit":
            aliases += reserved.get(holder.id.lower(), [])
        attributes = _mailbox(kind, holder, primary, aliases, policy)
        entries.append(Entry(kind, holder.id, attributes, holder.refs))
    return entries


def _check_ids(directory: Directory, problems: list[Problem]) -> None:
    """Note ids that stand twice; LDAP compares them without case."""
    seen: dict[str, Record] = {}
    for record, identity in [
        *((unit.record, unit.id) for unit in directory.units),
        *((person.record, person.id) for person in directory.people),
    ]:
        first = seen.setdefault(identity.lower(), record)
        if identity and first is not record:
            place = f"{first.file}:{first.lines.get('id', first.line)}"
            problems.append(record.problem("id", f'"{identity}" is already the id at {place}: change one'))


def _check_references(directory: Directory, units: dict[str, Unit], people: set[str], problems: list[Problem]) -> None:
    """Note named units and people that do not exist, and units above themselves."""
    for unit in directory.units:
        if unit.parent and unit.parent.lower() not in units:
            text = f'there is no unit "{unit.parent}": correct it or add it to units.yml'
            problems.append(unit.record.problem("parent", text))
        elif _in_own_parents(unit, units):
            problems.append(unit.record.problem("parent", "leads back to this unit: correct it"))
        if unit.head and unit.head.lower() not in people:
            text = f'there is no person "{unit.head}": correct it or add the person'
            problems.append(unit.record.problem("head", text))
        for delegate in unit.delegates:
            if delegate.person.lower() not in people:
                text = f'there is no person "{delegate.person}": correct it or add the person'
                problems.append(unit.record.problem("delegates", text))
    for person in directory.people:
        if person.unit and person.unit.lower() not in units:
            text = f'there is no unit "{person.unit}": correct it or add it to units.yml'
            problems.append(person.record.problem("unit", text))


def _in_own_parents(unit: Unit, units: dict[str, Unit]) -> bool:
    seen: set[str] = set()
    above = unit.parent.lower()
    while above in units and above not in seen:
        if above == unit.id.lower():
            return True
        seen.add(above)
        above = units[above].parent.lower()
    return False


def _check_reserved(
    name: str, unit_id: str | None, units: dict[str, Unit], record: Record, problems: list[Problem]
) -> None:
    """Note a reserved name that is no local part, or whose receiver cannot receive."""
    try:
        check_local_part(name)
    except NameRefused as error:
        problems.append(record.problem(name, str(error)))
    if unit_id is None:
        return
    unit = units.get(unit_id.lower())
    if unit is None:
        text = f'there is no unit "{unit_id}": correct it or add it to units.yml'
        problems.append(record.problem(name, text))
    elif unit.state == "dissolved":
        text = f"unit {unit_id} is dissolved and receives no mail: name another"
        problems.append(record.problem(name, text))


def _primary(kind: str, holder: Unit | Person, units: dict[str, Unit], addresses: _Addresses) -> str:
    """Return the main address: the given local part, or the policy's pattern; "" after a fault."""
    record = holder.record
    if holder.local_part or "local_part" in record.fields:
        return addresses.full(holder.local_part, record, "local_part") if holder.local_part else ""
    pattern = addresses.policy.patterns.get(kind)
    if pattern is None:
        text = f"is missing and policy.yml has no address pattern for a {kind}: give one of them"
        addresses.problems.append(record.problem("local_part", text))
        return ""
    values: dict[str, str] = {}
    if isinstance(holder, Unit):
        parent = units.get(holder.parent.lower())
        values = {"name": holder.name, "code": holder.code, "parent": parent.code if parent else ""}
        needed = {"name": "name", "code": "code", "parent": "parent"}
    else:
        unit = units.get(holder.unit.lower())
        values = {
            "ho": holder.ho,
            "dem": holder.dem,
            "ten": holder.ten,
            "unit": unit.code if unit else "",
        }
        needed = {"ho": "ho", "ten": "ten", "unit": "unit"}
    for place, name in needed.items():
        if f"{{{place}}}" in pattern and not values[place]:
            if name in record.fields and place in ("parent", "unit"):
                text = f'the address needs the code of unit "{record.fields[name]}": give it a code'
                addresses.problems.append(record.problem(name, text))
            elif name not in record.fields:
                text = "is missing and the address pattern needs it: fill it in or give local_part"
                addresses.problems.append(record.problem(name, text))
            return ""
    try:
        return addresses.full(fill_pattern(pattern, values), record, "local_part")
    except NameRefused as error:
        addresses.problems.append(record.problem("local_part", str(error)))
        return ""


def _mailbox(kind: str, holder: Unit | Person, primary: str, aliases: list[str], policy: Policy) -> Attributes:
    """Return the managed LDAP attributes of a unit or person."""
    values: dict[str, Any] = {}
    if isinstance(holder, Unit):
        values["ou"] = holder.name
        values["mailboxUnitCode"] = holder.code
        quota = holder.quota or policy.quota_unit
    else:
        values["cn"] = " ".join(part for part in (holder.ho, holder.dem, holder.ten) if part)
        values["sn"] = holder.ho
        values["givenName"] = " ".join(part for part in (holder.dem, holder.ten) if part)
        values["title"] = holder.title
        values["departmentNumber"] = holder.unit
        quota = holder.quota or policy.quota_person
    values["mail"] = primary
    values["mailboxState"] = holder.state
    values["mailboxClass"] = kind
    values["mailboxQuota"] = str(quota)
    values["businessCategory"] = holder.category
    attributes: Attributes = {name: [value] for name, value in values.items() if value}
    if aliases:
        attributes["mailLocalAddress"] = sorted(aliases)
    return attributes
