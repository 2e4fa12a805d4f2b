"""A province's directory folder, read and checked as a whole, to the mailboxes that shall exist.

People are streamed: of each only the id and the addresses are kept, as 100,000 of them must fit into little memory.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import IO

from . import certificates
from .addresses import AliasDomain, Claims, Policy, Scheme, Values, lacking
from .files import Fault, Problem, Record, read_list, read_mapping, short
from .names import NameRefused, fill_pattern, take_apart
from .schema import REFS, application_fields, person_fields, policy_fields, unit_fields

SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Attributes = dict[str, str | list[str]]
"""LDAP attributes; a list where there may be several values."""

quote = json.encoder.encode_basestring
encode = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode


def octets(size: str) -> int:
    """Return the octets of a size such as "500M"."""
    return int(size[:-1]) * SIZES[size[-1]]


@dataclass
class Reading:
    """What `read` found. With any problem, the desired state it wrote is worthless."""

    policy: Policy
    problems: list[Problem]
    units: int
    people: int
    applications: int
    warnings: list[str]

    @property
    def domain(self) -> str:
        """Return the main domain."""
        return self.policy.domain

    @property
    def domains(self) -> tuple[str, ...]:
        """Return the main domain and then the alias domains."""
        return self.policy.domains


def read(folder: Path, shown: str, out: IO[bytes] | None, today: date) -> Reading:
    """Read and check all files of a directory folder; write the desired state to `out`, unless that is None.

    `shown` is the folder's name in problems. `today` decides which alias domains still receive. All problems are
    found at once; where a file cannot be read at all, what would have to be compared with it is not checked.

    The first line written is the policy's header, then comes one line per mailbox, units first, applications last:
    {"k": kind, "i": id, "a": declared LDAP attributes, "r": grounds, "l": "file:line"}.
    """
    return _Reader(folder, shown, out, today).read()


class _Reader:
    """One reading of a directory folder."""

    def __init__(self, folder: Path, shown: str, out: IO[bytes] | None, today: date) -> None:
        self.folder = folder
        self.shown = shown
        self.out = out
        self.today = today
        self.problems: list[Problem] = []
        self.units: dict[str, Values] = {}
        self.unit_records: list[tuple[Record, Values]] = []
        self.left: set[str] = set()
        self.administrators: set[str] = set()
        self.quotas: dict[str, str] = {}
        self.warnings: list[str] = []

    def read(self) -> Reading:
        """Read policy, units, people and applications, in this order."""
        policy, policy_good = self._policy()
        good = self._units() and policy_good and bool(policy.domain)
        self.claims = Claims(policy, self.problems)
        self.scheme = Scheme(policy, self.units)
        self.faulty_patterns = _faulty_patterns(policy)
        if good:
            quota = policy.values.get("quota", {})
            self.quotas = {kind: str(octets(size)) for kind, size in quota.items()}
            administrators = policy.values["passwords"]["administrators"]["people"]
            self.administrators = set(administrators)
            self._check_units()
            self._check_reserved(policy)
            if self.out and not self.problems:
                self.out.write(f"{encode(policy.header())}\n".encode())
            for record, values in self.unit_records:
                self._mailbox("unit", record, values)
        self.claims.units = len(self.unit_records)
        people = self._people(good)
        self.claims.people = len(self.claims.ids)
        applications = self._applications(good)
        if good:
            self.claims.tell()
            if people is not None:
                self._check_people_named(policy)
        count = people if people is not None else 0
        problems = sorted(set(self.problems))
        return Reading(policy, problems, len(self.unit_records), count, applications, self.warnings)

    def _policy(self) -> tuple[Policy, bool]:
        """Return the policy, and whether its file could be read."""
        name = f"{self.shown}/policy.yml"
        try:
            record = read_mapping(self.folder / "policy.yml", name)
        except Fault as fault:
            self.problems.append(fault.problem)
            return Policy(Record(name, 1, {})), False
        values = policy_fields().read(record, self.problems)
        policy = Policy(record, values)
        raw = record.fields.get("alias_domains")
        records = [item for item in raw if isinstance(item, Record)] if isinstance(raw, list) else []
        for item, alias in zip(records, values.get("alias_domains", []), strict=True):
            until = alias.get("accept_until")
            name = alias.get("domain", "")
            if name and name in policy.domains:
                self.problems.append(item.problem("domain", f"{name} stands twice: keep one"))
            elif name:
                receives = until is None or self.today <= date.fromisoformat(until)
                entry = AliasDomain(name, receives, alias.get("map", {}), alias["same_local_part"], item)
                policy.alias_domains.append(entry)
        for name, pattern in values.get("address", {}).items():
            if isinstance(pattern, str):
                policy.patterns[name] = take_apart(pattern)
        return policy, True

    def _units(self) -> bool:
        """Read units.yml; return whether that could be done to its end."""
        check = unit_fields()
        try:
            for record in read_list(self.folder / "units.yml", f"{self.shown}/units.yml", "mail_units", check.lists):
                values = check.read(record, self.problems)
                self.unit_records.append((record, values))
                self.units.setdefault(values.get("id", ""), values)
        except Fault as fault:
            self.problems.append(fault.problem)
            return False
        return True

    def _check_units(self) -> None:
        """Note named units that do not exist, units above themselves, and successors that make no sense."""
        for record, values in self.unit_records:
            parent = values.get("parent")
            if parent is not None and parent not in self.units:
                self.problems.append(record.problem("parent", _no_unit(parent)))
            elif parent is not None and values.get("id", "") in self.scheme.above(parent):
                self.problems.append(record.problem("parent", "leads back to this unit: correct it"))
            successor = values.get("successor")
            if successor is None:
                continue
            text = ""
            if values.get("state") not in ("dissolved", "legacy"):
                text = "is only for a dissolved or legacy unit: remove it or set the state"
            elif successor not in self.units:
                text = _no_unit(successor)
            elif successor == values.get("id"):
                text = "is the unit itself: name the one that follows it"
            elif self.units[successor].get("state") == "dissolved":
                text = f"unit {successor} is dissolved and receives no mail: name another"
            if text:
                self.problems.append(record.problem("successor", text))

    def _check_reserved(self, policy: Policy) -> None:
        """Note reserved names whose receiver cannot receive, and mapped names that are reserved."""
        address = policy.record.fields.get("address")
        record = address.fields.get("reserved") if isinstance(address, Record) else None
        for name, unit in policy.reserved.items():
            if isinstance(record, Record) and unit is not None:
                if unit not in self.units:
                    self.problems.append(record.problem(name, _no_unit(unit)))
                elif self.units[unit].get("state") == "dissolved":
                    text = f"unit {unit} is dissolved and receives no mail: name another"
                    self.problems.append(record.problem(name, text))
        for alias in policy.alias_domains:
            for name in alias.map:
                if name in policy.reserved:
                    text = f'"{name}" is reserved in policy.yml: its mail goes where address.reserved says'
                    self.problems.append(_map_record(alias).problem(name, text))

    def _people(self, good: bool) -> int | None:
        """Read the people, streaming; return how many they are, or None when a file could not be read."""
        faults = 0
        count = 0
        try:
            paths = _people_files(self.folder, self.shown)
        except Fault as fault:
            self.problems.append(fault.problem)
            return None
        check = person_fields()
        for path in paths:
            name = f"{self.shown}/{path.relative_to(self.folder)}"
            try:
                own = "" if path.parent == self.folder else self._own_unit(path, name, good)
                for record in read_list(path, name, "mail_people", check.lists):
                    count += 1
                    if own and record.fields.get("unit") is None:
                        record.fields["unit"] = own
                    values = check.read(record, self.problems)
                    if good:
                        self._person(record, values, own)
                    elif record.fields.get("unit") is None:
                        self.problems.append(record.problem("unit", "is missing: fill it in"))
            except Fault as fault:
                self.problems.append(fault.problem)
                faults += 1
        return None if faults else count

    def _own_unit(self, path: Path, name: str, good: bool) -> str:
        """Return the unit of a file people/UNIT.yml (LC-3, LC-9.2)."""
        if path.suffix != ".yml" or path.is_dir():
            raise Fault(name, 1, "is not one of the files UNIT.yml: rename or remove it")
        if good and path.stem not in self.units:
            raise Fault(name, 1, _no_unit(path.stem), "unit")
        return path.stem

    def _person(self, record: Record, values: Values, own: str) -> None:
        """Check one person against the units, and note him."""
        unit = values.get("unit")
        if unit is None:
            if record.fields.get("unit") is None:
                self.problems.append(record.problem("unit", "is missing: fill it in"))
        elif unit not in self.units:
            self.problems.append(record.problem("unit", _no_unit(unit)))
        elif own and own not in self.scheme.above(unit):
            text = f"must be {own}, as the file is named, or a unit below it"
            self.problems.append(record.problem("unit", text))
        if values.get("state") == "left" and "id" in values:
            self.left.add(values["id"])
        self._mailbox("person", record, values)

    def _mailbox(self, kind: str, record: Record, values: Values) -> None:
        """Claim a mailbox's addresses and, while all is well, write its line."""
        claims, scheme = self.claims, self.scheme
        number = claims.enter(values.get("id", ""), record)
        places = scheme.places(kind, values)
        local = self._local_part(kind, record, values, places)
        mail = claims.full(local, record, "local_part") if local else ""
        code = places["unit"] if kind == "person" else places["parent"]
        if mail:
            claims.claim(mail, number, record, "local_part", code)
        others: list[str] = []
        for alias in values.get("aliases", ()):
            address = claims.full(alias, record, "aliases")
            if address and not claims.claim(address, number, record, "aliases", "") or address in others:
                text = f"{address} stands twice in this record: keep one"
                self.problems.append(record.problem("aliases", text))
            elif address:
                others.append(address)
        try:
            for address in scheme.derived(kind, values, local, places) if mail else ():
                if address.partition("@")[0] in claims.reserved:
                    claims.full(address, record, "local_part")
                elif claims.claim(address, number, record, "local_part", code):
                    others.append(address)
        except NameRefused as error:
            self.problems.append(record.problem("local_part", str(error)))
        if kind == "unit":
            others += scheme.received.get(values.get("id", ""), ())
        shown = self._certificates(record, values, {mail, *others}) if "certificate" in values else []
        if self.out and not self.problems:
            if kind == "unit":
                attributes = self._unit_attributes(values, mail, others)
            else:
                attributes = self._person_attributes(values, mail, others)
            if shown:
                attributes[certificates.ATTRIBUTE] = shown
            self._write(kind, record, values, attributes)

    def _write(self, kind: str, record: Record, values: Values, attributes: Attributes) -> None:
        """Write the line of a mailbox. By hand this takes a quarter of the general encoder's time."""
        assert self.out is not None
        pairs = ",".join(
            [
                f'"{name}":[{quote(value)}]' if type(value) is str else f'"{name}":{encode(value)}'
                for name, value in attributes.items()
            ]
        )
        refs = ",".join([f'"{name}":{quote(values[name])}' for name in REFS if name in values])
        place = quote(f"{record.file}:{record.line}")
        line = f'{{"k":"{kind}","i":"{values["id"]}","a":{{{pairs}}},"r":{{{refs}}},"l":{place}}}\n'
        self.out.write(line.encode())

    def _certificates(self, record: Record, values: Values, addresses: set[str]) -> list[str]:
        """Return the certificates of a mailbox that can be taken."""
        found = set()
        for name in values["certificate"]:
            try:
                text, warning = certificates.read(self.folder / name, name, addresses, self.today)
            except certificates.CertificateRefused as refusal:
                self.problems.append(record.problem("certificate", str(refusal)))
                continue
            found.add(text)
            if warning:
                self.warnings.append(str(record.problem("certificate", warning)))
        return sorted(found)

    def _applications(self, good: bool) -> int:
        """Read applications.yml, where there is one; return how many there are."""
        path, count = self.folder / "applications.yml", 0
        if not path.exists():
            return 0
        check = application_fields()
        try:
            for record in read_list(path, f"{self.shown}/applications.yml", "mail_applications", check.lists):
                count += 1
                values = check.read(record, self.problems)
                if good:
                    self._application(record, values)
        except Fault as fault:
            self.problems.append(fault.problem)
        return count

    def _application(self, record: Record, values: Values) -> None:
        """Claim an application's login and its own addresses (HT-4.2e) and, while all is well, write its line."""
        claims = self.claims
        number = claims.enter(values.get("id", ""), record)
        unit = values.get("unit")
        if unit is not None and unit not in self.units:
            self.problems.append(record.problem("unit", _no_unit(unit)))
        elif unit is not None and self.units[unit].get("state") == "dissolved":
            self.problems.append(record.problem("unit", f"unit {unit} is dissolved: name the one that answers for it"))
        login = claims.full(values["id"], record, "id") if "id" in values else ""
        if login:
            claims.claim(login, number, record, "id", "")
        senders: set[str] = set()
        own: list[str] = []
        for text in values.get("addresses", ()):
            address = claims.full(text, record, "addresses")
            if not address:
                continue
            holder = claims.holder(address)
            if address in senders:
                text = f"{address} stands twice in this record: keep one"
                self.problems.append(record.problem("addresses", text))
            elif holder is None or claims.of_application(address):
                if claims.claim(address, number, record, "addresses", "") and address != login:
                    own.append(address)
            elif holder in self.left or self.units.get(holder, {}).get("state") == "dissolved":
                text = f"{address} is of {holder}, who is no longer there: name another"
                self.problems.append(record.problem("addresses", text))
            senders.add(address)
        hosts: set[str] = set()
        for text in values.get("hosts", ()):
            try:
                hosts.add(_network(text))
            except ValueError as error:
                self.problems.append(record.problem("hosts", str(error)))
        if self.out and not self.problems:
            attributes: Attributes = {"cn": values["name"], "mail": login}
            if own:
                attributes["mailLocalAddress"] = sorted(own)
            attributes["mailboxState"] = values.get("state", "active")
            attributes["mailboxClass"] = "application"
            attributes["departmentNumber"] = values["unit"]
            attributes["applicationHost"] = sorted(hosts)
            attributes["applicationSender"] = sorted(senders)
            attributes["pwdPolicySubentry"] = f"cn=services,ou=policies,{self.scheme.policy.base}"
            self._write("application", record, values, attributes)

    def _local_part(self, kind: str, record: Record, values: Values, places: Mapping[str, str]) -> str:
        """Return the given local part, or what the policy's pattern makes; "" after a fault."""
        if record.fields.get("local_part") is not None:
            return str(values.get("local_part", ""))
        name, pattern = self.scheme.pattern(kind, values)
        if pattern is None:
            if not self.faulty_patterns:
                text = f"is missing and policy.yml has no address pattern {name}: give one of them"
                self.problems.append(record.problem("local_part", text))
            return ""
        place = lacking(pattern, places)
        if place:
            self._no_place(record, place)
            return ""
        try:
            return fill_pattern(pattern, places)
        except NameRefused as error:
            self.problems.append(record.problem("local_part", str(error)))
            return ""

    def _no_place(self, record: Record, place: str) -> None:
        """Note why a pattern's place cannot be filled, where no other problem says so already."""
        raw = record.fields.get(place)
        if place in ("parent", "unit") and raw is not None:
            if isinstance(raw, str) and raw in self.units:
                text = f'the address needs the code of unit "{raw}": give it a code'
                self.problems.append(record.problem(place, text))
        elif raw is None and place not in ("ho", "ten", "name", "unit"):
            text = "is missing and the address pattern needs it: fill it in or give local_part"
            self.problems.append(record.problem(place, text))

    def _unit_attributes(self, values: Values, mail: str, others: list[str]) -> Attributes:
        attributes: Attributes = {"ou": values["name"], "mail": mail}
        self._add_common(attributes, "unit", values, others)
        for name, key in _UNIT_ATTRIBUTES:
            if key in values:
                attributes[name] = values[key]
        delegates = values.get("delegates")
        if delegates:
            attributes["mailboxDelegate"] = sorted(encode(dict(sorted(delegate.items()))) for delegate in delegates)
        return attributes

    def _person_attributes(self, values: Values, mail: str, others: list[str]) -> Attributes:
        ho, ten, unit = values["ho"], values["ten"], values["unit"]
        dem = values.get("dem")
        given = f"{dem} {ten}" if dem else ten
        attributes: Attributes = {"cn": f"{ho} {given}", "sn": ho, "givenName": given}
        if dem:
            attributes["mailboxMiddleName"] = dem
        if "title" in values:
            attributes["title"] = values["title"]
        attributes["departmentNumber"] = unit
        attributes["mail"] = mail
        self._add_common(attributes, "person", values, others)
        if attributes["mailboxState"] == "active" and self.scheme.suspended_with("person", values):
            attributes["mailboxState"] = "suspended"
        if values["id"] in self.administrators:
            attributes["pwdPolicySubentry"] = f"cn=administrators,ou=policies,{self.scheme.policy.base}"
        return attributes

    def _add_common(self, attributes: Attributes, kind: str, values: Values, others: list[str]) -> None:
        if others and (receiving := self.scheme.receiving(others)):
            attributes["mailLocalAddress"] = receiving
        attributes["mailboxState"] = values.get("state", "active")
        attributes["mailboxClass"] = kind
        attributes["mailboxQuota"] = str(octets(values["quota"])) if "quota" in values else self.quotas[kind]
        if "class" in values:
            attributes["businessCategory"] = values["class"]
        if values.get("internal"):
            attributes["mailboxInternal"] = "TRUE"

    def _check_people_named(self, policy: Policy) -> None:
        """Note heads, delegates, administrators and mapped mailboxes that do not exist or have left."""
        for record, values in self.unit_records:
            self._check_person(record, "head", values.get("head"))
            delegates = [delegate.get("person") for delegate in values.get("delegates", ())]
            for identity in delegates:
                self._check_person(record, "delegates", identity)
            if len(set(delegates)) < len(delegates):
                self.problems.append(record.problem("delegates", "name one person twice: keep one"))
        if self.administrators:
            passwords: Record = policy.record.fields["passwords"]
            administrators: Record = passwords.fields["administrators"]
            for identity in policy.values["passwords"]["administrators"]["people"]:
                self._check_person(administrators, "people", identity)
        for alias in policy.alias_domains:
            for name, identity in alias.map.items():
                if identity not in self.units and not self.claims.person(identity):
                    text = f'there is no unit or person "{identity}": correct it'
                    self.problems.append(_map_record(alias).problem(name, text))

    def _check_person(self, record: Record, name: str, identity: str | None) -> None:
        if identity is None:
            return
        if not self.claims.person(identity):
            text = f'there is no person "{identity}": correct it or add the person'
            self.problems.append(record.problem(name, text))
        elif identity in self.left:
            text = f'person "{identity}" has left: name another or leave it out'
            self.problems.append(record.problem(name, text))


_UNIT_ATTRIBUTES = (
    ("mailboxUnitCode", "code"),
    ("mailboxParent", "parent"),
    ("mailboxHead", "head"),
    ("mailboxSuccessor", "successor"),
)


def _no_unit(identity: str) -> str:
    return f'there is no unit "{identity}": correct it or add it to units.yml'


def _network(text: str) -> str:
    """Return an address or a network in its usual form; raises ValueError with one sentence."""
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f'"{short(text)}" is no address or network, such as 10.1.2.3 or 10.1.2.0/24') from None
    if network.prefixlen == 0:
        raise ValueError(f'"{short(text)}" is everywhere: name the hosts from which it logs in')
    if "/" in text and ipaddress.ip_address(text.split("/")[0]) != network.network_address:
        alone = text.split("/")[0]
        raise ValueError(f'"{short(text)}" is both a host and a network: write {alone} or {network}')
    return str(network.network_address) if network.num_addresses == 1 else str(network)


def _map_record(alias: AliasDomain) -> Record:
    record: Record = alias.record.fields["map"]
    return record


def _faulty_patterns(policy: Policy) -> bool:
    """Tell whether an address pattern has a fault, so that missing ones need not be told."""
    address = policy.record.fields.get("address")
    if not isinstance(address, Record):
        return True
    return any(name != "reserved" and name not in policy.values["address"] for name in address.fields)


def _people_files(folder: Path, shown: str) -> list[Path]:
    """Find the one source of people: people.yml, .csv, .json, or the folder people/."""
    sources = [folder / f"people{suffix}" for suffix in (".yml", ".csv", ".json", "")]
    found = [source for source in sources if source.exists()]
    if not found:
        raise Fault(f"{shown}/people.yml", 1, 'is missing: write "mail_people: []" for nobody')
    if len(found) > 1:
        names = " and ".join(source.name for source in found)
        raise Fault(f"{shown}/{found[1].name}", 1, f"{names} both hold people: keep one")
    if found[0].suffix or not found[0].is_dir():
        return found
    return sorted(path for path in found[0].iterdir() if not path.name.startswith("."))
