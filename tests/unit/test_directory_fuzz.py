"""Malformed directory files give sentences with file and line, and never a traceback."""

from __future__ import annotations

import io
import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from directory_samples import PEOPLE, POLICY, TODAY, UNITS, problems_of, read_folder, write
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from hopthu.files import Problem
from hopthu.state import read

SENTENCE = re.compile(r"d/(policy|units|people)[^:]*:[1-9]\d*: .{10,}")
CSV = (
    "id,ho,dem,ten,unit,title,class,state,local_part,aliases,quota,decision_ref\n"
    "p1,Nguyễn,Thị Tố,Uyên,u2,Trưởng phòng,civil_servant,active,,uyen;to.uyen,3G,15/QĐ\n"
    'p2,H\'Hen,,Niê,u2,"a, ""b""",,left,hen,,,\n'
)
JSON = json.dumps(
    {"mail_people": [{"id": "p1", "ho": "Nguyễn", "dem": None, "ten": "Uyên", "unit": "u2", "aliases": ["uyen"]},
                     {"id": "p2", "ho": "Lê", "ten": "An", "unit": "u1", "quota": "3G", "state": "active"}]},
    ensure_ascii=False, indent=1,
)  # fmt: skip
FULL_POLICY = POLICY + (
    "required_refs: {join: [decision_ref, order_ref]}\neligibility: {people: [civil_servant]}\n"
    "delegates: {max: 1, roles: [Văn thư], document_required: true}\nleaver: {pointer: unit}\n"
    "retention: {logs_days: 180, leaver_days: 9, backups: {monthly_days: 40}}\n"
    "rename: {alias_days: 3}\nremoval_limit: 0.1\nsuspend_unit_people: true\nnotify: {owner: x}\n"
    "passwords: {min_length: 12, administrators: {people: [p1], classes: 4}}\n"
)
FILES = {"policy.yml": FULL_POLICY, "units.yml": UNITS, "people.yml": PEOPLE, "people.csv": CSV, "people.json": JSON}
PIECES = [
    *("mail_people", ":", " ", "\n", "  - ", "- ", "id", "p1", "[", "]", "{", "}", ",", '"', "'", "&a", "*a", "!!int"),
    *("!!binary x", "? ", "|", ">", "%", "---", "...", "\t", "\x00", "\ufeff", "é", "e\u0301", "0x1F", "1_0", "~"),
    *("null", "<<: ", "ho", "ten", "unit", "u1", "aliases", "delegates", "\\ud800", "1e999", ".inf", ".nan"),
    *("2020-01-01", "no", ";", "#", "9" * 5000, "-0", "0o7", "12:30:45", "\u2028", "\x85", "\u202e", "=", "\r"),
]  # fmt: skip


def check(files: dict[str, str | bytes]) -> list[Problem]:
    """Read a folder of `files`; every problem must be a sentence that names file and line."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), files)
        out = io.BytesIO()
        problems = read(Path(folder), "d", out, TODAY).problems
    for problem in problems:
        assert SENTENCE.fullmatch(str(problem)), problem
        assert str(problem).isprintable()
        assert "Error" not in str(problem)
    if not problems:
        assert [json.loads(line) for line in out.getvalue().splitlines()]
    return problems


def with_file(name: str, content: str | bytes) -> dict[str, str | bytes]:
    """Return good files, with one of them replaced."""
    files: dict[str, str | bytes] = {"policy.yml": POLICY, "units.yml": UNITS, name: content}
    if not name.startswith("people"):
        files["people.yml"] = PEOPLE
    return files


@pytest.mark.parametrize("name", FILES)
def test_the_originals_are_good(name: str) -> None:
    assert check(with_file(name, FILES[name])) == [] or name in ("people.csv", "people.json")


@pytest.mark.parametrize("name", FILES)
def test_cut_and_pasted_files(name: str) -> None:
    """300 files, each with up to four pieces cut out, doubled, or pasted in, always the same ones."""
    choose = random.Random(f"hopthu {name}")
    original = FILES[name].encode()
    found = 0
    for _round in range(300):
        data = original
        for _change in range(choose.randint(1, 4)):
            start = choose.randrange(len(data) + 1)
            end = min(len(data), start + choose.choice((0, 0, 1, 3, 20)))
            new: bytes = choose.choice((
                choose.choice(PIECES).encode(), choose.randbytes(choose.randint(1, 4)), data[start:end] * 2, b""
            ))  # fmt: skip
            data = data[:start] + new + data[end:]
        found += bool(check(with_file(name, data)))
    assert found > 100


JUNK = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=8),
        st.sampled_from(["p1", "u1", "active", "10G", "{name}", "left", "daklak.gov.vn"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["id", "ho", "ten", "unit", "aliases", "name", "delegates", "person", "head", "domain",
                             "address", "reserved", "alias_domains", "map", "quota", "passwords", "state", ""]),
            inner, max_size=4,
        ),
    ),
    max_leaves=10,
)  # fmt: skip


@seed(20261121)
@settings(max_examples=300, deadline=None, database=None)
@given(JUNK, st.sampled_from([*FILES]), st.booleans())
def test_wrong_types_anywhere(junk: Any, name: str, rooted: bool) -> None:
    roots = {"units.yml": "mail_units", "policy.yml": "address"}
    content = {roots.get(name, "mail_people"): junk} if rooted else junk
    check(with_file(name, json.dumps(content)))


@seed(20261121)
@settings(max_examples=200, deadline=None, database=None)
@given(
    st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)),
    st.sampled_from([*FILES]),
)
def test_no_file_at_all(content: str | bytes, name: str) -> None:
    check(with_file(name, content))


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", '{"mail_people": [[', '{"mail_people": ', '{"a":['])
@pytest.mark.parametrize("name", ["people.yml", "people.json", "units.yml", "policy.yml"])
def test_deep_nesting_is_one_sentence(tmp_path: Path, name: str, opening: str) -> None:
    write(tmp_path, with_file(name, opening * 20000))
    problems = [str(problem) for problem in read_folder(tmp_path)[1].problems if name in problem.file]
    assert len(problems) == 1
    assert SENTENCE.fullmatch(problems[0])


@pytest.mark.parametrize("number", ["9" * 5000, "1e400", "-1", "0.5", "1e-400", "NaN", "Infinity"])
def test_absurd_numbers(number: str) -> None:
    assert check(with_file("people.json", f'{{"mail_people": [{{"id": {number}}}]}}'))
    assert check(with_file("policy.yml", POLICY + f"rename: {{alias_days: {number}9}}\n"))


def test_absurd_sizes(tmp_path: Path) -> None:
    long = "a" * 200000
    assert check(with_file("people.csv", f"id,ho,ten,unit\n{long},Lê,An,u1\n"))
    assert check(with_file("people.csv", f"{long}\n"))
    assert check(with_file("people.json", f'{{"mail_people": [{{"{long}": "{long}"}}]}}'))
    found = problems_of(tmp_path, people=PEOPLE.replace("ho: Nguyễn", f"ho: {long}"))
    assert found and all(len(problem) < 300 for problem in found)


def test_folders_and_links_in_place_of_files(tmp_path: Path) -> None:
    write(tmp_path, {"policy.yml": POLICY, "units.yml": UNITS})
    for name in ("people.yml", "people.csv", "people.json"):
        path = tmp_path / name
        path.mkdir()
        assert [str(problem) for problem in read_folder(tmp_path)[1].problems if name in problem.file] == [
            f"d/{name}:1: cannot be read (is a directory): make the file"
        ]
        path.rmdir()
    (tmp_path / "people.yml").symlink_to("people.yml")
    assert read_folder(tmp_path)[1].problems
