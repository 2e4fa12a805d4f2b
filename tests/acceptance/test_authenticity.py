"""Who a message is from: forged mail is refused, our own cannot be forged and leaves signed."""

from __future__ import annotations

import re
import secrets
from base64 import b64decode
from collections.abc import Callable
from email import message_from_bytes, policy
from email.message import EmailMessage
from email.utils import formatdate
from pathlib import Path

import dkim
import dns.message
import dns.query
import dns.rdatatype
import pytest
from milter import SETTINGS, setting
from service import Mailbox, Service, letter, message_id, wait

OWN_ADDRESS_ONLY = ["DL-8.4", "LC-11.4", "HT-6.4", "CT-8.4"]
FORGERY = ["DL-6.4"]
SIGNED = [b"from", b"to", b"subject", b"date", b"message-id"]


class Outside:
    """The world outside as it signs and seals its mail."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.domain: str = service.outside["domains"]["correspondent"]
        self.forged: str = service.outside["domains"]["forged"]

    def signature(self, data: bytes, domain: str) -> bytes:
        """A DKIM signature of a domain (RFC 6376), as a header."""
        selector, key = self._key(domain)
        return bytes(dkim.sign(data, selector, domain.encode(), key, include_headers=SIGNED))

    def seal(self, data: bytes, domain: str, verdict: str) -> bytes:
        """The message, forwarded by a domain that says what it found (RFC 8617)."""
        selector, key = self._key(domain)
        judged = f"Authentication-Results: {domain}; {verdict}\r\n".encode() + data
        return b"".join(dkim.arc_sign(judged, selector, domain.encode(), key, domain.encode(), SIGNED)) + data

    def _key(self, domain: str) -> tuple[bytes, bytes]:
        entry = self.service.outside["dkim"][domain]
        return entry["selector"].encode(), Path(entry["key_file"]).read_bytes()

    def record(self, name: bytes, timeout: float = 5) -> bytes | None:
        """TXT record of a name as the world outside publishes it."""
        query = dns.message.make_query(name.decode(), dns.rdatatype.TXT)
        answer = dns.query.tcp(query, self.service.outside["addresses"]["v4"], timeout=timeout)
        texts = [rdata for rrset in answer.answer if rrset.rdtype == dns.rdatatype.TXT for rdata in rrset]
        return b"".join(texts[0].strings) if texts else None


@pytest.fixture
def outside(service: Service) -> Outside:
    """The world outside."""
    return Outside(service)


def handed_in(
    service: Service, data: bytes, recipient: str, sender: str, outside: bool = False, address: str | None = None
) -> tuple[int, str]:
    """Last answer to a message on port 25: from the correspondent's host, or from one that no domain names."""
    address = address or service.address
    if outside:
        return service.from_outside(data, recipient, address, sender)
    with service.smtp(address) as smtp:
        code, text = smtp.mail(sender)
        code, text = smtp.rcpt(recipient) if code == 250 else (code, text)
        code, text = smtp.data(data) if code == 250 else (code, text)
    return code, text.decode()


def submitted(box: Mailbox, sender: str, data: bytes) -> tuple[int, str]:
    """Last answer to an official's message under a sender address."""
    with box.service.smtp(box.service.address, 587) as smtp:
        smtp.login(box.address, box.password)
        smtp.mail(sender)
        smtp.rcpt(box.address)
        code, text = smtp.data(data)
    return code, text.decode()


@pytest.mark.requirement(*FORGERY)
@pytest.mark.parametrize("signed", [True, False])
def test_correspondents_mail_arrives(
    service: Service, mailbox: Mailbox, outside: Outside, mx: str, signed: bool
) -> None:
    """From a host that its domain names; the verdict is in the header for mail programs to show."""
    sender = f"nguoidan@{outside.domain}"
    data = letter(sender, mailbox.address).as_bytes()
    data = (outside.signature(data, outside.domain) if signed else b"") + data
    code, text = handed_in(service, data, mailbox.address, sender, outside=True, address=mx)
    assert code == 250, text
    received = message_from_bytes(mailbox.take(message_id(data)), policy=policy.default)
    verdict = received["Authentication-Results"]
    assert "dmarc=pass" in verdict and "spf=pass" in verdict and ("dkim=pass" in verdict) == signed, verdict


@pytest.mark.requirement(*FORGERY)
def test_forged_results_are_taken_out(service: Service, mailbox: Mailbox, outside: Outside) -> None:
    """RFC 8601 5: what a stranger says that we found."""
    sender = f"nguoidan@{outside.domain}"
    message = letter(sender, mailbox.address)
    message["Authentication-Results"] = f"{service.in_group('mx')[0]}; dkim=pass header.d=gia-mao.example"
    code, text = handed_in(service, message.as_bytes(), mailbox.address, sender, outside=True)
    assert code == 250, text
    received = message_from_bytes(mailbox.take(message_id(message.as_bytes())), policy=policy.default)
    assert len(received.get_all("Authentication-Results", [])) == 1
    assert "gia-mao" not in received["Authentication-Results"]


@pytest.mark.requirement(*FORGERY)
@pytest.mark.parametrize("case", ["SPF and DMARC", "DMARC only", "SPF only", "broken signature"])
def test_forged_mail_is_refused(service: Service, mailbox: Mailbox, outside: Outside, case: str) -> None:
    """At the door; the same mail from its true host, or whole, is taken (see above and below)."""
    sender = author = f"canbo@{outside.forged}"
    if case == "DMARC only":
        sender = "canbo@chua-khai-bao.example"
    elif case == "SPF only":
        author = "canbo@chua-khai-bao.example"
    data = letter(author, mailbox.address).as_bytes()
    if case == "broken signature":
        sender = "canbo@chua-khai-bao.example"
        data = (outside.signature(data, outside.forged) + data).replace("Kính gửi".encode(), "Chuyển tiền".encode())
    code, text = handed_in(service, data, mailbox.address, sender)
    assert code == 554 and ("SPF" if case == "SPF only" else "DMARC") in text, text


@pytest.mark.requirement(*FORGERY)
def test_signed_mail_arrives_by_any_way(service: Service, mailbox: Mailbox, outside: Outside) -> None:
    """Forwarded by a host that its domain does not name: SPF fails, the signature holds."""
    sender = f"canbo@{outside.forged}"
    data = letter(sender, mailbox.address).as_bytes()
    data = outside.signature(data, outside.forged) + data
    # As each host on the way writes down that it took the message.
    way = f"from thu.{outside.forged} by chua-khai-bao.example with ESMTPS; {formatdate()}"
    code, text = handed_in(service, f"Received: {way}\r\n".encode() + data, mailbox.address, sender)
    assert code == 250, text
    mailbox.take(message_id(data))


@pytest.mark.requirement(*FORGERY)
def test_trusted_forwarders_are_believed(service: Service, mailbox: Mailbox, outside: Outside) -> None:
    """What they found authentic passes without a signature; a stranger's seal, also above theirs, does not."""
    author = f"canbo@{outside.forged}"
    stranger: str = service.outside["domains"]["sts_only"]
    passed = f"spf=pass smtp.mailfrom={outside.forged}; dmarc=pass header.from={outside.forged}"
    failed = f"spf=fail smtp.mailfrom={outside.forged}; dmarc=fail header.from={outside.forged}"

    def answer(data: bytes) -> int:
        return handed_in(service, data, mailbox.address, "canbo@chua-khai-bao.example")[0]

    def fresh() -> bytes:
        return letter(author, mailbox.address).as_bytes()

    believed = {'"trusted_forwarders": []': f'"trusted_forwarders": ["{outside.domain}"]'}
    sealed = outside.seal(fresh(), outside.domain, passed)
    with setting(service, SETTINGS, believed):
        assert answer(outside.seal(fresh(), outside.domain, failed)) == 554
        assert answer(outside.seal(fresh(), stranger, passed)) == 554
        changed = sealed.replace("Kính gửi".encode(), "Chuyển tiền".encode())
        assert answer(changed) == 554
        assert answer(outside.seal(changed, stranger, f"arc=pass; {passed}")) == 554
        assert answer(sealed) == 250
    mailbox.take(message_id(sealed))
    assert answer(outside.seal(fresh(), outside.domain, passed)) == 554


@pytest.mark.requirement(*OWN_ADDRESS_ONLY)
@pytest.mark.parametrize("envelope", ["canbo@chua-khai-bao.example", "the same"])
def test_our_own_addresses_come_from_us_only(
    service: Service, mailbox: Mailbox, outside: Outside, mx: str, envelope: str
) -> None:
    """Signed by somebody else or not at all: a stranger cannot write as an office of ours, inside or outside."""
    author = f"ubnd@{service.domain}"
    sender = author if envelope == "the same" else envelope
    data = letter(author, mailbox.address).as_bytes()
    for signature in (b"", outside.signature(data, outside.domain)):
        code, text = handed_in(service, signature + data, mailbox.address, sender, address=mx)
        if envelope == "the same":  # refused before its text
            assert code == 550 and text.startswith("5.7.1 "), text
        else:
            assert code == 554 and "is ours" in text, text


@pytest.mark.requirement(*OWN_ADDRESS_ONLY)
@pytest.mark.parametrize("case", ["other From", "two From headers", "two addresses", "other Sender", "no From"])
def test_header_names_the_sender_only(service: Service, mailbox: Mailbox, case: str) -> None:
    """RFC 5322 3.6.2: what the recipient sees is the address that the login may use."""
    other = f"ubnd@{service.domain}"
    message = letter(other if case == "other From" else mailbox.address, mailbox.address)
    if case == "two addresses":
        message.replace_header("From", f"{mailbox.address}, {other}")
    elif case == "no From":
        del message["From"]
    if case in ("two addresses", "other Sender"):
        message["Sender"] = other if case == "other Sender" else mailbox.address
    data = message.as_bytes()
    if case == "two From headers":
        data = f"From: {other}\r\n".encode() + data
    code, text = submitted(mailbox, mailbox.address, data)
    assert code == 554 and ("From:" in text or "Sender:" in text), text


@pytest.mark.requirement("DL-9", "LC-10.2", "HT-7.2", "CT-9.1")
def test_delegate_writes_as_the_unit(service: Service, new_mailbox: Callable[..., Mailbox]) -> None:
    """In the header too, in any case of letters and with a name; not with the unit outside and himself inside."""
    login = new_mailbox()
    unit = new_mailbox(mailboxAgent=login.address)
    named = f"Sở Nội vụ <{unit.address.upper()}>"
    message = letter(unit.address, login.address)
    message.replace_header("From", named)
    assert submitted(login, unit.address, message.as_bytes())[0] == 250
    login.take(message_id(message.as_bytes()))
    code, text = submitted(login, unit.address, letter(login.address, login.address).as_bytes())
    assert code == 554 and "is not the address you send with" in text, text


def arrived(service: Service, identifier: str) -> bytes:
    """A message as the correspondent's host got it."""
    folder = service.outside["maildir"]
    found = wait(
        f"{identifier} outside",
        lambda: service.inside("outside").run(f"grep -rlF '{identifier}' {folder}/new {folder}/cur").stdout.split(),
        60,
    )
    # Stored with the line ends of the file system.
    return b64decode(service.run("outside", f"base64 {found[0]}")).replace(b"\n", b"\r\n")


@pytest.mark.requirement("DL-6.4")
def test_outgoing_mail_is_signed_and_whole(service: Service, mailbox: Mailbox, outside: Outside) -> None:
    """Verified by a library of its own against the record that is published; every octet of a signed body is there."""
    recipient = f"nguoidan@{outside.domain}"
    message = EmailMessage(policy=policy.SMTP)
    for name, value in letter(mailbox.address, recipient, "Đơn vị ký số").items():
        if not name.lower().startswith(("content-", "mime-")):
            message[name] = value
    boundary = secrets.token_hex(8)
    body = (
        f"--{boundary}\r\nContent-Type: text/plain; charset=utf-8\r\n\r\nKính gửi \t \r\nđược ký.  \r\n"
        f"--{boundary}\r\nContent-Type: application/pkcs7-signature; name=smime.p7s\r\n\r\nMIIB\r\n--{boundary}--\r\n"
    ).encode()
    kind = f'multipart/signed; protocol="application/pkcs7-signature"; micalg=sha-256; boundary="{boundary}"'
    head = message.as_bytes().partition(b"\r\n\r\n")[0]
    data = head + f"\r\nMIME-Version: 1.0\r\nContent-Type: {kind}\r\n\r\n".encode() + body
    identifier = mailbox.submit(data, recipient, service.address)
    received = arrived(service, identifier)
    assert received.partition(b"\r\n\r\n")[2] == body
    signature = message_from_bytes(received, policy=policy.default)["DKIM-Signature"]
    assert re.search(rf"\bd={re.escape(service.domain)};", signature), signature
    assert dkim.verify(received, dnsfunc=outside.record)
    assert not dkim.verify(received.replace("được ký".encode(), "đã sửa".encode()), dnsfunc=outside.record)


@pytest.mark.requirement("DL-6.4")
def test_what_cannot_be_signed_waits(service: Service, mailbox: Mailbox) -> None:
    """Never out unsigned; nothing is lost, the mail program keeps it."""
    data = letter(mailbox.address, mailbox.address).as_bytes()
    with setting(service, SETTINGS, {f'"{service.domain}" {{': '"chua-khai-bao.example" {'}):
        code, text = submitted(mailbox, mailbox.address, data)
        assert code == 451 and "cannot be signed" in text, text
    assert submitted(mailbox, mailbox.address, data)[0] == 250
    mailbox.take(message_id(data))
