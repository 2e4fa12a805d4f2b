"""backup-server: the host that keeps the repository. What the hosts that are backed up cannot do is done here."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import functools
import json
import os
import pwd
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mail_backup import alarm, status
from mail_backup.restic import BackupError, Restic, Snapshot, dated_ahead, moment
from mail_backup.settings import Repository, Server, load_server

REST_SERVER = "/usr/bin/restic-rest-server"
ARRIVAL = timedelta(days=3)  # how long after its date a snapshot may come in: the first backup of a province takes long
DAY = 86400


def become(server: Server) -> Server:
    """Become the server's user, who owns the repository; what root alone may read goes along in memory.

    So the server, which the network reaches, has neither the key nor the ways to the further repositories.
    """
    account = pwd.getpwnam(server.user)

    def held(repository: Repository) -> Repository:
        paths = (repository.password_file, repository.location_file, repository.environment_file)
        password, location, environment = (in_memory(path) if path else "" for path in paths)
        return dataclasses.replace(
            repository, password_file=password, location_file=location, environment_file=environment
        )

    ours = dataclasses.replace(server, repository=held(server.repository), further=tuple(map(held, server.further)))
    os.setgroups([account.pw_gid])
    os.setgid(account.pw_gid)
    os.setuid(account.pw_uid)
    return ours


def in_memory(path: str) -> str:
    """Return the name of a copy of a file that only this process and those that it starts can read."""
    handle = os.memfd_create("held")
    os.write(handle, Path(path).read_bytes())
    return f"/dev/fd/{handle}"


def local(server: Server, repository: Repository | None = None) -> Restic:
    """Return a repository, this host's own unless told otherwise."""
    return Restic(
        repository or server.repository, cache=server.cache, upload_kib=server.upload_kib if repository else 0
    )


def arrivals(folder: str | Path) -> dict[str, datetime]:
    """Return when each snapshot, by its id, was written here, by this host's own clock."""
    return {
        path.name: datetime.fromtimestamp(path.stat().st_mtime, UTC)
        for path in Path(folder, "snapshots").iterdir()
        if path.is_file()
    }


def wrong_dates(snapshots: Iterable[Snapshot], arrived: dict[str, datetime], now: datetime) -> list[str]:
    """Return a sentence for each snapshot whose date cannot be true.

    One that is dated ahead would let good ones expire, for restic counts from the newest. One that is dated back would
    take the place of the good one of its day. A host whose clock is wrong makes such, and so does an intruder.
    """
    every = list(snapshots)
    ahead = {snapshot.id for snapshot in dated_ahead(every, now)}
    found = []
    for snapshot in every:
        came = arrived.get(snapshot.id)
        shown = f"Snapshot {snapshot.id[:8]} ({'+'.join(snapshot.tags)}, {snapshot.host}) is dated"
        if snapshot.id in ahead or (came and snapshot.time > came + timedelta(hours=1)):
            found.append(f"{shown} {snapshot.time:%Y-%m-%d %H:%M} UTC, in the future when it was made")
        elif came and came - snapshot.time > ARRIVAL:
            found.append(f"{shown} {snapshot.time:%Y-%m-%d %H:%M} UTC and came in {came:%Y-%m-%d %H:%M} UTC")
    return found


def late(server: Server, snapshots: Iterable[Snapshot], now: datetime) -> list[str]:
    """Return a sentence for each kind and host whose newest snapshot is missing or too old."""
    newest: dict[tuple[str, str], datetime] = {}
    for snapshot in snapshots:
        for tag in snapshot.tags:
            if snapshot.time <= now + timedelta(hours=1):
                key = tag, snapshot.host
                newest[key] = max(snapshot.time, newest.get(key, snapshot.time))
    found = []
    for tag, hosts in server.tags.items():
        limit = server.max_age_hours.get(tag, 24)
        for host in hosts:
            last = newest.get((tag, host))
            if last is None:
                found.append(f"There is no backup of kind {tag} of {host}")
            elif (now - last).total_seconds() > limit * 3600:
                hours = (now - last).total_seconds() / 3600
                found.append(f"The last backup of kind {tag} of {host} is {hours:.0f} hours old, {limit:g} are allowed")
    return found


def old_locks(locks: Iterable[dict[str, Any]], hours: float, now: datetime) -> list[str]:
    """Return a sentence for each lock that is older than `hours`."""
    found = []
    for lock in locks:
        age = (now - moment(lock["time"])).total_seconds() / 3600
        if age > hours:
            found.append(
                f"The repository is locked for {age:.0f} hours by {lock.get('hostname')}, process {lock.get('pid')}"
            )
    return found


def keep_arguments(keep: dict[str, str]) -> list[str]:
    """Return restic's --keep options; raises ValueError for a kind that counts snapshots instead of time."""
    if not keep or any(name != "within" and not name.startswith("within-") for name in keep):
        raise ValueError(
            f"backup_keep may have kinds of within only, and one at least, not {', '.join(keep) or 'none'}"
        )
    return [part for name, duration in sorted(keep.items()) for part in (f"--keep-{name}", duration)]


def octets_of(folder: str | Path) -> int:
    """Return the octets of all files below a folder."""
    return sum(
        os.lstat(os.path.join(parent, name)).st_size for parent, _folders, names in os.walk(folder) for name in names
    )


def free_octets(folder: str | Path) -> int:
    """Return how many octets the folder's disk has left."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def limit(used: int, free: int, reserve: int, most: int) -> int:
    """Return how many octets the repository may have: what leaves `reserve` free, and `most` unless that is 0."""
    room = max(used + free - reserve, 1)
    return min(room, most) if most else room


def serve(server: Server, arguments: list[str]) -> None:
    """Become the REST server, told how large the repository may grow; measured anew at each start."""
    data = str(Path(server.folder).parent)
    used, free = octets_of(data), free_octets(data)
    most = limit(used, free, server.reserve_octets, server.max_octets)
    print(f"the repository has {used >> 20} MiB and may have {most >> 20} MiB", flush=True)
    os.execv(REST_SERVER, [REST_SERVER, "--path", data, "--max-size", str(most), *arguments])


def look(server: Server) -> list[tuple[str, str]]:
    """Return what is wrong with the repository as (alarm, sentence); notes the numbers."""
    now = datetime.now(UTC)
    found: list[tuple[str, str]] = []
    restic = local(server)
    try:
        snapshots = restic.snapshots()
        locks = restic.locks()
        arrived = arrivals(server.folder)
    except BackupError as error:
        status.note(server.state, "look", {"ok": 0, "ended": round(time.time()), "error": str(error)})
        return [(f"backup-{error.kind}", str(error))]
    found += [("backup-clock", text) for text in wrong_dates(snapshots, arrived, now)]
    found += [("backup-late", text) for text in late(server, snapshots, now)]
    found += [("backup-locked", text) for text in old_locks(locks, server.stale_hours, now)]
    used, free = octets_of(server.folder), free_octets(server.folder)
    room = limit(used, free, server.reserve_octets, server.max_octets) - used
    if room <= 0:
        found.append(
            ("backup-full", "The backup repository is full: nothing more is taken. Make space or raise its limit")
        )
    elif room < used * 0.05:
        found.append(
            ("backup-full", f"The backup repository has room for {room >> 20} MiB only: make space or raise its limit")
        )
    for kind, days in (("check", 3), ("prune", 10), *((f"copy-{one.name}", 3) for one in server.further)):
        entry = status.read(server.state).get(kind, {})
        if entry and time.time() - entry.get("good", entry.get("first", time.time())) > days * DAY:
            found.append(("backup-late", f"The last good {kind} of the backup repository is more than {days} days ago"))
    entry = {
        "ok": int(not found),
        "ended": round(time.time()),
        "snapshots": len(snapshots),
        "octets": used,
        "room": room,
    }
    entry |= {"newest": round(max((one.time.timestamp() for one in snapshots if one.time <= now), default=0))}
    status.note(server.state, "look", entry | {"error": "; ".join(text for _name, text in found)})
    return found


def init(server: Server) -> str:
    """Make the repository; return what was done. Refuses where there was one: its disk may not be mounted."""
    mark = Path(server.state, "made")
    if Path(server.folder, "config").exists():
        return "the repository is there"
    if mark.exists():
        text = f"The backup repository {server.folder} is gone: mount its disk. To begin anew without any of the old"
        raise BackupError("gone", f"{text} snapshots, remove {mark} first.")
    local(server).run("init")
    mark.touch()
    return "the repository was made"


def check(server: Server) -> str:
    """Read the repository's structure and one part of its packs, another each day; return what was done.

    Without a lock, so that nobody waits; what looks damaged is read again when nobody writes.
    """
    part, _slash, parts = server.check_part.partition("/")
    if parts:
        part = f"{int(time.time() // DAY) % int(parts) + 1}/{parts}"
    chosen = [f"--read-data-subset={part}"]
    try:
        local(server).run("check", "--no-lock", *chosen)
    except BackupError as error:
        if error.kind not in ("damaged", "failed"):
            raise
        restic = local(server)
        restic.unlock()
        restic.run("check", "--retry-lock", "30m", *chosen)
    return f"no error in the structure and part {part} of the packs"


def prune(server: Server) -> str:
    """Remove old snapshots and what only they had; return what was done. Refuses where a date cannot be true."""
    restic = local(server)
    wrong = wrong_dates(restic.snapshots(), arrivals(server.folder), datetime.now(UTC))
    if wrong:
        text = "Old snapshots are not removed while a snapshot's date cannot be true, for good ones would go: "
        raise BackupError("clock", f"{text}{'; '.join(wrong)}. docs/backup.md says what to do.")
    restic.unlock()
    keep = keep_arguments(server.keep)
    before = len(restic.snapshots())
    restic.run("forget", "--retry-lock", "1h", "--group-by", "host,tags", *keep, "--prune", "--quiet")
    after = len(restic.snapshots())
    return f"{before - after} of {before} snapshots removed"


def forget(server: Server, ids: list[str]) -> str:
    """Remove the snapshots with these ids, or beginnings of ids, whose date cannot be true; return what was done."""
    restic = local(server)
    every = restic.snapshots()
    told = " ".join(wrong_dates(every, arrivals(server.folder), datetime.now(UTC)))
    chosen = [one.id for one in every if one.id.startswith(tuple(ids)) and f"Snapshot {one.id[:8]} " in told]
    if len(chosen) != len(ids):
        raise ValueError("Only snapshots whose date cannot be true are removed by hand; backup-look names them")
    restic.run("forget", "--retry-lock", "1h", "--quiet", *chosen)
    return f"{len(chosen)} snapshots removed"


def copy(server: Server, repository: Repository) -> str:
    """Copy to a further repository what it has not; return what was done."""
    source, target = local(server), local(server, repository)
    origin = ["--from-repo", server.folder, "--from-password-file", source.repository.password_file]
    try:
        before = len(target.snapshots())
    except BackupError as error:
        if error.kind != "gone" or "does not answer" in str(error):
            raise
        # The same cuts, so that what both have is stored once.
        target.run("init", *origin, "--copy-chunker-params")
        before = 0
    target.unlock()
    target.run("copy", *origin, "--quiet")
    if repository.pruned:
        target.run("forget", "--group-by", "host,tags", *keep_arguments(server.keep), "--prune", "--quiet")
    return f"{before} snapshots before, {len(target.snapshots())} now"


def act(server: Server, kind: str, what: Callable[[], str]) -> bool:
    """Do something, one at a time; note it, and lay down an alarm when it fails. Return whether it was well."""
    began = time.time()
    with Path(server.state, ".act.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first = status.read(server.state).get(kind, {}).get("first", round(began))
        try:
            text = what()
            entry: dict[str, Any] = {"ok": 1, "good": round(began), "result": text, "error": ""}
            print(f"{kind}: {text}")
        except (BackupError, OSError, ValueError) as error:
            entry = {"ok": 0, "error": str(error)}
            print(f"{kind}: {error}", file=sys.stderr)
            name = error.kind if isinstance(error, BackupError) else "failed"
            alarm.lay(server.state, f"backup-{name}", f"backup-{kind}: {error}")
    entry |= {"first": first, "ended": round(time.time()), "seconds": round(time.time() - began, 1)}
    status.note(server.state, kind, entry)
    return bool(entry["ok"])


def main() -> int:
    """Entry point: 0 well, 1 something is wrong, 2 refused."""
    parser = argparse.ArgumentParser(prog="backup-server", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("init", "make the repository, once"),
        ("look", "see whether all is there, in time and with true dates"),
        ("check", "read a part of the repository"),
        ("prune", "remove what is old"),
        ("copy", "copy to the further repositories"),
        ("forget", "remove snapshots whose date cannot be true, by their ids"),
        ("status", "what came of it, as JSON"),
        ("alarms", "raise the alarms that were laid down"),
    ):
        command = commands.add_parser(name, help=text)
        if name == "forget":
            command.add_argument("ids", nargs="+", metavar="ID")
    if sys.argv[1:2] == ["serve"]:  # its unit's: what follows is the server's own
        os.umask(0o077)
        serve(load_server(), sys.argv[2:])
    given = parser.parse_args()
    server = load_server()
    os.umask(0o077)
    if given.command == "status":
        print(json.dumps(status.read(server.state), ensure_ascii=False))
        return 0
    if given.command == "alarms":
        alarm.raise_all(server.state)
        return 0
    if os.geteuid():
        print("Refused: only root has the key.", file=sys.stderr)
        return 2
    server = become(server)
    if given.command == "look":
        wrong = look(server)
        for name in {name for name, _text in wrong}:
            text = ". ".join(sentence.rstrip(".") for other, sentence in wrong if other == name)
            print(f"{name}: {text}", file=sys.stderr)
            alarm.lay(server.state, name, f"{text}.")
        return int(bool(wrong))
    if given.command == "copy":
        done = [act(server, f"copy-{one.name}", functools.partial(copy, server, one)) for one in server.further]
        return int(not all(done))
    if given.command == "forget":
        return int(not act(server, "forget", functools.partial(forget, server, given.ids)))
    what = {"init": init, "check": check, "prune": prune}[given.command]
    return int(not act(server, given.command, functools.partial(what, server)))


if __name__ == "__main__":
    sys.exit(main())
