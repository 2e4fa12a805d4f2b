"""The service as its users, correspondents and administrators meet it: by protocol, from outside.

What the tests share. TLS is always verified against the lab's CA, for the address as lab.json writes it.
"""

from __future__ import annotations

import base64
import functools
import json
import poplib
import re
import secrets
import shlex
import smtplib
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import Any, TypeVar

import ldap3
import pytest
import testinfra
import yaml
from ansible.parsing.vault import VaultLib, VaultSecret
from imapclient import IMAPClient
from ldap3.core.exceptions import LDAPNoSuchObjectResult
from testinfra.host import Host

# A correspondent's address; its domain says nothing about who may send for it.
OUTSIDER = "nguoidan@chua-khai-bao.example"
TIMEOUT = 20
T = TypeVar("T")


def wait(what: str, check: Callable[[], T | None], seconds: float = TIMEOUT) -> T:
    """First true answer of `check`, asked ten times a second; the test fails after `seconds`, naming `what`."""
    deadline = time.monotonic() + seconds
    while not (answer := check()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds} s")
        time.sleep(0.1)
    return answer


def letter(sender: str, recipient: str, subject: str = "Công văn", text: str = "Kính gửi.\n") -> EmailMessage:
    """A message with a Message-ID of its own; the subject is made unique too."""
    message = EmailMessage(policy=SMTP)
    message["From"], message["To"] = sender, recipient
    message["Subject"] = f"{subject} {secrets.token_hex(6)}"
    message["Date"] = formatdate()
    message["Message-ID"] = make_msgid(domain="thu-nghiem.example")
    message.set_content(text, cte="8bit")
    return message


class Service:
    """A running lab, as its lab.json describes it."""

    def __init__(self, lab: dict[str, Any]) -> None:
        self.domain: str = lab["domain"]
        self.name = f"mail.{self.domain}"
        self.base: str = lab["ldap"]["base"]
        self.admin_dn: str = lab["ldap"]["bind_dn"]
        self.hosts: dict[str, dict[str, Any]] = lab["hosts"]
        self.ca_file: str = lab["ca_file"]
        self.trust = ssl.create_default_context(cafile=self.ca_file)
        self.addresses = {"ipv6" if ":" in a else "ipv4": a for a in lab["service_addresses"]}
        self.address: str = lab["service_address"]
        self.units: dict[str, str] = json.loads(Path(lab["credentials_file"]).read_text(encoding="utf-8"))
        self._admin_password = Path(lab["ldap"]["password_file"]).read_text(encoding="utf-8")
        self.ssh_config = Path(lab["ssh_private_key"]).parent / "config"
        self._build = Path(lab["inventory"]).parents[1]
        self.province: str = lab["province"]
        self.outside: dict[str, Any] = lab["outside"]

    def in_group(self, group: str) -> list[str]:
        """Names of the hosts in a group, in the order of the inventory, but first the one that serves, if it is one."""
        members = [name for name, host in self.hosts.items() if group in host["groups"]]
        return sorted(members, key=lambda host: not self.serves(host)) if len(members) > 1 else members

    def serves(self, host: str) -> bool:
        """Whether a host has the service address now."""
        return f" {self.address}/" in self.run(host, "ip -4 -o address")

    @functools.cache  # noqa: B019 - one Service lives as long as the run
    def inside(self, host: str) -> Host:
        """The inside of a host, over SSH."""
        return testinfra.get_host(f"ssh://{host}", ssh_config=str(self.ssh_config))

    def run(self, host: str, command: str) -> str:
        """Output of a command on a host; the test fails when the command does."""
        return str(self.inside(host).check_output(command))

    @functools.cached_property
    def secrets(self) -> dict[str, str]:
        """The lab's vault: passwords of the daemons' identities."""
        password = (self._build / "vault-password").read_bytes().strip()
        vault = VaultLib([("default", VaultSecret(password))])
        data: dict[str, str] = yaml.safe_load(vault.decrypt((self._build / "vault.yml").read_bytes()))
        return data

    def unit(self, local_part: str) -> Mailbox:
        """The mailbox of a unit, with the password that its owner chose."""
        address = f"{local_part}@{self.domain}"
        return Mailbox(self, address, self.units[address])

    # --- SMTP

    @contextmanager
    def smtp(self, address: str, port: int = 25, tls: bool = True) -> Iterator[smtplib.SMTP]:
        """A greeted SMTP session; on 465 under TLS from the start, elsewhere after STARTTLS unless told not to."""
        name = "client.ben-ngoai.example"  # as the outside DNS calls this machine
        smtp: smtplib.SMTP
        if port == 465:
            smtp = smtplib.SMTP_SSL(address, port, local_hostname=name, timeout=TIMEOUT, context=self.trust)
        else:
            smtp = smtplib.SMTP(address, port, local_hostname=name, timeout=TIMEOUT)
        try:
            if tls and port != 465:
                smtp.starttls(context=self.trust)
            code, text = smtp.ehlo()
            if code != 250:
                raise smtplib.SMTPHeloError(code, text)
            yield smtp
        finally:
            smtp.close()

    def send(self, message: EmailMessage | bytes, recipient: str, address: str, sender: str = OUTSIDER) -> str:
        """Hand a message in on port 25 as a correspondent's host does; its Message-ID."""
        data = message if isinstance(message, bytes) else message.as_bytes()
        with self.smtp(address) as smtp:
            smtp.sendmail(sender, [recipient], data, mail_options=["BODY=8BITMIME"])
        return message_id(data)

    def from_outside(self, message: EmailMessage | bytes, recipient: str, address: str, sender: str) -> tuple[int, str]:
        """Hand a message in on port 25 from the host `outside`, whose address its domain names; the last answer."""
        data = message if isinstance(message, bytes) else message.as_bytes()
        script = (
            "import base64, json, smtplib, sys; go = json.load(sys.stdin)\n"
            "with smtplib.SMTP(go['to'], 25, local_hostname=go['name'], timeout=60) as smtp:\n"
            "    smtp.starttls(); smtp.ehlo(); answer = smtp.mail(go['sender'])\n"
            "    answer = smtp.rcpt(go['recipient']) if answer[0] == 250 else answer\n"
            "    answer = smtp.data(base64.b64decode(go['data'])) if answer[0] == 250 else answer\n"
            "    print(json.dumps([answer[0], answer[1].decode(errors='replace')]))\n"
        )
        go = {"to": address, "name": self.outside["name"], "sender": sender, "recipient": recipient}
        go["data"] = base64.b64encode(data).decode()
        with self.python("outside", script) as process:
            output, _ = process.communicate(json.dumps(go))
        code, text = json.loads(output)
        return int(code), str(text)

    @contextmanager
    def python(self, host: str, script: str, user: str = "root") -> Iterator[subprocess.Popen[str]]:
        """A Python program of a user on a host, with pipes to talk to it; it ends with the block."""
        call = f"runuser -u {user} -- python3 -c {shlex.quote(script)}"
        command = ["ssh", "-F", str(self.ssh_config), host, call]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    # --- LDAP

    @contextmanager
    def ldap(
        self, dn: str | None, password: str | None = None, address: str | None = None
    ) -> Iterator[ldap3.Connection]:
        """An LDAP session over verified TLS after a bind (anonymous without a DN); `.bound` says whether it worked."""
        tls = ldap3.Tls(ca_certs_file=self.ca_file, validate=ssl.CERT_REQUIRED, valid_names=[self.name])
        address = address or self.address
        host = f"[{address}]" if ":" in address else address
        server = ldap3.Server(f"ldaps://{host}:636", tls=tls, connect_timeout=TIMEOUT, get_info=ldap3.NONE)
        connection = ldap3.Connection(server, dn, password, receive_timeout=TIMEOUT)
        connection.bind()
        try:
            yield connection
        finally:
            connection.unbind()

    @contextmanager
    def ldap_admin(self, host: str = "") -> Iterator[ldap3.Connection]:
        """A session of the directory's administrator, at the service or at a host, that raises what is refused."""
        address = self.hosts[host]["addresses"]["v4"] if host else None
        with self.ldap(self.admin_dn, self._admin_password, address) as connection:
            assert connection.bound, "the administrator of the directory cannot log in"
            connection.raise_exceptions = True
            yield connection

    def modify(self, dn: str, **values: object) -> None:
        """Replace attributes of an entry as the directory's administrator."""
        with self.ldap_admin() as admin:
            admin.modify(dn, {name: [(ldap3.MODIFY_REPLACE, [value])] for name, value in values.items()})

    @contextmanager
    def new_mailbox(self, **more: object) -> Iterator[Mailbox]:
        """A mailbox of the test's own, with a working password; it goes with all its mail."""
        uid = f"thu-{secrets.token_hex(5)}"
        box = Mailbox(self, f"{uid}@{self.domain}", password(), f"uid={uid},ou=units,{self.base}")
        classes = ["organizationalUnit", "hopThuMailbox", "inetLocalMailRecipient"]
        entry = {
            "uid": uid,
            "ou": "Đơn vị thử nghiệm",
            "mail": box.address,
            "mailboxState": "active",
            "mailboxClass": "unit",
            "mailboxQuota": 1 << 30,
            "userPassword": box.password,
            **more,
        }
        with self.ldap_admin() as admin:
            admin.add(box.dn, classes, entry)
        try:
            for host in self.in_group("directory"):
                wait(f"{host} knows {box.address}", lambda host=host: self._knows(host, box.dn))
            yield box
        finally:
            with self.ldap_admin() as admin, suppress(LDAPNoSuchObjectResult):  # the test has let it be purged
                admin.delete(box.dn)
            for store in self.in_group("mailstore"):
                self.run(store, f"rm -rf -- /srv/vmail/{uid} /srv/vmail/.backup/*/{uid}*")

    def _knows(self, host: str, dn: str) -> bool:
        """Whether the directory of a host has an entry."""
        with self.ldap_admin(host) as admin:
            admin.raise_exceptions = False
            return bool(admin.search(dn, "(objectClass=*)", ldap3.BASE))

    # --- daemons and queues

    @contextmanager
    def stopped(self, hosts: list[str], unit: str, port: int) -> Iterator[None]:
        """The time without a daemon on `hosts`; afterwards it runs again, whatever happened, and answers on `port`."""
        try:
            for host in hosts:
                self.run(host, f"systemctl stop {unit}")
            yield
        finally:
            for host in hosts:
                self.run(host, f"systemctl start {unit}")
                wait(f"{unit} is back", lambda host=host: accepts(self.hosts[host]["addresses"]["v4"], port))

    def forgive(self) -> None:
        """Start Dovecot anew. It lets an address from which logins failed wait longer each time, right ones too."""
        for store in self.in_group("mailstore"):
            self.run(store, "systemctl restart dovecot")

    def reachable(self, host: str) -> bool:
        """Whether root can log in over SSH. Not a bare connection: sshd shuts out who knocks often and goes away."""
        try:
            subprocess.run(["ssh", "-F", self.ssh_config, host, "true"], capture_output=True, check=True, timeout=2)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return False
        return True

    def queued(self, host: str, recipient: str) -> list[tuple[str, str]]:
        """Queue id and reason of the delay of each message to a recipient that waits on a host."""
        lines = map(json.loads, self.run(host, "postqueue -j").splitlines())
        return [
            (item["queue_id"], goal.get("delay_reason", ""))
            for item in lines
            for goal in item["recipients"]
            if goal["address"] == recipient
        ]

    def deferred(self, host: str, recipient: str) -> tuple[str, str]:
        """Queue id and reason, when a message to a recipient has been tried and waits."""
        return wait(
            f"mail to {recipient} waits on {host}",
            lambda: next((found for found in self.queued(host, recipient) if found[1]), None),
        )

    def journal(self, host: str, since: float, pattern: str) -> list[str]:
        """Lines of a host's journal from `since` (seconds since the epoch) that match a regular expression."""
        lines = self.run(host, f"journalctl --sync; journalctl -q -o cat --since=@{since:.3f}").splitlines()
        return [line for line in lines if re.search(pattern, line)]


@dataclass(frozen=True)
class Mailbox:
    """A mailbox with the password that opens it."""

    service: Service
    address: str
    password: str
    dn: str = ""

    def submit(self, message: EmailMessage | bytes, recipient: str, address: str, port: int = 587) -> str:
        """Send as an official's mail program does, logged in; the Message-ID."""
        data = message if isinstance(message, bytes) else message.as_bytes()
        with self.service.smtp(address, port) as smtp:
            smtp.login(self.address, self.password)
            smtp.sendmail(self.address, [recipient], data, mail_options=["BODY=8BITMIME"])
        return message_id(data)

    @contextmanager
    def imap(self, address: str | None = None, port: int = 993) -> Iterator[IMAPClient]:
        """A logged-in IMAP session: TLS from the start on 993, STARTTLS on 143."""
        trust, direct = self.service.trust, port == 993
        client = IMAPClient(
            address or self.service.address, port, ssl=direct, ssl_context=trust if direct else None, timeout=TIMEOUT
        )
        try:
            if not direct:
                client.starttls(trust)
            client.login(self.address, self.password)
            yield client
        finally:
            client.shutdown()

    @contextmanager
    def pop(self, address: str, port: int = 995) -> Iterator[poplib.POP3]:
        """A logged-in POP3 session: TLS from the start on 995, STLS on 110."""
        trust = self.service.trust
        client: poplib.POP3
        if port == 995:
            client = poplib.POP3_SSL(address, port, timeout=TIMEOUT, context=trust)
        else:
            client = poplib.POP3(address, port, timeout=TIMEOUT)
        try:
            if port != 995:
                client.stls(trust)
            client.user(self.address)
            client.pass_(self.password)
            yield client
            client.quit()
        finally:
            client.close()

    def has(self, client: IMAPClient, identifier: str, folder: str = "INBOX") -> int | None:
        """UID of a message in a folder."""
        client.select_folder(folder)
        found = client.search(["HEADER", "Message-ID", identifier])
        return found[0] if found else None

    def take(
        self,
        identifier: str,
        folder: str = "INBOX",
        address: str | None = None,
        port: int = 993,
        seconds: float = TIMEOUT,
    ) -> bytes:
        """Wait for a message, read it over IMAP and delete it; its octets."""
        with self.imap(address, port) as client:
            uid = wait(
                f"{identifier} in {folder} of {self.address}", lambda: self.has(client, identifier, folder), seconds
            )
            data: bytes = client.fetch([uid], ["BODY.PEEK[]"])[uid][b"BODY[]"]
            client.delete_messages([uid])
            client.expunge()
        return data


def password() -> str:
    """A random password that the policy takes."""
    return f"{secrets.token_urlsafe(18)}-aA1"


def message_id(data: bytes) -> str:
    """Message-ID in the header of a message."""
    found = re.search(rb"(?im)^message-id: *(<[^>]+>)", data)
    assert found, "the message has no Message-ID"
    return found[1].decode()


def accepts(address: str, port: int, seconds: float = 1) -> bool:
    """Whether a TCP connection comes about."""
    try:
        socket.create_connection((address, port), timeout=seconds).close()
    except OSError:
        return False
    return True


class ManageSieve:
    """As much of a ManageSieve client (RFC 5804) as the tests need."""

    def __init__(self, service: Service, address: str) -> None:
        self.service, self.address = service, address
        self._socket: socket.socket = socket.create_connection((address, 4190), timeout=TIMEOUT)
        self._file = self._socket.makefile("rb")
        self.capabilities = self._answer()[1]

    def __enter__(self) -> ManageSieve:
        return self

    def __exit__(self, *_args: object) -> None:
        self._file.close()
        self._socket.close()

    def starttls(self) -> None:
        """Go on under TLS; the server then tells its capabilities anew."""
        assert self.command(b"STARTTLS")[0] == "OK"
        self._file.close()
        self._socket = self.service.trust.wrap_socket(self._socket, server_hostname=self.address)
        self._file = self._socket.makefile("rb")
        self.capabilities = self._answer()[1]

    def login(self, user: str, word: str) -> bool:
        """Log in with SASL PLAIN; whether it worked."""
        token = base64.b64encode(f"\0{user}\0{word}".encode())
        return self.command(b'AUTHENTICATE "PLAIN" "' + token + b'"')[0] == "OK"

    def activate(self, script: str) -> tuple[str, str]:
        """Store a script and make it the active one; answer and text of the first command that failed, or the last."""
        data = script.encode()
        answer = self.command(b'PUTSCRIPT "thu" {%d+}\r\n' % len(data) + data)
        return self.command(b'SETACTIVE "thu"') if answer[0] == "OK" else answer

    def command(self, line: bytes) -> tuple[str, str]:
        """Send a command; OK, NO or BYE, and the text around it."""
        self._socket.sendall(line + b"\r\n")
        return self._answer()

    def _answer(self) -> tuple[str, str]:
        text = ""
        for line in self._file:
            text += line.decode()
            if found := re.match(rb"(OK|NO|BYE)\b", line):
                return found[1].decode(), text
        return "BYE", text
