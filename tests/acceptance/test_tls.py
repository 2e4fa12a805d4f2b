"""TLS on every port: who the server is, and which versions it speaks."""

from __future__ import annotations

import socket
import ssl

import pytest
from service import TIMEOUT, Service, accepts

# Port → what a client says before TLS begins, and how the answer to it ends; nothing where TLS comes first.
PLAIN_START = {
    25: [(b"", b"220 "), (b"EHLO thu.example\r\n", b"\n250 "), (b"STARTTLS\r\n", b"220 ")],
    587: [(b"", b"220 "), (b"EHLO thu.example\r\n", b"\n250 "), (b"STARTTLS\r\n", b"220 ")],
    110: [(b"", b"+OK"), (b"STLS\r\n", b"+OK")],
    143: [(b"", b"* OK"), (b"a STARTTLS\r\n", b"a OK")],
    4190: [(b"", b"OK "), (b"STARTTLS\r\n", b"OK ")],
    465: [],
    636: [],
    993: [],
    995: [],
}


def begin_tls(address: str, port: int, name: str, context: ssl.SSLContext) -> str:
    """TLS version that client and server agree on; ssl.SSLError when they do not or the name is wrong."""
    with socket.create_connection((address, port), timeout=TIMEOUT) as plain:
        for command, end in PLAIN_START[port]:
            plain.sendall(command)
            answer = b"\n"
            while end not in answer or not answer.endswith(b"\n"):
                answer += (received := plain.recv(4096))
                assert received, f"port {port} closed after {answer!r}"
        with context.wrap_socket(plain, server_hostname=name) as tls:
            return str(tls.version())


@pytest.mark.requirement("N-TT39-4.2", "N-TT39-4.4")
@pytest.mark.parametrize("port", PLAIN_START)
def test_certificate_is_valid_for_name_and_address(service: Service, address: str, port: int) -> None:
    for name in (service.name, address):
        assert begin_tls(address, port, name, service.trust) in ("TLSv1.2", "TLSv1.3")
    with pytest.raises(ssl.SSLCertVerificationError):
        begin_tls(address, port, "mail.noi-khac.example", service.trust)


def test_every_mail_exchanger_has_a_certificate(service: Service) -> None:
    for host in service.in_group("mx"):
        for address in service.hosts[host]["addresses"].values():
            begin_tls(address, 25, f"{host}.{service.domain}", service.trust)


@pytest.mark.requirement("N-TT39-4.2")
@pytest.mark.parametrize("port", PLAIN_START)
def test_tls_1_2_and_newer_only(service: Service, address: str, port: int) -> None:
    """The client here would speak TLS 1.1 too: the refusal is the server's, by an alert."""

    def context(version: ssl.TLSVersion) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=service.ca_file)
        made.set_ciphers("ALL:@SECLEVEL=0")
        made.minimum_version = made.maximum_version = version
        return made

    assert begin_tls(address, port, service.name, context(ssl.TLSVersion.TLSv1_2)) == "TLSv1.2"
    assert begin_tls(address, port, service.name, context(ssl.TLSVersion.TLSv1_3)) == "TLSv1.3"
    with pytest.warns(DeprecationWarning), pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
        begin_tls(address, port, service.name, context(ssl.TLSVersion.TLSv1_1))


def test_directory_speaks_tls_only(service: Service, address: str) -> None:
    """Neither from outside nor on the host itself is there a port 389."""
    assert not accepts(address, 389)
    directory = service.in_group("directory")[0]
    listening = service.run(directory, "ss -Hltn 'sport = :389 or sport = :636'")
    assert ":636" in listening
    assert ":389" not in listening
