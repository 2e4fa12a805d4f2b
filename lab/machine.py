"""What this machine offers to a lab: packages, limits, runtime, Debian mirror, resolvers."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path

import dns.exception
import dns.message
import dns.query
import dns.rdatatype

PACKAGES = (
    "podman",
    "runc",
    "netavark",
    "aardvark-dns",
    "iptables",
    "iproute2",
    "mmdebstrap",
    "debian-archive-keyring",
    "openssh-client",
    "openssl",
)
FREE_DISK_BYTES = 6 * 1024**3
NOFILE_CAP = 1048576
NPROC_CAP = 30000

log = logging.getLogger("lab")


class LabError(Exception):
    """One sentence for the operator: what is wrong and the way out; `log` says more, if given."""

    def __init__(self, sentence: str, log: Path | None = None) -> None:
        super().__init__(sentence)
        self.log = log


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Print one progress line for the block: its title and the seconds it took."""
    started = time.monotonic()
    log.info("== %s", title)
    print(f"{title:<44}", end=" ", flush=True)
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{time.monotonic() - started:6.1f} s", flush=True)


@contextmanager
def locked(path: Path, waiting_for: str) -> Iterator[None]:
    """Hold an exclusive lock on `path` for the block; say whom it waits for when it has to wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for {waiting_for}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def attempt(
    command: Sequence[str | Path], *, stdin: bytes = b"", timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run a command, log it with its output (never its input), return it whatever its exit code.

    `timeout` is in seconds; a command that exceeds it raises LabError.
    """
    words = [str(word) for word in command]
    log.info("$ %s", " ".join(words))
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, timeout=timeout)
    except FileNotFoundError as error:
        raise LabError(f"The command {words[0]} is not installed on this machine.") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{' '.join(words[:3])} … did not end within {timeout:.0f} s.") from error
    out, err = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
    log.info("exit %d\n%s%s", done.returncode, out, err)
    return subprocess.CompletedProcess(words, done.returncode, out, err)


def run(command: Sequence[str | Path], failure: str, *, stdin: bytes = b"", timeout: float = 600) -> str:
    """Run a command and return its standard output; LabError `failure: last line` when it fails."""
    done = attempt(command, stdin=stdin, timeout=timeout)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LabError(f"{failure}: {lines[-1].strip()}")
    return done.stdout


def check_system(disk_of: Sequence[Path]) -> None:
    """Refuse a machine that cannot hold a lab: not root, or less than 6 GiB free."""
    if os.geteuid() != 0:
        raise LabError("The lab makes containers with networks of their own: run it as root.")
    for path in disk_of:
        while not path.exists():
            path = path.parent
        free = shutil.disk_usage(path).free
        if free < FREE_DISK_BYTES:
            raise LabError(
                f"{path} has {free / 1024**3:.1f} GiB free and the lab needs 6 GiB: free some"
                " space, or set HOPTHU_CACHE to a folder on another disk."
            )
    release = dict(
        line.partition("=")[::2] for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    )
    system = f"{release.get('ID', '')} {release.get('VERSION_ID', '')}".replace('"', "")
    if system not in ("debian 12", "debian 13"):
        print(f"note: the lab is tested on Debian 12 and 13, not on {system}", flush=True)


def install_packages() -> None:
    """Install what is missing of PACKAGES."""
    listed = attempt(["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *PACKAGES])
    missing = [name for name in PACKAGES if f"{name} installed" not in listed.stdout.splitlines()]
    if not missing:
        return
    failure = f"The Debian packages {' '.join(missing)} could not be installed"
    run(["apt-get", "update"], failure)
    apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y"]
    run([*apt, "--no-install-recommends", *missing], failure)


def open_files_limit() -> int:
    """How many open files a host may have: the hard limit of this process, at most 1048576."""
    return _capped(resource.RLIMIT_NOFILE, NOFILE_CAP)


def process_limits() -> Iterator[int]:
    """Process limits worth trying for a host, the best first.

    The kernel may refuse the hard limit itself when this machine's root lacks CAP_SYS_RESOURCE.
    """
    limit = _capped(resource.RLIMIT_NPROC, NPROC_CAP)
    while limit >= 1000:
        yield limit
        limit //= 2


def _capped(kind: int, cap: int) -> int:
    hard = resource.getrlimit(kind)[1]
    return cap if hard == resource.RLIM_INFINITY else min(hard, cap)


def runtime() -> str:
    """The OCI runtime to use: crun refuses the hybrid cgroup layout, runc takes every layout."""
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    return "crun" if unified and shutil.which("crun") else "runc"


def debian_mirrors() -> tuple[str, str | None]:
    """The archive and security URIs (http or https) that this machine's own apt uses.

    HOPTHU_DEBIAN_MIRROR names the archive where apt's configuration has none.
    """
    query = ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)"]
    found: dict[str, str] = {}
    for refresh in (False, True):
        if refresh:
            run(["apt-get", "update"], "This machine's package lists could not be read")
        for line in attempt([*query, "Created-By: Packages"]).stdout.splitlines():
            origin, label, uri = line.split("|", 2)
            if origin == "Debian" and uri.startswith(("http://", "https://")):
                found.setdefault(label, uri.rstrip("/"))
        if "Debian" in found:
            break
    mirror = os.environ.get("HOPTHU_DEBIAN_MIRROR") or found.get("Debian")
    if not mirror:
        raise LabError(
            "This machine's apt configuration names no Debian archive over http or https:"
            " set HOPTHU_DEBIAN_MIRROR to the address of one."
        )
    return mirror, found.get("Debian-Security")


def resolvers() -> list[str]:
    """Addresses of this machine's name servers as hosts can reach them, so no loopback ones.

    HOPTHU_LAB_RESOLVERS (addresses separated by spaces) wins.
    """
    chosen = os.environ.get("HOPTHU_LAB_RESOLVERS", "").split()
    for file in ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"):
        if not chosen and Path(file).exists():
            for line in Path(file).read_text(encoding="utf-8").splitlines():
                words = line.split()
                if len(words) > 1 and words[0] == "nameserver" and "%" not in words[1]:
                    chosen.append(words[1])
            chosen = [address for address in chosen if not ip_address(address).is_loopback]
    for address in chosen:
        try:
            ip_address(address)
        except ValueError as error:
            raise LabError(f"HOPTHU_LAB_RESOLVERS: {address} is not an IP address.") from error
    if not chosen:
        raise LabError(
            "This machine has no name server beyond loopback: set HOPTHU_LAB_RESOLVERS to the"
            " address of one that the lab's hosts can reach."
        )
    return chosen


def resolvers_validate(addresses: Sequence[str]) -> bool:
    """Whether all these name servers hand on DNSSEC: the root's signed keys, in answer to a question for them."""
    question = dns.message.make_query(".", "DNSKEY", want_dnssec=True)
    for address in addresses:
        try:
            answer, _ = dns.query.udp_with_fallback(question, address, timeout=5)
        except (OSError, dns.exception.DNSException):
            return False
        if not any(rrset.rdtype == dns.rdatatype.RRSIG for rrset in answer.answer):
            return False
    return True


def clash(subnet: IPv4Network | IPv6Network) -> str | None:
    """What on this machine already uses a part of `subnet`, in words; None when it is free."""
    for network in json.loads(run(["podman", "network", "ls", "--format", "json"], "podman")):
        for entry in network.get("subnets") or []:
            other = ip_network(entry["subnet"])
            if other.version == subnet.version and subnet.overlaps(other):
                return f"{other} of the podman network {network['name']}"
    command = ["ip", "-j", f"-{subnet.version}", "route", "show", "table", "all"]
    for route in json.loads(run(command, "The routes of this machine could not be read") or "[]"):
        if route["dst"] == "default":
            continue
        other = ip_network(route["dst"], strict=False)
        if subnet.overlaps(other):
            return f"{other} on the interface {route.get('dev', '?')}"
    return None
