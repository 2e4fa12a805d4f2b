"""What is kept for how long: the section of policy.yml, the end of a leaver's retention, copies on stated grounds."""

from __future__ import annotations

import argparse
import base64
import doctest
import json
import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import retention as filters
from directory_model import BASE, LOADER, NOW, Tree, person, unit
from directory_samples import POLICY, problems_of
from test_lmtp_watch import load

from hopthu import retention as rules
from hopthu.lifecycle import later
from hopthu.plan import Plan, make_purge_plan

P1 = person("p1", "an", departmentNumber="u1")
U1 = unit("u1", "so1")


purge, copy = load("mailboxes", "mailbox-purge"), load("mailboxes", "mailbox-copy")


# --- policy.yml


def test_what_the_policy_leaves_out_is_the_default() -> None:
    policy = {"retention": {"leaver_days": 90, "logs_days": None, "backups": {"monthly_days": 500}}}
    found = filters.retention(policy)
    assert (found["leaver_days"], found["logs_days"], found["backups"]["daily_days"]) == (90, 365, 31)
    assert filters.backup_keep(policy) == {
        "within": "3d", "within-daily": "31d", "within-weekly": "92d", "within-monthly": "500d",
    }  # fmt: skip
    assert filters.retention({})["trash_days"] == filters.retention({"retention": None})["trash_days"] == 90


def test_the_old_place_of_the_leavers_time_says_where_the_new_one_is(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, policy=POLICY + "leaver: {retention_days: 180}\n")
    assert len(problems) == 1
    assert problems[0].endswith("retention_days: is retention.leaver_days now: move it there")


def test_a_purge_goes_by_the_same_rules_on_the_host_as_by_the_playbook() -> None:
    policy = {"address": {"reuse_block_days": 7}, "required_refs": {"purge": ["decision_ref"]}}
    assert filters.purge_rules(policy) == {
        "block_days": 7, "backup_days": 373, "required_refs": {"purge": ["decision_ref"]},
    }  # fmt: skip


# --- the end of a leaver's retention


def purge_plan(tree: Tree, **rules: Any) -> Plan:
    rest = {"base": BASE, "loader": LOADER, "now": tree.now}
    return make_purge_plan({**tree.policy, **rules}, tree.mailboxes(), tree.rows("ou=released"), **rest)


def left_tree(days: int) -> Tree:
    """A person who left so many days ago, with a retention of 20."""
    tree = Tree(retention_days=20, backup_days=40)
    tree.load(U1, P1)
    tree.load(U1)
    tree.now = later(NOW, days)
    return tree


def test_retention_ends_without_the_files() -> None:
    tree = left_tree(19)
    assert purge_plan(tree).changes == []
    tree = left_tree(21)
    plan = purge_plan(tree)
    assert [(change.id, change.action) for change in plan.changes] == [("p1", "purge")]
    assert [step.step for step in plan.steps] == ["tombstone", "delete"]
    tree.apply(plan)
    tomb = tree.entry("p1")
    assert tomb["mailboxState"] == ["purged"] and tomb["mailboxBackupsUntil"] == [later(tree.now, 40)]
    assert tree.plan(U1).changes == [], "the playbook finds it done"


def test_who_has_not_left_stays_whatever_the_date_says() -> None:
    tree = Tree()
    tree.load(U1, P1)
    tree.entry("p1")["mailboxRetainUntil"] = ["20000101000000Z"]
    assert purge_plan(tree).changes == []


def test_where_a_purge_needs_grounds_it_waits_for_them() -> None:
    plan = purge_plan(left_tree(21), required_refs={"purge": ["decision_ref"]})
    assert plan.steps == [] and "decision_ref" in str(plan.changes[0].refused)


class Ldap:
    """A directory of which mailbox-purge asks."""

    def __init__(self, released: set[str], mailboxes: set[str]) -> None:
        self.names = {"hopThuReleased": released, "hopThuMailbox": mailboxes}

    def search_s(self, where: str, _scope: int, about: str, _attributes: list[str]) -> list[Any]:
        known = self.names["hopThuReleased" if "hopThuReleased" in about else "hopThuMailbox"]
        return [(f"uid={name},{where}", {"uid": [name.encode()]}) for name in known if f"(uid={name.lower()})" in about]


def test_content_goes_only_with_a_tombstone_and_without_an_entry(tmp_path: Path) -> None:
    """Both from the store and from the copy for backups; what begins with a dot is nobody's mailbox."""
    for name in ("P1", "p2", "p3", ".probe", ".backup/mailboxes/P1", ".backup/mailboxes/p4", ".restore/p1"):
        (tmp_path / name / "Maildir").mkdir(parents=True)
    (tmp_path / "p5").symlink_to("p3")
    copies, catalogue = tmp_path / ".backup" / "mailboxes", tmp_path / ".backup" / "catalogue"
    catalogue.mkdir()
    (catalogue / "P1.jsonl").touch()
    found = purge.homes(tmp_path)
    assert sorted(found) == ["P1", "p2", "p3", "p4"]
    directory = Ldap({"P1", "p2", "p4", "p5", "p6"}, {"p2", "p3"})
    gone = dict(purge.due(directory, BASE, found))
    assert gone == {"P1": [tmp_path / "P1", copies / "P1", catalogue / "P1.jsonl"], "p4": [copies / "p4"]}
    assert dict(purge.due(Ldap(set(), set()), BASE, found)) == {}


# --- the report


DIRECTORY = {
    "now": "20261126120000Z",
    "kept": [
        {"uid": "p1", "mail": "an@x.vn", "mailboxClass": "person", "mailboxState": "left",
         "mailboxStateSince": "20260601000000Z", "mailboxRetainUntil": "20261126080000Z"},
        {"uid": "p2", "mail": "ba@x.vn", "mailboxClass": "person", "mailboxState": "left",
         "mailboxStateSince": "20261101000000Z", "mailboxRetainUntil": "20261126100000Z"},
        {"uid": "u1", "mail": "so@x.vn", "mailboxClass": "unit", "mailboxState": "dissolved"},
    ],
    "purged": [
        {"uid": "p8", "mailboxClass": "person", "mailboxStateSince": "20261101000000Z",
         "mailboxBackupsUntil": "20271101000000Z"},
        {"uid": "p9", "mailboxClass": "person", "mailboxStateSince": "20240101000000Z"},
    ],
}  # fmt: skip


def test_report_names_what_should_be_gone() -> None:
    hosts = [
        {"inventory_hostname": "mail1", "retention_folders": {"stdout_lines": ["Junk 3", "Trash 0"]},
         "retention_purged": {"stdout_lines": ["p9: content removed"]}, "retention_logs": {"skipped": True}},
        {"inventory_hostname": "witness",
         "retention_logs": {"files": [{"path": "/var/log/hosts/mail1/2025-11-01"}, {"path": "/l/mail1/2026-11-26"}]}},
    ]  # fmt: skip
    found = filters.retention_report({}, DIRECTORY, filters.retention_seen(hosts))
    assert [row["overdue"] for row in found["leavers"]] == [True, False, True]
    assert [(row["id"], row["backups_until"], row["in_backups"]) for row in found["purged"]] == [
        ("p8", "2027-11-01", True), ("p9", None, False)
    ]  # fmt: skip
    assert [text.split(":")[0] for text in found["overdue"]] == [
        "p1 <an@x.vn> should have been purged on 2026-11-26",
        "u1 <so@x.vn> is kept without an end",
        "3 messages in Junk should be gone",
        "mail1 still has mail of p9, who was purged",
        "witness has logs of 2025-11-01",
    ]
    assert "p2 <ba@x.vn> left 2026-11-01, kept until 2026-11-26" in found["lines"]
    assert "p8 was purged 2026-11-01, in backups until 2027-11-01" in found["lines"]


def test_report_of_a_quiet_day_has_nothing_overdue() -> None:
    seen = filters.retention_seen([{"inventory_hostname": "mail1"}])
    found = filters.retention_report({}, {"now": "20261126120000Z", "kept": [], "purged": []}, seen)
    assert found["overdue"] == []


# --- copies on stated grounds


def test_examples_of_the_filters() -> None:
    assert doctest.testmod(filters).failed == 0 and doctest.testmod(rules).failed == 0


def test_access_is_told_in_a_line_whatever_its_letters() -> None:
    change = {"address": "so@x.vn", "what": "messages", "subject": "công văn", "refs": {"grounds": "15/QĐ"}}
    text = base64.b64encode(json.dumps(change, ensure_ascii=False).encode()).decode()
    entry = f"decisionTime: 20261126120000Z\ndecisionBy: an@pc\ndecisionChange:: {text}\n"
    ldif = f"dn: cn=2\n{entry}\ndn: cn=2-done\ndecisionTime: 20261126120001Z\n\n"
    assert filters.access_lines(ldif) == ["2026-11-26 12:00 UTC an@pc: so@x.vn, messages, công văn, on 15/QĐ"]
    assert filters.access_lines("") == []


def asked(**given: Any) -> argparse.Namespace:
    nothing = {"folder": "INBOX", "sender": "", "subject": "", "message_id": "", "since": None, "before": None}
    return argparse.Namespace(**{**nothing, **given})


@pytest.fixture
def maildir(tmp_path: Path) -> Path:
    """A mailbox with three messages in two folders."""
    for folder, number, subject, day in (
        ("", 1, "=?utf-8?q?C=C3=B4ng_v=C4=83n?=", 20), ("", 2, "Bao cao", 25), (".Lưu.2026", 3, "Bao cao", 26),
    ):  # fmt: skip
        for part in ("cur", "new", "tmp"):
            (tmp_path / folder / part).mkdir(parents=True, exist_ok=True)
        path = tmp_path / folder / ("new" if number == 1 else "cur") / f"{number}.a:2,S"
        text = f"From: {number}@x.vn\r\nTo: a@x.vn\r\nMessage-ID: <{number}@x>\r\nSubject: {subject}\r\n\r\n…\r\n"
        path.write_bytes(text.encode())
        os.utime(path, (86400 * (20400 + day),) * 2)
    return tmp_path


@pytest.mark.parametrize(
    ("wish", "found"),
    [
        ({}, ["1", "2"]),
        ({"folder": "*"}, ["1", "2", "3"]),
        ({"folder": "Lưu/2026"}, ["3"]),
        ({"folder": "*", "subject": "BAO"}, ["2", "3"]),
        ({"subject": "công văn"}, ["1"]),
        ({"sender": "2@X"}, ["2"]),
        ({"folder": "*", "message_id": "3@x"}, ["3"]),
        (
            {"folder": "*", "since": date.fromtimestamp(86400 * 20425), "before": date.fromtimestamp(86400 * 20426)},
            ["2"],
        ),
    ],
)
def test_copy_has_what_was_asked_for(maildir: Path, wish: dict[str, Any], found: list[str]) -> None:
    assert sorted(about["from"][0] for _path, about in copy.found(maildir, asked(**wish))) == found


def test_folder_that_is_not_there_is_told(maildir: Path) -> None:
    with pytest.raises(copy.Refused, match="it has INBOX, Lưu/2026"):
        list(copy.found(maildir, asked(folder="Sent")))
