"""Filters for the cluster role: its key, its hosts, its addresses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Corosync takes 128 to 4,096 octets.
OCTETS = 256


def corosync_key(secret: str) -> str:
    """Return the key file's text for a secret: as random as the secret, long enough for Corosync.

    >>> corosync_key("abc") == corosync_key("abc") != corosync_key("abd")
    True
    """
    return hashlib.shake_256(b"hopthu corosync key\0" + secret.encode()).hexdigest(OCTETS // 2)


def cluster_nodes(hosts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return name and addresses of each of `hosts` (their Ansible variables): an address for each link.

    >>> cluster_nodes([{"inventory_hostname": "mail1", "host_addresses": ["192.0.2.1", "2001:db8::1"]}])
    [{'name': 'mail1', 'addresses': ['192.0.2.1']}]
    """
    return [
        {
            "name": host["inventory_hostname"],
            "addresses": list(host.get("host_cluster_addresses") or host["host_addresses"][:1]),
        }
        for host in hosts
    ]


def service_addresses(addresses: Iterable[str]) -> list[dict[str, str]]:
    """Return the addresses that move as the cluster role takes them."""
    return [{"address": address} for address in addresses]


def fencing_ways(devices: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what must go out to reach the fencing devices, as the firewall role takes it; UDP 623 is IPMI's.

    >>> fencing_ways([{"host": "mail1", "options": {"ip": "192.0.2.9"}}])[0]["ports"]
    [623]
    """
    return [
        {
            "name": f"fencing of {device['host']}",
            "protocol": device.get("protocol", "udp"),
            "ports": [device.get("port", 623)],
            "user": "root",
            "to": [device["options"]["ip"]],
        }
        for device in devices
        if device.get("options", {}).get("ip")
    ]


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {
            "corosync_key": corosync_key,
            "cluster_nodes": cluster_nodes,
            "service_addresses": service_addresses,
            "fencing_ways": fencing_ways,
        }
