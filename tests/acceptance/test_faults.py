"""A daemon is away for a while: nothing is refused for good and nothing is lost."""

from __future__ import annotations

import poplib
import smtplib
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor

import pytest
from imapclient.exceptions import LoginError
from service import OUTSIDER, Mailbox, ManageSieve, Service, letter, wait


def answers_at_rcpt(service: Service, recipient: str) -> dict[str, int]:
    """Reply codes of all mail exchangers to a recipient, each asked over both families at the same time."""

    def ask(address: str) -> int:
        started = time.monotonic()
        with service.smtp(address) as smtp:
            smtp.mail(OUTSIDER)
            code: int = smtp.rcpt(recipient)[0]
        assert time.monotonic() - started < 20, f"{address} took more than 20 s"
        return code

    addresses = [address for host in service.in_group("mx") for address in service.hosts[host]["addresses"].values()]
    with ThreadPoolExecutor(len(addresses)) as pool:
        return dict(zip(addresses, pool.map(ask, addresses), strict=True))


def flush(service: Service) -> None:
    """Try what waits in the queues now, not in a minute."""
    for host in service.in_group("mx"):
        service.run(host, "postqueue -f")


@pytest.mark.requirement("HT-2.3", "LC-5")
def test_without_directory_recipients_get_4xx(service: Service, mailbox: Mailbox) -> None:
    """Nobody else knows who has a mailbox, so neither a known nor an unknown recipient gets a final answer."""
    with service.stopped(service.in_group("directory"), "slapd", 636):
        for recipient in (mailbox.address, f"khongcoai@{service.domain}"):
            answers = answers_at_rcpt(service, recipient)
            assert {code // 100 for code in answers.values()} == {4}, answers
    identifier = service.send(letter(OUTSIDER, mailbox.address), mailbox.address, service.address)
    mailbox.take(identifier)


def test_hanging_directory_gives_4xx_in_time(service: Service, mailbox: Mailbox) -> None:
    """A directory that takes connections and never answers is worse than none; the client still gets its 4xx."""
    try:
        for directory in service.in_group("directory"):
            service.run(directory, "systemctl kill --signal=STOP slapd")
        answers = answers_at_rcpt(service, mailbox.address)
    finally:
        for directory in service.in_group("directory"):
            service.run(directory, "systemctl kill --signal=CONT slapd")
    assert {code // 100 for code in answers.values()} == {4}, answers


def test_without_directory_login_fails_for_now(service: Service, mailbox: Mailbox) -> None:
    """Told as the server's trouble, so that no mail program asks its user for a new password."""

    def imap() -> str:
        with pytest.raises(LoginError) as caught, mailbox.imap():
            pass
        return str(caught.value)

    def pop() -> str:
        with pytest.raises(poplib.error_proto) as caught, mailbox.pop(service.address):
            pass
        return str(caught.value)

    def sieve() -> str:
        with ManageSieve(service, service.address) as client:
            client.starttls()
            token = b64encode(f"\0{mailbox.address}\0{mailbox.password}".encode())
            return client.command(b'AUTHENTICATE "PLAIN" "' + token + b'"')[1]

    def submission() -> str:
        with pytest.raises(smtplib.SMTPResponseException) as caught, service.smtp(service.address, 465) as smtp:
            smtp.login(mailbox.address, mailbox.password)
        return str(caught.value)

    with service.stopped(service.in_group("directory"), "slapd", 636), ThreadPoolExecutor(4) as pool:
        texts = [call.result() for call in [pool.submit(ask) for ask in (imap, pop, sieve, submission)]]
    for text, expected in zip(texts, ("[UNAVAILABLE]", "[SYS/TEMP]", "TRYLATER", "(45"), strict=True):
        assert expected in text
    with mailbox.imap():
        pass


def send_through_all(service: Service, recipient: str) -> list[str]:
    """A message through each mail exchanger, after each has tried and failed to deliver it; their Message-IDs."""
    identifiers = []
    for host in service.in_group("mx"):
        message = letter(OUTSIDER, recipient)
        identifiers.append(service.send(message, recipient, service.hosts[host]["addresses"]["v4"]))
        service.deferred(host, recipient)
    return identifiers


def test_mail_waits_for_the_mail_store(service: Service, mailbox: Mailbox) -> None:
    with service.stopped(service.in_group("mailstore"), "dovecot", 993):
        identifiers = send_through_all(service, mailbox.address)
    flush(service)
    for identifier in identifiers:
        mailbox.take(identifier)


def test_accepted_mail_waits_for_the_directory(service: Service, mailbox: Mailbox) -> None:
    """The directory goes away after mail was accepted and before it is delivered: tried again, not returned."""
    stores, providers = service.in_group("mailstore"), service.in_group("directory")
    with service.stopped(providers, "slapd", 636):
        with service.stopped(stores, "dovecot", 993):
            for provider in providers:
                service.run(provider, "systemctl start slapd")
            identifiers = send_through_all(service, mailbox.address)
            for provider in providers:
                service.run(provider, "systemctl stop slapd")
        flush(service)
        for host in service.in_group("mx"):
            wait(
                f"{host} tries again and waits",
                lambda host=host: all("said: 451" in reason for _, reason in service.queued(host, mailbox.address)),
                60,  # the store asks both directories first
            )
            assert service.queued(host, mailbox.address)
    flush(service)
    for identifier in identifiers:
        mailbox.take(identifier)
