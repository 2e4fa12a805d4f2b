"""Fill an empty tree with slapadd: into a copy of the database, which takes the place of the live one in one step.

slapd serves the empty tree while slapadd works, and is stopped only for the exchange of two folders. A run that is
killed at any moment leaves either the empty tree or the full one; `resume` and `clean` put the rest right.
Runs as root on the host of slapd.
"""

from __future__ import annotations

import base64
import ctypes
import fcntl
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from .durable import sync

CONFIG = Path("/etc/ldap/slapd.d")
WORK = Path("/run/hopthu-directory-fill")
"""Holds the copy of slapd's configuration, and while it is there slapd may be stopped."""
USER = "openldap"
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100
# What LDIF reads otherwise than it stands; text that is not ASCII slapadd takes, though RFC 2849 wants base64.
_ODD = (": :", ": <", ":  ", " \n", "\r", "\0")


class FillFailed(Exception):
    """Why the tree could not be filled, as one sentence with the way out."""


def resume() -> None:
    """Start slapd where a killed run has left it stopped."""
    if WORK.exists():
        _start()
        shutil.rmtree(WORK)


def clean(folder: str) -> None:
    """Remove the copy of the database in `folder` that a killed run has left."""
    if os.path.isdir(folder + ".fill"):
        shutil.rmtree(folder + ".fill")


def fill(base: str, loader: str, entries: Iterable[tuple[str, dict[str, list[str]]]]) -> None:
    """Add `entries`, parents first, to the tree below `base` in the name of `loader`; raises FillFailed.

    slapadd checks neither uniqueness nor references: `entries` must be right.
    """
    _prepare(WORK)
    try:
        config = _run(["/usr/sbin/slapcat", "-F", str(CONFIG), "-n", "0", "-o", "ldif-wrap=no"])
        folder = _database(config, base)
        copy = Path(folder + ".fill")
        clean(folder)
        _prepare(copy)
        _run(["/usr/sbin/slapadd", "-n", "0", "-F", str(WORK)], config.replace(f": {folder}\n", f": {copy}\n"), USER)
        fixed = _dump(base)
        _load(base, _server_id(config), fixed, loader, entries)
        for path in (copy / "data.mdb", copy):
            sync(path)  # slapadd -q leaves that to whoever comes after it
        _run(["systemctl", "stop", "slapd.service"])
        try:
            if _unstamped(_dump(base)) != _unstamped(fixed):
                raise FillFailed("somebody wrote to the directory meanwhile: run again")
            _exchange(folder, str(copy))
        finally:
            _start()
        shutil.rmtree(copy)
    finally:
        shutil.rmtree(WORK)


def _start() -> None:
    try:
        _run(["systemctl", "start", "slapd.service"])
    except FillFailed:
        raise FillFailed("slapd does not start: see journalctl -u slapd.service, mend it and run again") from None


def _prepare(folder: Path) -> None:
    """Make an empty folder of slapd's user."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700)
    shutil.chown(folder, USER, USER)


def _database(config: str, base: str) -> str:
    """Return the folder of the database that holds `base`."""
    for entry in config.split("\n\n"):
        found = re.search(r"^olcDbDirectory: (.*)$", entry, re.MULTILINE)
        if found and re.search(rf"^olcSuffix: {re.escape(base)}$", entry, re.MULTILINE | re.IGNORECASE):
            return found[1]
    raise FillFailed(f"slapd has no database for {base}: run the openldap role first")


def _server_id(config: str) -> str:
    found = re.search(r"^olcServerID: (\S+)", config, re.MULTILINE)
    return str(int(found[1], 0)) if found else "0"


def _dump(base: str) -> str:
    """Return what the live database holds; slapd may run."""
    return _run(["/usr/sbin/slapcat", "-F", str(CONFIG), "-b", base, "-o", "ldif-wrap=no"])


def _unstamped(dump: str) -> str:
    """Return a dump without the mark that slapd sets when it stops."""
    return re.sub(r"^contextCSN: .*\n", "", dump, flags=re.MULTILINE)


def _load(base: str, sid: str, fixed: str, loader: str, entries: Iterable[tuple[str, dict[str, list[str]]]]) -> None:
    command = ["/usr/sbin/slapadd", "-F", str(WORK), "-b", base, "-q", "-w", "-S", sid]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **_as(USER)
    ) as process:
        assert process.stdin is not None and process.stderr is not None
        fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, 2**20)  # so that both work at the same time
        try:
            process.stdin.write(fixed)
            _write(process.stdin, loader, entries)
            process.stdin.close()
        except BrokenPipeError:
            pass  # its own words follow
        said = process.stderr.read()
    if process.returncode:
        raise FillFailed(f"slapadd refuses the new tree, nothing was changed: {_last(said)}")


def _write(target: IO[str], loader: str, entries: Iterable[tuple[str, dict[str, list[str]]]]) -> None:
    """Write entries as LDIF (RFC 2849) in portions."""
    names = f"creatorsName: {loader}\nmodifiersName: {loader}\n\n"
    portion: list[str] = []
    for dn, attributes in entries:
        # A certificate comes as base64 already.
        text = "".join(
            [
                f"{name}:: {value}\n" if name.endswith(";binary") else f"{name}: {value}\n"
                for name, values in attributes.items()
                for value in values
            ]
        )
        if any(odd in text for odd in _ODD) or text.count("\n") != sum(map(len, attributes.values())):
            text = "".join(
                f"{name}:: {value if name.endswith(';binary') else base64.b64encode(value.encode()).decode()}\n"
                for name, values in attributes.items()
                for value in values
            )
        portion.append(f"dn: {dn}\n{text}{names}")
        if len(portion) == 500:
            target.write("".join(portion))
            portion.clear()
    target.write("".join(portion))


def _exchange(one: str, other: str) -> None:
    """Let two folders take each other's name, which no crash can tear apart."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, one.encode(), _AT_FDCWD, other.encode(), _EXCHANGE):
        raise FillFailed(
            f"{one} and {other} cannot be exchanged, nothing was changed: {os.strerror(ctypes.get_errno())}"
        )
    sync(Path(one).parent)


def _as(user: str) -> dict[str, Any]:
    """Return the arguments with which subprocess runs a program as `user` with all its groups."""
    return {"user": user, "group": user, "extra_groups": os.getgrouplist(user, pwd.getpwnam(user).pw_gid), "cwd": "/"}


def _run(command: list[str], stdin: str | None = None, user: str | None = None) -> str:
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, input=stdin, capture_output=True, text=True, **(_as(user) if user else {})
    )
    if done.returncode:
        raise FillFailed(f"{' '.join(command[:2])} failed, nothing was changed: {_last(done.stderr)}")
    return done.stdout


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["without a word"])[-1]
