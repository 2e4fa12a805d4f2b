"""What is taken from the queue of a host that is gone."""

from __future__ import annotations

import os
from pathlib import Path
from subprocess import CalledProcessError

import pytest
from test_lmtp_watch import load

rescue = load("postfix", "queue-rescue")
OWNER = (os.getuid(), os.getgid())
BACK, LOST = "01234567-89ab-cdef-0123-456789abcdef", "fedcba98-89ab-cdef-0123-456789abcdef"


def header(path: Path) -> str:
    """The files of these tests hold a header; one that cannot be read says so."""
    text = path.read_text()
    if text == "broken":
        raise CalledProcessError(1, "postcat")
    return text


def put(spool: Path, place: str, text: str = "", mode: int = 0o700) -> None:
    """A queue file."""
    path = spool / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def run(source: Path, own: Path) -> tuple[dict[str, list[str]], list[str]]:
    """One run: what it says, and what it had Postfix release."""
    for queue in ("hold", "maildrop"):
        (own / queue).mkdir(parents=True, exist_ok=True)
    released: list[str] = []
    once = rescue.Rescue(source, own, lambda identity: identity == BACK, own / "notes.json")
    for queue, path in once.files():
        once.take(queue, path, header, OWNER)
    once.release(released.extend)
    return once.result, released


def test_every_queue_is_taken_once(tmp_path: Path) -> None:
    source, own = tmp_path / "dead", tmp_path / "own"
    put(source, "deferred/4/4jZt8c5vjJzDS1")
    put(source, "active/4jZt8c5vjJzDS2")
    put(source, "incoming/4jZt8c5vjJzDS3", mode=0o600)
    put(source, "hold/4jZt8c5vjJzDS4")
    put(source, "maildrop/4jZt8c5vjJzDS5")
    put(source, "corrupt/4jZt8c5vjJzDS6")
    put(source, "deferred/5/4jZt8c5vjJzDS7", f"Subject: x\nX-Journal-Id: {BACK.upper()}\n")
    put(source, "deferred/5/4jZt8c5vjJzDS8", f"X-Journal-Id: {LOST}\n")
    put(source, "deferred/5/4jZt8c5vjJzDS9", "broken")
    result, released = run(source, own)
    assert {kind: sorted(name[-1] for name in names) for kind, names in result.items()} == {
        "taken": ["1", "2", "4", "5", "8"],
        "replayed": ["7"],
        "unfinished": ["3"],
        "unreadable": ["9"],
    }
    # What an operator held stays so; what a program of the host handed in is Postfix's to pick up.
    assert sorted(name[-1] for name in released) == ["1", "2", "8"]
    assert [path.name[-1] for path in (own / "maildrop").iterdir()] == ["5"]
    result, released = run(source, own)
    assert result["taken"] == []
    assert released == []


def test_a_run_that_was_cut_off_is_made_good(tmp_path: Path) -> None:
    source, own = tmp_path / "dead", tmp_path / "own"
    put(source, "deferred/4/4jZt8c5vjJzDS1")
    (own / "hold").mkdir(parents=True)
    first = rescue.Rescue(source, own, lambda _identity: False, own / "notes.json")
    for queue, path in first.files():
        first.take(queue, path, header, OWNER)
    # Postfix may have given it another name meanwhile.
    (own / "hold/4jZt8c5vjJzDS1").rename(own / "hold/4jZt8c5vjJzXXX")
    result, released = run(source, own)
    assert result["taken"] == []
    assert released == ["4jZt8c5vjJzXXX"]


def test_a_name_that_is_there_already_overwrites_nothing(tmp_path: Path) -> None:
    source, own = tmp_path / "dead", tmp_path / "own"
    put(source, "deferred/4/4jZt8c5vjJzDS1", "new")
    put(own, "hold/4jZt8c5vjJzDS1", "old")
    run(source, own)
    assert sorted(path.read_text() for path in (own / "hold").iterdir()) == ["new", "old"]


@pytest.mark.parametrize(
    ("text", "identity"),
    [("x-journal-id:" + LOST + "\n", LOST), ("X-Journal-Id: no\n", ""), ("", "")],
)
def test_the_journals_id(text: str, identity: str) -> None:
    assert rescue.journal_id(text) == identity
