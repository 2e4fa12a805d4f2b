"""What Dovecot's events say of changed mailboxes (role replication); the events are those of Dovecot 2.4.1."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROGRAMS = Path(__file__).resolve().parents[2] / "roles/replication/files/usr/local"


def program(path: str) -> ModuleType:
    """Load one of the role's programs."""
    name = "mail_sync_" + Path(path).stem.replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, PROGRAMS / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


changes = program("lib/mail-sync/changes.py")
doveadm = program("lib/mail-sync/doveadm.py")
compare = program("sbin/mail-compare.py")
daemon = program("sbin/mail-sync.py")
AN = "an@tinh.gov.vn"
UNIT = "vanphong@tinh.gov.vn"


def event(name: str, **fields: Any) -> dict[str, Any]:
    """An exported event of An's."""
    return {"event": name, "fields": {"user": AN, **fields}}


def imap(command: str, arguments: str, mailbox: str) -> dict[str, Any]:
    """A finished IMAP command."""
    return event("imap_command_finished", cmd_name=command, cmd_args=arguments, mailbox=mailbox)


def sieve(command: str, **fields: str) -> dict[str, Any]:
    """A finished ManageSieve command."""
    return event("managesieve_command_finished", cmd_name=command, **fields)


@pytest.mark.parametrize(
    ("told", "users"),
    [
        pytest.param(event("mail_delivery_finished", session="s:T2"), [AN], id="delivery"),
        pytest.param(imap("APPEND", "INBOX <17 byte literal>", "INBOX"), [AN], id="append"),
        pytest.param(imap("STORE", r"1 +FLAGS (\Seen)", "INBOX"), [AN], id="flags"),
        pytest.param(
            imap("STORE", "1 +FLAGS (k)", "Units/vanphong/Sent"), [UNIT, AN], id="flags in a unit, and own marks"
        ),
        pytest.param(imap("EXPUNGE", "", "Units/vanphong"), [UNIT], id="expunge in a unit"),
        pytest.param(imap("APPEND", '"Units/VanPhong" <9 byte literal>', "INBOX"), [UNIT], id="append to a unit"),
        pytest.param(imap("COPY", '1 "Units/vanphong/Sent"', "INBOX"), [UNIT], id="copy into a unit"),
        pytest.param(imap("COPY", "1 INBOX", "Units/vanphong"), [AN], id="copy out of a unit"),
        pytest.param(imap("UID MOVE", "1 Units/vanphong", "INBOX"), [AN, UNIT], id="move into a unit"),
        pytest.param(imap("UID MOVE", "1 Done", "Units/vanphong"), [UNIT, AN], id="move out of a unit"),
        pytest.param(
            imap("MOVE", "1 Units/tochuc/In", "Units/vanphong"), [UNIT, "tochuc@tinh.gov.vn"], id="between two units"
        ),
        pytest.param(imap("SUBSCRIBE", "Units/vanphong", "Units/vanphong"), [AN], id="subscription to a unit"),
        pytest.param(event("mail_expunged", service="pop3", mailbox="INBOX"), [AN], id="pop3"),
        pytest.param(
            event("mail_expunged", mailbox="INBOX", reason_code=["doveadm:cmd_dsync_server"]), [], id="the peer's sync"
        ),
        pytest.param(event("mail_expunged", mailbox="INBOX", reason_code=["doveadm:cmd_sync"]), [], id="own sync"),
        pytest.param(event("imap_command_finished", user=""), [], id="nobody"),
        pytest.param({"event": "mail_delivery_finished"}, [], id="nothing"),
        pytest.param(sieve("LISTSCRIPTS"), [], id="scripts only listed"),
        pytest.param(sieve("DELETESCRIPT", script_name="s", error="no such"), [], id="not deleted"),
    ],
)
def test_who_is_to_be_synced(told: dict[str, Any], users: list[str]) -> None:
    assert [change.user for change in changes.changes(told, "Units/")] == users


def test_only_deliveries_that_succeeded_are_confirmed() -> None:
    (good,) = changes.changes(event("mail_delivery_finished", session="Gc:T3:R2"), "Units/")
    (bad,) = changes.changes(event("mail_delivery_finished", session="Gc", error="quota"), "Units/")
    assert (good.session, bad.session) == ("Gc:T3:R2", "")


def test_the_later_of_two_deeds_holds() -> None:
    entry = changes.Entry(since=1.0)
    for told in (
        sieve("DELETESCRIPT", script_name="a"),
        sieve("PUTSCRIPT", script_name="a"),
        sieve("RENAMESCRIPT", old_script_name="b", new_script_name="c"),
        imap("SUBSCRIBE", "Units/vanphong", "Units/vanphong"),
        imap("UNSUBSCRIBE", "Units/vanphong", "Units/vanphong"),
    ):
        for change in changes.changes(told, "Units/"):
            entry.add(change)
    assert entry.deeds == {
        ("script", "a"): "keep",
        ("script", "b"): "rename c",
        ("script", "c"): "keep",
        ("subscription", "Units/vanphong"): "unsubscribe",
    }
    assert changes.Entry.from_json(entry.as_json()) == entry


def test_what_came_during_a_failed_sync_is_kept() -> None:
    entry, later = changes.Entry(since=1.0, sessions=["a"]), changes.Entry(since=5.0, sessions=["b"], full=True)
    entry.absorb(later)
    assert (entry.since, entry.sessions, entry.full) == (1.0, ["a", "b"], True)


@pytest.mark.parametrize(("attempts", "seconds"), [(1, 0.5), (2, 1.0), (5, 8.0), (6, 10.0), (10000, 10.0)])
def test_waits_grow_to_ten_seconds(attempts: int, seconds: float) -> None:
    assert changes.backoff(attempts) == seconds


@pytest.mark.parametrize("field", ["plain", "tab\tand\nfeed", "\x01\x00\r", "Thư mục"])
def test_fields_survive_the_protocol(field: str) -> None:
    escaped = doveadm.escape(field)
    assert not set(escaped) & set(b"\t\n\r\0")
    assert doveadm.unescape(escaped) == field


def test_differences_are_named() -> None:
    here = {("message", "INBOX", "1"): ("g1", "10", ""), ("subscription", "A"): ()}
    there = {("message", "INBOX", "1"): ("g1", "10", r"\Seen"), ("script", "s"): ("", "h")}
    assert compare.differences(here, there) == [
        r"message INBOX 1: here g1 10 , there g1 10 \Seen",
        "script s: only there",
        "subscription A: only here",
    ]


def test_lone_messages_go_by_guid_not_by_uid() -> None:
    here = {("message", "INBOX", "1"): ("g1", "10", ""), ("message", "INBOX", "2"): ("g2", "10", "")}
    there = {("message", "INBOX", "7"): ("g1", "10", ""), ("message", "INBOX", "8"): ("g3", "10", "")}
    assert compare.lone_messages(here, there) == ({"INBOX": ["2"]}, {"INBOX": ["8"]})


class Side:
    """A side of a pair that answers as told, and keeps what it was asked to do."""

    def __init__(self, answers: dict[str, list[tuple[str, ...]]]) -> None:
        self.answers, self.calls = answers, list[tuple[str, ...]]()

    def rows(self, _width: int, _user: str, command: str, *arguments: str) -> list[tuple[str, ...]]:
        return self.answers.get(" ".join((command, *arguments)), self.answers.get(command, []))

    def call(self, *what: str) -> list[str]:
        self.calls.append(what)
        return []


def test_rights_of_a_folder_without_its_own_are_those_of_the_inbox() -> None:
    """One side had them written down, the other not: the comparison never ended well after a host had come back."""
    status = [("INBOX", "1", "7", "g1"), ("Junk", "1", "8", "g2")]
    group = [("group", "dl-01", "read")]
    written = Side({"mailbox status": status, "acl get INBOX": group, "acl get Junk": group})
    inherited = Side({"mailbox status": status, "acl get INBOX": group})
    foreign = Side({"mailbox status": status, "acl get INBOX": group, "acl get Junk": [("group", "dl-02", "read")]})
    mine, same, other = (compare.content(side, UNIT, "Units/") for side in (written, inherited, foreign))
    assert mine == same
    assert compare.differences(mine, other) == ["rights Junk: here group dl-01 read, there group dl-02 read"]


@pytest.mark.parametrize("holder", [True, False])
def test_of_what_lies_twice_the_later_goes_on_the_side_that_serves(
    monkeypatch: pytest.MonkeyPatch, holder: bool
) -> None:
    rows = [
        ("INBOX", "g1", "10", "15"),
        ("INBOX", "g1", "10", "9"),
        ("INBOX", "g1", "11", "16"),
        ("Sent", "g1", "10", "17"),
        ("Units/a@b/Sent", "g2", "10", "1"),
        ("Units/a@b/Sent", "g2", "10", "2"),
    ]
    local, peer = Side({"fetch": rows}), Side({"fetch": rows})
    monkeypatch.setattr(daemon, "is_holder", lambda: holder)
    monkeypatch.setattr(daemon, "Doveadm", lambda _settings: nullcontext(peer))
    settings = doveadm.Settings("p", "127.0.0.1:1", "s", 4, 2, 30, 60, 5, 10, "", "Units/")
    daemon.MailSync(settings).undouble(local, AN)
    expunged = [(AN, "expunge", "mailbox", "INBOX", "uid", "15")]
    assert (local.calls, peer.calls) == ((expunged, []) if holder else ([], expunged))


def test_nobody_who_was_not_compared_passes_for_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies of an answer it does not understand once left 2,003 mailboxes `equal`."""

    class Silent:
        """A side whose answers have another width than is asked for."""

        def __init__(self, *_settings: object) -> None: ...
        def __enter__(self) -> Silent:
            return self

        def __exit__(self, *_reason: object) -> None: ...
        def rows(self, *_what: object) -> list[tuple[str, ...]]:
            raise self.error

    settings = doveadm.Settings("p", "127.0.0.1:1", "s", 4, 2, 30, 60, 5, 10, "", "Units/")
    monkeypatch.setattr(compare, "Doveadm", Silent)
    for error in (ValueError("width"), compare.Unreachable("gone")):
        Silent.error = error  # type: ignore[attr-defined]
        run = compare.Comparison(settings)
        run.look([AN, UNIT])
        assert run.problems
