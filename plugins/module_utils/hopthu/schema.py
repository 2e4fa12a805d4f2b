"""The JSON Schemas of the directory files, compiled to checks of records.

The schemas in inventories/schema/ are the only place where types, patterns and enumerations of fields
stand; editors read them too. Beside JSON Schema's own words (draft 2020-12) they carry `x-sentence` (what is said
after a value that does not fit), `x-missing` (how to fill a missing field), `x-moved` (old names with the new ones)
and `x-text` (text is cleaned before use; a "name" must also not be in an old encoding).
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Callable
from datetime import date
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from .files import Problem, Record, short
from .names import clean, legacy_encoding

FOLDER = Path(__file__).resolve().parents[3] / "inventories" / "schema"

Parse = Callable[[Any], Any]
"""Takes a value as read, returns it cleaned; raises ValueError with one sentence."""


class Fields:
    """What a mapping may hold: a check per known key, and one for all other keys where they are allowed."""

    def __init__(self, schema: dict[str, Any], file: str) -> None:
        self.known: dict[str, Check] = {}
        self.texts: dict[str, Parse] = {}
        self.missing: dict[str, str] = {}
        self.sentence: str = schema.get("x-sentence", "must be a mapping of the form key: value")
        self.defaults: dict[str, Any] = {}
        for name, part in schema.get("properties", {}).items():
            whole, place = _resolve(part, file)
            check = self.known[name] = _compile(whole, place)
            if isinstance(check, Text):
                self.texts[name] = check.parse
            if name in schema.get("required", ()):
                self.missing[name] = whole.get("x-missing", "fill it in")
            if "default" in whole:
                self.defaults[name] = whole["default"]
            elif isinstance(check, Fields) and check.defaults:
                self.defaults[name] = check.defaults
        others = schema.get("additionalProperties", True)
        self.open = others is not False
        self.moved: dict[str, str] = schema.get("x-moved", {})
        self.others = _compile(*_resolve(others, file)) if isinstance(others, dict) else _anything
        keys = schema.get("propertyNames")
        self.keys = _leaf(_resolve(keys, file)[0]) if keys else _anything

    @property
    def lists(self) -> dict[str, bool]:
        """Map each known key to whether its value is a list."""
        return {name: isinstance(check, Items) for name, check in self.known.items()}

    def read(self, record: Record, problems: list[Problem]) -> dict[str, Any]:
        """Return the good fields of one record, cleaned, and the defaults; a field left blank is not there."""
        values: dict[str, Any] = dict(self.defaults)
        texts = self.texts
        for name, raw in record.fields.items():
            try:
                parse = texts.get(name)
                if parse is not None and type(raw) is str:
                    values[name] = parse(raw)
                    continue
                if raw is None and name in self.known:
                    continue
                check = self.known.get(name) or self._other(name)
                if isinstance(check, Fields | Items):
                    value = _nested(check, raw, record, name, problems)
                    if value is not None:
                        values[name] = value
                else:
                    values[name] = check(raw)
            except ValueError as error:
                problems.append(record.problem(name, str(error)))
        for name, way_out in self.missing.items():
            if record.fields.get(name) is None:
                problems.append(record.problem(name, f"is missing: {way_out}"))
        return values

    def _other(self, name: str) -> Check:
        """Return the check for a key that has none of its own; raises ValueError when it may not stand here."""
        if name in self.moved:
            raise ValueError(f"is {self.moved[name]} now: move it there")
        if not self.open:
            near = _near(name, tuple(self.known))
            hint = f"did you mean {near}?" if near else f"known are {', '.join(self.known)}"
            raise ValueError(f"is not a known field: {hint}")
        self.keys(name)
        return self.others


class Items:
    """What a list may hold, how many at least, and whether a single one may stand without brackets."""

    def __init__(self, schema: dict[str, Any], file: str) -> None:
        self.item = _compile(*_resolve(schema.get("items", {}), file))
        self.least: int = schema.get("minItems", 0)
        self.single = "string" in schema["type"]
        self.missing: str = schema.get("x-missing", "fill it in")


Check = Fields | Items | Parse


def _nested(check: Fields | Items, raw: Any, record: Record, name: str, problems: list[Problem]) -> Any:
    """Return a checked mapping or list, or None after noting that the value is neither."""
    if isinstance(check, Fields):
        if isinstance(raw, Record):
            return check.read(raw, problems)
        problems.append(record.problem(name, f'"{short(raw)}" {check.sentence}'))
        return None
    if check.single and isinstance(raw, str):
        raw = [raw]
    if not isinstance(raw, list):
        problems.append(record.problem(name, f'"{short(raw)}" must be a list'))
        return None
    if len(raw) < check.least:
        problems.append(record.problem(name, f"is empty: {check.missing}"))
    values = []
    for item in raw:
        if isinstance(check.item, Fields | Items):
            value = _nested(check.item, item, record, name, problems)
            if value is not None:
                values.append(value)
            continue
        try:
            values.append(check.item(item))
        except ValueError as error:
            problems.append(record.problem(name, str(error)))
    return values


@lru_cache(maxsize=1000)
def _near(name: str, known: tuple[str, ...]) -> str:
    return next(iter(difflib.get_close_matches(name[:100], known, 1)), "")


def _anything(value: Any) -> Any:
    return value


@cache
def _document(file: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FOLDER / file).read_text(encoding="utf-8"))
    return document


def _resolve(schema: dict[str, Any], file: str) -> tuple[dict[str, Any], str]:
    """Return a schema with what it refers to, and the file in which its own references start."""
    if "$ref" not in schema:
        return schema, file
    place, _sign, pointer = schema["$ref"].partition("#")
    place = place or file
    target: Any = _document(place)
    for part in pointer.strip("/").split("/"):
        target = target[part]
    whole, place = _resolve(target, place)
    return {**whole, **{key: value for key, value in schema.items() if key != "$ref"}}, place


def _compile(schema: dict[str, Any], file: str) -> Check:
    types = schema.get("type", ())
    if "object" in types and (schema.keys() & {"properties", "additionalProperties"}):
        return Fields(schema, file)
    return Items(schema, file) if "array" in types else _leaf(schema)


def _leaf(schema: dict[str, Any]) -> Parse:
    """Return the check of a value that is neither a mapping with known keys nor a list."""
    if "enum" in schema:
        return _one_of(schema["enum"])
    types = schema["type"]
    kind = next(name for name in ([types] if isinstance(types, str) else types) if name != "null")
    return _KINDS[kind](schema)


def _one_of(values: list[str | None]) -> Parse:
    shown = ", ".join(value for value in values if value is not None)

    def parse(value: Any) -> Any:
        if not isinstance(value, str | None) or value not in values:
            raise ValueError(f'"{short(value)}" must be one of {shown}')
        return value

    return parse


class Text:
    """The check of a text by length and pattern. `parse` takes what is a str already."""

    def __init__(self, schema: dict[str, Any]) -> None:
        # ECMA 262's $ is the very end of the text, Python's also stands before a last line feed.
        self.fits = re.compile(schema["pattern"].removesuffix("$") + r"\Z").match
        self.longest: int = schema.get("maxLength", 10**6)
        self.sentence: str = schema["x-sentence"]
        self.kind: str = schema.get("x-text", "")
        self.is_day = schema.get("format") == "date"
        self.null = "null" in schema["type"]
        self.parse = lru_cache(maxsize=8192)(self._parse)

    def __call__(self, value: Any) -> str | None:
        """Return the text, cleaned; raises ValueError for anything else."""
        if type(value) is str:
            return self.parse(value)
        if value is None:
            if self.null:
                return None
            raise ValueError("is missing: fill it in")
        if isinstance(value, int | float) and not self.kind and not self.fits(str(value)):
            raise ValueError(f'"{short(value)}" {self.sentence}')
        raise ValueError(f"must be text, not {short(value)}: put it in quotes")

    def _parse(self, value: str) -> str:
        fits = self.fits(value) is not None
        if self.kind:
            return self._cleaned(value, fits)
        if fits and len(value) <= self.longest and (not self.is_day or _is_day(value)):
            return value
        raise ValueError(f'"{short(value)}" {self.sentence}' if value.strip() else _EMPTY)

    def _cleaned(self, value: str, fits: bool) -> str:
        """Return text as it is stored; `fits` tells whether the schema's pattern takes it."""
        result = clean(value)
        if not result:
            raise ValueError(_EMPTY)
        if len(value) > self.longest:
            raise ValueError(f'"{short(result)}" is longer than {self.longest} characters: shorten it')
        if not fits or not (result.isprintable() or all(unicodedata.category(char) not in _CONTROL for char in result)):
            raise ValueError(f'"{short(result)}" {self.sentence}')
        if self.kind == "name" and (legacy := legacy_encoding(result)):
            raise ValueError(f'"{short(result)}" is in {legacy}: convert it to Unicode (QĐ 72/2002)')
        return result


_EMPTY = "is empty: fill it in or leave it out"
_CONTROL = frozenset({"Cc", "Cs", "Co", "Cn"})


def _is_day(value: str) -> bool:
    try:
        date.fromisoformat(value)
    except ValueError:
        return False
    return True


def _number(schema: dict[str, Any]) -> Parse:
    low, high, sentence = schema["minimum"], schema["maximum"], schema["x-sentence"]
    whole = "integer" in schema["type"]

    def check(value: Any) -> int | float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not number or (whole and value != int(value)):
            raise ValueError(f'"{short(value)}" {sentence}')
        return int(value) if whole else float(value)

    return check


def _boolean(_schema: dict[str, Any]) -> Parse:
    def check(value: Any) -> bool:
        if isinstance(value, bool):
            return value
        if value not in ("true", "false"):  # a cell of a CSV file holds text
            raise ValueError(f'"{short(value)}" must be true or false')
        return bool(value == "true")

    return check


def _object(schema: dict[str, Any]) -> Parse:
    """Return the check of a mapping whose keys do not matter yet."""

    def check(value: Any) -> Any:
        if not isinstance(value, Record):
            raise ValueError(f'"{short(value)}" must be a mapping of the form key: value')
        return value

    return check


_KINDS: dict[str, Callable[[dict[str, Any]], Parse]] = {
    "string": Text,
    "integer": _number,
    "number": _number,
    "boolean": _boolean,
    "object": _object,
}


REFS: tuple[str, ...] = tuple(_document("common.schema.json")["$defs"]["ref"]["enum"])
"""The fields that name the grounds of a change."""


@cache
def policy_fields() -> Fields:
    """Return the checks of policy.yml."""
    return Fields(_document("policy.schema.json"), "policy.schema.json")


@cache
def unit_fields() -> Fields:
    """Return the checks of one unit of units.yml."""
    return _records("units")


@cache
def person_fields() -> Fields:
    """Return the checks of one person, in whatever form the people come."""
    return _records("people")


@cache
def application_fields() -> Fields:
    """Return the checks of one application of applications.yml."""
    return _records("applications")


def _records(name: str) -> Fields:
    file = f"{name}.schema.json"
    return Fields(_document(file)["properties"][f"mail_{name}"]["items"], file)
