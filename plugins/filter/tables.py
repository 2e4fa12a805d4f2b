"""Filters that shape inventory data for templates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def host_table(hosts: Iterable[Mapping[str, Any]], domain: str) -> list[dict[str, Any]]:
    """Return the rows of /etc/hosts for `hosts` (their Ansible variables), one for each of their addresses.

    >>> host_table([{"inventory_hostname": "mail1", "host_addresses": ["192.0.2.1"]}], "tinh.gov.vn")
    [{'address': '192.0.2.1', 'names': ['mail1.tinh.gov.vn', 'mail1']}]
    """
    return [
        {"address": address, "names": [f"{host['inventory_hostname']}.{domain}", host["inventory_hostname"]]}
        for host in hosts
        for address in host["host_addresses"]
    ]


def service_table(addresses: Iterable[str], name: str) -> list[dict[str, Any]]:
    """Return the rows of /etc/hosts for the service `name` behind `addresses`."""
    return [{"address": address, "names": [name]} for address in addresses]


def host_names(hosts: Iterable[Mapping[str, Any]], domain: str) -> list[dict[str, Any]]:
    """Return full name and addresses of each of `hosts` (their Ansible variables).

    >>> host_names([{"inventory_hostname": "mail1", "host_addresses": ["192.0.2.1"]}], "tinh.gov.vn")
    [{'name': 'mail1.tinh.gov.vn', 'addresses': ['192.0.2.1']}]
    """
    return [
        {"name": f"{host['inventory_hostname']}.{domain}", "addresses": list(host["host_addresses"])} for host in hosts
    ]


def uplink_addresses(uplinks: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the addresses from which a host sends over its lines (host_uplinks).

    >>> uplink_addresses([{"address4": "192.0.2.1", "helo": "mx1.tinh.gov.vn"}, {"address6": "2001:db8::1"}])
    ['192.0.2.1', '2001:db8::1']
    """
    return [line[name] for line in uplinks for name in ("address4", "address6") if line.get(name)]


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {
            "host_table": host_table,
            "service_table": service_table,
            "host_names": host_names,
            "uplink_addresses": uplink_addresses,
        }
