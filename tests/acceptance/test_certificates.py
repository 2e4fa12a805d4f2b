"""Certificates end, are renewed and come from elsewhere, and nobody's session breaks."""

from __future__ import annotations

import contextlib
import json
import smtplib
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from playbook import run_play
from service import Mailbox, Service, wait

FOLDER = "/etc/ssl/hopthu"


def shown(address: str, port: int) -> x509.Certificate:
    """The certificate that a port shows: after STARTTLS on 25 and 587, at once elsewhere."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if port in (25, 587):
        with smtplib.SMTP(address, port, timeout=20) as smtp:
            smtp.starttls(context=context)
            assert isinstance(smtp.sock, ssl.SSLSocket)
            data = smtp.sock.getpeercert(binary_form=True)
    else:
        with socket.create_connection((address, port), timeout=20) as raw, context.wrap_socket(raw) as channel:
            data = channel.getpeercert(binary_form=True)
    assert data
    return x509.load_der_x509_certificate(data)


def alarms(service: Service, host: str, began: float) -> list[str]:
    """Alarms certificate-expiry of a host since `began` (seconds since the epoch)."""
    return service.journal(host, began, r"^certificate-expiry: ")


@pytest.fixture
def ending(service: Service) -> Iterator[str]:
    """A host whose certificate ends in 13 days, for the time of the test; no daemon reads it meanwhile."""
    host = service.in_group("monitor")[0]
    make = (
        f"cd {FOLDER} && cp -p cert.pem cert.kept"
        f" && openssl req -x509 -key key.pem -days 13 -subj /CN={host} -out new.pem"
        " && cat new.pem >cert.pem && rm new.pem"
    )
    try:
        service.run(host, make)
        yield host
    finally:
        service.run(host, f"cd {FOLDER} && mv cert.kept cert.pem")


def test_certificate_near_its_end_is_an_alarm(service: Service, ending: str) -> None:
    began = time.time()
    service.run(ending, "systemctl start certificate-expiry.service")
    found = wait("the alarm", lambda: alarms(service, ending, began), 20)
    assert len(found) == 1 and f"{FOLDER}/cert.pem ends on" in found[0], found


def test_certificates_are_looked_at_every_day_and_are_good(service: Service) -> None:
    for host in service.hosts:
        began = time.time()
        (timer,) = json.loads(service.run(host, "systemctl list-timers -o json certificate-expiry.timer"))
        assert 0 < timer["next"] / 1e6 - began < 26 * 3600, timer  # microseconds; a day and the random delay
        service.run(host, "systemctl start certificate-expiry.service")
        assert not alarms(service, host, began)


@contextlib.contextmanager
def from_acme(service: Service, lab: dict[str, Any], hosts: list[str], folder: Path) -> Iterator[None]:
    """The time with an ACME server as the source of the hosts' certificates, as the operator would set it."""
    # What other roles export; and the firewall's own part, which needs every role of the site, is opened by hand.
    exported = {"mta_sts_socketmap": "inet:127.0.0.1:8461", "journal_milter": "unix:journal/milter"}
    play = {"hosts": ",".join(hosts), "roles": ["certificates", "postfix"], "vars": exported}
    server = service.outside["acme_directory"]
    try:
        for host in hosts:
            service.run(host, "nft insert rule inet filter input tcp dport 80 accept")
            service.run(host, "nft insert rule inet filter output tcp dport 14000 accept")
        run = run_play(
            lab, folder, play, "-e", "certificates_source=acme", "-e", f"certificates_acme_server={server}",
        )  # fmt: skip
        assert run.status == 0, run.output
        yield
    finally:
        for host in hosts:
            service.run(host, "nft -f /etc/nftables.conf")
        run = run_play(lab, folder, play)
        assert run.status == 0, run.output


def test_certificate_comes_from_an_acme_server_and_is_renewed(
    service: Service, lab: dict[str, Any], mailbox: Mailbox, tmp_path: Path
) -> None:
    """On the host that does not serve: under the service's name the server meets the other one, which sends it on."""
    hosts = service.in_group("mx")
    host = hosts[-1]
    address = service.hosts[host]["addresses"]["v4"]
    own = shown(address, 25).issuer
    with from_acme(service, lab, hosts, tmp_path):
        service.run(host, "systemctl start acme.service")
        first = shown(address, 25)
        assert first.issuer != own, first.issuer
        names = first.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert set(names.get_values_for_type(x509.DNSName)) == {f"{host}.{service.domain}", service.name}
        # Again before it is due: nothing happens.
        service.run(host, "systemctl start acme.service")
        assert shown(address, 25).serial_number == first.serial_number
        with service.smtp(address, 25, tls=False) as smtp:
            # What the timer does when it is due.
            service.run(host, "rm -r /var/lib/acme/live /var/lib/acme/archive /var/lib/acme/renewal")
            service.run(host, "systemctl start acme.service")
            assert smtp.noop()[0] == 250
        assert shown(address, 25).serial_number != first.serial_number
    assert shown(address, 25).issuer == own


def issue(
    name: str, days: int, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey
) -> str:
    """A certificate in PEM for a DNS name, from 400 days ago until `days` from now; an authority when self-signed."""
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder(serial_number=x509.random_serial_number())
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .not_valid_before(now - timedelta(days=400))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=name == issuer, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    )
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("key", "does not belong to the certificate"),
        ("chain", "does not lead to the authority"),
        ("ended", "ended at"),
        ("name", "is not valid for"),
        ("text", "holds no certificate in PEM"),
        ("missing", "name a file in PEM"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_the_host_has_them(
    service: Service, lab: dict[str, Any], tmp_path: Path, fault: str, sentence: str
) -> None:
    host = service.in_group("monitor")[0]
    fqdn = f"{host}.{service.domain}"
    key, other, authority = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    files = {
        "certificate": issue(
            "khac.example" if fault == "name" else fqdn, -1 if fault == "ended" else 90, key, "thu", authority
        ),
        "ca": issue(
            "thu", 900, other if fault == "chain" else authority, "thu", other if fault == "chain" else authority
        ),
        "key": (other if fault == "key" else key)
        .private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        .decode(),
    }
    if fault == "text":
        files["certificate"] = "không phải PEM\n"
    arguments = ["-e", "certificates_source=files"]
    for name, content in files.items():
        path = tmp_path / f"{name}.pem"
        if (fault, name) != ("missing", "key"):
            path.write_text(content, encoding="utf-8")
        arguments += ["-e", f"certificates_files_{name}={path}"]
    before = service.run(host, f"sha256sum {FOLDER}/*")
    run = run_play(lab, tmp_path / "play", {"hosts": host, "roles": ["certificates"]}, *arguments)
    assert run.status != 0
    assert sentence in run.message and "Traceback" not in run.output, run.output
    assert service.run(host, f"sha256sum {FOLDER}/*") == before
