"""Everything that CI runs, in one command: `make test`.

Runs every proof, also after one has failed, and ends with `N passed, N failed` over all of them. What did not
run counts as failed: a Molecule scenario or step without its own line of success, a test run without tests.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
BUILD = CHECKOUT / "build"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
MOLECULE_STEP = re.compile(r"^(\w+) ➜ (\w+): Executed: (\w+)")

LINTERS = {
    "ruff check": ["ruff", "check", "--quiet", "."],
    "ruff format": ["ruff", "format", "--quiet", "--check", "."],
    "mypy": ["mypy", "--no-error-summary"],
    "mypy bench": ["mypy", "--no-error-summary", "bench"],
    "yamllint": ["yamllint", "--strict", "."],
    "ansible-lint": ["ansible-lint", "-q"],
    "generated docs": ["python", "docs/generate.py", "--check"],
}
MOLECULE_STEPS = {
    ("default", "create"),
    ("stack", "check"),
    ("stack", "prepare"),
    ("stack", "converge"),
    ("stack", "idempotence"),
    ("stack", "side_effect"),
    ("stack", "verify"),
    ("default", "destroy"),
}


@dataclass
class Outcome:
    """What has been proven so far."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)

    def add(self, name: str, good: bool) -> None:
        """Count one proof."""
        if good:
            self.passed += 1
        else:
            self.failed.append(name)
            print(f"FAILED {name}", flush=True)


def run(name: str, command: list[str], log: Path) -> bool:
    """Run `command` with its output to the terminal and to `log`; True when it exits with 0."""
    started = time.monotonic()
    print(f"\n--- {name}", flush=True)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(COLOUR.sub("", line))
    good = process.wait() == 0
    print(f"--- {name}: {'passed' if good else 'failed'} in {time.monotonic() - started:.0f} s", flush=True)
    return good


def count_tests(outcome: Outcome, name: str, report: Path) -> None:
    """Count the tests of a JUnit report; a report that is missing or empty, or a skipped test, is a failure."""
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    outcome.add(f"{name}: tests were found and run", bool(cases))
    for case in cases:
        bad = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
        outcome.add(f"{case.get('classname')}::{case.get('name')}", not bad)


def lint(outcome: Outcome) -> None:
    """Every linter."""
    for name, command in LINTERS.items():
        outcome.add(name, run(name, command, BUILD / "logs" / f"{name.replace(' ', '-')}.log"))


def unit(outcome: Outcome) -> None:
    """Unit tests."""
    report = BUILD / "junit" / "unit.xml"
    command = ["pytest", "-q", "--requirements", "unit", f"--junitxml={report}", "tests/unit"]
    run("unit tests", command, BUILD / "logs" / "unit.log")
    count_tests(outcome, "unit", report)


def successful_steps(log: str) -> set[tuple[str, str]]:
    """Return the (scenario, step) pairs that Molecule's closing list calls successful: not skipped, not missing."""
    found = map(MOLECULE_STEP.match, log.splitlines())
    return {(match[1], match[2]) for match in found if match and match[3] == "Successful"}


def molecule(outcome: Outcome) -> None:
    """Every scenario on hosts of its own, which are gone afterwards whatever happens."""
    log = BUILD / "logs" / "molecule.log"
    destroy = ["python", "lab/lab.py", "destroy", "--name", "test"]
    subprocess.run([BIN / "molecule", "reset", "--all"], cwd=CHECKOUT, capture_output=True, check=False)
    subprocess.run([BIN / destroy[0], *destroy[1:]], cwd=CHECKOUT, check=True)
    try:
        outcome.add("molecule test --all", run("molecule", ["molecule", "test", "--all"], log))
    finally:
        subprocess.run([BIN / destroy[0], *destroy[1:]], cwd=CHECKOUT, check=True)
    done = successful_steps(log.read_text(encoding="utf-8"))
    for scenario, step in sorted(MOLECULE_STEPS):
        outcome.add(f"molecule {scenario}: {step}", (scenario, step) in done)
    count_tests(outcome, "acceptance", BUILD / "junit" / "acceptance.xml")


PROOFS: dict[str, Callable[[Outcome], None]] = {"lint": lint, "unit": unit, "molecule": molecule}


def main() -> int:
    """Run the command line; exit code 1 when anything failed or did not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PROOFS, help="one kind of proof (default: all)")
    options = parser.parse_args()
    for folder in ("logs", "junit", "requirements"):
        # On a fresh checkout there is nothing to remove; what cannot be removed makes mkdir fail.
        shutil.rmtree(BUILD / folder, ignore_errors=True)
        (BUILD / folder).mkdir(parents=True)
    started = time.monotonic()
    outcome = Outcome()
    for name, proof in PROOFS.items():
        if options.only in (None, name):
            proof(outcome)
    if outcome.failed:
        print("\nFailed:\n  " + "\n  ".join(outcome.failed))
    print(f"\n{time.monotonic() - started:.0f} s, details in build/logs and build/junit", flush=True)
    print(f"{outcome.passed} passed, {len(outcome.failed)} failed", flush=True)
    return 1 if outcome.failed or not outcome.passed else 0


if __name__ == "__main__":
    sys.exit(main())
