"""A province's mail hosts on this machine: Debian 13 containers, made, filled, checked, removed."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import accounts
import files
import hosts
import machine
import outside
from hosts import Lab
from machine import LabError, stage

CHECKOUT = Path(__file__).resolve().parent.parent
COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
# Function of a host (group of the inventory) → service units that run on it.
UNITS = {"directory": ["slapd"], "mailstore": ["dovecot"], "mx": ["postfix"]}
SERVICE_PORTS = {
    465: "submission (TLS)",
    587: "submission (STARTTLS)",
    636: "LDAPS",
    993: "IMAPS",
    995: "POP3S",
    4190: "ManageSieve",
}
# Here the server speaks first, before any TLS.
GREETING_PORTS = (22, 25, 587, 4190)


def create(lab: Lab, province: str) -> None:
    """Make what is missing of the lab's hosts, network and files; leave what runs as it is."""
    folder = files.province_folder(lab, province)
    tree = files.province_tree(folder, lab)
    machine.check_system([hosts.cache_folder(), Path("/var/lib/containers")])
    with stage("packages of this machine"):
        machine.install_packages()
    with stage("network"):
        subnets = hosts.ensure_network(lab, province)
    with stage("base image"):
        image = hosts.ensure_image(lab)
    addresses = {name: subnets.addresses(i) for i, name in enumerate(files.groups(tree))}
    if outside.HOST in addresses:
        raise LabError(f"inventories/{province}/hosts.yml: the lab has a host {outside.HOST} of its own; rename yours.")
    everyone = {**addresses, outside.HOST: subnets.addresses(-1)}
    resolvers = machine.resolvers()
    with stage(f"hosts {' '.join(everyone)}"):
        hosts.ensure_hosts(lab, image, everyone, resolvers)
    # Before the inventory, which holds the trust anchors of the zones outside.
    with stage("the world outside"):
        zones = outside.ensure(lab, subnets, folder, everyone, resolvers)
    with stage("inventory and secrets"):
        files.write_inventory(lab, folder, subnets, addresses, _variables(lab, subnets, resolvers, zones))
        files.ensure_vault_password(lab)
        files.ensure_operator(lab)
        machine.run(
            _playbook(lab, "secrets.yml", "-e", json.dumps({"secrets_file": str(lab.build / "vault.yml")})),
            "The lab's secrets could not be made",
        )


def _variables(lab: Lab, subnets: hosts.Subnets, resolvers: list[str], zones: list[dict[str, Any]]) -> dict[str, Any]:
    """What every host of the province is told about this machine and the world outside with its `zones`."""
    mirror, security = machine.debian_mirrors()
    world = subnets.addresses(-1)
    variables: dict[str, Any] = {
        "base_apt_mirror": mirror,
        "base_authorities": [str(outside.folder(lab) / "ca.pem")],
        "unbound_forwarders": resolvers,
        "unbound_forwarders_validate": machine.resolvers_validate(resolvers),
        "unbound_stub_zones": zones,
        "mail_never_banned": subnets.gateway,
        "clamav_signature_source": "files",
        "clamav_signature_files": [str(path) for path in sorted((lab.checkout / "lab" / "signatures").glob("*"))],
        "backup_reserve_octets": 1 << 28,  # the repository shares this machine's disk, which may have little left
        "dns_records_path": str(lab.build / "dns"),
        "dns_records_policy_addresses": world,
        "dns_records_servers": world,
    }
    if security:
        variables["base_apt_security_mirror"] = security
    return variables


def _playbook(lab: Lab, name: str, *arguments: str | Path) -> list[str | Path]:
    secret = lab.build / "vault-password"
    path = lab.checkout / "playbooks" / name
    return lab.playbook(lab.inventory, path, "--vault-password-file", secret, *arguments)


def up(lab: Lab, province: str) -> None:
    """Make the hosts, run the site playbook, activate the mailboxes, show a mail as proof."""
    started = time.monotonic()
    create(lab, province)
    log_path = lab.build / "up.log"
    print("site.yml (log: " + str(log_path.relative_to(lab.checkout)) + ")", flush=True)
    command = _playbook(lab, "site.yml", "-e", f"@{lab.build / 'vault.yml'}")
    with log_path.open("wb") as log:
        colour = {"ANSIBLE_FORCE_COLOR": "1"} if sys.stdout.isatty() else {}
        process = subprocess.Popen(
            command,
            env={**os.environ, **colour},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            log.write(COLOUR.sub(b"", line))
    if process.wait():
        raise LabError(f"playbooks/site.yml failed with exit code {process.returncode}", log_path)
    result = activate(lab, province)
    publish(lab, province)
    folder = files.province_folder(lab, province)
    with stage("a mail from one unit to another"):
        proof = accounts.prove(lab, result, folder)
    _print_summary(lab, result, proof, time.monotonic() - started)


def activate(lab: Lab, province: str) -> dict[str, Any]:
    """Give every mailbox a password of its own; write the credentials and lab.json."""
    with stage("passwords of the mailboxes"):
        world = outside.result(lab, _subnets(lab).addresses(-1))
        result = files.write_result(lab, files.province_folder(lab, province), world)
        done = accounts.activate(lab, result)
    print(f"{done.total} mailboxes can log in, {done.changed} of them were activated now")
    return result


def _subnets(lab: Lab) -> hosts.Subnets:
    existing = hosts.existing_network(lab)
    if existing is None:
        raise LabError(f"There is no lab named {lab.name}: `{lab.command} up` makes one.")
    return existing[0]


def publish(lab: Lab, province: str) -> None:
    """Put the records that the province's playbook prints into the DNS of the world outside."""
    subnets, folder = _subnets(lab), files.province_folder(lab, province)
    with stage("records of the province in DNS"):
        printed = _playbook(lab, "dns-records.yml", "-e", f"@{lab.build / 'vault.yml'}")
        machine.run(printed, "The province's DNS records could not be printed")
        top = files.read_yaml(lab.inventory, lab)["all"]
        addresses = {host: values["host_addresses"] for host, values in top["hosts"].items()}
        addresses[outside.HOST] = subnets.addresses(-1)
        outside.ensure(lab, subnets, folder, addresses, machine.resolvers())


def _print_summary(lab: Lab, result: dict[str, Any], proof: accounts.Proof, seconds: float) -> None:
    def shown(path: str | Path) -> str:
        return os.path.relpath(path, lab.checkout)

    address = result["service_address"]
    ca = shown(result["ca_file"])
    down = "make lab-down" if lab.name == "lab" else f"{lab.command} down"
    print(f"\nThe mail service of {result['domain']} is up ({seconds:.0f} s).")
    print(f"  proof        {proof.sender} → {proof.recipient}, read back in {proof.seconds:.1f} s:")
    print(f"               “{proof.subject}”")
    print(f"  address      {'  '.join(result['service_addresses'])}")
    for number, meaning in {25: "SMTP (MX)", **SERVICE_PORTS}.items():
        if _answers(address, number):
            print(f"  port {number:<7} {meaning}")
    for host, values in result["hosts"].items():
        addresses = "  ".join(values["addresses"].values())
        print(f"  {host:<12} {addresses}  {' '.join(values['groups'])}")
    world = result["outside"]
    print(f"  {outside.HOST:<12} {'  '.join(world['addresses'].values())}  DNS, {world['domain']}, ACME")
    print(f"  CA           {ca}")
    print(f"  log in       the whole address; passwords: {shown(result['credentials_file'])}")
    print(f"  read mail    curl --cacert {ca} imaps://{address}/INBOX -u {proof.recipient}")
    first = next(iter(result["hosts"]))
    print(f"  root shell   podman exec -it {lab.container(first)} bash")
    print(f"  SSH          ssh -F {shown(lab.build)}/ssh/config {first}")
    print(f"  for scripts  {shown(lab.result)}")
    print(f"  stop         {down}")


def status(lab: Lab) -> None:
    """Print the state of each host and its services; LabError when something is not right."""
    if not lab.inventory.exists():
        raise LabError(f"There is no lab named {lab.name}: `{lab.command} up` makes one.")
    top = files.read_yaml(lab.inventory, lab)["all"]
    membership = files.groups({"all": top})
    service = top["vars"]["mail_service_addresses"]
    wrong = []
    for host, values in top["hosts"].items():
        addresses = values["host_addresses"]
        inside = f"podman exec {lab.container(host)}"
        state = hosts.container_state(lab, host)
        if state != "running":
            wrong.append(f"{host} is {state}: `{lab.command} create` starts it")
            print(f"{host:<10} {state}")
            continue
        systemd = hosts.systemd_state(lab, host)
        if systemd != "running":
            wrong.append(f"systemd on {host} is {systemd}: {inside} systemctl --failed")
        units = [unit for group in membership[host] for unit in UNITS.get(group, [])]
        states = []
        for unit in [*units, "nftables"]:
            done = machine.attempt([*inside.split(), "systemctl", "is-active", unit])
            unit_state = done.stdout.strip() or "unknown"
            states.append(f"{unit} {unit_state}")
            if unit_state != "active":
                wrong.append(f"{unit} on {host} is {unit_state}: {inside} journalctl -u {unit}")
        expected = [(address, 22) for address in addresses]
        expected += [(address, 25) for address in addresses if "mx" in membership[host]]
        closed = [pair for pair in expected if not _answers(*pair)]
        for address in sorted({address for address, _ in closed}):
            numbers = " ".join(str(port) for where, port in closed if where == address)
            wrong.append(f"{host} does not answer at {address} on {numbers}")
        ports = sorted({port for _, port in expected} - {port for _, port in closed})
        print(f"{host:<10} {state}, systemd {systemd}  {'  '.join(addresses)}")
        print(f"{'':<10} {', '.join(states)}")
        print(f"{'':<10} answers on {' '.join(map(str, ports)) or 'no port'}")
    closed = [(address, port) for address in service for port in SERVICE_PORTS if not _answers(address, port)]
    wrong += [f"{address}, where clients go, does not answer on {port}" for address, port in closed]
    print(f"{'service':<10} {'  '.join(service)}  {'answers' if not closed else 'does not answer'}")
    wrong += _outside_status(lab)
    size = hosts.cache_bytes() / 1024**2
    print(f"package cache {hosts.cache_folder()}: {size:.0f} MiB")
    if wrong:
        raise LabError("\n  ".join([f"The lab {lab.name} is not healthy:", *wrong]))
    print(f"The lab {lab.name} is healthy.")


def _outside_status(lab: Lab) -> list[str]:
    """Print the state of the host outside; return what is not right."""
    state = hosts.container_state(lab, outside.HOST)
    if state != "running":
        print(f"{outside.HOST:<10} {state}")
        return [f"{outside.HOST} is {state}: `{lab.command} create` starts it"]
    command = ["podman", "exec", lab.container(outside.HOST), "systemctl", "is-active", *outside.UNITS]
    states = dict(zip(outside.UNITS, machine.attempt(command).stdout.split(), strict=True))
    print(f"{outside.HOST:<10} {state}, {', '.join(f'{unit} {value}' for unit, value in states.items())}")
    return [f"{unit} on {outside.HOST} is {value}" for unit, value in states.items() if value != "active"]


def _answers(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=3) as connection:
            # A daemon whose workers die still accepts the connection.
            return port not in GREETING_PORTS or bool(connection.recv(1))
    except OSError:
        return False


def down(lab: Lab) -> None:
    """Remove everything the lab has on this machine but the package cache."""
    with stage(f"removing the lab {lab.name}"):
        hosts.destroy(lab)


def main() -> int:
    """Run the command line; exit code 0, 1 after a LabError, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="lab/lab.py", description=__doc__)
    commands = ("create", "up", "activate", "publish", "status", "down", "destroy")
    parser.add_argument("command", choices=commands)
    parser.add_argument("--name", default="lab", help="name of the lab (default: lab)")
    parser.add_argument("--province", default="daklak", help="folder of inventories/ (daklak)")
    options = parser.parse_args()
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,19}", options.name):
        parser.error(f"--name {options.name}: use lower-case letters, digits and -, at most 20")
    lab = Lab(options.name, CHECKOUT)
    os.chdir(CHECKOUT)
    log_path = lab.build / "lab.log"
    try:
        if options.command == "status":
            status(lab)
            return 0
        with machine.locked(Path(f"/run/lock/{lab.network}.lock"), "another run for this lab"):
            lab.build.mkdir(parents=True, mode=0o700, exist_ok=True)
            logging.basicConfig(filename=log_path, level=logging.INFO, format="%(asctime)s %(message)s")
            if options.command in ("down", "destroy"):
                down(lab)
            else:
                steps = {"create": create, "up": up, "activate": activate, "publish": publish}
                steps[options.command](lab, options.province)
    except LabError as error:
        log = error.log or log_path
        logged = options.command != "status" and log.exists()
        where = f" (log: {log.relative_to(CHECKOUT)})" if logged else ""
        print(f"lab: {error}{where}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lab: interrupted; run the same command again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
