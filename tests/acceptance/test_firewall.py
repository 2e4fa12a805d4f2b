"""The packet filter: what comes in, what goes out, and the way back from a mistake."""

from __future__ import annotations

import asyncio
import errno
import time

import pytest
from service import Service, wait

# What each function opens to the network of this machine, which is the users' and the operators'.
OPEN = {
    "": {22},
    "directory": {636},
    "mx": {25},
    "mailstore": {110, 143, 993, 995, 4190},
}
SUBMISSION = {465, 587}  # on a mail exchanger that has mailboxes
ASKED = sorted(
    {port for ports in OPEN.values() for port in ports}
    | SUBMISSION
    | {21, 23, 24, 53, 80, 88, 111, 123, 179, 389, 443, 445, 514, 631, 873, 953, 2000, 2049, 3306, 3310, 5432, 6379}
    | {8000, 8080, 8443, 9100, 9999, 10024, 11332, 11333, 11334, 12345, 24242, 33060, 50000}
)


def expected(groups: list[str]) -> set[int]:
    """Ports that a host with these functions answers on."""
    ports = set().union(*(OPEN.get(group, set()) for group in ["", *groups]))
    return ports | SUBMISSION if {"mx", "mailstore"} <= set(groups) else ports


async def passes(address: str, port: int) -> int | None:
    """The port when a packet to it is not dropped: a refusal by the host counts as let through."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), 1.5)
        writer.close()
    except ConnectionRefusedError:
        return port
    except (TimeoutError, OSError):
        return None
    return port


@pytest.mark.requirement("HT-2.1")
@pytest.mark.parametrize("family", ["v4", "v6"])
def test_only_the_documented_ports_are_open(service: Service, family: str) -> None:
    async def open_ports(address: str) -> set[int | None]:
        return set(await asyncio.gather(*(passes(address, port) for port in ASKED))) - {None}

    async def scan() -> dict[str, set[int | None]]:
        found = await asyncio.gather(*(open_ports(host["addresses"][family]) for host in service.hosts.values()))
        return dict(zip(service.hosts, found, strict=True))

    assert asyncio.run(scan()) == {name: expected(host["groups"]) for name, host in service.hosts.items()}


@pytest.mark.parametrize("family", ["v4", "v6"])
def test_hosts_send_only_what_they_must(service: Service, family: str) -> None:
    """Port 25 of the other mail exchanger is open: Postfix gets there, root does not, and nobody gets to its SSH."""
    first, second = service.in_group("mx")[:2]
    address = service.hosts[second]["addresses"][family]

    def result(user: str, port: int) -> int:
        program = f"import socket; s = socket.socket(socket.AF_INET{'6' if ':' in address else ''}); s.settimeout(5)"
        command = f"runuser -u {user} -- python3 -c \"{program}; print(s.connect_ex(('{address}', {port})))\""
        return int(service.run(first, command))

    refused = {errno.EACCES, errno.EPERM, errno.EHOSTUNREACH, errno.ENETUNREACH}
    assert result("postfix", 25) == 0
    assert result("root", 25) in refused
    assert result("root", 22) in refused
    assert result("postfix", 22) in refused


def test_rules_that_lock_the_operator_out_go_back(service: Service) -> None:
    """Rules that drop everything, SSH too, with 5 s to confirm them: the host is gone, then it is back as it was."""
    host = list(service.hosts)[-1]
    state = "nft list ruleset | sed 's/packets [0-9]* bytes [0-9]*//'; cat /etc/nftables.conf"
    before = service.run(host, state)
    shut = ["flush ruleset", "table inet filter {", "chain input {", "type filter hook input priority 0; policy drop;"]
    service.run(host, "printf '%s\\n' " + " ".join(f"'{line}'" for line in [*shut, "}", "}"]) + " > /etc/nftables.new")
    started = time.monotonic()
    try:
        # In the background: the answer over SSH would not come through.
        service.run(host, "systemd-run --quiet --collect /usr/local/sbin/firewall-try 5")
        wait("SSH is cut off", lambda: not service.reachable(host), 5)
    finally:
        wait("SSH is back", lambda: service.reachable(host), 60)
        back = time.monotonic() - started
        service.run(host, "rm -f /etc/nftables.new")
    assert back < 15, f"back only after {back:.0f} s"
    assert service.run(host, state) == before
