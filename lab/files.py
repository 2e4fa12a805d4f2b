"""Files of a lab: its inventory from the province's own, its secrets, and lab.json."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError
from ansible.parsing.vault import VaultLib, VaultSecret

import machine
from hosts import Lab, Subnets
from machine import LabError

HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


def province_folder(lab: Lab, province: str) -> Path:
    """Folder of the province's inventory; LabError naming the provinces there are."""
    folder = lab.checkout / "inventories" / province
    if not (folder / "hosts.yml").is_file():
        known = sorted(path.parent.name for path in folder.parent.glob("*/hosts.yml"))
        raise LabError(
            f"There is no inventories/{province}/hosts.yml: choose PROVINCE among {', '.join(known) or '(none yet)'}."
        )
    return folder


def read_yaml(path: Path, lab: Lab) -> dict[str, Any]:
    """A YAML file that holds a mapping; LabError naming file and line when it does not."""
    shown = path.relative_to(lab.checkout)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LabError(f"{shown} is missing.") from error
    except (yaml.MarkedYAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise LabError(f"{shown}{line}: not readable as YAML: {problem}.") from error
    if not isinstance(data, dict):
        raise LabError(f"{shown} holds no mapping.")
    return data


def write_private(path: Path, text: str) -> None:
    """Replace a file of mode 0600 in one step, on disk when this returns."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


# --- inventory -------------------------------------------------------------------------------


def groups(tree: dict[str, Any]) -> dict[str, list[str]]:
    """Hosts of an inventory in the order they first appear → names of all groups they are in."""
    found: dict[str, list[str]] = {}
    for path, group in _walk("all", tree["all"], ()):
        for host in group.get("hosts") or {}:
            names = found.setdefault(str(host), [])
            names += [name for name in path if name != "all" and name not in names]
    return found


def _walk(
    name: str, group: dict[str, Any] | None, above: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    path, group = (*above, name), group or {}
    yield path, group
    for child, below in (group.get("children") or {}).items():
        yield from _walk(child, below, path)


def province_tree(folder: Path, lab: Lab) -> dict[str, Any]:
    """The province's hosts.yml as data, its host names checked."""
    path = folder / "hosts.yml"
    tree = read_yaml(path, lab)
    if not isinstance(tree.get("all"), dict) or not groups(tree):
        raise LabError(f"{path.relative_to(lab.checkout)}: there are no hosts under `all`.")
    for host in groups(tree):
        if not HOST_NAME.fullmatch(host):
            raise LabError(
                f"{path.relative_to(lab.checkout)}: {host} is not a plain host name; the lab"
                " takes neither ranges nor patterns."
            )
    return tree


def write_inventory(
    lab: Lab,
    province: Path,
    subnets: Subnets,
    hosts: dict[str, list[str]],
    host_vars: dict[str, Any],
) -> None:
    """Write the lab's inventory: the province's own, with the lab's addresses and connection.

    `hosts` maps each name to its IPv4 and IPv6 address; `host_vars` go to every host. Beside it
    stand links to the province's group_vars and directory.
    """
    tree = province_tree(province, lab)
    networks = [str(subnets.v4), str(subnets.v6)]
    known = lab.build / "ssh" / "known_hosts"
    common = {
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(lab.build / "ssh" / "id_ed25519"),
        "ansible_ssh_common_args": f"-o 'UserKnownHostsFile=\"{known}\"' -o StrictHostKeyChecking=yes",
        "mail_service_addresses": _service_addresses(tree, subnets, hosts),
        "mail_management_networks": networks,
        "mail_user_networks": networks,
    }
    # The wiring (playbooks/group_vars) sets these too and wins over variables of groups here.
    paths = {
        "certificates_ca_path": str(lab.build / "pki"),
        "directory_slips_path": str(lab.build / "slips"),
        "directory_slips_certificates": [str(operator_certificate(lab))],
        "directory_receipts_path": str(lab.build / "receipts"),
    }
    own = {
        host: {"ansible_host": addresses[0], "host_addresses": addresses, **host_vars, **paths}
        for host, addresses in hosts.items()
    }
    replaced = {*common, *(name for values in own.values() for name in values)}
    for _path, group in _walk("all", tree["all"], ()):
        if group.get("vars"):
            group["vars"] = {k: v for k, v in group["vars"].items() if k not in replaced}
        for host, values in (group.get("hosts") or {}).items():
            kept = {k: v for k, v in (values or {}).items() if k not in replaced}
            own[host] = {**kept, **own[host]}
            group["hosts"][host] = None
    top = tree["all"]
    top["vars"] = {**(top.get("vars") or {}), **common}
    top["hosts"] = own
    lab.inventory.parent.mkdir(parents=True, exist_ok=True)
    for name in ("group_vars", "host_vars", "directory"):
        link = lab.inventory.parent / name
        link.unlink(missing_ok=True)
        if (province / name).is_dir():
            link.symlink_to(os.path.relpath(province / name, link.parent))
    text = yaml.dump(tree, Dumper=_NoAliases, allow_unicode=True, sort_keys=False)
    lab.inventory.write_text(
        f"# Made by lab/lab.py from inventories/{province.name}/hosts.yml.\n{text}",
        encoding="utf-8",
    )


def _service_addresses(tree: dict[str, Any], subnets: Subnets, hosts: dict[str, list[str]]) -> list[str]:
    """The addresses of the host that has the province's service addresses; those that move when no host has them."""
    wanted = (tree["all"].get("vars") or {}).get("mail_service_addresses") or []
    for _path, group in _walk("all", tree["all"], ()):
        for host, values in (group.get("hosts") or {}).items():
            if set(wanted) & set((values or {}).get("host_addresses") or []):
                return hosts[host]
    return subnets.addresses(-2)


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


# --- secrets ---------------------------------------------------------------------------------


def ensure_vault_password(lab: Lab) -> Path:
    """Path of the lab's vault password, made when missing."""
    path = lab.build / "vault-password"
    if not path.exists():
        write_private(path, secrets.token_urlsafe(32) + "\n")
    return path


def read_vault(lab: Lab, path: Path) -> dict[str, Any]:
    """Content of a YAML mapping encrypted with the lab's vault password."""
    shown = path.relative_to(lab.checkout)
    secret = ensure_vault_password(lab).read_bytes().strip()
    try:
        text = VaultLib([("default", VaultSecret(secret))]).decrypt(path.read_bytes())
    except FileNotFoundError as error:
        raise LabError(f"{shown} is missing: run `{lab.command} create`.") from error
    except AnsibleError as error:
        raise LabError(f"{shown} cannot be decrypted with build/{lab.name}/vault-password.") from (error)
    data = yaml.safe_load(text)
    if not isinstance(data, dict):
        raise LabError(f"{shown} holds no mapping.")
    return data


def ensure_operator(lab: Lab) -> None:
    """Make the key and the certificate to which slips are encrypted, when they are missing."""
    key, certificate = operator_key(lab), operator_certificate(lab)
    if not certificate.exists():
        subject = ["-x509", "-newkey", "rsa:3072", "-noenc", "-days", "3650", "-subj", f"/CN=operator of {lab.name}"]
        machine.run(
            ["openssl", "req", *subject, "-keyout", key, "-out", certificate], "The operator's key could not be made"
        )


def operator_certificate(lab: Lab) -> Path:
    """Path of the certificate to which the lab's slips are encrypted."""
    return lab.build / "operator.pem"


def operator_key(lab: Lab) -> Path:
    """Path of the private key that opens the lab's slips."""
    return lab.build / "operator-key.pem"


def slips(lab: Lab) -> dict[str, str]:
    """Directory id → its newest initial password, from the slips of all runs."""
    found: dict[str, str] = {}
    for path in sorted((lab.build / "slips").glob("*.cms")):
        options: list[str | Path] = ["-binary", "-inform", "DER", "-inkey", operator_key(lab), "-in", path]
        pages = machine.run(
            ["openssl", "cms", "-decrypt", *options], f"{path.relative_to(lab.checkout)} could not be opened"
        )
        found.update(re.findall(r'<section data-id="([^"]+)".*?<dd class="p">([^<]+)</dd>', pages, re.DOTALL))
    return found


# --- lab.json --------------------------------------------------------------------------------


def write_result(lab: Lab, province: Path, world: dict[str, Any]) -> dict[str, Any]:
    """Write lab.json, which tells scripts how to reach the lab, and return its content.

    `world` is what it says of the host outside.
    """
    top = read_yaml(lab.inventory, lab)["all"]
    membership = groups({"all": top})
    policy = read_yaml(province / "directory" / "policy.yml", lab)
    if "domain" not in policy:
        raise LabError(f"inventories/{province.name}/directory/policy.yml has no `domain`.")
    domain = str(policy["domain"])
    base = ",".join(f"dc={label}" for label in domain.split("."))
    password_file = lab.build / "ldap-password"
    vault = read_vault(lab, lab.build / "vault.yml")
    if "vault_openldap_admin_password" not in vault:
        raise LabError(
            f"build/{lab.name}/vault.yml has no vault_openldap_admin_password: run"
            f" `{lab.command} create`, which makes missing secrets."
        )
    write_private(password_file, str(vault["vault_openldap_admin_password"]))
    service = top["vars"]["mail_service_addresses"]
    addresses = {host: values["host_addresses"] for host, values in top["hosts"].items()}
    result = {
        "province": province.name,
        "domain": domain,
        "service_address": service[0],
        "service_addresses": service,
        "mx": [addresses[host][0] for host in addresses if "mx" in membership[host]],
        "hosts": {
            host: {
                "addresses": {"v4": pair[0], "v6": pair[1]},
                "groups": membership[host],
                "container": lab.container(host),
            }
            for host, pair in addresses.items()
        },
        "ca_file": str(lab.build / "pki" / "ca.pem"),
        "ssh_private_key": str(lab.build / "ssh" / "id_ed25519"),
        "ssh_user": "root",
        "ldap": {
            "uri": f"ldaps://{service[0]}:636",
            "base": base,
            "bind_dn": f"cn=admin,{base}",
            "password_file": str(password_file),
        },
        "credentials_file": str(lab.build / "credentials.json"),
        "inventory": str(lab.inventory),
        "outside_host": world["addresses"]["v4"],
        "outside": world,
    }
    text = json.dumps(result, indent=2, ensure_ascii=False)
    lab.result.write_text(f"{text}\n", encoding="utf-8")
    return result
