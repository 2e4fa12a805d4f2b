"""The provinces of inventories/: their files are validated, planned and loaded into a real slapd.

Each gets a slapd of its own on the lab's directory host, for a minute: the lab's whole configuration and fixed tree
with the province's suffix, on a socket of its own. `make soak` stands each of them up wholly.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from playbook import Files, plan
from service import Service

INVENTORIES = Path(__file__).parents[2] / "inventories"
PROVINCES = sorted(path.parent.name for path in INVENTORIES.glob("*/hosts.yml"))
FOLDER = "/var/tmp/hopthu-scratch"
SOCKET = "ldapi://" + FOLDER.replace("/", "%2F") + "%2Fldapi"


@pytest.fixture(params=PROVINCES)
def province(
    request: pytest.FixtureRequest, lab: dict[str, Any], service: Service, tmp_path: Path
) -> Iterator[tuple[Files, str]]:
    """The province's files with the lab's hosts, and its suffix, which a slapd of its own serves."""
    folder = tmp_path / "inventory"
    shutil.copytree(Path(lab["inventory"]).parent, folder)
    for name in ("directory", "group_vars"):
        shutil.rmtree(folder / name)
        shutil.copytree(INVENTORIES / request.param / name, folder / name)
    domain = yaml.safe_load((folder / "directory/policy.yml").read_text(encoding="utf-8"))["domain"]
    base = "dc=" + domain.replace(".", ",dc=")
    host = service.in_group("directory")[0]
    first, last = (name.split(",")[0].removeprefix("dc=") for name in (service.base, base))
    suffix = f"-e 's/{service.base}/{base}/g' -e 's/^dc: {first}$/dc: {last}/'"
    paths = f"-e 's#/var/lib/ldap/#{FOLDER}/#' -e 's#/run/slapd/#{FOLDER}/#' -e '/^olcTLS/d'"
    add = f"slapadd -q -F {FOLDER}/conf"
    try:
        service.run(
            host,
            f"systemctl stop hopthu-scratch 2>/dev/null; rm -rf {FOLDER} && mkdir -p {FOLDER}/conf {FOLDER}/mail"
            f" {FOLDER}/accesslog && slapcat -n0 -o ldif-wrap=no | sed {suffix} {paths} | {add} -n0 -l /dev/stdin &&"
            f" slapcat -n2 -o ldif-wrap=no -H 'ldap:///???(!(|(objectClass=hopThuMailbox)(objectClass=hopThuApplication)"
            f"(objectClass=hopThuReleased)(objectClass=hopThuDecision)))' | sed {suffix} |"
            f" {add} -n2 -l /dev/stdin && chown -R openldap {FOLDER} &&"
            f" systemd-run --quiet --collect --unit=hopthu-scratch slapd -d0 -u openldap -g openldap -F {FOLDER}/conf"
            f" -h {SOCKET} &&"
            f" timeout 10 sh -c 'until ldapwhoami -QY EXTERNAL -H {SOCKET}; do sleep .1; done'",
        )
        yield Files(lab | {"inventory": str(folder / "hosts.yml")}, tmp_path / "files"), base
    finally:
        service.run(host, f"systemctl stop hopthu-scratch; rm -rf {FOLDER}")


def test_every_province_loads(province: tuple[Files, str], service: Service) -> None:
    """All that its files name is in the tree, nothing was refused, and a second run plans nothing."""
    files, base = province
    given = {"directory_uri": SOCKET, "directory_peers": []}  # the lab's peers know nothing of this slapd
    arguments = ("-e", json.dumps(given), "--skip-tags", "mailstore")
    run = files.run("directory.yml", *arguments)
    assert run.status == 0, run.output
    assert plan()["counts"]["refused"] == 0
    listed = service.run(
        service.in_group("directory")[0],
        f"ldapsearch -QLLL -o ldif-wrap=no -Y EXTERNAL -H {SOCKET} -b {base} '(objectClass=hopThuMailbox)' mail",
    )
    assert listed.count("\nmail: ") == len(files.units) + len(files.people)
    run = files.run("directory.yml", *arguments)
    assert run.status == 0, run.output
    assert plan()["changes"] == []
