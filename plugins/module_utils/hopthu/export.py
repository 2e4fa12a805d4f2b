"""The live tree back to directory files: what `state.read` makes the same desired state of."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from . import certificates
from .addresses import Policy, Scheme, Values
from .durable import replaced
from .names import NameRefused
from .schema import REFS, Fields, application_fields, person_fields, unit_fields
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
_APPLICATION = {"name": "cn", "unit": "departmentNumber", "state": "mailboxState"}
# What every version of YAML reads as text without quotes.
_PLAIN = re.compile(r"(?!(?:null|true|false|yes|no|on|off|y|n)\Z)[^\W\d_][\w./@-]*(?: [\w./@-]+)*", re.IGNORECASE)

Mailbox = tuple[str, str, dict[str, list[str]]]
"""Kind, id and LDAP attributes."""


class ExportRefused(ValueError):
    """Why the tree cannot be written into files; the message is one clear sentence."""


def write(lines: Iterable[str], policy: Policy, folder: Path, form: str) -> list[Path]:
    """Write units.yml, people.`form` (yml, csv or json), applications.yml and certificates; return the lists' paths.

    `lines` are those of the module's mode export: JSON objects with k, i and a, units first, applications last. What
    policy gives (an address after the pattern, reserved names, alias domains, the usual quota, the suspension of a
    whole unit) is left out, so that it follows policy from now on.

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
    mailbox = next(mailboxes, None)
    while mailbox is not None and mailbox[0] == "unit":
        units[mailbox[1]] = _unit(mailbox[1], mailbox[2])
        found.append(mailbox[2])
        mailbox = next(mailboxes, None)
    scheme = Scheme(policy, units)

    def persons() -> Iterator[Values]:
        nonlocal mailbox
        while mailbox is not None and mailbox[0] == "person":
            _kind, identity, attributes = mailbox
            yield _without_policy("person", _person(identity, attributes), attributes, scheme, folder)
            mailbox = next(mailboxes, None)

    def applications() -> Iterator[Values]:
        nonlocal mailbox
        while mailbox is not None:
            kind, identity, attributes = mailbox
            if kind != "application":
                raise ExportRefused(f"the {kind} {identity} came out of its order: export again")
            yield _application(identity, attributes, policy.domain)
            mailbox = next(mailboxes, None)

    offices = [_without_policy("unit", *pair, scheme, folder) for pair in zip(units.values(), found, strict=True)]
    programs = folder / "applications.yml"
    with (
        replaced(folder / "units.yml") as units_file,
        replaced(people) as people_file,
        replaced(programs) as programs_file,
    ):
        _write_yaml(units_file, "mail_units", offices)
        _WRITERS[form](people_file, "mail_people", persons())
        _write_yaml(programs_file, "mail_applications", applications())
    return [folder / "units.yml", people, programs]


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


def _application(identity: str, attributes: dict[str, list[str]], domain: str) -> Values:
    values: Values = {"id": identity, **_named(_APPLICATION, attributes)}
    values["addresses"] = [text.removesuffix(f"@{domain}") for text in attributes.get("applicationSender", [])]
    values["hosts"] = attributes.get("applicationHost", [])
    if values.get("state") == "active":
        del values["state"]
    return _in_order(values, attributes, application_fields())


def _named(names: dict[str, str], attributes: dict[str, list[str]]) -> Values:
    return {field: attributes[name][0] for field, name in names.items() if name in attributes}


def _without_policy(
    kind: str, values: Values, attributes: dict[str, list[str]], scheme: Scheme, folder: Path
) -> Values:
    """Return a mailbox's fields in the order of the schema, without what policy says already.

    Its certificates become files below `folder`.
    """
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
    values["internal"] = attributes.get("mailboxInternal") == ["TRUE"]
    values["certificate"] = []
    for number, text in enumerate(attributes.get(certificates.ATTRIBUTE, []), 1):
        name = f"certificates/{values['id']}-{number}.pem"
        with replaced(folder / name) as file:
            file.write(certificates.pem(text).encode())
        values["certificate"].append(name)
    return _in_order(values, attributes, unit_fields() if kind == "unit" else person_fields())


def _in_order(values: Values, attributes: dict[str, list[str]], fields: Fields) -> Values:
    """Return the fields that have a value, with the grounds, in the order of the schema."""
    grounds = (text.split(" ", 1) for text in attributes.get("mailboxGrounds", []))
    values.update({name: text for name, text in grounds if name in REFS})
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
    plain = isinstance(value, str) and _PLAIN.fullmatch(value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def _write_csv(file: IO[bytes], _root: str, records: Iterable[Values]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.DictWriter(text, list(person_fields().known), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({name: _cell(value) for name, value in record.items()})
    text.detach()


def _cell(value: Any) -> str:
    return ";".join(value) if isinstance(value, list) else value if isinstance(value, str) else json.dumps(value)


def _write_json(file: IO[bytes], root: str, records: Iterable[Values]) -> None:
    lead = f'{{"{root}": [\n'
    for record in records:
        file.write(f"{lead}{json.dumps(record, ensure_ascii=False)}".encode())
        lead = ",\n"
    file.write(b"\n]}\n" if lead.startswith(",") else f"{lead}]}}\n".encode())


_WRITERS = {"yml": _write_yaml, "csv": _write_csv, "json": _write_json}
