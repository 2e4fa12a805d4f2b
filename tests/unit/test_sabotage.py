"""tests/sabotage.yml against the acceptance tests, and the way tests/soak.py reads it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from soak import ROWS, SabotageError, read_rows

ACCEPTANCE = Path(__file__).parents[1] / "acceptance"
GOOD = {
    "test": "test_a.py::test_b",
    "setting": "s",
    "group": "mx",
    "file": "/etc/a",
    "replace": {"pattern": "a", "with": "b"},
    "reload": "postfix",
}


def acceptance_tests() -> set[str]:
    """All test functions of tests/acceptance, as file::function."""
    return {
        f"{path.name}::{node.name}"
        for path in ACCEPTANCE.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_acceptance_test_is_sabotaged_or_says_why_not() -> None:
    rows, unguarded = read_rows(ROWS)
    named = {row.test for row in rows}
    assert acceptance_tests() - named - unguarded.keys() == set(), "tests that neither have a row nor a reason"
    assert (named | unguarded.keys()) - acceptance_tests() == set(), "rows of tests that do not exist"
    assert named & unguarded.keys() == set(), "tests that have both"
    assert all(len(reason.split()) > 3 for reason in unguarded.values())


def test_patterns_and_replacements_are_valid() -> None:
    rows, _ = read_rows(ROWS)
    for row in rows:
        if row.replace:
            groups = re.compile(row.replace["pattern"]).groups
            used = [int(number) for number in re.findall(r"\\(\d)", row.replace["with"])]
            assert max(used, default=0) <= groups, row.setting
        else:
            assert row.ldif != row.back, row.setting


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": "red"}, "unknown field colour"),
        ({"group": None}, "group is missing"),
        ({"reload": None}, "needs either file"),
        ({"replace": {"pattern": "a"}}, "needs either file"),
        ({"ldif": "x", "back": "y"}, "needs either file"),
        ({"file": None, "replace": None, "ldif": "x"}, "needs either file"),
    ],
)
def test_a_row_that_is_not_whole_is_told(tmp_path: Path, change: dict[str, object], words: str) -> None:
    row = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    path = tmp_path / "sabotage.yml"
    path.write_text(yaml.safe_dump({"sabotage": [GOOD, row]}), encoding="utf-8")
    with pytest.raises(SabotageError, match=f"sabotage.yml, row 2: {words}"):
        read_rows(path)
