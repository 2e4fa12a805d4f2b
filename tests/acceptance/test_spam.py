"""Spam: judged, marked, filed, learned, expired; sent by nobody of ours."""

from __future__ import annotations

import io
import random
import re
import secrets
import shlex
import smtplib
import zipfile
from collections.abc import Callable
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from milter import ACTIONS, BAYES, GTUBE, SETTINGS, filter_hosts, setting, without
from playbook import Files
from service import OUTSIDER, Mailbox, Service, letter, message_id, wait

SPAM = ["DL-6.5"]
SENDING = ["DL-8.6", "HT-6.6", "CT-8.8", "LC-11.6", "N-91"]
# Not the EICAR file itself, which virus scanners would find in this checkout.
EICAR = "X5O!P%@AP[4\\PZX54(P^)7CC)7}$" + "EICAR-STANDARD-ANTIVIRUS-TEST-FILE!$H+H*"


def handed_in(service: Service, message: EmailMessage, recipient: str, address: str) -> tuple[int, str]:
    """Last answer to a stranger's message on port 25."""
    with service.smtp(address) as smtp:
        smtp.mail(OUTSIDER)
        smtp.rcpt(recipient)
        code, text = smtp.data(message.as_bytes())
    return code, text.decode()


def submitted(box: Mailbox, message: EmailMessage, recipients: list[str]) -> tuple[int, str]:
    """Last answer to an official's message."""
    with box.service.smtp(box.service.address, 587) as smtp:
        smtp.login(box.address, box.password)
        smtp.mail(box.address)
        for recipient in recipients:
            smtp.rcpt(recipient)
        code, text = smtp.data(message.as_bytes())
    return code, text.decode()


@pytest.mark.requirement(*SPAM)
def test_certain_spam_is_refused(service: Service, mailbox: Mailbox, mx: str) -> None:
    """At the door, so that a sender who is no spammer learns of it."""
    code, text = handed_in(service, letter(OUTSIDER, mailbox.address, text=GTUBE), mailbox.address, mx)
    assert code == 554 and "spam" in text, text


@pytest.mark.requirement(*SENDING)
def test_officials_spam_is_refused(service: Service, mailbox: Mailbox) -> None:
    message = letter(mailbox.address, mailbox.address, text=GTUBE)
    code, text = submitted(mailbox, message, [mailbox.address])
    assert code == 554 and "spam" in text, text


@pytest.mark.requirement(*SPAM)
def test_spam_lands_in_junk_where_nothing_is_refused(service: Service, mailbox: Mailbox) -> None:
    """Marked, and never dropped."""
    message = letter(OUTSIDER, mailbox.address, text=GTUBE)
    message["X-Spam"] = "No"
    # At once: the retry of a sender's host, after greylisting, is not what is looked at here.
    at_once = {"greylist {\n  enabled = true;": "greylist {\n  enabled = false;"}
    with setting(service, ACTIONS, {"reject = 15": "reject = null"}), setting(service, SETTINGS, at_once):
        code, text = handed_in(service, message, mailbox.address, service.address)
    assert code == 250, text
    received = message_from_bytes(mailbox.take(message_id(message.as_bytes()), "Junk"), policy=policy.default)
    assert received.get_all("X-Spam") == ["Yes"]
    assert received["X-Spam-Status"].startswith("Yes, score=")


def test_strangers_cannot_set_the_mark(service: Service, mailbox: Mailbox) -> None:
    """A forged X-Spam neither files a message into Junk nor stays in it."""
    message = letter(OUTSIDER, mailbox.address)
    message["X-Spam"] = "Yes"
    identifier = service.send(message, mailbox.address, service.address)
    received = message_from_bytes(mailbox.take(identifier), policy=policy.default)
    assert received["X-Spam"] is None


@pytest.mark.requirement(*SPAM, "LC-11.7", "N-91")
def test_moves_to_and_from_junk_teach(service: Service, mailbox: Mailbox) -> None:
    """A message like those that were moved to Junk counts as spam, and no more when they are taken back."""
    store = service.in_group("mailstore")[0]
    words = {kind: [secrets.token_hex(4) for _ in range(30)] for kind in ("spam", "ham")}

    def text(kind: str) -> str:
        return " ".join(random.choices(words[kind], k=80))

    def is_spam() -> bool:
        started = float(service.run(store, "date +%s.%N"))
        message = letter(OUTSIDER, mailbox.address, text=text("spam"))
        handed_in(service, message, mailbox.address, service.address)  # spam waits in the greylist; it is judged
        pattern = re.escape(message["Message-ID"][1:-1]) + ".*default:"
        lines = wait("the judgement", lambda: service.journal(store, started, pattern))
        return "BAYES_SPAM" in lines[0]

    def move(subject: str, goal: str) -> None:
        imap.move(imap.search(["SUBJECT", subject]), goal)
        wait("what was moved is learned", lambda: not service.run(store, "ls /var/lib/dovecot/learning"), 90)

    # With a memory of its own, so that the test neither depends on what was learned before nor leaves anything there.
    memory = {"min_learns = 20;": f'min_learns = 20;\nprefix = "thu-{secrets.token_hex(4)}";'}
    with setting(service, BAYES, memory), mailbox.imap() as imap:
        for kind in ("spam", "ham"):
            for _ in range(21):
                imap.append("INBOX", letter(OUTSIDER, mailbox.address, kind, text(kind)).as_bytes())
        imap.select_folder("INBOX")
        move("spam", "Junk")
        move("ham", "Junk")
        assert not is_spam()  # nothing is known yet of what is wanted
        imap.select_folder("Junk")
        move("ham", "INBOX")
        assert is_spam()
        imap.select_folder("Junk")
        move("spam", "INBOX")
        assert not is_spam()


def test_deleting_junk_teaches_nothing(service: Service, mailbox: Mailbox) -> None:
    store = service.in_group("mailstore")[0]
    with mailbox.imap() as imap:
        imap.append("INBOX", letter(OUTSIDER, mailbox.address).as_bytes())
        imap.select_folder("INBOX")
        with without(service, "junk-learning.path junk-learning.timer rspamd", [store]):
            imap.move(imap.search(), "Junk")
            waiting = "ls /var/lib/dovecot/learning"
            wait("the move waits for the filter", lambda: "spam." in service.run(store, waiting))
            imap.select_folder("Junk")
            imap.move(imap.search(), "Trash")
            imap.select_folder("Trash")
            assert imap.search()
            assert "ham." not in service.run(store, waiting)
        assert service.run(store, "systemctl is-active junk-learning.timer") == "active"
        service.run(store, "systemctl start junk-learning.service")  # as the timer does after a minute
        assert not service.run(store, waiting), "the filter is back and it is not learned"


@pytest.mark.requirement("DL-6.5")
@pytest.mark.parametrize(("folder", "name"), [("Junk", "junk_days"), ("Trash", "trash_days")])
def test_junk_and_trash_expire(
    service: Service, lab: dict[str, Any], mailbox: Mailbox, folder: str, name: str, tmp_path: Path
) -> None:
    """By the nightly unit, whose days the test cannot wait for: its own program with a second instead, for one user."""
    store = service.in_group("mailstore")[0]
    days = Files(lab, tmp_path).policy["retention"][name]
    with mailbox.imap() as imap:
        for where in ("INBOX", folder):
            imap.append(where, letter(OUTSIDER, mailbox.address).as_bytes())
        assert service.run(store, "systemctl is-active junk-expiry.timer") == "active"
        program = service.run(store, "sed -n 's/^ExecStart=//p' /etc/systemd/system/junk-expiry.service").strip()
        text = service.run(store, f"cat {program}")
        assert f"\nexpire {folder} {days}\n" in f"{text}\n" and " -A " not in text.replace("with -A", ""), text
        changed = text.replace("doveadm user '*'", f"echo {mailbox.address}").replace('"$2d"', "1s")

        def gone() -> bool:
            service.run(store, f"sh -c {shlex.quote(changed)}")
            imap.select_folder(folder)
            return not imap.search()

        wait(f"{folder} is empty", gone)
        imap.select_folder("INBOX")
        assert imap.search()


@pytest.mark.requirement("DL-6.6")
@pytest.mark.parametrize("way", ["submission", "from outside"])
@pytest.mark.parametrize("name", ["bao-cao.exe", "bao-cao.pdf.JS", "bao-cao.zip", "bao-cao.doc"])
def test_programs_are_refused_as_attachments(service: Service, mailbox: Mailbox, name: str, way: str) -> None:
    """By name in any case, by name inside an archive, and by content under another name."""
    content = b"xin chao"
    if name.endswith(".zip"):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as members:
            members.writestr("thu/bao-cao.scr", content)
        content = archive.getvalue()
    elif name.endswith(".doc"):  # the head of a Windows program
        content = b"MZ" + bytes(58) + (128).to_bytes(4, "little") + bytes(64) + b"PE\0\0" + bytes(300)
    message = letter(mailbox.address if way == "submission" else OUTSIDER, mailbox.address)
    message.add_attachment(content, maintype="application", subtype="octet-stream", filename=name)
    if way == "submission":
        code, text = submitted(mailbox, message, [mailbox.address])
    else:
        code, text = handed_in(service, message, mailbox.address, service.address)
    assert code == 554 and "Attachments of this kind are not accepted" in text, text


def test_what_only_begins_like_a_program_passes(service: Service, mailbox: Mailbox) -> None:
    """A text, or something encrypted, may begin with the two letters of Windows programs."""
    message = letter(mailbox.address, mailbox.address, text="MZ là hai chữ cái đầu của thư này, không hơn.\n" * 3)
    message.add_attachment(b"MZ" + bytes(range(256)), maintype="application", subtype="octet-stream", filename="a.p7m")
    mailbox.take(mailbox.submit(message, mailbox.address, service.address))


@pytest.mark.requirement(*SENDING)
def test_sending_is_limited(service: Service, new_mailbox: Callable[..., Mailbox]) -> None:
    """Per login, and per address whoever sends as it; every recipient counts; who exceeds it is told and reported."""
    store = service.in_group("mailstore")[0]
    first, second = new_mailbox(), new_mailbox()
    unit = new_mailbox(mailboxAgent=[first.address, second.address])

    def send(box: Mailbox, sender: str, count: int) -> tuple[int, str]:
        with service.smtp(service.address, 587) as smtp:
            smtp.login(box.address, box.password)
            smtp.mail(sender)
            for number in range(count):
                assert smtp.rcpt(first.address.replace("@", f"+{number}@"))[0] == 250
            code, text = smtp.data(letter(sender, first.address).as_bytes())
        return code, text.decode()

    started = float(service.run(store, "date +%s.%N"))
    limits = {'"limit_login": 500': '"limit_login": 6', '"limit_sender": 1000': '"limit_sender": 8'}
    with setting(service, SETTINGS, limits):
        assert send(first, unit.address, 5)[0] == 250
        code, text = send(first, first.address, 3)
        assert code == 451 and "6 an hour for this login" in text, text
        code, text = send(second, unit.address, 5)
        assert code == 451 and "8 an hour for this sender address" in text, text
        assert send(second, second.address, 5)[0] == 250
    alarms = service.journal(store, started, "alarm sending-limit")
    assert any(f"{first.address} as {first.address}" in line for line in alarms), alarms
    assert any(f"{second.address} as {unit.address}" in line for line in alarms), alarms


def test_peers_filter_is_the_second_choice(service: Service, mailbox: Mailbox) -> None:
    first, second = filter_hosts(service)[:2]
    with without(service, "rspamd", [first]):
        started = float(service.run(second, "date +%s.%N"))
        identifier = service.send(letter(OUTSIDER, mailbox.address), mailbox.address, service.address)
        mailbox.take(identifier)
        code, text = handed_in(service, letter(OUTSIDER, mailbox.address, text=GTUBE), mailbox.address, service.address)
        assert code == 554, text
        assert service.journal(second, started, re.escape(identifier[1:-1]) + ".*default:")


@pytest.mark.requirement("DL-6.6", "N-116-17.3")
def test_without_any_filter_mail_waits(service: Service, mailbox: Mailbox) -> None:
    """In both directions; nothing passes unseen, and it arrives when the filter is back."""
    incoming, outgoing = letter(OUTSIDER, mailbox.address), letter(mailbox.address, mailbox.address)
    ways: list[Callable[[], object]] = [
        lambda: service.send(incoming, mailbox.address, service.address),
        lambda: mailbox.submit(outgoing, mailbox.address, service.address),
    ]
    with without(service, "rspamd", filter_hosts(service)):
        for way in ways:
            with pytest.raises(smtplib.SMTPResponseException) as caught:
                way()
            assert caught.value.smtp_code in (451, 454), caught.value  # 454: at STARTTLS
    assert handed_in(service, incoming, mailbox.address, service.address)[0] == 250
    assert submitted(mailbox, outgoing, [mailbox.address])[0] == 250
    for message in (incoming, outgoing):
        mailbox.take(message_id(message.as_bytes()))


@pytest.mark.requirement("DL-6.6")
def test_without_its_memory_the_filter_goes_on(service: Service, mailbox: Mailbox) -> None:
    """Mail flows, signed; a virus is refused."""
    with without(service, "valkey-server", filter_hosts(service)):
        code, text = handed_in(service, letter(OUTSIDER, mailbox.address), mailbox.address, service.address)
        assert code == 250, text
        code, text = handed_in(service, letter(OUTSIDER, mailbox.address, text=EICAR), mailbox.address, service.address)
        assert code == 554 and "Virus found" in text, text
        identifier = mailbox.submit(letter(mailbox.address, mailbox.address), mailbox.address, service.address)
    assert f"d={service.domain};".encode() in mailbox.take(identifier)


@pytest.mark.requirement("DL-6.4")
def test_filters_page_needs_its_password(service: Service) -> None:
    """The right one opens it, so that a wrong one is refused for being wrong."""
    store = service.in_group("mailstore")[0]
    for word, answer in ((service.secrets["vault_rspamd_controller_password"], "200"), ("q1", "401"), ("", "401")):
        script = (
            "import urllib.request, urllib.error\n"
            f"request = urllib.request.Request('http://127.0.0.1:11335/stat', headers={{'Password': {word!r}}})\n"
            "try: print(urllib.request.urlopen(request).status)\n"
            "except urllib.error.HTTPError as error: print(error.code)\n"
        )
        with service.python(store, script) as process:
            assert process.communicate()[0].strip() == answer
