"""The plan over generated directories: every step leaves a valid tree, and a crash changes nothing in the end."""

from __future__ import annotations

import copy
import random
from typing import Any

from directory_model import DOMAIN, Line, Tree, any_order, application, delegate, person, unit, words
from hypothesis import given, settings
from hypothesis import strategies as st

from hopthu.lifecycle import later

LOCALS = [f"a{number}" for number in range(9)]
REFS = ["D1", "D2", "D3"]


@st.composite
def files(draw: st.DrawFn) -> list[Line]:
    """Up to 4 units, 5 people and 2 applications that share out 9 local parts, as the reader would pass them."""
    free = list(draw(st.permutations(LOCALS)))

    def take() -> list[str]:
        wanted = 1 + draw(st.integers(0, 1))
        return [free.pop() for _ in range(min(wanted, len(free)))]

    def refs() -> dict[str, str]:
        return draw(st.fixed_dictionaries({}, optional={"decision_ref": st.sampled_from(REFS)}))

    units = sorted(draw(st.sets(st.integers(0, 3))))
    people = sorted(draw(st.sets(st.integers(0, 4))))
    lines: list[Line] = []
    states = draw(st.lists(st.sampled_from(["active", "active", "suspended", "left"]), min_size=5, max_size=5))
    for number in people:
        if not free:
            break
        more: dict[str, Any] = {"mailboxState": states[number], "title": draw(st.sampled_from(["", "x"]))}
        if units:
            more["departmentNumber"] = f"u{draw(st.sampled_from(units))}"
        lines.append(person(f"p{number}", *take(), refs=refs(), **more))
    present = [line["i"] for line in lines if line["a"]["mailboxState"] != ["left"]]
    standing = draw(st.sets(st.sampled_from(units))) if units else set()
    taken = []
    for number in units:
        if not free:
            break
        more = {"mailboxState": draw(st.sampled_from(["active", "active", "suspended", "legacy"]))}
        if number not in standing:
            more["mailboxState"] = "dissolved"
            others = [f"u{other}" for other in sorted(standing)]
            if others:
                more["mailboxSuccessor"] = draw(st.sampled_from([None, *others]))
        if present:
            more["mailboxHead"] = draw(st.sampled_from([None, *present]))
            acting = draw(st.sets(st.sampled_from(present), max_size=2))
            more["mailboxDelegate"] = [delegate(identity) for identity in sorted(acting)]
        line = unit(f"u{number}", *take(), refs=refs(), **more)
        taken.append(line["i"])
        lines.append(line)
    for number in sorted(draw(st.sets(st.integers(0, 1)))):
        senders = [line["a"]["mail"][0] for line in lines[:1]]
        more = {"mailboxState": draw(st.sampled_from(["active", "suspended", "left"]))}
        if units:
            more["departmentNumber"] = f"u{draw(st.sampled_from(units))}"
        own = [free.pop()] if free and draw(st.booleans()) else []
        lines.append(application(f"s{number}", *own, senders=senders, refs=refs(), **more))
    for line in lines:  # a unit for which no address was left is not in the files
        for name in ("departmentNumber", "mailboxSuccessor"):
            if line["a"].get(name, [""])[0] not in taken:
                line["a"].pop(name, None)
    return lines


POLICIES = st.fixed_dictionaries(
    {
        "alias_days": st.sampled_from([0, 10]),
        "block_days": st.sampled_from([0, 30]),
        "retention_days": st.sampled_from([0, 20]),
        "pointer": st.sampled_from(["none", "unit"]),
        "required_refs": st.sampled_from([{}, {"leave": ["decision_ref"], "rename": ["decision_ref"]}]),
    }
)
DAYS = st.sampled_from([0, 5, 11, 25, 45])


@settings(max_examples=150, deadline=None)
@given(POLICIES, st.lists(st.tuples(files(), DAYS), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_any_files_are_reached_by_valid_steps_even_after_a_crash(
    policy: dict[str, Any], history: list[tuple[list[Line], int]], chance: random.Random
) -> None:
    tree = Tree(**policy)
    for lines, days in history:
        tree.now = later(tree.now, days)
        before = copy.deepcopy(tree.entries)
        plan = tree.plan(*lines)
        straight = Tree(**policy)
        straight.now, straight.entries = tree.now, copy.deepcopy(tree.entries)
        straight.apply(plan)
        order = any_order(plan, chance)
        crash = chance.randint(0, len(order))
        tree.apply(plan, order[:crash])
        tree.load(*lines)  # the next run finishes what the one that died has left
        assert tree.entries == straight.entries
        again = tree.plan(*lines)
        assert [change for change in again.changes if not change.refused] == []
        assert {change.id for change in again.changes} == {change.id for change in plan.changes if change.refused}
        for change in plan.changes:
            if change.refused and change.dn in before:
                now = tree.entries[change.dn]
                assert all(
                    now.get(name) == before[change.dn].get(name) for name in ("mail", "mailboxState", "cn", "ou")
                )


def test_a_ring_of_many_is_ordered_fast() -> None:
    size = 3000
    tree = Tree()
    tree.load(*(unit(f"u{number}", f"a{number}") for number in range(size)), unit("x", "x"))
    plan = tree.plan(*(unit(f"u{number}", f"a{(number + 1) % size}") for number in range(size)), unit("x", "x"))
    assert len(plan.steps) == size + 1


def test_what_is_not_managed_is_left_alone() -> None:
    tree = Tree()
    tree.load(person("p1", "an"))
    tree.entry("p1")["mobile"] = ["+84 90"]
    tree.entry("p1")["mailLocalAddress"] = []
    assert words(tree.load(person("p1", "an", title="x"))) == ["p1 update"]
    assert tree.one("p1", "mobile") == "+84 90"
    assert DOMAIN in (tree.one("p1", "mail") or "")
