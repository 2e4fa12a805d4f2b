"""Filters that shape inventory data."""

from __future__ import annotations

from tables import FilterModule


def test_every_address_of_every_host_gets_a_row() -> None:
    hosts = [
        {"inventory_hostname": "mail1", "host_addresses": ["192.0.2.1", "2001:db8::1"]},
        {"inventory_hostname": "mail2", "host_addresses": ["192.0.2.2"]},
    ]
    rows = FilterModule().filters()["host_table"](hosts, "tinh.gov.vn")
    assert [(row["address"], row["names"]) for row in rows] == [
        ("192.0.2.1", ["mail1.tinh.gov.vn", "mail1"]),
        ("2001:db8::1", ["mail1.tinh.gov.vn", "mail1"]),
        ("192.0.2.2", ["mail2.tinh.gov.vn", "mail2"]),
    ]


def test_the_service_has_a_row_for_each_address() -> None:
    rows = FilterModule().filters()["service_table"](["192.0.2.9", "2001:db8::9"], "mail.tinh.gov.vn")
    assert rows == [
        {"address": "192.0.2.9", "names": ["mail.tinh.gov.vn"]},
        {"address": "2001:db8::9", "names": ["mail.tinh.gov.vn"]},
    ]
