"""The daemon: a milter before the 250, the peer's records, Postfix's log, and notices of what is synced."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import Milter
from systemd import journal
from systemd.daemon import notify

from mail_journal import index as questions
from mail_journal.index import Index
from mail_journal.link import Away, Certificates, Link, Server
from mail_journal.records import HEADER, OURS, Outage, Place, new_id, pieces, read_line, scan
from mail_journal.store import Item, Store

MEMORY = 1 << 20
BATCH = 2000
# Records of an outage that are under way to the peer at a time, beside new mail.
BACKLOG = 8
# Sessions are remembered this long, for a notice that comes before the line of the log.
SESSION_SECONDS = 8 * 86400
# So many messages without a word in the log after so many seconds are an alarm.
SILENT, SILENCE = 3, 120
RUN = Path("/run/mail-journal")


def give_up(what: str, error: BaseException | None) -> None:
    """End at once: systemd starts the daemon again, and mail waits for it meanwhile."""
    logging.critical("%s: %s", what, error, exc_info=error)
    os._exit(1)


class Journal:
    """Everything that the daemon's parts share."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """settings: the contents of settings.json."""
        self.settings = settings
        self.host: str = settings["host"]
        self.folder = Path(settings["folder"])
        self.loop = asyncio.new_event_loop()
        self.index = Index(self.folder / "index.db", self.host, bool(settings["peer"]), self._committed)
        self.store = Store(
            self.folder / "segments",
            settings["reserve_octets"],
            lambda meta, place, end: self.index.post({"op": "entry", "meta": meta, "place": place, "end": end}),
        )
        self.spool = self.folder / "spool"
        shutil.rmtree(self.spool, ignore_errors=True)
        self.spool.mkdir(mode=0o700)
        self.link: Link | None = None
        self.news = asyncio.Event()
        self._told = 0
        self._alarms: dict[str, float] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.store_id = ""
        self.outage = Outage(settings["alarm_seconds"])
        self.failures: set[str] = set()
        self.caught_up = False
        # Whether the peer has told everything that it had to tell since it connected.
        self.peer_told = False

    def alarm(self, name: str, text: str) -> None:
        """Have an alarm raised, once a minute at most: a unit of root's takes the file."""
        if time.monotonic() - self._alarms.get(name, -60.0) < 60:
            return
        self._alarms[name] = time.monotonic()
        logging.error("alarm %s: %s", name, text)
        temporary = RUN / f"{name}.{threading.get_ident()}"
        with contextlib.suppress(OSError):
            temporary.write_text(text, encoding="utf-8")
            temporary.rename(RUN / "alarm" / name)

    def _committed(self) -> None:
        self.loop.call_soon_threadsafe(self.news.set)

    # --- a message -----------------------------------------------------------------------------

    def take(self, meta: dict[str, Any], content: Any, size: int) -> str:
        """Put a message on both hosts' disks: `both`, or `alone` without the peer. OSError: not even on this one's."""
        item = Item(meta, pieces(content, 0, size), size)
        sent: list[Future[None]] = []
        if self.link is not None:
            link = self.link
            item.written = lambda place: sent.append(link.send(meta, place))
        try:
            self.store.append(item).result()
        except OSError:
            # Never accepted: the peer's copy must not be brought back.
            self.index.post({"op": "done", "id": meta["id"]})
            raise
        if not sent:
            return "alone"
        try:
            sent[0].result()
        except Away:
            return "alone"
        self.index.post({"op": "both", "id": meta["id"]})
        return "both"

    # --- start ---------------------------------------------------------------------------------

    def recover(self) -> None:
        """Take into the index what was on disk and not yet in it when the daemon ended."""
        known = self.index.ask(lambda database: dict(map(tuple, database.execute("SELECT * FROM segments"))))
        for number in self.store.numbers():
            with self.store.path(number).open("rb") as file:
                for meta, offset, size, end in scan(file, known.get(number, 0)):
                    self.index.post({"op": "entry", "meta": meta, "place": Place(number, offset, size), "end": end})
        self.store_id = self.index.ask(lambda database: questions.note(database, "store"))

    def start(self) -> None:
        """Start every part but the milter."""
        self.index.start()
        self.recover()
        settings = self.settings
        listening = [self._sockets()]
        if settings["peer"]:
            certificates = Certificates(settings["ca"], settings["certificate"], settings["key"])
            self.link = Link(self.loop, settings["peer"], settings["port"], certificates, self.store.path)
            self.link.greeted = lambda store: self.index.post({"op": "peer_store", "store": store})
            server = Server(
                settings["peer"], certificates, lambda: self.store_id, self.spool, self._append, self._take_news
            )
            listening.append(server.listen(settings["addresses"], settings["port"]))
            self._for_ever(self.link.run())
            self._for_ever(self._hand_over())
        threading.Thread(target=self._run_loop, name="loop", daemon=True).start()
        for begin in listening:
            asyncio.run_coroutine_threadsafe(begin, self.loop).result(10)
        threading.Thread(target=self._follow, name="log", daemon=True).start()
        threading.Thread(target=self._keep_house, name="house", daemon=True).start()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def _for_ever(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a part of the loop that never ends; if it does, the daemon begins anew."""
        task = self.loop.create_task(work)
        self._tasks.append(task)
        task.add_done_callback(lambda ended: give_up("a part of the daemon ended", ended.exception()))

    # --- the peer --------------------------------------------------------------------------------

    def _append(self, meta: dict[str, Any], content: Any, size: int) -> Future[Place]:
        return self.store.append(Item(meta, content, size))

    async def _take_news(self, operations: list[dict[str, Any]]) -> None:
        self.index.post({"op": "batch", "operations": operations})
        await asyncio.to_thread(self.index.ask, lambda database: None)
        if operations[-1]["op"] == "told":
            self.peer_told = True

    async def _ask(self, question: Any) -> Any:
        return await asyncio.to_thread(self.index.ask, question)

    async def _hand_over(self) -> None:
        """Give the peer what it does not have yet: records of an outage, then news of states."""
        assert self.link is not None
        while True:
            if not self.link.is_up:
                await asyncio.sleep(0.5)
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait(), 5)
            self.news.clear()
            try:
                await self._hand_over_records()
                await self._hand_over_news()
            except Away as error:
                logging.warning("the peer does not take what it has not got yet: %s", error)
                await asyncio.sleep(1)

    async def _hand_over_records(self) -> None:
        link = self.link
        assert link is not None
        # Those of the last seconds are under way by themselves.
        before = new_id(time.time() - 10, bytes(10))
        query = (
            "SELECT id, meta, segment, offset, size FROM entries"
            " WHERE alone AND host = ? AND id < ? ORDER BY id LIMIT 200"
        )
        while rows := await self._ask(lambda database: database.execute(query, (self.host, before)).fetchall()):
            for start in range(0, len(rows), BACKLOG):
                await asyncio.gather(*(self._hand_over_record(*row) for row in rows[start : start + BACKLOG]))

    async def _hand_over_record(self, identifier: str, meta: str, segment: int, offset: int, size: int) -> None:
        assert self.link is not None
        await self.link.record(json.loads(meta), Place(segment, offset, size))
        state = await self._ask(lambda database: questions.state_of(database, identifier))
        if state is not None:
            await self.link.operations([state])
        self.index.post({"op": "both", "id": identifier})

    async def _hand_over_news(self) -> None:
        """After the news of an outage, each connection learns that this was all."""
        assert self.link is not None
        connection = self.link.number
        query = "SELECT seq, operation FROM outbox ORDER BY seq LIMIT ?"
        while rows := await self._ask(lambda database: database.execute(query, (BATCH,)).fetchall()):
            await self.link.operations([json.loads(row["operation"]) for row in rows])
            self.index.post({"op": "sent", "seq": rows[-1]["seq"]})
        if self._told != connection:
            await self.link.operations([{"op": "told"}])
            self._told = connection

    # --- sockets of this host ----------------------------------------------------------------------

    async def _sockets(self) -> None:
        for name, serve in (("control.sock", self._control), ("synced.sock", self._synced)):
            path = RUN / name
            await asyncio.start_unix_server(serve, path, limit=64 << 20)
            path.chmod(0o600)
        if self.settings["sync_group"]:
            shutil.chown(RUN / "synced.sock", group=self.settings["sync_group"])
            (RUN / "synced.sock").chmod(0o660)

    async def _synced(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Lines of mail-sync: {"user": …, "sessions": […]}; these deliveries are in the peer's store as well."""
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                try:
                    sessions = [str(session) for session in json.loads(line)["sessions"]]
                except (ValueError, KeyError, TypeError):
                    logging.warning("a notice of mail-sync is not understood")
                    continue
                self.index.post({"op": "synced", "sessions": sessions})
        writer.close()

    async def _control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One question of the command `mail-journal`, answered with one line."""
        request = json.loads(await reader.readline())
        if request["do"] == "entries":
            answer = await self._ask(lambda database: questions.entries(database, request["which"]))
        elif request["do"] == "apply":
            for operation in request["operations"]:
                self.index.post(operation)
            await self._ask(lambda database: None)
            answer = {}
        elif request["do"] == "catch_up":
            # Whoever acts on what is known wants the last lines of the log to be known.
            for _turn in range(100):
                if self.caught_up:
                    break
                await asyncio.sleep(0.1)
            await self._ask(lambda database: None)
            answer = {"caught_up": self.caught_up}
        else:
            answer = await asyncio.to_thread(self.status)
        with contextlib.suppress(OSError):
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()

    # --- the log -----------------------------------------------------------------------------------

    def _follow(self) -> None:
        try:
            self._follow_log()
        except Exception as error:
            give_up("the log cannot be followed", error)

    def _follow_log(self) -> None:
        reader = journal.Reader()
        for unit in self.settings["postfix_units"]:
            reader.add_match(_SYSTEMD_UNIT=unit)
        for identifier in sorted(OURS):
            reader.add_match(SYSLOG_IDENTIFIER=identifier)
        reader.add_disjunction()
        reader.add_match(_SYSTEMD_UNIT="dovecot.service")
        reader.add_match(SYSLOG_IDENTIFIER="dovecot")
        reader.add_disjunction()
        # The administrator deletes from the queue.
        reader.add_match(_UID="0")
        reader.add_match(SYSLOG_IDENTIFIER="postfix/postsuper")
        cursor = self.index.ask(lambda database: questions.note(database, "cursor"))
        if cursor:
            with contextlib.suppress(OSError):
                reader.seek_cursor(cursor)
                reader.get_next()
        else:
            # Not the tail: where nothing matches yet, the reader would stand behind all that comes.
            reader.seek_head()
        poll = select.poll()
        poll.register(reader, reader.get_events())
        while True:
            last = None
            for entry in reader:
                last = entry["__CURSOR"]
                text = entry.get("MESSAGE", "")
                operation = read_line(entry.get("SYSLOG_IDENTIFIER", ""), text) if isinstance(text, str) else None
                if operation is not None:
                    self.index.post(operation)
            if last is not None:
                self.index.post({"op": "note", "name": "cursor", "value": last})
            self.caught_up = True
            poll.poll(1000)
            reader.process()

    # --- housekeeping --------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What the status file says; no addresses, no subjects."""
        usage = shutil.disk_usage(self.folder)
        return {
            **self.index.ask(questions.counts),
            "peer": "none" if self.link is None else "up" if self.link.is_up else "down",
            "peer_told": self.peer_told,
            "peer_error": "" if self.link is None or self.link.is_up else self.link.last_error,
            "octets": self.store.octets(),
            "free_octets": usage.free,
            "time": time.time(),
        }

    def _keep_house(self) -> None:
        beat = 0
        while True:
            time.sleep(1)
            beat += 1
            try:
                self._watch(beat)
            except (OSError, sqlite3.Error, TimeoutError):
                logging.exception("housekeeping failed")

    def _watch(self, beat: int) -> None:
        if self.link is not None and self.outage.due(self.link.is_up, time.monotonic()):
            self.alarm(
                "journal-peer-down",
                f"{self.settings['peer']} does not take copies of accepted messages ({self.link.last_error}):"
                " what is accepted now stands on this host alone",
            )
        if beat % 5 == 1:
            # A loop that hangs is no life.
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop).result(10)
            notify("WATCHDOG=1")
            status = self.status()
            temporary = RUN / "status.json.new"
            temporary.write_text(json.dumps(status) + "\n", encoding="ascii")
            temporary.chmod(0o644)
            temporary.rename(RUN / "status.json")
            self._watch_room(status)
            self._watch_log()
        if beat % 600 == 60:
            self.purge()

    def _watch_room(self, status: dict[str, Any]) -> None:
        for name, is_bad, text in (
            ("journal-disk-full", status["free_octets"] < 2 * self.settings["reserve_octets"],
             f"{self.folder} has {status['free_octets'] >> 20} MiB left: mail will soon be deferred"),
            ("journal-too-big", status["octets"] > self.settings["max_octets"],
             f"the journal has {status['octets'] >> 20} MiB; settled entries go before their time"),
        ):  # fmt: skip
            if is_bad and name not in self.failures:
                self.alarm(name, text)
            (self.failures.add if is_bad else self.failures.discard)(name)

    def _watch_log(self) -> None:
        """Postfix logs each message as soon as it is queued: without that word, the log is not followed."""
        now = time.time()
        silent = self.index.ask(lambda database: questions.silent(database, self.host, now - 86400, now - SILENCE))
        if silent >= SILENT and "journal-log" not in self.failures:
            self.alarm(
                "journal-log",
                f"{silent} accepted messages have no line in Postfix's log: what became of them is not known"
                " (journalctl -u postfix.service; systemctl restart mail-journal.service)",
            )
        (self.failures.add if silent >= SILENT else self.failures.discard)("journal-log")

    def purge(self) -> None:
        """Delete what is older than it must be kept and, above the size limit, what is settled; oldest first."""
        settings = self.settings
        before = time.time() - settings["days"] * 86400
        gone = self.index.ask(lambda database: questions.old_segments(database, before))
        excess = self.store.octets() - settings["max_octets"]
        if excess > 0:
            for number in self.index.ask(questions.settled_segments):
                if excess <= 0:
                    break
                if number not in gone:
                    excess -= self.store.path(number).stat().st_size
                    gone.append(number)
        gone += [number for number in self.store.numbers() if not self.store.path(number).stat().st_size]
        for number in gone:
            if number != self.store.current:
                self.store.remove(number)
                self.index.post({"op": "forget", "segment": number})
        self.index.post({"op": "trim", "before": time.time() - SESSION_SECONDS})


class Message(Milter.Base):
    """One SMTP connection of Postfix's."""

    shared: Journal

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.client = ""
        self.content: Any = None
        self.size = 0

    def connect(self, hostname: str, family: int, address: Any) -> int:
        """Note who is connected."""
        self.client = f"{hostname} [{address[0] if isinstance(address, tuple) else address or ''}]"
        return int(Milter.CONTINUE)

    @Milter.decode("surrogateescape")
    def envfrom(self, sender: str, *_parameters: str) -> int:
        """Begin a message."""
        self._drop()
        self.sender = sender.strip("<>")
        self.recipients: list[str] = []
        self.known = 0
        self.login = self.getsymval("{auth_authen}") or ""
        self.content = tempfile.SpooledTemporaryFile(MEMORY, dir=self.shared.spool)  # noqa: SIM115
        self.size = 0
        return int(Milter.CONTINUE)

    @Milter.decode("surrogateescape")
    def envrcpt(self, recipient: str, *_parameters: str) -> int:
        """Note a recipient that Postfix has accepted."""
        self.recipients.append(recipient.strip("<>"))
        return int(Milter.CONTINUE)

    @Milter.noreply
    @Milter.decode("bytes")
    def header(self, name: str, value: bytes) -> int:
        """Keep a header; an id that came with the message is none of ours."""
        if name.lower() == HEADER.lower():
            self.known += 1
        else:
            self._add(name.encode() + b":" + value.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") + b"\r\n")
        return int(Milter.CONTINUE)

    @Milter.noreply
    def eoh(self) -> int:
        """The id stands last among the headers, as Postfix will put it."""
        now = time.time()
        self.meta = {"id": new_id(now, os.urandom(10)), "host": self.shared.host, "time": now}
        self._add(f"{HEADER}: {self.meta['id']}\r\n\r\n".encode())
        return int(Milter.CONTINUE)

    @Milter.noreply
    def body(self, piece: bytes) -> int:
        """Keep a piece of the body."""
        self._add(piece)
        return int(Milter.CONTINUE)

    def eom(self) -> int:
        """Put the message on both disks; only then Postfix says 250."""
        meta = self.meta | {
            "qid": self.getsymval("i") or "",
            "sender": self.sender,
            "envelope": self.recipients,
            "authenticated": bool(self.login),
            "client": self.client,
        }
        for number in range(self.known, 0, -1):
            self.chgheader(HEADER, number, "")
        self.addheader(HEADER, f" {meta['id']}")
        try:
            self.shared.take(meta, self.content, self.size)
        except OSError as error:
            self.shared.alarm("journal-not-writable", f"mail is deferred, for the journal cannot be written: {error}")
            self.setreply("451", "4.3.0", "The message cannot be stored safely now, try again later")
            return int(Milter.TEMPFAIL)
        finally:
            self._drop()
        return int(Milter.CONTINUE)

    def abort(self) -> int:
        """The message is not coming after all."""
        self._drop()
        return int(Milter.CONTINUE)

    def close(self) -> int:
        """The connection ends."""
        self._drop()
        return int(Milter.CONTINUE)

    def _add(self, octets: bytes) -> None:
        self.content.write(octets)
        self.size += len(octets)

    def _drop(self) -> None:
        if self.content is not None:
            self.content.close()
            self.content = None


def main(settings: dict[str, Any]) -> None:
    """Run until systemd says stop."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.umask(0o077)
    # A message passes through several threads; none waits long for those that read the log.
    sys.setswitchinterval(0.0005)
    (RUN / "alarm").mkdir(mode=0o700, exist_ok=True)
    threading.excepthook = lambda failure: give_up(f"{failure.thread} failed", failure.exc_value)
    shared = Journal(settings)
    shared.start()
    Message.shared = shared
    Milter.factory = Milter.header_leading_space(Message)
    Milter.set_flags(Milter.ADDHDRS | Milter.CHGHDRS)
    Milter.set_exception_policy(Milter.TEMPFAIL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    notify("READY=1")
    # libmilter makes the socket, which Postfix's user has to reach. The files lie in the daemon's own folder (0700).
    os.umask(0o111)
    Milter.runmilter("mail-journal", settings["milter"], 600)
    # libmilter has ended; threads that wait for the network need not be waited for.
    os._exit(0)
