"""Directory files (YAML, CSV, JSON) to records that know their file and line.

Nothing here knows what a field means, and nothing here raises for bad input: every fault becomes a
`Problem`, so that one run reports all of them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DEPTH = 8  # the deepest legal file has 5 levels


@dataclass(frozen=True, order=True)
class Problem:
    """One fault of the input: where it is and one sentence that names the way out."""

    file: str
    line: int
    field: str
    text: str

    def __str__(self) -> str:
        field = f"{short(self.field)}: " if self.field else ""
        text = f"{self.file}:{self.line}: {field}{self.text}"
        return "".join(char if char.isprintable() else "?" for char in text)


@dataclass(slots=True)
class Record:
    """One mapping of a file: its fields as read, its first line and the lines of its fields."""

    file: str
    line: int
    fields: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)

    def problem(self, name: str, text: str) -> Problem:
        """Return a Problem at the field `name`, or at the record when the field is not there."""
        return Problem(self.file, self.lines.get(name, self.line), name, text)


class Fault(Exception):
    """Stops the reading of one file; carries its Problem."""

    def __init__(self, file: str, line: int, text: str, name: str = "") -> None:
        super().__init__(text)
        self.problem = Problem(file, line, name, text)


def read_text(path: Path, shown: str) -> str:
    """Return the text of `path`, which must be UTF-8 (a byte order mark is allowed).

    Raises Fault, naming the file as `shown`, when it cannot be read or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or "unreadable").lower()
        raise Fault(shown, 1, f"cannot be read ({reason}): make the file") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Fault(shown, line, "is not UTF-8: save it as Unicode UTF-8 (QĐ 72/2002)") from None


def read_mapping(path: Path, shown: str) -> Record:
    """Read a YAML file whose root is a mapping.

    Nested mappings stay Records, scalars become str, int, float, bool or None.

    Raises Fault for unreadable or malformed YAML, double keys, anchors, tags, and another root.
    """
    return next(_read_yaml(path, shown, lambda document: document.whole()))


def _read_yaml(path: Path, shown: str, take: Callable[[_Yaml], Iterator[Record]]) -> Iterator[Record]:
    """Give what `take` takes from a YAML file; a Fault names what the parser could not read."""
    text = read_text(path, shown)
    try:
        yield from take(_Yaml(text, shown))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = error.problem or "malformed"
        raise Fault(shown, line, f"is not valid YAML ({what}): correct the line") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Fault(shown, line, "holds a control character: remove it") from None


class _Yaml:
    """One YAML document, built from the parser's events.

    That keeps the lines, bounds the nesting (the C loader's own builder crashes on thousands of
    levels), and takes a quarter of that builder's time.
    """

    def __init__(self, text: str, shown: str) -> None:
        self.loader = _Loader(text)
        self.shown = shown

    def whole(self) -> Iterator[Record]:
        """Give the root mapping, once the document has proved good to its end."""
        root = self.mapping(self.start(), 0)
        self.end()
        yield root

    def records(self, root: str) -> Iterator[Record]:
        """Give one by one the mappings in the list below the only key `root`."""
        found = None
        self.start()
        while not isinstance(key := self.loader.get_event(), yaml.MappingEndEvent):
            line = key.start_mark.line + 1
            name = key.value if isinstance(key, yaml.ScalarEvent) else ""
            if name != root or found:
                text = "stands twice in one mapping: keep one" if found else f"is unknown: the only root is {root}"
                raise Fault(self.shown, line, text, name)
            found = line
            event = self.loader.get_event()
            if not isinstance(event, yaml.SequenceStartEvent) or event.anchor is not None or event.tag is not None:
                self.value(event, 0)
                raise Fault(self.shown, line, f"must be a list; write {root}: [] when it is empty", root)
            while not isinstance(event := self.loader.get_event(), yaml.SequenceEndEvent):
                item = self.value(event, 1)
                if not isinstance(item, Record):
                    line = event.start_mark.line + 1
                    raise Fault(self.shown, line, f'"{short(item)}" must be a mapping such as "- id: x"', root)
                yield item
        if not found:
            raise Fault(self.shown, 1, f"must be a list; write {root}: [] when it is empty", root)
        self.end()

    def start(self) -> Any:
        """Enter the document; return the event that begins its root mapping."""
        self.loader.get_event()
        start = self.loader.get_event()
        event = self.loader.get_event() if isinstance(start, yaml.DocumentStartEvent) else start
        if not isinstance(event, yaml.MappingStartEvent):
            raise Fault(self.shown, 1, "must be a mapping of the form key: value")
        return event

    def end(self) -> None:
        """Leave the document, which must be the only one."""
        self.loader.get_event()
        after = self.loader.get_event()
        if not isinstance(after, yaml.StreamEndEvent):
            line = after.start_mark.line + 1
            raise Fault(self.shown, line, "starts a second document: keep one")

    def value(self, event: Any, depth: int) -> Any:
        """Return what begins with `event`."""
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            text = "anchors and aliases (& and *) are not allowed: write the value"
            raise Fault(self.shown, line, text)
        if event.tag is not None:
            raise Fault(self.shown, line, f"the tag {event.tag} is not allowed: remove it")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, line)
        if depth == _DEPTH:
            raise Fault(self.shown, line, "is nested too deeply: see the file format")
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(event, depth + 1)
        items = []
        while not isinstance(item := self.loader.get_event(), yaml.SequenceEndEvent):
            items.append(self.value(item, depth + 1))
        return items

    def mapping(self, event: Any, depth: int) -> Record:
        """Return the mapping that begins with `event`."""
        record = Record(self.shown, event.start_mark.line + 1, {})
        while not isinstance(key := self.loader.get_event(), yaml.MappingEndEvent):
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarEvent):
                raise Fault(self.shown, line, "a key must be a plain word")
            if key.value in record.fields:
                raise Fault(self.shown, line, "stands twice in one mapping: keep one", key.value)
            record.fields[key.value] = self.value(self.loader.get_event(), depth)
            record.lines[key.value] = line
        return record

    def scalar(self, event: Any, line: int) -> Any:
        """Return the value that YAML 1.1 gives a scalar; dates stay text."""
        text: str = event.value
        if not event.implicit[0]:
            return text
        kind = self.loader.resolve(yaml.ScalarNode, text, event.implicit)
        kind = kind.removeprefix("tag:yaml.org,2002:")
        if kind in ("str", "timestamp"):
            return text
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() in ("yes", "true", "on")
        try:
            return {"int": int, "float": float}[kind](text)
        except (KeyError, ValueError):
            raise Fault(self.shown, line, f'put "{short(text)}" in quotes') from None


def read_list(path: Path, shown: str, root: str, columns: Mapping[str, bool]) -> Iterator[Record]:
    """Read, one by one, the records below the key `root` of a .yml or .json file, or the rows of a .csv file.

    `columns` maps the names a CSV file may have to whether the cell is a list, separated by ";".

    Raises Fault where the file cannot be used any further.
    """
    if path.suffix == ".csv":
        return _read_csv(path, shown, columns)
    if path.suffix == ".json":
        return _read_json(read_text(path, shown), shown, root)
    return _read_yaml(path, shown, lambda document: document.records(root))


def _read_csv(path: Path, shown: str, columns: Mapping[str, bool]) -> Iterator[Record]:
    """Rows of a comma-separated file with a header; empty cells are absent fields."""
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if not header:
                raise Fault(shown, 1, "is empty: the first row must name the columns")
            if len(header) == 1 and ";" in header[0]:
                raise Fault(shown, 1, 'separates its columns by ";": save it as CSV with commas')
            double = {name for name in header if header.count(name) > 1}
            if double or not all(header):
                name = min(double) if double else ""
                raise Fault(shown, 1, "the header needs a name per column, each once", name)
            lines = {name: 1 for name in header if name not in columns}  # a wrong column is told once, not per row
            lists = [name for name in header if columns.get(name)]
            line = reader.line_num + 1
            for row in reader:
                if len(row) == len(header):
                    fields: dict[str, Any] = {
                        name: cell for name, raw in zip(header, row, strict=True) if raw and (cell := raw.strip())
                    }
                    for name in lists:
                        if name in fields:
                            fields[name] = [part.strip() for part in fields[name].split(";")]
                    yield Record(shown, line, fields, lines)
                elif row:
                    counts = f"{len(row)} cells, the header {len(header)}"
                    raise Fault(shown, line, f"the row has {counts}: quote cells that hold a comma")
                line = reader.line_num + 1
    except csv.Error as error:
        raise Fault(shown, line, f"is not valid CSV ({error}): correct the row") from None
    except (OSError, UnicodeDecodeError):
        read_text(path, shown)
        raise


def _read_json(text: str, shown: str, root: str) -> Iterator[Record]:
    """Records of {"root": [{…}, …]}, taken one by one so that each knows its line."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            names = [name for name, _value in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise Fault(shown, line, "stands twice in one mapping: keep one", twice)
        return result

    def constant(name: str) -> None:
        raise Fault(shown, line, f"{name} is not a JSON value: remove it")

    decoder = json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant)
    space = re.compile(r"[ \t\r\n]*")
    position, line, counted = 0, 1, 0
    lines: dict[str, int] = {}

    def expect(signs: str) -> str:
        nonlocal position
        found = space.match(text, position)
        assert found is not None  # it matches the empty text too
        position = found.end()
        sign = text[position : position + 1]
        if not sign or sign not in signs:
            at = text.count("\n", 0, position) + 1
            raise Fault(shown, at, f'is not JSON of the form {{"{root}": [{{…}}]}}: correct it')
        position += 1
        return sign

    try:
        expect("{")
        expect('"')
        key, position = decoder.raw_decode(text, position - 1)
        if key != root:
            raise Fault(shown, line, f"is unknown: the only root is {root}", key)
        expect(":")
        expect("[")
        sign = expect("{]")
        while sign == "{":
            position -= 1
            line += text.count("\n", counted, position)
            counted = position
            fields, position = decoder.raw_decode(text, position)
            yield Record(shown, line, fields, lines)
            sign = expect(",]")
            if sign == ",":
                sign = expect("{")
        expect("}")
        if text[position:].strip():
            at = text.count("\n", 0, position) + 1
            raise Fault(shown, at, f"has text after the end of {root}: remove it")
    except json.JSONDecodeError as error:
        raise Fault(shown, error.lineno, f"is not valid JSON ({error.msg}): correct it") from None
    except (RecursionError, ValueError):
        raise Fault(shown, line, "is not valid JSON: correct it") from None


def short(value: object) -> str:
    """Show a value of a file in a sentence: on one line, at most 40 characters."""
    if value is None:
        return "null"
    if isinstance(value, Record | dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else text[:39] + "…"
