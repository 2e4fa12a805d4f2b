"""TLS on every port: who the server is, and which versions it speaks."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest
from service import TIMEOUT, Service, accepts
from sslyze import (
    CertificateInfoExtraArgument,
    ProtocolWithOpportunisticTlsEnum,
    ScanCommandAttemptStatusEnum,
    ScanCommandsExtraArguments,
    Scanner,
    ServerNetworkConfiguration,
    ServerNetworkLocation,
    ServerScanRequest,
    ServerScanResult,
)
from sslyze.mozilla_tls_profile.tls_config_checker import (
    SCAN_COMMANDS_NEEDED_BY_MOZILLA_CHECKER,
    MozillaTlsConfiguration,
    ServerNotCompliantWithTlsConfiguration,
    TlsConfigurationEnum,
    check_server_against_tls_configuration,
)

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
SCANS = 3  # of a port, at most
# Port → the function of a host that answers there, and the protocol that begins in the clear. ManageSieve (4190) is not
# among those that sslyze speaks: the tests above have its versions and certificate, and it is Dovecot as 993 is.
# The log host (6514) and the tunnels end the handshake of everybody but the kit's own hosts.
PROFILED = {
    25: ("mx", ProtocolWithOpportunisticTlsEnum.SMTP),
    587: ("mailstore", ProtocolWithOpportunisticTlsEnum.SMTP),
    465: ("mailstore", None),
    110: ("mailstore", ProtocolWithOpportunisticTlsEnum.POP3),
    143: ("mailstore", ProtocolWithOpportunisticTlsEnum.IMAP),
    993: ("mailstore", None),
    995: ("mailstore", None),
    636: ("directory", None),
    11334: ("mailstore", None),
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


def is_whole(found: ServerScanResult) -> bool:
    """Whether a scan came to its end; a server that was busy with something else may have cut it."""
    if found.scan_result is None:
        return False
    attempts = (getattr(found.scan_result, command.value) for command in SCAN_COMMANDS_NEEDED_BY_MOZILLA_CHECKER)
    return all(attempt.status == ScanCommandAttemptStatusEnum.COMPLETED for attempt in attempts)


@pytest.fixture(scope="module")
def profiled(service: Service) -> dict[int, ServerScanResult]:
    """What sslyze finds on each port of PROFILED; all are scanned at a time, for each takes half a minute."""
    found: dict[int, ServerScanResult] = {}
    for _try in range(SCANS):
        requests = {}
        for port, (group, protocol) in PROFILED.items():
            if port in found and is_whole(found[port]):
                continue
            host = service.in_group(group)[0]
            name = f"{host}.{service.domain}"
            request = ServerScanRequest(
                server_location=ServerNetworkLocation(name, port, ip_address=service.hosts[host]["addresses"]["v4"]),
                network_configuration=ServerNetworkConfiguration(name, protocol, network_timeout=TIMEOUT),
                scan_commands=SCAN_COMMANDS_NEEDED_BY_MOZILLA_CHECKER,
                scan_commands_extra_arguments=ScanCommandsExtraArguments(
                    certificate_info=CertificateInfoExtraArgument(Path(service.ca_file))
                ),
            )
            requests[request.uuid] = port, request
        if requests:
            scanner = Scanner(per_server_concurrent_connections_limit=2)
            scanner.queue_scans([request for _port, request in requests.values()])
            found |= {requests[result.uuid][0]: result for result in scanner.get_results()}
    return found


@pytest.mark.requirement("N-TT39-4.2")
@pytest.mark.parametrize("port", PROFILED)
def test_tls_is_that_of_mozillas_intermediate_profile(profiled: dict[int, ServerScanResult], port: int) -> None:
    """Versions, ciphers, curves, certificate and the known holes, by a scanner that is not ours."""
    profile = MozillaTlsConfiguration.get(TlsConfigurationEnum.MOZILLA_INTERMEDIATE)
    try:
        check_server_against_tls_configuration(profiled[port], profile)
    except ServerNotCompliantWithTlsConfiguration as found:
        pytest.fail(f"port {port}: {found.issues}")
