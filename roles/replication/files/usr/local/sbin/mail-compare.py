#!/usr/bin/python3
"""mail-compare: compare the mailboxes of both hosts, message by message.

    mail-compare [--repair] [--alarm] [ADDRESS ...]

Folders with their GUID, UIDVALIDITY and next UID; each message's UID, GUID, flags and size; subscriptions; access
rights; Sieve scripts and the active one. Without addresses, of everybody. A line for each difference; 1 when there is
one, 2 when nothing could be compared. --alarm raises an alarm too.

--repair syncs who differs message by message and, where that does not help, mends the indexes of both sides first. A
message that only one side has is kept: to Dovecot a file that vanished from the other side's disk is deleted mail, and
a sync deletes it here too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib" / "mail-sync"))

from doveadm import Doveadm, Failed, Settings, Unreachable, load

RESULT = Path("/run/mail-sync/compare.json")
LOOKS = 3  # what differs at every look differs; what is on its way is there at the next
PAUSE = 3.0  # seconds between two looks
WORKERS = 2
SHOWN = 20  # differences of a user that are printed
Content = dict[tuple[str, ...], tuple[str, ...]]


def content(side: Doveadm, user: str, prefix: str) -> Content:
    """Return what a user has on one side; `prefix` is what units' folders, which are not his, begin with."""
    found: Content = {}
    folders = [
        row
        for row in side.rows(4, user, "mailbox status", "uidnext uidvalidity guid", "*")
        if not row[0].startswith(prefix)
    ]
    rights = {}
    for name, *numbers in folders:
        found["folder", name] = tuple(numbers)
        rights[name] = tuple(sorted(" ".join(row) for row in side.rows(3, user, "acl get", name)))
    for name, given in rights.items():
        # A folder without rights of its own has INBOX's (acl_defaults_from_inbox): written down or not, the same.
        if effective := given or rights.get("INBOX"):
            found["rights", name] = effective
    for name, uid, *rest, flags in side.rows(5, user, "fetch", "mailbox uid guid size.physical flags", "ALL"):
        if not name.startswith(prefix):
            found["message", name, uid] = (*rest, " ".join(sorted(set(flags.split()) - {"\\Recent"})))
    for name in side.call(user, "mailbox list", "-s"):
        found["subscription", name] = ()
    for name, active in side.rows(2, user, "sieve list"):
        text = "\n".join(side.call(user, "sieve get", name))
        found["script", name] = (active, hashlib.sha256(text.encode()).hexdigest())
    return found


def differences(
    here: Mapping[tuple[str, ...], tuple[str, ...]], there: Mapping[tuple[str, ...], tuple[str, ...]]
) -> list[str]:
    """Return a line for each thing that one side has and the other has not, or has otherwise."""
    lines = []
    for key in sorted(here.keys() | there.keys()):
        mine, theirs = here.get(key), there.get(key)
        if mine != theirs:
            what = f"{key[0]} {' '.join(key[1:])}"
            if theirs is None:
                lines.append(f"{what}: only here")
            elif mine is None:
                lines.append(f"{what}: only there")
            else:
                lines.append(f"{what}: here {' '.join(mine)}, there {' '.join(theirs)}")
    return lines


class Comparison:
    """A run over users."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._todo: list[str] = []
        self._left = 0
        self.found: dict[str, list[str]] = {}
        self.problems: list[str] = []
        self.messages = 0

    def look(self, users: Iterable[str]) -> None:
        """Compare users; `found` then has who differs, `problems` why the look is worth nothing."""
        self._todo = sorted(users, reverse=True)
        self._left = len(self._todo)
        self.found = {}
        threads = [threading.Thread(target=self._work) for _number in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Whatever ended a worker: nobody who was not compared may pass for equal.
        if self._left and not self.problems:
            self.problems.append(f"{self._left} mailboxes were not compared")

    def _work(self) -> None:
        with Doveadm() as local, Doveadm(self._settings) as peer:
            while True:
                with self._lock:
                    if not self._todo or self.problems:
                        return
                    user = self._todo.pop()
                try:
                    here, there = (content(side, user, self._settings.units_prefix) for side in (local, peer))
                except Unreachable as error:
                    with self._lock:
                        self.problems.append(f"{user}: {error}")
                    return
                except Failed as error:
                    lines = [f"cannot be compared: {error}"] if error.code != "NOUSER" else []
                except ValueError as error:
                    with self._lock:
                        self.problems.append(f"{user}: an answer is not understood: {error}")
                    return
                else:
                    lines = differences(here, there)
                    with self._lock:
                        self.messages += sum(key[0] == "message" for key in here)
                with self._lock:
                    self._left -= 1
                    if lines:
                        self.found[user] = lines


def lone_messages(here: Content, there: Content) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the messages, as UIDs by folder, that only this side has, and those that only the other has.

    A message is the same by its GUID, whatever its UID.
    """
    both = [
        {(key[1], value[0]): key[2] for key, value in side.items() if key[0] == "message"} for side in (here, there)
    ]
    found: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
    for index in (0, 1):
        for folder, guid in sorted(both[index].keys() - both[1 - index].keys()):
            found[index].setdefault(folder, []).append(both[index][folder, guid])
    return found


def uids(side: Doveadm, user: str, folder: str, guid: str) -> list[int]:
    """Return the UIDs of a message in a folder, lowest first: more than one of its copies there share its GUID."""
    return sorted(int(uid) for uid, its in side.rows(2, user, "fetch", "uid guid", "mailbox", folder) if its == guid)


def repair(settings: Settings, user: str, mend: bool) -> None:
    """Sync a user message by message; `mend`: let both sides first look at what is on their disks.

    What only one side has is copied there first, so that a sync that takes it for deleted leaves the copy; when the
    sync brings the message itself, the copy goes.
    """
    with Doveadm() as local, Doveadm(settings) as peer:
        sides = (local, peer)
        contents = [content(side, user, settings.units_prefix) for side in sides]
        copied = []
        for side, its, folders in zip(sides, contents, lone_messages(*contents), strict=True):
            for folder, numbers in folders.items():
                for uid in numbers:
                    side.call(user, "copy", folder, "mailbox", folder, "uid", uid)
                    copied.append((side, folder, its["message", folder, uid][0]))
        if mend:
            for side in sides:
                side.call(user, "force-resync", "*")
        sync(user)
        superfluous = False
        for side, folder, guid in copied:
            extra = uids(side, user, folder, guid)[1:]
            if extra:
                side.call(user, "expunge", "mailbox", folder, "uid", ",".join(map(str, extra)))
                superfluous = True
        if superfluous:
            sync(user)


def sync(user: str) -> None:
    """Sync a user message by message; whether it helped, the next look tells."""
    subprocess.run(["/usr/local/sbin/mail-sync", "user", user], check=False, stdout=subprocess.DEVNULL)


def main() -> int:
    """Compare, and repair when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repair", action="store_true")
    parser.add_argument("--alarm", action="store_true")
    parser.add_argument("addresses", nargs="*", metavar="ADDRESS")
    given = parser.parse_args()
    began = time.time()
    settings = load()
    run = Comparison(settings)
    try:
        with Doveadm() as local:
            users = [user.lower() for user in given.addresses] or local.users()
    except (Unreachable, Failed) as error:
        print(error, file=sys.stderr)
        return 2
    run.look(users)
    messages = run.messages
    for _look in range(LOOKS - 1):
        if run.found and not run.problems:
            time.sleep(PAUSE)
            run.look(run.found)
    repaired = 0
    if given.repair and run.found and not run.problems:
        before = len(run.found)
        for mend in (False, True):
            if run.found and not run.problems:
                show(run.found)
                for user in run.found:
                    try:
                        repair(settings, user, mend)
                    except (Failed, Unreachable) as error:
                        print(f"{user}: {error}", file=sys.stderr)
                run.look(run.found)
        repaired = before - len(run.found)
    show(run.found)
    if run.problems:
        print(run.problems[0], file=sys.stderr)
        return 2
    result = {
        "at": round(began),
        "seconds": round(time.time() - began, 1),
        "users": len(users),
        "messages": messages,
        "differ": len(run.found),
        "repaired": repaired,
    }
    if not given.addresses:
        keep(result)
    print(", ".join(f"{key}: {value}" for key, value in result.items()))
    if run.found and given.alarm:
        text = f"{len(run.found)} mailboxes differ between the two hosts: run mail-compare --repair on this host"
        subprocess.run(["/usr/local/sbin/alarm", "mail-differs", text], check=True)
    return int(bool(run.found))


def show(found: Mapping[str, list[str]]) -> None:
    """Print who differs, and in what."""
    for user, lines in sorted(found.items()):
        for line in lines[:SHOWN]:
            print(f"{user}: {line}")
        if len(lines) > SHOWN:
            print(f"{user}: and {len(lines) - SHOWN} more")


def keep(result: Mapping[str, object]) -> None:
    """Write the result of a comparison of everybody, for the monitoring."""
    partial = RESULT.with_name(".compare.json")
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.chmod(0o644)
    os.replace(partial, RESULT)


if __name__ == "__main__":
    sys.exit(main())
