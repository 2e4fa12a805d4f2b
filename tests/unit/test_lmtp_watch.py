"""When Postfix is asked to send again what waits for the mail store."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest


def load(role: str, name: str) -> ModuleType:
    """A program of a role, as a module."""
    path = Path(__file__).parents[2] / "roles" / role / "files/usr/local/sbin" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


watch = load("postfix", "lmtp-watch")
DOMAINS = ["tinh.gov.vn"]


def note(recipient: str, status: str) -> str:
    """What Postfix writes down of one recipient that it deferred."""
    fields = f"recipient={recipient}\noffset=400\nstatus={status}\naction=delayed\nreason=x=y"
    return f"<{recipient}>: it says why\n{fields}\n\n"


@pytest.mark.parametrize(
    ("text", "waits"),
    [
        (note("a@tinh.gov.vn", "4.4.1"), True),  # no connection
        (note("a@Tinh.gov.vn", "4.4.2"), True),  # the session broke off
        (note("a@tinh.gov.vn", "4.7.5"), True),  # TLS
        (note("a@tinh.gov.vn", "4.2.2"), False),  # the store answered: full
        (note("a@outside.example", "4.4.1"), False),
        (note("a@outside.example", "4.4.1") + note("b@tinh.gov.vn", "4.4.1"), True),
        ("", False),
    ],
)
def test_what_waits_for_the_store(text: str, waits: bool) -> None:
    assert watch.waits_for_store(text, DOMAINS) is waits


class Store:
    """A store that is there or not, and how often Postfix was asked to send."""

    def __init__(self, spool: Path) -> None:
        """Away, with an empty queue."""
        (spool / "defer" / "A").mkdir(parents=True)
        self.spool, self.there, self.asked, self.sent, self.age = spool, False, 0, 0, 1000
        self.watch = watch.Watch(watch.Deferred(spool), DOMAINS, self.greets, self.send)

    def greets(self) -> bool:
        """Whether it is there."""
        self.asked += 1
        return self.there

    def send(self) -> None:
        """Postfix was asked."""
        self.sent += 1

    def defer(self, name: str, status: str) -> None:
        """Postfix defers a message; a folder's time moves on although the test is fast."""
        folder = self.spool / "defer" / "A"
        (folder / name).write_text(note("a@tinh.gov.vn", status))
        self.age += 1
        os.utime(folder, ns=(self.age, self.age))


def test_an_empty_queue_asks_nobody(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert [store.watch.look(now) for now in range(5)] == [False] * 5
    assert store.asked == 0


def test_mail_that_waits_is_sent_once_when_the_store_is_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.defer("1", "4.4.1")
    assert not store.watch.look(0)
    assert not store.watch.look(1)
    store.there = True
    assert store.watch.look(2)
    (tmp_path / "defer/A/1").unlink()
    assert not any(store.watch.look(now) for now in range(3, 20))
    assert store.sent == 1


def test_a_full_mailbox_is_none_of_its_business(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.there = True
    store.defer("1", "4.2.2")
    assert not store.watch.look(0)
    assert store.asked == 0


def test_a_store_that_greets_and_then_fails_is_asked_ever_more_rarely(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.there = True
    for now in range(200):
        store.defer("1", "4.4.2")
        store.watch.look(now)
    assert store.sent == 5  # at 0, 5, 20, 80 and 140
