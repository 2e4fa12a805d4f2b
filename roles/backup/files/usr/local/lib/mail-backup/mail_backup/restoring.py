"""mail-restore: bring back what a backup holds. For root, on the host that holds the service.

    mail-restore find      [--mailbox ADDRESS] [--sender TEXT] [--subject TEXT] [--date DAY] [--at TIME]
    mail-restore message   --mailbox ADDRESS --message ID [--folder FOLDER] [--at TIME] [--into folder|place]
    mail-restore folder    --mailbox ADDRESS --folder FOLDER [--at TIME] [--into folder|place]
    mail-restore mailbox   --mailbox ADDRESS [--at TIME] [--into folder|place]
    mail-restore unit      --mailbox ADDRESS [--at TIME] [--into folder|place]
    mail-restore all       --at TIME
    mail-restore left      --at TIME
    mail-restore directory [--at TIME] [--entry DN] [--passwords] [--remove-newer] [--empty]
    mail-restore host      [--host NAME] [--at TIME] [--path PATH] [--stop UNIT ...]

--grounds and --by say on whose request and who does it; they go to the directory's decision log, before and afterwards.
Prints one JSON object. Exit code 2: refused, nothing was changed; 1: something did not come back. --dry-run only tells.
"""

from __future__ import annotations

import argparse
import fcntl
import getpass
import json
import os
import sys
import syslog
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from mail_backup import directory, hostfiles, tree
from mail_backup.commands import client, inventory_commit, is_holder
from mail_backup.decisions import PASSWORD, decided, entries
from mail_backup.pick import Message, Refused, chosen, identity, matches, moment, shown
from mail_backup.restic import BackupError, Snapshot
from mail_backup.restore import (
    Failed,
    Job,
    Mailbox,
    bring_homes,
    carry_out,
    catalogue,
    catalogues,
    job,
    mailbox,
    outcome_of,
    scratch,
    see_room,
)
from mail_backup.settings import Settings, load

LOCK = Path("/run/lock/mail-restore")
FOLDER = "Khôi phục"
"""Top folder of what is not put in place: "restored". The time follows; a dot would part folders."""
FOUND = 100  # messages that a search shows at most
FEW = 50  # mailboxes that a directory may have that is replaced as a whole
LINES = 200  # changes of the directory that are shown


class Restore:
    """One call of the command."""

    def __init__(self, settings: Settings, given: argparse.Namespace) -> None:
        self.settings, self.given = settings, given
        self.restic = client(settings)
        self.at: datetime | None = moment(given.at) if given.at else None
        self.root = Path(settings.mail_root)

    def run(self) -> dict[str, Any]:
        """Do what the command line asks for; return what is printed."""
        kinds: dict[str, Callable[[], dict[str, Any]]] = {
            "find": self.find,
            "all": self.everybody,
            "left": self.left,
            "directory": self.directory,
            "host": self.host,
        }
        what = self.given.what
        if what not in ("host", "left", "find") and not (what == "directory" and self.given.empty):
            self._see_holder()
        if what not in ("directory", "host") and not self.settings.mail_root:
            raise Refused("This host keeps no mailboxes: restore on one that does")
        return kinds.get(what, self.mail)()

    def _see_holder(self) -> None:
        if not is_holder(self.settings):
            raise Refused(
                f"This host does not hold the service ({self.settings.target} is not active): restore on the one that"
                " does"
            )

    @contextmanager
    def _decided(self, **what: object) -> Iterator[dict[str, Any]]:
        given = self.given
        about = {"action": "restore", "what": given.what, **{name: value for name, value in what.items() if value}}
        with decided(self.settings.base_dn, given.by, given.grounds, about, inventory_commit()) as result:
            yield result

    @contextmanager
    def _noted(self, **what: object) -> Iterator[None]:
        """Write the grounds down where there may be no directory (yet): in the log, which another host keeps too."""
        if self.settings.base_dn and PASSWORD.exists():
            with self._decided(**what):
                yield
            return
        given = self.given
        syslog.openlog("mail-restore", 0, syslog.LOG_AUTH)
        syslog.syslog(syslog.LOG_NOTICE, json.dumps({"by": given.by, "grounds": given.grounds, **what}))
        yield

    def _grounds(self) -> None:
        """Refuse before anything is read of the repository when there are no grounds."""
        entries(self.settings.base_dn, self.given.by, self.given.grounds, {"action": "restore"}, "")

    def _mail(self) -> Snapshot:
        return self.restic.snapshot("mail", self.settings.domain, self.at)

    # --- mail

    def find(self) -> dict[str, Any]:
        """Look for messages in the catalogues of the snapshots, the newest first."""
        given = self.given
        if not (given.sender or given.subject or given.date):
            raise Refused("Nothing is looked for: add -e sender=, -e subject= or -e date=2026-11-20")
        if given.date:
            moment(given.date)
        self._grounds()
        box = mailbox(given.mailbox, self.root) if given.mailbox else None
        newest = self._mail()
        snapshots = [newest] if self.at else self.restic.snapshots("mail", self.settings.domain)[::-1]
        with self._decided(
            mailbox=given.mailbox, sender=given.sender, subject=given.subject, date=given.date
        ) as result:
            found: dict[tuple[str, ...], dict[str, Any]] = {}
            for snapshot in snapshots:
                for head, messages in self._catalogues(snapshot, box):
                    for one in messages:
                        if matches(one, given.sender, given.subject, given.date):
                            name = (head["id"], one["folder"], *identity(one))
                            found.setdefault(name, self._hit(head, one, snapshot))
                if len(found) >= FOUND:
                    break
            result["found"] = len(found)
        rows = sorted(found.values(), key=lambda row: (row["mailbox"], row["received"]))
        return {"what": "find", "found": len(rows), "snapshots": len(snapshots), "messages": rows[:FOUND]}

    def _catalogues(self, snapshot: Snapshot, box: Mailbox | None) -> Iterator[tuple[dict[str, Any], list[Message]]]:
        if box is None:
            yield from catalogues(self.restic, snapshot)
            return
        try:
            yield catalogue(self.restic, snapshot, box.id)
        except Refused:  # it was not there then
            return

    @staticmethod
    def _hit(head: Mapping[str, Any], one: Message, snapshot: Snapshot) -> dict[str, Any]:
        return {
            "mailbox": head["address"] or head["id"],
            "folder": one["folder"],
            "message": one["guid"],
            "from": one["from"],
            "subject": one["subject"],
            "date": one["date"],
            "received": shown(datetime.fromtimestamp(one["received"]).astimezone()),
            "octets": one["octets"],
            "at": snapshot.time.astimezone().isoformat(timespec="seconds"),
        }

    def mail(self) -> dict[str, Any]:
        """A message, a folder or a mailbox."""
        given, whole = self.given, self.given.what in ("mailbox", "unit")
        self._grounds()
        if given.what == "message" and not given.message:
            raise Refused("No message is named: add -e message=ID, as -e what=find shows it")
        if given.what == "folder" and not given.folder:
            raise Refused("No folder is named: add -e folder=NAME, subfolders as A/B")
        box = mailbox(given.mailbox, self.root)
        if given.what == "unit" and box.id not in directory.mailboxes(self.settings.base_dn, "unit"):
            raise Refused(f"{box.address} is no unit's mailbox: use what=mailbox")
        snapshot = self._mail()
        known = catalogue(self.restic, snapshot, box.id)[1]
        wanted = chosen(known, given.folder, given.message if given.what == "message" else "")
        if not wanted and not whole:
            raise Refused(
                f"The snapshot of {shown(snapshot.time)} has no such {given.what} in {box.address}:"
                f" {given.message or given.folder}. what=find looks in all of them"
            )
        below = "" if given.into == "place" else f"{FOLDER} {snapshot.time.astimezone():%Y-%m-%d %Hh%M}"
        plan = job(box, known, wanted, below, whole)
        return self._carry_out(snapshot, [plan], below, box.address)

    def everybody(self) -> dict[str, Any]:
        """Every mailbox that a snapshot has, in place; and the homes that no mailbox uses now."""
        self._grounds()
        self._see_time()
        snapshot, addresses = self._mail(), directory.mailboxes(self.settings.base_dn)
        jobs, homeless = [], []
        for head, messages in catalogues(self.restic, snapshot):
            if head["id"] in addresses:
                box = Mailbox(addresses[head["id"]], self.root / head["id"])
                jobs.append(job(box, messages, messages, "", whole=True))
            else:
                homeless.append(head["id"])
        return self._carry_out(snapshot, jobs, "", "", homeless)

    def left(self) -> dict[str, Any]:
        """On the other host of a pair: the homes that no mailbox uses now, which doveadm brings nowhere."""
        self._grounds()
        self._see_time()
        snapshot, addresses = self._mail(), directory.mailboxes(self.settings.base_dn)
        due = [head["id"] for head, _messages in catalogues(self.restic, snapshot) if head["id"] not in addresses]
        about = {"what": "left", "at": shown(snapshot.time), "snapshot": snapshot.id[:8], "homes": len(due)}
        if not self.given.dry_run:
            with self._decided(**about):
                about["restored"] = bring_homes(self.restic, snapshot, due, self.root)
        return about

    def _see_time(self) -> None:
        """Refuse the newest snapshot where all is lost: since then, one of the empty hosts may have been made."""
        if self.at is None:
            raise Refused("No time is given: name one before the loss, -e at='2026-11-20 12:00'")

    def _carry_out(
        self, snapshot: Snapshot, jobs: list[Job], below: str, address: str, homeless: list[str] | None = None
    ) -> dict[str, Any]:
        octets = sum(one.octets for one in jobs)
        about = {
            "what": self.given.what,
            "mailbox": address,
            "at": shown(snapshot.time),
            "snapshot": snapshot.id[:8],
            "into": below or "in place",
        }
        about = {name: value for name, value in about.items() if value}
        see_room(self.root, octets)
        if self.given.dry_run:
            wanted, missing = (sum(len(getattr(one, name)) for one in jobs) for name in ("wanted", "lacking"))
            return {**about, "wanted": wanted, "there": wanted - missing, "to_restore": missing, "octets": octets}
        about_more = {"folder": self.given.folder, "message": self.given.message}
        with self._decided(**{**about, **about_more}) as result:
            outcome = carry_out(self.restic, snapshot, jobs, below, self.root)
            if homeless:
                outcome.others += bring_homes(self.restic, snapshot, homeless, self.root)
            result |= {"restored": outcome.restored}
        return {**about, **outcome_of(outcome)}

    # --- directory

    def directory(self) -> dict[str, Any]:
        """The directory: what differs, entry by entry; with --empty, the whole tree."""
        given, base = self.given, self.settings.base_dn
        self._grounds()
        if not base:
            raise Refused("This host has no directory: restore on one that does")
        snapshot = self.restic.snapshot("directory", self.settings.domain, self.at)
        with self.restic.dump(snapshot.id, "/directory/data.ldif") as stream:
            content = stream.read().decode()
        about = {"what": "directory", "at": shown(snapshot.time), "snapshot": snapshot.id[:8]}
        began = time.monotonic()
        if given.empty:
            what = {"action": "restore", **about}
            written = entries(base, given.by, given.grounds, what, inventory_commit())
            written[1][1]["decisionTime"] = written[0][1]["decisionTime"]
            with directory.alone():
                directory.see_empty(base, FEW)
                if given.dry_run:
                    return about
                number, old = directory.fill(base, content, written)
            return {**about, "entries": number, "before": old, "seconds": round(time.monotonic() - began, 1)}
        with directory.alone():
            then = tree.below(tree.tree(tree.parse(content.splitlines())), base, given.entry)
            now = tree.below(tree.tree(tree.parse(directory.slapcat("-b", base).splitlines())), base, given.entry)
            if given.entry and not then and not now:
                raise Refused(f"Neither the snapshot of {about['at']} nor the directory has {given.entry}")
            steps = tree.steps(then, now, passwords=given.passwords, remove=given.remove_newer)
            newer = 0 if given.remove_newer else len(now.keys() - then.keys())
            about |= {"changes": [str(step) for step in steps[:LINES]], "number": len(steps), "newer_left": newer}
            if given.dry_run or not steps:
                return about
            with self._decided(**about) as result:
                done, refused = directory.carry_out(steps)
                result |= {"done": done, "refused": refused}
        about |= {"done": done, "refused": refused, "seconds": round(time.monotonic() - began, 1)}
        if refused:
            raise Failed(f"slapd refused {len(refused)} of {len(steps)} changes, such as {refused[0]}")
        return about

    # --- a host's files

    def host(self) -> dict[str, Any]:
        """Files of this host, or of one that it takes the place of."""
        given = self.given
        self._grounds()
        name = given.host or self.settings.host
        snapshot = self.restic.snapshot("host", name, self.at)
        found = hostfiles.nodes(self.restic, snapshot, given.path)
        space = Path("/var/lib/mail-backup")
        see_room(space, sum(one.get("size", 0) for one in found))
        about: dict[str, Any] = {"what": "host", "host": name, "at": shown(snapshot.time), "snapshot": snapshot.id[:8]}
        began = time.monotonic()
        with scratch(space, "host") as folder:
            self.restic.restore(snapshot.id, folder, include=[given.path] if given.path else ())
            paths = [one for one in hostfiles.differing(found, folder) if not hostfiles.is_left(one, given.path)]
            about |= {
                "files": sum(one["type"] == "file" for one in found),
                "differing": paths[:LINES],
                "number": len(paths),
            }
            if given.dry_run or not paths:
                return about
            with self._noted(**about):
                hostfiles.put(found, paths, folder, given.stop)
        return {**about, "restored": len(paths), "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("find", "message", "folder", "mailbox", "unit", "all", "left", "directory", "host")
    parser.add_argument("what", choices=kinds)
    for name in ("mailbox", "folder", "message", "sender", "subject", "date", "at", "entry", "host", "path"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--into", choices=("folder", "place"), default="folder")
    parser.add_argument("--stop", nargs="*", default=[], metavar="UNIT")
    for name in ("passwords", "remove-newer", "empty", "dry-run"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--grounds", default="", help="number and date of the request or order")
    parser.add_argument("--by", default=getpass.getuser(), help="who does it")
    given = parser.parse_args()
    os.umask(0o077)
    try:
        settings = load()
    except OSError as error:
        print(f"Refused: {error.filename} cannot be read ({error.strerror}): run playbooks/site.yml.", file=sys.stderr)
        return 2
    try:
        with LOCK.open("a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            print(json.dumps(Restore(settings, given).run(), ensure_ascii=False))
    except BlockingIOError:
        print("Refused: another restore or rehearsal is at work on this host, wait for it.", file=sys.stderr)
        return 2
    except (Refused, BackupError) as refusal:
        print(f"Refused: {str(refusal).rstrip('.')}.", file=sys.stderr)
        return 2
    except (Failed, directory.Stopped) as failure:
        print(f"{str(failure).rstrip('.')}.", file=sys.stderr)
        return 1
    return 0
