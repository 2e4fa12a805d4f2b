"""Records to the typed policy, units and people of a province.

Each field is checked by itself here; what concerns several records is checked in `state`.
A record with a fault still becomes a Unit or Person, so that the faults of others are found too.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import Fault, Problem, Record, read_list, read_mapping, short
from .names import check_pattern, clean, legacy_encoding

UNIT_STATES = ("active", "suspended", "legacy", "dissolved")
PERSON_STATES = ("active", "suspended", "left")
RECEIVING_NAMES = ("postmaster", "abuse")  # RFC 2142, sections 4 and 5

_UNIT_PLACES = frozenset({"name", "code", "parent"})
_PERSON_PLACES = frozenset({"ho", "dem", "ten", "unit"})
_SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Parse = Callable[[Any], Any]
"""Takes a value as read, returns it typed; raises ValueError with one sentence."""


@dataclass(frozen=True)
class Delegate:
    """A person who may act for a unit's head."""

    person: str
    role: str | None = None
    delegation_ref: str | None = None


@dataclass
class Unit:
    """An office with a mailbox (hộp thư đơn vị). `quota` is in octets."""

    record: Record
    id: str = ""
    name: str = ""
    code: str = ""
    parent: str = ""
    category: str = ""
    local_part: str = ""
    aliases: tuple[str, ...] = ()
    head: str = ""
    delegates: tuple[Delegate, ...] = ()
    state: str = "active"
    quota: int | None = None
    refs: dict[str, str] = field(default_factory=dict)


@dataclass
class Person:
    """An official with a mailbox (hộp thư cá nhân). `quota` is in octets."""

    record: Record
    id: str = ""
    ho: str = ""
    dem: str = ""
    ten: str = ""
    unit: str = ""
    title: str = ""
    category: str = ""
    local_part: str = ""
    aliases: tuple[str, ...] = ()
    state: str = "active"
    quota: int | None = None
    refs: dict[str, str] = field(default_factory=dict)


@dataclass
class Policy:
    """What the province has decided. `quota_*` are octets; `reserved` maps names to unit ids."""

    record: Record
    domain: str = ""
    alias_domains: tuple[str, ...] = ()
    patterns: dict[str, str] = field(default_factory=dict)
    reserved: dict[str, str | None] = field(default_factory=dict)
    reserved_record: Record | None = None
    quota_unit: int = 0
    quota_person: int = 0

    @property
    def domains(self) -> tuple[str, ...]:
        """Return the main domain and then the alias domains."""
        return (self.domain, *self.alias_domains)


@dataclass
class Directory:
    """A province's directory as its files have it; `complete` when every file could be read."""

    policy: Policy
    units: list[Unit]
    people: list[Person]
    complete: bool = True


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {short(value)}: put it in quotes")
    result = clean(value)
    if not result:
        raise ValueError("is empty: fill it in or leave it out")
    if any(unicodedata.category(char) in ("Cc", "Cs", "Co", "Cn") for char in result):
        raise ValueError(f'"{short(result)}" holds a control character: remove it')
    return result


def _name(value: Any) -> str:
    result = _text(value)
    legacy = legacy_encoding(result)
    if legacy:
        raise ValueError(f'"{short(result)}" is in {legacy}: convert it to Unicode (QĐ 72/2002)')
    return result


def _matching(pattern: str, sentence: str) -> Parse:
    compiled = re.compile(pattern, re.ASCII)

    def parse(value: Any) -> str:
        result = _text(value)
        if not compiled.fullmatch(result):
            raise ValueError(f'"{short(result)}" {sentence}')
        return result

    return parse


_ident = _matching("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", "may hold only letters, digits and . _ -, at most 64")
_code = _matching("[a-z0-9]{1,64}", "may hold only a-z and 0-9")
_token = _matching("[a-z][a-z0-9_]*", "may hold only a-z, 0-9 and _")
_domain = _matching(
    r"(?=.{4,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])",
    "is no domain in lower case, such as daklak.gov.vn",
)


def _one_of(values: tuple[str, ...]) -> Parse:
    def parse(value: Any) -> str:
        if value not in values:
            raise ValueError(f'"{short(value)}" must be one of {", ".join(values)}')
        return str(value)

    return parse


def _size(value: Any) -> int:
    match = re.fullmatch("([1-9][0-9]{0,8})([KMGT])", value) if isinstance(value, str) else None
    if not match:
        raise ValueError(f'"{short(value)}" is no size: write one such as 500M or 5G')
    return int(match[1]) * _SIZES[match[2]]


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f'"{short(value)}" must be a list')
    return tuple(_text(item) for item in value)


def _mapping(value: Any) -> Any:
    if not isinstance(value, Record):
        raise ValueError(f'"{short(value)}" must be a mapping of the form key: value')
    return value


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f'"{short(value)}" must be a share between 0 and 1, such as 0.05')
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f'"{short(value)}" must be a whole number, 0 or more')
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f'"{short(value)}" must be true or false')
    return value


def _pattern(places: frozenset[str]) -> Parse:
    return lambda value: check_pattern(_text(value), places)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f'"{short(value)}" must be a list')
    return value


def _refs(names: Iterable[str]) -> dict[str, Parse]:
    return dict.fromkeys(names, _text)


UNIT_REFS = ("legal_act_ref",)
PERSON_REFS = ("decision_ref", "order_ref", "request_ref", "approved_by", "commitment_ref")

_UNIT: dict[str, Parse] = {
    "id": _ident,
    "name": _name,
    "code": _code,
    "parent": _ident,
    "class": _token,
    "local_part": _text,
    "aliases": _texts,
    "head": _ident,
    "delegates": _list,
    "state": _one_of(UNIT_STATES),
    "quota": _size,
    **_refs(UNIT_REFS),
}
_PERSON: dict[str, Parse] = {
    "id": _ident,
    "ho": _name,
    "dem": _name,
    "ten": _name,
    "unit": _ident,
    "title": _name,
    "class": _token,
    "state": _one_of(PERSON_STATES),
    "local_part": _text,
    "aliases": _texts,
    "quota": _size,
    **_refs(PERSON_REFS),
}
_DELEGATE: dict[str, Parse] = {"person": _ident, "role": _text, "delegation_ref": _text}
_POLICY: dict[str, Parse] = {
    "domain": _domain,
    "alias_domains": _list,
    "address": _mapping,
    "required_refs": _mapping,
    "eligibility": _mapping,
    "delegates": _mapping,
    "leaver": _mapping,
    "rename": _mapping,
    "removal_limit": _share,
    "passwords": _mapping,
    "quota": _mapping,
    "notify": _mapping,
    "retention": _mapping,
}
_ADDRESS: dict[str, Parse] = {
    "unit": _pattern(_UNIT_PLACES),
    "main_unit": _pattern(_UNIT_PLACES),
    "sub_unit": _pattern(_UNIT_PLACES),
    "person": _pattern(_PERSON_PLACES),
    "reserved": _mapping,
    "reuse_block_days": _count,
}
_QUOTA: dict[str, Parse] = {"unit": _size, "person": _size}
_DELEGATION: dict[str, Parse] = {"max": _count, "roles": _texts, "document_required": _flag}


def _fields(
    record: Record, table: dict[str, Parse], required: tuple[str, ...], problems: list[Problem]
) -> dict[str, Any]:
    """Check the fields of one record; return the good ones. A field left blank is not there."""
    values: dict[str, Any] = {}
    for name, raw in record.fields.items():
        parse = table.get(name)
        if parse is None:
            near = difflib.get_close_matches(name, table, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(table)}"
            problems.append(record.problem(name, f"is not a known field: {hint}"))
        elif raw is not None:
            try:
                values[name] = parse(raw)
            except ValueError as error:
                problems.append(record.problem(name, str(error)))
    for name in required:
        if record.fields.get(name) is None:
            problems.append(record.problem(name, "is missing: fill it in"))
    return values


def _take_refs(values: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    return {name: values.pop(name) for name in names if name in values}


def _unit(record: Record, problems: list[Problem]) -> Unit:
    values = _fields(record, _UNIT, ("id", "name"), problems)
    values["refs"] = _take_refs(values, UNIT_REFS)
    values["category"] = values.pop("class", "")
    delegates = []
    for item in values.pop("delegates", []):
        if isinstance(item, Record):
            good = _fields(item, _DELEGATE, ("person",), problems)
            if "person" in good:
                delegates.append(Delegate(**good))
        else:
            text = f'"{short(item)}" must be a mapping with person, role and delegation_ref'
            problems.append(record.problem("delegates", text))
    return Unit(record, delegates=tuple(delegates), **values)


def _person(record: Record, problems: list[Problem]) -> Person:
    values = _fields(record, _PERSON, ("id", "ho", "ten", "unit"), problems)
    values["refs"] = _take_refs(values, PERSON_REFS)
    values["category"] = values.pop("class", "")
    return Person(record, **values)


def _policy(record: Record, problems: list[Problem]) -> Policy:
    values = _fields(record, _POLICY, ("domain", "address", "quota"), problems)
    policy = Policy(record, domain=values.get("domain", ""))
    alias_domains: list[str] = []
    for item in values.get("alias_domains", []):
        if not isinstance(item, Record):
            text = f'"{short(item)}" must be a mapping such as "- domain: phuyen.gov.vn"'
            problems.append(record.problem("alias_domains", text))
            continue
        name = _fields(item, {"domain": _domain}, ("domain",), problems).get("domain")
        if name in (policy.domain, *alias_domains):
            problems.append(item.problem("domain", f"{name} stands twice: keep one"))
        elif name:
            alias_domains.append(name)
    policy.alias_domains = tuple(alias_domains)
    if "quota" in values:
        quota = _fields(values["quota"], _QUOTA, ("unit", "person"), problems)
        policy.quota_unit = quota.get("unit", 0)
        policy.quota_person = quota.get("person", 0)
    if "delegates" in values:
        _fields(values["delegates"], _DELEGATION, (), problems)
    if "address" in values:
        address = _fields(values["address"], _ADDRESS, ("reserved",), problems)
        policy.reserved_record = address.pop("reserved", None)
        address.pop("reuse_block_days", None)
        policy.patterns = address
    if policy.reserved_record:
        _reserved(policy, policy.reserved_record, problems)
    return policy


def _reserved(policy: Policy, record: Record, problems: list[Problem]) -> None:
    """Fill `policy.reserved`; every domain needs a receiver for RFC 2142's names."""
    for name, unit in record.fields.items():
        try:
            policy.reserved[name] = None if unit is None else _ident(unit)
        except ValueError as error:
            problems.append(record.problem(name, str(error)))
    for name in RECEIVING_NAMES:
        if name not in record.fields:
            text = "is missing: name the unit that receives it (RFC 2142)"
            problems.append(record.problem(name, text))
        elif record.fields[name] is None:
            text = "must be received: name the unit's id instead of null (RFC 2142)"
            problems.append(record.problem(name, text))


def _people_files(folder: Path, shown: str) -> list[Path]:
    """Find the one source of people: people.yml, .csv, .json, or the folder people/."""
    sources = [folder / f"people{suffix}" for suffix in (".yml", ".csv", ".json", "")]
    found = [source for source in sources if source.exists()]
    if not found:
        raise Fault(f"{shown}/people.yml", 1, 'is missing: write "mail_people: []" for nobody')
    if len(found) > 1:
        names = " and ".join(source.name for source in found)
        raise Fault(f"{shown}/{found[1].name}", 1, f"{names} both hold people: keep one")
    if not found[0].is_dir():
        return found
    return sorted(path for path in found[0].iterdir() if not path.name.startswith("."))


def load(folder: Path, shown: str) -> tuple[Directory, list[Problem]]:
    """Read and check, field by field, all files of a province's directory folder.

    `shown` is the folder's name in problems.
    """
    problems: list[Problem] = []
    policy: Policy | None = None
    units: list[Record] = []
    people: list[Record] = []
    faults: list[Fault] = []
    try:
        policy = _policy(read_mapping(folder / "policy.yml", f"{shown}/policy.yml"), problems)
    except Fault as fault:
        faults.append(fault)
    try:
        units = read_list(folder / "units.yml", f"{shown}/units.yml", "mail_units")
    except Fault as fault:
        faults.append(fault)
    try:
        paths = _people_files(folder, shown)
    except Fault as fault:
        faults.append(fault)
        paths = []
    for path in paths:
        name = f"{shown}/{path.relative_to(folder)}"
        try:
            if path.parent == folder:
                people += read_list(path, name, "mail_people")
            else:
                people += _people_of_unit(path, name)
        except Fault as fault:
            faults.append(fault)
    problems += [fault.problem for fault in faults]
    directory = Directory(
        policy or Policy(Record(f"{shown}/policy.yml", 1, {})),
        [_unit(record, problems) for record in units],
        [_person(record, problems) for record in people],
        complete=not faults,
    )
    return directory, problems


def _people_of_unit(path: Path, name: str) -> list[Record]:
    """Read people/UNIT.yml: a department's own file holds only its own people (LC-3, LC-9.2)."""
    if path.suffix != ".yml" or path.is_dir():
        raise Fault(name, 1, "is not one of the files UNIT.yml: rename or remove it")
    records = read_list(path, name, "mail_people")
    for record in records:
        unit = record.fields.get("unit")
        if unit is None:
            record.fields["unit"] = path.stem
        elif unit != path.stem:
            problem = record.problem("unit", f"must be {path.stem}, as the file is named")
            raise Fault(problem.file, problem.line, problem.text, "unit")
    return records
