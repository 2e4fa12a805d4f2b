"""The JSON Schemas that editors read and the checks that the reader compiles from them say the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from referencing import Registry, Resource

from hopthu.files import Problem, Record
from hopthu.names import NameRefused, check_local_part, legacy_encoding
from hopthu.schema import FOLDER, Fields, application_fields, person_fields, policy_fields, unit_fields

INVENTORIES = FOLDER.parent
DOCUMENTS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
REGISTRY: Registry[Any] = Registry().with_resources(
    (name, Resource.from_contents(document)) for name, document in DOCUMENTS.items()
)


def _pattern(_validator: Any, pattern: str, value: Any, _schema: Any) -> Any:
    """JSON Schema's patterns are ECMA 262's, where $ is the very end of the text."""
    if isinstance(value, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), value):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


VALIDATOR = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": _pattern})
RECORDS = {
    "policy": (policy_fields(), DOCUMENTS["policy.schema.json"]),
    "units": (unit_fields(), {"$ref": "units.schema.json#/properties/mail_units/items"}),
    "people": (person_fields(), {"$ref": "people.schema.json#/properties/mail_people/items"}),
    "applications": (application_fields(), {"$ref": "applications.schema.json#/properties/mail_applications/items"}),
}


def by_schema(name: str, value: Any) -> bool:
    """Tell whether the schema takes a record."""
    schema = RECORDS[name][1]
    schema = schema if "$ref" in schema else {**schema, "$id": f"{name}.schema.json"}
    format_checker = jsonschema.FormatChecker(["date"])
    return bool(VALIDATOR(schema, registry=REGISTRY, format_checker=format_checker).is_valid(value))


def record_of(value: Any) -> Any:
    """Return what the YAML reader would make of a value: mappings are Records."""
    if isinstance(value, dict):
        return Record("f", 1, {name: record_of(part) for name, part in value.items()})
    return [record_of(item) for item in value] if isinstance(value, list) else value


def by_reader(name: str, value: dict[str, Any]) -> list[Problem]:
    """Return the problems that the reader's checks find in a record."""
    problems: list[Problem] = []
    checks: Fields = RECORDS[name][0]
    checks.read(record_of(value), problems)
    return problems


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_the_schemas_are_schemas(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(DOCUMENTS[name])


@pytest.mark.parametrize(
    "path", sorted(INVENTORIES.glob("*/directory/*.yml")), ids=lambda path: "/".join(path.parts[-3:])
)
def test_the_provinces_files_follow_the_schemas(path: Path) -> None:
    value = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    if path.stem == "policy":
        value = json.loads(json.dumps(_typed(value)))
        assert by_schema("policy", value) and not by_reader("policy", value)
        return
    for record in value[f"mail_{path.stem}"]:
        assert by_schema(path.stem, record) and not by_reader(path.stem, record)


def _typed(value: Any) -> Any:
    """Give numbers, booleans and null their types; dates stay text, as in YAML 1.2."""
    if isinstance(value, dict):
        return {name: _typed(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_typed(part) for part in value]
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return None if value == "" else value


GOOD_POLICY: dict[str, Any] = {
    "domain": "daklak.gov.vn",
    "address": {"reserved": {"postmaster": "u1", "abuse": "u1"}},
    "quota": {"unit": "1G", "person": "1G"},
}
BASE: dict[str, dict[str, Any]] = {
    "policy": GOOD_POLICY,
    "units": {"id": "u1", "name": "Sở"},
    "people": {"id": "p1", "ho": "Lê", "ten": "An"},
    "applications": {"id": "a1", "name": "Một cửa", "unit": "u1", "addresses": ["a1"], "hosts": ["192.0.2.1"]},
}
CORPUS: list[tuple[str, dict[str, Any], bool]] = [
    ("people", {}, True),
    ("people", {"id": None}, False),
    ("people", {"id": "a\n"}, False),
    ("people", {"id": " a"}, False),
    ("people", {"id": "a" * 65}, False),
    ("people", {"id": "CB.1_2-3"}, True),
    ("people", {"id": 1}, False),
    ("people", {"dem": None}, True),
    ("people", {"dem": ""}, False),
    ("people", {"dem": "\u200b "}, False),
    ("people", {"dem": "a\x00"}, False),
    ("people", {"dem": " a \n b "}, True),
    ("people", {"dem": ["a"]}, False),
    ("people", {"title": "a" * 255}, True),
    ("people", {"title": "a" * 256}, False),
    ("people", {"state": "left"}, True),
    ("people", {"state": "legacy"}, False),
    ("people", {"aliases": ["a", "a.b-c_d@daklak.gov.vn"]}, True),
    ("people", {"aliases": []}, True),
    ("people", {"aliases": ["A"]}, False),
    ("people", {"aliases": [None]}, False),
    ("people", {"aliases": "a"}, False),
    ("people", {"aliases": {"a": 1}}, False),
    ("people", {"quota": "0G"}, False),
    ("people", {"quota": "10G"}, True),
    ("people", {"quota": 10}, False),
    ("people", {"legal_act_ref": "1/QĐ"}, True),
    ("people", {"code": "x"}, False),
    ("units", {"code": "svhttdl"}, True),
    ("units", {"code": "sở"}, False),
    ("units", {"delegates": [{"person": "p1", "role": "Văn thư", "delegation_ref": "1/GUQ"}]}, True),
    ("units", {"delegates": [{"person": "p1", "role": None}]}, True),
    ("units", {"delegates": [{"role": "Văn thư"}]}, False),
    ("units", {"delegates": [{"person": "p1", "rôle": "x"}]}, False),
    ("units", {"delegates": ["p1"]}, False),
    ("units", {"state": "legacy", "successor": "u2"}, True),
    ("units", {"internal": True}, True),
    ("units", {"internal": "yes"}, False),
    ("people", {"certificate": "certificates/an.pem"}, True),
    ("people", {"certificate": ["an.pem", "certificates/an-2.pem"]}, True),
    ("people", {"certificate": "../an.pem"}, False),
    ("people", {"certificate": "/etc/an.pem"}, False),
    ("people", {"certificate": 1}, False),
    ("applications", {}, True),
    ("applications", {"id": "Qlvb"}, False),
    ("applications", {"addresses": []}, False),
    ("applications", {"addresses": None}, False),
    ("applications", {"hosts": []}, False),
    ("applications", {"hosts": ["10.0.0.0/8", "2001:db8::/32"]}, True),
    ("applications", {"hosts": ["mail.gov.vn"]}, False),
    ("applications", {"hosts": "192.0.2.1"}, False),
    ("applications", {"state": "legacy"}, False),
    ("applications", {"quota": "1G"}, False),
    ("policy", {"required_refs": {"connect": ["request_ref"]}}, True),
    ("policy", {"removal_limit": 1}, True),
    ("policy", {"removal_limit": 1.01}, False),
    ("policy", {"removal_limit": True}, False),
    ("policy", {"rename": {"alias_days": 3.0}}, True),
    ("policy", {"rename": {"alias_days": 3.5}}, False),
    ("policy", {"rename": {"alias_days": None}}, True),
    ("policy", {"rename": None}, True),
    ("policy", {"quota": None}, False),
    ("policy", {"quota": {"unit": "1G"}}, False),
    ("policy", {"notify": {"owner": ["any", {"thing": 1}]}}, True),
    ("policy", {"retention": []}, False),
    ("policy", {"retention": {"logs_days": 180, "junk_days": 0, "backups": {"daily_days": 14}}}, True),
    ("policy", {"retention": {"logs_days": 179}}, False),
    ("policy", {"retention": {"journal_days": 5}}, False),
    ("policy", {"retention": {"backups": {"all_days": 0}}}, False),
    ("policy", {"retention": {"backups": {"yearly_days": 400}}}, False),
    ("policy", {"leaver": {"retention_days": 180}}, False),
    ("policy", {"address": {"reserved": {"postmaster": "u1", "abuse": None}}}, False),
    ("policy", {"address": {"reserved": {"postmaster": "u1", "abuse": "u1", "Root": None}}}, False),
    ("policy", {"address": {"reserved": {"postmaster": "u1", "abuse": "u1", "root": None}}}, True),
    ("policy", {"alias_domains": [{"domain": "a.vn", "accept_until": "2027-02-29"}]}, False),
    ("policy", {"alias_domains": [{"domain": "a.vn", "accept_until": "2028-02-29", "same_local_part": True}]}, True),
    ("policy", {"alias_domains": [{"domain": "a.vn", "map": {"ubnd": "u1"}}]}, True),
    ("policy", {"alias_domains": [{"domain": "a.vn", "map": {"ubnd": None}}]}, False),
    ("policy", {"required_refs": {"hand-over": ["decision_ref"]}}, True),
    ("policy", {"required_refs": {"handover": ["decision_ref"]}}, False),
    ("policy", {"required_refs": {"join": ["ref"]}}, False),
]


@pytest.mark.parametrize(("name", "fields", "good"), CORPUS)
def test_schema_and_reader_agree_on_the_corpus(name: str, fields: dict[str, Any], good: bool) -> None:
    value = {**BASE[name], **fields}
    assert by_schema(name, value) is good
    assert (not by_reader(name, value)) is good


# Text of assigned characters; what only the reader can tell (old encodings) is tested elsewhere.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Co", "Cn")), max_size=12).filter(
    lambda text: legacy_encoding(text) is None
)
WORDS = st.sampled_from(
    ["active", "left", "legacy", "u1", "p-1", "10G", "500M", "{name}", "{hovaten}.{unit}", "a.gov.vn", "unit", "x@a.vn",
     "decision_ref", "join", "2027-06-30", "2027-13-01", "văn thư"]
)  # fmt: skip
SCALARS = st.one_of(WORDS, TEXT, st.none(), st.booleans(), st.integers(-5, 200), st.floats(-1, 3, allow_nan=False))
KEYS = st.sampled_from(
    sorted({name for document in DOCUMENTS.values() for name in re.findall(r'"([a-z_-]+)": \{', json.dumps(document))})
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(KEYS, WORDS), inner, max_size=3)),
    max_leaves=6,
)


def known_fields(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Records whose keys are mostly known, so that the values matter."""
    known = st.sampled_from(sorted(RECORDS[name][0].known))
    return st.dictionaries(st.one_of(known, KEYS), VALUES, max_size=4)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(RECORDS)).flatmap(lambda name: st.tuples(st.just(name), known_fields(name))))
def test_schema_and_reader_agree_on_any_record(case: tuple[str, dict[str, Any]]) -> None:
    name, fields = case
    value = {**BASE[name], **fields}
    problems = by_reader(name, value)
    assert by_schema(name, value) is not bool(problems), problems
    assert all("\n" not in str(problem) for problem in problems)


@settings(max_examples=200)
@given(st.one_of(st.text(max_size=5), st.text("ab1._-+@", max_size=8)))
def test_the_schema_takes_the_local_parts_that_a_pattern_may_make(text: str) -> None:
    try:
        check_local_part(text)
        good = True
    except NameRefused:
        good = False
    assert (not by_reader("people", {**BASE["people"], "local_part": text})) is good


@pytest.mark.parametrize(
    "pattern", ["", "abc", "{ho", "{Ho}", "{{ ho }}", "{ho}@x", "{ho}+{ten}", "{}", "{name}", "{ho}\n"]
)
def test_patterns_that_cannot_be_filled(pattern: str) -> None:
    address = {**GOOD_POLICY["address"], "person": pattern}
    assert by_reader("policy", {**GOOD_POLICY, "address": address})


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("person", "{ho}{dem}{ten}-{unit}"), ("person", "{hovaten}.{unit}"), ("person_alias", "{ten}_{ho}2"),
     ("main_unit", "contact-{code}"), ("sub_unit", "{code}-{parent}"), ("unit", "{name}")],
)  # fmt: skip
def test_patterns_of_the_provinces(name: str, pattern: str) -> None:
    address = {**GOOD_POLICY["address"], name: pattern}
    assert by_reader("policy", {**GOOD_POLICY, "address": address}) == []
