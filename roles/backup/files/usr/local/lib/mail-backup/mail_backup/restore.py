"""Messages, folders and mailboxes out of a snapshot, into the mailboxes that people use.

They come from the repository as a Maildir in a folder of the store's own file system, and from there in by `doveadm
import`, one command for each mailbox: Dovecot gives them new UIDs, so that a later `doveadm sync -f` takes them for new
mail, and makes hard links, so that 4,000 messages take half a second and no second copy. Flags, keywords, times of
arrival and GUIDs stay.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mail_backup.catalogue import folder_name, lines
from mail_backup.pick import Message, Refused, lacking, shown
from mail_backup.restic import Restic, Snapshot
from mail_backup.store import MESSAGES, look

SCRATCH = ".restore"
"""Folder below the store for what is on its way: the same file system. Whatever walks the store leaves it out."""
RESERVE = 0.05
"""Share of the store's file system that a restore leaves free."""
FEW = 200
"""So many messages are fetched one by one; of more, the whole mailbox is, and what is not wanted is left out here."""
WORKERS = 3
"""Mailboxes that are brought in at the same time."""
LOOKS = 12
"""Attempts to read a mailbox that is being worked on."""
KEPT = ("dovecot-keywords", "dovecot-uidlist", "maildirfolder")
"""What else of a folder is needed: the names of its keywords, and GUIDs that are not the names of the files."""
SYNC = Path("/usr/local/sbin/mail-sync")


class Failed(Exception):
    """What did not come back although it should have, as one sentence. What came back before stays."""


@dataclass(frozen=True)
class Mailbox:
    """A mailbox that receives mail now."""

    address: str
    home: Path

    @property
    def id(self) -> str:
        """What the store and the snapshots call it."""
        return self.home.name


@dataclass(frozen=True)
class Job:
    """What one mailbox gets."""

    box: Mailbox
    wanted: Sequence[Message]
    lacking: Sequence[Message]
    whole: bool
    """The snapshot's whole mailbox is wanted: what is no message comes too."""

    @property
    def octets(self) -> int:
        """Size of what is lacking."""
        return sum(one["octets"] for one in self.lacking)


def doveadm(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run doveadm; names of folders are UTF-8."""
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    return subprocess.run(
        ["doveadm", *arguments], input=stdin, capture_output=True, text=True, errors="replace", env=environment
    )


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["without a word"])[-1]


def mailbox(address: str, root: Path) -> Mailbox:
    """Return the mailbox of an address; raises Refused when nobody receives mail under it."""
    done = doveadm("user", "-f", "home", address.lower())
    home = Path(done.stdout.strip())
    if done.returncode == 67 or (done.returncode == 0 and not done.stdout.strip()):
        raise Refused(f"There is no mailbox {address} that receives mail here: `doveadm user '*'` lists those that do")
    if done.returncode:
        raise Refused(f"Dovecot does not say where the mailbox {address} is ({_last(done.stderr)}): see that it runs")
    if home.parent != root:
        raise Refused(f"The mailbox {address} is in {home} and not in {root}: no backup holds it")
    return Mailbox(address.lower(), home)


# --- what a snapshot has -----------------------------------------------------------------------------------------


def catalogue(restic: Restic, snapshot: Snapshot, identity: str) -> tuple[dict[str, Any], list[Message]]:
    """Return the head of a mailbox's catalogue in a snapshot and its messages; raises Refused when it has none."""
    path = f"/catalogue/{identity}.jsonl"
    if not any(node["path"] == path for node in restic.files(snapshot.id, "/catalogue", recursive=False)):
        raise Refused(f"The snapshot of {shown(snapshot.time)} has no mailbox {identity}: choose another time")
    with restic.dump(snapshot.id, path) as stream:
        return read_catalogue(stream.read())


def catalogues(restic: Restic, snapshot: Snapshot) -> Iterator[tuple[dict[str, Any], list[Message]]]:
    """Yield head and messages of every catalogue of a snapshot, one after the other, by one restic."""
    with restic.dump(snapshot.id, "/catalogue") as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() and member.name.endswith(".jsonl") else None
            if content:
                yield read_catalogue(content.read())
        while stream.read(1 << 20):  # restic would end with a broken pipe
            pass


def read_catalogue(content: bytes) -> tuple[dict[str, Any], list[Message]]:
    """Return head and messages of a catalogue file."""
    lines = [json.loads(line) for line in io.BytesIO(content)]
    return lines[0], lines[1:]


# --- what a mailbox has ------------------------------------------------------------------------------------------


def present(box: Mailbox, known: Sequence[Message], below: str = "") -> list[dict[str, Any]]:
    """Return the messages that a mailbox holds now; with `below`, those in that folder, named as if it were the top.

    `known`: messages whose content need not be read when a file has their name and size: such a file never changes.
    """
    names = {one["guid"]: dict(one) for one in known}
    for _look in range(LOOKS):
        try:
            found = list(lines(box.home, look(box.home, messages_only=True), names))
        except FileNotFoundError:  # renamed meanwhile, by a flag
            continue
        if not below:
            return found
        below = below.rstrip("/") + "/"
        return [one | {"folder": one["folder"].removeprefix(below)} for one in found if one["folder"].startswith(below)]
    raise Failed(f"{box.address} is being worked on all the time: try again")


def see_room(root: Path, octets: int) -> None:
    """Refuse what does not fit where it would lie on its way, and then in the store: one file system."""
    state = os.statvfs(root / SCRATCH if (root / SCRATCH).is_dir() else root)
    free = max(0, state.f_bavail * state.f_frsize - RESERVE * state.f_blocks * state.f_frsize)
    if octets > free:
        raise Refused(
            f"There is not enough space in {root}: {octets / 1e6:.1f} MB have to come and {free / 1e6:.1f} MB may be"
            f" used ({RESERVE:.0%} stay free): make room there or enlarge it"
        )


# --- from the repository -----------------------------------------------------------------------------------------


@contextmanager
def scratch(root: Path, name: str) -> Iterator[Path]:
    """A folder for what is on its way, gone afterwards. One run at a time: what an older one has left goes too."""
    folder, owner = root / SCRATCH / name, root.stat()
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    _erase(folder)
    folder.mkdir(mode=0o700)
    # Dovecot opens a Maildir as the store's owner.
    for path in (folder.parent, folder):
        os.chown(path, owner.st_uid, owner.st_gid)
    try:
        yield folder
    finally:
        _erase(folder)


def _erase(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def fetch(restic: Restic, snapshot: Snapshot, identity: str, wanted: Sequence[Message], whole: bool, to: Path) -> Path:
    """Bring messages of a mailbox from a snapshot into the folder `to`, as its home; return that.

    `whole`: they are all that the snapshot has of it, and what is no message comes too.
    """
    home = to / identity
    if whole or len(wanted) > FEW:
        restic.restore(snapshot.id, home, below=f"/mailboxes/{identity}")
    else:
        folders = {str(Path(one["file"]).parents[1]) for one in wanted}
        names = [literal(f"/{one['file']}") for one in wanted]
        names += [literal(f"/{folder}/{name}") for folder in sorted(folders) for name in KEPT]
        restic.restore(snapshot.id, home, below=f"/mailboxes/{identity}", include=names)
    return home


def literal(text: str) -> str:
    """Return a path in which restic's patterns (Go's filepath.Match) see no sign of their own."""
    return "".join(f"\\{sign}" if sign in "\\*?[" else sign for sign in text)


def tidy(home: Path, wanted: Sequence[Message], whole: bool) -> None:
    """Leave in a home from a snapshot the messages `wanted` alone, and have the store's owner own it.

    Raises Failed when one of them is not there, or not as large as the catalogue says.
    """
    for folder in mail_folders(home):
        for name in (*MESSAGES, "tmp"):  # without one of them, to Dovecot and to us, it is no folder of mail
            (folder / name).mkdir(mode=0o700, exist_ok=True)
    names = {one["file"]: one for one in wanted}
    seen = look(home, messages_only=True)
    for path, _inode in seen.messages.values():
        one = names.pop(path, None)
        if one is None:
            (home / path).unlink()
        elif (home / path).stat().st_size != one["octets"]:
            raise Failed(f"{path} in the snapshot is not as large as its catalogue says: it is damaged")
    if names:
        raise Failed(f"{len(names)} messages of the catalogue are not in the snapshot, such as {next(iter(names))}")
    kept = {one["folder"] for one in wanted}
    for folder in mail_folders(home):
        if not whole and folder.name.startswith(".") and folder_name(str(folder)) not in kept:
            shutil.rmtree(folder)
    owner = home.parent.stat()
    for path in (home, *home.rglob("*")):
        state = path.lstat()
        if (state.st_uid, state.st_gid) != (owner.st_uid, owner.st_gid):
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def mail_folders(home: Path) -> list[Path]:
    """Return the folders of a home's Maildir that are folders of mail, INBOX first."""
    maildir = home / "Maildir"
    return [maildir, *sorted(path for path in maildir.glob(".*") if path.is_dir())]


# --- into the mailbox --------------------------------------------------------------------------------------------


def bring_in(job: Job, home: Path, below: str) -> None:
    """Import the Maildir of a home into a mailbox, below a folder or ("") in place; raises Failed when a message lacks.

    A process for each mailbox: told of several (-F), Dovecot 2.4.1 takes the first one's source for all of them.
    """
    sent = _inodes(home)
    # Without this setting Dovecot 2.4.1 leaves out, in silence, the source's folders whose names are not ASCII.
    source = ["-p", "mailbox_list_utf8=yes", f"maildir:{home / 'Maildir'}"]
    subscriptions = ["-s"] if job.whole and not below else []
    # The disk is waited for once, when all are there.
    done = doveadm("-o", "mail_fsync=never", "import", "-u", job.box.address, *subscriptions, *source, below, "ALL")
    lost = len(sent - _inodes(job.box.home))
    if lost:  # copied and not linked, or moved on by its owner meanwhile
        lost = len(lacking(job.lacking, present(job.box, job.lacking, below)))
    if lost or done.returncode:
        why = f": {_last(done.stderr)}" if done.stderr.strip() else ""
        raise Failed(f"{lost} of {len(job.lacking)} messages did not arrive in {job.box.address}{why}")


def _inodes(home: Path) -> set[int]:
    return {inode for _path, inode in look(home, messages_only=True).messages.values()}


def bring_rest(box: Mailbox, home: Path) -> int:
    """Bring back what a mailbox lacks besides messages: empty folders, filters, a unit's rights; return how many.

    What is there stays as it is. A filter that was active is made so again when none is.
    """
    have = {path.name for path in mail_folders(box.home)}
    missing = sorted(folder_name(str(path)) for path in mail_folders(home)[1:] if path.name not in have)
    if missing:
        _do(doveadm("mailbox", "create", "-u", box.address, *missing), f"the folders of {box.address}")
    saved = {path.stem: path for path in (home / "sieve").glob("*.sieve")}
    scripts = _scripts(box) if saved else {}
    for name in sorted(saved.keys() - scripts.keys()):
        text = saved[name].read_text(encoding="utf-8", errors="replace")
        _do(doveadm("sieve", "put", "-u", box.address, name, stdin=text), f"the filter {name} of {box.address}")
    active = home / ".dovecot.sieve"
    if active.is_symlink() and not any(scripts.values()) and Path(os.readlink(active)).stem in saved:
        name = Path(os.readlink(active)).stem
        _do(doveadm("sieve", "activate", "-u", box.address, name), f"the filter {name} of {box.address}")
    rights = box.home / "Maildir" / "dovecot-acl"
    if (home / "Maildir" / rights.name).exists() and not rights.exists():
        shutil.copy2(home / "Maildir" / rights.name, rights)
        owner = rights.parent.stat()
        os.chown(rights, owner.st_uid, owner.st_gid)
    return len(missing) + len(saved.keys() - scripts.keys())


def _scripts(box: Mailbox) -> dict[str, bool]:
    """Return the names of a mailbox's Sieve scripts, and which one is active."""
    listed = doveadm("-f", "tab", "sieve", "list", "-u", box.address).stdout.splitlines()[1:]
    return {row[0]: len(row) > 1 and bool(row[1].strip()) for row in (line.split("\t") for line in listed)}


def _do(done: subprocess.CompletedProcess[str], what: str) -> None:
    if done.returncode:
        raise Failed(f"Dovecot does not take {what}: {_last(done.stderr)}")


# --- a whole job -------------------------------------------------------------------------------------------------


def job(box: Mailbox, known: Sequence[Message], wanted: Sequence[Message], below: str, whole: bool) -> Job:
    """Compare what is wanted of a snapshot, which has the messages `known`, with what a mailbox holds now."""
    return Job(box, wanted, lacking(wanted, present(box, known, below)), whole)


@dataclass
class Outcome:
    """What a restore did: numbers, and no content."""

    wanted: int = 0
    there: int = 0
    restored: int = 0
    octets: int = 0
    others: int = 0
    """Folders without a message, and filters."""
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """Until it was in the mailboxes."""
    synced_seconds: float = 0.0
    """Until it was on the other host too."""


def carry_out(restic: Restic, snapshot: Snapshot, jobs: Sequence[Job], below: str, root: Path) -> Outcome:
    """Bring back what mailboxes lack; raises Failed when one did not come back whole: the others did."""
    began = time.monotonic()
    outcome = Outcome(sum(len(one.wanted) for one in jobs), sum(len(one.wanted) - len(one.lacking) for one in jobs))
    due = [one for one in jobs if one.lacking or one.whole]
    with scratch(root, "mail") as folder:
        if len(due) > 1:
            restic.restore(snapshot.id, folder, below="/mailboxes")
        else:
            for one in due:
                fetch(restic, snapshot, one.box.id, one.lacking, one.whole, folder)

        def put(one: Job) -> int | Failed:
            home = folder / one.box.id
            try:
                tidy(home, one.lacking, one.whole)
                if one.lacking:
                    bring_in(one, home, below)
                return bring_rest(one.box, home) if one.whole and not below else 0
            except Failed as failure:  # the others come back all the same
                return failure

        failures = []
        with ThreadPoolExecutor(WORKERS) as pool:
            for one, others in zip(due, pool.map(put, due), strict=True):
                if isinstance(others, Failed):
                    failures.append(str(others))
                    continue
                outcome.others += others
                outcome.restored += len(one.lacking)
                outcome.octets += one.octets
    os.sync()
    outcome.seconds = time.monotonic() - began
    outcome.remarks += hand_on([one.box for one in due])
    outcome.synced_seconds = time.monotonic() - began
    if failures:
        raise Failed(
            f"{len(failures)} of {len(due)} mailboxes did not come back whole: {'; '.join([*failures.values()][:5])}"
        )
    return outcome


def hand_on(boxes: Sequence[Mailbox]) -> list[str]:
    """Have the other host of a pair get what came back: doveadm tells mail-sync nothing of what it does.

    Return what is to be remarked. What does not reach it now, the nightly comparison brings.
    """
    if not SYNC.exists() or not boxes:
        return []
    ways = [["full"]] if len(boxes) > 10 else [["user", box.address] for box in boxes]
    done = [subprocess.run([SYNC, *way], capture_output=True, text=True).returncode for way in ways]
    return ["the other host does not have it yet: `mail-sync full` or the night brings it there"] if any(done) else []


def bring_homes(restic: Restic, snapshot: Snapshot, identities: Iterable[str], root: Path) -> int:
    """Put homes that no mailbox uses now, such as leavers', back into the store as they were; return how many.

    Dovecot serves none of them, so nothing of it is needed. One that is there stays as it is.
    """
    due = [identity for identity in identities if not (root / identity).exists()]
    for identity in due:
        with scratch(root, "homes") as folder:
            restic.restore(snapshot.id, folder / identity, below=f"/mailboxes/{identity}")
            owner = root.stat()
            for path in (folder / identity, *(folder / identity).rglob("*")):
                os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
            (folder / identity).rename(root / identity)
    return len(due)


def outcome_of(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as JSON has it, without what is nothing."""
    found = {name: value for name, value in vars(outcome).items() if value or name in ("wanted", "there", "restored")}
    return {name: round(value, 1) if isinstance(value, float) else value for name, value in found.items()}
