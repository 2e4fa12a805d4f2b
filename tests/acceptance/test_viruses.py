"""Viruses: refused in mail whichever way it comes, found in the store, and never passed unseen."""

from __future__ import annotations

import base64
import io
import smtplib
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from email.message import EmailMessage

import pytest
from service import OUTSIDER, Mailbox, Service, letter

# The EICAR test file and the content that lab/signatures calls a virus, written so that this file is none.
EICAR = base64.b64decode("WDVPIVAlQEFQWzRcUFpYNTQoUF4pN0NDKTd9JEVJQ0FSLVNUQU5EQVJELUFOVElWSVJVUy1URVNULUZJTEUhJEgrSCo=")
KNOWN_BAD = "-".join(["HOP", "THU", "LAB", "KNOWN", "BAD", "ATTACHMENT"])
BOTH_WAYS_AND_STORE = ["DL-6.6"]
MEGABYTE = 1 << 20
BOMB_SECONDS = 90  # clamav_max_scan_seconds, and what a busy machine adds


def packed(*members: tuple[str, bytes]) -> bytes:
    """A zip file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


def encrypted(name: str, data: bytes) -> bytes:
    """A zip file whose only member says that it is encrypted: bit 0 of the flags, in both of its headers."""
    archive = bytearray(packed((name, data)))
    archive[6] |= 1
    archive[archive.index(b"PK\x01\x02") + 8] |= 1
    return bytes(archive)


def with_attachment(message: EmailMessage, data: bytes, name: str) -> EmailMessage:
    """The message with an attachment, in base64."""
    message.add_attachment(data, "application", "octet-stream", filename=name)
    return message


def infected(form: str, sender: str, recipient: str) -> EmailMessage:
    """A message with the EICAR file in one of its forms."""
    if form == "plain":
        return letter(sender, recipient, text=EICAR.decode() + "\n")
    message = letter(sender, recipient)
    if form == "base64":
        return with_attachment(message, EICAR, "báo cáo.txt")
    data = packed(("báo cáo.txt", EICAR))
    if form == "nested zip":
        data = packed(("phụ lục.zip", packed(("bên trong.zip", data))))
    return with_attachment(message, data, "báo cáo.zip")


FORMS = ["plain", "base64", "zip", "nested zip"]


@contextmanager
def without_clamd(service: Service, *hosts: str) -> Iterator[None]:
    """The time without the virus scanner of some hosts; afterwards it answers again."""
    with ExitStack() as stack:
        for host in hosts:
            stack.callback(service.run, host, "systemctl start clamav-daemon")  # returns when it answers
            service.run(host, "systemctl stop clamav-daemon")
        yield


def filter_hosts(service: Service) -> list[str]:
    """Hosts that scan mail."""
    return [host for host in service.hosts if {"mx", "mailstore"} & set(service.hosts[host]["groups"])]


def assert_refused(error: smtplib.SMTPDataError) -> None:
    """The answer is final and tells the sender why, with the virus' name."""
    text = str(error)
    assert error.smtp_code == 554 and "5.7.1 " in text and "irus" in text and "EICAR" in text, text


@pytest.mark.requirement(*BOTH_WAYS_AND_STORE)
@pytest.mark.parametrize("form", FORMS)
def test_mail_with_a_virus_is_refused(service: Service, mailbox: Mailbox, mx: str, form: str) -> None:
    """From outside, on each mail exchanger and over both families."""
    with pytest.raises(smtplib.SMTPDataError) as caught:
        service.send(infected(form, OUTSIDER, mailbox.address), mailbox.address, mx)
    assert_refused(caught.value)


@pytest.mark.requirement(*BOTH_WAYS_AND_STORE, "LC-11.6")
@pytest.mark.parametrize("form", FORMS)
def test_submitted_mail_with_a_virus_is_refused(service: Service, mailbox: Mailbox, form: str) -> None:
    """What officials send, to the world as to each other."""
    for recipient in (OUTSIDER, mailbox.address):
        with pytest.raises(smtplib.SMTPDataError) as caught:
            mailbox.submit(infected(form, mailbox.address, recipient), recipient, service.address, 465)
        assert_refused(caught.value)


def test_encrypted_archive_goes_to_junk(service: Service, mailbox: Mailbox) -> None:
    """The province's policy is `junk`; an archive that can be looked into arrives like any other mail."""
    for data, folder in ((encrypted("a.txt", b"khoa"), "Junk"), (packed(("a.txt", b"khoa")), "INBOX")):
        message = with_attachment(letter(OUTSIDER, mailbox.address), data, "a.zip")
        identifier = service.send(message, mailbox.address, service.address)
        mailbox.take(identifier, folder)


def test_archive_bomb_ends_and_does_not_pass_unseen(service: Service, mailbox: Mailbox) -> None:
    """More than is looked at: into Junk by the policy, in a bearable time. A virus behind much of nothing is found.

    The archives inside are not called archives, which would be a sign of spam and lead to Junk as well.
    """
    bomb = packed(*((f"{i}.dat", packed(("x", bytes([i]) * 40 * MEGABYTE))) for i in range(8)))
    assert len(bomb) < MEGABYTE
    message = with_attachment(letter(OUTSIDER, mailbox.address), bomb, "a.zip")
    with service.smtp(service.address) as smtp:
        smtp.sock.settimeout(BOMB_SECONDS)
        smtp.sendmail(OUTSIDER, [mailbox.address], message.as_bytes())
    mailbox.take(str(message["Message-ID"]), "Junk")

    hidden = packed(("x", bytes(60 * MEGABYTE) + EICAR))
    message = with_attachment(letter(OUTSIDER, mailbox.address), hidden, "a.zip")
    with service.smtp(service.address) as smtp, pytest.raises(smtplib.SMTPDataError) as caught:
        smtp.sock.settimeout(BOMB_SECONDS)
        smtp.sendmail(OUTSIDER, [mailbox.address], message.as_bytes())
    assert_refused(caught.value)


@pytest.mark.requirement("DL-6.6")
def test_the_peers_scanner_is_the_second_choice(service: Service, mailbox: Mailbox) -> None:
    for host in filter_hosts(service):
        address = service.hosts[host]["addresses"]["v4"]
        with without_clamd(service, host):
            with pytest.raises(smtplib.SMTPDataError) as caught:
                service.send(infected("zip", OUTSIDER, mailbox.address), mailbox.address, address)
            assert_refused(caught.value)
            mailbox.take(service.send(letter(OUTSIDER, mailbox.address), mailbox.address, address))


@pytest.mark.requirement("DL-6.6")
def test_without_any_scanner_mail_waits(service: Service, mailbox: Mailbox, mx: str) -> None:
    """4xx to outside and to officials, never let through; the same messages arrive afterwards."""
    incoming, outgoing = letter(OUTSIDER, mailbox.address), letter(mailbox.address, mailbox.address)
    with without_clamd(service, *filter_hosts(service)):
        with pytest.raises(smtplib.SMTPDataError) as caught:
            service.send(incoming, mailbox.address, mx)
        assert caught.value.smtp_code == 451 and "4.7.1 " in str(caught.value), caught.value
        with pytest.raises(smtplib.SMTPDataError) as caught:
            mailbox.submit(outgoing, mailbox.address, service.address, 465)
        assert caught.value.smtp_code == 451, caught.value
    mailbox.take(service.send(incoming, mailbox.address, mx))
    mailbox.take(mailbox.submit(outgoing, mailbox.address, service.address, 465))


# --- the store


def put_into_store(service: Service, mailbox: Mailbox) -> str:
    """Write a message with a known-bad attachment straight into a mailbox, past every filter; its path."""
    store = service.in_group("mailstore")[0]
    message = with_attachment(letter(OUTSIDER, mailbox.address), KNOWN_BAD.encode(), "bao-cao.doc")
    path = f"$(doveadm user -f home '{mailbox.address}')/Maildir/cur/{time.time_ns()}.M1.thu:2,S"
    text = base64.b64encode(message.as_bytes()).decode()
    script = f'p="{path}"; install -d -o vmail -g vmail -m 700 "${{p%/*}}"; echo {text} | base64 -d > "$p"'
    return str(service.run(store, f'{script}; chown vmail:vmail "$p"; echo "$p"').strip())


@pytest.mark.requirement("N-116-17.3", "DL-6.6")
def test_scheduled_scan_finds_what_lies_in_the_store(service: Service, mailbox: Mailbox) -> None:
    """By the unit that the timer starts: a line with path and signature, and an alarm."""
    store = service.in_group("mailstore")[0]
    assert service.run(store, "systemctl is-active clamav-store-scan.timer") == "active"
    path, began = put_into_store(service, mailbox), time.time()
    service.run(store, "systemctl start clamav-store-scan.service")
    lines = service.journal(store, began, r"KnownBad|^store-virus: ")
    assert any(line.startswith(f"{path}: HopThu.Test.KnownBad") for line in lines), lines
    assert any(line.startswith("store-virus: ") for line in lines), lines


@pytest.mark.requirement("N-116-17.3")
def test_scan_that_could_not_be_made_is_an_alarm(service: Service) -> None:
    """A scan without a scanner never looks like one that found nothing."""
    store, began = service.in_group("mailstore")[0], time.time()
    # A file that is certainly new, so that there is something to look at.
    root = service.run(store, "systemctl show --property=ExecStart clamav-store-scan | grep -oP -- '--store \\K\\S+'")
    try:
        with without_clamd(service, store):
            service.run(store, f"touch {root}/new-file")
            assert service.inside(store).run("systemctl start clamav-store-scan.service").failed
    finally:
        service.run(store, f"rm {root}/new-file; systemctl reset-failed clamav-store-scan.service")
    assert service.journal(store, began, r"^store-scan: .*clamd does not answer")


def test_old_signatures_raise_an_alarm(service: Service) -> None:
    host, began = filter_hosts(service)[-1], time.time()
    service.run(host, "/usr/local/sbin/clamav-database-age --days 0.0000001")
    assert service.journal(host, began, r"^virus-database-old: the newest virus signatures are .* days old")


# --- between the hosts


def test_tunnel_lets_in_peers_only(service: Service) -> None:
    """With a certificate of the authority and a peer's name; neither without one nor with one of one's own making."""
    here, there = filter_hosts(service)[:2]
    own = "/etc/ssl/hopthu"
    make = (
        "cd $(mktemp -d); chmod 755 .; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 2"
        f" -keyout key.pem -out cert.pem -subj /CN={here}.{service.domain}"
        f" -addext subjectAltName=DNS:{here}.{service.domain} 2>&-; chmod 644 key.pem; "
    )
    for family in ("v4", "v6"):
        address = service.hosts[there]["addresses"][family]
        target = f"[{address}]:13310" if ":" in address else f"{address}:13310"
        # As the tunnel's own user: the firewall lets nobody else of this host get as far as the door.
        ask = (
            "(printf 'zPING\\0'; sleep 1) | setpriv --reuid stunnel4 --regid ssl-cert --clear-groups openssl s_client"
            f" -quiet -verify_return_error -CAfile {own}/ca.pem -connect {target}"
        )
        answers = {
            "own": service.inside(here).run(f"{ask} -cert {own}/cert.pem -key {own}/key.pem").stdout,
            "none": service.inside(here).run(ask).stdout,
            "made": service.inside(here).run(f"{make}{ask} -cert cert.pem -key key.pem").stdout,
        }
        assert {name: "PONG" in answer for name, answer in answers.items()} == {
            "own": True,
            "none": False,
            "made": False,
        }, answers
