"""Runs of the playbooks against a service that is up: what a second run, a change and a renewal do and leave alone."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from playbook import Province, plan
from service import Service


@pytest.fixture
def province(lab: dict[str, Any], tmp_path: Path) -> Province:
    """The lab's inventory, to be changed."""
    return Province(lab, tmp_path / "inventory")


def loader_writes(service: Service) -> int:
    """How many writes the audit log holds under the loader's identity."""
    with service.ldap_admin() as connection:
        found = connection.extend.standard.paged_search(
            "cn=accesslog",
            f"(&(objectClass=auditWriteObject)(reqAuthzID=cn=loader,ou=services,{service.base}))",
            attributes=["reqDN"],
        )
        return sum(1 for _entry in found)


def test_a_run_without_a_change_writes_nothing(service: Service, province: Province) -> None:
    before = loader_writes(service)
    assert before >= 43, "the audit log does not know the loader's first run"
    run = province.run("directory.yml")
    assert run.status == 0, run.output
    assert set(run.changed.values()) == {0}
    assert loader_writes(service) == before


@pytest.mark.requirement("DL-4")
def test_units_and_people_come_change_and_go(service: Service, province: Province) -> None:
    units, people = province.read("directory/units.yml"), province.read("directory/people.yml")
    units["mail_units"].append(
        {"id": "t-unit", "name": "Ban Thử nghiệm", "local_part": "banthunghiem", "class": "administrative"}
    )
    people["mail_people"] = [
        {"id": "t-person", "ho": "Đặng", "dem": "Thị Ngọc", "ten": "Ánh", "unit": "t-unit", "title": "Chuyên viên"}
    ]
    province.write("directory/units.yml", units)
    province.write("directory/people.yml", people)

    dry = province.run("directory.yml", "--check", "--diff")
    assert dry.status == 0, dry.output
    assert "dangthingocanh@daklak.gov.vn" in dry.output
    assert {entry["id"] for entry in plan()["changes"]} >= {"t-unit", "t-person"}
    assert not found(service, "dangthingocanh@daklak.gov.vn"), "a dry run has written"

    try:
        assert province.run("directory.yml").status == 0
        person = found(service, "dangthingocanh@daklak.gov.vn")
        assert person["cn"] == ["Đặng Thị Ngọc Ánh"]
        assert person["departmentNumber"] == ["t-unit"]
        assert answer(service, "dangthingocanh@daklak.gov.vn") == 250

        units["mail_units"][-1]["name"] = "Ban Thử nghiệm mới"
        units["mail_units"][-1]["aliases"] = ["banmoi"]
        province.write("directory/units.yml", units)
        changed = province.run("directory.yml", "--diff")
        assert changed.status == 0, changed.output
        assert "Ban Thử nghiệm mới" in changed.output
        assert found(service, "banthunghiem@daklak.gov.vn")["mailLocalAddress"] == ["banmoi@daklak.gov.vn"]
    finally:
        units["mail_units"] = [unit for unit in units["mail_units"] if unit["id"] != "t-unit"]
        province.write("directory/units.yml", units)
        province.write("directory/people.yml", {"mail_people": []})
        gone = province.run("directory.yml")
    assert gone.status == 0, gone.output
    assert not found(service, "dangthingocanh@daklak.gov.vn")
    assert not found(service, "banthunghiem@daklak.gov.vn")
    assert answer(service, "dangthingocanh@daklak.gov.vn") == 550


def test_a_renewed_certificate_is_served_and_sessions_go_on(
    service: Service, province: Province, lab: dict[str, Any]
) -> None:
    address = lab["service_address"]
    before = {port: serial(lab, address, port) for port in (465, 636, 993)}
    pids = service.run("mail1", "pidof slapd; systemctl show -p MainPID dovecot postfix")
    with service.unit("soyte").imap(address) as session:
        renewal = province.run("site.yml", "-e", "certificates_renew_days=398")
        untouched = province.run("site.yml", "--check")
        session.noop()
    assert renewal.status == 0, renewal.output
    after = {port: serial(lab, address, port) for port in before}
    assert {port for port in before if before[port] == after[port]} == set()
    assert service.run("mail1", "pidof slapd; systemctl show -p MainPID dovecot postfix") == pids
    assert untouched.status == 0, untouched.output
    assert set(untouched.changed.values()) == {0}


def answer(service: Service, recipient: str) -> int:
    """What the mail exchanger says to a recipient."""
    with service.smtp(service.address) as smtp:
        smtp.mail("someone@example.org")
        return smtp.rcpt(recipient)[0]


def found(service: Service, mail: str) -> dict[str, list[str]]:
    """The directory entry with this main address, or nothing."""
    with service.ldap_admin() as connection:
        connection.search(service.base, f"(mail={mail})", attributes=["*"])
        rows = [entry["attributes"] for entry in connection.response or [] if entry["type"] == "searchResEntry"]
    return {
        name: [str(value) for value in values] if isinstance(values, list) else [str(values)]
        for name, values in (rows[0].items() if rows else ())
    }


def serial(lab: dict[str, Any], address: str, port: int) -> int:
    """Serial number of the certificate that a TLS port serves now."""
    context = ssl.create_default_context(cafile=lab["ca_file"])
    with (
        socket.create_connection((address, port), 10) as plain,
        context.wrap_socket(plain, server_hostname=address) as tls,
    ):
        return x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"").serial_number
