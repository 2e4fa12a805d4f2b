"""Backups: whole and readable, out of an intruder's reach, and whatever is wrong with them is seen and alarmed."""

from __future__ import annotations

import functools
import hashlib
import json
import secrets
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from faults import Hosts
from passlib.hash import ldap_sha1
from service import OUTSIDER, Mailbox, Service, letter, wait

SETTINGS, SERVER = "/etc/mail-backup/settings.json", "/etc/mail-backup/server.json"
HOST_RUN, MAIL_RUN, REST = "mail-backup-host.service", "mail-backup.service", "restic-rest-server.service"
REPOSITORY = "/srv/backup/mail"
# On a mail host, with that host's own credentials.
BACKUP = (
    "RESTIC_REPOSITORY_FILE=/etc/mail-backup/repository RESTIC_PASSWORD_FILE=/etc/mail-backup/password"
    " RESTIC_CACERT=/etc/ssl/hopthu/ca.pem restic --no-cache backup --tag mail"
)
LIBRARY = "import sys; sys.path.insert(0, '/usr/local/lib/mail-backup')\n"
# On a host: the newest snapshot of a kind, and files of it by their ends, read through the library.
READ = f"""{LIBRARY}
import json
from mail_backup.commands import client
from mail_backup.settings import load
go = json.load(sys.stdin)
restic = client(load())
found = restic.snapshot(go["tag"], go["host"])
names = [node["path"] for node in restic.files(found.id)]
texts = {{}}
for path in names:
    if path.endswith(tuple(go["ends"])):
        with restic.dump(found.id, path) as file:
            texts[path] = file.read().decode("utf-8", "replace")
print(json.dumps({{"id": found.id, "names": names, "texts": texts}}))
"""
# As an intruder with root on a mail host: everything that host's own credentials could do to an old snapshot.
INTRUDE = """
import base64, json, ssl, subprocess, sys, urllib.error, urllib.parse, urllib.request
go = json.load(sys.stdin)
url = urllib.parse.urlsplit(open("/etc/mail-backup/repository").read().strip().removeprefix("rest:"))
base = f"https://{url.hostname}:{url.port}{url.path}"
trust = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile="/etc/ssl/hopthu/ca.pem"))
opener = urllib.request.build_opener(trust)
login = base64.b64encode(f"{url.username}:{url.password}".encode()).decode()
opener.addheaders = [("Authorization", f"Basic {login}")]
answers = {}
def ask(method, path, data=None):
    try:
        answers[f"{method} {path}"] = opener.open(urllib.request.Request(base + path, data, method=method)).status
    except urllib.error.HTTPError as error:
        answers[f"{method} {path}"] = error.code
ask("HEAD", "config")
for path in go["paths"]:
    ask("DELETE", path)
    ask("POST", path, b"nothing")
ask("DELETE", "config")
ask("POST", "config", b"nothing")
ask("DELETE", "")
ask("DELETE", "data/")
own = "/etc/mail-backup/"
environment = {"RESTIC_REPOSITORY_FILE": own + "repository", "RESTIC_PASSWORD_FILE": own + "password",
    "RESTIC_CACERT": "/etc/ssl/hopthu/ca.pem", "PATH": "/usr/bin:/bin"}
def restic(*arguments):
    subprocess.run(["restic", "--no-cache", *arguments], env=environment, capture_output=True, check=False, timeout=90)
restic("forget", go["snapshot"])
restic("forget", "--keep-last", "1", "--group-by", "", "--unsafe-allow-remove-all", "--prune")
restic("prune", "--max-unused", "0")
restic("tag", "--set", "gone", go["snapshot"])
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Backups:
    """The lab's backups: who makes them, who keeps them."""

    service: Service
    holder: str
    keeper: str

    def start(self, host: str, unit: str) -> bool:
        """Start a run and wait for its end; whether it was well."""
        return bool(self.service.inside(host).run(f"systemctl start {unit}").rc == 0)

    def status(self, host: str, kind: str) -> dict[str, Any]:
        """What a host knows of its last run of a kind."""
        found: dict[str, Any] = json.loads(self.service.run(host, "mail-backup status"))[kind]
        return found

    def read(self, tag: str, host: str, *ends: str) -> dict[str, Any]:
        """Id, names and some texts of the newest snapshot of a kind, read on the holder with the host's own key."""
        with self.service.python(self.holder, READ) as process:
            output, _ = process.communicate(json.dumps({"tag": tag, "host": host, "ends": ends}))
        found: dict[str, Any] = json.loads(output)
        return found

    def alarmed(self, host: str, since: float, name: str, words: str) -> None:
        """Wait for an alarm on a host that is called `name` and matches `words`."""
        pattern = f"^{name}: .*({words})"
        wait(f"alarm {name} on {host}: {words}", lambda: self.service.journal(host, since, pattern))

    @contextmanager
    def changed(self, host: str, path: str, **values: object) -> Iterator[None]:
        """Other values in a JSON file of settings, for a time."""
        old = self.service.run(host, f"cat {path}")
        new = json.dumps(json.loads(old) | values)
        try:
            self.service.run(host, f"printf %s {shlex.quote(new)} > {path}")
            yield
        finally:
            self.service.run(host, f"printf '%s\\n' {shlex.quote(old)} > {path}")

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Afterwards no failed run is left, and none that starts by itself."""
        try:
            yield
        finally:
            for host, units in ((self.holder, HOST_RUN), (self.keeper, "backup-check backup-prune backup-copy")):
                stop = f"systemctl stop {HOST_RUN}; " if host == self.holder else ""
                self.service.run(host, f"{stop}systemctl reset-failed {units} 2>/dev/null || true")


@pytest.fixture(scope="module")
def backups(service: Service) -> Backups:
    """The lab's backups."""
    return Backups(service, Hosts(service).active(), service.in_group("backup")[0])


@pytest.fixture(scope="module")
def full_mailbox(service: Service) -> Iterator[Mailbox]:
    """A mailbox with mail in several folders, read, flagged and moved."""
    with service.new_mailbox() as box:
        for _number in range(3):
            service.send(letter(OUTSIDER, box.address, text="Kính gửi Ủy ban.\n"), box.address, service.address)
        with box.imap() as client:
            client.create_folder("Công văn/Đến")
            for number in range(4):
                text = letter(OUTSIDER, box.address, text=f"Văn bản số {number}.\n" * (number + 1)).as_bytes()
                client.append("Công văn/Đến", text, flags=[b"\\Seen"] if number % 2 else [])
            client.select_folder("INBOX")
            uids = wait("the mail is there", lambda: found if len(found := client.search()) == 3 else None)
            client.add_flags(uids[:1], [b"\\Flagged", b"\\Seen", b"$ChuyenTiep"])
            client.move(uids[1:2], "Công văn/Đến")
        yield box


@pytest.fixture(scope="module")
def taken(backups: Backups, full_mailbox: Mailbox) -> Mailbox:
    """The same, after a backup of mail and directory, and of the host's own files."""
    for unit in (MAIL_RUN, HOST_RUN):
        assert backups.start(backups.holder, unit), backups.service.run(backups.holder, f"journalctl -n 20 -u {unit}")
    return full_mailbox


def test_backup_has_every_message_of_a_mailbox(backups: Backups, taken: Mailbox) -> None:
    """By the hash of its body, with its folder and flags, in the catalogue and in the files themselves."""
    identifier = taken.address.split("@")[0]
    end = f"/catalogue/{identifier}.jsonl"
    found = backups.read("mail", backups.service.domain, end, "/manifest.json")
    lines = [json.loads(line) for line in found["texts"][end].splitlines()]
    expected = []
    with taken.imap() as client:
        for folder in ("INBOX", "Công văn/Đến"):
            client.select_folder(folder, readonly=True)
            for data in client.fetch(client.search(), ["BODY.PEEK[TEXT]", "FLAGS"]).values():
                body = data[b"BODY[TEXT]"].replace(b"\r\n", b"\n")
                flags = {flag.decode().strip("\\") for flag in data[b"FLAGS"]} - {"Recent"}
                expected.append((folder, hashlib.sha256(body).hexdigest(), sorted(flags)))
    letters = {"S": "Seen", "F": "Flagged", "R": "Answered"}
    catalogued = [
        (line["folder"], line["body"], sorted([letters[one] for one in line["flags"]] + line["keywords"]))
        for line in lines[1:]
    ]
    assert (lines[0]["id"], lines[0]["address"], len(expected)) == (identifier, taken.address, 7)
    assert sorted(catalogued) == sorted(expected)
    paths = [f"/mailboxes/{identifier}/{line['file']}" for line in lines[1:]]
    assert set(paths) <= set(found["names"])
    files = backups.read("mail", backups.service.domain, *paths)["texts"]
    assert {hashlib.sha256(text.split("\n\n", 1)[1].encode()).hexdigest() for text in files.values()} == {
        line["body"] for line in lines[1:]
    }
    manifest = json.loads(found["texts"]["/manifest.json"])
    assert manifest["mailboxes"] > 1 and manifest["messages"] >= 7


def test_backup_has_the_directory_with_its_configuration(backups: Backups, taken: Mailbox) -> None:
    texts = backups.read("directory", backups.service.domain, ".ldif")["texts"]
    entry = texts["/directory/data.ldif"].split(f"dn: {taken.dn}\n")[1].split("\n\n")[0]
    assert "entryUUID: " in entry and "entryCSN: " in entry and "userPassword:: " in entry
    assert "ou=decisions," in texts["/directory/data.ldif"]
    assert "olcDatabase={0}config" in texts["/directory/config.ldif"]


def test_backup_has_what_makes_a_host_this_host(backups: Backups, taken: Mailbox) -> None:
    names = backups.read("host", backups.holder)["names"]
    for path in (
        "/etc/ssl/hopthu/key.pem",
        "/etc/rspamd/dkim/",
        "/var/lib/rspamd/",
        "/var/lib/valkey/",
        "/var/lib/hopthu/",
    ):
        assert [name for name in names if name.startswith(path)], f"{path} is in no backup"


def test_only_the_holder_backs_mail_up(backups: Backups, taken: Mailbox) -> None:
    """And under one name, so that a takeover goes on with the same series."""
    for host in set(backups.service.in_group("mailstore")) - {backups.holder}:
        refused = backups.service.inside(host).run("mail-backup run mail")
        assert refused.rc == 2 and "host that holds the service" in refused.stderr


def kept(backups: Backups) -> str:
    """Name, size and content of everything but the locks in the repository."""
    command = f"cd {REPOSITORY} && find . -path ./locks -prune -o -type f -print0 | sort -z | xargs -0 sha256sum"
    return backups.service.run(backups.keeper, command)


@pytest.mark.requirement("DL-6.7", "CT-6.2", "HT-4.1a", "N-14423", "N-QCVN12")
def test_intruder_on_a_mail_host_cannot_undo_a_backup(backups: Backups, taken: Mailbox) -> None:
    """With root there, and so with every password there: what was in the repository is in it afterwards, unchanged."""
    before = kept(backups)
    snapshot = backups.status(backups.holder, "mail")["snapshot"]
    names = [line.split("  ./")[1] for line in before.splitlines()]
    pack = next(name for name in names if name.startswith("data/")).rpartition("/")[2]
    others = [name for name in names if name.startswith(("index/", "keys/"))][:2]
    go = {"snapshot": snapshot, "paths": [f"snapshots/{snapshot}", f"data/{pack}", *others]}
    with backups.service.python(backups.holder, INTRUDE) as process:
        output, _ = process.communicate(json.dumps(go))
    answers = json.loads(output)
    assert answers.pop("HEAD config") == 200, "the intruder could not even log in"
    assert {answer for answer in answers.values()} <= {403, 404, 405}, answers
    after = kept(backups).splitlines()
    assert set(before.splitlines()) <= set(after), "something old is gone or another"
    assert backups.read("mail", backups.service.domain)["id"] == snapshot


# --- a further repository, and what is old

SECOND = "/srv/thu-second"
SECOND_URL = "rest:http://127.0.0.1:8100/"
SECOND_UNIT = "thu-second.service"


@contextmanager
def second_server(backups: Backups) -> Iterator[None]:
    """Another REST server with a login of its own, as another site has it; its disk is empty at first."""
    login, run = secrets.token_hex(8), functools.partial(backups.service.run, backups.keeper)
    line = f"thu:{ldap_sha1.hash(login)}"
    run(f"install -d -o restic-rest-server -m 0700 {SECOND}; printf '%s\n' {shlex.quote(line)} > {SECOND}.htpasswd")
    run(f"printf %s {SECOND_URL.replace('//', f'//thu:{login}@')} > {SECOND}.location; : > {SECOND}.environment")
    command = f"/usr/bin/restic-rest-server --listen 127.0.0.1:8100 --path {SECOND} --htpasswd-file {SECOND}.htpasswd"
    run(f"systemd-run --quiet --unit {SECOND_UNIT} -p User=restic-rest-server {command}")
    try:
        wait("the second server", lambda: "8100" in run("ss -Hlnt 'sport = :8100'"))
        yield
    finally:
        run(f"systemctl stop {SECOND_UNIT} 2>/dev/null; rm -rf {SECOND} {SECOND}.*")


def in_second(backups: Backups, *arguments: str) -> str:
    """Output of restic on the second repository, by its own way in and with the key of the first."""
    environment = f"RESTIC_REPOSITORY_FILE={SECOND}.location RESTIC_PASSWORD_FILE=/etc/mail-backup/password"
    return backups.service.run(backups.keeper, f"{environment} restic --no-cache --no-lock {shlex.join(arguments)}")


@pytest.mark.requirement("N-14423")
def test_second_place_gets_everything_and_its_absence_is_alarmed(backups: Backups, taken: Mailbox) -> None:
    """Encrypted by the same key, read whole from there alone; what is stored twice is stored once (3-2-1)."""
    service, began = backups.service, time.time()
    own = f"RESTIC_REPOSITORY={REPOSITORY} RESTIC_PASSWORD_FILE=/etc/mail-backup/password"
    place = {"name": "thu", "shown": SECOND_URL, "password_file": "/etc/mail-backup/password"}
    place |= {"location_file": f"{SECOND}.location", "environment_file": f"{SECOND}.environment"}
    with backups.settled(), backups.changed(backups.keeper, SERVER, further=[place]), second_server(backups):
        assert backups.start(backups.keeper, "backup-copy.service")
        # A tree's name is the hash of all that is in it.
        first, second = (
            {(one["time"], one["hostname"], *one["tags"], one["tree"]): one["id"] for one in json.loads(listed)}
            for listed in (
                service.run(backups.keeper, f"{own} restic --no-cache --no-lock snapshots --json"),
                in_second(backups, "snapshots", "--json"),
            )
        )
        assert first.keys() == second.keys()
        mail = backups.status(backups.holder, "mail")["snapshot"]
        newest = next(second[key] for key, identifier in first.items() if identifier == mail)
        path = f"/catalogue/{taken.address.partition('@')[0]}.jsonl"
        there = in_second(backups, "dump", newest, path).strip()
        assert there == backups.read("mail", service.domain, path)["texts"][path].strip() and there
        in_second(backups, "check", "--read-data")
        assert backups.start(backups.keeper, "backup-copy.service"), "what is there already does not come again"
        assert len(json.loads(in_second(backups, "snapshots", "--json"))) == len(second)
        service.run(backups.keeper, f"systemctl stop {SECOND_UNIT}")
        assert not backups.start(backups.keeper, "backup-copy.service")
        backups.alarmed(backups.keeper, began, "backup-gone", "backup-copy-thu: .*is not there")


def test_what_is_old_is_removed_with_what_only_it_had(backups: Backups, taken: Mailbox) -> None:
    """On the repository's host, and there alone; what is within the time that is kept stays."""
    service = backups.service
    command = f"{BACKUP} --host {service.domain} --time \"$(date -d '-5 hours' '+%F %T')\" --json --stdin"
    made = json.loads(service.run(backups.holder, f"head -c 8M /dev/urandom | {command}").splitlines()[-1])
    before = set(service.run(backups.keeper, f"ls {REPOSITORY}/snapshots").split())
    room = int(service.run(backups.keeper, f"du -sb {REPOSITORY}/data | cut -f1"))
    with backups.settled(), backups.changed(backups.keeper, SERVER, keep={"within": "4h"}):
        assert backups.start(backups.keeper, "backup-prune.service")
    after = set(service.run(backups.keeper, f"ls {REPOSITORY}/snapshots").split())
    assert before - after == {made["snapshot_id"]}
    assert int(service.run(backups.keeper, f"du -sb {REPOSITORY}/data | cut -f1")) < room - (7 << 20)
    assert backups.read("mail", service.domain)["id"] == backups.status(backups.holder, "mail")["snapshot"]


# --- what can be wrong


@contextmanager
def server_gone(backups: Backups) -> Iterator[None]:
    """Nobody serves the repository."""
    backups.service.run(backups.keeper, f"systemctl stop {REST}")
    try:
        yield
    finally:
        backups.service.run(backups.keeper, f"systemctl start {REST}")


@contextmanager
def full(backups: Backups) -> Iterator[None]:
    """The repository has reached its limit, which the server learns at its start."""
    with ExitStack() as stack:
        # In the end, when the limit is the old one again.
        stack.callback(backups.service.run, backups.keeper, f"systemctl restart {REST}")
        stack.enter_context(backups.changed(backups.keeper, SERVER, max_octets=1000))
        backups.service.run(backups.keeper, f"systemctl restart {REST}")
        yield


@contextmanager
def locked(backups: Backups) -> Iterator[None]:
    """Somebody else has the repository for himself, such as a removal of old snapshots that hangs."""
    # As the server's user, who must be able to read the lock; so slowly that it does not end.
    command = f"runuser -u restic-rest-server -- restic --no-cache -r {REPOSITORY} --limit-download 5 check --read-data"
    with ExitStack() as stack:
        stack.enter_context(backups.changed(backups.holder, SETTINGS, lock_seconds=1))
        backups.service.run(backups.keeper, f"{command} < /etc/mail-backup/password > /dev/null 2>&1 &")
        stop = f"pkill -9 -u restic-rest-server -x restic; rm -f {REPOSITORY}/locks/*"
        stack.callback(backups.service.run, backups.keeper, stop)
        wait("the lock", lambda: backups.service.run(backups.keeper, f"ls {REPOSITORY}/locks"))
        yield


@contextmanager
def wrong_key(backups: Backups) -> Iterator[None]:
    """The host has a key that is not the repository's."""
    repository = json.loads(backups.service.run(backups.holder, f"cat {SETTINGS}"))["repository"]
    wrong = repository | {"password_file": "/run/wrong-key"}
    backups.service.run(backups.holder, "echo khong-phai > /run/wrong-key")
    try:
        with backups.changed(backups.holder, SETTINGS, repository=wrong):
            yield
    finally:
        backups.service.run(backups.holder, "rm /run/wrong-key")


@pytest.mark.parametrize(
    ("fault", "words"),
    [(server_gone, "is not there"), (full, "is full"), (locked, "is locked"), (wrong_key, "made with another")],
    ids=["gone", "full", "locked", "wrong key"],
)
def test_what_keeps_a_backup_from_being_made_is_alarmed(
    backups: Backups, fault: Callable[[Backups], Any], words: str
) -> None:
    """In one sentence that says what it is; the next run is good."""
    began = time.time()
    with backups.settled():
        with fault(backups):
            assert not backups.start(backups.holder, HOST_RUN)
            assert words in backups.status(backups.holder, "host")["error"]
            backups.alarmed(backups.holder, began, "backup-host", words)
        assert backups.start(backups.holder, HOST_RUN), backups.status(backups.holder, "host")
        assert backups.status(backups.holder, "host")["ok"] == 1


def test_backup_that_is_cut_half_way_is_alarmed_and_the_next_is_good(backups: Backups, taken: Mailbox) -> None:
    """restic is killed while it sends; nothing of it is left in the way, and the repository has no error."""
    service, began = backups.service, time.time()
    filler = f"/var/lib/hopthu/thu-{secrets.token_hex(4)}"
    service.run(backups.holder, f"head -c 20M /dev/urandom > {filler}")
    try:
        with backups.settled():
            with backups.changed(backups.holder, SETTINGS, upload_kib=300):
                service.run(backups.holder, f"systemctl start --no-block {HOST_RUN}")
                pid = wait(
                    "restic runs",
                    lambda: service.run(backups.holder, "pgrep -f '^/usr/bin/restic .* backup ' || true").split(),
                )
                wait("it sends", lambda: service.run(backups.keeper, f"ls {REPOSITORY}/locks"))
                time.sleep(2)
                service.run(backups.holder, f"kill -9 {pid[0]}")
                backups.alarmed(backups.holder, began, "backup-host", "cut off")
            assert backups.start(backups.holder, HOST_RUN), backups.status(backups.holder, "host")
            assert service.run(backups.keeper, f"ls {REPOSITORY}/locks") == ""
            assert backups.start(backups.keeper, "backup-check.service")
    finally:
        service.run(backups.holder, f"rm {filler}")


def test_damaged_repository_is_alarmed(backups: Backups, taken: Mailbox) -> None:
    """An octet of a pack is another; what is read of it each day shows that."""
    service, began = backups.service, time.time()
    pack = service.run(
        backups.keeper, f"find {REPOSITORY}/data -type f -printf '%s %p\\n' | sort -n | tail -1"
    ).split()[1]
    spoil = (
        f"cp -a {pack} /srv/backup/good; printf '\\377\\000\\377' | dd of={pack} bs=1 seek=100 conv=notrunc status=none"
    )
    with backups.settled(), backups.changed(backups.keeper, SERVER, check_part="100%"):
        service.run(backups.keeper, f"chmod u+w {pack}; {spoil}")
        try:
            assert not backups.start(backups.keeper, "backup-check.service")
            backups.alarmed(backups.keeper, began, "backup-damaged", "is damaged")
        finally:
            service.run(backups.keeper, f"mv /srv/backup/good {pack}")
        assert backups.start(backups.keeper, "backup-check.service")


def test_snapshot_from_the_future_is_alarmed_and_expires_nothing(backups: Backups, taken: Mailbox) -> None:
    """restic would count from it, and remove what is good. It can be removed by hand, as nothing else can."""
    service, began = backups.service, time.time()
    before = kept(backups)
    command = f"{BACKUP} --host {service.domain} --time \"$(date -d '+3 years' '+%F %T')\" --json /etc/hostname"
    made = json.loads(service.run(backups.holder, command).splitlines()[-1])["snapshot_id"]
    try:
        with backups.settled():
            backups.start(backups.keeper, "backup-look.service")
            backups.alarmed(backups.keeper, began, "backup-clock", f"{made[:8]}.*in the future")
            assert not backups.start(backups.keeper, "backup-prune.service")
            backups.alarmed(backups.keeper, began, "backup-clock", "are not removed")
            assert set(before.splitlines()) <= set(kept(backups).splitlines())
            old = backups.status(backups.holder, "mail")["snapshot"]
            assert not service.inside(backups.keeper).run(f"backup-server forget {old[:8]}").succeeded
            assert backups.read("mail", service.domain)["id"] == old, "a restore would take the one from the future"
    finally:
        service.run(backups.keeper, f"backup-server forget {made[:8]}")
    assert backups.start(backups.keeper, "backup-prune.service")


def test_host_whose_clock_is_wrong_makes_no_snapshot(backups: Backups) -> None:
    """The clock of one process, as faketime has it."""
    script = LIBRARY + (
        "import time; right = time.time; time.time = lambda: right() + 3 * 86400\n"
        "from mail_backup.commands import main\nsys.argv = ['mail-backup', 'run', 'host']; sys.exit(main())"
    )
    began = time.time()
    refused = backups.service.inside(backups.holder).run(
        f"python3 -c {shlex.quote(script)}; e=$?; mail-backup alarms; exit $e"
    )
    assert refused.rc == 1 and "minutes ahead of the backup host's" in refused.stderr
    backups.alarmed(backups.holder, began, "backup-host", "clock is")
    with backups.settled():
        assert backups.start(backups.holder, HOST_RUN)
