"""pytest plugin: which requirement of tests/clauses.yml a test proves, and what came out.

A test says so with `@pytest.mark.requirement("DL-9", "LC-10.3")`. An id that is not in
tests/clauses.yml stops the collection. With `--requirements NAME` a run leaves its outcomes in
build/requirements/NAME.json and joins those of all runs into build/requirements.json; without the
option nothing is written, so a single test run by hand changes no evidence.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

# Best to worst: where a test stands in several runs, the worst outcome counts.
OUTCOMES = ("passed", "skipped", "not run", "failed")


def load_kinds(path: Path) -> dict[str, str]:
    """Return requirement id → kind from a clauses.yml, in the order of the file.

    Raises pytest.UsageError, one sentence with the file, when it is missing or malformed or an id
    stands in it twice.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["requirements"]
        pairs = [(str(entry["id"]), str(entry["kind"])) for entry in entries]
    except FileNotFoundError:
        raise pytest.UsageError(f"{path}: the file is missing; restore it from git") from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise pytest.UsageError(
            f"{path}: must be a mapping 'requirements' to a list of entries with 'id' and 'kind' "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from None
    kinds: dict[str, str] = {}
    for identifier, kind in pairs:
        if identifier in kinds:
            raise pytest.UsageError(f"{path}: {identifier} stands in it twice; keep one entry")
        kinds[identifier] = kind
    return kinds


def join(kinds: Mapping[str, str], runs: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the content of build/requirements.json.

    kinds: requirement id → kind; runs: per run, test id → {"requirements": ids, "outcome": one of
    OUTCOMES}. A requirement is proven when it is technical, has a test, and all its tests passed.
    Ids that a run knows and kinds does not are left out.
    """
    outcomes: dict[str, dict[str, str]] = {identifier: {} for identifier in kinds}
    for run in runs:
        for test, result in run.items():
            for identifier in result["requirements"]:
                seen = outcomes.get(identifier)
                if seen is not None:
                    seen[test] = max(result["outcome"], seen.get(test, OUTCOMES[0]), key=OUTCOMES.index)
    return {
        identifier: {
            "kind": kind,
            "tests": [{"id": test, "outcome": outcome} for test, outcome in sorted(outcomes[identifier].items())],
            "proven": kind == "technical" and set(outcomes[identifier].values()) == {"passed"},
        }
        for identifier, kind in kinds.items()
    }


def marked(item: pytest.Item) -> list[str]:
    """Return the requirement ids of a test, from itself, its class and its module, each once."""
    ids = [str(arg) for mark in item.iter_markers("requirement") for arg in mark.args]
    return list(dict.fromkeys(ids))


class Recorder:
    """Keeps the outcome of every marked test of this process and writes them down."""

    def __init__(self, name: str, build: Path, kinds: Mapping[str, str]) -> None:
        self.partial = build / "requirements" / f"{name}.json"
        self.joined = build / "requirements.json"
        self.kinds = kinds
        self.results: dict[str, dict[str, Any]] = {}

    def pytest_sessionstart(self) -> None:
        # What this run showed last time is void from here on, even if this one is killed.
        self.write()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if ids := marked(item):
                self.results[item.nodeid] = {"requirements": ids, "outcome": "not run"}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        result = self.results.get(report.nodeid)
        # A set-up or tear-down that passes shows nothing; one that fails or skips does, and a later
        # report (the call after a skipped subtest, the tear-down after a failed call) only adds.
        if result is None or (report.passed and report.when != "call"):
            return
        if report.failed or result["outcome"] in ("not run", "passed"):
            result["outcome"] = report.outcome

    def pytest_sessionfinish(self) -> None:
        self.write()

    def write(self) -> None:
        """Write this run's outcomes and join those of all runs, one process at a time."""
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.partial.parent, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            replace_json(self.partial, self.results)
            runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.partial.parent.glob("*.json"))]
            replace_json(self.joined, join(self.kinds, runs))
        finally:
            os.close(lock)


def replace_json(path: Path, content: object) -> None:
    """Write content as JSON so that a reader sees the old file or the new one, never a part."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("requirements").addoption(
        "--requirements",
        metavar="NAME",
        help="record which requirements this run proves in build/requirements/NAME.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requirement(*ids): the test proves these ids of tests/clauses.yml")
    name = config.getoption("requirements")
    if name is None or config.getoption("collectonly"):
        return
    if not re.fullmatch(r"[a-z0-9-]+", name):
        raise pytest.UsageError(f"--requirements {name!r}: use lower-case letters, digits and hyphens")
    kinds = load_kinds(config.rootpath / "tests" / "clauses.yml")
    config.pluginmanager.register(Recorder(name, config.rootpath / "build", kinds))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.rootpath / "tests" / "clauses.yml"
    kinds = load_kinds(path)
    faults = []
    for item in items:
        if any(not mark.args for mark in item.iter_markers("requirement")):
            faults.append(f"{item.nodeid}: the marker 'requirement' names no id; name one")
        faults += [
            f"{item.nodeid}: requirement {identifier} is not in tests/clauses.yml; correct the id or add it there"
            for identifier in marked(item)
            if identifier not in kinds
        ]
    if faults:
        raise pytest.UsageError("\n".join(faults))
