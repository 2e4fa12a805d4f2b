"""DNS: what the province publishes, what its hosts believe, and mail that leaves only where DNS proves the way."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dns.message
import dns.query
import pytest
from playbook import Province
from service import Mailbox, Service, letter, wait

WRONG_TLSA = f"3 1 1 {'0' * 64}"


@contextmanager
def edited(service: Service, zone: str, *commands: str) -> Iterator[None]:
    """The time with a zone outside changed by knotc's `commands` (zone-set, zone-unset without the zone's name)."""
    edits = [f"{command.split()[0]} {zone} {command.split(' ', 1)[1]}" for command in commands]
    script = "; ".join(f"knotc {line}" for line in (f"zone-begin {zone}", *edits, f"zone-commit {zone}"))
    service.run("outside", f"set -e; {script}")
    forget(service, zone)
    try:
        yield
    finally:
        service.run("outside", f"touch /var/lib/knot/zones/{zone}.zone; knotc -b zone-reload {zone}")
        forget(service, zone)


def forget(service: Service, zone: str) -> None:
    """Make the hosts ask anew for the names of a zone."""
    for host in service.in_group("mx"):
        service.run(host, f"unbound-control flush_zone {zone}")


def arrives(service: Service, identifier: str) -> None:
    """Wait until a message lies in the correspondents' mailbox, trying what waits again all the while.

    More than once: a process of Postfix's keeps what the DNS said for some seconds.
    """
    find = f"sleep 1; grep -rlF '{identifier}' {service.outside['maildir']}/new || true"

    def found() -> str:
        for host in service.in_group("mx"):
            service.run(host, "postqueue -f")
        return service.run("outside", find)

    wait(f"{identifier} at the correspondent", found, 60)


def sent(service: Service, mailbox: Mailbox, recipient: str) -> str:
    """Send a message of a mailbox to the outside; its Message-ID."""
    return mailbox.submit(letter(mailbox.address, recipient), recipient, service.address)


def held(service: Service, recipient: str) -> str:
    """Wait until a message waits in the queue of a mail exchanger; why."""

    def reason() -> str | None:
        waiting = (text for host in service.in_group("mx") for _id, text in service.queued(host, recipient) if text)
        return next(waiting, None)

    return wait(f"mail to {recipient} waits", reason, 60)


def said_on_the_way(service: Service, since: float, pattern: str) -> list[str]:
    """Lines of the mail exchangers' journals."""
    return [line for host in service.in_group("mx") for line in service.journal(host, since, pattern)]


def test_published_records_are_as_printed(lab: dict[str, Any], tmp_path: Path) -> None:
    run = Province(lab, tmp_path).run("dns-records.yml", "--check")
    assert run.status == 0, run.message
    assert "is not signed" not in run.output
    assert not any(run.changed.values())


@pytest.mark.requirement("DL-10")
def test_records_that_are_wrong_or_not_ours_are_named(lab: dict[str, Any], service: Service, tmp_path: Path) -> None:
    domain = service.domain
    second = service.in_group("mx")[1]
    with edited(
        service,
        domain,
        "zone-set @ 60 MX 5 mx.thu-mien-phi.example.",
        "zone-set @ 60 TXT '\"v=spf1 +all\"'",
        "zone-unset _dmarc TXT",
        f"zone-unset {second} AAAA",
        f"zone-unset _25._tcp.{second} TLSA",
        f"zone-set _25._tcp.{second} 60 TLSA {WRONG_TLSA}",
    ):
        run = Province(lab, tmp_path).run("dns-records.yml", "--check")
    assert run.status != 0
    for part in (
        f"{domain} MX 5 mx.thu-mien-phi.example. is none of the province's mail exchangers",
        f"{domain} has 2 TXT records of v=spf1",
        f"_dmarc.{domain} TXT v=DMARC1; p=reject",
        f"{second}.{domain} AAAA {service.hosts[second]['addresses']['v6']} is missing",
        f"_25._tcp.{second}.{domain} TLSA 3 1 1",
    ):
        assert part in run.message
    # Nothing that is right is blamed.
    assert "_domainkey" not in run.message and "_submissions" not in run.message


@pytest.mark.requirement("N-TT39-4.4")
def test_hosts_believe_only_what_is_signed(service: Service) -> None:
    started = time.time()
    domains = service.outside["domains"]
    name = f"mail.{domains['bogus']}"
    answer = dns.query.udp(dns.message.make_query(name, "A"), service.outside["addresses"]["v4"], timeout=5)
    assert answer.answer, "the name exists, only its signature does not fit"
    for host in service.hosts:
        service.run(host, f"unbound-control flush_zone {domains['bogus']}")
        assert service.run(host, f"getent ahosts mail.{domains['correspondent']}")
        assert service.inside(host).run(f"getent ahosts {name}").rc == 2, f"{host} believes {name}"
        assert service.journal(host, started, f"validation failure <{name}")


def test_mail_to_a_domain_with_dane_is_verified(service: Service, mailbox: Mailbox) -> None:
    started = time.time()
    domain = service.outside["domains"]["forged"]  # it has DANE, and no MTA-STS policy that would do the same
    arrives(service, sent(service, mailbox, f"can-bo@{domain}"))
    assert said_on_the_way(service, started, f"Verified TLS connection established to mail.{domain}")


def test_mail_waits_while_dane_is_broken(service: Service, mailbox: Mailbox) -> None:
    # The domain's MTA-STS policy is in order all the while: it must not stand in for DANE (RFC 8461 section 2).
    domain = service.outside["domain"]
    recipient = f"dane-{secrets.token_hex(4)}@{domain}"
    change = ("zone-unset _25._tcp.mail TLSA", f"zone-set _25._tcp.mail 5 TLSA {WRONG_TLSA}")
    with edited(service, domain, *change):
        identifier = sent(service, mailbox, recipient)
        reason = held(service, recipient)
        assert "not trusted" in reason or "not verified" in reason, reason
    arrives(service, identifier)


def test_mail_waits_while_the_certificate_is_not_what_the_policy_demands(service: Service, mailbox: Mailbox) -> None:
    domain = service.outside["domains"]["sts_only"]
    recipient = f"sts-{secrets.token_hex(4)}@{domain}"
    arrives(service, sent(service, mailbox, recipient))
    shown = service.run("outside", "postconf -h smtpd_tls_chain_files")
    wrong = "/etc/ssl/outside/wrong-key.pem, /etc/ssl/outside/wrong.pem"
    service.run("outside", f"postconf -e 'smtpd_tls_chain_files = {wrong}'; systemctl restart postfix")
    try:
        identifier = sent(service, mailbox, recipient)
        reason = held(service, recipient)
        assert "not trusted" in reason or "not verified" in reason, reason
    finally:
        service.run("outside", f"postconf -e 'smtpd_tls_chain_files = {shown}'; systemctl restart postfix")
    arrives(service, identifier)
