"""A host's own files out of its snapshot: certificates, keys, the state of its daemons."""

from __future__ import annotations

import filecmp
import grp
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mail_backup.pick import Refused, shown
from mail_backup.restic import Restic, Snapshot

_USERS = ("passwd", "group", "shadow", "gshadow", "subuid", "subgid")
LEFT = frozenset(
    f"/etc/{name}"
    for name in (*_USERS, *(f"{name}-" for name in _USERS), "machine-id", "hostname", "hosts", "resolv.conf", "fstab")
)
"""What a host that was made anew has of its own: other numbers of users, other disks. Only brought back by name."""
LEFT_BELOW = ("/etc/ldap/slapd.d/", "/etc/network/", "/etc/systemd/network/")
"""Folders of which that is true; slapd's configuration comes from the openldap role."""


def is_left(path: str, only: str) -> bool:
    """Tell whether a file stays as this host has it; `only` is the path that was asked for."""
    return not only and (path in LEFT or path.startswith(LEFT_BELOW))


def nodes(restic: Restic, snapshot: Snapshot, only: str = "") -> list[dict[str, Any]]:
    """Return what a snapshot has at the path `only` and below ("" for all), as restic's nodes; raises Refused."""
    top = only.rstrip("/") + "/"
    found = [one for one in restic.files(snapshot.id) if (one["path"] + "/").startswith(top)]
    if not any(one["type"] == "file" for one in found):
        raise Refused(f"The snapshot of {snapshot.host} of {shown(snapshot.time)} has no files at {only or '/'}")
    return found


def differing(found: Iterable[Mapping[str, Any]], scratch: Path, root: Path = Path("/")) -> list[str]:
    """Return the paths of files that are not on this host as they are in `scratch`."""
    paths = [one["path"] for one in found if one["type"] in ("file", "symlink")]
    return [path for path in paths if not _same(scratch / path.lstrip("/"), root / path.lstrip("/"))]


def _same(one: Path, other: Path) -> bool:
    if not os.path.lexists(other):
        return False
    if one.is_symlink() or other.is_symlink():
        return one.is_symlink() and other.is_symlink() and os.readlink(one) == os.readlink(other)
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def put(found: Sequence[Mapping[str, Any]], paths: Iterable[str], scratch: Path, units: Sequence[str]) -> None:
    """Put files of a snapshot in their places, `units` being stopped meanwhile; each whole or not at all.

    Owners are found by name: a host that was made anew has given them other numbers. Raises Refused for a name that it
    does not know yet, before anything is changed.
    """
    chosen = set(paths)
    wanted = [one for one in found if one["path"] in chosen]
    folders = [
        one for one in found if one["type"] == "dir" and any(path.startswith(one["path"] + "/") for path in chosen)
    ]
    owners = {one["path"]: owner(one) for one in [*folders, *wanted]}
    for unit in units:
        subprocess.run(["systemctl", "stop", unit], check=True)
    try:
        for one in folders:
            path = Path(one["path"])
            if not path.is_dir():
                path.mkdir()
                os.chown(path, *owners[one["path"]])
                path.chmod(stat.S_IMODE(one["mode"]))
        for one in wanted:
            path = Path(one["path"])
            new = path.with_name(f".{path.name}.restore")
            new.unlink(missing_ok=True)
            shutil.copy2(scratch / one["path"].lstrip("/"), new, follow_symlinks=False)
            os.chown(new, *owners[one["path"]], follow_symlinks=False)
            os.replace(new, path)
    finally:
        for unit in reversed(units):
            subprocess.run(["systemctl", "start", unit], check=True)


def owner(node: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of a node's owner and group on this host."""
    try:
        user = pwd.getpwnam(node["user"]).pw_uid if node.get("user") else node["uid"]
        group = grp.getgrnam(node["group"]).gr_gid if node.get("group") else node["gid"]
    except KeyError as error:
        raise Refused(
            f"{node['path']} belongs to {error.args[0]}, which this host does not know: run playbooks/site.yml first"
        ) from None
    return user, group
