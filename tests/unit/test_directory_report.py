"""The plan as people and scripts see it."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import pytest

from hopthu import report


def change(identity: str, action: str = "join", **fields: Any) -> dict[str, Any]:
    address = f"{identity}@daklak.gov.vn"
    plain: dict[str, Any] = {
        "action": action,
        "also": [],
        "kind": "person",
        "id": identity,
        "dn": f"uid={identity},ou=people,dc=x",
        "address": address,
        "name": "Lê An",
        "unit": "Sở Nội vụ",
        "before": None,
        "after": {"mail": [address]},
        "refs": {},
        "refused": None,
        "drift": False,
        "password": True,
        "line": "people.yml:3",
    }
    return plain | fields


def plan(folder: Path, *changes: dict[str, Any]) -> Path:
    refused = sum(1 for item in changes if item["refused"])
    counts = {"total": len(changes) - refused, "refused": refused}
    path = folder / "plan.jsonl"
    lines: list[dict[str, Any]] = [{"counts": counts, "serial": 1, "stop": None, "issued": {}, "hand_overs": 0}]
    lines += [*changes, {"step": 0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(report).failed == 0


def test_the_plan_file_is_json_before_and_after_it_is_applied(tmp_path: Path) -> None:
    source, target = plan(tmp_path, change("p1"), change("p2", refused="no grounds")), tmp_path / "plan.json"
    report.write(source, target)
    before = json.loads(target.read_text(encoding="utf-8"))
    report.mark_applied(target)
    after = json.loads(target.read_text(encoding="utf-8"))
    assert before["applied"] is False
    assert after == {**before, "applied": True}
    assert [row["id"] for row in after["changes"]] == ["p1", "p2"]
    assert after["changes"][1]["refused"] == "no grounds"
    assert after["counts"] == {"total": 1, "refused": 1}
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_plan_without_changes_is_json_too(tmp_path: Path) -> None:
    report.write(plan(tmp_path), tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["changes"] == []


def test_pages_are_for_accepted_changes_with_a_password(tmp_path: Path) -> None:
    source = plan(tmp_path, change("p1"), change("p2", refused="no"), change("p3", "move", password=False))
    assert [holder.id for holder in report.holders(source)] == ["p1"]


def test_a_move_shows_the_new_address_and_unit(tmp_path: Path) -> None:
    before = {"mail": ["an@x.vn"], "departmentNumber": ["u1"]}
    after = {"mail": ["an2@x.vn"], "departmentNumber": ["u2"]}
    shown = report.line(change("p1", "move", before=before, after=after, refs={"decision_ref": "5/QĐ"}))
    assert shown.endswith(", address an@x.vn → an2@x.vn, unit u1 → u2 [decision_ref 5/QĐ]")
    assert shown.startswith("move (điều chuyển) person p1")


def test_a_refused_change_says_why(tmp_path: Path) -> None:
    assert report.refused(plan(tmp_path, change("p1"), change("p2", refused="its decision_ref is missing"))) == [
        "REFUSED join (tiếp nhận) person p2 Lê An <p2@daklak.gov.vn>: its decision_ref is missing"
    ]


@pytest.mark.parametrize("number", [3, 200])
def test_a_long_plan_is_cut_and_says_so(tmp_path: Path, number: int) -> None:
    source = plan(tmp_path, *(change(f"p{index}") for index in range(number)))
    lines, diff = report.lines(source), report.diff(source)
    if number == 3:
        assert len(lines) == len(diff) == 3
    else:
        assert lines[-1] == "… and 140 more, all of them in the plan file"
        assert diff[-1] == {"prepared": "… and 150 more mailboxes, all of them in the plan file\n"}
