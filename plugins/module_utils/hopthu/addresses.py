"""Who has which address: what policy gives to whom, and that nobody has what another has already."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .files import Problem, Record, short
from .names import NameRefused, Pattern, fill_pattern
from .retention import backup_days

_ADDRESS_OCTETS = 254  # RFC 5321, 4.5.3.1.3, without the angle brackets
_LINE_BITS = 28

Values = dict[str, Any]
"""The checked fields of one unit or person, by the names of the files."""


@dataclass(frozen=True)
class AliasDomain:
    """A domain of a merged province: whether it still receives, and who has which local part there."""

    name: str
    receives: bool
    map: dict[str, str]
    same_local_part: bool
    record: Record


@dataclass
class Policy:
    """policy.yml: `values` as checked, with the defaults of its schema, and what is derived from them."""

    record: Record
    values: Values = field(default_factory=dict)
    alias_domains: list[AliasDomain] = field(default_factory=list)
    patterns: dict[str, Pattern] = field(default_factory=dict)

    @property
    def domain(self) -> str:
        """Return the main domain, "" when it is not known."""
        return str(self.values.get("domain", ""))

    @property
    def domains(self) -> tuple[str, ...]:
        """Return the main domain and then the alias domains, also those that no longer receive."""
        return (self.domain, *(alias.name for alias in self.alias_domains))

    @property
    def base(self) -> str:
        """Return the DN of the directory tree."""
        return ",".join(f"dc={label}" for label in self.domain.split("."))

    @property
    def reserved(self) -> dict[str, str | None]:
        """Return the local parts nobody may choose, with the unit (id) that receives each."""
        names: dict[str, str | None] = self.values.get("address", {}).get("reserved", {})
        return names

    def header(self) -> Values:
        """Return what the plan on the host needs to know: the first line of the desired state."""
        values = self.values
        return {
            "policy": {
                "domain": self.domain,
                "alias_days": values["rename"]["alias_days"],
                "block_days": values["address"]["reuse_block_days"],
                "retention_days": values["retention"]["leaver_days"],
                "backup_days": backup_days(values["retention"]),
                **values["leaver"],
                "removal_limit": values["removal_limit"],
                "required_refs": values["required_refs"],
                "eligibility": values["eligibility"],
                "delegates": values["delegates"],
            }
        }


class Scheme:
    """Which addresses policy gives to whom, beside the aliases that the files name."""

    def __init__(self, policy: Policy, units: Mapping[str, Values]) -> None:
        """Take the units by id; `received` has the reserved addresses of each, `mapped` those of alias domains."""
        self.policy = policy
        self.units = units
        self.received: dict[str, list[str]] = {}
        self.mapped: dict[str, list[str]] = {}
        for name, unit in policy.reserved.items():
            if unit is not None:
                self.received.setdefault(unit, []).extend(f"{name}@{domain}" for domain in policy.domains)
        for alias in policy.alias_domains:
            for name, owner in alias.map.items():
                if name not in policy.reserved:
                    self.mapped.setdefault(owner, []).append(f"{name}@{alias.name}")
        self.expired = tuple(f"@{alias.name}" for alias in policy.alias_domains if not alias.receives)
        self.suspended: set[str] = set()
        if policy.values.get("suspend_unit_people"):
            self.suspended = {
                identity
                for identity in units
                if any(units[up].get("state") == "suspended" for up in self.above(identity))
            }
        self.same = [alias for alias in policy.alias_domains if alias.same_local_part]
        self.second = policy.patterns.get("person_alias")

    def pattern(self, kind: str, values: Values) -> tuple[str, Pattern | None]:
        """Return the pattern for a mailbox, and its name in policy.yml."""
        if kind == "person":
            return kind, self.policy.patterns.get(kind)
        name = "sub_unit" if "parent" in values else "main_unit"
        return name, self.policy.patterns.get(name) or self.policy.patterns.get("unit")

    def places(self, kind: str, values: Values) -> dict[str, str]:
        """Return what a pattern's places stand for; what is not known is empty."""
        if kind == "person":
            unit = self.units.get(values.get("unit", ""), {})
            return {
                "ho": values.get("ho", ""),
                "dem": values.get("dem", ""),
                "ten": values.get("ten", ""),
                "unit": unit.get("code", ""),
            }
        parent = self.units.get(values.get("parent", ""), {})
        return {
            "name": values.get("name", ""),
            "code": values.get("code", ""),
            "parent": parent.get("code", ""),
        }

    def derived(self, kind: str, values: Values, local: str, places: Mapping[str, str]) -> list[str]:
        """Return the addresses that policy gives the mailbox `local` beside its main one and reserved names.

        The second form goes only to people whose address follows the pattern, so that a clash of either form
        ends with one local_part.

        Raises NameRefused when the second form cannot be made of the name.
        """
        result = list(self.mapped.get(values.get("id", ""), ()))
        if (
            self.second
            and kind == "person"
            and ("local_part" not in values or self.made(kind, values, places) == local)
        ):
            result.append(f"{fill_pattern(self.second, places)}@{self.policy.domain}")
        for alias in self.same:
            if local not in alias.map:
                result.append(f"{local}@{alias.name}")
        return result

    def made(self, kind: str, values: Values, places: Mapping[str, str]) -> str:
        """Return the local part that the pattern makes; "" when it makes none."""
        pattern = self.pattern(kind, values)[1]
        if pattern is None or lacking(pattern, places):
            return ""
        try:
            return fill_pattern(pattern, places)
        except NameRefused:
            return ""

    def above(self, identity: str) -> Iterator[str]:
        """Give a unit and all units above it, each once."""
        seen: set[str] = set()
        while identity in self.units and identity not in seen:
            yield identity
            seen.add(identity)
            identity = self.units[identity].get("parent", "")

    def suspended_with(self, kind: str, values: Values) -> bool:
        """Tell whether policy suspends a person together with his unit or one above it (CT-10.2)."""
        return kind == "person" and values.get("unit") in self.suspended

    def receiving(self, addresses: list[str]) -> list[str]:
        """Return those addresses whose domain still receives, sorted."""
        if self.expired:
            addresses = [address for address in addresses if not address.endswith(self.expired)]
        return sorted(addresses)


def lacking(pattern: Pattern, places: Mapping[str, str]) -> str:
    """Return a place of the pattern that has to be filled and is empty, "" for none. Not everybody has a đệm."""
    if "" not in places.values():
        return ""
    return next((place for _fixed, place in pattern if place not in ("", "dem") and not places[place]), "")


class _Clash:
    """An address that two mailboxes want: the second one's place, and the parts of a proposal for it."""

    __slots__ = ("address", "code", "field", "file", "first", "line", "pair")

    def __init__(self, record: Record, name: str, address: str, first: int, pair: tuple[int, int], code: str) -> None:
        self.file = record.file
        self.line = record.lines.get(name, record.line)
        self.field = name
        self.address = address
        self.first = first
        self.pair = pair
        self.code = code


class Claims:
    """Who has which id and address: unique over units, people, applications, aliases, reserved names and domains
    (DL-4, CT-4). `units` and `people` are the numbers of the first that is no unit, and no person."""

    def __init__(self, policy: Policy, problems: list[Problem]) -> None:
        self.policy = policy
        self.reserved = policy.reserved
        self.domain = policy.domain
        self.problems = problems
        self.ids: list[str] = []
        self.known: dict[str, int] = {}
        self.files: list[tuple[int, str]] = []
        self.units = 0
        self.people = 0
        self.owners: dict[str, int] = {}
        self.clashes: list[_Clash] = []

    def enter(self, identity: str, record: Record) -> int:
        """Note an id and return the number of its mailbox. LDAP compares ids without case."""
        number = len(self.ids)
        if not self.files or self.files[-1][1] != record.file:
            self.files.append((number, record.file))
        self.ids.append(identity)
        if identity:
            place_of = number << _LINE_BITS | record.lines.get("id", record.line)
            first = self.known.setdefault(identity.lower(), place_of)
            if first != place_of:
                place = self.place(first)
                text = f'"{identity}" is already the id at {place}: change one'
                self.problems.append(record.problem("id", text))
        return number

    def place(self, packed: int) -> str:
        """Return "file:line" of a mailbox's number and line in one integer (a tuple would take thrice the memory)."""
        start = bisect_right(self.files, packed >> _LINE_BITS, key=lambda start: start[0]) - 1
        return f"{self.files[start][1]}:{packed & (1 << _LINE_BITS) - 1}"

    def person(self, identity: str) -> bool:
        """Tell whether a person has exactly this id."""
        number = self.known.get(identity.lower(), -1) >> _LINE_BITS
        return self.units <= number < self.people and self.ids[number] == identity

    def holder(self, address: str) -> str | None:
        """Return the id of the mailbox that has an address."""
        place = self.owners.get(address)
        return None if place is None else self.ids[place >> _LINE_BITS]

    def of_application(self, address: str) -> bool:
        """Tell whether an application has an address. Asked when all people are known."""
        return self.owners.get(address, -1) >> _LINE_BITS >= self.people

    def full(self, text: str, record: Record, name: str) -> str:
        """Complete a local part with the main domain; return "" after noting a fault."""
        local, sign, domain = text.partition("@")
        fault = ""
        if not sign:
            domain = self.domain
        elif domain not in self.policy.domains:
            fault = f'"{short(text)}" is outside the domains: use {", ".join(self.policy.domains)}'
        if local in self.reserved:
            fault = f'"{local}" is reserved in policy.yml: choose another name'
        elif len(local) + len(domain) >= _ADDRESS_OCTETS:
            fault = f'"{short(text)}" makes an address longer than 254 octets: shorten it'
        if fault:
            self.problems.append(record.problem(name, fault))
            return ""
        return f"{local}@{domain}"

    def claim(self, address: str, number: int, record: Record, name: str, code: str) -> bool:
        """Note that a mailbox has `address`; return False when it had it already.

        `code` is the unit's, which a proposal for another address keeps at its end.
        """
        first = self.owners.get(address)
        if first is None:
            self.owners[address] = number << _LINE_BITS | record.lines.get(name, record.line)
            return True
        if first >> _LINE_BITS == number:
            return False
        pair = (first >> _LINE_BITS, number)
        if not self.clashes or self.clashes[-1].pair != pair:  # one clash of two mailboxes is enough
            self.clashes.append(_Clash(record, name, address, first, pair, code))
        return True

    def tell(self) -> None:
        """Turn the clashes into problems, each with a proposal that is free over all files.

        The proposal is for the newer mailbox, which only the province can tell: an older holder never moves, and
        no address depends on the order of the records.
        """
        taken: set[str] = set()
        for clash in self.clashes:
            number = clash.first >> _LINE_BITS
            kind = "unit" if number < self.units else "person" if number < self.people else "application"
            place = f"{kind} {self.ids[number]} ({self.place(clash.first)})"
            what = {"aliases": "alias", "id": "id", "addresses": "address"}.get(clash.field, "local_part")
            text = (
                f"{clash.address} is already an address of {place}: "
                f"give the newer of the two another {what}, such as {self._free(clash, taken)}"
            )
            self.problems.append(Problem(clash.file, clash.line, clash.field, text))

    def _free(self, clash: _Clash, taken: set[str]) -> str:
        local = clash.address.partition("@")[0]
        tail = next((sign + clash.code for sign in "-._" if clash.code and local.endswith(sign + clash.code)), "")
        stem = local.removesuffix(tail)
        count = 2
        while True:
            proposal = f"{stem[: 64 - len(tail) - len(str(count))]}{count}{tail}"
            used = any(f"{proposal}@{domain}" in self.owners for domain in self.policy.domains)
            if not used and proposal not in taken and proposal not in self.reserved:
                taken.add(proposal)
                return proposal
            count += 1
