"""mail-rehearse: prove that the backups can be restored. For root, on the host that holds the service.

A random sample of mailboxes, the whole directory and the files of one host come from the newest snapshots into a
scratch area. Each message is compared, by the hash of its body, with the snapshot's catalogue and with the mailbox that
people use; each entry of the directory with the LDIF that it came from and with the live tree. What differs without a
reason is a fault: an alarm, exit code 1. The result is in rehearsal.json beside status.json.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mail_backup import alarm, directory, hostfiles, status, tree
from mail_backup.catalogue import lines, read
from mail_backup.commands import client
from mail_backup.pick import Message, Refused, identity, shown
from mail_backup.restic import BackupError, Snapshot
from mail_backup.restore import LOOKS, Failed, literal, scratch, see_room
from mail_backup.restoring import LOCK
from mail_backup.settings import Settings, load
from mail_backup.store import look

SAMPLE = 5  # mailboxes
SHOWN = 20  # faults that are kept
EMPTY = 200  # octets of a catalogue that names no message
MARK = frozenset({"contextcsn"})  # of a whole tree: slapadd writes it where there was none


def unlike_catalogue(restored: Iterable[Message], wanted: Iterable[Message]) -> list[str]:
    """Return how a restored mailbox differs from its catalogue: messages that lack, are others, or too many."""
    found, due = {one["file"]: one for one in restored}, {one["file"]: one for one in wanted}
    faults = [f"{name} is in the catalogue and not in the snapshot" for name in sorted(due.keys() - found.keys())]
    faults += [f"{name} is in the snapshot and not in its catalogue" for name in sorted(found.keys() - due.keys())]
    for name in sorted(due.keys() & found.keys()):
        if any(due[name][field] != found[name][field] for field in ("octets", "body")):
            faults.append(f"{name} in the snapshot is not the message that its catalogue names")
    return faults


def unlike_live(
    live: Iterable[Message], saved: Iterable[Message], old: Callable[[Sequence[str]], set[str]]
) -> list[str]:
    """Return the messages of a mailbox that were there when the snapshot began and are not in it.

    `old` tells which of some files were there then. A message that the snapshot has and the mailbox has not was deleted
    since: nothing tells that from a loss, so it is no fault.
    """
    known = {identity(one) for one in saved}
    suspects = [one["file"] for one in live if identity(one) not in known]
    return [f"{name} was in the mailbox before the snapshot and is not in it" for name in sorted(old(suspects))]


def born_before(home: Path, files: Sequence[str], moment: float) -> set[str]:
    """Return which files of a home were made before a moment (seconds since the epoch).

    By their time of birth: a hard link, a flag or a restore leaves it alone. A file system without it tells nothing.
    """
    found = set()
    for start in range(0, len(files), 500):
        some = [str(home / name) for name in files[start : start + 500]]
        asked = subprocess.run(["/usr/bin/stat", "--format=%W %n", "--", *some], capture_output=True, text=True)
        for line in asked.stdout.splitlines():
            born, _space, name = line.partition(" ")
            if born.isdigit() and 0 < int(born) < int(moment):
                found.add(os.path.relpath(name, home))
    return found


class Rehearsal:
    """One rehearsal; `faults` grows, `numbers` are what was compared."""

    def __init__(self, settings: Settings, mailboxes: int, named: Sequence[str] = ()) -> None:
        """`named`: ids of mailboxes that are in the sample in any case."""
        self.settings, self.mailboxes, self.named = settings, mailboxes, list(named)
        self.restic = client(settings)
        self.faults: list[str] = []
        self.numbers: dict[str, Any] = {}

    def run(self) -> None:
        """Rehearse everything; a part that cannot be done is a fault and does not end the others."""
        parts: list[tuple[str, Callable[[Path], None]]] = [("host", self.host)]
        if self.settings.base_dn:
            parts.insert(0, ("directory", self.directory))
        if self.settings.mail_root:
            parts.insert(0, ("mail", self.mail))
        for name, part in parts:
            try:
                with scratch(Path(self.settings.mail_root or self.settings.state), f"rehearse-{name}") as folder:
                    part(folder)
            except (BackupError, Refused, Failed, directory.Stopped, OSError, ValueError, KeyError) as error:
                self.faults.append(f"{name}: {error}")

    # --- mail

    def mail(self, folder: Path) -> None:
        """Restore some mailboxes and compare each message twice."""
        snapshot = self.restic.snapshot("mail", self.settings.domain)
        with self.restic.dump(snapshot.id, "/manifest.json") as stream:
            manifest = json.loads(stream.read())
        began = datetime.fromisoformat(manifest["started"]).timestamp()
        nodes = self.restic.files(snapshot.id, "/catalogue", recursive=False)
        sizes = {one["name"].removesuffix(".jsonl"): one["size"] for one in nodes if one["name"].endswith(".jsonl")}
        if len(sizes) != manifest["mailboxes"]:
            self.faults.append(f"mail: the snapshot has {len(sizes)} mailboxes and should have {manifest['mailboxes']}")
        sample = self.sample(sizes)
        # One restic for all: each takes a second to find its way in the repository.
        self.restic.restore(snapshot.id, folder, include=[literal(f"/catalogue/{name}.jsonl") for name in sample])
        catalogues = {name: read(folder / "catalogue" / f"{name}.jsonl")[1] for name in sample}
        octets = sum(one["octets"] for saved in catalogues.values() for one in saved)
        see_room(folder, octets)
        self.restic.restore(snapshot.id, folder, include=[literal(f"/mailboxes/{name}") for name in sample])
        messages = gone = 0
        for name, saved in catalogues.items():
            home = folder / "mailboxes" / name
            faults = unlike_catalogue(lines(home, look(home), {}), saved)
            unlike, deleted = self.live(name, saved, began)
            self.faults += [f"mail of {name}: {fault}" for fault in faults + unlike]
            messages, gone = messages + len(saved), gone + deleted
        self.numbers |= {"mailboxes": len(sample), "messages": messages, "octets": octets, "deleted_since": gone}
        self.numbers["mail_snapshot"] = shown(snapshot.time)

    def sample(self, sizes: Mapping[str, int]) -> list[str]:
        """Return the mailboxes to restore: those that are named, then random ones, first such as hold messages."""
        unknown = [name for name in self.named if name not in sizes]
        if unknown:
            raise Refused(f"The newest snapshot has no mailbox {unknown[0]}")
        rest = sorted(sizes.keys() - set(self.named), key=lambda name: (sizes[name] <= EMPTY, random.random()))
        return [*self.named, *rest[: max(0, self.mailboxes - len(self.named))]]

    def live(self, name: str, saved: Sequence[Message], began: float) -> tuple[list[str], int]:
        """Compare a snapshot's mailbox with the one in the store; return the faults and how many were deleted since."""
        home = Path(self.settings.mail_root) / name
        if not home.is_dir():  # purged since
            return [], len(saved)
        for _look in range(LOOKS):
            try:
                now = list(lines(home, look(home, messages_only=True), {}))
                break
            except FileNotFoundError:  # renamed meanwhile
                continue
        else:
            return ["is being worked on all the time and cannot be compared"], 0
        there = {identity(one) for one in now}
        faults = unlike_live(now, saved, lambda files: born_before(home, files, began))
        return faults, sum(identity(one) not in there for one in saved)

    # --- directory

    def directory(self, folder: Path) -> None:
        """Load the whole directory into a slapd database of its own, and compare what comes out entry by entry."""
        base, snapshot = self.settings.base_dn, self.restic.snapshot("directory", self.settings.domain)
        data, config, manifest = (
            self._read(snapshot, f"/directory/{name}") for name in ("data.ldif", "config.ldif", "manifest.json")
        )
        saved = tree.tree(tree.parse(data.splitlines()))
        promised = json.loads(manifest)["entries"]["data"]
        if len(saved) != promised:
            self.faults.append(f"directory: the snapshot has {len(saved)} entries and should have {promised}")
        directory.load(directory.unfolded(config), base, data, folder / "config", folder / "database", None)
        loaded = tree.tree(tree.parse(directory.slapcat("-b", base, config=folder / "config").splitlines()))
        for dn in sorted(saved.keys() | loaded.keys()):
            if dn not in loaded or dn not in saved or tree.plain(saved[dn][1], MARK) != tree.plain(loaded[dn][1], MARK):
                self.faults.append(f"directory: {dn} does not come out as it went in")
        live = tree.tree(tree.parse(directory.slapcat("-b", base).splitlines()))
        # The LDIF was whole at this time, and begun some seconds before.
        taken = datetime.fromisoformat(json.loads(manifest)["taken"]).astimezone(UTC) - timedelta(minutes=1)
        self.faults += [f"directory: {fault}" for fault in tree.unlike(saved, live, f"{taken:%Y%m%d%H%M%S}Z")]
        self.numbers |= {"entries": len(loaded), "directory_snapshot": shown(snapshot.time)}

    def _read(self, snapshot: Snapshot, path: str) -> str:
        with self.restic.dump(snapshot.id, path) as stream:
            return stream.read().decode()

    # --- a host's files

    def host(self, folder: Path) -> None:
        """Restore the files of one host, any of those that have a snapshot; compare those of this host."""
        names = sorted({one.host for one in self.restic.snapshots("host")})
        name = random.choice(names) if names else self.settings.host
        snapshot = self.restic.snapshot("host", name)
        found = hostfiles.nodes(self.restic, snapshot)
        see_room(folder, sum(one.get("size", 0) for one in found))
        self.restic.restore(snapshot.id, folder)
        for one in found:
            path = folder / one["path"].lstrip("/")
            if not os.path.lexists(path) or (one["type"] == "file" and path.stat().st_size != one["size"]):
                self.faults.append(f"host {name}: {one['path']} does not come out of the snapshot")
        if name == self.settings.host:
            for path in hostfiles.differing(found, folder):
                there, then = Path(path), folder / path.lstrip("/")
                if there.is_file() and there.stat().st_mtime_ns == then.stat().st_mtime_ns:
                    self.faults.append(f"host {name}: {path} is unchanged and another in the snapshot")
        self.numbers |= {"host": name, "files": sum(one["type"] == "file" for one in found)}
        self.numbers["host_snapshot"] = shown(snapshot.time)


def main() -> int:
    """Entry point: 0 all was as it should be, 1 it was not, 2 refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mailboxes", type=int, default=SAMPLE, help=f"size of the sample ({SAMPLE})")
    parser.add_argument("--sandboxed", action="store_true", help="leave alarms to whoever runs this: it may raise none")
    parser.add_argument("--mailbox", action="append", default=[], metavar="ID", help="one that is in it in any case")
    given = parser.parse_args()
    settings = load()
    os.umask(0o077)
    with LOCK.open("a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Refused: another restore or rehearsal is at work on this host, wait for it.", file=sys.stderr)
            return 2
        code = tell(settings, given.mailboxes, given.mailbox)
    if not given.sandboxed:
        alarm.raise_all(settings.state)
    return code


def tell(settings: Settings, mailboxes: int, named: Sequence[str]) -> int:
    """Rehearse, and publish what came of it."""
    began = time.time()
    rehearsal = Rehearsal(settings, mailboxes, named)
    rehearsal.run()
    faults = rehearsal.faults
    entry = {"ok": int(not faults), "faults": len(faults), "started": round(began), "ended": round(time.time())}
    entry |= {"seconds": round(time.time() - began, 1), **rehearsal.numbers}
    entry |= {} if faults else {"good": round(began)}
    status.note(settings.state, "rehearsal", entry)
    told = json.dumps(entry | {"host_name": settings.host, "list": faults[:SHOWN]}, ensure_ascii=False)
    path = Path(settings.state, "rehearsal.json")
    new = path.with_suffix(".new")
    new.write_text(told + "\n", encoding="utf-8")
    new.chmod(0o600)
    os.replace(new, path)
    print(told)
    if faults:
        text = f"The rehearsal of a restore found {len(faults)} faults, such as: {faults[0]}. All are in {path}"
        alarm.lay(settings.state, "rehearsal", text)
    return int(bool(faults))
