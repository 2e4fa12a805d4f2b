"""The hosts of a lab: their network, base image and podman containers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import machine
from machine import LabError

SUITE = "trixie"
# What a freshly installed Debian server has, plus what Ansible needs to manage it.
BASE_PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "python3",
    "python3-apt",
    "iproute2",
    "openssh-server",
    "ca-certificates",
    "nftables",
)
# Podman mounts a file of its own over /etc/hostname, which makes `hostnamectl` fail.
INIT = json.dumps(["/bin/sh", "-c", "umount /etc/hostname; exec /sbin/init"])
NUMBERS = {"lab": 61, "test": 62}


@dataclass(frozen=True)
class Lab:
    """A lab by name: everything it owns on this machine is named after it."""

    name: str
    checkout: Path

    @property
    def build(self) -> Path:
        """Folder of everything generated for this lab."""
        return self.checkout / "build" / self.name

    @property
    def result(self) -> Path:
        """The lab.json that scripts outside read."""
        return (self.build.parent if self.name == "lab" else self.build) / "lab.json"

    @property
    def inventory(self) -> Path:
        """The generated inventory file."""
        return self.build / "inventory" / "hosts.yml"

    @property
    def network(self) -> str:
        """Name of the podman network; the images and containers are named after it too."""
        return f"hopthu-{self.name}"

    def container(self, host: str) -> str:
        """Name of the container of `host`."""
        return f"{self.network}-{host}"

    @property
    def command(self) -> str:
        """How the operator calls this program for this lab."""
        return f".venv/bin/python lab/lab.py --name {self.name}"

    def playbook(self, inventory: Path, path: Path, *arguments: str | Path) -> list[str | Path]:
        """The command that runs the playbook `path` with an inventory of this lab."""
        environment = [f"ANSIBLE_CONFIG={self.checkout / 'ansible.cfg'}", "LC_ALL=C.UTF-8"]
        ansible = Path(sys.executable).parent / "ansible-playbook"
        return ["env", *environment, ansible, "-i", inventory, *arguments, path]


@dataclass(frozen=True)
class Subnets:
    """The two networks of a lab; the province's hosts are numbered from .11 and ::11 on, the outside one has .10.

    An address that moves between two hosts is .9 and ::9.
    """

    v4: IPv4Network
    v6: IPv6Network

    @property
    def gateway(self) -> list[str]:
        """IPv4 and IPv6 address of this machine in the lab's network."""
        return [str(self.v4[1]), str(self.v6[1])]

    def addresses(self, index: int) -> list[str]:
        """IPv4 and IPv6 address of host number `index` (from 0), written alike: .11 and ::11.

        -1 is the host outside, -2 the address that moves.
        """
        return [str(self.v4[11 + index]), str(self.v6[int(str(11 + index), 16)])]


def podman(*arguments: str | Path, failure: str, stdin: bytes = b"") -> str:
    """Run podman with this machine's runtime; LabError `failure: …` when it fails."""
    return machine.run(_podman(*arguments), failure, stdin=stdin)


def _podman(*arguments: str | Path) -> list[str | Path]:
    return ["podman", "--runtime", machine.runtime(), *arguments]


def cache_folder() -> Path:
    """Folder of downloaded packages and base images, shared by all labs, kept when they go."""
    return Path(os.environ.get("HOPTHU_CACHE") or "/var/cache/hopthu").absolute()


def cache_bytes() -> int:
    """Size of the package cache in bytes; a file linked into several folders counts once."""
    files = {}
    for path in cache_folder().rglob("*"):
        if path.is_file():
            status = path.stat()
            files[status.st_ino] = status.st_size
    return sum(files.values())


# --- network ---------------------------------------------------------------------------------


def existing_network(lab: Lab) -> tuple[Subnets, str] | None:
    """Subnets and province of the lab's network; None when there is none.

    LabError when it belongs to the lab of another checkout that still exists.
    """
    done = machine.attempt(["podman", "network", "inspect", lab.network])
    if done.returncode:
        return None
    network = json.loads(done.stdout)[0]
    labels = network.get("labels") or {}
    owner = Path(labels.get("hopthu.checkout", ""))
    if owner != lab.checkout and (owner / "build" / lab.name).exists():
        raise LabError(
            f"A lab named {lab.name} runs from {owner or 'elsewhere'}: take it down there, or choose another --name."
        )
    found = [entry["subnet"] for entry in network["subnets"]]
    v4 = next(IPv4Network(subnet) for subnet in found if ":" not in subnet)
    v6 = next(IPv6Network(subnet) for subnet in found if ":" in subnet)
    return Subnets(v4, v6), labels.get("hopthu.province", "")


def ensure_network(lab: Lab, province: str) -> Subnets:
    """Make the lab's network when it is missing, on free subnets, and return them."""
    wanted = _wanted_subnets(lab)
    existing = existing_network(lab)
    if existing is not None:
        subnets, runs = existing
        if runs != province:
            raise LabError(
                f"The lab {lab.name} runs the province {runs}, not {province}: take it down first ({lab.command} down)."
            )
        if wanted != subnets and {"HOPTHU_LAB_SUBNET4", "HOPTHU_LAB_SUBNET6"} & set(os.environ):
            raise LabError(
                f"The lab {lab.name} runs on {subnets.v4} and {subnets.v6}: take it down first"
                f" ({lab.command} down) to move it to {wanted.v4} and {wanted.v6}."
            )
        return subnets
    for subnet in (wanted.v4, wanted.v6):
        other = machine.clash(subnet)
        if other:
            raise LabError(
                f"The lab's network {subnet} overlaps {other}: set HOPTHU_LAB_SUBNET{subnet.version} to a free one."
            )
    labels = {"hopthu.checkout": str(lab.checkout), "hopthu.province": province}
    podman(
        *("network", "create", "--driver", "bridge", "--disable-dns", "--ipv6"),
        *("--subnet", str(wanted.v4), "--subnet", str(wanted.v6)),
        *(f"--label={key}={value}" for key, value in labels.items()),
        lab.network,
        failure=f"The network {lab.network} could not be made",
    )
    return wanted


def _wanted_subnets(lab: Lab) -> Subnets:
    number = NUMBERS.get(lab.name, 64 + zlib.crc32(lab.name.encode()) % 128)
    v4 = os.environ.get("HOPTHU_LAB_SUBNET4", f"172.29.{number}.0/24")
    v6 = os.environ.get("HOPTHU_LAB_SUBNET6", f"fd61:6d61:696c:{number}::/64")
    try:
        subnets = Subnets(IPv4Network(v4), IPv6Network(v6))
    except ValueError as error:
        raise LabError(
            f"HOPTHU_LAB_SUBNET4/6: {error} (write them like 172.29.70.0/24 and fd61:6d61:696c:70::/64)."
        ) from error
    if subnets.v4.prefixlen > 26 or subnets.v6.prefixlen > 64:
        raise LabError(f"HOPTHU_LAB_SUBNET4/6: {v4} and {v6} must be at least a /26 and a /64 network.")
    return subnets


# --- base image ------------------------------------------------------------------------------


def ensure_image(lab: Lab) -> str:
    """Id or name of the lab's base image, a fresh Debian 13 host; made when it is missing.

    Its archive comes from the cache when the recipe and the week are those of the last build.
    """
    only = f"label=hopthu.lab={lab.name}"
    existing = podman("images", "--filter", only, "--format", "{{.Id}}", failure="podman").split()
    if existing:
        return existing[0]
    mirror, security = machine.debian_mirrors()
    sources = [f"deb {mirror} {SUITE} main", f"deb {mirror} {SUITE}-updates main"]
    if security:
        sources.append(f"deb {security} {SUITE}-security main")
    ours = lab.checkout / "lab" / "image"
    content = [path.read_text(encoding="utf-8") for path in sorted(ours.rglob("byte_code.p*"))]
    # Compiled, as Python does at its first start: a dry run must find the host as it leaves it.
    brought = [
        f"--customize-hook=copy-in {ours}/usr /",
        '--customize-hook=chroot "$1" python3 -m compileall -q /usr/local/lib',
    ]
    recipe = [
        "--variant=minbase",
        f"--include={','.join(BASE_PACKAGES)}",
        "--skip=cleanup/apt/lists",
        '--aptopt=Acquire::Languages "none"',
        # Each host gets SSH keys of its own.
        '--customize-hook=rm -f "$1"/etc/ssh/ssh_host_*',
    ]
    week = time.strftime("%G-%V", time.gmtime())
    key = hashlib.sha256("\n".join([*recipe, brought[1], *content, *sources, INIT, week]).encode()).hexdigest()[:12]
    image = f"localhost/{lab.network}:{key}"
    tar = cache_folder() / f"base-{key}.tar"
    with machine.locked(cache_folder() / "base.lock", "another lab's base image"):
        if not tar.exists():
            partial = tar.with_suffix(".partial.tar")
            machine.run(
                ["mmdebstrap", *recipe, *brought, SUITE, partial, *sources],
                "The base image could not be built",
                timeout=1800,
            )
            for old in cache_folder().glob("base-*.tar"):
                if old != partial:
                    old.unlink()
            partial.rename(tar)
        podman(
            *(
                "import",
                "--change",
                f"CMD {INIT}",
                "--change",
                f"LABEL hopthu.lab={lab.name}",
                tar,
                image,
            ),
            failure="The base image could not be imported",
        )
    return image


# --- containers ------------------------------------------------------------------------------


def container_state(lab: Lab, host: str) -> str:
    """State of a host's container in podman's words (running, exited …), `missing` without one."""
    command = ["podman", "container", "inspect", "--format", "{{.State.Status}}"]
    done = machine.attempt([*command, lab.container(host)])
    return done.stdout.strip() if done.returncode == 0 else "missing"


def ensure_hosts(lab: Lab, image: str, hosts: dict[str, list[str]], resolvers: Sequence[str]) -> None:
    """Start every host (name → IPv4 and IPv6 address): running ones stay, missing ones are made."""
    key, is_new = _ssh_key(lab)
    options: list[str] = []
    fresh = []
    for host, addresses in hosts.items():
        name = lab.container(host)
        state = container_state(lab, host)
        if state not in ("missing", "running") and not _is_prepared(name):
            podman("rm", "-f", name, failure=f"The half-made {name} could not be removed")
            state = "missing"
        if state == "missing":
            options = options or _limits(image)
            _create(lab, host, addresses, image, options)
            files = _first_files(host, key, resolvers)
            podman("cp", "-", f"{name}:/", stdin=files, failure=f"{name} could not be prepared")
            fresh.append(host)
        if state != "running":
            podman("start", name, failure=f"{name} could not be started")
        if is_new and host not in fresh:
            script = "umask 077; mkdir -p /root/.ssh; cat > /root/.ssh/authorized_keys"
            podman(
                *("exec", "-i", name, "sh", "-c", script),
                stdin=key.encode(),
                failure=f"{name} could not be given the lab's SSH key",
            )
    for host in hosts:
        _await_systemd(lab, host, must_be_whole=host in fresh)
    _write_ssh_files(lab, hosts)
    for host, addresses in hosts.items():
        for address in addresses:
            _await_ssh(lab, host, address)


def _is_prepared(container: str) -> bool:
    """Whether a stopped container got its first files before the run that made it was cut off."""
    command = ["podman", "cp", f"{container}:/root/.ssh/authorized_keys", "-"]
    return machine.attempt(command).returncode == 0


def _limits(image: str) -> list[str]:
    """The --ulimit options that this machine's kernel grants to a container, found by trying."""
    nofile = machine.open_files_limit()
    last = ""
    for nproc in machine.process_limits():
        limits = [f"--ulimit=nofile={nofile}:{nofile}", f"--ulimit=nproc={nproc}:{nproc}"]
        probe = _podman("run", "--rm", "--network", "none", *limits, image, "/bin/true")
        done = machine.attempt(probe)
        if done.returncode == 0:
            return limits
        last = done.stderr.strip().splitlines()[-1]
        if "setrlimit" not in done.stderr:
            break
    raise LabError(f"No container starts on this machine: {last}")


def _create(lab: Lab, host: str, addresses: list[str], image: str, limits: Sequence[str]) -> None:
    archives = _package_cache(lab, host)
    podman(
        *("create", "--name", lab.container(host), "--hostname", host),
        *("--label", f"hopthu.lab={lab.name}"),
        *("--network", lab.network, "--ip", addresses[0], "--ip6", addresses[1]),
        # The host's own roles write /etc/hosts and /etc/resolv.conf.
        *("--no-hosts", "--dns", "none"),
        *("--systemd=always", "--cap-add=SYS_ADMIN,NET_ADMIN,NET_RAW"),
        *("--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined"),
        # /proc/sys is read-only inside: a host that may hold a service address needs these two.
        *("--sysctl", "net.ipv4.ip_nonlocal_bind=1", "--sysctl", "net.ipv6.ip_nonlocal_bind=1"),
        "--shm-size=512m",
        *limits,
        *("--volume", f"{archives}:/var/cache/apt/archives"),
        *_store_disk(lab, host),
        image,
        failure=f"{lab.container(host)} could not be made",
    )


def _store_disk(lab: Lab, host: str) -> list[str]:
    """The option that gives a host a small disk of its own for the mail store; none unless HOPTHU_LAB_STORE_MIB is set.

    With it a test can fill the store's disk and not this machine's.
    """
    size = os.environ.get("HOPTHU_LAB_STORE_MIB")
    if not size:
        return []
    folder, image = lab.build / "disks" / host, lab.build / "disks" / f"{host}.img"
    if folder.is_mount():  # of a host that is no more
        machine.run(["umount", folder], "The store's old disk could not be unmounted")
    folder.mkdir(parents=True, exist_ok=True)
    image.unlink(missing_ok=True)
    machine.run(["truncate", "-s", f"{size}M", image], "The store's disk could not be made")
    # Many small files, and no room kept for root: full is full.
    machine.run(["mkfs.ext4", "-q", "-F", "-m", "0", "-i", "8192", image], "The store's disk could not be made")
    machine.run(["mount", "-o", "loop", image, folder], "The store's disk could not be mounted")
    (folder / "lost+found").rmdir()
    return ["--volume", f"{folder}:/srv/vmail"]


def _package_cache(lab: Lab, host: str) -> Path:
    """The folder of a host's downloaded packages, filled by links with what other hosts have.

    A folder per host: apt locks it while it works.
    """
    own = cache_folder() / "archives" / lab.name / host
    own.mkdir(parents=True, exist_ok=True)
    for package in (cache_folder() / "archives").glob("*/*/*.deb"):
        if not (own / package.name).exists():
            try:
                os.link(package, own / package.name)
            except FileNotFoundError:
                continue  # another host's apt has just replaced it
    return own


def _first_files(host: str, key: str, resolvers: Sequence[str]) -> bytes:
    """A tar of what an installer leaves on a host: names, resolver, SSH access and host keys."""
    texts = {
        "root/.ssh/authorized_keys": (0o600, key),
        "etc/resolv.conf": (0o644, "".join(f"nameserver {address}\n" for address in resolvers)),
        "etc/hostname": (0o644, f"{host}\n"),
        "etc/hosts": (0o644, f"127.0.0.1 localhost\n127.0.1.1 {host}\n::1 localhost\n"),
    }
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "etc/ssh")
        keys.mkdir(parents=True)
        machine.run(["ssh-keygen", "-A", "-f", folder], "No SSH host keys could be made")
        for path in keys.iterdir():
            mode = 0o644 if path.suffix == ".pub" else 0o600
            # The comment names the machine that made the key: name the host instead.
            text = path.read_text(encoding="ascii")
            if path.suffix == ".pub":
                text = " ".join([*text.split()[:2], f"root@{host}\n"])
            texts[f"etc/ssh/{path.name}"] = (mode, text)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        folder_entry = tarfile.TarInfo("root/.ssh")
        folder_entry.type, folder_entry.mode = tarfile.DIRTYPE, 0o700
        tar.addfile(folder_entry)
        for name, (mode, text) in texts.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(text.encode()), mode, time.time()
            tar.addfile(entry, io.BytesIO(text.encode()))
    return stream.getvalue()


def systemd_state(lab: Lab, host: str) -> str:
    """What `systemctl is-system-running` says on a host: running, degraded, starting …"""
    command = _podman("exec", lab.container(host), "systemctl", "is-system-running")
    return machine.attempt(command).stdout.strip() or "unknown"


def _await_systemd(lab: Lab, host: str, *, must_be_whole: bool) -> None:
    deadline = time.monotonic() + 60
    while (state := systemd_state(lab, host)) not in ("running", "degraded"):
        if time.monotonic() > deadline:
            raise LabError(f"systemd on {host} is {state} after 60 s.")
        time.sleep(0.2)
    if must_be_whole and state == "degraded":
        command = _podman("exec", lab.container(host), "systemctl", "--failed", "--plain")
        units = [line.split()[0] for line in machine.attempt(command).stdout.splitlines()[1:2]]
        raise LabError(f"The fresh host {host} has failed units: {' '.join(units)}")


# --- SSH -------------------------------------------------------------------------------------


def _ssh_key(lab: Lab) -> tuple[str, bool]:
    """The lab's public key and whether it was made just now."""
    path = lab.build / "ssh" / "id_ed25519"
    is_new = not path.exists()
    if is_new:
        path.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
        options = ["-q", "-t", "ed25519", "-N", "", "-C", lab.network]
        machine.run(["ssh-keygen", *options, "-f", path], "The lab's SSH key could not be made")
    return path.with_suffix(".pub").read_text(encoding="ascii"), is_new


def _write_ssh_files(lab: Lab, hosts: dict[str, list[str]]) -> None:
    """Write known_hosts from the hosts' own keys, and a configuration for `ssh -F`."""
    folder = lab.build / "ssh"
    known, config = [], []
    for host, addresses in hosts.items():
        script = "cat /etc/ssh/ssh_host_*_key.pub"
        command = ("exec", lab.container(host), "sh", "-c", script)
        keys = podman(*command, failure=f"The SSH host keys of {host} could not be read")
        names = ",".join([host, *addresses])
        known += [f"{names} {' '.join(line.split()[:2])}" for line in keys.splitlines()]
        config += [f"Host {host}", f"  HostName {addresses[0]}", f"  HostKeyAlias {host}"]
    config += [
        "Host *",
        "  User root",
        f'  IdentityFile "{folder}/id_ed25519"',
        "  IdentitiesOnly yes",
        f'  UserKnownHostsFile "{folder}/known_hosts"',
        "  StrictHostKeyChecking yes",
    ]
    (folder / "known_hosts").write_text("\n".join(known) + "\n", encoding="ascii")
    (folder / "config").write_text("\n".join(config) + "\n", encoding="utf-8")


def _await_ssh(lab: Lab, host: str, address: str) -> None:
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", f"HostName={address}"]
    config = str(lab.build / "ssh" / "config")
    command = ["ssh", "-F", config, *options, host, "true"]
    deadline = time.monotonic() + 30
    while (done := machine.attempt(command)).returncode:
        if time.monotonic() > deadline:
            reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
            raise LabError(f"{host} cannot be reached by SSH at {address}: {reason}")
        time.sleep(0.3)


# --- the end ---------------------------------------------------------------------------------


def destroy(lab: Lab) -> None:
    """Remove the lab's containers, network, images and files; the package cache stays."""
    if shutil.which("podman"):
        existing_network(lab)
        only = f"label=hopthu.lab={lab.name}"
        own = podman("ps", "-a", "--filter", only, "--format", "{{.Names}}", failure="podman")
        if own:
            podman("rm", "-f", "-t", "0", *own.split(), failure="The hosts could not be removed")
        if machine.attempt(["podman", "network", "exists", lab.network]).returncode == 0:
            podman("network", "rm", lab.network, failure=f"{lab.network} could not be removed")
        # One that a container of somebody else's was made from stays.
        podman("image", "prune", "-a", "-f", "--filter", only, failure="The base image could not be removed")
    for disk in sorted((lab.build / "disks").glob("*.img")):
        if disk.with_suffix("").is_mount():
            machine.run(["umount", disk.with_suffix("")], "The store's disk could not be unmounted")
    if lab.build.exists():
        shutil.rmtree(lab.build)
    lab.result.unlink(missing_ok=True)
