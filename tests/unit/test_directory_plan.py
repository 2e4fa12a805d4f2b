"""The plan: what it finds, and that every step of it leaves a valid tree."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hopthu.plan import Attributes, Entry, LiveEntry, Plan, as_text, counts, make_plan

BASE = "dc=daklak,dc=gov,dc=vn"
DOMAIN = "daklak.gov.vn"


def person(identity: str, local_part: str, *aliases: str, title: str = "") -> Entry:
    attributes: Attributes = {
        "cn": ["Lê An"],
        "mail": [f"{local_part}@{DOMAIN}"],
        "mailLocalAddress": sorted(f"{alias}@{DOMAIN}" for alias in aliases),
        "title": [title],
    }
    return Entry("person", identity, {name: value for name, value in attributes.items() if any(value)})


class Tree:
    """A directory in memory that refuses what slapd would: missing or taken names, no address."""

    def __init__(self) -> None:
        self.entries: dict[str, LiveEntry] = {}

    def check(self) -> None:
        owners: dict[str, str] = {}
        for dn, entry in self.entries.items():
            assert len(entry.attributes["mail"]) == 1
            for address in entry.attributes["mail"] + entry.attributes.get("mailLocalAddress", []):
                assert owners.setdefault(address, dn) == dn, f"{address} stands at two entries"

    def apply(self, plan: Plan, steps: int | None = None) -> None:
        for step in plan.steps[:steps]:
            change = plan.changes[step.change]
            if change.action == "remove":
                del self.entries[change.dn]
            elif change.action == "add":
                assert change.dn not in self.entries
                assert change.after is not None
                self.entries[change.dn] = LiveEntry(change.kind, change.id, change.dn, dict(change.after))
            else:
                assert step.attributes
                entry = self.entries[change.dn]
                merged = {**entry.attributes, **step.attributes}
                kept = {name: values for name, values in merged.items() if values}
                self.entries[change.dn] = LiveEntry(entry.kind, entry.id, entry.dn, kept)
            self.check()

    def live(self) -> list[LiveEntry]:
        return list(self.entries.values())

    def load(self, *entries: Entry) -> Plan:
        plan = make_plan(list(entries), self.live(), BASE)
        self.apply(plan)
        return plan


def test_add_change_remove() -> None:
    tree = Tree()
    plan = tree.load(person("p1", "an"), person("p2", "binh", "b"))
    assert [(change.action, change.dn) for change in plan.changes] == [
        ("add", f"uid=p1,ou=people,{BASE}"),
        ("add", f"uid=p2,ou=people,{BASE}"),
    ]
    plan = tree.load(person("P1", "an", title="Chuyên viên"), person("p3", "binh"))
    assert [(change.action, change.id) for change in plan.changes] == [
        ("remove", "p2"),
        ("change", "P1"),
        ("add", "p3"),
    ]
    assert counts(plan.changes) == {
        "add": 1, "change": 1, "remove": 1, "add_unit": 0, "add_person": 1, "change_unit": 0,
        "change_person": 1, "remove_unit": 0, "remove_person": 1,
    }  # fmt: skip
    assert plan.steps[1].attributes == {"title": ["Chuyên viên"]}
    assert tree.load(person("p1", "an", title="Chuyên viên"), person("p3", "binh")).changes == []


def test_what_is_not_managed_is_left_alone() -> None:
    tree = Tree()
    tree.load(person("p1", "an"))
    dn = f"uid=p1,ou=people,{BASE}"
    tree.entries[dn].attributes["mobile"] = ["+84 90"]
    assert tree.load(person("p1", "an")).changes == []
    tree.load(person("p1", "an", title="x"))
    assert tree.entries[dn].attributes["mobile"] == ["+84 90"]


def test_the_order_of_values_is_no_difference() -> None:
    tree = Tree()
    tree.load(person("p1", "an", "a", "b"))
    tree.entries[f"uid=p1,ou=people,{BASE}"].attributes["mailLocalAddress"].reverse()
    assert tree.load(person("p1", "an", "a", "b")).changes == []


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [
        # an alias moves: one step each, the giver first although it comes later
        ([person("p1", "an"), person("p2", "binh", "x")],
         [person("p1", "an", "x"), person("p2", "binh")], 2),
        # a chain of renames needs no parking
        ([person("p1", "a"), person("p2", "b"), person("p3", "c")],
         [person("p1", "b"), person("p2", "c"), person("p3", "d")], 3),
        # a swap and a ring of three need one mailbox to step aside
        ([person("p1", "a"), person("p2", "b")], [person("p1", "b"), person("p2", "a")], 3),
        ([person("p1", "a"), person("p2", "b"), person("p3", "c")],
         [person("p1", "b"), person("p2", "c"), person("p3", "a")], 4),
        # an alias becomes the main address of the same mailbox, and the other way round
        ([person("p1", "a", "b")], [person("p1", "b", "a")], 1),
        # an address passes from one that leaves to one that comes
        ([person("p1", "a")], [person("p2", "a")], 2),
    ],
)  # fmt: skip
def test_addresses_move_between_mailboxes(before: list[Entry], after: list[Entry], steps: int) -> None:
    tree = Tree()
    tree.load(*before)
    plan = tree.load(*after)
    assert len(plan.steps) == steps
    assert tree.load(*after).changes == []


def test_a_parking_address_is_one_that_nobody_has() -> None:
    tree = Tree()
    tree.load(person("p1", "a", "moving.p1"), person("p2", "b", "moving.p2"))
    tree.load(person("p1", "b", "moving.p1x"), person("p2", "a", "moving.p2x"))


@st.composite
def states(draw: st.DrawFn) -> list[Entry]:
    """Up to 8 people who share out some of 12 local parts."""
    locals_ = draw(st.permutations([f"a{number}" for number in range(12)]))
    entries = []
    for number in sorted(draw(st.sets(st.integers(0, 7)))):
        if not locals_:
            break
        wanted = 1 + draw(st.integers(0, 2))
        mine, locals_ = locals_[:wanted], locals_[wanted:]
        entries.append(person(f"p{number}", *mine, title=draw(st.sampled_from(["", "x", "y"]))))
    return entries


@settings(max_examples=400)
@given(states(), states(), st.integers(0, 30))
def test_any_state_is_reached_by_valid_steps_even_after_a_crash(
    before: list[Entry], after: list[Entry], crash: int
) -> None:
    tree = Tree()
    tree.load(*before)
    plan = make_plan(after, tree.live(), BASE)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    tree.apply(plan, crash)  # the run dies after so many steps …
    tree.load(*after)  # … and the next one finishes
    assert make_plan(after, tree.live(), BASE).changes == []
    assert {entry.id: entry.attributes for entry in tree.live()} == {entry.id: entry.attributes for entry in after}


def test_a_ring_of_many_is_ordered_fast() -> None:
    size = 20000
    tree = Tree()
    before = [person(f"p{number}", f"a{number}") for number in range(size)]
    after = [person(f"p{number}", f"a{(number + 1) % size}") for number in range(size)]
    live = [LiveEntry("person", entry.id, f"uid={entry.id},ou=people,{BASE}", entry.attributes) for entry in before]
    assert len(make_plan(after, live, BASE).steps) == size + 1
    assert tree.entries == {}


def test_the_diff_shows_managed_attributes_only() -> None:
    attributes = {**person("p1", "an", "b", "a").attributes, "userPassword": ["{SSHA512}x"]}
    assert as_text("person", attributes) == (
        f"cn: Lê An\nmail: an@{DOMAIN}\nmailLocalAddress: a@{DOMAIN}\nmailLocalAddress: b@{DOMAIN}\n"
    )
    assert as_text("person", None) == ""
