"""Mail goes from one mailbox to another, and nothing in it changes on the way."""

from __future__ import annotations

import unicodedata
from base64 import b64encode
from email import message_from_bytes, policy
from email.header import Header
from email.message import EmailMessage

import pytest
from service import OUTSIDER, Mailbox, ManageSieve, Service, letter, wait

# Every letter of Vietnamese in both cases: 12 vowels in 6 tones, and the consonants.
VOWELS = "aăâeêioôơuưy"
TONES = ["", "\u0300", "\u0301", "\u0309", "\u0303", "\u0323"]
LETTERS = "".join(unicodedata.normalize("NFC", v + t) for v in VOWELS for t in TONES) + "bcdđghklmnpqrstvx"
ALPHABET = LETTERS + LETTERS.upper()


def body_of(data: bytes) -> bytes:
    """Octets of a message after its header."""
    return data.partition(b"\r\n\r\n")[2]


@pytest.mark.requirement("N-TT39-1.5", "N-TT39-4.4")
@pytest.mark.parametrize("submission", [587, 465])
@pytest.mark.parametrize("reading", [993, 143])
def test_mail_goes_from_unit_to_unit(service: Service, address: str, submission: int, reading: int) -> None:
    """Submission with login, reading over IMAP: by TLS from the start and by STARTTLS."""
    sender, recipient = service.unit("ubnd"), service.unit("sonoivu")
    message = letter(sender.address, recipient.address)
    identifier = sender.submit(message, recipient.address, address, submission)
    received = recipient.take(identifier, address=address, port=reading)
    assert message_from_bytes(received, policy=policy.default)["Subject"] == message["Subject"]
    assert f"Return-Path: <{sender.address}>".encode() in received


@pytest.mark.requirement("N-TT39-1.5", "N-TT39-4.4")
@pytest.mark.parametrize("port", [995, 110])
def test_mail_is_read_over_pop3(service: Service, address: str, port: int) -> None:
    sender, recipient = service.unit("ubnd"), service.unit("sonoivu")
    identifier = sender.submit(letter(sender.address, recipient.address), recipient.address, address)

    def fetched() -> bool:
        with recipient.pop(address, port) as pop:
            for number in range(1, pop.stat()[0] + 1):
                if identifier.encode() in b"\n".join(pop.retr(number)[1]):
                    pop.dele(number)
                    return True
        return False

    wait(f"{identifier} over POP3", fetched)


@pytest.mark.requirement("LC-7.3", "HT-8.1", "N-TT39-2.7")
@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("naming", ["rfc2231", "rfc2047"])
@pytest.mark.parametrize("way", ["submission", "from outside"])
def test_every_vietnamese_letter_survives(
    service: Service, mailbox: Mailbox, address: str, form: str, naming: str, way: str
) -> None:
    """Subject, body and attachment name; the body octet by octet, in 8bit and in base64."""
    text = unicodedata.normalize(form, ALPHABET)
    assert (text == ALPHABET) == (form == "NFC")
    name = f"{text}.txt"
    sent = letter(mailbox.address if way == "submission" else OUTSIDER, mailbox.address, text=f"{text}\n")
    del sent["Subject"]
    sent["Subject"] = text
    sent.add_attachment(text.encode(), maintype="application", subtype="octet-stream", filename=name)
    data = sent.as_bytes()
    if naming == "rfc2047":  # as Outlook writes it
        start = data.index(b"Content-Disposition: attachment")
        end = data.index(b"\r\n\r\n", start)
        encoded = Header(name, "utf-8", maxlinelen=70).encode(linesep="\r\n")
        data = data[:start] + f'Content-Disposition: attachment;\r\n filename="{encoded}"'.encode() + data[end:]
    assert b"8bit" in data and text.encode() in data and b64encode(text.encode())[:70] in data

    if way == "submission":
        identifier = mailbox.submit(data, mailbox.address, address)
    else:
        identifier = service.send(data, mailbox.address, address)
    received = mailbox.take(identifier, address=address)

    assert body_of(received) == body_of(data)
    message = message_from_bytes(received, policy=policy.default)
    assert isinstance(message, EmailMessage)
    assert message["Subject"] == text
    (attachment,) = message.iter_attachments()
    assert attachment.get_filename() == name
    assert attachment.get_content() == text.encode()


@pytest.mark.requirement("LC-7.3", "HT-8.1", "N-TT39-2.7")
@pytest.mark.parametrize("way", ["submission", "from outside"])
def test_raw_utf8_header_is_not_mangled(service: Service, mailbox: Mailbox, address: str, way: str) -> None:
    """Old programs write UTF-8 into the header as it is and do not ask for SMTPUTF8: taken, unchanged, no bounce."""
    message = letter(mailbox.address if way == "submission" else OUTSIDER, mailbox.address)
    subject = f"Subject: {ALPHABET} {message['Subject'][-12:]}".encode()
    head, _, body = message.as_bytes().partition(b"\r\n\r\n")
    lines = [subject if line.startswith(b"Subject:") else line for line in head.split(b"\r\n")]
    data = b"\r\n".join([*lines, "X-Don-Vi: Sở Nội vụ".encode()]) + b"\r\n\r\n" + body
    if way == "submission":
        identifier = mailbox.submit(data, mailbox.address, address)
    else:
        identifier = service.send(data, mailbox.address, address)
    received = mailbox.take(identifier, address=address).split(b"\r\n")
    assert subject in received
    assert "X-Don-Vi: Sở Nội vụ".encode() in received


@pytest.mark.requirement("DL-annex")
def test_corrected_address_leads_to_the_printed_one(service: Service, address: str) -> None:
    alias = f"chicuckiemlam@{service.domain}"
    identifier = service.send(letter(OUTSIDER, alias), alias, address)
    service.unit("chicuckiendlam").take(identifier)


@pytest.mark.requirement("DL-8.7", "LC-11.8", "HT-6.7", "CT-8.6")
@pytest.mark.parametrize("name", ["postmaster", "abuse", "PostMaster"])
def test_reports_of_faults_are_delivered(service: Service, address: str, name: str) -> None:
    """RFC 2142: someone reads postmaster@ and abuse@."""
    recipient = f"{name}@{service.domain}"
    identifier = service.send(letter(OUTSIDER, recipient), recipient, address)
    service.unit("ubnd").take(identifier)


def test_every_mail_exchanger_delivers(service: Service, mailbox: Mailbox, mx: str) -> None:
    identifier = service.send(letter(OUTSIDER, mailbox.address), mailbox.address, mx)
    mailbox.take(identifier)


def test_detail_after_a_plus_is_the_same_mailbox(service: Service, mailbox: Mailbox, address: str) -> None:
    recipient = mailbox.address.replace("@", "+x@")
    identifier = service.send(letter(OUTSIDER, recipient), recipient, address)
    mailbox.take(identifier)


@pytest.mark.parametrize("delimiter", ["-", "."])
def test_hyphen_and_dot_belong_to_the_address(service: Service, mx: str, delimiter: str) -> None:
    """Addresses of LC-4 and HT-2.2 hold them: sonoivu-x@ is nobody here, not sonoivu@."""
    with service.smtp(mx) as smtp:
        smtp.mail(OUTSIDER)
        assert smtp.rcpt(f"sonoivu{delimiter}x@{service.domain}")[0] == 550
        assert smtp.rcpt(f"sonoivu@{service.domain}")[0] == 250


def test_mailbox_has_its_folders_and_quota(mailbox: Mailbox, address: str) -> None:
    """Special folders that mail programs find by themselves (RFC 6154), and the quota that the directory sets."""
    with mailbox.imap(address) as imap:
        special = {flag for flags, _, _ in imap.list_folders() for flag in flags}
        assert {b"\\Drafts", b"\\Sent", b"\\Junk", b"\\Trash"} <= special
        (quota,) = imap.get_quota_root("INBOX")[1]
        assert (quota.resource, quota.limit) == ("STORAGE", 1 << 20)  # KiB


@pytest.mark.requirement("HT-8.1", "LC-7.3", "N-TT39-2.7")
def test_folder_with_vietnamese_name(service: Service, mailbox: Mailbox, address: str) -> None:
    """Modified UTF-7 on the wire (RFC 3501), UTF-8 on disk; both mean the same folder."""
    name = f"Công văn đến {LETTERS[:40]}"
    with mailbox.imap(address) as imap:
        imap.create_folder(name)
        imap.append(name, letter(OUTSIDER, mailbox.address).as_bytes())
    with mailbox.imap(address) as imap:
        assert name in [folder for _, _, folder in imap.list_folders()]
        assert imap.select_folder(name)[b"EXISTS"] == 1
    store = service.in_group("mailstore")[0]
    found = service.run(store, f'find "$(doveadm user -f home {mailbox.address})" -maxdepth 2 -type d')
    assert f"/.{name}\n" in f"{found}\n"


def test_users_own_filter_files_mail(service: Service, mailbox: Mailbox, address: str) -> None:
    with ManageSieve(service, address) as sieve:
        sieve.starttls()
        assert sieve.login(mailbox.address, mailbox.password)
        answer = sieve.activate('require ["fileinto", "mailbox"];\r\nfileinto :create "Báo cáo";\r\n')
        assert answer[0] == "OK", answer
    identifier = service.send(letter(OUTSIDER, mailbox.address), mailbox.address, address)

    def filed() -> int | None:
        with mailbox.imap(address) as imap:
            return mailbox.has(imap, identifier, "Báo cáo") if imap.folder_exists("Báo cáo") else None

    wait("the filter files the message", filed)


def test_filter_cannot_forward_to_the_outside(service: Service, mailbox: Mailbox, address: str) -> None:
    """The mail stays in the mailbox, and nothing is sent on."""
    outside = mailbox.address.replace(f"@{service.domain}", "@noi-khac.example")
    store = service.in_group("mailstore")[0]
    started = float(service.run(store, "date +%s.%N"))
    with ManageSieve(service, address) as sieve:
        sieve.starttls()
        assert sieve.login(mailbox.address, mailbox.password)
        answer = sieve.activate(f'redirect "{outside}";\r\n')
        assert answer[0] == "OK", answer
    identifier = service.send(letter(OUTSIDER, mailbox.address), mailbox.address, address)

    def sent_on() -> list[str]:
        return service.journal(store, started, f" to=<{outside}>")

    with mailbox.imap() as imap:
        wait("the message is kept or sent on", lambda: sent_on() or mailbox.has(imap, identifier))
    assert not sent_on()
    mailbox.take(identifier, seconds=1)
