"""The test command itself: what did not run is a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from prove import MOLECULE_STEPS, Outcome, count_tests, successful_steps

LOG = """\
INFO     stack ➜ check: Executed: Successful
default ➜ create: Executed: Successful
stack ➜ check: Executed: Successful
stack ➜ prepare: Executed: Failed (Ansible return code was 2)
stack ➜ cleanup: Executed: Missing playbook (Remove from test_sequence to suppress)
stack ➜ verify: Executed: Skipped
"""


def test_only_what_molecule_calls_successful_counts() -> None:
    assert successful_steps(LOG) == {("default", "create"), ("stack", "check")}
    assert not successful_steps(LOG) >= MOLECULE_STEPS


@pytest.mark.parametrize(
    ("report", "passed", "failed"),
    [
        (None, 0, 1),
        ("<testsuites><testsuite/></testsuites>", 0, 1),
        ("<testsuite><testcase classname='a' name='b'/></testsuite>", 2, 0),
        ("<testsuite><testcase classname='a' name='b'><failure/></testcase></testsuite>", 1, 1),
        ("<testsuite><testcase classname='a' name='b'><error/></testcase></testsuite>", 1, 1),
        ("<testsuite><testcase classname='a' name='b'><skipped/></testcase></testsuite>", 1, 1),
    ],
)
def test_no_report_no_tests_and_skipped_tests_are_failures(
    tmp_path: Path, report: str | None, passed: int, failed: int
) -> None:
    path = tmp_path / "report.xml"
    if report is not None:
        path.write_text(report, encoding="utf-8")
    outcome = Outcome()
    count_tests(outcome, "unit", path)
    assert (outcome.passed, len(outcome.failed)) == (passed, failed)
