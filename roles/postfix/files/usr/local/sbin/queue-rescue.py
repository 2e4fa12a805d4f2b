#!/usr/bin/python3
"""Brings the queue files of a host that is gone into this host's Postfix: queue-rescue SPOOL [--known COMMAND].

SPOOL is the dead host's /var/spool/postfix, its disk mounted or its folder copied with modes (cp -a, rsync -a); it is
only read. What lies in a queue has not been delivered to the recipients that its file still lists: Postfix marks in the
file whoever is done. Each file is first put on hold here, where Postfix leaves it alone, gets a name of this host
(postsuper -s) and is then released; what an operator had put on hold stays there. What was taken is noted, so that a
second run takes nothing again although Postfix has sent it meanwhile.

COMMAND is asked for each message that carries an id of the message journal, with the id as its last word: exit code 0
says that the message has been brought back from the journal, and it is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Postfix's queues; corrupt and saved are for people to look at.
QUEUES = ("maildrop", "incoming", "active", "deferred", "hold")
OWN = Path("/var/spool/postfix")
NOTES = Path("/var/lib/hopthu/queue-rescue.json")
NAME = re.compile(r"[0-9A-Za-z]{6,30}")
JOURNAL_ID = re.compile(r"^X-Journal-Id:\s*([0-9A-Fa-f-]{36})\s*$", re.IGNORECASE | re.MULTILINE)


def journal_id(header: str) -> str:
    r"""Return the message journal's id from a message's header, as postcat prints it; empty without one.

    >>> journal_id("Subject: x\nX-Journal-Id: 01234567-89AB-cdef-0123-456789abcdef\n")
    '01234567-89ab-cdef-0123-456789abcdef'
    """
    match = JOURNAL_ID.search(header)
    return match[1].lower() if match else ""


def header_of(path: Path) -> str:
    """Return a queue file's header, which may be scattered over the file where a milter added to it."""
    command = ["/usr/sbin/postcat", "-h", str(path)]
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout.decode(errors="replace")


class Rescue:
    """Takes files below `source` to the queues below `own`; `known` asks whether a journal id was brought back.

    `notes` maps the name of what was taken to the number of its file here while that is on its way, then to 0.
    """

    def __init__(self, source: Path, own: Path, known: Callable[[str], bool], notes: Path) -> None:
        """Read what earlier runs noted."""
        self.source, self.own, self.known, self.notes = source, own, known, notes
        self.taken: dict[str, int] = json.loads(notes.read_text("utf-8")) if notes.exists() else {}
        self.result: dict[str, list[str]] = {"taken": [], "replayed": [], "unfinished": [], "unreadable": []}

    def save(self) -> None:
        """Write what was taken into the notes, whole or not at all."""
        new = self.notes.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            json.dump(self.taken, file)
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.notes)

    def files(self) -> list[tuple[str, Path]]:
        """Return (queue, file) for all that lies in the source's queues."""
        return [
            (queue, path)
            for queue in QUEUES
            for path in sorted((self.source / queue).rglob("*"))
            if path.is_file() and not path.is_symlink() and NAME.fullmatch(path.name)
        ]

    def take(self, queue: str, path: Path, header: Callable[[Path], str], owner: tuple[int, int]) -> None:
        """Take one file, or note why not; `owner` is Postfix's user and group."""
        name = path.name
        if name in self.taken:
            return
        # Postfix makes a file executable when it is complete; before that nobody was told that it is accepted.
        if path.stat().st_mode & 0o700 != 0o700:
            self.result["unfinished"].append(name)
            return
        try:
            identity = journal_id(header(path)) if queue != "maildrop" else ""
        except subprocess.CalledProcessError:
            self.result["unreadable"].append(name)
            return
        if identity and self.known(identity):
            self.result["replayed"].append(name)
            return
        # Not executable yet, so whatever happens until the last step, Postfix does not see it.
        folder = self.own / ("maildrop" if queue == "maildrop" else "hold")
        target = folder / name
        number = 1
        while target.exists():
            target, number = folder / f"{name}{number}", number + 1
        shutil.copyfile(path, target)
        target.chmod(0o600)
        os.chown(target, *owner)
        with target.open("rb") as file:
            os.fsync(file.fileno())
        self.taken[name] = 0 if queue in ("maildrop", "hold") else target.stat().st_ino
        self.save()
        target.chmod(0o700)
        self.result["taken"].append(name)

    def on_the_way(self) -> dict[int, str]:
        """Return the files of ours that are still on hold here, by number: their old names."""
        return {number: name for name, number in self.taken.items() if number}

    def release(self, release: Callable[[list[str]], None]) -> None:
        """Have Postfix send what is on the way, those of a run that was cut off too."""
        waiting = self.on_the_way()
        here = {path.stat().st_ino: path.name for path in (self.own / "hold").iterdir()}
        names = [here[number] for number in waiting if number in here]
        if names:
            release(names)
        for name in waiting.values():
            self.taken[name] = 0
        if waiting:
            self.save()


def postsuper(*arguments: str, names: list[str] | None = None) -> None:
    """Run postsuper; CalledProcessError when it fails."""
    subprocess.run(["/usr/sbin/postsuper", *arguments], check=True, timeout=600, input="\n".join(names or []).encode())


def main() -> int:
    """Take everything, release it and print what was done as JSON; 65 when SPOOL is no queue of Postfix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spool", type=Path)
    parser.add_argument("--known", nargs="*", default=[], metavar="WORD", help="command that knows replayed messages")
    options = parser.parse_args()
    if not (options.spool / "deferred").is_dir() or options.spool.resolve() == OWN:
        print(f"{options.spool} is not the queue of another host: it has no folder deferred", file=sys.stderr)
        return 65

    def known(identity: str) -> bool:
        done = subprocess.run([*options.known, identity], check=False, stdout=subprocess.DEVNULL, timeout=60)
        if done.returncode not in (0, 1):
            raise SystemExit(
                f"{options.known[0]} does not tell what was brought back: start mail-journal and run again"
            )
        return done.returncode == 0

    NOTES.parent.mkdir(parents=True, exist_ok=True)
    rescue = Rescue(options.spool, OWN, known if options.known else lambda _identity: False, NOTES)
    user = pwd.getpwnam("postfix")
    for queue, path in rescue.files():
        rescue.take(queue, path, header_of, (user.pw_uid, user.pw_gid))
    if rescue.result["taken"] or rescue.on_the_way():
        postsuper("-s", "hold")
        rescue.release(lambda names: postsuper("-H", "-", names=names))
    print(json.dumps(rescue.result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
