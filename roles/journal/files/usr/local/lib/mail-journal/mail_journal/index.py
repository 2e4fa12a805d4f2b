"""What is known of each entry, in SQLite: one thread applies operations and commits once a second."""

from __future__ import annotations

import json
import logging
import queue
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from mail_journal.records import Place, further, settled

SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS entries (
  id TEXT PRIMARY KEY, host TEXT NOT NULL, qid TEXT NOT NULL, time REAL NOT NULL, meta TEXT NOT NULL,
  segment INTEGER NOT NULL, offset INTEGER NOT NULL, size INTEGER NOT NULL,
  alone INTEGER NOT NULL, expected INTEGER NOT NULL DEFAULT 0, removed INTEGER NOT NULL DEFAULT 0,
  done INTEGER NOT NULL DEFAULT 0, settled INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS entries_qid ON entries (host, qid);
CREATE INDEX IF NOT EXISTS entries_segment ON entries (segment);
CREATE INDEX IF NOT EXISTS entries_alone ON entries (id) WHERE alone;
CREATE INDEX IF NOT EXISTS entries_open ON entries (id) WHERE NOT settled;
CREATE TABLE IF NOT EXISTS recipients (
  id TEXT NOT NULL, recipient TEXT NOT NULL, original TEXT NOT NULL, state TEXT NOT NULL, session TEXT NOT NULL,
  PRIMARY KEY (id, recipient, original)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS recipients_session ON recipients (session);
CREATE TABLE IF NOT EXISTS sessions (
  session TEXT PRIMARY KEY, synced INTEGER NOT NULL DEFAULT 0, here INTEGER NOT NULL DEFAULT 0, time REAL NOT NULL
  ) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outbox (seq INTEGER PRIMARY KEY AUTOINCREMENT, operation TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS segments (segment INTEGER PRIMARY KEY, indexed INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""
# Operations that the peer's copy of an entry needs as well; an outage's worth of them, then the oldest go.
SHARED = frozenset({"queued", "removed", "recipient", "synced", "done"})
OUTBOX_LIMIT = 2_000_000
COMMIT_SECONDS = 0.5


class Index:
    """The thread that owns the database; everything else hands it operations (`post`) or questions (`ask`)."""

    def __init__(self, path: Path, host: str, has_peer: bool, committed: Callable[[], None] = lambda: None) -> None:
        """host: this host's name; committed: called after each commit that brought news for the peer."""
        self.host, self.has_peer = host, has_peer
        self._committed = committed
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._database.row_factory = sqlite3.Row
        self._database.executescript(SCHEMA)
        self._database.execute("INSERT OR IGNORE INTO notes VALUES ('store', ?)", (str(uuid.uuid4()),))
        self._touched: set[str] = set()
        self._has_news = False

    def start(self) -> None:
        """Begin to work on what is posted."""
        threading.Thread(target=self._work_for_ever, name="index", daemon=True).start()

    def post(self, operation: dict[str, Any]) -> None:
        """Apply an operation soon."""
        self._queue.put(operation)

    def ask(self, question: Callable[[sqlite3.Connection], Any], timeout: float = 60.0) -> Any:
        """Run a question in the database's thread, after everything posted before, and return its answer."""
        answer: Future[Any] = Future()
        self._queue.put((question, answer))
        return answer.result(timeout)

    def _work_for_ever(self) -> None:
        while True:
            item = self._queue.get()
            deadline = time.monotonic() + COMMIT_SECONDS
            answers: list[tuple[Future[Any], Any, Exception | None]] = []
            self._database.execute("BEGIN")
            while item is not None:
                self._work(item, answers)
                # Whoever asks waits for the commit.
                wait = 0.0 if answers else deadline - time.monotonic()
                try:
                    item = self._queue.get(timeout=wait) if wait > 0 else None
                except queue.Empty:
                    item = None
            self._settle()
            self._database.execute("COMMIT")
            for answer, value, error in answers:
                if error is None:
                    answer.set_result(value)
                else:
                    answer.set_exception(error)
            if self._has_news:
                self._has_news = False
                self._committed()

    def _work(self, item: Any, answers: list[tuple[Future[Any], Any, Exception | None]]) -> None:
        if isinstance(item, dict):
            try:
                self.apply(item)
            except (KeyError, TypeError, ValueError, sqlite3.Error):
                logging.exception("operation %s could not be applied", item.get("op"))
            return
        question, answer = item
        try:
            self._settle()
            answers.append((answer, question(self._database), None))
        except Exception as error:  # the asker gets it
            answers.append((answer, None, error))

    # --- operations --------------------------------------------------------------------------

    def apply(self, operation: dict[str, Any], *, from_peer: bool = False) -> None:
        """Apply one operation; those that the peer needs too go into the outbox."""
        kind = operation["op"]
        if kind == "batch":
            for part in operation["operations"]:
                if part.get("op") in SHARED | {"state"}:
                    self.apply(part, from_peer=True)
            return
        getattr(self, f"_apply_{kind}")(operation)
        if kind in SHARED and self.has_peer and not from_peer:
            shared = operation if kind in ("synced", "done") or "id" in operation else {"host": self.host} | operation
            self._database.execute("INSERT INTO outbox (operation) VALUES (?)", (json.dumps(shared),))
            self._has_news = True

    def _find(self, operation: dict[str, Any]) -> str | None:
        """Id of the entry that an operation is about; None when it is not known (any more)."""
        if "id" in operation:
            where, values = "id = ?", (operation["id"],)
        else:
            where, values = "host = ? AND qid = ?", (operation.get("host", self.host), operation["qid"])  # type: ignore[assignment]
        row = self._database.execute(
            f"SELECT id FROM entries WHERE {where} ORDER BY time DESC LIMIT 1", values
        ).fetchone()
        if row is None:
            return None
        self._touched.add(row["id"])
        return str(row["id"])

    def _apply_entry(self, operation: dict[str, Any]) -> None:
        meta, place = operation["meta"], operation["place"]
        own = meta["host"] == self.host
        self._database.execute(
            "INSERT INTO entries (id, host, qid, time, meta, segment, offset, size, alone) VALUES (?,?,?,?,?,?,?,?,?)"
            " ON CONFLICT (id) DO NOTHING",
            (meta["id"], meta["host"], meta["qid"], meta["time"], json.dumps(meta), *place, int(own and self.has_peer)),
        )
        self._database.execute(
            "INSERT INTO segments VALUES (?, ?) ON CONFLICT (segment) DO UPDATE SET indexed = excluded.indexed",
            (place.segment, operation["end"]),
        )

    def _apply_both(self, operation: dict[str, Any]) -> None:
        self._database.execute("UPDATE entries SET alone = 0 WHERE id = ?", (operation["id"],))

    def _apply_queued(self, operation: dict[str, Any]) -> None:
        entry = self._find(operation)
        self._database.execute(
            "UPDATE entries SET expected = max(expected, ?) WHERE id = ?", (operation["recipients"], entry)
        )

    def _apply_removed(self, operation: dict[str, Any]) -> None:
        self._database.execute("UPDATE entries SET removed = 1 WHERE id = ?", (self._find(operation),))

    def _apply_done(self, operation: dict[str, Any]) -> None:
        self._database.execute("UPDATE entries SET done = 1 WHERE id = ?", (self._find(operation),))

    def _apply_recipient(self, operation: dict[str, Any]) -> None:
        entry = self._find(operation)
        if entry is None:
            return
        recipient, state, session = operation["recipient"], operation["state"], operation.get("session", "")
        known = dict(
            self._database.execute(
                "SELECT original, state FROM recipients WHERE id = ? AND recipient = ?", (entry, recipient)
            ).fetchall()
        )
        if session and state == "delivered":
            synced = self._database.execute("SELECT synced FROM sessions WHERE session = ?", (session,)).fetchone()
            if synced is not None and synced["synced"]:
                state = "safe"
        # Postfix counts a recipient once for each address that it stands for; who says no such address means all.
        for original in [operation["original"]] if "original" in operation else known or [""]:
            self._database.execute(
                "INSERT INTO recipients VALUES (:entry, :recipient, :original, :state, :session) ON CONFLICT DO UPDATE"
                " SET state = :state, session = CASE WHEN :session = '' THEN session ELSE :session END",
                {
                    "entry": entry,
                    "recipient": recipient,
                    "original": original,
                    "state": further(known.get(original), state),
                    "session": session,
                },
            )

    def _apply_state(self, operation: dict[str, Any]) -> None:
        """All that is known of an entry that is handed over later."""
        entry = self._find(operation)
        if entry is None:
            return
        self._database.execute(
            "UPDATE entries SET expected = max(expected, ?), removed = max(removed, ?), done = max(done, ?)"
            " WHERE id = ?",
            (operation["expected"], operation["removed"], operation["done"], entry),
        )
        names = ("recipient", "original", "state", "session")
        for values in operation["recipients"]:
            self._apply_recipient({"id": entry, **dict(zip(names, values, strict=True))})

    def _apply_synced(self, operation: dict[str, Any]) -> None:
        for session in operation["sessions"]:
            self._session(session, "synced")
            rows = self._database.execute("SELECT id FROM recipients WHERE session = ?", (session,)).fetchall()
            self._touched.update(row["id"] for row in rows)
            self._database.execute(
                "UPDATE recipients SET state = 'safe' WHERE session = ? AND state = 'delivered'", (session,)
            )

    def _apply_here(self, operation: dict[str, Any]) -> None:
        self._session(operation["session"], "here")

    def _session(self, session: str, column: str) -> None:
        self._database.execute(
            f"INSERT INTO sessions (session, {column}, time) VALUES (?, 1, ?)"
            f" ON CONFLICT (session) DO UPDATE SET {column} = 1",
            (session, time.time()),
        )

    def _apply_note(self, operation: dict[str, Any]) -> None:
        self._database.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (operation["name"], operation["value"]))

    def _apply_peer_store(self, operation: dict[str, Any]) -> None:
        """The peer named its store: another than before has nothing yet of what is still open."""
        before = note(self._database, "peer_store")
        if before not in ("", operation["store"]):
            self._database.execute("UPDATE entries SET alone = 1 WHERE NOT settled AND host = ?", (self.host,))
        self._apply_note({"name": "peer_store", "value": operation["store"]})

    def _apply_sent(self, operation: dict[str, Any]) -> None:
        self._database.execute("DELETE FROM outbox WHERE seq <= ?", (operation["seq"],))

    def _apply_forget(self, operation: dict[str, Any]) -> None:
        """A segment was deleted."""
        segment = (operation["segment"],)
        self._database.execute("DELETE FROM recipients WHERE id IN (SELECT id FROM entries WHERE segment = ?)", segment)
        self._database.execute("DELETE FROM entries WHERE segment = ?", segment)
        self._database.execute("DELETE FROM segments WHERE segment = ?", segment)

    def _apply_trim(self, operation: dict[str, Any]) -> None:
        self._database.execute("DELETE FROM sessions WHERE time < ?", (operation["before"],))
        self._database.execute("DELETE FROM outbox WHERE seq <= (SELECT max(seq) FROM outbox) - ?", (OUTBOX_LIMIT,))

    def _settle(self) -> None:
        for identifier in self._touched:
            row = self._database.execute("SELECT * FROM entries WHERE id = ?", (identifier,)).fetchone()
            states = [
                state["state"]
                for state in self._database.execute("SELECT state FROM recipients WHERE id = ?", (identifier,))
            ]
            self._database.execute(
                "UPDATE entries SET settled = ? WHERE id = ?", (int(settled(dict(row), states)), identifier)
            )
        self._touched.clear()


# --- questions -------------------------------------------------------------------------------


def note(database: sqlite3.Connection, name: str) -> str:
    """A note by name; empty when there is none."""
    row = database.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
    return str(row["value"]) if row else ""


def entries(database: sqlite3.Connection, which: str) -> list[dict[str, Any]]:
    """Entries with their recipients, {recipient: {state, here}}, oldest first.

    which: all, alone, unsettled, or done: dealt with while the queue file was there.
    """
    where = {"all": "1", "alone": "alone", "unsettled": "NOT settled", "done": "done AND NOT removed"}[which]
    found = []
    for row in database.execute(f"SELECT * FROM entries WHERE {where} ORDER BY id"):
        entry = {key: row[key] for key in ("alone", "expected", "removed", "done", "settled")}
        entry |= json.loads(row["meta"]) | {"place": [row["segment"], row["offset"], row["size"]]}
        entry["recipients"] = {}
        for line in database.execute(
            "SELECT recipient, state, coalesce(here, 0) AS here FROM recipients LEFT JOIN sessions USING (session)"
            " WHERE id = ?",
            (row["id"],),
        ):
            known = entry["recipients"].setdefault(line["recipient"], {"state": line["state"], "here": False})
            known["state"] = further(known["state"], line["state"])
            known["here"] |= bool(line["here"])
        found.append(entry)
    return found


def state_of(database: sqlite3.Connection, identifier: str) -> dict[str, Any] | None:
    """All that is known of an entry, as an operation for the peer."""
    row = database.execute("SELECT expected, removed, done FROM entries WHERE id = ?", (identifier,)).fetchone()
    if row is None:
        return None
    known = database.execute("SELECT recipient, original, state, session FROM recipients WHERE id = ?", (identifier,))
    return {"op": "state", "id": identifier, **dict(row), "recipients": [list(line) for line in known]}


def place_of(database: sqlite3.Connection, identifier: str) -> Place | None:
    """Where an entry's content stands."""
    row = database.execute("SELECT segment, offset, size FROM entries WHERE id = ?", (identifier,)).fetchone()
    return Place(*row) if row else None


def counts(database: sqlite3.Connection) -> dict[str, int]:
    """Numbers for the status file."""
    one = "SELECT count(*) FROM "
    return {
        "alone": database.execute(one + "entries WHERE alone").fetchone()[0],
        "unsettled": database.execute(one + "entries WHERE NOT settled").fetchone()[0],
        "outbox": database.execute(one + "outbox").fetchone()[0],
    }


def silent(database: sqlite3.Connection, host: str, since: float, until: float) -> int:
    """How many messages that `host` accepted between two times Postfix's log has said nothing of."""
    query = "SELECT count(*) FROM entries WHERE NOT settled AND host = ? AND time BETWEEN ? AND ? AND NOT expected"
    return int(database.execute(query + " AND NOT removed AND NOT done", (host, since, until)).fetchone()[0])


def old_segments(database: sqlite3.Connection, before: float) -> list[int]:
    """Segments that are known and hold nothing younger than `before`."""
    rows = database.execute("SELECT segment FROM entries GROUP BY segment HAVING max(time) < ? ORDER BY 1", (before,))
    return [row[0] for row in rows]


def settled_segments(database: sqlite3.Connection) -> list[int]:
    """Segments in which everything is settled and on both hosts, oldest first."""
    rows = database.execute("SELECT segment FROM entries GROUP BY segment HAVING min(settled AND NOT alone) ORDER BY 1")
    return [row[0] for row in rows]
