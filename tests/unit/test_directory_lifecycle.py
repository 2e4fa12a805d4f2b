"""What the plan calls each change, what it refuses, and what it writes: one mailbox at a time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from directory_model import BASE, DOMAIN, LOADER, NOW, Line, Tree, delegate, person, unit, words

from hopthu.lifecycle import later
from hopthu.plan import exported, make_reset_plan

U1 = unit("u1", "so1")
U2 = unit("u2", "so2")
P1 = person("p1", "an", departmentNumber="u1")
P2 = person("p2", "binh", departmentNumber="u1")


def loaded(*lines: Line, **policy: Any) -> Tree:
    tree = Tree(**policy)
    tree.load(*lines)
    tree.now = later(NOW, 1)
    return tree


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([], [U1, P1], ["u1 found", "p1 join"]),
        ([U1, U2, P1], [U1, U2, person("p1", "an", departmentNumber="u2", title="x")], ["p1 move"]),
        ([U1, U2, P1], [U1, U2, person("p1", "an-so2", departmentNumber="u2", cn="Lê Anh")], ["p1 move"]),
        ([U1, P1], [U1, person("p1", "an2", departmentNumber="u1")], ["p1 rename"]),
        ([U1, P1], [U1, person("p1", "an", departmentNumber="u1", cn="Lê Ân")], ["p1 rename"]),
        ([U1, P1], [U1, person("p1", "an", "a", departmentNumber="u1")], ["p1 update"]),
        ([U1, P1], [U1, person("p1", "an", departmentNumber="u1", mailboxQuota="1")], ["p1 update"]),
        ([U1, P1], [U1, person("p1", "an", departmentNumber="u1", mailboxState="suspended")], ["p1 suspend"]),
        ([U1, person("p1", "an", mailboxState="suspended")], [U1, person("p1", "an")], ["p1 resume"]),
        ([U1, P1], [U1, person("p1", "an", departmentNumber="u1", mailboxState="left")], ["p1 leave"]),
        ([U1, P1], [U1], ["p1 leave"]),
        ([U1, person("p1", "an", mailboxState="left")], [U1, person("p1", "an", mailboxState="left")], []),
        ([U1], [unit("u1", "so1", ou="Sở mới")], ["u1 rename"]),
        ([U1], [unit("u1", "so1", mailboxState="suspended")], ["u1 suspend"]),
        ([U1], [unit("u1", "so1", mailboxState="legacy")], ["u1 legacy"]),
        ([unit("u1", "so1", mailboxState="legacy")], [U1], ["u1 resume"]),
        ([U1], [unit("u1", "so1", mailboxState="dissolved")], ["u1 dissolve"]),
        ([U1, U2], [U2], ["u1 dissolve"]),
        ([U1, P1], [unit("u1", "so1", mailboxHead="p1"), P1], ["u1 delegate", "p1 update"]),
        ([U1, P1], [unit("u1", "so1", mailboxDelegate=delegate("p1")), P1], ["u1 delegate", "p1 update"]),
        ([unit("u1", "so1", mailboxHead="p1"), P1, P2], [unit("u1", "so1", mailboxHead="p2"), P1, P2],
         ["u1 hand-over", "p1 update", "p2 update"]),
        ([unit("u1", "so1", mailboxHead="p1"), P1, P2],
         [unit("u1", "so1", mailboxHead="p2", ou="Sở mới", mailboxDelegate=delegate("p1")), P1, P2],
         ["u1 hand-over rename", "p2 update"]),
        ([U1, P1], [U1, P1], []),
        ([U1, P1], [unit("U1", "so1", ou="Sở u1"), person("P1", "an", departmentNumber="u1")], []),
        # an alias domain comes and goes with policy.yml
        ([person("p1", "an")], [person("p1", "an", "an@phuyen.gov.vn")], ["p1 update"]),
        ([person("p1", "an", "an@phuyen.gov.vn")], [person("p1", "an")], ["p1 expire"]),
    ],
)  # fmt: skip
def test_words(before: list[Line], after: list[Line], said: list[str]) -> None:
    tree = loaded(*before)
    assert words(tree.load(*after)) == said
    assert words(tree.plan(*after)) == []


def test_a_return_gives_a_new_password_and_ends_sessions() -> None:
    tree = loaded(U1, P1)
    tree.load(U1)
    assert tree.one("p1", "mailboxState") == "left"
    assert tree.one("p1", "mailboxRetainUntil") == later(tree.now, 20)
    tree.now = later(tree.now, 3)
    plan = tree.load(U1, P1)
    assert words(plan) == ["p1 return"] and plan.changes[0].password
    assert tree.one("p1", "mailboxRetainUntil") is None
    assert tree.one("p1", "mailboxSessionsSince") == tree.one("p1", "mailboxStateSince") == tree.now
    assert tree.passwords == ["u1", "p1", "p1"]


@pytest.mark.requirement("DL-7.3")
def test_a_leaver_is_kept_then_purged_and_his_id_and_address_are_not_given_again() -> None:
    tree = loaded(U1, P1, retention_days=20, block_days=60)
    tree.load(U1)
    tree.now = later(tree.now, 19)
    assert words(tree.plan(U1)) == []
    assert words(tree.plan(U1, person("p9", "an"))) == ["REFUSED p9 join"]
    tree.now = later(tree.now, 2)
    assert words(tree.load(U1)) == ["p1 purge"]
    tomb = tree.entry("p1")
    assert tomb["objectClass"] == ["hopThuReleased"] and tomb["mailboxState"] == ["purged"]
    plan = tree.plan(U1, P1, person("p9", "an"))
    assert words(plan) == ["REFUSED p1 join", "REFUSED p9 join"]
    assert "never used again" in str(plan.changes[0].refused) and "blocked until" in str(plan.changes[1].refused)
    assert words(tree.plan(U1, person("p1", "an", mailboxState="left"))) == []
    tree.now = later(tree.now, 60)
    assert words(tree.load(U1, person("p9", "an"))) == ["p9 join"]


def test_a_purge_that_died_between_tombstone_and_entry_is_finished() -> None:
    tree = loaded(person("p1", "an"), retention_days=5)
    tree.load()
    tree.now = later(tree.now, 6)
    plan = tree.plan()
    assert [step.step for step in plan.steps] == ["tombstone", "delete"]
    tree.apply(plan, [0])
    again = tree.load()
    assert words(again) == ["p1 purge"] and [step.step for step in again.steps] == ["delete"]


@pytest.mark.requirement("LC-6.2a")
def test_a_new_address_keeps_the_old_one_as_alias_for_a_time() -> None:
    tree = loaded(U1, U2, person("p1", "an-so1", departmentNumber="u1"))
    moved = person("p1", "an-so2", departmentNumber="u2")
    tree.load(U1, U2, moved)
    assert tree.entry("p1")["mailLocalAddress"] == [f"an-so1@{DOMAIN}"]
    assert words(tree.plan(U1, U2, moved)) == []
    assert words(tree.plan(U1, U2, moved, person("p9", "an-so1"))) == ["REFUSED p9 join"]
    tree.now = later(tree.now, 11)
    assert words(tree.load(U1, U2, moved)) == ["p1 expire"]
    assert "mailLocalAddress" not in tree.entry("p1")
    assert words(tree.plan(U1, U2, moved, person("p9", "an-so1"))) == ["REFUSED p9 join"]
    assert words(tree.plan(U1, U2, person("p1", "an-so1", departmentNumber="u2"))) == ["p1 rename"]
    tree.now = later(tree.now, 30)
    assert words(tree.load(U1, U2, moved, person("p9", "an-so1"))) == ["p1 expire", "p9 join"]


def test_the_old_address_in_an_alias_domain_stays_alias_too() -> None:
    tree = loaded(person("p1", "an", "an@phuyen.gov.vn", "ong-an"))
    tree.load(person("p1", "an2", "an2@phuyen.gov.vn"))
    assert tree.entry("p1")["mailLocalAddress"] == ["an2@phuyen.gov.vn", f"an@{DOMAIN}", "an@phuyen.gov.vn"]
    assert sorted(value.split()[0] for value in tree.entry("p1")["mailboxFormerAddress"]) == [
        f"an@{DOMAIN}", "an@phuyen.gov.vn", f"ong-an@{DOMAIN}",
    ]  # fmt: skip


def test_units_pass_addresses_on_at_once() -> None:
    tree = loaded(U1, U2)
    assert words(tree.load(unit("u1", "x"), unit("u2", "so1"))) == ["u1 rename", "u2 rename"]
    assert "mailboxFormerAddress" not in tree.entry("u1")
    assert tree.entry("u2")["mailLocalAddress"] == [f"so2@{DOMAIN}"]
    plan = tree.load(unit("u1", "so1"), unit("u2", "x"))
    assert len(plan.steps) == 3  # one steps aside for a moment
    assert tree.one("u1", "mail") == f"so1@{DOMAIN}"


def test_a_vanished_unit_gives_its_address_to_a_new_one() -> None:
    tree = loaded(U1)
    assert words(tree.load(unit("u9", "so1"))) == ["u1 dissolve", "u9 found"]
    assert tree.one("u1", "mail") == f"moving.u1@{DOMAIN}" and tree.one("u9", "mail") == f"so1@{DOMAIN}"
    assert words(tree.plan(unit("u9", "so1"))) == []


@pytest.mark.requirement("LC-6.1")
def test_a_dissolved_unit_gives_its_mail_to_the_successor_for_a_time() -> None:
    tree = loaded(unit("u1", "so1", "so1cu"), U2, pointer="unit")
    gone = unit("u1", "so1", "so1cu", mailboxState="dissolved", mailboxSuccessor="u2")
    assert words(tree.load(gone, U2)) == ["u1 dissolve", "u2 update"]
    assert tree.entry("u2")["mailLocalAddress"] == [f"so1@{DOMAIN}", f"so1cu@{DOMAIN}"]
    assert tree.one("u1", "mail") == f"so1@{DOMAIN}"
    assert "mailLocalAddress" not in tree.entry("u1") and "mailboxPointer" not in tree.entry("u1")
    tree.now = later(tree.now, 11)
    assert words(tree.load(gone, U2)) == ["u1 update", "u2 expire"]
    assert "mailLocalAddress" not in tree.entry("u2")
    assert f"so2@{DOMAIN}" in str(tree.one("u1", "mailboxPointer"))
    tree.now = later(tree.now, 10)
    assert words(tree.load(gone, U2)) == ["u1 purge"]


def test_a_leaver_points_to_his_unit() -> None:
    tree = loaded(U1, P1, pointer="unit")
    tree.load(U1)
    pointer = str(tree.one("p1", "mailboxPointer"))
    assert pointer.isascii() and f"so1@{DOMAIN}" in pointer
    assert words(tree.load(unit("u1", "so1moi"))) == ["u1 rename", "p1 update"]
    assert f"so1moi@{DOMAIN}" in str(tree.one("p1", "mailboxPointer"))


# --- grounds -----------------------------------------------------------------------------------------------------


@pytest.mark.requirement("DL-7.1")
def test_grounds_are_asked_for_and_used_once() -> None:
    needs = {"join": ["decision_ref", "order_ref"], "move": ["decision_ref", "approved_by"]}
    tree = Tree(required_refs=needs)
    plan = tree.load(U1, U2, person("p1", "an", departmentNumber="u1", refs={"decision_ref": "1/QĐ"}))
    assert words(plan) == ["u1 found", "u2 found", "REFUSED p1 join"]
    assert "join needs order_ref" in str(plan.changes[2].refused)
    refs = {"decision_ref": "1/QĐ", "order_ref": "2/L", "approved_by": "CVP"}
    assert words(tree.load(U1, U2, person("p1", "an", departmentNumber="u1", refs=refs))) == ["p1 join"]
    assert tree.entry("p1")["mailboxGrounds"] == ["approved_by CVP", "decision_ref 1/QĐ", "order_ref 2/L"]
    plan = tree.load(U1, U2, person("p1", "an", departmentNumber="u2", refs=refs))
    assert words(plan) == ["REFUSED p1 move"]
    assert "decision_ref 1/QĐ was the grounds of an earlier change" in str(plan.changes[0].refused)
    refs["decision_ref"] = "9/QĐ"
    assert words(tree.load(U1, U2, person("p1", "an", departmentNumber="u2", refs=refs))) == ["p1 move"]
    assert "decision_ref 9/QĐ" in tree.entry("p1")["mailboxGrounds"]


def test_what_the_operator_decides_needs_no_grounds() -> None:
    """A larger quota and a stricter password policy; with a new title beside them the change needs its document."""
    tree = loaded(person("p1", "an"), required_refs={"update": ["request_ref"]})
    larger = {"mailboxQuota": "99", "pwdPolicySubentry": "cn=administrators,ou=policies,dc=x"}
    assert words(tree.load(person("p1", "an", **larger))) == ["p1 update"]
    assert words(tree.load(person("p1", "an", **larger, title="Chánh Văn phòng"))) == ["REFUSED p1 update"]


@pytest.mark.requirement("DL-7.3", "CT-7.3", "HT-5.2")
def test_who_vanishes_leaves_only_where_no_grounds_are_asked_for() -> None:
    """A line that was lost is no decision."""
    tree = loaded(person("p1", "an"), required_refs={"leave": ["decision_ref"]})
    plan = tree.load()
    assert words(plan) == ["REFUSED p1 leave"]
    assert (
        plan.changes[0].refused == "p1 is no longer in the files and leave needs decision_ref: put it back, state left"
    )
    assert words(loaded(person("p1", "an")).load()) == ["p1 leave"]


def test_what_depends_on_a_refused_change_is_refused() -> None:
    tree = Tree(required_refs={"join": ["decision_ref"]})
    plan = tree.load(unit("u1", "so1", mailboxHead="p1"), unit("u2", "so2", mailboxParent="u1"), P1)
    assert words(plan) == ["REFUSED u1 found", "REFUSED u2 found", "REFUSED p1 join"]
    assert tree.entries == {}


def test_an_address_whose_holder_may_not_give_it_up_is_not_free() -> None:
    tree = loaded(U1, U2, required_refs={"rename": ["legal_act_ref"]})
    plan = tree.load(unit("u1", "x"), unit("u2", "so1", refs={"legal_act_ref": "1"}))
    assert words(plan) == ["REFUSED u1 rename", "REFUSED u2 rename"]
    assert f"so1@{DOMAIN} belongs to u1" in str(plan.changes[1].refused)


@pytest.mark.requirement("CT-10.2")
def test_people_go_with_their_suspended_unit_on_its_grounds() -> None:
    needs = {"suspend": ["decision_ref"], "resume": ["decision_ref"]}
    below = unit("u2", "so2", mailboxParent="u1")
    tree = loaded(U1, below, person("p1", "an", departmentNumber="u2"), required_refs=needs)
    halted = person("p1", "an", departmentNumber="u2", mailboxState="suspended")
    plan = tree.load(unit("u1", "so1", mailboxState="suspended"), below, halted)
    assert words(plan) == ["REFUSED u1 suspend", "REFUSED p1 suspend"]
    closed = unit("u1", "so1", mailboxState="suspended", refs={"decision_ref": "1"})
    assert words(tree.load(closed, below, halted)) == ["u1 suspend", "p1 suspend"]
    again = person("p1", "an", departmentNumber="u2")
    assert words(tree.plan(closed, below, again)) == ["REFUSED p1 resume"]
    opened = unit("u1", "so1", refs={"decision_ref": "2"})
    assert words(tree.load(opened, below, again)) == ["u1 resume", "p1 resume"]


@pytest.mark.requirement("BD-2.2")
@pytest.mark.requirement("BD-2.3")
def test_classes() -> None:
    rules = {"units": ["hành chính"], "people": ["công chức"], "on_request": ["đại biểu"]}
    tree = Tree(eligibility=rules)
    plan = tree.plan(
        unit("u1", "a1", businessCategory="hành chính"),
        unit("u2", "a2", businessCategory="công ty"),
        person("p1", "b1", businessCategory="công chức"),
        person("p2", "b2", businessCategory="khách"),
        person("p3", "b3"),
        person("p4", "b4", businessCategory="đại biểu"),
        person("p5", "b5", businessCategory="đại biểu", refs={"commitment_ref": "CK1"}),
    )
    assert words(plan) == [
        "u1 found", "REFUSED u2 found", "p1 join", "REFUSED p2 join", "REFUSED p3 join", "REFUSED p4 join", "p5 join",
    ]  # fmt: skip


@pytest.mark.requirement("DL-9")
@pytest.mark.requirement("CT-9.1")
@pytest.mark.parametrize(
    ("rules", "delegates", "refused"),
    [
        ({}, [delegate("p1"), delegate("p2")], None),
        ({"max": 1}, [delegate("p1"), delegate("p2")], "2 delegates"),
        ({"max": 0}, [delegate("p1")], "1 delegates"),
        ({"roles": ["phó"]}, [delegate("p1", role="phó"), delegate("p2", role="lái xe")], "only phó"),
        ({"document_required": True}, [delegate("p1")], "no delegation_ref"),
        ({"document_required": True}, [delegate("p1", delegation_ref="3/UQ")], None),
    ],
)
def test_delegates(rules: dict[str, Any], delegates: list[str], refused: str | None) -> None:
    tree = loaded(U1, P1, P2, delegates=rules)
    plan = tree.plan(unit("u1", "so1", mailboxDelegate=delegates), P1, P2)
    said = plan.changes[0].refused
    assert said is None if refused is None else refused in str(said)


# --- rights ------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("LC-10.3")
def test_a_hand_over_gives_password_and_rights_and_ends_sessions() -> None:
    tree = loaded(unit("u1", "so1", mailboxHead="p1"), P1, P2)
    assert tree.entry("p1")["mailboxActsFor"] == ["u1"]
    assert tree.entry("u1")["mailboxAgent"] == [f"an@{DOMAIN}"]
    plan = tree.load(unit("u1", "so1", mailboxHead="p2"), P1, P2)
    assert plan.header["hand_overs"] == 1 and plan.changes[0].password
    assert plan.changes[0].before == {"mailboxAgent": [f"an@{DOMAIN}"], "mailboxHead": ["p1"]}
    assert tree.passwords[-1] == "u1"
    assert tree.one("u1", "mailboxSessionsSince") == tree.one("p1", "mailboxSessionsSince") == tree.now
    assert "mailboxActsFor" not in tree.entry("p1") and tree.entry("p2")["mailboxActsFor"] == ["u1"]
    assert "mailboxSessionsSince" not in tree.entry("p2")


def test_rights_follow_addresses_and_states() -> None:
    head = unit("u1", "so1", mailboxHead="p1", mailboxDelegate=delegate("p2"))
    tree = loaded(head, P1, P2)
    assert words(tree.load(head, person("p1", "an9", departmentNumber="u1"), P2)) == ["u1 update", "p1 rename"]
    assert tree.entry("u1")["mailboxAgent"] == [f"an9@{DOMAIN}", f"binh@{DOMAIN}"]
    tree.load(head, P1, person("p2", "binh", departmentNumber="u1", mailboxState="suspended"))
    assert tree.entry("u1")["mailboxAgent"] == [f"an@{DOMAIN}"] and "mailboxActsFor" not in tree.entry("p2")
    legacy = unit("u1", "so1", mailboxHead="p1", mailboxDelegate=delegate("p2"), mailboxState="legacy")
    tree.load(legacy, P1, P2)
    assert "mailboxAgent" not in tree.entry("u1") and tree.entry("p2")["mailboxActsFor"] == ["u1"]


# --- by hand -----------------------------------------------------------------------------------------------------


def test_a_hand_edit_is_put_right_without_grounds() -> None:
    tree = loaded(U1, P1, required_refs={"rename": ["decision_ref"], "update": ["decision_ref"]})
    tree.entry("p1")["title"] = ["Giám đốc"]
    tree.entry("p1")["mailLocalAddress"] = [f"sep@{DOMAIN}"]
    tree.entry("u1")["mailboxAgent"] = [f"an@{DOMAIN}"]
    plan = tree.load(U1, P1)
    assert words(plan) == ["u1 drift", "p1 drift"] and all(change.drift for change in plan.changes)
    assert "title" not in tree.entry("p1") and "mailboxFormerAddress" not in tree.entry("p1")
    tree.entry("p1")["title"] = ["Giám đốc"]
    plan = tree.load(U1, person("p1", "an", departmentNumber="u1", title="Chuyên viên"))
    assert words(plan) == ["REFUSED p1 update drift"]
    assert words(tree.load(U1, P1)) == ["p1 drift"]


def test_an_entry_made_by_hand_goes_or_is_made_anew() -> None:
    tree = loaded(U1)
    for identity in ("p7", "p8"):
        made = {"uid": [identity], "mail": [f"{identity}@{DOMAIN}"], "mailboxState": ["active"], "sn": ["x"]}
        tree.entries[f"uid={identity},ou=people,{BASE}"] = {**made, "creatorsName": [f"cn=admin,{BASE}"]}
    plan = tree.load(U1, person("p8", "tam"))
    assert words(plan) == ["p7 drift", "p8 join drift"]
    assert not any(",ou=people," in dn and "p7" in dn for dn in tree.entries)
    assert tree.one("p8", "mail") == f"tam@{DOMAIN}" and tree.passwords[-1] == "p8"
    assert words(tree.plan(U1, person("p8", "tam"))) == []


def test_entries_of_the_first_version_get_their_digest_without_grounds() -> None:
    needs = {"update": ["request_ref"], "delegate": ["decision_ref"], "rename": ["decision_ref"]}
    tree = Tree(required_refs=needs)
    for line in (U1, P1):
        branch = {"unit": "units", "person": "people"}[line["k"]]
        content = {"uid": [line["i"]], **line["a"], "creatorsName": [LOADER]}
        tree.entries[f"uid={line['i']},ou={branch},{BASE}"] = content
    more = person("p1", "an", departmentNumber="u1", mailboxMiddleName="Văn")
    assert words(tree.load(unit("u1", "so1", mailboxHead="p1"), more)) == ["u1 update", "p1 update"]
    assert tree.entry("p1")["mailboxDigest"] and tree.entry("p1")["mailboxActsFor"] == ["u1"]
    assert words(tree.plan(unit("u1", "so1", mailboxHead="p1"), more)) == []


# --- the whole ---------------------------------------------------------------------------------------------------


def test_too_many_removals_need_a_number() -> None:
    people = [person(f"p{number}", f"a{number}") for number in range(20)]
    tree = loaded(*people)
    assert tree.plan(*people[2:], removals=None).header["stop"] is None
    plan = tree.plan(*people[3:], removals=None)
    assert "3 of 20" in plan.header["stop"] and "directory_removals=3" in plan.header["stop"] and plan.steps == []
    assert tree.plan(*people[3:], removals=2).header["stop"]
    assert tree.plan(*people[3:], removals=3).header["stop"] is None
    few = loaded(*people[:2])
    assert few.plan(people[0], removals=None).header["stop"] is None


def test_slips_of_an_interrupted_run_are_found() -> None:
    tree = loaded(U1, P1)
    tree.entry("p1")["mailboxSlip"] = ["run-1"]
    issued = tree.plan(U1, P1, issued=["run-1", "run-2"]).header["issued"]
    about = {"id": "p1", "kind": "person", "address": f"an@{DOMAIN}", "name": "Lê An", "unit": "Sở u1"}
    assert issued == {"run-1": [about], "run-2": []}


def test_a_large_empty_tree_is_filled_and_then_holds_what_single_operations_would_write() -> None:
    lines = [unit("u1", "so1", mailboxHead="p1"), *(person(f"p{number}", f"a{number}") for number in range(2001))]
    tree = Tree()
    plan = tree.load(*lines)
    assert plan.header["fill"] and plan.steps == []
    assert words(tree.plan(*lines)) == []
    single = Tree()
    single.load(*lines[:5])
    assert single.entry("p1") == tree.entry("p1")


def test_resets() -> None:
    tree = loaded(U1, P1, person("p3", "c", mailboxState="suspended"))
    tree.load(U1, P1)
    policy = {**tree.policy, "required_refs": {"reset": ["request_ref"]}}
    ids = [("P1", {"request_ref": "5/ĐN"}), ("u1", {}), ("p3", {"request_ref": "6"}), ("p9", {"request_ref": "7"})]
    resets = [{"id": identity, "refs": refs} for identity, refs in ids]
    live = tree.rows("ou=units") + tree.rows("ou=people")
    plan = make_reset_plan(policy, resets, live, base=BASE, loader=LOADER, now=tree.now, serial=4)
    assert words(plan) == ["p1 reset", "REFUSED u1 reset", "REFUSED p3 reset", "REFUSED p9 reset"]
    tree.apply(plan)
    assert tree.passwords[-1] == "p1" and tree.one("p1", "mailboxSessionsSince") == tree.now
    assert tree.entry("p1")["mailboxGrounds"] == ["request_ref 5/ĐN"]


def test_an_export_holds_what_the_files_say() -> None:
    tree = loaded(unit("u1", "so1", "x", mailboxHead="p1"), U2, P1)
    renamed = person("p1", "an2", "c", departmentNumber="u1", refs={"decision_ref": "1"})
    gone = unit("u1", "so1", "x", mailboxHead="p1", mailboxState="dissolved", mailboxSuccessor="u2")
    tree.load(gone, U2, renamed)
    live = tree.rows("ou=units") + tree.rows("ou=people")
    found = {line["i"]: line["a"] for line in exported(live, base=BASE, loader=LOADER, now=tree.now)}
    assert found["u2"] == U2["a"]
    assert found["p1"]["mailLocalAddress"] == [f"c@{DOMAIN}"]
    assert found["p1"]["mailboxGrounds"] == ["decision_ref 1"]
    assert json.loads(json.dumps(found)) == found
