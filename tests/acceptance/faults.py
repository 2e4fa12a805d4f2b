"""Faults on the hosts of a lab, made from outside as a data centre makes them: power, cables, disks, single daemons.

A fault is a context manager: it is there inside the block and healed after it. Containers and their network
namespaces are reached from this machine, so that a host that is cut off can still be healed.
"""

from __future__ import annotations

import functools
import json
import re
import socket
import subprocess
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from load import Load
from service import Service

CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = CHECKOUT / "build" / "availability.json"

# What the stack calls its things; here and nowhere else in the tests of availability.
SYNC = "mail-sync.service"
SYNC_STATUS = "/run/mail-sync/status.json"
SWEEP, FULL = "mail-sync sweep", "mail-sync full"
COMPARE_MAIL, COMPARE_DIRECTORY = "mail-compare", "directory-compare"
JOURNAL, JOURNAL_LIST = "mail-journal.service", "mail-journal list"
STORE = "/srv/vmail"
CLUSTER = ("corosync.service", "pacemaker.service")
DAEMONS = {
    "postfix": "postfix.service",
    "dovecot": "dovecot.service",
    "slapd": "slapd.service",
    "rspamd": "rspamd.service",
    "clamd": "clamav-daemon.service",
    "valkey": "valkey-server.service",
    "mail-sync": SYNC,
    "mail-journal": JOURNAL,
    "corosync": CLUSTER[0],
    "pacemaker": CLUSTER[1],
}

WELL = 300  # seconds until everything has to be well again after a fault
MANY = 20  # ids that a row lists


class FaultError(Exception):
    """A fault cannot be made here; the sentence says why."""


def _dropping(table: str, device: str, match: Sequence[str]) -> str:
    """Rules of nftables that drop what comes in at a device and matches."""
    chain = f' chain in {{\n  type filter hook ingress device "{device}" priority -500; policy accept;\n'
    body = "".join(f"  {line}\n" for line in match)
    return f"table netdev {table}\ndelete table netdev {table}\ntable netdev {table} {{\n{chain}{body} }}\n}}\n"


class Hosts:
    """The hosts of a lab as their power supplies, cables and disks know them."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.full = service.in_group("mailstore")
        self.all = list(service.hosts)
        self.remarks: list[str] = []
        self._pids: dict[str, int] = {}
        self._looked: dict[str, float] = {}

    # --- power

    def container(self, host: str) -> str:
        """Name of a host's container."""
        return str(self.service.hosts[host]["container"])

    def pid(self, host: str) -> int | None:
        """Process on this machine that is a host's init; None while the host is off."""
        pid = self._pids.get(host)
        if pid and Path(f"/proc/{pid}").exists():
            return pid
        if time.monotonic() - self._looked.get(host, 0) < 1:  # podman is no cheap witness
            return None
        self._looked[host] = time.monotonic()
        asked = subprocess.run(
            ["podman", "inspect", "--format", "{{.State.Pid}}", self.container(host)], capture_output=True, text=True
        )
        self._pids[host] = int(asked.stdout.strip() or 0) if asked.returncode == 0 else 0
        return self._pids[host] or None

    def kill(self, host: str) -> None:
        """Pull the plug: nothing on the host learns of it."""
        _podman("kill", "-s", "KILL", self.container(host))

    def start(self, host: str) -> None:
        """Switch a host on that has been off; return when systemd has started what it starts."""
        _podman("start", self.container(host))
        self._looked.pop(host, None)
        self.attempt(host, "timeout 120 systemctl is-system-running --wait")

    def destroy(self, host: str) -> None:
        """Have a host burn with all its disks."""
        _podman("rm", "-f", "-v", "-t", "0", self.container(host))

    # --- inside

    def attempt(self, host: str, command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command in a host's shell, however it ends; over no network, so a cut-off host is reached too."""
        call = ["podman", "exec", "-i", self.container(host), "sh", "-c", command]
        return subprocess.run(call, input=stdin, capture_output=True, text=True, timeout=900)

    def run(self, host: str, command: str, stdin: str = "") -> str:
        """Output of a command on a host; FaultError when it fails."""
        done = self.attempt(host, command, stdin)
        if done.returncode:
            said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise FaultError(f"{host}: `{command[:80]}` failed: {said}")
        return done.stdout

    def flush(self) -> None:
        """Have every host try now what waits in its queue, not in some minutes."""
        for host in self.service.in_group("mx"):
            self.attempt(host, "postqueue -f")

    # --- the service address

    def held(self, host: str) -> set[str]:
        """The service addresses that a host has now. The kernel's files tell it without a process in the host."""
        pid = self.pid(host)
        try:
            routes = Path(f"/proc/{pid}/net/fib_trie").read_text(encoding="ascii")
            six = Path(f"/proc/{pid}/net/if_inet6").read_text(encoding="ascii")
        except OSError:
            return set()
        own = set(re.findall(r"-- (\S+)\n\s+/32 host LOCAL", routes)) | {line.split()[0] for line in six.splitlines()}
        addresses = self.service.addresses.values()
        return {address for address in addresses if (_hexadecimal(address) if ":" in address else address) in own}

    def active(self) -> str:
        """The host that holds the service addresses; FaultError when for a minute no single one does."""
        deadline = time.monotonic() + 60
        while True:
            holders = [host for host in self.full if self.held(host)]
            if len(holders) == 1:
                return holders[0]
            if time.monotonic() > deadline:
                raise FaultError(f"the service address is held by {' and '.join(holders) or 'nobody'}")
            time.sleep(0.2)

    def standby(self) -> str:
        """The other full host; FaultError when there is none."""
        active = self.active()
        others = [host for host in self.full if host != active]
        if not others:
            raise FaultError("this lab has one full host only")
        return others[0]

    # --- cables

    def drop(self, host: str, senders: Sequence[str] | None) -> None:
        """Have a host receive nothing from the named hosts; None cuts it off from everybody, both ways.

        Before the host's own firewall, and below IP: neither ARP nor a half-open connection gets through. What a host
        that is cut off sends is dropped at the other end of its cable, so that it learns nothing of it: told by its own
        kernel, Corosync would try again for ever.
        """
        match = [f"ether saddr {self._hardware_address(sender)} drop" for sender in senders or ()] or ["drop"]
        self._net(host, "nft", "-f", "-", stdin=_dropping("cut", "eth0", match))
        if senders is None:
            self._outside(host, _dropping(self._table(host), self._far_end(host), ["drop"]))

    def mend(self, host: str) -> None:
        """Undo `drop`; nothing happens where nothing is cut or the host is off."""
        if self.pid(host):
            self._net(host, "nft", "-f", "-", stdin="table netdev cut\ndelete table netdev cut\n")
            self._outside(host, f"table netdev {self._table(host)}\ndelete table netdev {self._table(host)}\n")

    def _table(self, host: str) -> str:
        return "cut_" + self.service.hosts[host]["container"].replace("-", "_")

    def _far_end(self, host: str) -> str:
        """Name of the interface of this machine at which the cable of a host ends."""
        index = json.loads(self._net(host, "ip", "-j", "link", "show", "eth0"))[0]["link_index"]
        links = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, text=True, check=True).stdout)
        return str(next(link["ifname"] for link in links if link["ifindex"] == index))

    def _outside(self, host: str, rules: str) -> None:
        """Load rules into the network of this machine, with the program of a host."""
        call = ["nsenter", "-t", str(self.pid(host)), "-m", "nft", "-f", "-"]
        subprocess.run(call, input=rules, capture_output=True, text=True, check=True)

    def _hardware_address(self, host: str) -> str:
        return str(json.loads(self._net(host, "ip", "-j", "link", "show", "eth0"))[0]["address"])

    def _net(self, host: str, *command: str, stdin: str = "") -> str:
        """Run a program of a host in its network, without being a process of the host."""
        call = ["nsenter", "-t", str(self.pid(host)), "-n", "-m", *command]
        return subprocess.run(call, input=stdin, capture_output=True, text=True, check=True).stdout

    # --- health

    def unwell(self, users: Sequence[str] = ()) -> list[str]:
        """What is not as it should be: hosts, units, cluster, and what the two full hosts have not in common."""
        off = [f"{host} is off" for host in self.all if not self.pid(host)]
        if off:
            return off
        found = []
        for host in self.all:
            failed = self.attempt(host, "systemctl list-units --failed --plain --no-legend").stdout.split("\n")
            found += [f"{line.split()[0]} on {host} has failed" for line in failed if line]
        if len(self.full) < 2 or found:
            return found
        for host in self.full:
            asked = self.attempt(host, "crm_mon -1 --output-as=xml")
            found += [f"{host}: {one}" for one in cluster_problems(asked.stdout)]
            votes = self.attempt(host, "corosync-quorumtool -s").stdout
            counted = dict(re.findall(r"^(Expected|Total) votes:\s+(\d+)", votes, re.MULTILINE))
            if not counted or counted.get("Expected") != counted.get("Total"):
                found.append(f"{host} counts {counted.get('Total')} of {counted.get('Expected')} votes")
            found += [f"{host}: {one}" for one in sync_problems(self.attempt(host, f"cat {SYNC_STATUS}").stdout)]
        return found or self.differences(users)

    def differences(self, users: Sequence[str] = ()) -> list[str]:
        """What the two full hosts do not have in common, as the stack's own checks say it."""
        found = []
        active = self.active()
        for command in (COMPARE_DIRECTORY, *([f"{COMPARE_MAIL} {' '.join(users)}"] if users else [])):
            done = self.attempt(active, command)
            if done.returncode:
                said = (done.stdout + done.stderr).strip().splitlines()
                found.append(f"{command.split()[0]} ends with {done.returncode}: {' | '.join(said[-3:])}")
        return found

    def await_well(self, seconds: float = WELL, users: Sequence[str] = ()) -> list[str]:
        """Wait until nothing is unwell; what still is after `seconds`."""
        deadline = time.monotonic() + seconds
        while found := self._unwell_or_error(users):
            if time.monotonic() > deadline:
                break
            time.sleep(3)
        return found

    def _unwell_or_error(self, users: Sequence[str]) -> list[str]:
        try:
            return self.unwell(users)
        except (FaultError, subprocess.TimeoutExpired) as error:
            return [str(error)]


def _podman(*command: str) -> None:
    done = subprocess.run(["podman", *command], capture_output=True, text=True)
    if done.returncode:
        raise FaultError(f"podman {' '.join(command)}: {done.stderr.strip()}")


def _hexadecimal(address: str) -> str:
    """An IPv6 address as the kernel's list of addresses writes it."""
    return socket.inet_pton(socket.AF_INET6, address).hex()


def cluster_problems(xml: str) -> list[str]:
    """What Pacemaker's status in XML says of nodes and resources that is not as it should be."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return ["Pacemaker gives no status"]
    wanted = {"online": "true", "standby": "false", "maintenance": "false", "unclean": "false", "pending": "false"}
    found = []
    for node in root.iterfind("./nodes/node"):
        odd = [f"{name}={node.get(name)}" for name, value in wanted.items() if node.get(name) not in (value, None)]
        odd += [f"health={node.get('health')}"] if node.get("health") not in ("green", None) else []
        found += [f"node {node.get('name')} is {' '.join(odd)}"] if odd else []
    for resource in root.iterfind("./resources//resource"):
        if resource.get("failed") == "true" or resource.get("role") not in ("Started", "Promoted", "Unpromoted"):
            found.append(f"resource {resource.get('id')} is {resource.get('role')}, failed={resource.get('failed')}")
    return found


def sync_problems(status: str) -> list[str]:
    """What the mail store's replication has not done yet, by its own status file."""
    try:
        told = json.loads(status)
        behind, unverified = told["behind"], told["unverified"]
    except (ValueError, KeyError):
        return ["mail-sync gives no status"]
    found = [f"mail-sync is behind with {behind} users"] if behind else []
    return found + ([f"mail-sync has still to look through {unverified} users"] if unverified else [])


# --- faults ----------------------------------------------------------------------------------------------------------


@contextmanager
def _without_power(hosts: Hosts, host: str) -> Iterator[None]:
    hosts.kill(host)
    try:
        yield
    finally:
        hosts.start(host)


def host_killed(hosts: Hosts) -> AbstractContextManager[None]:
    """The active host loses its power."""
    return _without_power(hosts, hosts.active())


def witness_lost(hosts: Hosts) -> AbstractContextManager[None]:
    """The witness alone loses its power."""
    return _without_power(hosts, hosts.service.in_group("quorum")[0])


@contextmanager
def daemon_killed(hosts: Hosts, unit: str) -> Iterator[None]:
    """A daemon of the active host dies; it has to come back by itself, and it is remarked when it does not."""
    host = hosts.active()
    hosts.run(host, f"systemctl kill --kill-whom=main -s KILL {unit}")
    try:
        yield
    finally:
        if hosts.attempt(host, f"systemctl is-active --quiet {unit}").returncode:
            hosts.remarks.append(f"{unit} on {host} did not come back by itself")
            units = " ".join(CLUSTER) if unit in CLUSTER else unit
            hosts.run(host, f"systemctl reset-failed {unit}; systemctl start {units}")


@contextmanager
def daemon_hangs(hosts: Hosts, unit: str) -> Iterator[None]:
    """All processes of a daemon of the active host stand still: they accept connections and never answer."""
    host = hosts.active()
    hosts.run(host, f"systemctl kill --kill-whom=all -s STOP {unit}")
    try:
        yield
    finally:
        # Those that stood still are gone when the cluster has started the daemon anew.
        hosts.attempt(host, f"systemctl kill --kill-whom=all -s CONT {unit}")


@contextmanager
def disk_full(hosts: Hosts) -> Iterator[None]:
    """No room is left in the active host's mail store, which must be a disk of its own."""
    host = hosts.active()
    if "/dev/loop" not in hosts.run(host, f"findmnt -no SOURCE -T {STORE}"):
        raise FaultError(f"{STORE} on {host} is no file system of its own: filling it would fill this machine's disk")
    free = f"$(df --output=avail -B1 {STORE} | tail -n 1)"
    try:
        # The second takes what the first could not have at once.
        hosts.run(
            host,
            f"fallocate -l {free} {STORE}/.full || true;"
            f" runuser -u vmail -- dd if=/dev/zero of={STORE}/.full.rest bs=4k status=none 2>/dev/null || true;"
            f" test {free} -lt 65536",
        )
        yield
    finally:
        hosts.run(host, f"rm -f {STORE}/.full {STORE}/.full.rest")


@contextmanager
def hosts_cut_apart(hosts: Hosts) -> Iterator[None]:
    """The two full hosts do not reach each other; everybody else reaches both."""
    one, other = hosts.active(), hosts.standby()
    try:
        hosts.drop(one, [other])
        hosts.drop(other, [one])
        yield
    finally:
        hosts.mend(one)
        hosts.mend(other)


@contextmanager
def active_cut_off(hosts: Hosts) -> Iterator[None]:
    """The active host reaches nobody, and nobody reaches it."""
    host = hosts.active()
    try:
        hosts.drop(host, None)
        yield
    finally:
        hosts.mend(host)


@contextmanager
def link_flaps(hosts: Hosts, seconds: float = 30, period: float = 2) -> Iterator[None]:
    """The active host's link goes and comes every `period` seconds, and then stays."""
    host = hosts.active()
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            hosts.drop(host, None)
            time.sleep(period)
            hosts.mend(host)
            time.sleep(period)
    finally:
        hosts.mend(host)
    yield


@contextmanager
def silent_difference(hosts: Hosts, user: str, message: str) -> Iterator[None]:
    """The standby's copy of a mailbox gets a message of which nobody tells the other host."""
    standby = hosts.standby()
    units = {}
    try:
        for host in hosts.full:
            # Its timers too, where they run: what must run once in the cluster has them on one host.
            running = "systemctl list-units --state=active --plain --no-legend --full 'mail-sync*.timer'"
            units[host] = " ".join([SYNC, *(line.split()[0] for line in hosts.run(host, running).splitlines())])
            hosts.run(host, f"systemctl stop {units[host]}")
        save(hosts, standby, user, message)
        yield
    finally:
        for host, names in units.items():
            hosts.run(host, f"systemctl start {names}")


def save(hosts: Hosts, host: str, user: str, message: str) -> None:
    """Put a message into a host's own copy of a mailbox, whichever host serves."""
    hosts.run(host, f"doveadm save -u '{user}' -m INBOX", message)


Fault = Callable[[Hosts], AbstractContextManager[None]]
FAULTS: dict[str, Fault] = {
    "active host killed": host_killed,
    "hosts cut apart": hosts_cut_apart,
    "active host cut off from everyone": active_cut_off,
    "link of the active host flaps": link_flaps,
    "witness lost": witness_lost,
    "disk of the active host full": disk_full,
    **{f"{name} killed": functools.partial(daemon_killed, unit=unit) for name, unit in DAEMONS.items()},
    **{f"{name} hangs": functools.partial(daemon_hangs, unit=DAEMONS[name]) for name in ("dovecot", "slapd")},
}


# --- a fault under load, and what came of it -------------------------------------------------------------------------


class Watch(threading.Thread):
    """Looks every fifth of a second who holds the service address, from `start` to `stop`."""

    def __init__(self, hosts: Hosts) -> None:
        super().__init__(daemon=True)
        self.hosts = hosts
        self.two_s = self.none_s = 0.0
        self._end = threading.Event()

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self.join()

    def run(self) -> None:
        """Add up the time with two holders of one address, and that with none."""
        before = time.monotonic()
        while not self._end.wait(0.2):
            held = [address for host in self.hosts.full for address in self.hosts.held(host)]
            now = time.monotonic()
            self.two_s += (now - before) * (len(held) > len(set(held)))
            self.none_s += (now - before) * (not held)
            before = now


@dataclass
class Trial:
    """A load on the hosts, and after the block the row that came of it."""

    load: Load
    row: dict[str, Any]

    @property
    def good(self) -> bool:
        """Whether nothing was lost, doubled or refused, and everything was well again afterwards."""
        bad = ("missing", "duplicated", "failed", "missing_on_a_host", "problems")
        return bool(self.row) and not any(self.row[name] for name in bad)

    def await_acknowledged(self, number: int, seconds: float = 600) -> None:
        """Wait until so many messages were acknowledged."""
        deadline = time.monotonic() + seconds
        while len(self.load.acknowledged) < number:
            if time.monotonic() > deadline:
                raise FaultError(f"{len(self.load.acknowledged)} of {number} messages were acknowledged in time")
            time.sleep(0.5)


@contextmanager
def trial(hosts: Hosts, name: str, rate: float = 5.0, after: float = 15, well: float = WELL) -> Iterator[Trial]:
    """A load while the block breaks and heals, `after` seconds longer, and the row of build/availability.json.

    FaultError when the hosts are not well to begin with.
    """
    if problems := hosts.await_well():
        raise FaultError(f"before anything was broken: {'; '.join(problems)}")
    hosts.remarks.clear()
    with Watch(hosts) as watch:
        with Load(hosts.service, rate) as load:
            if not load.flows():
                raise FaultError("before anything was broken, no mail went through")
            seen = Trial(load, {})
            yield seen
            healed = time.monotonic()
            time.sleep(after)
        for _try in range(3):
            hosts.flush()
            if not load.outcome(60).missing:
                break
        problems = hosts.await_well(well, [box.address for box in load.recipients])
        well_s = time.monotonic() - healed
        outcome = load.outcome(0)
    lacking = {} if problems else {host: load.lacking_on(functools.partial(hosts.run, host)) for host in hosts.full}
    seen.row.update(
        {
            "fault": name,
            "acknowledged": outcome.acknowledged,
            "missing": len(outcome.missing),
            "duplicated": len(outcome.duplicated),
            "gap_s": outcome.gap_s,
            "two_holders_s": round(watch.two_s, 1),
            "no_holder_s": round(watch.none_s, 1),
            "gap_imap_s": outcome.gap_imap_s,
            "gap_submission_s": outcome.gap_submission_s,
            "gap_mx_s": outcome.gap_mx_s,
            "failed": len(outcome.failed),
            "deferred": outcome.deferred,
            "unsent": len(outcome.unsent),
            "unknown_then_repeated": len(outcome.unknown_then_repeated),
            "sessions_lost": max(outcome.sessions_lost, default=0),
            "passwords_refused": outcome.passwords_refused,
            "missing_on_a_host": {host: len(ids) for host, ids in lacking.items() if ids},
            "well_again_s": round(well_s, 1),
            "problems": problems,
            "remarks": list(hosts.remarks),
            "ids": {
                kind: getattr(outcome, kind)[:MANY]
                for kind in ("missing", "duplicated", "failed", "unsent")
                if getattr(outcome, kind)
            },
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )
    record(seen.row)
    if seen.good:
        load.clean()


def record(row: dict[str, Any], path: Path = RESULTS) -> None:
    """Put a row into build/availability.json in the place of an older one of the same fault."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows = [one for one in rows if one["fault"] != row["fault"]] + [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(path)
