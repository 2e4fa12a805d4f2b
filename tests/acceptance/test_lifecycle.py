"""From join to leave, as an office and its people live it. Runs against any of the five provinces.

The stages are fixtures, each of which needs the one before and runs playbooks/directory.yml once; the tests of a stage
stand between it and the next.
"""

from __future__ import annotations

import json
import poplib
import secrets
import shutil
import smtplib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ldap3
import pytest
import yaml
from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientError
from playbook import Files, Run, plan
from service import OUTSIDER, Mailbox, ManageSieve, Service, letter, password, wait

UNITS = ("office", "bureau")
PEOPLE = ("an", "binh", "chi")


@dataclass
class Story:
    """Two units and three people of the test's own, and what the last run did with them."""

    service: Service
    files: Files
    tag: str
    boxes: dict[str, Mailbox] = field(default_factory=dict)
    stack: ExitStack = field(default_factory=ExitStack)
    number: int = 0
    # The stages leave here what their tests look at.
    seen: dict[str, Any] = field(default_factory=dict)

    def id(self, name: str) -> str:
        """The id of one of the story's units or people."""
        return f"{self.tag}-{name}"

    def record(self, name: str) -> dict[str, Any]:
        """Its record in the files."""
        records = self.files.units if name in UNITS else self.files.people
        return next(record for record in records if record["id"] == self.id(name))

    def change(self, name: str, **fields: Any) -> None:
        """Change its record, on new grounds."""
        self.number += 1
        self.record(name).update(fields | self.files.grounds(f"{self.tag}.{self.number}"))

    def apply(self, *arguments: str) -> Run:
        """Load the files; the run must do all that they say."""
        run = self.files.apply(*arguments)
        assert run.status == 0, run.output
        return run

    def rows(self) -> dict[str, dict[str, Any]]:
        """The last plan's rows of the story: name → row."""
        ids = {self.id(name): name for name in (*UNITS, *PEOPLE)}
        return {ids[row["id"]]: row for row in plan()["changes"] if row["id"] in ids}

    def entry(self, name: str) -> dict[str, list[str]]:
        """Its entry in LDAP."""
        branch = "units" if name in UNITS else "people"
        with self.service.ldap_admin() as admin:
            admin.search(
                f"uid={self.id(name)},ou={branch},{self.service.base}", "(objectClass=*)", attributes=["*", "+"]
            )
            found: dict[str, list[str]] = admin.entries[0].entry_attributes_as_dict
            return found

    def home(self, name: str) -> str:
        """Its folder in the mail store."""
        return f"/srv/vmail/{self.id(name)}"

    def delegate(self, person: str) -> dict[str, str]:
        """A delegate as this province's policy wants it."""
        rules = self.files.policy.get("delegates") or {}
        roles = rules.get("roles") or ["Văn thư"]
        return {"person": self.id(person), "role": roles[0], "delegation_ref": f"{self.tag}/UQ-{person}"}


@pytest.fixture(scope="module")
def story(lab: dict[str, Any], service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """The files with two new units and three new people in them; all of them are gone at the end."""
    tag = f"thu{secrets.token_hex(3)}"
    tale = Story(service, Files(lab, tmp_path_factory.mktemp("province")), tag)
    classes = tale.files.policy.get("eligibility") or {}
    top = tale.files.units[0]["id"]
    for name in UNITS:
        unit = {"id": tale.id(name), "name": f"Phòng {name} {tag}", "code": f"{name}{tag}", "parent": top}
        unit |= {"class": (classes.get("units") or ["administrative"])[0]} | tale.files.grounds(f"{tag}-{name}")
        tale.files.units.append(unit)
    for name in PEOPLE:
        person = {"id": tale.id(name), "ho": "Đặng", "dem": tag, "ten": name.capitalize(), "unit": tale.id("office")}
        person |= {"class": (classes.get("people") or ["civil_servant"])[0]} | tale.files.grounds(f"{tag}-{name}")
        tale.files.people.append(person)
    tale.record("office")["head"] = tale.id("an")
    try:
        yield tale
    finally:
        tale.stack.close()
        with service.ldap_admin() as admin:
            for name in (*UNITS, *PEOPLE):
                for branch in ("units", "people", "released"):
                    admin.search(f"ou={branch},{service.base}", f"(uid={tale.id(name)})")
                    for entry in list(admin.entries):
                        admin.delete(entry.entry_dn)
        for store in service.in_group("mailstore"):
            service.run(store, f"rm -rf -- /srv/vmail/{tag}-*")


def refused(mailbox: Mailbox, service: Service) -> list[str]:
    """The protocols on which a login with the right password is refused."""
    attempts: dict[str, tuple[Callable[[], AbstractContextManager[object]], type[Exception]]] = {
        "imap": (mailbox.imap, IMAPClientError),
        "pop3": (lambda: mailbox.pop(service.address), poplib.error_proto),
        "sieve": (lambda: _sieve(mailbox, service), PermissionError),
        "submission": (lambda: _submission(mailbox, service), smtplib.SMTPAuthenticationError),
    }

    def is_refused(protocol: str) -> bool:
        attempt, error = attempts[protocol]
        try:
            with attempt():
                return False
        except error:
            return True

    # A refusal takes seconds; they wait for it together.
    with ThreadPoolExecutor(len(attempts)) as pool:
        found = [protocol for protocol, yes in zip(attempts, pool.map(is_refused, attempts), strict=True) if yes]
    service.forgive()
    return found


@contextmanager
def _sieve(mailbox: Mailbox, service: Service) -> Iterator[None]:
    with ManageSieve(service, service.address) as sieve:
        sieve.starttls()
        if not sieve.login(mailbox.address, mailbox.password):
            raise PermissionError
        yield


@contextmanager
def _submission(mailbox: Mailbox, service: Service) -> Iterator[smtplib.SMTP]:
    with service.smtp(service.address, 587) as smtp:
        smtp.login(mailbox.address, mailbox.password)
        yield smtp


ALL = ["imap", "pop3", "sieve", "submission"]


def shared(unit: Mailbox) -> str:
    """The folder in which a unit's mailbox appears to those who may open it."""
    return f"Units/{unit.address.partition('@')[0]}"


def ended(client: IMAPClient) -> bool:
    """Whether the server ends a session within 10 s: BYE, or the end of the stream."""
    connection = client.socket()
    connection.settimeout(10)
    try:
        while data := connection.recv(4096):
            if b"* BYE" in data:
                return True
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def rcpt(service: Service, address: str) -> tuple[int, str]:
    """The answer to RCPT from outside."""
    with service.smtp(service.address) as smtp:
        smtp.mail(OUTSIDER)
        code, text = smtp.rcpt(address)
        return code, text.decode()


# --- join


@pytest.fixture(scope="module")
def joined(story: Story) -> Story:
    """All joined; nobody has changed the initial password yet."""
    before = story.files.slips()
    story.seen["join"] = story.apply().output
    story.seen["plan"] = json.dumps(plan())
    slips = story.files.slips()
    for name in (*UNITS, *PEOPLE):
        entry = story.entry(name)
        branch = "units" if name in UNITS else "people"
        dn = f"uid={story.id(name)},ou={branch},{story.service.base}"
        assert story.id(name) not in before
        story.boxes[name] = Mailbox(story.service, entry["mail"][0], slips[story.id(name)], dn)
    return story


@pytest.mark.requirement("DL-6.2")
def test_plan_speaks_the_words_of_the_office(joined: Story) -> None:
    """And shows no password."""
    assert f"join (tiếp nhận) person {joined.id('an')}" in joined.seen["join"]
    assert f"found (thành lập) unit {joined.id('office')}" in joined.seen["join"]
    assert not [box.password for box in joined.boxes.values() if box.password in joined.seen["join"]]
    assert "userPassword" not in joined.seen["plan"]


@pytest.mark.requirement("LC-11.1", "HT-6.1", "CT-8.3")
def test_initial_password_opens_nothing(joined: Story) -> None:
    assert refused(joined.boxes["an"], joined.service) == ALL


@pytest.fixture(scope="module")
def working(joined: Story) -> Story:
    """Everybody has chosen a password, over LDAP with TLS."""
    for name, box in joined.boxes.items():
        chosen = password()
        with joined.service.ldap(box.dn, box.password) as connection:
            assert connection.extend.standard.modify_password(box.dn, box.password, chosen), connection.result
        joined.boxes[name] = replace(box, password=chosen)
    return joined


@pytest.mark.requirement("LC-11.1", "HT-6.1", "CT-8.3", "DL-7.1", "CT-7.1")
def test_after_the_change_mail_is_sent_and_read(working: Story) -> None:
    an, binh = working.boxes["an"], working.boxes["binh"]
    identifier = an.submit(letter(an.address, binh.address), binh.address, working.service.address)
    assert binh.take(identifier)


@pytest.mark.requirement("DL-9", "LC-10.2", "HT-7.2", "CT-9.1")
def test_head_reads_and_sends_as_the_unit(working: Story) -> None:
    """With the own login; the copy of what was sent stands in the unit's Sent folder, once."""
    service, office, an = working.service, working.boxes["office"], working.boxes["an"]
    identifier = service.send(letter(OUTSIDER, office.address), office.address, service.address)
    with an.imap() as client:
        wait("the office's mail", lambda: an.has(client, identifier, shared(office)))
    message = letter(office.address, working.boxes["binh"].address)
    with service.smtp(service.address, 587) as smtp:
        smtp.login(an.address, an.password)
        smtp.sendmail(office.address, [working.boxes["binh"].address], message.as_bytes())
    assert working.boxes["binh"].take(message["Message-ID"])
    with office.imap() as client:
        wait("the copy in Sent", lambda: office.has(client, message["Message-ID"], "Sent"))
        assert len(client.search(["HEADER", "Message-ID", message["Message-ID"]])) == 1


@pytest.mark.requirement("DL-8.4", "LC-11.4", "HT-6.4", "CT-8.4")
def test_who_is_not_delegated_neither_reads_nor_sends(working: Story) -> None:
    service, office, chi = working.service, working.boxes["office"], working.boxes["chi"]
    with chi.imap() as client:
        assert not [name for _flags, _separator, name in client.list_folders() if name.startswith(shared(office))]
        with pytest.raises(IMAPClientError):
            client.select_folder(shared(office))
    with service.smtp(service.address, 587) as smtp:
        smtp.login(chi.address, chi.password)
        code, text = smtp.mail(office.address)
    assert code == 553, text


# --- move, and a suspension


@pytest.fixture(scope="module")
def suspended(working: Story) -> Story:
    """Bình is suspended while he reads the unit's mail; Chi has moved to the other unit; Bình had been delegated."""
    working.change("office", delegates=[working.delegate("binh")])
    working.apply()
    binh, office = working.boxes["binh"], working.boxes["office"]
    working.seen["delegated"] = working.rows()
    sessions = [working.stack.enter_context(binh.imap()) for _ in range(2)]
    sessions[0].select_folder("INBOX")
    sessions[0].idle()
    sessions[1].list_folders()
    sessions[1].select_folder(shared(office))
    submission = working.stack.enter_context(working.service.smtp(working.service.address, 587))
    submission.login(binh.address, binh.password)
    working.seen["old address of chi"] = working.boxes["chi"].address
    working.change("binh", state="suspended")
    working.change("chi", unit=working.id("bureau"))
    working.apply()
    working.seen |= {"sessions": sessions, "submission": submission}
    working.boxes["chi"] = replace(working.boxes["chi"], address=working.entry("chi")["mail"][0])
    return working


@pytest.mark.requirement("DL-9", "LC-10.2", "HT-7.2", "CT-9.1")
def test_delegation_touches_the_directory_only(suspended: Story) -> None:
    rows = suspended.seen["delegated"]
    assert rows["office"]["action"] == "delegate"
    assert {name for name, row in rows.items() if row["action"] != "delegate"} <= {"binh"}


def test_suspension_ends_running_sessions(suspended: Story) -> None:
    """Also one that waits in IDLE, one that has the unit's mailbox open, and one that submits."""
    assert all([ended(client) for client in suspended.seen["sessions"]])
    submission = suspended.seen["submission"]
    code, text = submission.mail(suspended.boxes["binh"].address)
    assert code == 550, text


def test_suspended_logs_in_nowhere_and_still_receives(suspended: Story) -> None:
    binh = suspended.boxes["binh"]
    assert refused(binh, suspended.service) == ALL
    identifier = suspended.service.send(letter(OUTSIDER, binh.address), binh.address, suspended.service.address)
    suspended.seen["mail while suspended"] = identifier


@pytest.mark.requirement("DL-7.2", "CT-7.2")
def test_move_keeps_the_mailbox_and_the_old_address(suspended: Story) -> None:
    row, chi = suspended.rows()["chi"], suspended.boxes["chi"]
    assert row["action"] == "move"
    holds_unit = "{unit}" in suspended.files.policy["address"].get("person", "")
    assert (chi.address != suspended.seen["old address of chi"]) == holds_unit
    for address in {chi.address, suspended.seen["old address of chi"]}:
        identifier = suspended.service.send(letter(OUTSIDER, address), address, suspended.service.address)
        assert chi.take(identifier)


# --- resume, and a hand-over


@pytest.fixture(scope="module")
def handed_over(suspended: Story) -> Story:
    """Bình is back and becomes the head of the office in place of An; a delegate no more, he acts as head."""
    office = suspended.boxes["office"]
    suspended.seen["mail of the office"] = _folder(office)
    suspended.seen["old head"] = suspended.stack.enter_context(suspended.boxes["an"].imap())
    suspended.seen["old head"].select_folder(shared(office))
    suspended.seen["office's session"] = suspended.stack.enter_context(office.imap())
    suspended.change("binh", state="active")
    suspended.change("office", head=suspended.id("binh"), delegates=[])
    suspended.apply()
    suspended.seen["slips"] = suspended.files.slips()
    return suspended


def _folder(mailbox: Mailbox) -> tuple[int, int]:
    with mailbox.imap() as client:
        client.select_folder("Sent")
        return len(client.search()), client.folder_status("INBOX", ["MESSAGES"])[b"MESSAGES"]


@pytest.mark.requirement("DL-9", "LC-10.3", "HT-7.4")
def test_hand_over_gives_all_to_the_new_head(handed_over: Story) -> None:
    """The old head's session and the office's own are gone, its password too; the mail is all there."""
    assert handed_over.rows()["office"]["action"] == "hand-over"
    assert ended(handed_over.seen["old head"])
    assert ended(handed_over.seen["office's session"])
    office = handed_over.boxes["office"]
    assert "imap" in refused(office, handed_over.service)
    with handed_over.boxes["binh"].imap() as client:
        sent = client.select_folder(f"{shared(office)}/Sent")[b"EXISTS"]
        inbox = client.select_folder(shared(office))[b"EXISTS"]
    assert (sent, inbox) == handed_over.seen["mail of the office"]
    with handed_over.boxes["an"].imap() as client, pytest.raises(IMAPClientError):
        client.select_folder(shared(office))


@pytest.mark.requirement("DL-9", "LC-10.3", "HT-7.4")
def test_hand_over_issues_a_new_password(handed_over: Story) -> None:
    office, issued = handed_over.boxes["office"], handed_over.seen["slips"][handed_over.id("office")]
    assert issued != office.password
    chosen = password()
    with handed_over.service.ldap(office.dn, issued) as connection:
        assert connection.extend.standard.modify_password(office.dn, issued, chosen), connection.result
    handed_over.boxes["office"] = replace(office, password=chosen)
    assert _folder(handed_over.boxes["office"]) == handed_over.seen["mail of the office"]


@pytest.mark.requirement("DL-9", "LC-10.3", "HT-7.4")
def test_hand_over_leaves_a_receipt(handed_over: Story) -> None:
    """It names both persons, the grounds, and counts before and after that are equal."""
    [path] = (handed_over.files.build / "receipts").glob(f"*{handed_over.id('office')}.yml")
    receipt = yaml.safe_load(path.read_text(encoding="utf-8"))
    text = path.read_text(encoding="utf-8")
    for name in ("an", "binh"):
        assert handed_over.id(name) in text
    assert handed_over.record("office")["decision_ref"] in text
    assert receipt["verdict"] == "equal"


def test_resumed_reads_what_came_meanwhile(handed_over: Story) -> None:
    assert handed_over.boxes["binh"].take(handed_over.seen["mail while suspended"])


# --- leave, and the end of retention


@pytest.fixture(scope="module")
def left(handed_over: Story) -> Story:
    """An has left, with a session open and mail in the mailbox."""
    an = handed_over.boxes["an"]
    handed_over.service.send(letter(OUTSIDER, an.address), an.address, handed_over.service.address)
    client = handed_over.stack.enter_context(an.imap())
    wait("mail in An's mailbox", lambda: client.folder_status("INBOX", ["MESSAGES"])[b"MESSAGES"])
    handed_over.change("an", state="left")
    handed_over.apply()
    handed_over.seen["leaver's session"] = client
    return handed_over


@pytest.mark.requirement("DL-7.3", "CT-7.3", "HT-5.2", "LC-6.2b")
def test_leaver_is_out_and_gets_no_mail(left: Story) -> None:
    an = left.boxes["an"]
    assert ended(left.seen["leaver's session"])
    assert refused(an, left.service) == ALL
    code, text = rcpt(left.service, an.address)
    assert code == 550
    points = (left.files.policy.get("leaver") or {}).get("pointer") == "unit"
    assert (text.startswith("5.1.6") and f"write to {left.boxes['office'].address}" in text) == points, text
    assert left.service.run(
        left.service.in_group("mailstore")[0], f"find {left.home('an')}/Maildir -path '*/[cn][ue][rw]/*' -type f"
    ), "the content is not kept"


@pytest.fixture(scope="module")
def purged(left: Story) -> Story:
    """An's retention has ended; a person of the same name joins."""
    namesake = {**left.record("an"), "id": left.id("an2"), "state": "active"}
    namesake |= left.files.grounds(f"{left.tag}-an2")
    left.files.people.append(namesake)
    left.seen["clash"] = left.files.apply()
    left.files.people.remove(left.record("an"))
    left.seen["blocked"] = left.files.apply()
    left.service.modify(left.boxes["an"].dn, mailboxRetainUntil="20200101000000Z")
    left.seen["purge"] = left.files.apply()
    left.seen["rows of the purge"] = left.rows()
    left.files.people.remove(namesake)
    return left


@pytest.mark.requirement("DL-4", "CT-4")
def test_name_of_a_leaver_is_not_given_again(purged: Story) -> None:
    """In the files it is a clash that stops the run; without the leaver's record only that join is refused."""
    assert purged.seen["clash"].status != 0
    assert "is already an address of" in purged.seen["clash"].output
    assert purged.seen["blocked"].status != 0
    assert "refused" in purged.seen["blocked"].message
    assert rcpt(purged.service, purged.boxes["an"].address)[0] == 550


@pytest.mark.requirement("CT-7.3", "DL-7.3")
def test_after_retention_the_content_is_gone(purged: Story) -> None:
    assert purged.seen["rows of the purge"]["an"]["action"] == "purge"
    for store in purged.service.in_group("mailstore"):
        assert not purged.service.inside(store).file(purged.home("an")).exists
    with purged.service.ldap_admin() as admin:
        admin.search(f"ou=people,{purged.service.base}", f"(uid={purged.id('an')})")
        assert not admin.entries
        admin.search(f"ou=released,{purged.service.base}", f"(uid={purged.id('an')})", attributes=["mailboxState"])
        assert [entry.mailboxState.value for entry in admin.entries] == ["purged"]


# --- who answers for it


@pytest.mark.requirement("DL-2", "DL-5.1")
def test_decision_log_names_operator_grounds_and_change(purged: Story) -> None:
    """The auditor reads it; neither he nor the loader can change or remove a line; it holds no secret."""
    service = purged.service
    base = f"ou=decisions,{service.base}"
    with service.ldap(
        f"cn=auditor,ou=services,{service.base}", service.secrets["vault_openldap_auditor_password"]
    ) as auditor:
        assert auditor.bound
        auditor.search(base, "(decisionChange=*)", attributes=["*"])
        text = "\n".join(entry.entry_to_ldif() for entry in auditor.entries)
        values = [str(value) for entry in auditor.entries for value in entry.decisionChange.values]
        victim = auditor.entries[0].entry_dn
        assert not auditor.modify(victim, {"decisionBy": [(ldap3.MODIFY_REPLACE, ["nobody"])]})
        assert not auditor.delete(victim)
    about = [value for value in values if purged.id("an") in value and '"leave"' in value]
    assert about and purged.tag in about[0]
    assert all(entry.decisionBy.value and entry.decisionCommit.value for entry in auditor.entries)
    assert not [box for box in purged.boxes.values() if box.password in text]
    assert "userPassword" not in text
    loader = f"cn=loader,ou=services,{service.base}"
    with service.ldap(loader, service.secrets["vault_openldap_loader_password"]) as connection:
        assert not connection.modify(victim, {"decisionBy": [(ldap3.MODIFY_REPLACE, ["nobody"])]})
        assert not connection.delete(victim)


# --- drift, grounds, limits, resets


@pytest.fixture
def settled(purged: Story) -> Iterator[Story]:
    """The story as it stands at the end; what a test changes in the files or the directory is put right."""
    policy, units = deepcopy(purged.files.policy), deepcopy(purged.files.units)
    people = deepcopy(purged.files.people)
    try:
        yield purged
    finally:
        purged.files.policy, purged.files.units, purged.files.people = policy, units, people
        purged.apply()


def test_hand_edit_is_shown_as_drift_and_put_right(settled: Story) -> None:
    settled.service.modify(settled.boxes["bureau"].dn, mailboxQuota="1048576")
    settled.apply()
    assert {name: row["action"] for name, row in settled.rows().items()} == {"bureau": "drift"}
    assert settled.entry("bureau")["mailboxQuota"] != ["1048576"]


@pytest.mark.requirement("DL-2", "DL-5.1", "DL-7.1")
def test_change_without_grounds_is_refused_and_the_others_are_made(settled: Story) -> None:
    """Neither without a document nor with one that was the grounds of an earlier change; the exit code says so."""
    settled.files.policy["required_refs"] = {"suspend": ["decision_ref"]}
    used = settled.record("binh")["decision_ref"]
    settled.record("binh").update(state="suspended")
    settled.record("chi").update(state="suspended")
    del settled.record("chi")["decision_ref"]
    settled.record("bureau")["quota"] = "77M"
    run = settled.files.apply()
    rows = settled.rows()
    assert run.status != 0
    assert used in rows["binh"]["refused"]
    assert "decision_ref" in rows["chi"]["refused"]
    assert rows["binh"]["refused"] in run.message
    assert settled.entry("bureau")["mailboxQuota"] == [str(77 << 20)]
    assert settled.entry("binh")["mailboxState"] == ["active"]


def test_more_removals_than_the_policy_allows_need_their_number(settled: Story) -> None:
    """A file gone wrong takes nobody out of service; the sentence says what to add when it is meant."""
    settled.files.policy["removal_limit"] = 0
    settled.files.policy["required_refs"] = {}
    settled.change("binh", state="left")
    settled.change("chi", state="left")
    settled.change("office", head=None)
    del settled.record("office")["head"]
    run = settled.files.apply()
    assert run.status != 0
    assert "directory_removals=2" in run.message
    assert {settled.entry(name)["mailboxState"][0] for name in ("binh", "chi")} == {"active"}


@pytest.mark.requirement("DL-8.5", "HT-4.3c")
def test_reset_issues_a_new_password_and_ends_sessions(settled: Story) -> None:
    chi = settled.boxes["chi"]
    client = settled.stack.enter_context(chi.imap())
    client.select_folder("INBOX")
    run = settled.files.apply(
        "-e", f"mailbox={settled.id('chi')}", "-e", f"request_ref={settled.tag}/reset", playbook="password-reset.yml"
    )
    assert run.status == 0, run.output
    assert settled.rows()["chi"]["action"] == "reset"
    assert ended(client)
    assert refused(chi, settled.service) == ALL
    issued = settled.files.slips()[settled.id("chi")]
    chosen = password()
    with settled.service.ldap(chi.dn, issued) as connection:
        assert connection.extend.standard.modify_password(chi.dn, issued, chosen), connection.result
    settled.boxes["chi"] = replace(chi, password=chosen)
    with settled.boxes["chi"].imap():
        pass


def test_administrators_have_stricter_passwords(settled: Story) -> None:
    """What an official may choose is too short for an administrator."""
    settled.files.policy["passwords"]["administrators"]["people"] = [settled.id("chi")]
    settled.apply()
    for name, taken in (("binh", True), ("chi", False)):
        box, chosen = settled.boxes[name], f"aA1-{secrets.token_urlsafe(9)[:9]}"
        with settled.service.ldap(box.dn, box.password) as connection:
            assert connection.extend.standard.modify_password(box.dn, box.password, chosen) is taken, connection.result
        if taken:
            settled.boxes[name] = replace(box, password=chosen)


@pytest.mark.parametrize("form", ["yml", "csv", "json"])
def test_what_is_exported_loads_without_a_change(settled: Story, form: str, tmp_path: Path) -> None:
    run = settled.files.run("directory-export.yml", "-e", f"export_to={tmp_path}", "-e", f"export_form={form}")
    assert run.status == 0, run.output
    folder = settled.files.folder / "directory"
    settled.apply()
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for name in ("units.yml", "people.yml"):
        (folder / name).unlink()
    for path in tmp_path.iterdir():
        shutil.copy(path, folder)
    try:
        run = settled.files.run("directory.yml")
        assert run.status == 0, run.output
        assert plan()["changes"] == []
    finally:
        for path in tmp_path.iterdir():
            (folder / path.name).unlink()
        for path, data in before.items():
            path.write_bytes(data)


# --- the end of a unit


@pytest.mark.requirement("LC-6.1")
def test_unit_ends_and_its_mail_goes_to_its_successor(purged: Story) -> None:
    """First it only receives: nobody logs in as it, its head still reads it. Then another unit has its addresses."""
    service, bureau, chi = purged.service, purged.boxes["bureau"], purged.boxes["chi"]
    purged.change("bureau", state="legacy", head=purged.id("chi"))
    purged.apply()
    assert purged.rows()["bureau"]["action"] == "legacy"
    assert refused(bureau, service) == ALL
    identifier = service.send(letter(OUTSIDER, bureau.address), bureau.address, service.address)
    with chi.imap() as client:
        wait("the mail of the unit", lambda: chi.has(client, identifier, shared(bureau)))
    with _submission(chi, service) as smtp:
        assert smtp.mail(bureau.address)[0] == 553
    purged.change("bureau", state="dissolved", successor=purged.id("office"))
    del purged.record("bureau")["head"]
    purged.record("chi").update(unit=purged.id("office"))
    purged.change("chi")
    purged.apply()
    identifier = service.send(letter(OUTSIDER, bureau.address), bureau.address, service.address)
    assert purged.boxes["office"].take(identifier)
