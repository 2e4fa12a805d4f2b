"""The link tree: a second name for every message, so that what is backed up stands still while the mail store goes on.

A message's file in a Maildir never changes; its name does, with each flag, and it moves from new to cur. Its base name,
before the colon, stays. A folder that is listed while a name in it changes may not show that file at all, and a message
that is moved from a folder not yet listed to one listed already is in neither list. So a mailbox is listed until
nothing of one list is missing in the next, and only then it counts as taken.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LOOKS = 12  # lists of one mailbox after which it is taken as it was seen, every message of every list
MESSAGES = ("new", "cur")  # new first: a message that is read meanwhile is met once at least
INFO = ":2,"
Key = tuple[str, str]  # folder, relative to the home; base name of the file


def is_left_out(name: str) -> bool:
    """Tell whether a file or folder of a home can be made anew, or is another process's for a moment."""
    return name == "tmp" or name.startswith(("dovecot.index", "dovecot.list.index")) or name.endswith((".lock", ".tmp"))


def base_name(name: str) -> str:
    """Return what of a message's file name never changes."""
    return name.partition(INFO)[0]


@dataclass
class Listing:
    """What a home has."""

    messages: dict[Key, tuple[str, int]] = field(default_factory=dict)  # → path in the home, inode
    others: set[str] = field(default_factory=set)  # paths in the home of files that are no messages
    folders: set[str] = field(default_factory=set)


def look(home: Path, messages_only: bool = False) -> Listing:
    """List a home. What goes away meanwhile is left out; raises OSError where one cannot look."""
    found = Listing()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        entries = _entries(home / folder)
        if entries is None:
            continue
        found.folders.add(folder)
        mail = {entry.name for entry in entries} >= set(MESSAGES)
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if mail and entry.name in MESSAGES:
                continue
            if is_left_out(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif not messages_only:
                found.others.add(path)
        for name in MESSAGES if mail else ():
            inner = os.path.join(folder, name)
            found.folders.add(inner)
            for entry in _entries(home / inner) or ():
                if not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                    key = folder, base_name(entry.name)
                    found.messages[key] = f"{inner}/{entry.name}", entry.inode()
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]] | None:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return None


def uidlist_names(home: Path, folders: set[str]) -> Iterator[Key]:
    """Yield the messages that Dovecot's own lists of a home's folders name."""
    for folder in folders:
        for name, _uid, _guid in read_uidlist(home / folder):
            yield folder, name


def read_uidlist(folder: Path) -> Iterator[tuple[str, int, str]]:
    """Yield (base name, UID, GUID) of the entries of a folder's dovecot-uidlist, none where there is no such file.

    The GUID is the base name unless the message came from the other host, which gave it its own.
    """
    try:
        text = (folder / "dovecot-uidlist").read_text(encoding="utf-8", errors="surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        return
    for line in text.split("\n")[1:-1]:  # the first line is about the folder; the last one may not be whole yet
        head, colon, name = line.partition(" :")
        uid, *more = head.split(" ")
        if colon and uid.isdigit():
            base = base_name(name)
            yield base, int(uid), next((part[1:] for part in more if part.startswith("G")), base)


def take(home: Path, target: Path) -> Listing:
    """Make `target` what `home` is now, its messages as links to the same files; return what it has.

    Raises OSError, FileNotFoundError when the home itself is gone. Nothing in the home is changed.
    """
    if not stat.S_ISDIR(os.lstat(home).st_mode):
        raise NotADirectoryError(f"{home} is no folder")
    kept = look(target, messages_only=True) if target.is_dir() else Listing()
    last: set[Key] | None = None
    ever: set[Key] = set()
    for _number in range(LOOKS):
        seen = look(home)
        lost = _link(home, target, seen, kept)
        ever |= seen.messages.keys()
        if last is not None and not lost and last <= seen.messages.keys():
            wanted = set(seen.messages)
            break
        last = set(seen.messages)
    else:
        # It never stands still. Rather a message too often, moved or deleted meanwhile, than one too few.
        wanted = ever
    # A name that Dovecot knows and no list has is deleted mail, or a file that was renamed during each of them.
    if set(uidlist_names(home, seen.folders)) - wanted:
        again = look(home)
        _link(home, target, again, kept)
        wanted |= again.messages.keys()
        seen.folders |= again.folders
    seen.messages = {key: kept.messages[key] for key in wanted if key in kept.messages}
    _copy_others(home, target, seen)
    _clean(target, seen)
    return seen


def _link(home: Path, target: Path, seen: Listing, kept: Listing) -> set[Key]:
    """Give each message of a list its name in the tree; return those that were gone or renamed before that."""
    for folder in sorted(seen.folders):
        _make_folder(home / folder, target / folder)
    made: set[str] = set()
    lost = set()
    for key, (path, inode) in seen.messages.items():
        old = kept.messages.get(key)
        if old == (path, inode):
            continue
        folder = os.path.dirname(path)
        if folder not in made:
            _make_folder(home / folder, target / folder)
            made.add(folder)
        new = target / path
        try:
            if old is not None and old[1] == inode:
                os.rename(target / old[0], new)
            else:
                if old is not None:
                    (target / old[0]).unlink(missing_ok=True)
                    del kept.messages[key]
                new.unlink(missing_ok=True)
                os.link(home / path, new, follow_symlinks=False)
        except FileNotFoundError:
            lost.add(key)
            continue
        kept.messages[key] = path, inode
    return lost


def _make_folder(source: Path, target: Path) -> None:
    """Have a folder in the tree, with the owner and mode of the one in the store."""
    if not target.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        try:
            status = source.lstat()
        except FileNotFoundError:
            return
        os.chown(target, status.st_uid, status.st_gid)
        os.chmod(target, stat.S_IMODE(status.st_mode))


def _copy_others(home: Path, target: Path, seen: Listing) -> None:
    """Copy what is no message. Dovecot writes on in such files: a link would change under restic's eyes."""
    for path in sorted(seen.others):
        source, copy = home / path, target / path
        try:
            status = source.lstat()
            if stat.S_ISLNK(status.st_mode):
                goal = os.readlink(source)
                if not (copy.is_symlink() and os.readlink(copy) == goal):
                    copy.unlink(missing_ok=True)
                    copy.symlink_to(goal)
            elif stat.S_ISREG(status.st_mode):
                _copy(source, copy, status)
            else:
                seen.others.discard(path)  # a socket, a pipe
        except FileNotFoundError:
            seen.others.discard(path)


def _copy(source: Path, copy: Path, status: os.stat_result) -> None:
    """Copy a file unless the copy has its size and time of change; of a list of UIDs whole lines only."""
    try:
        old = copy.lstat()
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISREG(old.st_mode) and (old.st_size, old.st_mtime_ns) == (status.st_size, status.st_mtime_ns):
            return
    partial = copy.with_name(f".{copy.name}.tmp")
    shutil.copyfile(source, partial)
    if source.name == "dovecot-uidlist":
        data = partial.read_bytes()
        os.truncate(partial, data.rfind(b"\n") + 1)
    os.chown(partial, status.st_uid, status.st_gid)
    os.chmod(partial, stat.S_IMODE(status.st_mode))
    os.utime(partial, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(partial, copy)


def _clean(target: Path, seen: Listing) -> None:
    """Remove from a tree what its list does not have."""
    wanted = {path for path, _inode in seen.messages.values()} | seen.others
    folders = {os.path.dirname(path) for path in wanted} | seen.folders
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        for entry in _entries(target / folder) or ():
            path = os.path.join(folder, entry.name)
            if entry.is_dir(follow_symlinks=False):
                if path in folders:
                    waiting.append(path)
                else:
                    shutil.rmtree(entry.path)
            elif path not in wanted:
                os.unlink(entry.path)


def homes(mail_root: Path) -> dict[str, Path]:
    """Return the homes in the mail store by id; names with a dot in front are not mailboxes."""
    return {
        entry.name: Path(entry.path)
        for entry in os.scandir(mail_root)
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
    }
