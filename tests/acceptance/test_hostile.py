"""Clients that break the rules on purpose: what they want does not happen, and everybody else's mail goes on."""

from __future__ import annotations

import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from service import OUTSIDER, TIMEOUT, Mailbox, Service, letter


class Raw:
    """An SMTP session written octet by octet: no library mends what it sends."""

    def __init__(self, address: str, port: int = 25) -> None:
        self.socket = socket.create_connection((address, port), timeout=TIMEOUT)
        self._file = self.socket.makefile("rb")
        self.answer()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_args: object) -> None:
        self._file.close()
        self.socket.close()

    def answer(self) -> tuple[int, str]:
        """Code and text of the next answer; 0 when the server has hung up."""
        text = ""
        with suppress(ConnectionError):
            for line in self._file:
                text += line.decode(errors="replace")
                if line[3:4] == b" ":
                    return int(line[:3]), text
        return 0, text

    def say(self, line: bytes) -> tuple[int, str]:
        """Send a command and wait for the answer; 0 when the server has hung up."""
        try:
            self.socket.sendall(line + b"\r\n")
        except ConnectionError:
            return 0, ""
        return self.answer()

    def begin(self, recipient: str, sender: str = OUTSIDER) -> None:
        """Up to the answer to DATA, all of it accepted."""
        assert self.say(b"EHLO thu.chua-khai-bao.example")[0] == 250
        assert self.say(f"MAIL FROM:<{sender}>".encode())[0] == 250
        assert self.say(f"RCPT TO:<{recipient}>".encode())[0] == 250
        assert self.say(b"DATA")[0] == 354


def subjects(mailbox: Mailbox) -> list[bytes]:
    """Subjects of all messages in INBOX and Junk."""
    found = []
    with mailbox.imap() as imap:
        for folder in ("INBOX", "Junk"):
            imap.select_folder(folder, readonly=True)
            uids = imap.search(["ALL"])
            found += [data[b"ENVELOPE"].subject for data in imap.fetch(uids, ["ENVELOPE"]).values()] if uids else []
    return found


def ordinary_mail_flows(mailbox: Mailbox, address: str) -> float:
    """Seconds that a plain message takes from a correspondent into the mailbox."""
    started = time.monotonic()
    mailbox.take(mailbox.service.send(letter(OUTSIDER, mailbox.address), mailbox.address, address))
    return time.monotonic() - started


@pytest.mark.parametrize(
    "end",
    [b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r.\r\n", b"\r\n\0.\r\n"],
    ids=["LF.LF", "LF.CRLF", "CRLF.LF", "CR.CR", "CR.CRLF", "NUL"],
)
def test_no_second_message_is_smuggled(service: Service, mailbox: Mailbox, mx: str, end: bytes) -> None:
    """What one server takes for the end of a message and another does not (CVE-2023-51764)."""
    head = f"From: {OUTSIDER}\r\nTo: {mailbox.address}\r\nMessage-ID: <x@chua-khai-bao.example>\r\n".encode()
    inner = f"MAIL FROM:<{OUTSIDER}>\r\nRCPT TO:<{mailbox.address}>\r\nDATA\r\n".encode()
    second = head + b"Subject: smuggled\r\n\r\nsecond\r\n"
    with Raw(mx) as client:
        client.begin(mailbox.address)
        client.socket.sendall(head + b"Subject: first\r\n\r\nfirst" + end + inner + second + b".\r\n")
        codes = [client.answer()[0]]
        client.say(b"QUIT")
    if 250 in codes:
        wait_for = ordinary_mail_flows(mailbox, mx)
        assert wait_for < TIMEOUT
    assert b"smuggled" not in subjects(mailbox)


@pytest.mark.parametrize("where", ["header", "body"])
def test_nul_octets_do_not_pass(service: Service, mailbox: Mailbox, mx: str, where: str) -> None:
    header, body = (b"a\0b", b"c") if where == "header" else (b"a", b"b\0c")
    with Raw(mx) as client:
        client.begin(mailbox.address)
        client.socket.sendall(
            f"From: {OUTSIDER}\r\nTo: {mailbox.address}\r\n".encode() + b"Subject: %s\r\n\r\n%s\r\n" % (header, body)
        )
        assert 500 <= client.say(b".")[0] < 600


def test_a_header_cannot_be_injected_into_a_command(service: Service, mailbox: Mailbox, mx: str) -> None:
    """Line breaks and control characters in addresses are errors, not new commands or header lines."""
    for line in (
        b"MAIL FROM:<a@chua-khai-bao.example>\nRCPT TO:<" + mailbox.address.encode() + b">",
        b"MAIL FROM:<a\rBcc: x@chua-khai-bao.example>",
        b"MAIL FROM:<a@chua-khai-bao.example> SIZE=1\0",
        b'MAIL FROM:<"a\nb"@chua-khai-bao.example>',
    ):
        with Raw(mx) as client:
            client.say(b"EHLO thu.chua-khai-bao.example")
            client.say(line)
            # Whatever came of it, no recipient was named: a message cannot begin.
            assert client.say(b"DATA")[0] // 100 != 3, line


def test_oversized_header_does_not_harm(service: Service, mailbox: Mailbox, mx: str) -> None:
    """20 MiB of header: refused, or cut where the limit is; the next message passes as ever."""
    with Raw(mx) as client:
        client.begin(mailbox.address)
        with suppress(ConnectionError):
            # Whole but for its size: a message that looks like spam has the next one from its sender put off.
            client.socket.sendall(letter(OUTSIDER, mailbox.address).as_bytes().partition(b"\r\n\r\n")[0] + b"\r\n")
            for number in range(20 * 1024):
                client.socket.sendall(b"X-%d: " % number + b"x" * 990 + b"\r\n")
            client.socket.sendall(b"\r\nbody\r\n")
        code, text = client.say(b".")
        assert code == 250 or 400 <= code < 600, text
    assert ordinary_mail_flows(mailbox, mx) < TIMEOUT


def test_ten_thousand_recipients_are_not_taken(service: Service, mailbox: Mailbox, mx: str) -> None:
    taken = 0
    with Raw(mx) as client:
        client.say(b"EHLO thu.chua-khai-bao.example")
        client.say(f"MAIL FROM:<{OUTSIDER}>".encode())
        for number in range(10_000):
            code = client.say(f"RCPT TO:<{mailbox.address.replace('@', f'+{number}@')}>".encode())[0]
            if code == 0:
                break
            taken += code == 250
    assert 100 <= taken <= 1000, f"{taken} recipients taken"  # RFC 5321 asks for 100 at least
    assert ordinary_mail_flows(mailbox, mx) < TIMEOUT


@pytest.mark.parametrize("port", [25, 465, 993])
def test_slow_clients_leave_room_for_others(service: Service, mailbox: Mailbox, port: int) -> None:
    """Two hundred connections from the outside host that say next to nothing, while mail comes and is read here."""
    attacker = (
        "import socket, sys; taken = []\n"
        "for _ in range(200):\n"
        "    try:\n"
        f"        taken.append(socket.create_connection(('{service.address}', {port}), timeout=0.1))\n"
        "        taken[-1].send(b'E')\n"
        "    except OSError: pass\n"
        "print(len(taken), flush=True); sys.stdin.read()\n"
    )
    with service.python("outside", attacker) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        assert ordinary_mail_flows(mailbox, service.address) < TIMEOUT
        mailbox.take(mailbox.submit(letter(mailbox.address, mailbox.address), mailbox.address, service.address, 465))


@pytest.mark.requirement("HT-4.2g", "N-TT39-4.1")
@pytest.mark.parametrize("way", ["inbound", "internal"])
def test_signed_mail_still_verifies(service: Service, mailbox: Mailbox, tmp_path: Path, way: str) -> None:
    """S/MIME (RFC 8551) in clear-signed form, which a single changed octet breaks; and a changed octet is noticed."""

    def openssl(*arguments: str | Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["openssl", *arguments], input=data, capture_output=True, check=False)

    sender = mailbox.address if way == "internal" else OUTSIDER
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=Nguoi ky", "-addext", f"subjectAltName=email:{sender}"]
    extensions = [*subject, "-addext", "extendedKeyUsage=emailProtection", "-addext", "keyUsage=digitalSignature"]
    made = openssl(
        *(
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-noenc",
            "-days",
            "2",
            *extensions,
            "-keyout",
            key,
            "-out",
            certificate,
        )
    )
    assert made.returncode == 0, made.stderr
    text = "Kính gửi Ủy ban nhân dân tỉnh,\r\n\r\n.Một dòng bắt đầu bằng dấu chấm\r\nFrom đầu dòng   \r\n".encode()
    content = b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n" + text
    signed = openssl("cms", "-sign", "-binary", "-crlfeol", "-signer", certificate, "-inkey", key, data=content)
    assert signed.returncode == 0, signed.stderr
    body = b"\r\n".join(signed.stdout.replace(b"\r\n", b"\n").split(b"\n"))
    head = letter(sender, mailbox.address)
    data = (
        b"".join(f"{name}: {head[name]}\r\n".encode() for name in ("From", "To", "Subject", "Date", "Message-ID"))
        + body
    )
    if way == "internal":
        mailbox.submit(data, mailbox.address, service.address)
    else:
        service.send(data, mailbox.address, service.hosts[service.in_group("mx")[1]]["addresses"]["v4"])
    arrived = mailbox.take(str(head["Message-ID"]))

    def verifies(message: bytes) -> bool:
        checked = openssl("cms", "-verify", "-CAfile", certificate, "-purpose", "any", data=message)
        return checked.returncode == 0

    assert verifies(arrived)
    assert not verifies(arrived.replace("Kính gửi".encode(), "Kinh gửi".encode(), 1))
