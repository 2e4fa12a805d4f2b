"""Two copies of a tree: which is newer, and what an empty host may do."""

from __future__ import annotations

import pytest

from hopthu.replica import ABSENT, SILENT, Stamps, covers, next_step, stamps

EARLY, LATE = "20261126101542.088530Z#000000#001#000000", "20261126101543.000001Z#000000#001#000000"
OTHER = "20261126101500.000000Z#000000#002#000000"
PEER = "ldaps://mail2"


def test_stamps_are_by_provider_and_the_newest_of_each() -> None:
    assert stamps([EARLY.encode(), OTHER.encode(), LATE.encode()]) == {"001": LATE, "002": OTHER}


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        ({"001": LATE}, {"001": EARLY}, True),
        ({"001": EARLY}, {"001": LATE}, False),
        ({"001": LATE}, {"001": LATE, "002": OTHER}, False),
        ({"001": LATE, "002": OTHER}, {"001": LATE}, True),
        ({"001": LATE}, {}, True),
        ({}, {}, False),
    ],
)
def test_covers(mine: Stamps, theirs: Stamps, expected: bool) -> None:
    assert covers(mine, theirs) is expected


@pytest.mark.parametrize(
    ("mine", "peer", "writer", "alone", "expected"),
    [
        pytest.param(None, ABSENT, True, False, "write", id="fresh pair, first host"),
        pytest.param(None, ABSENT, False, False, "wait", id="fresh pair, second host"),
        pytest.param(None, {"001": LATE}, True, False, "copy", id="first host rebuilt"),
        pytest.param(None, {"001": LATE}, True, True, "copy", id="alone does not make it overwrite a peer's tree"),
        pytest.param(None, {"001": LATE}, False, False, "copy", id="second host rebuilt"),
        pytest.param(None, {}, True, False, "wait", id="a peer has a tree and does not know us yet"),
        pytest.param(None, {}, True, True, "wait", id="the same, alone"),
        pytest.param({}, {"001": LATE}, True, False, "copy", id="half a tree"),
        pytest.param({}, ABSENT, True, True, "wait", id="half a tree is never taken for a whole one"),
        pytest.param(None, SILENT, True, False, "refuse", id="the peer may have the tree"),
        pytest.param(None, SILENT, True, True, "write", id="the peer is gone for good"),
        pytest.param(None, SILENT, False, False, "wait", id="the writer's peer waits"),
        pytest.param({"001": EARLY}, {"001": LATE}, True, False, "wait", id="behind"),
        pytest.param({"001": LATE}, {"001": LATE}, True, False, "write", id="level"),
        pytest.param({"001": LATE}, SILENT, True, False, "write", id="the survivor works on"),
        pytest.param({"001": LATE}, ABSENT, True, False, "write", id="the peer is new"),
    ],
)
def test_next_step(mine: Stamps | None, peer: Stamps | str, writer: bool, alone: bool, expected: str) -> None:
    assert next_step(mine, {PEER: peer}, writer=writer, alone=alone)[0] == expected
