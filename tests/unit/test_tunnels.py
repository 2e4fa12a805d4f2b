"""What the firewall must let through for the tunnels between hosts."""

from __future__ import annotations

from tunnels import FilterModule

FILTERS = FilterModule().filters()
PEERS = [
    {"name": "mail2.tinh.gov.vn", "addresses": ["192.0.2.2", "2001:db8::2"]},
    {"name": "mail3.tinh.gov.vn", "addresses": ["192.0.2.3"]},
]


def test_an_offer_is_open_to_the_peers_unless_it_says_from_where() -> None:
    offers = [
        {"name": "clamd", "port": 13310, "to": "/run/clamav/clamd.ctl"},
        {"name": "page", "port": 11334, "to": "127.0.0.1:11335", "from": ["198.51.100.0/24"]},
        {"name": "nobody", "port": 1, "to": "127.0.0.1:2", "from": []},
    ]
    assert [(o["ports"], o["from"]) for o in FILTERS["tunnel_openings"](offers, PEERS)] == [
        ([13310], ["192.0.2.2", "2001:db8::2", "192.0.2.3"]),
        ([11334], ["198.51.100.0/24"]),
        ([1], []),
    ]


def test_a_lone_host_opens_its_offers_to_nobody() -> None:
    offers = [{"name": "clamd", "port": 13310, "to": "/run/clamav/clamd.ctl"}]
    assert FILTERS["tunnel_openings"](offers, [])[0]["from"] == []


def test_a_use_goes_to_its_hosts_only_and_for_the_tunnels_user_only() -> None:
    uses = [{"name": "valkey", "listen": "127.0.0.1:26379", "port": 16379, "hosts": ["mail3.tinh.gov.vn", "unknown"]}]
    assert FILTERS["tunnel_outgoing"](uses, PEERS, "stunnel4") == [
        {
            "name": "tunnel to valkey",
            "protocol": "tcp",
            "ports": [16379],
            "to": ["192.0.2.3"],
            "user": "stunnel4",
        }
    ]
