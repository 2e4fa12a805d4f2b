"""What a mail store does to follow the directory: sessions that end, rights on unit mailboxes, receipts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hopthu import report
from hopthu.mailboxes import (
    CLOCKS,
    Session,
    hand_overs,
    is_folder_name,
    receipt,
    rights,
    same_map,
    seconds,
    sharing_map,
    to_end,
    verdict,
)

SINCE = "20261121214446Z"
AT = 1795297486.0


def test_a_generalized_time_is_utc() -> None:
    assert seconds(SINCE) == AT


@pytest.mark.parametrize("time", ["20261121214446", "20261121214446+0700", "hôm qua", ""])
def test_another_form_of_time_is_refused(time: str) -> None:
    with pytest.raises(ValueError):
        seconds(time)


@pytest.mark.parametrize(
    ("may_log_in", "began", "reason"),
    [
        pytest.param({}, AT, "may not log in", id="suspended, left, initial password, renamed"),
        pytest.param({"lan@tinh.gov.vn": None}, AT, None, id="nothing has changed"),
        pytest.param({"lan@tinh.gov.vn": SINCE}, AT - 3600, f"began before {SINCE}", id="with rights of before"),
        pytest.param({"lan@tinh.gov.vn": SINCE}, AT, f"began before {SINCE}", id="in the same second"),
        pytest.param({"lan@tinh.gov.vn": SINCE}, AT + CLOCKS, f"began before {SINCE}", id="while it was checked"),
        pytest.param({"lan@tinh.gov.vn": SINCE}, AT + CLOCKS + 0.01, None, id="logged in again"),
        pytest.param({"mai@tinh.gov.vn": None}, AT, "may not log in", id="somebody else may"),
    ],
)
def test_sessions_that_end(may_log_in: dict[str, str | None], began: float, reason: str | None) -> None:
    session = Session("Lan@tinh.gov.vn", "imap", 100, began)
    assert to_end([session], may_log_in) == ([(session, reason)] if reason else [])


def test_only_the_sessions_concerned_end() -> None:
    lan, mai = (Session(f"{name}@tinh.gov.vn", "pop3", pid, AT) for name, pid in (("lan", 1), ("mai", 2)))
    assert to_end([lan, mai], {"mai@tinh.gov.vn": None}) == [(lan, "may not log in")]


def test_the_group_of_a_unit_may_all_but_share_it_further() -> None:
    group, given = rights("dl-01").split()
    assert group == "group=dl-01"
    assert "a" not in given and set("lrwip") <= set(given)


def test_the_map_names_each_unit_once_and_nothing_else() -> None:
    text = sharing_map({"dl-02": "sonoivu@tinh.gov.vn", "dl-01": "ubnd@tinh.gov.vn"})
    assert text.splitlines() == [
        "shared/shared-boxes/group/dl-01/ubnd@tinh.gov.vn",
        "1",
        "shared/shared-boxes/group/dl-02/sonoivu@tinh.gov.vn",
        "1",
    ]


@pytest.mark.parametrize(
    ("units", "same"),
    [
        ({"a": "a@x", "b": "b@x"}, True),
        ({"a": "moi@x", "b": "b@x"}, False),
        ({"a": "a@x"}, False),
        ({"a": "a@x", "b": "b@x", "c": "c@x"}, False),
    ],
)
def test_order_makes_no_other_map_and_a_new_address_does(units: dict[str, str], same: bool) -> None:
    present = sharing_map({"b": "b@x"}) + sharing_map({"a": "a@x"})
    assert same_map(present, sharing_map(units)) is same


@pytest.mark.parametrize(
    ("identity", "good"),
    [("dl-01", True), ("a.b_c-9", True), ("..", False), (".", False), ("", False), ("a/b", False), ("/etc", False)],
)
def test_an_id_leads_nowhere_but_to_its_own_folder(identity: str, good: bool) -> None:
    assert is_folder_name(identity) is good


def change(**more: Any) -> dict[str, Any]:
    """A line of a plan: a hand-over, unless told otherwise."""
    return {
        "action": "hand-over",
        "also": [],
        "kind": "unit",
        "id": "dl-01",
        "address": "ubnd@tinh.gov.vn",
        "before": {"mailboxHead": ["cu"]},
        "after": {"mailboxHead": ["moi"]},
        "refs": {"decision_ref": "12/QĐ-UBND"},
        "refused": None,
        "drift": False,
        "line": "units.yml:7",
        **more,
    }


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(change(), ("cu", "moi"), id="plain"),
        pytest.param(change(action="rename", also=["hand-over"]), ("cu", "moi"), id="beside a weightier change"),
        pytest.param(change(after={}), ("cu", None), id="nobody follows"),
        pytest.param(change(refused="no decision_ref"), None, id="refused"),
        pytest.param(change(action="delegate"), None, id="another change of the same unit"),
        pytest.param(change(action="update", after={"ou": ['"hand-over"']}), None, id="only a name"),
    ],
)
def test_hand_overs_of_a_plan(tmp_path: Path, row: dict[str, Any], expected: tuple[str, str | None] | None) -> None:
    plan, shown = tmp_path / "plan.jsonl", tmp_path / "plan.json"
    lines = [{"counts": {}}, change(id="dl-09", action="update"), row, change(id="dl-10", action="move")]
    plan.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    report.write(plan, shown)
    with shown.open(encoding="utf-8") as file:
        found = hand_overs(file)
    assert found == (
        [{"unit": "dl-01", "from": expected[0], "to": expected[1], "grounds": {"decision_ref": "12/QĐ-UBND"}}]
        if expected
        else []
    )


def folder(messages: int, uidnext: int) -> dict[str, int]:
    """A folder with a hundred octets for each message."""
    return {"messages": messages, "octets": 100 * messages, "uidnext": uidnext}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        pytest.param({}, {}, ("equal", 0), id="nothing there"),
        pytest.param({"INBOX": folder(4, 9)}, {"INBOX": folder(4, 9)}, ("equal", 0), id="nothing happened"),
        pytest.param({"INBOX": folder(4, 9)}, {"INBOX": folder(6, 11)}, ("2 arrived meanwhile", 0), id="mail came"),
        pytest.param(
            {"INBOX": folder(4, 9)},
            {"INBOX": folder(4, 9), "Sent": folder(1, 2)},
            ("1 arrived meanwhile", 0),
            id="a folder came about",
        ),
        pytest.param({"INBOX": folder(4, 9)}, {"INBOX": folder(3, 9)}, ("1 fewer than before", 1), id="deleted"),
        pytest.param(
            {"INBOX": folder(4, 9)},
            {"INBOX": folder(4, 10)},
            ("1 fewer than before, and 1 arrived meanwhile", 1),
            id="deleted, and another came",
        ),
        pytest.param({"Cũ": folder(3, 4)}, {}, ("3 fewer than before", 3), id="a folder went"),
    ],
)
def test_verdict(
    before: dict[str, dict[str, int]], after: dict[str, dict[str, int]], expected: tuple[str, int]
) -> None:
    assert verdict(before, after) == expected


def test_a_receipt_names_unit_both_heads_grounds_times_and_counts() -> None:
    pending = {
        "unit": "dl-01",
        "from": "cu",
        "to": "moi",
        "grounds": {"decision_ref": "12/QĐ-UBND"},
        "host": "mail1",
        "time": "2026-11-21T21:00:00+00:00",
        "folders": {"INBOX": folder(4, 9)},
    }
    counted = {
        "address": "ubnd@tinh.gov.vn",
        "name": "UBND",
        "head": "moi",
        "people": {"cu": "Lê Văn Cũ", "moi": "Trần Thị Mới"},
        "folders": {"INBOX": folder(4, 9), "Sent": folder(1, 2)},
    }
    found, lost = receipt(pending, counted, "2026-11-21T21:05:00+00:00")
    assert lost == 0
    assert found == {
        "unit": {"id": "dl-01", "name": "UBND", "address": "ubnd@tinh.gov.vn"},
        "from": {"id": "cu", "name": "Lê Văn Cũ"},
        "to": {"id": "moi", "name": "Trần Thị Mới"},
        "grounds": {"decision_ref": "12/QĐ-UBND"},
        "counted": "2026-11-21T21:00:00+00:00",
        "time": "2026-11-21T21:05:00+00:00",
        "folders": [
            {"folder": "INBOX", "before": {"messages": 4, "octets": 400}, "after": {"messages": 4, "octets": 400}},
            {"folder": "Sent", "before": {"messages": 0, "octets": 0}, "after": {"messages": 1, "octets": 100}},
        ],
        "verdict": "1 arrived meanwhile",
    }
