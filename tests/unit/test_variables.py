"""What an inventory may set: unknown names, overruled names and missing values are each one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from hopthu.variables import Specification, inventory_problems, missing_values, topology_problems

CHECKOUT = Path(__file__).parents[2]
KNOWN = Specification(
    hosts=frozenset({"host_addresses"}),
    inventory=frozenset({"mail_service_addresses"}),
    optional=frozenset({"mail_never_banned"}),
    secrets={"vault_x_password": "Password of x."},
    roles=frozenset({"postfix_message_size_limit", "postfix_domains"}),
    wired=frozenset({"postfix_domains"}),
)
HOSTS = """\
all:
  vars:
    mail_service_addresses: [192.0.2.1]
  hosts:
    mail1: {host_addresses: [192.0.2.1]}
"""


def inventory(folder: Path, hosts: str = HOSTS, variables: str = "") -> Path:
    """Write an inventory and return its hosts.yml."""
    (folder / "group_vars" / "all").mkdir(parents=True)
    (folder / "group_vars" / "all" / "main.yml").write_text(variables, encoding="utf-8")
    source = folder / "hosts.yml"
    source.write_text(hosts, encoding="utf-8")
    return source


def test_a_sound_inventory_has_no_problems(tmp_path: Path) -> None:
    variables = "postfix_message_size_limit: 1\nmail_never_banned: []\n"
    assert inventory_problems(inventory(tmp_path, variables=variables), KNOWN) == []


@pytest.mark.parametrize(
    ("hosts", "variables", "place", "words"),
    [
        pytest.param(
            HOSTS,
            "\npostfix_mesage_size_limit: 1\n",
            "main.yml:2",
            "did you mean postfix_message_size_limit?",
            id="typo",
        ),
        pytest.param(HOSTS, "colour: red\n", "main.yml:1", "the kit knows no variable colour", id="unknown"),
        pytest.param(HOSTS, "postfix_domains: []\n", "main.yml:1", "would be overruled here", id="wired"),
        pytest.param(
            HOSTS.replace("mail_service_addresses: [192.0.2.1]", "shoe_size: 44"),
            "",
            "hosts.yml:3",
            "the kit knows no variable shoe_size",
            id="in vars of hosts.yml",
        ),
        pytest.param(
            HOSTS.replace("{host_addresses:", "{colour: red, host_addresses:"),
            "",
            "hosts.yml:5",
            "the kit knows no variable colour",
            id="on a host",
        ),
        pytest.param(
            HOSTS + "  children: {mx: {vars: {colour: red}}}\n",
            "",
            "hosts.yml:6",
            "no variable colour",
            id="in a child group",
        ),
        pytest.param(HOSTS, "a: [\n", "hosts.yml", "not valid YAML", id="broken YAML"),
    ],
)
def test_one_sentence_names_file_and_line(tmp_path: Path, hosts: str, variables: str, place: str, words: str) -> None:
    problems = inventory_problems(inventory(tmp_path, hosts, variables), KNOWN)
    assert len(problems) == 1
    assert place in problems[0]
    assert words in problems[0]


def test_a_wired_variable_may_be_set_on_a_host_and_a_vault_file_is_not_read(tmp_path: Path) -> None:
    source = inventory(tmp_path, HOSTS.replace("{host_addresses:", "{postfix_domains: [], host_addresses:"))
    (tmp_path / "group_vars" / "all" / "vault.yml").write_text("$ANSIBLE_VAULT;1.1;AES256\n00\n", encoding="utf-8")
    assert inventory_problems(source, KNOWN) == []


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {},
            [
                "Host mail1 has no host_addresses",
                "mail_service_addresses is not set",
                "secret vault_x_password is missing",
            ],
        ),
        (
            {"host_addresses": ["192.0.2.1"], "mail_service_addresses": ["192.0.2.1"], "vault_x_password": ""},
            ["secret vault_x_password is missing"],
        ),
        ({"host_addresses": ["192.0.2.1"], "mail_service_addresses": ["192.0.2.1"], "vault_x_password": "y"}, []),
    ],
)
def test_missing_values(variables: dict[str, object], words: list[str]) -> None:
    problems = missing_values(KNOWN, {"mail1": variables}, Path("hosts.yml"))
    assert len(problems) == len(words)
    for problem, expected in zip(problems, words, strict=True):
        assert expected in problem


ADDRESSES = {"mail1": ["192.0.2.11"], "mail2": ["192.0.2.12"], "witness": ["192.0.2.13"]}
PAIR = {name: ["mail1", "mail2"] for name in ("directory", "mailstore", "mx")} | {"quorum": ["witness"]}
ONE = {name: ["mail1"] for name in ("directory", "mailstore", "mx")} | {"quorum": []}


@pytest.mark.parametrize(
    ("groups", "service", "words"),
    [
        pytest.param(PAIR, "192.0.2.10", None, id="a pair"),
        pytest.param(ONE, "192.0.2.11", None, id="one host"),
        pytest.param(ONE, "192.0.2.10", "must be those of mail1", id="one host, an address that nobody has"),
        pytest.param(ONE | {"directory": ["mail2"]}, "192.0.2.11", "name different hosts", id="directory elsewhere"),
        pytest.param(PAIR, "192.0.2.11", "are mail1's own", id="a pair, an address that does not move"),
        pytest.param(PAIR | {"directory": ["mail1"]}, "192.0.2.10", "must stand in directory", id="one directory"),
        pytest.param(PAIR | {"mx": ["mail2"]}, "192.0.2.10", "must stand in mx", id="one mail exchanger"),
        pytest.param(PAIR | {"quorum": []}, "192.0.2.10", "name one other host in quorum", id="no third"),
        pytest.param(PAIR | {"quorum": ["mail1"]}, "192.0.2.10", "name one other host in quorum", id="not a third"),
        pytest.param(
            PAIR | {"mailstore": ["mail1", "mail2", "witness"]}, "192.0.2.10", "kept on two", id="three stores"
        ),
    ],
)
def test_hosts_that_cannot_work_are_named(groups: dict[str, list[str]], service: str, words: str | None) -> None:
    problems = topology_problems(groups, ADDRESSES, [service], Path("hosts.yml"))
    assert len(problems) == (words is not None)
    assert all(words in problem and problem.startswith("hosts.yml: ") for problem in problems if words)


@pytest.mark.parametrize("source", sorted(CHECKOUT.glob("inventories/*/hosts.yml")), ids=lambda path: path.parent.name)
def test_the_kit_knows_every_variable_of_its_own_inventories(source: Path) -> None:
    known = Specification.read(
        CHECKOUT / "inventories" / "argument_specs.yml", CHECKOUT / "roles", CHECKOUT / "playbooks/group_vars/all.yml"
    )
    assert inventory_problems(source, known) == []


def test_the_wiring_sets_only_what_a_role_reads_or_it_uses_itself() -> None:
    wiring = CHECKOUT / "playbooks" / "group_vars" / "all.yml"
    known = Specification.read(CHECKOUT / "inventories" / "argument_specs.yml", CHECKOUT / "roles", wiring)
    text = wiring.read_text(encoding="utf-8")
    playbooks = "".join(file.read_text(encoding="utf-8") for file in (CHECKOUT / "playbooks").glob("*.yml"))
    used = {name for name in known.wired if text.count(name) > 1 or name in playbooks}
    assert known.wired - known.roles - used == set()
