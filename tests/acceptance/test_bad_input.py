"""What is wrong stops the run with one clear sentence, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playbook import Province
from service import Service


@pytest.fixture
def province(lab: dict[str, Any], tmp_path: Path) -> Province:
    """The lab's inventory, to be spoilt."""
    return Province(lab, tmp_path / "inventory")


def two_units_with_one_address(province: Province) -> None:
    units = province.read("directory/units.yml")
    units["mail_units"][6]["local_part"] = units["mail_units"][3]["local_part"]
    province.write("directory/units.yml", units)


def address_outside_the_domain(province: Province) -> None:
    units = province.read("directory/units.yml")
    units["mail_units"][0]["aliases"] = ["ubnd@example.org"]
    province.write("directory/units.yml", units)


def unknown_variable(province: Province) -> None:
    (province.folder / "group_vars" / "all" / "main.yml").write_text("postfix_mesage_size_limit: 1\n", encoding="utf-8")


def unknown_field(province: Province) -> None:
    units = province.read("directory/units.yml")
    units["mail_units"][0]["adress"] = "ubnd"
    province.write("directory/units.yml", units)


def no_address_on_a_host(province: Province) -> None:
    hosts = province.read("hosts.yml")
    del hosts["all"]["hosts"]["mail2"]["host_addresses"]
    province.write("hosts.yml", hosts)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(
            two_units_with_one_address, ["units.yml:", "sotaichinh@daklak.gov.vn"], id="two units, one address"
        ),
        pytest.param(
            address_outside_the_domain, ["units.yml:", "ubnd@example.org", "daklak.gov.vn"], id="outside the domain"
        ),
        pytest.param(
            unknown_variable,
            ["main.yml:1:", "postfix_mesage_size_limit", "did you mean postfix_message_size_limit"],
            id="unknown variable",
        ),
        pytest.param(unknown_field, ["units.yml:", "adress"], id="unknown field"),
        pytest.param(no_address_on_a_host, ["mail2", "host_addresses"], id="host without an address"),
    ],
)
def test_files(province: Province, spoil: Callable[[Province], None], words: list[str]) -> None:
    spoil(province)
    run = province.run("site.yml")
    assert run.status != 0
    assert [word for word in words if word not in run.message] == [], run.message
    assert "Traceback" not in run.output
    assert set(run.changed.values()) == {0}


def test_missing_secret(province: Province) -> None:
    run = province.run("site.yml", secrets=False)
    assert run.status != 0
    assert "The secret vault_openldap_admin_password is missing" in run.message
    assert "playbooks/secrets.yml" in run.message
    assert set(run.changed.values()) == {0}


def test_unreachable_host(province: Province) -> None:
    hosts = province.read("hosts.yml")
    nobody = hosts["all"]["hosts"]["mail2"]["ansible_host"].rsplit(".", 1)[0] + ".99"
    hosts["all"]["hosts"]["mail2"]["ansible_host"] = nobody
    province.write("hosts.yml", hosts)
    run = province.run("site.yml", "--timeout", "4")
    assert run.status != 0
    assert f"Host mail2 ({nobody}) cannot be reached over SSH" in run.message
    assert "nothing has been changed" in run.message
    assert set(run.changed.values()) == {0}


def test_host_that_is_not_debian_13(province: Province, service: Service) -> None:
    host = service.inside("witness")
    assert host.run("cp -a /usr/lib/os-release /usr/lib/os-release.kept").rc == 0
    try:
        host.run("sed -i 's/trixie/bookworm/; s/13/12/' /usr/lib/os-release")
        run = province.run("site.yml")
    finally:
        host.run("mv /usr/lib/os-release.kept /usr/lib/os-release")
    assert run.status != 0
    assert "Host witness runs Debian" in run.message
    assert "only Debian 13 (trixie) will do" in run.message
    assert set(run.changed.values()) == {0}
