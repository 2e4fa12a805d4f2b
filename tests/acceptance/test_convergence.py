"""Runs of the playbooks against a service that is up: what a second run, a change and a renewal do and leave alone."""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from playbook import Province, plan
from service import Service


@pytest.fixture
def province(lab: dict[str, Any], tmp_path: Path) -> Province:
    """The lab's inventory, to be changed."""
    return Province(lab, tmp_path / "inventory")


def loader_writes(service: Service) -> int:
    """How many writes the hosts' audit logs hold under the loader's identity; each has those that were made there."""
    query = f"(&(objectClass=auditWriteObject)(reqAuthzID=cn=loader,ou=services,{service.base}))"
    found = 0
    for host in service.in_group("directory"):
        with service.ldap_admin(host) as connection:
            search = connection.extend.standard.paged_search
            found += sum(1 for _entry in search("cn=accesslog", query, attributes=["reqDN"]))
    return found


def test_a_run_without_a_change_writes_nothing(service: Service, province: Province) -> None:
    # Sessions that other tests have left with mailboxes of theirs end here.
    run = province.run("directory.yml")
    assert run.status == 0, run.output
    before = loader_writes(service)
    assert before >= 43, "the audit log does not know the loader's first run"
    run = province.run("directory.yml", "--diff")
    assert run.status == 0, run.output
    assert set(run.changed.values()) == {0}, run.output
    assert loader_writes(service) == before


def test_a_dry_run_shows_the_plan_and_writes_nothing(service: Service, province: Province) -> None:
    """The life of a mailbox is in test_lifecycle.py."""
    person = {"id": "t-person", "ho": "Đặng", "dem": "Thị Ngọc", "ten": "Ánh", "unit": "dl-01"}
    person |= {"class": "civil_servant", "decision_ref": "1/QĐ-UBND", "order_ref": "2/L-VP"}
    province.write("directory/people.yml", {"mail_people": [person]})
    before = loader_writes(service)
    dry = province.run("directory.yml", "--check", "--diff")
    assert dry.status == 0, dry.output
    assert "join (tiếp nhận) person t-person Đặng Thị Ngọc Ánh <dangthingocanh@daklak.gov.vn>" in dry.output
    assert "+mail: dangthingocanh@daklak.gov.vn" in dry.output
    assert [(row["action"], row["id"]) for row in plan()["changes"]] == [("join", "t-person")]
    assert loader_writes(service) == before
    assert answer(service, "dangthingocanh@daklak.gov.vn") == 550


def test_certificates_change_their_source_and_are_renewed_and_sessions_go_on(
    service: Service, province: Province, lab: dict[str, Any], tmp_path: Path
) -> None:
    own = [service.name, "mail1." + service.domain, "mail2." + service.domain, "witness." + service.domain]
    addresses = [a for host in lab["hosts"].values() for a in host["addresses"].values()]
    authority = make_certificates(tmp_path, own, [*addresses, *lab["service_addresses"]])
    holder = service.in_group("mailstore")[0]
    # What is measured here; the hosts' ways to each other go on with the certificates they have.
    roles = ["--tags", "certificates,openldap,postfix,dovecot"]
    given = {"certificate": "host.pem", "key": "host.key", "ca": "ca.pem"}
    files = [f"-ecertificates_files_{name}={tmp_path / file}" for name, file in given.items()]
    processes = "pidof slapd; systemctl show -p MainPID dovecot postfix"
    before, running = serials(lab, Path(lab["ca_file"])), service.run(holder, processes)
    # The hosts' own keys come back: the province has published them (TLSA).
    key, kept = "/etc/ssl/hopthu/key.pem", "/root/key.kept"
    for host in service.hosts:
        service.run(host, f"cp -p {key} {kept}")
    with service.unit("soyte").imap(service.address) as session:
        try:
            switched = province.run("site.yml", *roles, "-ecertificates_source=files", *files)
            assert switched.status == 0, switched.output
            assert set(serials(lab, tmp_path / "ca.pem").values()) == {authority}
        finally:
            for host in service.hosts:
                service.run(host, f"mv {kept} {key}")
            renewed = province.run("site.yml", *roles, "-ecertificates_renew_days=398")
        assert renewed.status == 0, renewed.output
        session.noop()
    after = serials(lab, Path(lab["ca_file"]))
    assert [port for port in before if before[port] == after[port]] == []
    assert service.run(holder, processes) == running, "a daemon was restarted instead of reloaded"


def answer(service: Service, recipient: str) -> int:
    """What the mail exchanger says to a recipient."""
    with service.smtp(service.address) as smtp:
        smtp.mail("someone@example.org")
        return smtp.rcpt(recipient)[0]


def serials(lab: dict[str, Any], authority: Path) -> dict[int, int]:
    """Port → serial number of the certificate served there now, verified against `authority`."""
    context = ssl.create_default_context(cafile=authority)
    address, found = lab["service_address"], {}
    for port in (465, 636, 993, 995):
        plain = socket.create_connection((address, port), 10)
        with context.wrap_socket(plain, server_hostname=address) as tls:
            der = tls.getpeercert(binary_form=True)
        found[port] = x509.load_der_x509_certificate(der or b"").serial_number
    return found


def make_certificates(folder: Path, names: list[str], addresses: list[str]) -> int:
    """Make what an operator may bring, ca.pem, host.pem and host.key; the serial number of host.pem."""
    now = datetime.now(UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "An operator's own authority")])
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0])])
    serial = x509.random_serial_number()

    def sign(owner: x509.Name, key: ec.EllipticCurvePrivateKey, number: int, *more: x509.ExtensionType) -> bytes:
        builder = x509.CertificateBuilder(issuer, owner, key.public_key(), number)
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=90))
        for extension in more:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    identifier = x509.SubjectKeyIdentifier.from_public_key(keys[0].public_key())
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    ca = sign(issuer, keys[0], x509.random_serial_number(), x509.BasicConstraints(True, 0), usage, identifier)
    alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
    alternatives += [x509.IPAddress(ip_address(address)) for address in addresses]
    known = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    host = sign(subject, keys[1], serial, x509.SubjectAlternativeName(alternatives), known)
    (folder / "ca.pem").write_bytes(ca)
    (folder / "host.pem").write_bytes(host)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "host.key").write_bytes(keys[1].private_bytes(*form))
    return serial
