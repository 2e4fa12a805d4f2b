"""Backups: the link tree, the catalogue, what restic's failures mean, which dates cannot be true, settings."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "roles/backup/files/usr/local/lib/mail-backup"))

from mail_backup import catalogue, commands, server, status, store
from mail_backup.restic import (
    SENTENCES,
    BackupError,
    Restic,
    Snapshot,
    classify,
    dated_ahead,
    failure,
    moment,
    newest,
)
from mail_backup.settings import Repository, Server, Settings, load, load_server

from backup import backup_table, further_backup_files, htpasswd_hash

ROLE = Path(__file__).parents[2] / "roles/backup"
NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
REPOSITORY = Repository("witness", "rest:https://witness.tinh.test:8000/mail/", "/k", "/l")


@pytest.fixture(autouse=True)
def _owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not everybody who runs these tests may give files away."""
    monkeypatch.setattr(os, "chown", lambda *_arguments: None)


def deliver(home: Path, name: str, text: bytes = b"Subject: x\n\nbody\n", folder: str = "", sub: str = "new") -> Path:
    """Put a message into a folder of a home."""
    place = home / "Maildir" / folder
    for part in ("cur", "new", "tmp"):
        (place / part).mkdir(parents=True, exist_ok=True)
    path = place / sub / name
    path.write_bytes(text)
    return path


def names(tree: Path) -> set[str]:
    """Files of a tree, by their paths in it."""
    return {str(path.relative_to(tree)) for path in tree.rglob("*") if not path.is_dir()}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with two messages, a filter and what can be made anew."""
    home = tmp_path / "dl-01"
    deliver(home, "1.M1.host")
    deliver(home, "2.M2.host:2,FS", folder=".Công văn.Đến", sub="cur")
    maildir = home / "Maildir"
    (maildir / "subscriptions").write_text("Sent\n")
    (maildir / "dovecot.index.log").write_text("x")
    (maildir / "dovecot.list.index").write_text("x")
    (maildir / "dovecot-uidlist.lock").write_text("x")
    (maildir / "tmp" / "3.M3.host").write_text("half")
    (maildir / "dovecot-uidlist").write_text("3 V1 N3 Gabc\n1 W9 :1.M1.host\n2 :half a li")
    (home / "sieve").mkdir()
    (home / "sieve" / "absent.sieve").write_text("keep;")
    (home / ".dovecot.sieve").symlink_to("sieve/absent.sieve")
    return home


# --- the link tree ----------------------------------------------------------------------------


def test_tree_has_links_to_messages_and_copies_of_the_rest(home: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    seen = store.take(home, tree)
    assert names(tree) == {
        "Maildir/new/1.M1.host",
        "Maildir/.Công văn.Đến/cur/2.M2.host:2,FS",
        "Maildir/subscriptions",
        "Maildir/dovecot-uidlist",
        "sieve/absent.sieve",
        ".dovecot.sieve",
    }
    assert (tree / "Maildir/new/1.M1.host").samefile(home / "Maildir/new/1.M1.host")
    assert not (tree / "Maildir/subscriptions").samefile(home / "Maildir/subscriptions")
    assert os.readlink(tree / ".dovecot.sieve") == "sieve/absent.sieve"
    assert (tree / "Maildir/dovecot-uidlist").read_text().endswith(":1.M1.host\n"), "a half line was copied"
    assert (tree / "Maildir/cur").is_dir()
    assert len(seen.messages) == 2


def test_second_run_follows_flags_moves_and_deletions(home: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    store.take(home, tree)
    kept = os.stat(tree / "Maildir/new/1.M1.host").st_ino
    (home / "Maildir/new/1.M1.host").rename(home / "Maildir/cur/1.M1.host:2,S")
    (home / "Maildir/.Công văn.Đến/cur/2.M2.host:2,FS").unlink()
    (home / "sieve/absent.sieve").unlink()
    deliver(home, "4.M4.host", folder=".Mới")
    store.take(home, tree)
    assert names(tree) == {
        "Maildir/cur/1.M1.host:2,S",
        "Maildir/.Mới/new/4.M4.host",
        "Maildir/subscriptions",
        "Maildir/dovecot-uidlist",
        ".dovecot.sieve",
    }
    assert os.stat(tree / "Maildir/cur/1.M1.host:2,S").st_ino == kept
    assert store.take(home, tree).messages == store.take(home, tree).messages


def test_another_file_of_the_same_name_is_linked_anew(home: Path, tmp_path: Path) -> None:
    """A mailbox that was restored by hand may have the old names."""
    tree = tmp_path / "tree"
    store.take(home, tree)
    path = home / "Maildir/new/1.M1.host"
    other = tmp_path / "other"
    other.write_bytes(b"Subject: y\n\nother\n")
    other.replace(path)
    store.take(home, tree)
    assert (tree / "Maildir/new/1.M1.host").read_bytes() == path.read_bytes()


def during(monkeypatch: pytest.MonkeyPatch, folder: Path, *changes: Callable[[], object]) -> None:
    """Let something happen each time a folder has just been listed, one change at a time."""
    waiting, real = list(changes), store._entries

    def entries(path: Path) -> Any:
        found = real(path)
        if path == folder and waiting:
            waiting.pop(0)()
        return found

    monkeypatch.setattr(store, "_entries", entries)


def test_flag_that_changes_during_the_walk_loses_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the folder was listed, before the file was linked; and again at the second look."""
    new, cur = home / "Maildir/new", home / "Maildir/cur"
    during(
        monkeypatch,
        cur,
        lambda: (new / "1.M1.host").rename(cur / "1.M1.host:2,S"),
        lambda: (cur / "1.M1.host:2,S").rename(cur / "1.M1.host:2,RS"),
    )
    seen = store.take(home, tmp_path / "tree")
    assert "Maildir/cur/1.M1.host:2,RS" in names(tmp_path / "tree")
    assert len([name for name in names(tmp_path / "tree") if "1.M1" in name]) == 1
    assert len(seen.messages) == 2


def test_message_that_moves_to_a_folder_listed_before_is_not_lost(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = deliver(home, "5.M5.host:2,", folder=".A", sub="cur")
    goal = deliver(home, "6.M6.host:2,", folder=".B", sub="cur")
    moved = goal.with_name("7.M7.host:2,")
    for first, second in ((source.parent, goal.parent), (goal.parent, source.parent)):
        with monkeypatch.context() as patch:
            there = source if second == source.parent else moved
            other = moved if there == source else source
            during(patch, first, lambda there=there, other=other: there.exists() and there.rename(other))
            store.take(home, tmp_path / "tree")
        found = names(tmp_path / "tree")
        assert sum(name.endswith((source.name, moved.name)) for name in found) == 1, found
        if moved.exists():
            moved.rename(source)


def test_mailbox_that_never_stands_still_is_taken_with_all_that_was_seen(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [deliver(home, f"{number}.M.host") for number in range(100, 100 + store.LOOKS)]
    during(monkeypatch, home, *[lambda path=path: path.unlink() for path in paths])
    seen = store.take(home, tmp_path / "tree")
    assert {("Maildir", "1.M1.host"), ("Maildir/.Công văn.Đến", "2.M2.host")} <= seen.messages.keys()
    assert names(tmp_path / "tree") >= {path for path, _inode in seen.messages.values()}


def test_home_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.take(tmp_path / "nobody", tmp_path / "tree")


def test_only_mailboxes_are_homes(tmp_path: Path) -> None:
    for name in ("dl-01", ".backup", ".probe", ".restore"):
        (tmp_path / name).mkdir()
    (tmp_path / "last-login.db").write_text("")
    assert set(store.homes(tmp_path)) == {"dl-01"}


# --- the catalogue ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (b"A: b\n\nbody\n", b"body\n"),
        (b"A: b\r\n\r\nbody\r\nx\r\n", b"body\nx\n"),
        (b"A: b\n\n", b""),
        (b"A: b\n", b""),
        (b"A: b\n\na\rb\r", b"a\rb\r"),
        (b"A: b\n\n" + b"x" * (catalogue.BLOCK - 1) + b"\r\ny", b"x" * (catalogue.BLOCK - 1) + b"\ny"),
    ],
)
def test_body_hash_is_of_what_follows_the_first_empty_line(message: bytes, body: bytes) -> None:
    assert catalogue.body_hash(io.BytesIO(message))[1] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("=?utf-8?B?Q8O0bmcgdsSDbg==?= 12", "Công văn 12"),
        (b"C\xc3\xb4ng v\xc4\x83n".decode("ascii", "surrogateescape"), "Công văn"),
        ("folded\n  subject", "folded subject"),
        ("=?no-such?B?AAAA?=", "=?no-such?B?AAAA?="),
        (None, ""),
    ],
)
def test_header_fields_are_decoded(raw: str | None, text: str) -> None:
    assert catalogue.decoded(raw) == text


def test_catalogue_tells_of_each_message(home: Path, tmp_path: Path) -> None:
    tree, path = tmp_path / "tree", tmp_path / "dl-01.jsonl"
    text = "From: a@x.test\nTo: b@x.test\nSubject: Báo cáo\nMessage-ID: <1@x>\nDate: Thu, 26 Nov 2026\n\nKính gửi\n"
    found = deliver(home, "8.M8.host:2,Sa", text.encode(), folder=".Công văn.Đến", sub="cur")
    os.utime(found, (1_700_000_000, 1_700_000_000))
    (found.parents[1] / "dovecot-keywords").write_text("0 $Forwarded\n")
    (found.parents[1] / "dovecot-uidlist").write_text("3 V1 N9 Gabc\n7 W9 Gother-guid :8.M8.host\n")
    assert catalogue.write(path, "dl-01", "a@x.test", tree, store.take(home, tree))[0] == 3
    head, lines = catalogue.read(path)
    assert (head["id"], head["address"]) == ("dl-01", "a@x.test")
    line = next(line for line in lines if line["guid"] == "8.M8.host")
    assert line == {
        "folder": "Công văn/Đến",
        "guid": "8.M8.host",
        "flags": "S",
        "keywords": ["$Forwarded"],
        "octets": len(text.encode()),
        "received": 1_700_000_000,
        "date": "Thu, 26 Nov 2026",
        "from": "a@x.test",
        "to": "b@x.test",
        "subject": "Báo cáo",
        "message_id": "<1@x>",
        "body": hashlib.sha256("Kính gửi\n".encode()).hexdigest(),
        "uid": 7,
        "dovecot_guid": "other-guid",
        "file": "Maildir/.Công văn.Đến/cur/8.M8.host:2,Sa",
    }
    assert {line["folder"] for line in lines} == {"INBOX", "Công văn/Đến"}


def test_catalogue_of_an_unchanged_mailbox_is_left_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, path = tmp_path / "tree", tmp_path / "dl-01.jsonl"
    catalogue.write(path, "dl-01", "a@x.test", tree, store.take(home, tree))
    before = path.stat().st_ino
    monkeypatch.setattr(catalogue, "content", lambda path: pytest.fail(f"{path} was read again"))
    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "lines", lambda *_arguments: pytest.fail("it was not left alone"))
        catalogue.write(path, "dl-01", "a@x.test", tree, store.take(home, tree))
    catalogue.write(path, "dl-01", "a@x.test", tree, store.take(home, tree))
    assert path.stat().st_ino == before
    catalogue.write(path, "dl-01", "new@x.test", tree, store.take(home, tree))
    assert catalogue.read(path)[0]["address"] == "new@x.test"


# --- restic's words ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "output", "kind"),
    [
        (10, "Fatal: repository does not exist: unable to open config file", "gone"),
        (
            11,
            "unable to create lock in backend: repository is already locked exclusively by PID 9 on witness",
            "locked",
        ),
        (12, "Fatal: wrong password or no key found", "key"),
        (1, "Fatal: unable to save snapshot: unexpected HTTP response (507): 507 Insufficient Storage", "full"),
        (130, "Save(<lock/77>) returned error, retrying after 2s: unexpected HTTP response (507): 507", "full"),
        (1, "Save(<data/1>) failed: write /srv: no space left on device", "full"),
        (1, "Remove(<snapshot/d8>) failed: unexpected HTTP response (403): 403 Forbidden", "refused"),
        (1, "Fatal: unable to open config file: 401 Unauthorized", "refused"),
        (1, 'Fatal: Head "https://w:8000/": tls: failed to verify certificate: x509: signed by unknown', "certificate"),
        (1, "pack 4a contains 1 errors: [blob 1: ciphertext verification failed]", "damaged"),
        (1, "Fatal: repository contains errors", "damaged"),
        (1, "dial tcp 192.0.2.1:8000: connect: connection refused", "gone"),
        (3, "error: open /etc/x: permission denied", "incomplete"),
        (-9, "", "cut"),
        (1, "something else", "failed"),
    ],
)
def test_failure_is_told_in_one_sentence(code: int, output: str, kind: str) -> None:
    assert classify(code, output) == kind
    error = failure(REPOSITORY, code, output)
    assert (error.kind, str(error).count("\n")) == (kind, 0)
    assert REPOSITORY.shown in str(error) and str(error).endswith(".")


def test_sentence_has_the_words_of_a_json_answer() -> None:
    said = json.dumps(
        {"message_type": "exit_error", "code": 1, "message": "Fatal: the sky fell\nIs there a repository"}
    )
    assert "the sky fell" in str(failure(REPOSITORY, 1, said))
    assert set(SENTENCES) >= {"gone", "locked", "key", "full", "damaged", "cut"}


def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> Restic:
    """A restic that does as told, with a repository on the disk."""
    program = tmp_path / "restic"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr("mail_backup.restic.RESTIC", str(program))
    (tmp_path / "config").touch()
    return Restic(Repository("here", str(tmp_path), "/k"))


def test_full_server_is_not_asked_for_a_quarter_of_an_hour(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = "Save(<lock/77>) returned error, retrying after 2s: unexpected HTTP response (507): 507 Insufficient Storage"
    restic = fake(monkeypatch, tmp_path, f"trap 'exit 130' TERM\necho '{said}' >&2\nwhile :; do sleep 0.1; done")
    with pytest.raises(BackupError) as raised:
        restic.run("backup")
    assert raised.value.kind == "full"


def test_repository_that_nobody_answers_for_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackupError, match="is not there") as raised:
        Restic(Repository("here", str(tmp_path / "none"), "/k")).snapshots()
    assert raised.value.kind == "gone"
    monkeypatch.setattr("mail_backup.restic.ANSWER_SECONDS", 0)
    with pytest.raises(BackupError, match="does not answer"):
        Restic(Repository("there", "rest:http://127.0.0.1:9/mail/", "/k")).reach()


def test_no_secret_is_an_argument_or_in_the_environment(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("geheim")
    restic = Restic(Repository("w", "rest:https://w/mail/", str(tmp_path / "password"), "/etc/mail-backup/repository"))
    assert "geheim" not in " ".join([*restic.command("snapshots"), *restic.environment().values()])


# --- snapshots and their dates ----------------------------------------------------------------


def snapshot(hours: float, tag: str = "mail", host: str = "tinh.test", name: str = "") -> Snapshot:
    """One that is dated `hours` before NOW."""
    return Snapshot(name or f"{hours}{tag}{host}", NOW - timedelta(hours=hours), host, (tag,), (), {})


def test_moment_reads_what_restic_writes() -> None:
    assert moment("2026-11-26T19:00:00.123456789+07:00") == datetime(2026, 11, 26, 12, 0, 0, 123456, UTC)
    assert moment("2026-11-26T12:00:00Z") == NOW


def test_newest_of_a_moment() -> None:
    every = [snapshot(30), snapshot(20), snapshot(10)]
    assert newest(every) is every[2]
    assert newest(every, NOW - timedelta(hours=15)) is every[1]
    assert newest(every, NOW - timedelta(hours=40)) is None


def test_snapshot_dated_ahead_is_seen() -> None:
    every = [snapshot(5), snapshot(-0.5), snapshot(-2)]
    assert dated_ahead(every, NOW) == [every[2]]


def test_dates_that_cannot_be_true() -> None:
    """Ahead when it came in, also long ago; dated back by more than a first backup takes."""
    every = [snapshot(1, name="good"), snapshot(-5, name="ahead"), snapshot(0, name="was"), snapshot(900, name="back")]
    arrived = {"good": NOW, "ahead": NOW, "was": NOW - timedelta(hours=30), "back": NOW}
    told = server.wrong_dates(every, arrived, NOW)
    assert [text.split()[1] for text in told] == ["ahead", "was", "back"]
    assert "in the future" in told[0] and "in the future" in told[1] and "came in" in told[2]


@pytest.mark.parametrize("wrong", [-30.0, 900.0])
def test_nothing_is_removed_while_a_date_cannot_be_true(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: float
) -> None:
    row = {
        "id": "bad",
        "time": (datetime.now(UTC) - timedelta(hours=wrong)).isoformat(),
        "hostname": "h",
        "tags": ["mail"],
    }
    said = tmp_path / "said.json"
    said.write_text(json.dumps([row]))
    fake(monkeypatch, tmp_path, f'echo "$2" >> {tmp_path}/called; [ "$2" = snapshots ] && cat {said}; exit 0')
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "bad").touch()
    kept = Server("tinh.test", Repository("here", str(tmp_path), "/k"), str(tmp_path), keep={"within": "1d"}, cache="")
    with pytest.raises(BackupError, match="cannot be true"):
        server.prune(kept)
    assert (tmp_path / "called").read_text().split() == ["snapshots"]


def test_late_names_what_is_missing_or_old() -> None:
    kept = Server(
        "tinh.test",
        REPOSITORY,
        "/r",
        tags={"mail": ["tinh.test"], "directory": ["tinh.test"], "host": ["mail1", "mail2"]},
        max_age_hours={"mail": 14, "directory": 14, "host": 50},
    )
    every = [
        snapshot(20),
        snapshot(-9),
        snapshot(1, "directory"),
        snapshot(60, "host", "mail1"),
        snapshot(60, "host", "x"),
    ]
    told = server.late(kept, every, NOW)
    assert len(told) == 3
    assert "mail of tinh.test is 20 hours old" in told[0], "one that is dated ahead does not count"
    assert "host of mail1 is 60 hours old" in told[1] and "no backup of kind host of mail2" in told[2]


def test_old_locks_are_told() -> None:
    locks = [
        {"time": "2026-11-26T11:00:00Z", "hostname": "mail1", "pid": 1},
        {"time": "2026-11-26T01:00:00Z", "hostname": "mail2", "pid": 2},
    ]
    assert [text.split()[-3] for text in server.old_locks(locks, 6, NOW)] == ["mail2,"]


@pytest.mark.parametrize(
    ("used", "free", "reserve", "most", "may"),
    [(100, 900, 200, 0, 800), (100, 900, 200, 300, 300), (100, 900, 200, 5000, 800), (100, 50, 200, 0, 1)],
)
def test_repository_leaves_the_reserve_free(used: int, free: int, reserve: int, most: int, may: int) -> None:
    assert server.limit(used, free, reserve, most) == may


def test_only_kinds_of_within_are_kept_by() -> None:
    assert server.keep_arguments({"within": "14d", "within-daily": "2m"}) == [
        "--keep-within",
        "14d",
        "--keep-within-daily",
        "2m",
    ]
    for keep in ({"last": "3"}, {"daily": "7"}, {}):
        with pytest.raises(ValueError, match="within only"):
            server.keep_arguments(keep)


# --- settings and status ----------------------------------------------------------------------


def test_settings_are_read(tmp_path: Path) -> None:
    repository = {"name": "w", "shown": "rest:https://w/mail/", "password_file": "/k", "location_file": "/l"}
    path = tmp_path / "settings.json"
    path.write_text(
        json.dumps({"domain": "d", "host": "h", "repository": repository, "mail_root": "/m", "files": ["/e"]})
    )
    settings = load(path)
    assert (settings.tree, settings.files, settings.repository.password_file) == (Path("/m/.backup"), ("/e",), "/k")
    path.write_text(json.dumps({"domain": "d", "folder": "/r", "repository": repository, "further": [repository]}))
    assert load_server(path).further[0].options == ()
    path.write_text(json.dumps({"domain": "d", "host": "h", "repository": repository, "colour": 1}))
    with pytest.raises(TypeError, match="colour"):
        load(path)


def test_status_keeps_the_last_good_run(tmp_path: Path) -> None:
    status.note(tmp_path, "mail", {"ok": 1, "good": 100, "seconds": 1.5, "error": ""})
    status.note(tmp_path, "mail", {"ok": 0, "error": "gone"})
    assert status.read(tmp_path)["mail"] == {"good": 100, "ok": 0, "error": "gone"}
    assert 'mail_backup_good{kind="mail"} 100\n' in (tmp_path / "metrics.prom").read_text()
    assert "gone" not in (tmp_path / "metrics.prom").read_text()


def test_every_file_of_the_library_is_installed() -> None:
    listed = yaml.safe_load((ROLE / "vars/main.yml").read_text(encoding="utf-8"))
    folder = ROLE / "files/usr/local/lib/mail-backup/mail_backup"
    assert set(listed["__backup_modules"]) == {path.stem for path in folder.glob("*.py")}
    units = ROLE / "templates/etc/systemd/system"
    kinds = ("__backup_client_units", "__backup_holder_units", "__backup_server_units")
    named = {name for kind in kinds for name in listed[kind]}
    assert named == {str(path.relative_to(units)).removesuffix(".j2") for path in units.rglob("*.j2")}


# --- runs -------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A host with a repository that answers."""
    monkeypatch.setattr(commands, "check_clock", lambda settings: None)
    return Settings(
        "tinh.test", "mail1", Repository("here", str(tmp_path), "/k"), state=str(tmp_path), max_age_hours={"mail": 14}
    )


@pytest.mark.parametrize("holds", [True, False])
def test_tree_of_a_host_that_the_service_has_left_goes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, holds: bool
) -> None:
    settings = dataclasses.replace(settings, mail_root=str(tmp_path))
    monkeypatch.setattr(commands, "is_holder", lambda _settings: holds)
    commands.tidy(settings)
    (settings.tree / "mailboxes" / "dl-01").mkdir(parents=True)
    commands.tidy(settings)
    assert settings.tree.is_dir() == holds
    assert Path(settings.mail_root).is_dir()


def test_run_that_fails_is_noted_and_an_alarm_and_the_next_kind_goes_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_arguments: object) -> dict[str, Any]:
        raise BackupError("full", "It is full.")

    monkeypatch.setattr(commands, "RUNS", {"mail": refuse, "host": lambda *_arguments: {"files": 3}})
    restic = fake(monkeypatch, tmp_path, "exit 0")
    assert commands.run(settings, ["mail", "host"], restic) == 1
    noted = status.read(tmp_path)
    assert (noted["mail"]["ok"], noted["mail"]["error"], noted["mail"]["running"]) == (0, "It is full.", 0)
    assert noted["host"]["ok"] == 1 and noted["host"]["good"] and noted["host"]["files"] == 3
    alarms = {path.name: path.read_text() for path in (tmp_path / "alarms").iterdir()}
    assert alarms == {"backup-mail": "No backup of kind mail was made on mail1. It is full."}


@pytest.mark.parametrize(("hours", "wanted"), [(1.0, []), (8.0, ["mail"]), (-50.0, ["mail"])])
def test_takeover_backs_up_what_is_old(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, hours: float, wanted: list[str]
) -> None:
    """Whichever host made the last one; one from the future does not count."""
    made = datetime.now(UTC) - timedelta(hours=hours)
    restic = Restic(settings.repository)
    monkeypatch.setattr(restic, "snapshots", lambda kind: [Snapshot("1", made, "tinh.test", (kind,), (), {})])
    assert commands.due(settings, ["mail"], restic) == wanted


# --- what the role's filters make -------------------------------------------------------------


def test_hash_is_the_one_that_htpasswd_makes() -> None:
    """Line of `htpasswd -nbs mail abcdefgh`."""
    assert htpasswd_hash("abcdefgh") == "{SHA}QlrxKgdDUCsyLpOgFbz4aOMk1Wo="


def test_further_repositories_have_files_of_their_own() -> None:
    files = further_backup_files([{"name": "xa", "url": "s3:https://s3.test/b", "environment": {"B": "2", "A": "1"}}])
    assert {file["path"].rpartition("/")[2]: file["content"] for file in files} == {
        "xa.location": "s3:https://s3.test/b",
        "xa.environment": "A=1\nB=2",
    }
    assert {file["mode"] for file in files} == {"0600"}


def test_table_says_what_failed() -> None:
    entries = {"mail": {"ok": 0, "good": 0, "error": "It is full."}, "host": {"running": 1, "done": 1, "of": 4}}
    assert backup_table(entries, "mail1") == [
        "mail1 host: never good, running: 25 %",
        "mail1 mail: last good 1970-01-01 00:00 UTC, LAST RUN FAILED: It is full.",
    ]
