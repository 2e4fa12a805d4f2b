"""The message journal: records, what lines of the log mean, when an entry is settled, final recipients."""

from __future__ import annotations

import io
import sqlite3
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "roles/journal/files/usr/local/lib/mail-journal"))

from mail_journal import index as questions
from mail_journal.index import Index
from mail_journal.link import is_for
from mail_journal.records import (
    Outage,
    Place,
    content_offset,
    encode,
    expand,
    further,
    gone_unseen,
    new_id,
    open_recipients,
    pieces,
    read_line,
    scan,
    settled,
    split_maps,
)
from mail_journal.store import Item, Store

META = {"id": "1", "host": "mail1", "qid": "4jZt2f3bz1zGYjj", "time": 1.0, "envelope": ["a@x.test"]}


def record(content: bytes, **more: Any) -> bytes:
    """A whole record."""
    return b"".join(encode(META | more, [content], len(content)))


# --- records -----------------------------------------------------------------------------------


def test_ids_are_uuids_in_the_order_of_time() -> None:
    first, second = new_id(1_700_000_000.0, b"\xff" * 10), new_id(1_700_000_000.001, b"\0" * 10)
    assert first < second
    for text in (first, second):
        assert (uuid.UUID(text).version, uuid.UUID(text).variant) == (7, uuid.RFC_4122)


def test_records_are_read_back_with_their_places() -> None:
    octets = record(b"one") + record(b"", id="2") + record(b"x" * 300_000, id="3")
    found = list(scan(io.BytesIO(octets), 0))
    assert [(meta["id"], size) for meta, _offset, size, _end in found] == [("1", 3), ("2", 0), ("3", 300_000)]
    assert b"".join(pieces(io.BytesIO(octets), found[0][1], 3)) == b"one"
    assert found[0][1] == content_offset(0, META)
    assert found[-1][3] == len(octets)


@pytest.mark.parametrize("cut", [1, 4, 20, 60, 100])
def test_a_torn_record_and_what_follows_does_not_count(cut: int) -> None:
    whole = record(b"one")
    assert [meta["id"] for meta, *_rest in scan(io.BytesIO(whole + record(b"two" * 30, id="2")[:-cut]), 0)] == ["1"]


def test_a_damaged_record_does_not_count() -> None:
    assert list(scan(io.BytesIO(record(b"one").replace(b"one", b"0ne")), 0)) == []


def test_content_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="not 4"):
        list(encode(META, [b"one"], 4))


# --- the log (lines of Postfix 3.10.13 and Dovecot 2.4.1) ----------------------------------------

DELAY = "delay=0.83, delays=0.16/0.14/0.41/0.11, dsn=2.0.0"
Q = "4jZt2f3bz1zGYjj"


@pytest.mark.parametrize(
    ("identifier", "line", "expected"),
    [
        (
            "postfix/lmtp",
            f"{Q}: to=<U2+x@j.test>, relay=mail.j.test[172.29.73.20]:24, {DELAY}, status=sent (250 2.0.0 <u2+x@j.test>"
            " amyxC+sICGvnDAAAKPQjcw:R3 Saved)",
            {"recipient": "u2+x@j.test", "original": "", "state": "delivered", "session": "amyxC+sICGvnDAAAKPQjcw:R3"},
        ),
        (
            "postfix/lmtp",
            f"{Q}: to=<u1@j.test>, orig_to=<all@j.test>, relay=m[::1]:24, conn_use=2, {DELAY}, status=sent (250 2.0.0"
            " <u1@j.test> a:2 Saved)",
            None,
        ),
        (
            "postfix/smtp",
            f"{Q}: to=<a@out.test>, relay=o[192.0.2.1]:25, {DELAY}, status=sent (250 2.0.0 Ok: queued as 1)",
            {"recipient": "a@out.test", "original": "", "state": "outside"},
        ),
        (
            "postfix/smtp",
            f"{Q}: to=<a@out.test>, relay=none, {DELAY}, status=bounced (host o said: 550 5.1.1 no)",
            {"recipient": "a@out.test", "original": "", "state": "bounced"},
        ),
    ],
)
def test_deliveries(identifier: str, line: str, expected: dict[str, str] | None) -> None:
    found = read_line(identifier, line)
    if expected is None:  # a connection that is used again
        expected = {"recipient": "u1@j.test", "original": "all@j.test", "state": "delivered", "session": "a:2"}
    assert found == {"op": "recipient", "qid": Q, **expected}


@pytest.mark.parametrize(
    ("identifier", "line", "expected"),
    [
        (
            "postfix/qmgr",
            f"{Q}: from=<x@ext.test>, size=2234, nrcpt=6 (queue active)",
            {"op": "queued", "qid": Q, "recipients": 6},
        ),
        ("postfix/qmgr", f"{Q}: removed", {"op": "removed", "qid": Q}),
        ("postfix/postsuper", f"{Q}: removed", {"op": "removed", "qid": Q}),
        (
            "dovecot",
            "lmtp(u3@j.test)<3303><amyxC+sICGvnDAAAKPQjcw:R5>: msgid=unspecified: saved mail to INBOX",
            {"op": "here", "session": "amyxC+sICGvnDAAAKPQjcw:R5"},
        ),
        ("dovecot", "lmtp(3303): Disconnect from 172.29.73.12: Logged out (state=READY)", None),
        ("dovecot", "imap(u)<1><s>: Disconnected", None),
        (
            "postfix/smtp",
            f"{Q}: to=<a@o.test>, relay=none, {DELAY}, status=deferred (connect to o: Connection refused)",
            None,
        ),
        ("postfix/smtpd", f"{Q}: client=unknown[172.29.73.1]", None),
        ("postfix/cleanup", f"{Q}: message-id=<{Q}: removed>", None),
    ],
)
def test_other_lines(identifier: str, line: str, expected: dict[str, Any] | None) -> None:
    assert read_line(identifier, line) == expected


# --- states --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "result"),
    [
        (None, "delivered", "delivered"),
        ("delivered", "safe", "safe"),
        ("safe", "delivered", "safe"),
        ("replayed", "delivered", "replayed"),
        ("bounced", "outside", "bounced"),
    ],
)
def test_no_state_goes_back(old: str | None, new: str, result: str) -> None:
    assert further(old, new) == result


@pytest.mark.parametrize(
    ("expected", "removed", "done", "states", "result"),
    [
        (2, 1, 0, ["safe", "outside"], True),
        (2, 1, 0, ["safe"], False),  # a line of the log is missing
        (2, 1, 0, ["safe", "delivered"], False),
        (1, 0, 0, ["safe"], False),  # still in the queue
        (0, 1, 0, [], False),
        (0, 1, 0, ["bounced"], True),
        (3, 0, 1, [], True),
    ],
)
def test_settled(expected: int, removed: int, done: int, states: list[str], result: bool) -> None:
    assert settled({"expected": expected, "removed": removed, "done": done}, states) is result


def seen(state: str, here: bool = False) -> dict[str, Any]:
    """What is known of a recipient."""
    return {"state": state, "here": here}


@pytest.mark.parametrize(
    ("host", "done", "known", "final", "expected"),
    [
        pytest.param("lost", 0, {}, ["a", "b"], ["a", "b"], id="in the lost queue"),
        pytest.param(
            "lost", 0, {"a": seen("delivered")}, ["a", "b"], ["a", "b"], id="one delivered into the lost store"
        ),
        pytest.param("lost", 0, {"a": seen("safe"), "c": seen("outside")}, ["a", "b", "c"], ["b"], id="one left"),
        pytest.param("lost", 0, {"a": seen("delivered", True)}, ["a"], [], id="delivered into the store here"),
        pytest.param("lost", 1, {}, ["a"], [], id="dealt with"),
        pytest.param("here", 0, {"a": seen("delivered")}, [], ["a"], id="own, delivered into the lost store"),
        pytest.param("here", 0, {}, [], [], id="own queue"),
        pytest.param("here", 0, {}, ["a"], ["a"], id="own, and the log is silent"),
        pytest.param("here", 0, {"a": seen("delivered", True)}, [], [], id="own, and its reader may have deleted it"),
        pytest.param("other", 0, {"a": seen("delivered")}, ["a"], [], id="of neither"),
    ],
)
def test_what_a_replay_looks_at(
    host: str, done: int, known: dict[str, Any], final: list[str], expected: list[str]
) -> None:
    entry = {"host": host, "done": done, "recipients": known}
    assert open_recipients(entry, "lost", "here", final) == expected


@pytest.mark.parametrize(
    ("values", "result"),
    [
        pytest.param({}, True, id="gone, and the log says nothing"),
        pytest.param({"qid": "3Waits"}, False, id="waits"),
        pytest.param({"removed": 1}, False, id="the log says what became of it"),
        pytest.param({"time": 101.0}, False, id="came after the look at the queue"),
        pytest.param({"host": "other"}, False, id="in another host's queue"),
    ],
)
def test_a_log_that_is_silent_does_not_hide_what_left_the_queue(values: dict[str, Any], result: bool) -> None:
    entry = {"host": "here", "qid": "3Gone", "removed": 0, "time": 99.0} | values
    assert gone_unseen(entry, "here", {"3Waits"}, 100.0) is result


def test_one_alarm_an_outage_and_one_an_hour() -> None:
    outage = Outage(15)
    assert [at for at in range(0, 7300, 5) if outage.due(False, at)] == [15, 3615, 7215]
    assert not outage.due(True, 7300)
    assert not outage.due(False, 7301)
    assert outage.due(False, 7316)


# --- aliases ---------------------------------------------------------------------------------------


def test_tables_of_a_parameter() -> None:
    text = "inline:{ { root@h = a@b }, { c@d = e@f } }, proxy:ldap:/etc/x.cf\n hash:/y"
    assert split_maps(text) == ["inline:{ { root@h = a@b }, { c@d = e@f } }", "proxy:ldap:/etc/x.cf", "hash:/y"]
    assert split_maps("") == []


TABLE = {
    "all@j.test": "u1@j.test, team@j.test,friend@out.test",
    "team@j.test": "u2@j.test,u1@j.test",
    "self@j.test": "self@j.test",
    "keep@j.test": "keep@j.test,u3@j.test",
    "loop1@j.test": "loop2@j.test",
    "loop2@j.test": "loop1@j.test",
    "short@j.test": "u4",
    "@old.test": "@j.test",
    "chief@j.test": "u5@j.test",
}


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (["u9@j.test"], ["u9@j.test"]),
        (["ALL@j.test"], ["u1@j.test", "friend@out.test", "u2@j.test"]),
        (["self@j.test"], ["self@j.test"]),
        (["keep@j.test"], ["keep@j.test", "u3@j.test"]),
        (["loop1@j.test"], []),
        (["short@j.test"], ["u4@j.test"]),
        (["u1@old.test"], ["u1@j.test"]),
        (["chief+papers@j.test"], ["u5+papers@j.test"]),
        (["u1@j.test", "all@j.test"], ["u1@j.test", "friend@out.test", "u2@j.test"]),
    ],
)
def test_final_recipients(addresses: list[str], expected: list[str]) -> None:
    assert expand(addresses, lambda key: TABLE.get(key, ""), "j.test") == expected


# --- the index ---------------------------------------------------------------------------------------


def index(path: Path, host: str = "mail1") -> Index:
    """An index with one entry of mail1's."""
    made = Index(path / f"{host}.db", host, True)
    made.apply({"op": "entry", "meta": META, "place": Place(1, 0, 3), "end": 10})
    return made


def one(made: Index) -> dict[str, Any]:
    """The only entry."""
    made._settle()
    return questions.entries(made._database, "all")[0]


def test_messages_of_which_the_log_says_nothing_are_counted(tmp_path: Path) -> None:
    made = index(tmp_path)
    assert questions.silent(made._database, "mail1", 0, 2) == 1
    assert questions.silent(made._database, "mail1", 2, 4) == questions.silent(made._database, "mail2", 0, 2) == 0
    made.apply({"op": "queued", "qid": META["qid"], "recipients": 2})
    assert questions.silent(made._database, "mail1", 0, 2) == 0


def news(made: Index) -> list[str]:
    """What waits for the peer."""
    return [row["operation"] for row in made._database.execute("SELECT operation FROM outbox ORDER BY seq")]


@pytest.mark.parametrize("notice_first", [False, True])
def test_an_entry_is_settled_by_log_and_notice_in_any_order(tmp_path: Path, notice_first: bool) -> None:
    made = index(tmp_path)
    made.apply({"op": "queued", "qid": META["qid"], "recipients": 2})
    if notice_first:
        made.apply({"op": "synced", "sessions": ["s:R2"]})
    for original in ("", "all@x.test"):
        line = {"op": "recipient", "qid": META["qid"], "recipient": "a@x.test", "state": "delivered"}
        made.apply(line | {"original": original, "session": "s:R2"})
    made.apply({"op": "removed", "qid": META["qid"]})
    if not notice_first:
        assert one(made)["settled"] == 0
        made.apply({"op": "synced", "sessions": ["s:R2"]})
    assert one(made)["settled"] == 1
    assert len(news(made)) == 5


def test_the_peer_learns_the_same(tmp_path: Path) -> None:
    here, there = index(tmp_path), index(tmp_path, "mail2")
    here.apply({"op": "queued", "qid": META["qid"], "recipients": 1})
    line = {"op": "recipient", "qid": META["qid"], "recipient": "a@x.test", "original": "", "state": "outside"}
    here.apply(line)
    here.apply({"op": "removed", "qid": META["qid"]})
    import json

    there.apply({"op": "batch", "operations": [json.loads(text) for text in news(here)]})
    assert one(there)["settled"] == 1
    assert news(there) == []


def test_what_is_handed_over_later_brings_its_state(tmp_path: Path) -> None:
    here, there = index(tmp_path), index(tmp_path, "mail2")
    here.apply({"op": "queued", "qid": META["qid"], "recipients": 1})
    here.apply({"op": "recipient", "id": "1", "recipient": "a@x.test", "state": "replayed"})
    here.apply({"op": "removed", "qid": META["qid"]})
    there.apply({"op": "batch", "operations": [questions.state_of(here._database, "1")]})
    assert one(there)["settled"] == 1


def test_a_peer_may_not_do_more_than_tell_states(tmp_path: Path) -> None:
    made = index(tmp_path)
    made.apply(
        {"op": "batch", "operations": [{"op": "forget", "segment": 1}, {"op": "note", "name": "x", "value": "y"}]}
    )
    assert one(made)["id"] == "1"
    assert questions.note(made._database, "x") == ""


def test_a_peer_made_anew_gets_what_is_open(tmp_path: Path) -> None:
    made = index(tmp_path)
    made.apply({"op": "both", "id": "1"})
    made.apply({"op": "peer_store", "store": "one"})
    assert one(made)["alone"] == 0
    made.apply({"op": "peer_store", "store": "two"})
    assert one(made)["alone"] == 1


def test_a_store_that_delivers_here_is_known(tmp_path: Path) -> None:
    made = index(tmp_path)
    made.apply({"op": "recipient", "id": "1", "recipient": "a@x.test", "state": "delivered", "session": "s"})
    assert one(made)["recipients"] == {"a@x.test": {"state": "delivered", "here": False}}
    made.apply({"op": "here", "session": "s"})
    assert one(made)["recipients"] == {"a@x.test": {"state": "delivered", "here": True}}


# --- the store -----------------------------------------------------------------------------------------


def test_group_commit_answers_each_record_when_it_is_on_disk(tmp_path: Path) -> None:
    told: list[str] = []
    store = Store(tmp_path / "s", 0, lambda meta, place, end: told.append(meta["id"]))
    items = [Item(META | {"id": str(number)}, [b"x" * number], number) for number in range(50)]
    threads = [threading.Thread(target=store.append, args=(item,)) for item in items]
    for thread in threads:
        thread.start()
    places = [item.saved.result(10) for item in items]
    assert sorted(told, key=int) == [str(number) for number in range(50)]
    for number, place in enumerate(places):
        assert store.read(place) == b"x" * number
    with store.path(store.current).open("rb") as file:
        assert len(list(scan(file, 0))) == 50


def failing(error: Exception) -> Callable[[], Any]:
    """Content that ends in the middle."""

    def read() -> Any:
        yield b"half"
        raise error

    return read


def test_a_record_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", 0, lambda meta, place, end: None)
    broken = store.append(Item(META, failing(OSError(5, "broken"))(), 8))
    with pytest.raises(OSError, match="broken"):
        broken.result(10)
    place = store.append(Item(META, [b"whole"], 5)).result(10)
    assert store.read(place) == b"whole"
    with store.path(store.current).open("rb") as file:
        assert len(list(scan(file, 0))) == 1


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", 1 << 60, lambda meta, place, end: None)
    with pytest.raises(OSError, match="would stay free"):
        store.append(Item(META, [b"x"], 1)).result(10)


# --- the peer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("certificate", "result"),
    [
        ({"subjectAltName": (("DNS", "mail2.x.test"), ("DNS", "mail.x.test"))}, True),
        ({"subjectAltName": (("DNS", "mail.x.test"), ("IP Address", "192.0.2.1"))}, False),
        ({"subjectAltName": (("DNS", "*.x.test"),)}, False),
        ({"subject": ((("commonName", "mail2.x.test"),),)}, False),
        (None, False),
    ],
)
def test_only_the_peers_own_certificate_counts(certificate: dict[str, Any] | None, result: bool) -> None:
    assert is_for(certificate, "mail2.x.test") is result


def test_sqlite_is_new_enough() -> None:
    assert sqlite3.sqlite_version_info >= (3, 35)
