"""mail-backup: what of this host goes into the repository, and what came of it."""

from __future__ import annotations

import argparse
import fcntl
import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mail_backup import alarm, catalogue, ldap, status, store
from mail_backup.restic import BackupError, Restic
from mail_backup.settings import Settings, load

KINDS = ("mail", "directory", "host")
COMMIT = Path("/var/lib/hopthu/inventory.commit")
CLOCK_SECONDS = 300  # by how much this host's clock and the backup host's may differ
USERS_AT_ONCE = 200


def client(settings: Settings, lock_seconds: int | None = None) -> Restic:
    """Return the repository as this host uses it."""
    return Restic(
        settings.repository,
        cache=settings.cache,
        upload_kib=settings.upload_kib,
        download_kib=settings.download_kib,
        lock_seconds=settings.lock_seconds if lock_seconds is None else lock_seconds,
    )


def is_holder(settings: Settings) -> bool:
    """Tell whether this is the one host that backs up mail and directory."""
    return subprocess.run(["/usr/bin/systemctl", "is-active", "--quiet", settings.target], check=False).returncode == 0


def check_clock(settings: Settings) -> None:
    """Raise BackupError when this host's clock and the backup host's differ: one of them dates snapshots wrongly."""
    url = urlsplit(settings.repository.shown.removeprefix("rest:"))
    if url.scheme != "https":
        return
    trust = ssl.create_default_context(cafile=settings.repository.ca_file or None)
    connection = http.client.HTTPSConnection(url.hostname or "", url.port, timeout=10, context=trust)
    try:
        connection.request("HEAD", "/")
        told = connection.getresponse().headers.get("Date", "")
    except ssl.SSLError as error:
        raise BackupError("certificate", f"The backup server {url.netloc} is not trusted: {error}.") from None
    except (OSError, http.client.HTTPException) as error:
        shown = settings.repository.shown
        raise BackupError("gone", f"The backup repository {shown} is not there: {url.netloc}: {error}.") from None
    finally:
        connection.close()
    if told:
        ahead = time.time() - parsedate_to_datetime(told).timestamp()
        if abs(ahead) > CLOCK_SECONDS:
            where = "ahead of" if ahead > 0 else "behind"
            text = f"This host's clock is {abs(ahead) / 60:.0f} minutes {where} the backup host's: no snapshot is made"
            raise BackupError("clock", f"{text} until chronyd has set both right.")


def addresses() -> dict[str, str]:
    """Return the address of each mailbox that has one, by its id, the name of its home."""
    command = ["/usr/bin/doveadm", "user"]
    users = subprocess.run([*command, "*"], capture_output=True, text=True, check=True).stdout.split()
    found = {}
    for start in range(0, len(users), USERS_AT_ONCE):
        some = users[start : start + USERS_AT_ONCE]
        asked = subprocess.run([*command, "-f", "home", *some], capture_output=True, text=True, check=False)
        told = asked.stdout.split()
        if len(told) != len(some):  # one went away meanwhile, and its line is missing
            told = [
                subprocess.run(
                    [*command, "-f", "home", user], capture_output=True, text=True, check=False
                ).stdout.strip()
                for user in some
            ]
        found.update({os.path.basename(home): user for user, home in zip(some, told, strict=True) if home})
    return found


def inventory_commit() -> str:
    """Return the inventory's commit that this host was last set up from; empty when there was none."""
    try:
        return COMMIT.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


def take_mail(settings: Settings) -> dict[str, Any]:
    """Bring the link tree and its catalogues up to date; return the manifest."""
    tree = settings.tree
    for folder in (tree, tree / "mailboxes", tree / "catalogue"):
        folder.mkdir(mode=0o700, exist_ok=True)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    known = addresses()
    homes = store.homes(Path(settings.mail_root))
    messages = octets = taken = 0
    for identifier, home in sorted(homes.items()):
        target = tree / "mailboxes" / identifier
        try:
            seen = store.take(home, target)
        except FileNotFoundError:
            if home.exists():
                raise
            continue  # purged meanwhile
        path = tree / "catalogue" / f"{identifier}.jsonl"
        count, size = catalogue.write(path, identifier, known.get(identifier, ""), target, seen)
        messages, octets, taken = messages + count, octets + size, taken + 1
    # A purged mailbox is gone from here at once, and from the repository when its snapshots go.
    for path in (tree / "mailboxes").iterdir():
        if not (Path(settings.mail_root) / path.name).is_dir():
            shutil.rmtree(path)
    for path in (tree / "catalogue").iterdir():
        if not (tree / "mailboxes" / path.name.removesuffix(".jsonl")).is_dir():
            path.unlink()
    manifest = {
        "domain": settings.domain,
        "host": settings.host,
        "started": started,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "mailboxes": taken,
        "messages": messages,
        "octets": octets,
        "commit": inventory_commit(),
    }
    (tree / "manifest.json").write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    return manifest


def run_mail(settings: Settings, restic: Restic, progress: Callable[..., None]) -> dict[str, Any]:
    """Back up every mailbox; return what to note."""
    manifest = take_mail(settings)
    summary = restic.backup(
        "mail",
        settings.domain,
        ["mailboxes", "catalogue", "manifest.json"],
        cwd=settings.tree,
        unchanging=True,
        progress=lambda row: progress(done=row.get("bytes_done", 0), of=manifest["octets"]),
    )
    numbers = {name: manifest[name] for name in ("mailboxes", "messages", "octets")}
    return numbers | {"snapshot": summary["snapshot_id"], "added": summary["data_added"]}


def run_directory(settings: Settings, restic: Restic, progress: Callable[..., None]) -> dict[str, Any]:
    """Back up the directory; return what to note."""
    work = Path(settings.state, "work")
    counts = ldap.dump(work / "directory", settings.base_dn, settings.host)
    summary = restic.backup("directory", settings.domain, ["directory"], cwd=work)
    return {"entries": counts["data"], "snapshot": summary["snapshot_id"], "added": summary["data_added"]}


def tidy(settings: Settings) -> None:
    """Remove the link tree of a host that the service has left: nobody brings it up to date.

    What is deleted from the mailboxes, by purge too, would lie on in it. When the service comes back it is made anew.
    """
    if settings.mail_root and settings.tree.is_dir() and not is_holder(settings):
        shutil.rmtree(settings.tree)


def run_host(settings: Settings, restic: Restic, progress: Callable[..., None]) -> dict[str, Any]:
    """Back up this host's own files; return what to note."""
    tidy(settings)
    paths = [path for path in settings.files if os.path.exists(path)]
    summary = restic.backup("host", settings.host, paths)
    files = summary["total_files_processed"]
    return {"files": files, "snapshot": summary["snapshot_id"], "added": summary["data_added"]}


RUNS = {"mail": run_mail, "directory": run_directory, "host": run_host}


@contextmanager
def alone(settings: Settings) -> Iterator[None]:
    """Wait for another run on this host to end."""
    with Path(settings.state, ".run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(settings: Settings, kinds: list[str], restic: Restic) -> int:
    """Make one snapshot of each kind; return how many failed. Each failure is noted, printed and an alarm."""
    failed = 0
    for kind in kinds:
        began = time.time()

        def progress(kind: str = kind, began: float = began, **more: int) -> None:
            status.note(settings.state, kind, {"running": 1, "started": round(began), **more})

        progress()
        try:
            restic.reach()
            check_clock(settings)
            restic.unlock()
            entry: dict[str, Any] = RUNS[kind](settings, restic, progress)
            entry |= {"ok": 1, "good": round(began), "error": ""}
        except (BackupError, OSError, subprocess.CalledProcessError, ValueError, KeyError) as error:
            text = str(error)
            if isinstance(error, subprocess.CalledProcessError):
                said = error.stderr or b""
                text += f" {said if isinstance(said, str) else said.decode(errors='replace')}"
            elif not isinstance(error, BackupError):
                text = f"{type(error).__name__}: {text}"
            entry = {"ok": 0, "error": text.strip()}
            failed += 1
            print(f"{kind}: {text}", file=sys.stderr)
            alarm.lay(settings.state, f"backup-{kind}", f"No backup of kind {kind} was made on {settings.host}. {text}")
        entry |= {"running": 0, "started": round(began), "ended": round(time.time())}
        entry["seconds"] = round(time.time() - began, 1)
        status.note(settings.state, kind, entry)
        if entry["ok"]:
            shown = {name: value for name, value in entry.items() if name not in ("ok", "good", "error", "running")}
            print(f"{kind}: " + ", ".join(f"{name} {value}" for name, value in shown.items()))
    return failed


def due(settings: Settings, kinds: list[str], restic: Restic) -> list[str]:
    """Return the kinds whose newest snapshot, of whichever host, is older than half of what is an alarm."""
    now = datetime.now(UTC)
    found = []
    for kind in kinds:
        newest = max((one.time for one in restic.snapshots(kind) if one.time <= now), default=None)
        if newest is None or (now - newest).total_seconds() > settings.max_age_hours.get(kind, 24) * 1800:
            found.append(kind)
    return found


def main() -> int:
    """Entry point: 0 done, 1 a run failed, 2 refused."""
    parser = argparse.ArgumentParser(prog="mail-backup", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="make snapshots now")
    runs.add_argument("kinds", nargs="*", choices=[*KINDS, []], metavar="KIND", help="mail, directory, host")
    runs.add_argument("--if-due", action="store_true", help="only of what was not backed up lately, by either host")
    runs.add_argument("--lock-seconds", type=int, help="how long to wait for who holds the repository")
    commands.add_parser("status", help="what came of the last runs, as JSON")
    unlocks = commands.add_parser("unlock", help="remove locks that nobody holds any more")
    unlocks.add_argument("--all", action="store_true", help="every lock: no restic may run anywhere")
    commands.add_parser("alarms", help="raise the alarms that sandboxed runs have laid down")
    given = parser.parse_args()
    settings = load()
    os.umask(0o077)
    Path(settings.state).mkdir(mode=0o755, exist_ok=True)
    restic = client(settings, getattr(given, "lock_seconds", None))
    if given.command == "status":
        print(json.dumps(status.read(settings.state), ensure_ascii=False))
        return 0
    if given.command == "alarms":
        alarm.raise_all(settings.state)
        return 0
    if given.command == "unlock":
        try:
            restic.unlock(everything=given.all)
        except BackupError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    kinds = given.kinds or [kind for kind in KINDS if kind == "host" or settings.mail_root]
    held = [kind for kind in kinds if kind != "host"]
    if held and not is_holder(settings):
        print(f"Refused: {' and '.join(held)} are backed up by the host that holds the service.", file=sys.stderr)
        return 2
    with alone(settings):
        if given.if_due:
            try:
                kinds = due(settings, kinds, restic)
            except BackupError as error:
                print(error, file=sys.stderr)  # the runs themselves will say so too
        return 1 if run(settings, kinds, restic) else 0


if __name__ == "__main__":
    sys.exit(main())
