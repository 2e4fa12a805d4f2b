"""Mailboxes of a lab as their owners use them: own passwords, and one mail as proof."""

from __future__ import annotations

import imaplib
import json
import secrets
import smtplib
import ssl
import string
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.message import EmailMessage
from email.utils import make_msgid
from pathlib import Path
from typing import Any

from ldap3 import Connection, Server, Tls
from ldap3.core.exceptions import LDAPException

import files
from hosts import Lab
from machine import LabError

ALPHABET = string.ascii_letters + string.digits + "-_.+"
CLASSES = (string.ascii_lowercase, string.ascii_uppercase, string.digits, "-_.+")
TIMEOUT = 30


@dataclass(frozen=True)
class Activation:
    """What activating did: mailboxes given a password now, and mailboxes that have one."""

    changed: int
    total: int


def activate(lab: Lab, result: dict[str, Any]) -> Activation:
    """Give every mailbox a password of its own through LDAP self-service (RFC 3062).

    A password in the credentials file that still works is kept. A new one is written there before
    it is set: a run that is cut off can be repeated, for until then the initial one works.
    """
    store = Path(result["credentials_file"])
    known: dict[str, str] = {}
    if store.exists():
        known = json.loads(store.read_text(encoding="utf-8"))
    initial = files.slips(lab)
    mailboxes = _mailboxes(result)
    due = {
        address: (dn, initial.get(identifier))
        for identifier, (dn, address) in mailboxes.items()
        if address not in known or not _may_log_in(result, dn, known[address])
    }
    lost = sorted(address for address, (_dn, password) in due.items() if password is None)
    if lost:
        raise LabError(
            f"{_listed(lost)}: no slip holds an initial password and none is known; take the lab"
            f" down and up again ({lab.command} down)."
        )
    kept = {address: known[address] for _dn, address in mailboxes.values() if address in known}
    fresh = {address: _password() for address in due}
    _store(store, {**kept, **fresh})
    refused = {}
    for address, (dn, password) in due.items():
        with _bound(result, dn, password or "") as connection:
            done = connection.bound and connection.extend.standard.modify_password(
                user=dn, old_password=password, new_password=fresh[address]
            )
            if not done:
                refused[address] = f"{address} ({connection.result['description']})"
    if refused:
        # A mailbox that is only locked for now gets its known password back.
        _store(store, {**kept, **{a: fresh[a] for a in fresh if a not in refused}})
        raise LabError(f"The initial password could not be changed: {_listed(sorted(refused.values()))}.")
    return Activation(changed=len(due), total=len(mailboxes))


def _store(path: Path, passwords: dict[str, str]) -> None:
    text = json.dumps(dict(sorted(passwords.items())), indent=2, ensure_ascii=False)
    files.write_private(path, f"{text}\n")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _password() -> str:
    """A random password of 24 characters with a letter of each case, a digit and a sign."""
    while True:
        password = "".join(secrets.choice(ALPHABET) for _ in range(24))
        if all(set(password) & set(kind) for kind in CLASSES):
            return password


@contextmanager
def _bound(result: dict[str, Any], dn: str, password: str) -> Iterator[Connection]:
    """An LDAP connection over verified TLS after a bind; `.bound` says whether it succeeded."""
    uri = result["ldap"]["uri"]
    try:
        tls = Tls(ca_certs_file=result["ca_file"], validate=ssl.CERT_REQUIRED)
        server = Server(uri, tls=tls, connect_timeout=TIMEOUT)
        connection = Connection(server, dn, password, receive_timeout=TIMEOUT)
        connection.bind()
        yield connection
        connection.unbind()
    except LDAPException as error:
        raise LabError(f"The directory at {uri} cannot be reached: {error}") from error


def _may_log_in(result: dict[str, Any], dn: str, password: str) -> bool:
    with _bound(result, dn, password) as connection:
        return bool(connection.bound)


def _mailboxes(result: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Directory id → (DN, address) of every mailbox that may log in."""
    ldap = result["ldap"]
    password = Path(ldap["password_file"]).read_text(encoding="utf-8")
    found = {}
    with _bound(result, ldap["bind_dn"], password) as connection:
        if not connection.bound:
            raise LabError(f"{ldap['uri']} refuses the login of {ldap['bind_dn']}.")
        for entry in connection.extend.standard.paged_search(
            ldap["base"],
            "(&(objectClass=hopThuMailbox)(mailboxState=active))",
            attributes=["uid", "mail"],
            paged_size=1000,
        ):
            if entry["type"] == "searchResEntry":
                attributes = entry["attributes"]
                found[attributes["uid"][0]] = (entry["dn"], attributes["mail"][0])
    if not found:
        raise LabError(f"The directory at {ldap['uri']} holds no active mailbox.")
    return found


@dataclass(frozen=True)
class Proof:
    """A mail that went through: addresses, subject, seconds from submission to reading."""

    sender: str
    recipient: str
    subject: str
    seconds: float


def prove(lab: Lab, result: dict[str, Any], province: Path) -> Proof:
    """Send a mail from the province's first unit to its second and read it back.

    Submission on 587 with STARTTLS (RFC 6409, RFC 3207), reading on 993 (RFC 8314), both with the
    certificate checked against the lab's CA. LabError names the step that failed.
    """
    passwords = json.loads(Path(result["credentials_file"]).read_text(encoding="utf-8"))
    units = files.read_yaml(province / "directory" / "units.yml", lab).get("mail_units") or []
    by_id = {identifier: address for identifier, (_, address) in _mailboxes(result).items()}
    active = [by_id[unit["id"]] for unit in units if unit["id"] in by_id]
    if len(active) < 2:
        raise LabError(
            f"inventories/{province.name}/directory/units.yml has fewer than two active units, and"
            " the proof is a mail from one to another."
        )
    sender, recipient = active[:2]
    host = result["service_address"]
    trust = ssl.create_default_context(cafile=result["ca_file"])
    message = EmailMessage(policy=policy.SMTP)
    message["From"], message["To"] = sender, recipient
    message["Subject"] = "Kính gửi: thư điện tử công vụ đã hoạt động"
    message["Message-ID"] = make_msgid(domain=result["domain"])
    message.set_content("Thư này do phòng thử nghiệm gửi để chứng minh dịch vụ đã chạy.\n")
    started = time.monotonic()
    step = f"Sending as {sender} on {host}:587"
    try:
        with smtplib.SMTP(host, 587, timeout=TIMEOUT) as smtp:
            smtp.starttls(context=trust)
            smtp.login(sender, passwords[sender])
            smtp.send_message(message)
        step = f"Reading as {recipient} on {host}:993"
        subject = _read_subject(host, trust, recipient, passwords[recipient], message["Message-ID"])
    except (OSError, smtplib.SMTPException, imaplib.IMAP4.error) as error:
        raise LabError(f"{step} failed: {error}") from error
    if subject is None or subject != message["Subject"]:
        raise LabError(f"{step}: the subject came back as {subject!r}.")
    return Proof(sender, recipient, subject, time.monotonic() - started)


def _read_subject(host: str, trust: ssl.SSLContext, user: str, password: str, message_id: str) -> str | None:
    """Subject of the message as the INBOX holds it, waiting for its delivery."""
    with imaplib.IMAP4_SSL(host, 993, ssl_context=trust, timeout=TIMEOUT) as imap:
        imap.login(user, password)
        deadline = time.monotonic() + TIMEOUT
        while True:
            imap.select("INBOX", readonly=True)
            found = imap.uid("search", "HEADER", "Message-ID", f'"{message_id}"')[1][0].split()
            if found:
                break
            if time.monotonic() > deadline:
                raise imaplib.IMAP4.error(f"the mail did not arrive within {TIMEOUT} s")
            time.sleep(0.2)
        data = imap.uid("fetch", found[0].decode(), "(BODY.PEEK[HEADER])")[1][0]
    if not isinstance(data, tuple):
        raise imaplib.IMAP4.error("the server sent no header")
    subject = message_from_bytes(data[1], policy=policy.default)["Subject"]
    return None if subject is None else str(subject)
