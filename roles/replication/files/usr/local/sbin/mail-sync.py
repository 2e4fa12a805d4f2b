#!/usr/bin/python3
"""mail-sync: bring every change of a mailbox to the other host.

    mail-sync daemon         listen to Dovecot's events, and sync whom they name
    mail-sync sweep          compare both hosts cheaply and sync who differs
    mail-sync full           sync everybody message by message
    mail-sync user ADDRESS   sync one mailbox message by message
    mail-sync status         how far behind the other host is

All but `daemon` are done by the daemon; 0 when it succeeded, 1 when somebody could not be synced, 2 when it could not
be tried.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib" / "mail-sync"))

from changes import Change, Entry, backoff, changes, quantiles
from doveadm import Doveadm, Failed, Settings, Unreachable, load

RUN = Path("/run/mail-sync")
STATE = Path("/var/lib/mail-sync/state.json")
EVENTS = RUN / "events.sock"
CONTROL = RUN / "control.sock"
AGAIN = 0.25  # seconds between two syncs of one user, so that a burst of changes makes few
STALLED = 30  # seconds without progress after which doveadm gives a sync up
LAG_WINDOW = 300.0  # seconds of which the status tells the lag
COLLISION = 5.0  # seconds after a change that fell into a running sync until the user is synced message by message
RETURNED = 3600.0  # seconds for which the peer counts as just returned
DOUBTFUL = 900.0  # seconds before now, or before the peer went, since when a message may have come to lie there twice
RECHECK = 2.0  # seconds after which a difference that the sweep saw is looked at again
KEPT_SESSIONS = 20000  # told to the journal later, when it does not listen now
STATUS = "messages uidnext uidvalidity highestmodseq guid"
NOTHING = 0.0  # since when who is synced although nobody knows of a change has been waiting
USAGE = 64


def log(text: str) -> None:
    """Write a line to the journal."""
    print(text, flush=True)


def alarm(name: str, text: str) -> None:
    """Raise an alarm outside this unit's confinement: it may have to send mail."""
    log(f"alarm {name}: {text}")
    command = ["systemd-run", "--quiet", "--collect", "/usr/local/sbin/alarm", name, text]
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, check=True, timeout=20, stdin=subprocess.DEVNULL)


def is_holder() -> bool:
    """Tell whether this host holds the service address."""
    command = ["systemctl", "is-active", "--quiet", "holder.target"]
    return subprocess.run(command, check=False, timeout=20).returncode == 0


def notify(state: str, keep: socket.socket | None = None) -> None:
    """Tell systemd; `keep`: a connection that it holds for the next run of this daemon."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
            to.connect("\0" + address[1:] if address.startswith("@") else address)
            socket.send_fds(to, [state.encode()], [keep.fileno()] if keep else [])


def inherited() -> list[socket.socket]:
    """Return the sockets that systemd hands over: the events', and connections that a former run was reading."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    return [socket.socket(fileno=3 + number) for number in range(int(os.environ.get("LISTEN_FDS", "0")))]


def write(path: Path, content: Any, mode: int) -> None:
    """Replace a JSON file as a whole, readable to whom `mode` says."""
    partial = path.with_name(f".{path.name}")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(handle, "w", encoding="utf-8") as file:
        os.fchmod(handle, mode)
        json.dump(content, file)
        file.write("\n")
    os.replace(partial, path)


class Journal:
    """The message journal of this host, told which deliveries have reached the other one."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque(maxlen=KEPT_SESSIONS)
        self._lock = threading.Lock()

    def tell(self, user: str, sessions: list[str]) -> None:
        """Tell that the deliveries of `sessions` to `user` are on both hosts."""
        for start in range(0, len(sessions), 100):
            line = json.dumps({"user": user, "sessions": sessions[start : start + 100]})
            self._waiting.append(line.encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Send what waits; what cannot be sent now stays."""
        if not self._path or not self._waiting:
            return
        with self._lock, suppress(OSError), self._connected() as to:
            while self._waiting:
                to.sendall(self._waiting[0])
                self._waiting.popleft()

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        kind = socket.SOCK_DGRAM
        with suppress(OSError), socket.socket(socket.AF_UNIX, kind) as to:
            to.settimeout(5)
            try:
                to.connect(self._path)
            except OSError:
                kind = socket.SOCK_STREAM
            else:
                yield to
                return
        with socket.socket(socket.AF_UNIX, kind) as to:
            to.settimeout(5)
            to.connect(self._path)
            yield to


class Queue:
    """Who waits to be synced. Nobody is synced twice at once; whoever changes while he is, waits again."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.dirty: dict[str, Entry] = {}
        self.running: dict[str, Entry] = {}
        self.background: dict[str, None] = {}
        self.collided: dict[str, float] = {}
        self.paused = True
        self.stopped = False
        self.changed = True
        self._last: dict[str, float] = {}

    def mark(self, change: Change, full: bool = False) -> None:
        """Let a user wait, from now on or as before."""
        with self.condition:
            now = time.time()
            entry = self.dirty.get(change.user)
            if entry is None:
                entry = Entry(since=now, not_before=self._last.get(change.user, 0.0) + AGAIN)
                self.dirty[change.user] = entry
            entry.add(change)
            entry.full |= full
            if change.user in self.running:
                # A plain sync may take two sides for equal that changed equally often, and say nothing.
                self.collided[change.user] = now + COLLISION
            self.changed = True
            self.condition.notify()

    def take(self, background: bool) -> tuple[str, Entry]:
        """Return whose turn it is, when there is somebody; raises InterruptedError at the end of the program."""
        with self.condition:
            while True:
                if self.stopped:
                    raise InterruptedError
                wait = 5.0
                if not self.paused:
                    user = (
                        next((one for one in self.background if one not in self.running), None) if background else None
                    )
                    now = time.time()
                    if user is not None:
                        del self.background[user]
                        entry = self.dirty.pop(user, None) or Entry(since=NOTHING)
                        entry.full = True
                        return self._start(user, entry)
                    if not background:
                        for user, entry in self.dirty.items():
                            if user in self.running:
                                continue
                            if entry.not_before <= now:
                                del self.dirty[user]
                                return self._start(user, entry)
                            wait = min(wait, entry.not_before - now)
                self.condition.wait(wait)

    def _start(self, user: str, entry: Entry) -> tuple[str, Entry]:
        self.running[user] = entry
        self._last[user] = time.time()
        if len(self._last) > 50000:
            self._last.clear()
        return user, entry

    def finish(self, user: str, again_after: float | None) -> None:
        """End a user's turn; `again_after`: he failed, and is to be tried again after so many seconds."""
        with self.condition:
            entry = self.running.pop(user)
            if again_after is not None:
                later = self.dirty.pop(user, None)
                if later is not None:
                    entry.absorb(later)
                entry.since = entry.since or time.time()
                entry.attempts += 1
                entry.not_before = time.time() + again_after
                self.dirty[user] = entry
            self.changed = True
            self.condition.notify_all()

    def verify_collided(self) -> int:
        """Sync those message by message whose change fell into a sync, once they are quiet; return how many."""
        with self.condition:
            now = time.time()
            due = [
                user
                for user, when in self.collided.items()
                if when <= now and user not in self.dirty and user not in self.running
            ]
            for user in due:
                del self.collided[user]
                self.background[user] = None
            if due:
                self.condition.notify_all()
            return len(due)

    def unverified(self) -> int:
        """Return how many are still to be synced message by message."""
        with self.condition:
            return len(self.background.keys() | self.collided.keys())

    def busy(self, user: str) -> bool:
        """Tell whether a user waits or is being synced."""
        with self.condition:
            return user in self.dirty or user in self.running or user in self.background

    def pause(self, paused: bool) -> None:
        """Keep the workers from starting anything, or let them."""
        with self.condition:
            self.paused = paused
            self.condition.notify_all()

    def waiting(self) -> dict[str, float]:
        """Return since when each user has been waiting."""
        with self.condition:
            parts = (self.dirty, self.running)
            return {user: one.since for part in parts for user, one in part.items() if one.since}


class MailSync:
    """The daemon."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # -l: both hosts never sync one user against each other; -T: a peer that dies meanwhile is noticed.
        self.options = ("-l", str(settings.lock_wait), "-T", str(STALLED))
        self.queue = Queue()
        self.journal = Journal(settings.journal_socket)
        self.lags: deque[tuple[float, float]] = deque(maxlen=100000)
        self.user_lags: dict[str, tuple[float, float]] = {}
        self.counters = {"runs": 0, "failures": 0, "changed_during_sync": 0, "verified": 0, "events": 0, "healed": 0}
        self.last_sweep: dict[str, Any] | None = None
        self.last_full: dict[str, Any] | None = None
        self.away_since: float | None = None
        self.contact = 0.0
        self.absence = (0.0, 0.0)
        self.failed_users: dict[str, str] = {}
        self.settled: dict[str, tuple[Any, Any]] = {}
        self.jobs = threading.Lock()
        self.probe_now = threading.Event()
        self.heard = time.monotonic()
        self.alarmed = 0.0
        self.lock = threading.Lock()

    # --- state over restarts

    def restore(self) -> None:
        """Take up what a former run left."""
        try:
            kept = json.loads(STATE.read_text(encoding="utf-8"))
            self.queue.dirty = {user: Entry.from_json(row) for user, row in kept["dirty"].items()}
            self.contact = float(kept["contact"])
            self.counters["healed"] = int(kept["healed"])
            self.last_full = kept["last_full"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            log(f"{STATE} cannot be read ({error}): everybody is compared instead")

    def save(self) -> None:
        """Write what the next run has to know."""
        with self.queue.condition:
            self.queue.changed = False
            dirty = {user: entry.as_json() for user, entry in self.queue.running.items() if entry.since}
            for user, entry in self.queue.dirty.items():
                dirty[user] = entry.as_json()
        content = {
            "dirty": dirty,
            "contact": self.contact,
            "healed": self.counters["healed"],
            "last_full": self.last_full,
        }
        write(STATE, content, 0o600)

    # --- the peer

    def watch_peer(self) -> None:
        """See again and again whether the peer answers; while it does not, nobody is tried."""
        misses = 0
        while not self.queue.stopped:
            try:
                with Doveadm(self.settings, patience=5.0) as peer:
                    peer.open()
            except Unreachable as error:
                misses += 1
                if self.away_since is None:
                    self.away_since = time.time()
                    self.queue.pause(True)
                    log(f"the peer does not answer, changes wait: {error}")
            else:
                misses = 0
                self.returned()
            self.probe_now.clear()
            self.probe_now.wait(backoff(misses) if misses else self.settings.probe_every)

    def returned(self) -> None:
        """Go on, and make good what the time without the peer, or without this daemon, may have left."""
        before, self.contact = self.contact, time.time()
        if not self.queue.paused:
            return
        gap = self.contact - before
        self.absence = (before or self.contact, self.contact)
        self.away_since = None
        self.queue.pause(False)
        log("the peer answers")
        threading.Thread(target=self.rejoin, args=(gap >= self.settings.full_after,), daemon=True).start()

    def rejoin(self, full: bool) -> None:
        """After the peer was away, or this daemon: one of the two hosts looks for what was missed."""
        if not is_holder():
            return
        with suppress(Unreachable, Failed, OSError):
            if full:
                self.full()
            else:
                self.sweep()

    # --- syncing

    def work(self, background: bool) -> None:
        """Sync whose turn it is, for ever."""
        local = Doveadm()
        while True:
            try:
                user, entry = self.queue.take(background)
            except InterruptedError:
                return
            again: float | None = None
            try:
                again = self.sync(local, user, entry)
            except Failed as error:
                again = self.failed(user, entry, error)
            except Unreachable as error:
                local.close()
                log(f"{user}: {error}")
                again = backoff(entry.attempts + 1)
                self.probe_now.set()
            except Exception as error:  # a worker that dies is missed only when all are behind
                log(f"{user}: {type(error).__name__}: {error}")
                local.close()
                with self.lock:
                    self.failed_users[user] = str(error)
                again = backoff(entry.attempts + 1)
            self.queue.finish(user, again)

    def sync(self, local: Doveadm, user: str, entry: Entry) -> float | None:
        """Sync a user, once; return after how many seconds to do it again, None when nothing is left.

        What is in `entry` began before this; what comes now goes into another.
        """
        self.counters["runs"] += 1
        full = ["-f"] if entry.full else []
        scripts = {about: done for (topic, about), done in entry.deeds.items() if topic == "script"}
        if scripts:
            self.sync_scripts(local, user, scripts, full)
        else:
            local.call(user, "sync", *self.options, *full, self.settings.destination)
        if entry.full or entry.since <= self.absence[1]:
            self.undouble(local, user)
        self.deeds(local, user, entry)
        now = time.time()
        if entry.sessions:
            self.journal.tell(user, entry.sessions)
        with self.lock:
            self.failed_users.pop(user, None)
            if entry.since:
                self.lags.append((now, now - entry.since))
                self.user_lags[user] = (round(now - entry.since, 3), round(now, 3))
        return None

    def undouble(self, local: Doveadm, user: str) -> None:
        """Remove what has come to lie twice in a folder lately: of two messages with one GUID and size the later UID.

        Where both sides gave a UID to different messages, a sync numbers them anew; when a session meanwhile renames
        the file of one of them, Dovecot 2.4.1 keeps that as a message more. It is done on the side that holds the
        service address, whichever sees it. What a user copied within a folder before the time in doubt stays.
        """
        now = time.time()
        left, back = self.absence
        since = (left if now - back < RETURNED else now) - DOUBTFUL
        if not self.doubles(local, user, since):
            return
        with ExitStack() as stack:
            side = local if is_holder() else stack.enter_context(Doveadm(self.settings))
            for folder, uids in self.doubles(side, user, since).items():
                side.call(user, "expunge", "mailbox", folder, "uid", ",".join(uids))
                log(f"{user}: {len(uids)} messages lay twice in a folder after a sync; the second ones are gone")

    def doubles(self, side: Doveadm, user: str, since: float) -> dict[str, list[str]]:
        """Return the UIDs, by folder, of messages saved since then (Unix time) of which the folder has one already."""
        seen: set[tuple[str, ...]] = set()
        found: dict[str, list[str]] = {}
        query = ("mailbox guid size.physical uid", "savedsince", f"{since:.0f}")
        for *message, uid in sorted(side.rows(4, user, "fetch", *query), key=lambda row: int(row[-1])):
            if tuple(message) in seen and not message[0].startswith(self.settings.units_prefix):
                found.setdefault(message[0], []).append(uid)
            seen.add(tuple(message))
        return found

    def sync_scripts(self, local: Doveadm, user: str, scripts: Mapping[str, str], full: list[str]) -> None:
        """Sync a user whose Sieve scripts changed.

        What was deleted or renamed here is so at the peer first, or doveadm sync would bring the old script back. This
        side's state is what counts: the user may go on changing it meanwhile.
        """
        with Doveadm(self.settings) as peer:
            left = []
            for script, done in scripts.items():
                try:
                    if done.startswith("rename "):
                        peer.call(user, "sieve rename", script, done.removeprefix("rename "))
                    elif done == "delete":
                        peer.call(user, "sieve delete", script)
                except Failed as error:
                    if error.code != "NOTFOUND":  # it is the active one there, or the new name is taken
                        left.append(script)
            local.call(user, "sync", *self.options, *full, self.settings.destination)
            active = self.active_script(local, user)
            if self.active_script(peer, user) != active:
                peer.call(user, *(("sieve activate", active) if active else ("sieve deactivate",)))
            for script in left:
                for side in (peer, local):
                    try:
                        side.call(user, "sieve delete", script)
                    except Failed as error:
                        log(f"{user}: the Sieve script {script} is not deleted: {error}")

    def active_script(self, side: Doveadm, user: str) -> str:
        """Return the name of a user's active script, empty when none is."""
        return next((name for name, state in side.rows(2, user, "sieve list") if state), "")

    def deeds(self, local: Doveadm, user: str, entry: Entry) -> None:
        """Repeat at the peer what doveadm sync leaves out."""
        due = [(*key, done) for key, done in entry.deeds.items() if key[0] != "script"]
        if not due:
            return
        with Doveadm(self.settings) as peer:
            for topic, about, done in due:
                if topic == "subscription":
                    peer.call(user, f"mailbox {done}", about)
                elif topic == "seen":
                    self.seen(local, peer, user, about)
                entry.deeds.pop((topic, about), None)

    def seen(self, local: Doveadm, peer: Doveadm, user: str, mailbox: str) -> None:
        """Give a delegate at the peer the read marks that he has here in a unit's folder."""
        here, there = (
            {uid for _guid, uid in side.rows(2, user, "search", "mailbox", mailbox, "SEEN")} for side in (local, peer)
        )
        for command, uids in (("flags add", here - there), ("flags remove", there - here)):
            if uids:
                peer.call(user, command, "\\Seen", "mailbox", mailbox, "uid", ",".join(sorted(uids, key=int)))

    def failed(self, user: str, entry: Entry, error: Failed) -> float | None:
        """Return when to try again a user whose sync failed; None when there is no such user any more."""
        if error.code == "NOUSER":
            log(f"{user}: no such mailbox any more")
            with self.lock:
                self.failed_users.pop(user, None)
            return None
        if error.code == "CHANGED":
            # It went on changing meanwhile. That is no failure, but nothing is known to be over either.
            self.counters["changed_during_sync"] += 1
            return AGAIN
        self.counters["failures"] += 1
        with self.lock:
            self.failed_users[user] = str(error)
        self.probe_now.set()
        return backoff(entry.attempts + 1)

    # --- over everybody

    def statuses(self, side: Doveadm) -> dict[str, list[tuple[str, ...]]]:
        """Return the numbers of every folder of every user.

        One after the other, not by `-A`: where the work on the first users takes longer than Dovecot's patience, it
        gives up the list of the others (2,000 mailboxes were enough).
        """
        found: dict[str, list[tuple[str, ...]]] = {}
        for user in side.users():
            try:
                found[user.lower()] = self.numbers(side, user)
            except Failed as error:
                if error.code != "NOUSER":
                    self.queue.mark(Change(user))  # what fails on both sides would not differ; a sync tells why
        return found

    def numbers(self, side: Doveadm, user: str) -> list[tuple[str, ...]]:
        """Return the numbers of a user's own folders."""
        rows = side.rows(6, user, "mailbox status", STATUS, "*")
        return sorted(row for row in rows if not row[0].startswith(self.settings.units_prefix))

    def sweep(self) -> dict[str, Any]:
        """Sync who differs although nothing said so: the event was lost."""
        with self.jobs:
            began = time.time()
            with Doveadm() as local, Doveadm(self.settings) as peer:
                here, there = self.statuses(local), self.statuses(peer)
                suspects = [
                    user
                    for user in sorted(here.keys() | there.keys())
                    if self.differs(user, here.get(user), there.get(user)) and not self.queue.busy(user)
                ]
                if suspects:
                    time.sleep(RECHECK)
                lost = 0
                for user in suspects:
                    if self.queue.busy(user):
                        continue
                    try:
                        lost += self.heal(local, peer, user)
                    except Failed as error:
                        if error.code != "NOUSER":
                            self.queue.mark(Change(user))
            self.counters["healed"] += lost
            if lost:
                log(f"sweep: {lost} mailboxes differed although no event had said so; synced")
            self.last_sweep = {
                "at": round(began),
                "seconds": round(time.time() - began, 1),
                "users": len(here),
                "differed": len(suspects),
                "healed": lost,
            }
            return self.last_sweep

    def differs(self, user: str, here: Any, there: Any) -> bool:
        """Tell whether two sides' folders differ.

        The sides may number a change differently (highestmodseq) and hold the same: a pair that was left by a sync is
        the same as long as it stands.
        """
        return here != there and self.settled.get(user) != (here, there)

    def heal(self, local: Doveadm, peer: Doveadm, user: str) -> int:
        """Sync a user who still differs; 1 when something was brought over."""
        sides = [self.numbers(side, user) for side in (local, peer)]
        if not self.differs(user, *sides):
            return 0
        local.call(user, "sync", *self.options, self.settings.destination)
        self.undouble(local, user)
        after = [self.numbers(side, user) for side in (local, peer)]
        self.settled[user] = (after[0], after[1])
        return int(after != sides)

    def full(self) -> dict[str, Any]:
        """Sync everybody message by message; return when all have had their turn."""
        with self.jobs:
            began = time.time()
            with Doveadm() as local:
                users = local.users()
            with self.queue.condition:
                self.queue.background |= dict.fromkeys(users)
                self.queue.condition.notify_all()
            waiting = set(users)
            while waiting:
                time.sleep(0.2)
                waiting = {user for user in waiting if self.queue.busy(user)}
                with self.lock:
                    waiting -= self.failed_users.keys()
                if self.away_since is not None:
                    with self.queue.condition:
                        self.queue.background.clear()
                    raise Unreachable("the peer went away while everybody was being synced")
            with self.lock:
                failed = sorted(self.failed_users.keys() & set(users))
            self.last_full = {
                "at": round(began),
                "seconds": round(time.time() - began, 1),
                "users": len(users),
                "failed": len(failed),
            }
            log(f"full: {len(users)} mailboxes in {self.last_full['seconds']} s, {len(failed)} failed")
            return self.last_full

    def one(self, user: str) -> dict[str, Any]:
        """Sync one user message by message, and wait for it."""
        self.queue.mark(Change(user.lower()), full=True)
        deadline = time.monotonic() + 120
        while self.queue.busy(user.lower()):
            if time.monotonic() > deadline or user.lower() in self.failed_users:
                return {"failed": 1}
            time.sleep(0.05)
        return {"failed": 0}

    # --- what comes in

    def listen(self) -> None:
        """Read events and requests."""
        selector = selectors.DefaultSelector()
        handed = inherited()
        listeners = [one for one in handed if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)] or [
            bound(EVENTS)
        ]
        # Dovecot's exporter goes on writing where it wrote; were its connection closed, the next events would be lost.
        for connection in set(handed) - set(listeners):
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, ("events", bytearray()))
        for listener, kind in [(one, "events") for one in listeners] + [(bound(CONTROL), "control")]:
            listener.setblocking(False)
            selector.register(listener, selectors.EVENT_READ, (kind, None))
        while not self.queue.stopped:
            self.heard = time.monotonic()
            for key, _mask in selector.select(timeout=1.0):
                kind, rest = key.data
                if rest is None:
                    with suppress(OSError):
                        connection, _address = key.fileobj.accept()  # type: ignore[union-attr]
                        if kind == "control":
                            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()
                        else:
                            connection.setblocking(False)
                            notify("FDSTORE=1\nFDNAME=exporter", connection)
                            selector.register(connection, selectors.EVENT_READ, (kind, bytearray()))
                elif not self.read_events(key.fileobj, rest):  # type: ignore[arg-type]
                    selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]

    def read_events(self, connection: socket.socket, rest: bytearray) -> bool:
        """Take in what a connection of the exporter has; False when it is closed."""
        try:
            received = connection.recv(1 << 20)
        except BlockingIOError:
            return True
        except OSError:
            return False
        rest += received
        *lines, left = bytes(rest).split(b"\n")
        rest[:] = left
        for line in lines:
            if not line.strip():
                continue
            self.counters["events"] += 1
            try:
                found = changes(json.loads(line), self.settings.units_prefix)
            except (ValueError, AttributeError, TypeError) as error:
                log(f"an event is not understood: {error}")
                continue
            for change in found:
                self.queue.mark(change)
        return bool(received)

    def answer(self, connection: socket.socket) -> None:
        """Do what a command line asks for, and say how it went."""
        with connection, connection.makefile("rw", encoding="utf-8") as file:
            command, *arguments = json.loads(file.readline() or '[""]')
            work: dict[str, Callable[..., dict[str, Any]]] = {"sweep": self.sweep, "full": self.full, "user": self.one}
            try:
                if self.away_since is not None or self.queue.paused:
                    raise Unreachable("the peer does not answer")
                result = work[command](*arguments)
            except (Unreachable, Failed, OSError) as error:
                result = {"error": str(error)}
            except (KeyError, TypeError):
                result = {"error": "no such command"}
            with suppress(OSError):
                file.write(json.dumps(result) + "\n")

    # --- what is told

    def status(self) -> dict[str, Any]:
        """Return what /run/mail-sync/status.json says: numbers, and nobody's address."""
        now = time.time()
        waiting = self.queue.waiting()
        with self.lock:
            while self.lags and self.lags[0][0] < now - LAG_WINDOW:
                self.lags.popleft()
            lag = quantiles(value for _at, value in self.lags)
            failing = len(self.failed_users)
        return {
            "time": round(now, 3),
            "peer": "away" if self.away_since is not None else "unknown" if self.queue.paused else "answers",
            "away_s": round(now - self.away_since, 1) if self.away_since is not None else 0,
            "behind": len(waiting),
            "oldest_s": round(now - min(waiting.values()), 3) if waiting else 0,
            "failing": failing,
            "lag_s": {**lag, "window_s": LAG_WINDOW, "syncs": len(self.lags)},
            **{key: value for key, value in self.counters.items() if key != "healed"},
            "lost_triggers_healed": self.counters["healed"],
            "unverified": self.queue.unverified(),
            "last_sweep": self.last_sweep,
            "last_full": self.last_full,
        }

    def tick(self, count: int) -> None:
        """What is done every second."""
        self.counters["verified"] += self.queue.verify_collided()
        status = self.status()
        write(RUN / "status.json", status, 0o644)
        if self.queue.changed or count % 10 == 0:
            self.save()
        if count % 10 == 0:
            now = time.time()
            with self.lock:
                lags = dict(self.user_lags)
            behind = {user: round(now - since, 3) for user, since in self.queue.waiting().items()}
            rows = {"behind_s": behind, "lag_s": {user: lag for user, (lag, _at) in lags.items()}}
            write(RUN / "users.json", rows, 0o600)
            self.journal.flush()
        late = status["oldest_s"] > self.settings.alarm_after
        if late and time.time() - self.alarmed > 3600:
            self.alarmed = time.time()
            why = f"the peer has not answered for {status['away_s']:.0f} s" if status["away_s"] else "see its log"
            alarm(
                "mail-unsynced",
                f"{status['behind']} mailboxes are not yet on the other host, the oldest change for"
                f" {status['oldest_s']:.0f} s: {why} (journalctl -u mail-sync, /run/mail-sync/users.json)",
            )
        elif self.alarmed and not status["behind"]:
            self.alarmed = 0.0
            log("every mailbox is on the other host again")
        if time.monotonic() - self.heard < 30:
            notify("WATCHDOG=1")

    def run(self) -> None:
        """Run until SIGTERM."""
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        self.restore()
        jobs: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(self.listen, ()), (self.watch_peer, ())]
        jobs += [(self.work, (False,))] * self.settings.workers + [(self.work, (True,))] * self.settings.full_workers
        for job, arguments in jobs:
            threading.Thread(target=job, args=arguments, daemon=True).start()
        notify("READY=1")
        count = 0
        while not stop.wait(1.0):
            count += 1
            self.tick(count)
        with self.queue.condition:
            self.queue.stopped = True
            self.queue.condition.notify_all()
        self.save()


def bound(path: Path) -> socket.socket:
    """Return a listening socket for root alone."""
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(64)
    return listener


def ask(*request: str) -> int:
    """Let the daemon do something; print the answer."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as to:
            to.connect(str(CONTROL))
            to.sendall(json.dumps(request).encode() + b"\n")
            result = json.loads(to.makefile().readline())
    except (OSError, ValueError) as error:
        print(f"mail-sync does not answer ({error}): systemctl status mail-sync", file=sys.stderr)
        return 2
    if "error" in result:
        print(result["error"], file=sys.stderr)
        return 2
    print(", ".join(f"{key}: {value}" for key, value in result.items()))
    return int(bool(result.get("failed")))


def show() -> int:
    """Print the daemon's status."""
    try:
        status = json.loads((RUN / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"mail-sync has no status ({error}): systemctl status mail-sync", file=sys.stderr)
        return 2
    for key, value in status.items():
        print(f"{key}: {', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value}")
    return 0


def main() -> int:
    """Do what the command line says."""
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if command == "daemon" and not arguments:
        MailSync(load()).run()
        return 0
    if command == "status" and not arguments:
        return show()
    if (command in ("sweep", "full") and not arguments) or (command == "user" and len(arguments) == 1):
        return ask(command, *arguments)
    print(__doc__, file=sys.stderr)
    return USAGE


if __name__ == "__main__":
    sys.exit(main())
