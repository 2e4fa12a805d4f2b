"""What an inventory may and must set, and what is wrong with the one at hand. Runs on the controller."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .rotation import accompanying

VAULT_HEADER = "$ANSIBLE_VAULT"


@dataclass(frozen=True)
class Specification:
    """The names that the kit knows."""

    hosts: frozenset[str]
    """Required on each host."""
    inventory: frozenset[str]
    """Required for the province."""
    optional: frozenset[str]
    """What a province may set besides."""
    secrets: Mapping[str, str]
    """Required secrets: name to what it is."""
    roles: frozenset[str]
    """Variables of the roles."""
    wired: frozenset[str]
    """Set by the wiring: a group variable of that name in the inventory would be overruled."""
    accompanying: frozenset[str] = frozenset()
    """What secrets have beside them while they are rotated."""

    @classmethod
    def read(cls, specification: Path, roles: Path, wiring: Path) -> Specification:
        """Read the kit's own files; they are part of the kit, so they are taken as sound."""
        site = yaml.safe_load(specification.read_text(encoding="utf-8"))
        options: set[str] = set()
        for file in roles.glob("*/meta/argument_specs.yml"):
            for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["argument_specs"].values():
                options.update(entry["options"])
        return cls(
            hosts=frozenset(name for name, entry in site["hosts"].items() if entry["required"]),
            inventory=frozenset(name for name, entry in site["inventory"].items() if entry["required"]),
            optional=frozenset(
                name for name, entry in (site["hosts"] | site["inventory"]).items() if not entry["required"]
            ),
            secrets={name: entry["description"] for name, entry in site["secrets"].items()},
            roles=frozenset(options),
            wired=frozenset(yaml.safe_load(wiring.read_text(encoding="utf-8"))),
            accompanying=accompanying(site["secrets"]),
        )

    @property
    def settable(self) -> frozenset[str]:
        """Every name that an inventory may set for a group."""
        secrets = frozenset(self.secrets) | self.accompanying
        return (self.hosts | self.inventory | self.optional | secrets | self.roles) - self.wired


def _assignments(source: Path) -> Iterator[tuple[Path, int, str, bool]]:
    """Yield (file, line, variable, is it a host's own) of an inventory file and the group_vars, host_vars beside it.

    Raises:
        yaml.YAMLError: a file is not YAML.
    """
    tree = yaml.compose(source.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    yield from ((source, line, name, own) for line, name, own in _inventory_file(tree))
    for folder, own in (("group_vars", False), ("host_vars", True)):
        for file in sorted((source.parent / folder).rglob("*")):
            if not file.is_file() or file.suffix not in {"", ".yml", ".yaml", ".json"}:
                continue
            text = file.read_text(encoding="utf-8")
            if text.startswith(VAULT_HEADER):
                continue
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            if isinstance(node, yaml.MappingNode):
                yield from ((file, key.start_mark.line + 1, key.value, own) for key, _value in node.value)


def _inventory_file(node: yaml.Node | None) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, variable, is it a host's own) of an inventory in YAML: group → vars, hosts, children."""
    if not isinstance(node, yaml.MappingNode):
        return
    for _group, body in node.value:
        if not isinstance(body, yaml.MappingNode):
            continue
        for key, value in body.value:
            if not isinstance(value, yaml.MappingNode):
                continue
            if key.value == "vars":
                yield from ((name.start_mark.line + 1, name.value, False) for name, _value in value.value)
            elif key.value == "hosts":
                for _host, variables in value.value:
                    if isinstance(variables, yaml.MappingNode):
                        yield from ((name.start_mark.line + 1, name.value, True) for name, _v in variables.value)
            elif key.value == "children":
                yield from _inventory_file(value)


def inventory_problems(source: Path, known: Specification) -> list[str]:
    """Return one sentence, with file and line, for each variable that the inventory should not set."""
    problems = []
    try:
        assignments = list(_assignments(source))
    except yaml.YAMLError as error:
        return [f"{source}: not valid YAML ({' '.join(str(error).split())}): correct the file."]
    for file, line, name, own in assignments:
        if name.startswith("ansible_") or name in known.settable or (own and name in known.wired):
            continue
        if name in known.wired:
            problems.append(
                f"{file}:{line}: {name} is set by playbooks/group_vars/all.yml and would be overruled here: "
                "remove it, or set it on a host."
            )
            continue
        near = difflib.get_close_matches(name, known.settable, n=1)
        advice = f"did you mean {near[0]}?" if near else "remove it; the roles' READMEs list what there is."
        problems.append(f"{file}:{line}: the kit knows no variable {name}: {advice}")
    return problems


def missing_values(known: Specification, hosts: Mapping[str, Mapping[str, Any]], source: Path) -> list[str]:
    """Return one sentence for each required value that no file sets.

    `hosts` maps each host's name to its variables; `source` is the inventory file, named in the advice.
    """
    problems = [
        f"Host {host} has no {name}: set it in {source}."
        for host, variables in hosts.items()
        for name in sorted(known.hosts)
        if not variables.get(name)
    ]
    first: Mapping[str, Any] = next(iter(hosts.values()), {})
    problems += [f"{source}: {name} is not set: add it." for name in sorted(known.inventory) if not first.get(name)]
    problems += [
        f"The secret {name} is missing ({what.rstrip('.')}): run `ansible-playbook -i {source} playbooks/secrets.yml`, "
        "which makes what is missing and keeps what is there."
        for name, what in known.secrets.items()
        if not first.get(name)
    ]
    return problems


def topology_problems(
    groups: Mapping[str, Sequence[str]], addresses: Mapping[str, Sequence[str]], service: Sequence[str], source: Path
) -> list[str]:
    """Return one sentence for each thing about the hosts that cannot work (HT-4.1a: one host, or two and a third).

    `groups` maps the inventory's groups to their hosts, `addresses` each host to its own addresses; `service` are
    mail_service_addresses; `source` is the inventory file, named in the advice.
    """
    stores, providers = list(groups.get("mailstore", [])), list(groups.get("directory", []))
    quorum = list(groups.get("quorum", []))
    owners = sorted(host for host, own in addresses.items() if set(own) & set(service))
    if len(stores) > 2:
        return [f"{source}: mailstore has {len(stores)} hosts, and a mailbox is kept on two: leave two there."]
    if len(stores) < 2:
        if providers and stores and providers != stores:
            return [f"{source}: directory and mailstore name different hosts: name the same one in both."]
        if owners != stores:
            return [
                f"{source}: mail_service_addresses must be those of {stores[0] if stores else 'the one host'}, "
                "which alone keeps the mailboxes."
            ]
        return []
    problems = []
    for name, members in (("directory", providers), ("mx", list(groups.get("mx", [])))):
        if not set(stores) <= set(members) or (name == "directory" and len(members) > 2):
            problems.append(
                f"{source}: the two hosts of mailstore ({', '.join(stores)}) take over from each other, so both, "
                f"{'and no other, ' if name == 'directory' else ''}must stand in {name}."
            )
    if owners:
        problems.append(
            f"{source}: mail_service_addresses are {owners[0]}'s own, and with two hosts in mailstore they move from "
            "one to the other: give addresses that no host has."
        )
    if len(quorum) != 1 or set(quorum) & set(stores):
        problems.append(
            f"{source}: two hosts in mailstore need a third that tells which of them goes on when they lose sight of "
            "each other: name one other host in quorum."
        )
    return problems
