"""The live tree back to directory files: what `state.read` makes the same desired state of."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from .addresses import Policy, Scheme, Values
from .durable import replaced
from .names import NameRefused
from .schema import REFS, person_fields, unit_fields
from .state import SIZES, octets

_UNIT = {
    "name": "ou",
    "code": "mailboxUnitCode",
    "parent": "mailboxParent",
    "class": "businessCategory",
    "head": "mailboxHead",
    "state": "mailboxState",
    "successor": "mailboxSuccessor",
}
_PERSON = {
    "ho": "sn",
    "dem": "mailboxMiddleName",
    "ten": "givenName",
    "unit": "departmentNumber",
    "title": "title",
    "class": "businessCategory",
    "state": "mailboxState",
}
# What every version of YAML reads as text without quotes.
_PLAIN = re.compile(r"(?!(?:null|true|false|yes|no|on|off|y|n)\Z)[^\W\d_][\w./@-]*(?: [\w./@-]+)*", re.IGNORECASE)

Mailbox = tuple[str, str, dict[str, list[str]]]
"""Kind, id and LDAP attributes."""


class ExportRefused(ValueError):
    """Why the tree cannot be written into files; the message is one clear sentence."""


def write(lines: Iterable[str], policy: Policy, folder: Path, form: str) -> list[Path]:
    """Write units.yml and people.`form` (yml, csv or json) into `folder`; return their paths.

    `lines` are those of the module's mode export: JSON objects with k, i and a, units first. What policy gives (an
    address after the pattern, reserved names, alias domains, the usual quota, the suspension of a whole unit) is
    left out, so that it follows policy from now on.

    Raises ExportRefused with one sentence when the folder has people in another form, the lines are out of order, or a
    unit's delegates cannot be read.
    """
    people = folder / f"people.{form}"
    for other in (folder / f"people{suffix}" for suffix in (".yml", ".csv", ".json", "")):
        if other != people and other.exists():
            raise ExportRefused(f"{other} holds people already: move it away, or export in its form")
    mailboxes = map(_parsed, lines)
    units: dict[str, Values] = {}
    found: list[dict[str, list[str]]] = []
    first: list[Mailbox] = []
    for mailbox in mailboxes:
        if mailbox[0] == "person":
            first.append(mailbox)
            break
        units[mailbox[1]] = _unit(mailbox[1], mailbox[2])
        found.append(mailbox[2])
    scheme = Scheme(policy, units)

    def persons() -> Iterator[Values]:
        for kind, identity, attributes in chain(first, mailboxes):
            if kind != "person":
                raise ExportRefused(f"the unit {identity} came after people: export again")
            yield _without_policy(kind, _person(identity, attributes), attributes, scheme)

    offices = [_without_policy("unit", *pair, scheme) for pair in zip(units.values(), found, strict=True)]
    with replaced(folder / "units.yml") as units_file, replaced(people) as people_file:
        _write_yaml(units_file, "mail_units", offices)
        _WRITERS[form](people_file, "mail_people", persons())
    return [folder / "units.yml", people]


def _parsed(line: str) -> Mailbox:
    value = json.loads(line)
    return value["k"], value["i"], value["a"]


def _unit(identity: str, attributes: dict[str, list[str]]) -> Values:
    values = {"id": identity, **_named(_UNIT, attributes)}
    if "mailboxDelegate" in attributes:
        try:
            values["delegates"] = [json.loads(text) for text in attributes["mailboxDelegate"]]
        except ValueError:
            text = "has a mailboxDelegate written by hand that is no JSON: load the files, then export"
            raise ExportRefused(f"the unit {identity} {text}") from None
    return values


def _person(identity: str, attributes: dict[str, list[str]]) -> Values:
    values = {"id": identity, **_named(_PERSON, attributes)}
    if "dem" in values and "ten" in values:
        values["ten"] = values["ten"].removeprefix(values["dem"]).lstrip()
    return values


def _named(names: dict[str, str], attributes: dict[str, list[str]]) -> Values:
    return {field: attributes[name][0] for field, name in names.items() if name in attributes}


def _without_policy(kind: str, values: Values, attributes: dict[str, list[str]], scheme: Scheme) -> Values:
    """Return a mailbox's fields in the order of the schema, without what policy says already."""
    places = scheme.places(kind, values)
    local = attributes["mail"][0].partition("@")[0]
    if local != scheme.made(kind, values, places):
        values["local_part"] = local
    try:
        derived = scheme.derived(kind, values, local, places)
    except NameRefused:  # then files that are read have no such alias either
        derived = []
    policy_gives = {*derived, *scheme.received.get(values["id"], ())}
    values["aliases"] = [
        address.removesuffix(f"@{scheme.policy.domain}")
        for address in sorted(attributes.get("mailLocalAddress", []))
        if address not in policy_gives
    ]
    size = _size(attributes.get("mailboxQuota", ["0"])[0])
    if size and octets(size) != octets(scheme.policy.values["quota"][kind]):
        values["quota"] = size
    state = values.pop("state", "active")
    if state != "active" and not (state == "suspended" and scheme.suspended_with(kind, values)):
        values["state"] = state
    grounds = (text.split(" ", 1) for text in attributes.get("mailboxGrounds", []))
    values.update({name: text for name, text in grounds if name in REFS})
    fields = unit_fields() if kind == "unit" else person_fields()
    return {name: values[name] for name in fields.known if values.get(name)}


def _size(number: str) -> str:
    """Return octets in the largest unit that gives a whole number, "" where none does."""
    count = int(number) if number.isdecimal() else 0
    return next((f"{count // SIZES[sign]}{sign}" for sign in "TGMK" if count and count % SIZES[sign] == 0), "")


def _write_yaml(file: IO[bytes], root: str, records: Iterable[Values]) -> None:
    empty = True
    file.write(f"---\n{root}:".encode())
    for record in records:
        empty = False
        lead = "\n  - "
        for name, value in record.items():
            file.write(f"{lead}{name}: {_yaml(value)}".encode())
            lead = "\n    "
    file.write(b" []\n" if empty else b"\n")


def _yaml(value: Any) -> str:
    """Return a value in YAML's flow style. A JSON text is YAML too."""
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_yaml(part)}' for name, part in value.items())}}}"
    return value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def _write_csv(file: IO[bytes], _root: str, records: Iterable[Values]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.DictWriter(text, list(person_fields().known), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({name: ";".join(value) if isinstance(value, list) else value for name, value in record.items()})
    text.detach()


def _write_json(file: IO[bytes], root: str, records: Iterable[Values]) -> None:
    lead = f'{{"{root}": [\n'
    for record in records:
        file.write(f"{lead}{json.dumps(record, ensure_ascii=False)}".encode())
        lead = ",\n"
    file.write(b"\n]}\n" if lead.startswith(",") else f"{lead}]}}\n".encode())


_WRITERS = {"yml": _write_yaml, "csv": _write_csv, "json": _write_json}
