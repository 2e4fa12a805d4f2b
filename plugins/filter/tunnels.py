"""Filters that turn the tunnels of the stunnel role into what the firewall must let through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def tunnel_openings(offers: Iterable[Mapping[str, Any]], peers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the firewall's openings for the tunnels that a host offers: from an offer's `from`, else from its peers.

    >>> tunnel_openings([{"name": "clamd", "port": 13310, "to": "/run/clamav/clamd.ctl"}],
    ...                 [{"name": "mail2.tinh.gov.vn", "addresses": ["192.0.2.2"]}])
    [{'name': 'tunnel to clamd', 'protocol': 'tcp', 'ports': [13310], 'from': ['192.0.2.2']}]
    """
    addresses = [address for peer in peers for address in peer["addresses"]]
    return [
        {
            "name": f"tunnel to {offer['name']}",
            "protocol": "tcp",
            "ports": [offer["port"]],
            "from": list(offer.get("from", addresses)),
        }
        for offer in offers
    ]


def tunnel_outgoing(
    uses: Iterable[Mapping[str, Any]], peers: Iterable[Mapping[str, Any]], user: str
) -> list[dict[str, Any]]:
    """Return what `user` must reach for the tunnels that a host uses: the addresses of each use's hosts.

    >>> tunnel_outgoing([{"name": "clamd", "listen": "127.0.0.1:23310", "port": 13310, "hosts": ["mail2.tinh.gov.vn"]}],
    ...                 [{"name": "mail2.tinh.gov.vn", "addresses": ["192.0.2.2"]}], "stunnel4")
    [{'name': 'tunnel to clamd', 'protocol': 'tcp', 'ports': [13310], 'to': ['192.0.2.2'], 'user': 'stunnel4'}]
    """
    known = {peer["name"]: peer["addresses"] for peer in peers}
    return [
        {
            "name": f"tunnel to {use['name']}",
            "protocol": "tcp",
            "ports": [use["port"]],
            "to": [address for host in use["hosts"] for address in known.get(host, [])],
            "user": user,
        }
        for use in uses
    ]


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"tunnel_openings": tunnel_openings, "tunnel_outgoing": tunnel_outgoing}
