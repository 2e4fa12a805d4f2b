"""What was deleted comes back: message, folder, mailbox, directory, a host's files; and the rehearsal tells when not.

While mail goes in and out. Everything is compared by the hash of its body, and each case is a row of
build/restore.json. tests/recovery.py has the case of a whole province.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import ldap3
import pytest
from faults import Hosts
from imapclient import IMAPClient
from load import Load
from playbook import Province
from service import OUTSIDER, Mailbox, ManageSieve, Service, letter, wait

RESULTS = Path(__file__).resolve().parents[2] / "build" / "restore.json"
FOLDERS = ("INBOX", "Lưu trữ", "Lưu trữ/Năm 2026", "Công văn đến")
EACH = 15  # messages in each folder
GROUNDS = "Phiếu yêu cầu 12/PYC"
GONE = "Khôi phục"  # begins the folder of what is not put in place
SIEVE = 'require "fileinto";\nif header :contains "subject" "khẩn" { fileinto "Lưu trữ"; }\n'


class Seen(NamedTuple):
    """A message as a mail program sees it: hash of its body, flags and keywords, time of arrival."""

    body: str
    flags: frozenset[bytes]
    received: datetime


Content = dict[str, dict[str, Seen]]
"""Folder → Message-ID, that of a second copy with #2 → message."""


def content(box: Mailbox) -> Content:
    """What a mailbox holds, over IMAP."""
    found: Content = {}
    with box.imap() as client:
        for marks, _separator, folder in client.list_folders():
            if folder.startswith("Units/") or {b"\\NoSelect", b"\\Noselect", b"\\NonExistent"} & set(marks):
                continue
            client.select_folder(folder, readonly=True)
            found[folder] = {}
            for item in client.fetch(client.search(), ["BODY.PEEK[]", "FLAGS", "INTERNALDATE"]).values():
                head, _empty, body = item[b"BODY[]"].partition(b"\r\n\r\n")
                name = re.search(rb"(?im)^message-id: *(<[^>]+>)", head)
                assert name, head
                digest = hashlib.sha256(body.replace(b"\r\n", b"\n")).hexdigest()
                flags = frozenset(item[b"FLAGS"]) - {b"\\Recent"}
                key = name[1].decode()
                copies = sum(other.partition("#")[0] == key for other in found[folder])
                found[folder][f"{key}#{copies + 1}" if copies else key] = Seen(digest, flags, item[b"INTERNALDATE"])
    return found


def write(box: Mailbox, client: IMAPClient, folder: str, number: int) -> None:
    """Put a message into a folder as a mail program does, with flags and a time of arrival of its own."""
    message = letter(OUTSIDER, box.address, "Báo cáo", f"Kính gửi {folder},\nsố {number}.\n" + "Nội dung.\n" * number)
    flags = [b"\\Seen", b"\\Flagged", b"$Khan"] if number % 3 == 0 else [b"\\Seen"] if number % 3 == 1 else []
    client.append(folder, message.as_bytes(), flags, datetime(2026, 1, 1 + number, 8, tzinfo=UTC))


class Saved:
    """A mailbox full of mail that is in the newest snapshot, and the hosts that it is on."""

    def __init__(self, hosts: Hosts, box: Mailbox) -> None:
        self.hosts, self.box, self.at = hosts, box, ""
        with box.imap() as client:
            for folder in FOLDERS:
                if folder != "INBOX":
                    client.create_folder(folder)
                    client.subscribe_folder(folder)
                for number in range(EACH):
                    write(box, client, folder, number)
        with ManageSieve(hosts.service, hosts.service.address) as sieve:
            sieve.starttls()
            assert sieve.login(box.address, box.password) and sieve.activate(SIEVE)[0] == "OK"
        self.before = content(box)

    def back_up(self) -> None:
        """Make a snapshot, which is what the restores mean: one by the timer may come at any time."""
        done = self.hosts.attempt(self.holder, "mail-backup run mail directory")
        assert done.returncode == 0, done.stderr
        self.at = datetime.now(UTC).isoformat()  # no rounding: the snapshot may be of this second

    @property
    def holder(self) -> str:
        """The host that serves now."""
        return self.hosts.active()

    @property
    def id(self) -> str:
        """The mailbox's name in the store."""
        return self.box.address.partition("@")[0]

    def call(self, what: str, *, grounds: str = GROUNDS, **options: object) -> tuple[int, dict[str, Any], str]:
        """Run mail-restore on the holder; exit code, what it printed, and its sentence."""
        words = ["mail-restore", what, "--grounds", grounds, "--by", "test"]
        for name, value in ({"at": self.at} | options).items():
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        done = self.hosts.attempt(self.holder, shlex.join(words))
        lines = done.stdout.splitlines()
        return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr.strip()

    def restore(self, what: str, case: str, expected: Content, newer: Content | None = None, **options: object) -> None:
        """Restore in place, compare with what is expected and with what came meanwhile, note the row."""
        began = time.monotonic()
        code, told, said = self.call(what, mailbox=self.box.address, into="place", **options)
        seconds = time.monotonic() - began
        assert code == 0, said
        now = content(self.box)
        row = compare(case, expected, newer or {}, now, seconds)
        assert not any("#" in name for some in now.values() for name in some), "something is there twice"
        assert row["missing"] == row["changed"] == row["overwritten_newer"] == 0, (row, told)
        # Both hosts, and nothing of it goes again.
        equal = f"mail-compare {self.box.address}"
        wait("both hosts are equal", lambda: self.hosts.attempt(self.holder, equal).returncode == 0, 30)
        assert self.hosts.attempt(self.holder, f"mail-sync user {self.box.address}").returncode == 0
        assert compare("", expected, newer or {}, content(self.box), 0)["missing"] == 0, "a later sync took it away"
        assert self.call(what, mailbox=self.box.address, into="place", **options)[1]["restored"] == 0, "it came twice"


def compare(case: str, expected: Content, newer: Content, now: Content, seconds: float) -> dict[str, Any]:
    """The row of build/restore.json."""
    wanted = {(folder, name): seen for folder, some in expected.items() for name, seen in some.items()}
    later = {(folder, name): seen for folder, some in newer.items() for name, seen in some.items()}
    there = {(folder, name): seen for folder, some in now.items() for name, seen in some.items()}
    row = {
        "case": case,
        "expected": len(wanted),
        "missing": len(wanted.keys() - there.keys()),
        "changed": sum(there[key] != seen for key, seen in wanted.items() if key in there),
        "overwritten_newer": sum(there.get(key) != seen for key, seen in later.items()),
        "seconds": round(seconds, 1),
    }
    if case:
        record(row)
    return row


def record(row: dict[str, Any]) -> None:
    """Put a row into build/restore.json in the place of an older one of the same case."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    rows = [one for one in rows if one["case"] != row["case"]] + [row]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    fresh = RESULTS.with_suffix(".new")
    fresh.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(RESULTS)


def only(whole: Content, keep: Callable[[str, str], bool]) -> Content:
    """Those messages of which `keep` says so by folder and Message-ID."""
    return {folder: {n: seen for n, seen in some.items() if keep(folder, n)} for folder, some in whole.items()}


def delete(box: Mailbox, folder: str, names: set[str] | None = None) -> None:
    """Expunge messages of a folder, all of them when none are named."""
    with box.imap() as client:
        client.select_folder(folder)
        for name in names or [""]:
            if uids := client.search(["HEADER", "Message-ID", name] if name else ["ALL"]):
                client.delete_messages(uids)
        client.expunge()


@pytest.fixture(scope="module")
def saved(service: Service) -> Iterator[Saved]:
    """A mailbox and a snapshot with it, while mail goes in and out; none of that may be lost either."""
    hosts = Hosts(service)
    with ExitStack() as stack:
        box = stack.enter_context(service.new_mailbox())
        load = stack.enter_context(Load(service, rate=2, recipients=4, readers=1))
        found = Saved(hosts, box)
        found.back_up()
        yield found
        load.stop()
        outcome = load.outcome(60)
        assert load.acknowledged and not outcome.missing, outcome
        load.clean()


# --- mail ------------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("DL-6.7", "CT-6.2", "HT-4.1a")
def test_a_deleted_message_comes_back(saved: Saved) -> None:
    """Found by what its owner remembers, and put where it was, with flags and time of arrival."""
    name = sorted(saved.before["Công văn đến"])[0]
    delete(saved.box, "Công văn đến", {name})
    code, told, said = saved.call("find", mailbox=saved.box.address, sender=OUTSIDER, subject="báo cáo")
    assert code == 0 and told["found"] == EACH * len(FOLDERS), (told["found"], said)
    saved.restore("message", "a message", only(saved.before, lambda folder, _name: folder in FOLDERS), message=name)


def test_a_deleted_folder_comes_back(saved: Saved) -> None:
    """With the one below it, subscribed or not."""
    with saved.box.imap() as client:
        for folder in ("Lưu trữ/Năm 2026", "Lưu trữ"):
            client.delete_folder(folder)
    assert "Lưu trữ" not in content(saved.box)
    saved.restore("folder", "a folder", saved.before, folder="Lưu trữ")


@pytest.mark.requirement("DL-6.7", "CT-6.2", "HT-4.1a")
def test_an_emptied_mailbox_comes_back(saved: Saved) -> None:
    """And what came since, was moved or marked since, is as its owner left it."""
    box = saved.box
    kept = sorted(saved.before["INBOX"])[0]
    with box.imap() as client:
        client.select_folder("INBOX")
        client.move(client.search(["HEADER", "Message-ID", kept]), "Công văn đến")
        client.select_folder("Công văn đến")
        client.set_flags(client.search(["HEADER", "Message-ID", kept]), [b"\\Answered"])
        for folder in ("Lưu trữ/Năm 2026", "Lưu trữ"):
            client.delete_folder(folder)
    delete(box, "INBOX")
    delete(box, "Công văn đến", set(saved.before["Công văn đến"]))
    new = box.service.send(letter(OUTSIDER, box.address), box.address, box.service.address)
    with box.imap() as client:
        wait("new mail", lambda: box.has(client, new))
        with ManageSieve(box.service, box.service.address) as sieve:
            sieve.starttls()
            assert sieve.login(box.address, box.password)
            assert sieve.command(b'SETACTIVE ""')[0] == sieve.command(b'DELETESCRIPT "thu"')[0] == "OK"
    newer = only(content(box), lambda _folder, name: name in (new, kept))
    assert sum(map(len, newer.values())) == 2
    saved.restore("unit", "a unit's mailbox", only(saved.before, lambda _folder, name: name != kept), newer)
    listed = saved.hosts.run(saved.holder, f"doveadm sieve list -u {box.address}")
    assert "thu ACTIVE" in listed, listed
    with box.imap() as client:
        assert set(FOLDERS[1:]) <= {folder for _flags, _separator, folder in client.list_sub_folders()}


def test_a_mailbox_as_of_a_time_comes_into_a_folder(saved: Saved, lab: dict[str, Any], tmp_path: Path) -> None:
    """By the operator's playbook: beside what is there, under the time; the grounds are on record before and after."""
    grounds = f"CV {time.time_ns()}/STC"
    began = time.monotonic()
    given = {"what": "mailbox", "mailbox": saved.box.address, "at": saved.at, "grounds": grounds}
    asked = ["-e", json.dumps(given)]
    run = Province(lab, tmp_path).run("restore.yml", *asked)
    seconds = time.monotonic() - began
    assert run.status == 0, run.output
    now = content(saved.box)
    below = {folder.partition("/")[2]: some for folder, some in now.items() if folder.startswith(f"{GONE} ")}
    row = compare("a mailbox into a folder", saved.before, {}, below, seconds)
    assert row["missing"] == row["changed"] == 0, row
    decisions = saved.hosts.run(saved.holder, f"slapcat -o ldif-wrap=no -b ou=decisions,{saved.hosts.service.base}")
    named = re.findall(r"^cn: (\S+-restore-\S+)$", decisions, re.MULTILINE)
    assert named and f"{named[-1]}" == f"{named[-2]}-done", named[-2:]


def test_a_mailbox_of_both_hosts_is_the_same_afterwards(saved: Saved) -> None:
    """Message by message, as the kit's own comparison of the two copies says."""
    done = saved.hosts.attempt(saved.holder, f"mail-compare {saved.box.address}")
    assert done.returncode == 0, done.stdout + done.stderr


# --- directory and host ----------------------------------------------------------------------------------------------


def test_a_directory_that_was_changed_by_hand_is_put_right(saved: Saved, service: Service) -> None:
    """An entry that was deleted, with its password, and one that was changed; a later entry stays."""
    with service.new_mailbox(telephoneNumber="0262 1") as lost, service.new_mailbox(telephoneNumber="0262 2") as spoilt:
        saved.back_up()
        with service.new_mailbox() as later:
            with service.ldap_admin() as admin:
                admin.delete(lost.dn)
            service.modify(spoilt.dn, telephoneNumber="0")
            began = time.monotonic()
            code, plan, said = saved.call("directory", dry_run=True)
            assert code == 0 and plan["number"] == 2, (plan, said)
            code, told, said = saved.call("directory")
            assert code == 0 and told["done"] == 2 and not told["refused"], (told, said)
            seconds = time.monotonic() - began
            with service.ldap_admin() as admin:
                found = {}
                for box in (lost, spoilt, later):
                    admin.search(box.dn, "(objectClass=*)", ldap3.BASE, attributes=["telephoneNumber"])
                    found[box.dn] = str(admin.entries[0].telephoneNumber) if admin.entries else None
            wanted = {lost.dn: "0262 1", spoilt.dn: "0262 2"}
            row = {"case": "the directory", "expected": len(wanted)}
            row["missing"] = sum(found[dn] is None for dn in wanted)
            row["changed"] = sum(found[dn] not in (None, value) for dn, value in wanted.items())
            record({**row, "overwritten_newer": int(found[later.dn] is None), "seconds": round(seconds, 1)})
            assert found | wanted == found and found[later.dn] is not None, found
            with lost.imap():
                pass


def test_a_hosts_files_come_back(saved: Saved, service: Service) -> None:
    """On the third host, which has no directory: what was lost and what was changed, and nothing else."""
    host = service.in_group("backup")[0]
    run = saved.hosts.run
    run(host, "mail-backup run host")
    names = run(host, "find /etc/ssl/hopthu -type f -name '*.pem' ! -name 'ca.pem' | sort").split()
    before = run(host, f"sha256sum {' '.join(names)}; stat -c '%n %U %G %a' {' '.join(names)}")
    run(host, f"mv {names[0]} /root/kept.pem; echo x >> /var/lib/hopthu/secrets.fingerprint")
    try:
        began = time.monotonic()
        words = f"mail-restore host --path /etc/ssl/hopthu --by test --grounds '{GROUNDS}'"
        told = json.loads(run(host, words).splitlines()[-1])
        seconds = time.monotonic() - began
        after = run(host, f"sha256sum {' '.join(names)}; stat -c '%n %U %G %a' {' '.join(names)}")
    finally:
        run(host, f"test -e {names[0]} || mv /root/kept.pem {names[0]}; rm -f /root/kept.pem")
    missing = len(names) - after.count("  /etc/ssl/hopthu")
    row = {"case": "a host's files", "expected": len(names), "missing": missing, "changed": int(after != before)}
    record({**row, "overwritten_newer": 0, "seconds": round(seconds, 1)})
    assert told["restored"] == 1 and after == before, (told, before, after)
    assert run(host, "tail -c 2 /var/lib/hopthu/secrets.fingerprint") == "x\n", "what was not asked for was changed"
    run(host, f"mail-restore host --path /var/lib/hopthu --by test --grounds '{GROUNDS}'")
    assert run(host, "tail -c 2 /var/lib/hopthu/secrets.fingerprint") != "x\n"


# --- rehearsal -------------------------------------------------------------------------------------------------------

# A snapshot of the link tree without one of its messages, as a fault of the disk or of the program would make it.
SPOIL = """
import sys
sys.path.insert(0, "/usr/local/lib/mail-backup")
from pathlib import Path
from mail_backup.commands import client
from mail_backup.settings import load
settings = load()
home = Path(settings.mail_root, ".backup", "mailboxes", sys.argv[1])
next(path for path in sorted(home.glob("Maildir/.*/cur/*"))).unlink()
client(settings).backup("mail", settings.domain, ["mailboxes", "catalogue", "manifest.json"],
    cwd=Path(settings.mail_root, ".backup"), unchanging=True)
"""


@pytest.mark.requirement("DL-6.7", "CT-6.2", "HT-4.1a", "N-QCVN12", "N-116-10")
def test_the_rehearsal_passes_and_fails_when_it_should(saved: Saved) -> None:
    hosts, holder = saved.hosts, saved.holder
    saved.back_up()
    good = hosts.attempt(holder, f"mail-rehearse --mailboxes 4 --mailbox {saved.id}")
    told = json.loads(good.stdout.splitlines()[-1])
    assert good.returncode == 0, told
    assert told["messages"] >= EACH * len(FOLDERS) and told["entries"] > 50 and told["files"] > 5, told
    row = {"case": "rehearsal", "expected": told["messages"], "missing": told["faults"], "changed": 0}
    record({**row, "overwritten_newer": 0, "seconds": told["seconds"]})
    began = time.time()
    hosts.run(holder, f"python3 -c {shlex.quote(SPOIL)} {saved.id}")
    try:
        bad = hosts.attempt(holder, f"mail-rehearse --mailboxes 1 --mailbox {saved.id}")
        told = json.loads(bad.stdout.splitlines()[-1])
        assert bad.returncode == 1 and any("not in the snapshot" in fault for fault in told["list"]), told
        wait("the alarm", lambda: hosts.service.journal(holder, began, r"rehearsal: .*not in the snapshot"))
        assert 'mail_backup_ok{kind="rehearsal"} 0' in hosts.run(holder, "cat /var/lib/mail-backup/metrics.prom")
    finally:
        hosts.run(holder, "mail-backup run mail")
    unit = hosts.attempt(holder, "systemctl start mail-rehearse.service")
    assert unit.returncode == 0, hosts.run(holder, "journalctl -u mail-rehearse -n 20 -o cat")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_refused_before_anything_is_touched(saved: Saved) -> None:
    """Each in one sentence with the way out."""
    box, hosts, holder = saved.box, saved.hosts, saved.holder
    now = Counter({folder: len(some) for folder, some in content(box).items()})
    name = sorted(saved.before["INBOX"])[1]
    one: dict[str, Any] = {"mailbox": box.address, "message": name}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("mailbox", {"mailbox": box.address, "at": "2001-01-01"}, r"no snapshot .*the oldest is of"),
        ("mailbox", {"mailbox": f"khong-co@{hosts.service.domain}"}, r"no mailbox khong-co"),
        ("mailbox", {"mailbox": box.address, "grounds": " "}, r"No grounds are given"),
        ("message", {"mailbox": box.address, "message": "<khong@co>"}, r"has no such message"),
        ("folder", {"mailbox": box.address, "folder": "Không có"}, r"has no such folder"),
        ("mailbox", {"mailbox": box.address, "at": "hôm qua"}, r"is no time"),
        ("find", {"mailbox": box.address}, r"Nothing is looked for"),
        ("all", {"at": ""}, r"No time is given"),
    ]
    for what, options, sentence in cases:
        code, _told, said = saved.call(what, **options)
        assert code == 2 and re.search(sentence, said) and said.count("\n") == 0, (what, options, said)
    # No room: the area for what is on its way is a disk of its own now, and a small one.
    delete(box, "INBOX", {name})
    place = "/srv/vmail/.restore"
    hosts.run(holder, f"mkdir -p {place} && mount -t tmpfs -o size=4k tmpfs {place}")
    try:
        code, _told, said = saved.call("mailbox", mailbox=box.address)
        assert code == 2 and "not enough space" in said, said
    finally:
        hosts.run(holder, f"umount {place}")
    # A key that is not the repository's.
    hosts.run(holder, "cp -a /etc/mail-backup/password /root/kept && echo wrong > /etc/mail-backup/password")
    try:
        code, _told, said = saved.call("message", into="place", **one)
        assert code == 2 and "cannot be opened with this host's key" in said, said
    finally:
        hosts.run(holder, "cp -a /root/kept /etc/mail-backup/password && rm /root/kept")
    left = Counter({folder: len(some) for folder, some in content(box).items()})
    assert left == now - Counter({"INBOX": 1}), "something was touched"
    assert saved.call("message", into="place", **one)[0] == 0


def test_the_other_host_refuses(saved: Saved) -> None:
    """One host restores: the one that serves."""
    words = f"mail-restore mailbox --mailbox {saved.box.address} --grounds '{GROUNDS}'"
    done = saved.hosts.attempt(saved.hosts.standby(), words)
    assert done.returncode == 2 and "does not hold the service" in done.stderr, done.stderr
