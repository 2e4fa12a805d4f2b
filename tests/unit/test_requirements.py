"""The requirement list, the evidence that test runs leave, and the documents made from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import generate
import plugin_requirements

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[2]
LIST = ROOT / "tests" / "clauses.yml"


def entries() -> list[dict[str, str]]:
    """Return the entries of tests/clauses.yml."""
    return list(generate.read_mapping(LIST)["requirements"])


# --- tests/clauses.yml


def test_list_is_complete_and_without_doubles() -> None:
    ids = [entry["id"] for entry in entries()]
    assert len(ids) == len(set(ids)) == 157


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: str(entry.get("id")))
def test_entry_is_well_formed(entry: dict[str, str]) -> None:
    assert {"id", "kind", "clause", "control"} <= set(entry)
    assert set(entry) <= {"id", "kind", "clause", "control", "note"}
    assert entry["kind"] in {"technical", "organisational", "gateway"}
    prefix = "|".join(generate.REGULATIONS)
    assert re.fullmatch(rf"({prefix})-[A-Za-z0-9]+(\.[0-9x]+[a-g]?|-[0-9.x]+)?", entry["id"])
    for field, text in entry.items():
        assert isinstance(text, str) and text == " ".join(text.split()) and text, field


# --- joining the runs


def run(**outcomes: str) -> dict[str, Any]:
    """Return a run's results: test name → outcome, each test proving DL-9."""
    return {
        test: {"requirements": ["DL-9"], "outcome": outcome.replace("_", " ")} for test, outcome in outcomes.items()
    }


@pytest.mark.parametrize(
    ("kind", "runs", "tests", "proven"),
    [
        pytest.param("technical", [], {}, False, id="no run"),
        pytest.param("technical", [run(a="passed")], {"a": "passed"}, True, id="one test"),
        pytest.param(
            "technical",
            [run(b="passed"), run(a="passed")],
            {"a": "passed", "b": "passed"},
            True,
            id="two runs",
        ),
        pytest.param(
            "technical",
            [run(a="passed", b="failed")],
            {"a": "passed", "b": "failed"},
            False,
            id="one of two fails",
        ),
        pytest.param("technical", [run(a="skipped")], {"a": "skipped"}, False, id="skipped"),
        pytest.param("technical", [run(a="not_run")], {"a": "not run"}, False, id="not run"),
        pytest.param(
            "technical",
            [run(a="failed"), run(a="passed")],
            {"a": "failed"},
            False,
            id="same test, worst counts, first",
        ),
        pytest.param(
            "technical",
            [run(a="passed"), run(a="failed")],
            {"a": "failed"},
            False,
            id="same test, worst counts, last",
        ),
        pytest.param("gateway", [run(a="passed")], {"a": "passed"}, False, id="gateway"),
        pytest.param("organisational", [run(a="passed")], {"a": "passed"}, False, id="people"),
        pytest.param(
            "technical",
            [{"a": {"requirements": ["XX-1"], "outcome": "passed"}}],
            {},
            False,
            id="id that is gone",
        ),
    ],
)
def test_join(kind: str, runs: list[Any], tests: dict[str, str], proven: bool) -> None:
    assert plugin_requirements.join({"DL-9": kind}, runs) == {
        "DL-9": {
            "kind": kind,
            "tests": [{"id": test, "outcome": outcome} for test, outcome in tests.items()],
            "proven": proven,
        }
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "the file is missing"),
        ("requirements: [{id: DL-9}]", "must be a mapping 'requirements'"),
        ("- DL-9", "must be a mapping 'requirements'"),
        ("requirements: [", "must be a mapping 'requirements'"),
        (
            "requirements: [{id: A-1, kind: technical}, {id: A-1, kind: technical}]",
            "A-1 stands in it twice",
        ),
    ],
)
def test_bad_list_is_refused(tmp_path: Path, text: str | None, sentence: str) -> None:
    path = tmp_path / "clauses.yml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(pytest.UsageError, match=f"{re.escape(str(path))}: {sentence}"):
        plugin_requirements.load_kinds(path)


# --- the plugin in a pytest of its own

SAMPLE = {
    "requirements": [
        {"id": "DL-9", "kind": "technical", "clause": "Hộp thư đơn vị", "control": "Hand-over"},
        {"id": "DL-4", "kind": "technical", "clause": "One a|b name", "control": "OpenLDAP"},
        {"id": "CT-5", "kind": "gateway", "clause": "Line", "control": "None", "note": "Browsing."},
        {"id": "BD-22", "kind": "organisational", "clause": "Guide", "control": "Calendar"},
    ]
}


@pytest.fixture
def checkout(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Return a pytest project whose tests/clauses.yml is SAMPLE."""
    # Only the plugin under test: loading all that is installed takes a second per run.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(LIST.parent))
    write(pytester.path / "tests" / "clauses.yml", SAMPLE)
    pytester.makeini("[pytest]\naddopts = -p plugin_requirements\n")
    return pytester


def outcomes(checkout: pytest.Pytester, identifier: str) -> tuple[list[str], bool]:
    """Return the outcomes in build/requirements.json, in the order of test ids, and the verdict."""
    result = json.loads((checkout.path / "build" / "requirements.json").read_text())[identifier]
    return [test["outcome"] for test in result["tests"]], result["proven"]


@pytest.mark.parametrize(
    ("body", "expected", "proven"),
    [
        ("pass", ["passed"], True),
        ("assert False", ["failed"], False),
        ("pytest.skip('no')", ["skipped"], False),
        ("pytest.xfail('known')", ["skipped"], False),
        ("pytest.exit('stop')", ["not run"], False),
        ("with subtests.test():\n        pytest.skip('no')", ["skipped"], False),
        ("with subtests.test():\n        assert False", ["failed"], False),
        ("with subtests.test():\n        pytest.skip('no')\n    assert False", ["failed"], False),
    ],
)
def test_outcome_is_recorded(checkout: pytest.Pytester, body: str, expected: list[str], proven: bool) -> None:
    checkout.makepyfile(f"import pytest\n@pytest.mark.requirement('DL-9')\ndef test_a(subtests):\n    {body}\n")
    checkout.runpytest_inprocess("--requirements", "unit", no_reraise_ctrlc=True)
    assert outcomes(checkout, "DL-9") == (expected, proven)
    assert outcomes(checkout, "DL-4") == ([], False)


@pytest.mark.parametrize("phase", ["before", "after"])
def test_failing_fixture_proves_nothing(checkout: pytest.Pytester, phase: str) -> None:
    lines = ["    assert False", "    yield"]
    checkout.makepyfile(
        "import pytest\n@pytest.fixture\ndef host():\n"
        + "\n".join(lines if phase == "before" else lines[::-1])
        + "\n@pytest.mark.requirement('DL-9')\ndef test_a(host):\n    pass\n"
    )
    checkout.runpytest_inprocess("--requirements", "unit")
    assert outcomes(checkout, "DL-9") == (["failed"], False)


def test_marks_of_class_and_module_count(checkout: pytest.Pytester) -> None:
    checkout.makepyfile(
        "import pytest\npytestmark = pytest.mark.requirement('DL-9')\n"
        "@pytest.mark.requirement('DL-4')\nclass TestX:\n    def test_a(self):\n        pass\n"
    )
    checkout.runpytest_inprocess("--requirements", "unit")
    assert outcomes(checkout, "DL-9") == outcomes(checkout, "DL-4") == (["passed"], True)


def test_runs_are_joined_and_a_repeated_run_replaces_its_own(checkout: pytest.Pytester) -> None:
    test = "import pytest\n@pytest.mark.requirement('DL-9')\ndef test_a():\n    assert {}\n"
    one = checkout.makepyfile(test_one=test.format(True))
    two = checkout.makepyfile(test_two=test.format(False))
    checkout.runpytest_inprocess("--requirements", "unit", one)
    assert outcomes(checkout, "DL-9") == (["passed"], True)
    checkout.runpytest_inprocess("--requirements", "acceptance", two)
    assert outcomes(checkout, "DL-9") == (["passed", "failed"], False)
    two.write_text(test.format(1 == 1))
    checkout.runpytest_inprocess("--requirements", "acceptance", two)
    assert outcomes(checkout, "DL-9") == (["passed", "passed"], True)
    two.write_text("import nothing_of_this_name\n")
    checkout.runpytest_inprocess("--requirements", "acceptance", two)
    assert outcomes(checkout, "DL-9") == (["passed"], True)
    assert list(json.loads((checkout.path / "build" / "requirements.json").read_text())) == [
        "DL-9",
        "DL-4",
        "CT-5",
        "BD-22",
    ]


def test_a_killed_run_leaves_no_earlier_proof(checkout: pytest.Pytester) -> None:
    test = "import os, pytest\n@pytest.mark.requirement('DL-9')\ndef test_a():\n    {}\n"
    path = checkout.makepyfile(test.format("pass"))
    checkout.runpytest_inprocess("--requirements", "unit")
    assert outcomes(checkout, "DL-9") == (["passed"], True)
    path.write_text(test.format("os._exit(9)"))
    assert checkout.runpytest_subprocess("--requirements", "unit").ret == 9
    assert outcomes(checkout, "DL-9") == ([], False)


@pytest.mark.parametrize("options", [[], ["--requirements", "unit", "--collect-only"]])
def test_nothing_is_written_unasked(checkout: pytest.Pytester, options: list[str]) -> None:
    checkout.makepyfile("import pytest\n@pytest.mark.requirement('DL-9')\ndef test_a():\n    pass\n")
    assert checkout.runpytest_inprocess(*options).ret == 0
    assert not (checkout.path / "build").exists()


@pytest.mark.parametrize(
    ("marker", "sentence"),
    [
        (
            "requirement('DL-99')",
            "test_x.py::test_a: requirement DL-99 is not in tests/clauses.yml",
        ),
        ("requirement('DL-9', 'dl-4')", "test_x.py::test_a: requirement dl-4 is not in"),
        ("requirement()", "test_x.py::test_a: the marker 'requirement' names no id"),
        ("requirement", "test_x.py::test_a: the marker 'requirement' names no id"),
    ],
)
def test_wrong_marker_stops_the_collection(checkout: pytest.Pytester, marker: str, sentence: str) -> None:
    checkout.makepyfile(test_x=f"import pytest\n@pytest.mark.{marker}\ndef test_a():\n    pass\n")
    result = checkout.runpytest_inprocess("--strict-markers")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{sentence}*"])
    assert "passed" not in result.stdout.str()


def test_run_name_must_be_a_file_name(checkout: pytest.Pytester) -> None:
    result = checkout.runpytest_inprocess("--requirements", "../x")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--requirements '../x': use lower-case letters*"])


# --- docs/generate.py


def result(kind: str, proven: bool = False, **tests: str) -> dict[str, Any]:
    """Return an entry of build/requirements.json; tests: name in tests/unit/test_x.py → outcome."""
    found = [{"id": f"tests/unit/test_x.py::{n}", "outcome": o} for n, o in tests.items()]
    return {"kind": kind, "tests": found, "proven": proven}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (result("technical"), "*open*"),
        (result("technical", True, test_a="passed"), "`test_x.py::test_a`"),
        (
            result("technical", True, **{"test_a[a::b]": "passed", "test_a[c]": "passed"}),
            "`test_x.py::test_a` (2 cases)",
        ),
        (
            result("technical", test_a="passed", test_b="skipped", test_c="failed"),
            "*open*; skipped: `test_x.py::test_b`; failed: `test_x.py::test_c`",
        ),
        (result("organisational"), "organisational"),
        (result("gateway"), "the province's network"),
        (result("gateway", test_a="passed"), "the province's network; here `test_x.py::test_a`"),
    ],
)
def test_proof(entry: dict[str, Any], expected: str) -> None:
    assert generate.proof(entry) == expected


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a checkout with one role, SAMPLE and results in which DL-9 alone is proven."""
    write(
        tmp_path / "roles" / "relay" / "meta" / "argument_specs.yml",
        {
            "argument_specs": {
                "main": {
                    "short_description": "Relays mail",
                    "description": ["Takes mail in and\n  hands it on.", "Nothing else."],
                    "options": {
                        "relay_ports": {
                            "type": "list",
                            "elements": "dict",
                            "description": "Ports to\nlisten on.",
                            "options": {
                                "port": {"type": "int", "required": True, "description": "Port."},
                                "mode": {
                                    "type": "str",
                                    "default": "tls",
                                    "choices": ["tls", "plain"],
                                    "description": "With or without TLS | none.",
                                },
                            },
                        },
                        "relay_password": {
                            "type": "str",
                            "required": True,
                            "no_log": True,
                            "description": "Password.",
                        },
                        "relay_name": {"type": "str", "required": False, "description": "Name."},
                        "relay_text": {"type": "str", "description": "Text."},
                    },
                },
                "remove": {"short_description": "Removes it"},
            }
        },
    )
    write(
        tmp_path / "roles" / "relay" / "defaults" / "main.yml",
        {"relay_ports": [{"port": 25}], "relay_text": "x" * 90},
    )
    write(tmp_path / "tests" / "clauses.yml", SAMPLE)
    write(
        tmp_path / "build" / "requirements.json",
        {
            "DL-9": result("technical", True, test_a="passed"),
            "DL-4": result("technical"),
            "CT-5": result("gateway"),
            "BD-22": result("organisational"),
        },
    )
    (tmp_path / "docs").mkdir()
    return tmp_path


def test_readme(tree: Path) -> None:
    assert generate.main(["--root", str(tree)]) == 0
    assert (tree / "roles" / "relay" / "README.md").read_text() == (
        "# relay\n\nRelays mail\n\nTakes mail in and hands it on.\n\nNothing else.\n\n"
        "## Variables\n\n"
        "| Name | Type | Default | What it is |\n|---|---|---|---|\n"
        '| `relay_ports` | list of dict | `[{"port": 25}]` | Ports to listen on. |\n'
        "| `relay_ports[].port` | int | required | Port. |\n"
        '| `relay_ports[].mode` | str | `"tls"` | With or without TLS \\| none.'
        ' One of `"tls"`, `"plain"`. |\n'
        "| `relay_password` | str | required | Password."
        " A secret: it has no default and is never logged. |\n"
        "| `relay_name` | str | optional | Name. |\n"
        "| `relay_text` | str | see `defaults/main.yml` | Text. |\n\n"
        "## Entry point `remove`\n\nRemoves it\n\n### Variables\n\nNone.\n\n"
        "Generated by `make docs` from `meta/argument_specs.yml` and `defaults/main.yml`; "
        "change those.\n"
    )


def test_compliance(tree: Path) -> None:
    assert generate.main(["--root", str(tree)]) == 0
    text = (tree / "docs" / "compliance.md").read_text()
    assert "4 clauses: 2 technical (1 proven, 1 open); 1 organisational, which" in text
    for row in (
        "| DL-9 | Hộp thư đơn vị | Hand-over | `test_x.py::test_a` |",
        "| DL-4 | One a\\|b name | OpenLDAP | *open* |",
        "| CT-5 | Line | None. *Browsing.* | the province's network |",
        "| BD-22 | Guide | Calendar | organisational |",
    ):
        assert row in text.splitlines()


def test_compliance_is_kept_when_no_test_has_run(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "docs" / "compliance.md").write_text("earlier proofs\n")
    (tree / "build" / "requirements.json").unlink()
    assert generate.main(["--root", str(tree)]) == 0
    assert (tree / "docs" / "compliance.md").read_text() == "earlier proofs\n"
    assert "no build/requirements.json yet; run make test" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["drop", "kind"])
def test_compliance_of_another_list_is_refused(tree: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tree / "build" / "requirements.json"
    results = generate.read_mapping(path)
    if change == "drop":
        del results["DL-4"]
    else:
        results["DL-4"]["kind"] = "gateway"
    write(path, results)
    assert generate.main(["--root", str(tree)]) == 1
    assert "build/requirements.json: DL-4 is not in it" in capsys.readouterr().err
    assert not (tree / "docs" / "compliance.md").exists()


def test_check_fails_on_a_stale_readme_and_writes_nothing(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tree / "roles" / "relay" / "README.md"
    stale = "roles/relay/README.md: is stale; run make docs\n"
    assert generate.main(["--check", "--root", str(tree)]) == 1
    assert capsys.readouterr().err == stale
    assert not readme.exists()
    assert generate.main(["--root", str(tree)]) == 0
    (tree / "docs" / "compliance.md").unlink()
    assert generate.main(["--check", "--root", str(tree)]) == 0
    readme.write_text(readme.read_text() + "by hand\n")
    capsys.readouterr()
    assert generate.main(["--check", "--root", str(tree)]) == 1
    assert capsys.readouterr().err == stale
    assert not (tree / "docs" / "compliance.md").exists()


def test_a_checkout_without_a_role_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check", "--root", str(tmp_path)]) == 1
    assert "there is no role" in capsys.readouterr().err


def write(path: Path, content: object) -> None:
    """Write content as YAML or, by the file's name, JSON, making the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(content), encoding="utf-8")
    else:
        path.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding="utf-8")
