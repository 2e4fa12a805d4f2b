"""Programs that submit mail with accounts of their own, and mailboxes that take mail from inside only."""

from __future__ import annotations

import json
import secrets
import smtplib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playbook import Files, plan
from service import Mailbox, Service, letter
from test_lifecycle import refused


def here(address: str) -> str:
    """The address from which this machine reaches another: the one host of the application."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        found: str = probe.getsockname()[0]
        return found


@pytest.fixture(scope="module")
def program(lab: dict[str, Any], service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mailbox]:
    """An application of the test's own, loaded from the files, with the password of its slip."""
    files = Files(lab, tmp_path_factory.mktemp("province"))
    tag = f"thu{secrets.token_hex(4)}"
    (address, _word), *_others = service.units.items()
    record = {"id": tag, "name": f"Ứng dụng {tag}", "unit": files.units[0]["id"], "addresses": [address, f"{tag}.bao"]}
    record |= {"hosts": [here(host) for host in service.addresses.values()]} | files.grounds(tag)
    path = files.folder / "directory" / "applications.yml"
    known = files.read("directory/applications.yml")["mail_applications"] if path.exists() else []
    files.write("directory/applications.yml", {"mail_applications": [*known, record]})
    dn = f"uid={tag},ou=applications,{service.base}"
    try:
        run = files.run("directory.yml")
        assert run.status == 0, run.output
        assert [row["action"] for row in plan()["changes"] if row["id"] == tag] == ["connect"]
        word = files.slips()[tag]
        assert word not in run.output
        yield Mailbox(service, f"{tag}@{service.domain}", word, dn)
    finally:
        service.forgive()
        with service.ldap_admin() as admin:
            admin.search(f"ou=applications,{service.base}", f"(uid={tag})")
            for entry in list(admin.entries):
                admin.delete(entry.entry_dn)


def submit(program: Mailbox, sender: str, recipient: str, address: str) -> tuple[str, tuple[int, str]]:
    """Log in as the application and send under `sender`: Message-ID, and the last answer."""
    message = letter(sender, recipient, "Thông báo của ứng dụng")
    with program.service.smtp(address, 587) as smtp:
        smtp.login(program.address, program.password)
        code, text = smtp.mail(sender)
        if code == 250:
            code, text = smtp.rcpt(recipient)
        if code == 250:
            code, text = smtp.data(message.as_bytes())
    return message["Message-ID"], (code, text.decode())


@pytest.mark.requirement("HT-4.2e")
def test_application_sends_as_its_addresses(service: Service, program: Mailbox, mailbox: Mailbox, address: str) -> None:
    """As a unit and as an address of its own, from its host; the mail arrives."""
    tag = program.address.partition("@")[0]
    for sender in (next(iter(service.units)), f"{tag}.bao@{service.domain}"):
        identifier, answer = submit(program, sender, mailbox.address, address)
        assert answer[0] == 250, answer
        assert sender.encode() in mailbox.take(identifier, address=address)


def test_application_sends_as_nobody_else(service: Service, program: Mailbox, mailbox: Mailbox) -> None:
    """Neither as a unit that is not named, nor under its login, which is not among its addresses."""
    for sender in (list(service.units)[1], mailbox.address, program.address):
        _identifier, (code, text) = submit(program, sender, mailbox.address, service.address)
        assert (code, "not owned by user" in text) == (553, True), text


@pytest.mark.requirement("HT-4.2e")
def test_application_logs_in_from_its_hosts_only(service: Service, program: Mailbox) -> None:
    """With the right password from another host it is refused, as often as somebody tries; from its own it goes on."""
    script = (
        "import json, smtplib, sys; go = json.load(sys.stdin)\n"
        "with smtplib.SMTP(go['to'], 587, timeout=60) as smtp:\n"
        "    smtp.starttls(); smtp.ehlo()\n"
        "    try: answer = smtp.login(go['user'], go['word'])\n"
        "    except smtplib.SMTPAuthenticationError as error: answer = error.args\n"
        "    print(answer[0])\n"
    )
    go = {"to": service.addresses["ipv4"], "user": program.address, "word": program.password}
    with service.python("outside", script) as process:
        output, _ = process.communicate(json.dumps(go))
    assert output.strip() == "535"
    service.forgive()
    with service.smtp(service.address, 587) as smtp:
        smtp.login(program.address, program.password)


def test_application_opens_no_mailbox(service: Service, program: Mailbox) -> None:
    """IMAP, POP3 and ManageSieve refuse it from its own host, and nobody writes to it."""
    assert refused(program, service) == ["imap", "pop3", "sieve"]
    with service.smtp(service.address) as smtp:
        smtp.mail("nguoi@chua-khai-bao.example")
        code, _text = smtp.rcpt(program.address)
        assert code == 550


def test_suspended_application_is_refused(service: Service, program: Mailbox) -> None:
    """Its next login fails; an open session sends no more."""
    unit = next(iter(service.units))
    with service.smtp(service.address, 587) as smtp:
        smtp.login(program.address, program.password)
        service.modify(program.dn, mailboxState="suspended")
        try:
            code, _text = smtp.mail(unit)
            if code == 250:
                code, _text = smtp.rcpt(unit)
            assert code == 550
            with service.smtp(service.address, 587) as again, pytest.raises(smtplib.SMTPAuthenticationError):
                again.login(program.address, program.password)
        finally:
            service.modify(program.dn, mailboxState="active")


def test_internal_mailbox_takes_mail_from_inside_only(
    service: Service, new_mailbox: Callable[..., Mailbox], mx: str
) -> None:
    """A correspondent is refused on every mail exchanger, under the main address and an alias; an official is not."""
    alias = f"thu-{secrets.token_hex(5)}@{service.domain}"
    inside = new_mailbox(mailboxInternal="TRUE", mailLocalAddress=alias)
    sender = f"nguoidan@{service.outside['domain']}"
    for recipient in (inside.address, alias):
        code, text = service.from_outside(letter(sender, recipient), recipient, mx, sender)
        assert code == 550, text
    official = service.unit(next(iter(service.units)).partition("@")[0])
    identifier = official.submit(letter(official.address, inside.address), alias, service.address)
    assert inside.take(identifier)
