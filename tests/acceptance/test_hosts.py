"""The hosts themselves: how administrators come in, what runs and listens, and who can read the secrets."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from service import Service, wait

# What listens on a host of each function: address and port; * is every address of the host. UDP has its name before it.
LISTENS = {
    "": {"*:22", "127.0.0.1:53", "[::1]:53", "udp 127.0.0.1:53", "udp [::1]:53"},
    "directory": {"*:636"},
    "mx": {"*:25", "127.0.0.1:8461"},  # and what reads MTA-STS policies for Postfix
    "mailstore": {"*:24", "*:110", "*:143", "*:993", "*:995", "*:4190", "*:465", "*:587"},
    "monitor": {"*:6514"},
    "quorum": {"*:5403"},
    "backup": {"*:8000"},
}
# On every host that filters mail: Valkey, Rspamd with its web page, and stunnel's both ends.
FILTERS = {"127.0.0.1:6379", "127.0.0.1:11332", "127.0.0.1:11335", "*:11334"}
FILTERS |= {"*:11342", "*:13310", "127.0.0.2:11332", "127.0.0.1:23310", "*:16379", "127.0.0.1:26379"}
# On each of two hosts: what they say to each other. Corosync; the journal; what one host cannot send and
# hands over; doveadm, and the way to the other one.
PAIR = {"udp own:5405", "*:2526", "*:10025", "127.0.0.1:10027", "127.0.0.1:10028"}
PAIR |= {"127.0.0.1:12345", "*:12344", "127.0.0.1:12346"}
# systemd-analyze's measure of what a daemon could do that its job does not need: 0 nothing, 10 everything.
EXPOSURE = 5.0
NOT_CONFINED = {
    "ssh.service": "its sessions are the administrators' shells",
    "dbus.service": "part of systemd's own machinery",
    "console-getty.service": "the console of a container",
    "user@0.service": "the session of root itself",
    "auditd.service": "as Debian sets it up; it does not run where this is measured",
    "pacemaker.service": "it starts and stops what the cluster tells it to, addresses and units, as root",
    "cron.service": "its jobs are the packages' own, as root",
    "unattended-upgrades.service": "it installs packages",
}
READERS = {"postfix", "dovecot", "openldap", "_rspamd", "valkey", "stunnel4", "ssl-cert", "vmail", "mail-journal"}
# On a host: where the secrets stand, each given as name → text. Files, the processes' arguments and environments, the
# journal. The secrets come and go through pipes, so that the search is not itself what it looks for.
SEARCH = """
import grp, json, os, pwd, stat, subprocess, sys
secrets = {name: text.encode() for name, text in json.load(sys.stdin).items()}
passed = ("/var/lib/apt", "/var/cache", "/var/lib/dpkg", "/var/lib/clamav", "/var/log/journal")
def names(data):
    return sorted(name for name, text in secrets.items() if text in data)
files, elsewhere = [], []
for root in ("/etc", "/usr/local", "/root", "/home", "/opt", "/run", "/srv", "/tmp", "/var"):
    for folder, folders, entries in os.walk(root):
        folders[:] = [f for f in folders if os.path.join(folder, f) not in passed]
        for path in (os.path.join(folder, entry) for entry in entries):
            try:
                status = os.lstat(path)
                if not stat.S_ISREG(status.st_mode) or status.st_size > 1 << 25:
                    continue
                found = names(open(path, "rb").read())
            except OSError:
                continue
            if found:
                owner, group = pwd.getpwuid(status.st_uid).pw_name, grp.getgrgid(status.st_gid).gr_name
                files.append([path, owner, group, stat.S_IMODE(status.st_mode), found])
for process in filter(str.isdigit, os.listdir("/proc")):
    for what in ("cmdline", "environ"):
        try:
            found = names(open(f"/proc/{process}/{what}", "rb").read())
        except OSError:
            continue
        if found:
            elsewhere.append([f"/proc/{process}/{what}", found])
journal = subprocess.run(["journalctl", "-q", "-o", "cat", "--no-pager"], capture_output=True, check=True).stdout
if names(journal):
    elsewhere.append(["journal", names(journal)])
print(json.dumps({"files": files, "elsewhere": elsewhere}))
"""


def ssh(service: Service, host: str, *options: str) -> subprocess.CompletedProcess[str]:
    """An SSH session of its own to a host; without a terminal nobody is asked for a password."""
    command = ["ssh", "-F", service.ssh_config, "-o", "ControlPath=none", "-o", "BatchMode=yes", *options, host]
    return subprocess.run([*command, "true"], capture_output=True, text=True, timeout=30, check=False)


def test_ssh_takes_keys_only(service: Service) -> None:
    for host in service.hosts:
        refused = ssh(service, host, "-o", "PubkeyAuthentication=no")
        assert refused.returncode == 255
        assert "Permission denied (publickey)" in refused.stderr, refused.stderr


def test_ssh_forwards_nothing(service: Service) -> None:
    """With TCP forwarding whoever may log in could reach what the packet filter closes."""
    host = service.in_group("mx")[0]
    command = ["ssh", "-F", service.ssh_config, "-o", "ControlPath=none", "-W", "127.0.0.1:25", host]
    forwarded = subprocess.run(command, input="QUIT\r\n", capture_output=True, text=True, timeout=30, check=False)
    assert "220 " not in forwarded.stdout
    assert forwarded.returncode != 0


def test_no_unit_has_failed(service: Service) -> None:
    for host in service.hosts:
        failed = service.run(host, "systemctl list-units --failed --no-legend --plain")
        assert not failed, f"{host}: {failed}"
        command = "systemctl is-system-running || true"
        wait(f"{host} has started", lambda host=host, command=command: service.run(host, command) == "running")


def listening(service: Service, host: str) -> set[str]:
    """What listens on a host, written as in LISTENS."""
    found, own = set(), service.hosts[host]["addresses"].values()
    for line in service.run(host, "ss -Hltnu").splitlines():
        protocol, local = line.split()[0], line.split()[4]
        address, port = local.rsplit(":", 1)
        address = "*" if address in ("0.0.0.0", "[::]", "*") else address.split("%")[0]
        address = "own" if address.strip("[]") in own else address
        found.add(f"{'udp ' if protocol == 'udp' else ''}{address}:{port}")
    return found


@pytest.mark.requirement("HT-2.1")
def test_nothing_listens_that_is_not_documented(service: Service) -> None:
    """Behind the packet filter too: what does not listen needs no filter."""
    found = {host: listening(service, host) for host in service.hosts}
    expected = {}
    for host, values in service.hosts.items():
        expected[host] = set().union(*(LISTENS.get(group, set()) for group in ["", *values["groups"]]))
        if {"mx", "mailstore"} & set(values["groups"]):
            expected[host] |= FILTERS
        if "mailstore" in values["groups"] and len(service.in_group("mailstore")) > 1:
            expected[host] |= PAIR
    assert found == expected


def test_daemons_are_confined(service: Service) -> None:
    open_wide = []
    for host in service.hosts:
        running = service.run(host, "systemctl list-units --type=service --state=running --no-legend --plain")
        units = {line.split()[0] for line in running.splitlines()} - NOT_CONFINED.keys()
        for measured in json.loads(service.run(host, "systemd-analyze security --json=short --no-pager")):
            if measured["unit"] in units and float(measured["exposure"]) > EXPOSURE:
                open_wide.append(f"{host}: {measured['unit']} {measured['exposure']}")
    assert not open_wide


@pytest.fixture(scope="module")
def found_secrets(service: Service) -> dict[str, dict[str, Any]]:
    """Host → where the vault's secrets stand there."""
    # Of a key the longest line, which holds however it is written around it.
    wanted = {name: max(value.splitlines(), key=len) for name, value in service.secrets.items() if value}
    found = {}
    for host in service.hosts:
        with service.python(host, SEARCH) as process:
            output, _ = process.communicate(json.dumps(wanted))
        found[host] = json.loads(output)
    return found


@pytest.mark.requirement("N-TT39-4.2")
def test_secrets_are_readable_by_their_daemon_alone(found_secrets: dict[str, dict[str, Any]]) -> None:
    wrong, places = [], 0
    for host, found in found_secrets.items():
        for path, owner, group, mode, names in found["files"]:
            places += 1
            if mode & 0o027 or (mode & 0o040 and group not in READERS | {"root"}):
                wrong.append(f"{host}:{path} {owner}:{group} {mode:04o} holds {', '.join(names)}")
            if "vault_certificates_ca_passphrase" in names:
                wrong.append(f"{host}:{path} holds the passphrase of the authority, which no host needs")
    assert not wrong
    assert places, "the search found no secret at all: it does not see what it looks for"


def test_secrets_stand_in_no_process_list_and_no_log(found_secrets: dict[str, dict[str, Any]]) -> None:
    assert {host: found["elsewhere"] for host, found in found_secrets.items()} == {host: [] for host in found_secrets}


def test_changes_of_the_configuration_are_recorded(service: Service) -> None:
    """By the audit daemon, where the kernel records for the host; elsewhere it is set up and waits."""
    for host in service.hosts:
        assert "-F dir=/etc " in service.run(host, "cat /etc/audit/rules.d/audit.rules")
        state = service.run(host, "systemctl is-active auditd || true")
        if not service.inside(host).run("auditctl -s").succeeded:
            assert state == "inactive", f"{host}: auditd is {state} though the kernel does not record for it"
            continue
        assert state == "active"
        service.run(host, "touch /etc/hopthu-audit-test && rm /etc/hopthu-audit-test")
        command = "ausearch -k configuration --start recent --raw | grep -c hopthu-audit-test || true"
        wait(f"{host} records it", lambda host=host, command=command: int(service.run(host, command)) > 0)


def test_apparmor_confines_where_the_kernel_has_it(service: Service) -> None:
    """Every loaded profile refuses and does not merely complain; a container's host confines it instead."""
    for host in service.hosts:
        assert service.inside(host).package("apparmor").is_installed
        if service.inside(host).run("systemd-detect-virt --container").succeeded:
            continue
        profiles = service.run(host, "cat /sys/kernel/security/apparmor/profiles").splitlines()
        assert any(line.endswith("(enforce)") for line in profiles), f"{host}: no profile is loaded"
        assert not [line for line in profiles if line.endswith("(complain)")]


def test_every_unit_is_read_as_it_was_written(service: Service) -> None:
    """systemd only warns of a line that it cannot read, and goes on without it."""
    for host in service.hosts:
        said = service.run(host, "systemd-analyze verify --man=no /etc/systemd/system/*.* 2>&1 || true")
        assert [line for line in said.splitlines() if line.startswith("/etc/systemd/system/")] == [], host
