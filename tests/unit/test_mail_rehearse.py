"""What a rehearsal takes for a fault, and what it does not."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "roles/backup/files/usr/local/lib/mail-backup"))

from mail_backup import tree
from mail_backup.pick import Refused
from mail_backup.rehearse import Rehearsal, born_before, unlike_catalogue, unlike_live
from test_mail_restore import entry, message


@pytest.mark.parametrize(
    ("restored", "wanted", "faults"),
    [
        ([message("a")], [message("a")], 0),
        ([], [message("a")], 1),
        ([message("a")], [], 1),
        ([message("a", body="other")], [message("a")], 1),
        ([message("a", octets=2)], [message("a")], 1),
        ([message("a", subject="read again")], [message("a")], 0),
    ],
)
def test_against_the_catalogue(restored: list[Any], wanted: list[Any], faults: int) -> None:
    assert len(unlike_catalogue(restored, wanted)) == faults


def test_against_the_mailbox() -> None:
    saved = [message("a"), message("gone")]
    live = [message("a", "Moved"), message("new"), message("lacks")]
    found = unlike_live(live, saved, lambda names: {name for name in names if "lacks" in name})
    assert len(found) == 1 and "lacks" in found[0]


def test_age_of_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    if not born_before(tmp_path, ["a"], time.time() + 60):
        pytest.skip("this file system does not say when a file was made")
    assert born_before(tmp_path, ["a", "gone"], time.time() + 60) == {"a"}
    assert born_before(tmp_path, ["a"], time.time() - 60) == set()


def test_sample() -> None:
    rehearsal = Rehearsal.__new__(Rehearsal)
    rehearsal.mailboxes, rehearsal.named = 2, ["e"]
    sizes = {"a": 100, "b": 5000, "e": 100}
    assert rehearsal.sample(sizes) == ["e", "b"]
    rehearsal.named = ["x"]
    with pytest.raises(Refused, match="no mailbox x"):
        rehearsal.sample(sizes)


def test_against_the_live_directory() -> None:
    saved = tree.tree([entry("a", modifyTimestamp="20261101000000Z", mail="a@x")])
    old, new = "20261101000000Z", "20261125000000Z"
    for live, faults in [
        (entry("a", modifyTimestamp=old, mail="a@x", pwdFailureTime="x"), 0),
        (entry("a", modifyTimestamp=old, mail="other@x"), 1),
        (entry("a", modifyTimestamp=new, mail="other@x"), 0),
        (entry("b", modifyTimestamp=old), 1),
        (entry("b", modifyTimestamp=new), 0),
    ]:
        assert len(tree.unlike(saved, tree.tree([live]), "20261120000000Z")) == faults
