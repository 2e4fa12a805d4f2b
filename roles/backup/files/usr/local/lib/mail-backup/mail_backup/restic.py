"""restic as the programs use it: its answers as Python values, its failures as one sentence each.

Read with restic 0.18.0: exit codes 10 (no repository), 11 (locked), 12 (wrong password); every request that fails is
tried again for 15 minutes, also where the server says that it is full (507).
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from mail_backup.settings import Repository

RESTIC = "/usr/bin/restic"
ANSWER_SECONDS = 10.0  # a repository that nobody answers for within this time is gone
FUTURE = timedelta(hours=1)  # a snapshot that is dated further ahead has a wrong clock behind it
# What restic or the server says, and what it means. The first that is found counts.
SIGNS = (
    ("full", re.compile(r"\(507\)|Insufficient Storage|no space left on device|disk quota exceeded", re.I)),
    ("locked", re.compile(r"repository is already locked|unable to create lock", re.I)),
    ("key", re.compile(r"wrong password or no key found", re.I)),
    ("refused", re.compile(r"\(40[13]\)|Unauthorized|Forbidden", re.I)),
    ("certificate", re.compile(r"x509: |tls: ", re.I)),
    (
        "damaged",
        re.compile(
            r"ciphertext verification failed|does not match|hash mismatch|invalid data returned|contains errors"
            r"|not found in (?:the )?index|load\w*\(<?[\w/]+>?.*\).*does not exist|unexpected EOF",
            re.I,
        ),
    ),
    (
        "gone",
        re.compile(r"connection refused|no route to host|i/o timeout|no such host|does not exist|network is", re.I),
    ),
)
CODES = {10: "gone", 11: "locked", 12: "key"}
SENTENCES = {
    "gone": "The backup repository {shown} is not there: {detail}",
    "locked": "The backup repository {shown} is locked by another run: {detail}",
    "key": "The backup repository {shown} cannot be opened with this host's key: it was made with another one",
    "refused": "The backup server does not allow this at {shown}: {detail}",
    "certificate": "The backup server of {shown} shows a certificate that is not trusted: {detail}",
    "full": "The backup repository {shown} is full: its host takes no more until space is made or its limit is raised",
    "damaged": "The backup repository {shown} is damaged: {detail}",
    "cut": "restic was cut off while it worked on {shown}: {detail}",
    "incomplete": "Some files could not be read into {shown}: {detail}",
    "failed": "restic failed on {shown}: {detail}",
}


class BackupError(Exception):
    """One sentence for the operator. `kind` is one of SENTENCES' names, or "none" where a snapshot is missing."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


@dataclass(frozen=True)
class Snapshot:
    """What restic knows of a snapshot."""

    id: str  # 64 hexadecimal digits
    time: datetime  # as the host that made it believed; aware, UTC
    host: str
    tags: tuple[str, ...]
    paths: tuple[str, ...]
    summary: dict[str, Any]

    @classmethod
    def read(cls, row: dict[str, Any]) -> Snapshot:
        """Make one of a row of `restic snapshots --json`."""
        return cls(
            row["id"],
            moment(row["time"]),
            row.get("hostname", ""),
            tuple(row.get("tags") or ()),
            tuple(row.get("paths") or ()),
            row.get("summary") or {},
        )


def moment(text: str) -> datetime:
    """Return the moment that restic writes (RFC 3339 with nanoseconds) in UTC."""
    text = re.sub(r"(\.\d{6})\d+", r"\1", text)
    return datetime.fromisoformat(text).astimezone(UTC)


def classify(code: int, output: str) -> str:
    """Return what a failed restic's exit code and output mean, one of SENTENCES' names."""
    if code in CODES:
        return CODES[code]
    if code < 0 or code == 130:
        found = next((kind for kind, pattern in SIGNS if pattern.search(output)), "cut")
        return found if found == "full" else "cut"
    if code == 3:
        return "incomplete"
    return next((kind for kind, pattern in SIGNS if pattern.search(output)), "failed")


def detail(output: str) -> str:
    """Return the line of restic's output that says most about a failure."""
    lines = []
    for line in output.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            lines.append(line.strip())
        else:
            if isinstance(row, dict) and row.get("message_type") in ("error", "exit_error"):
                lines.append(str(row.get("message") or (row.get("error") or {}).get("message") or "").strip())
    lines = [line for line in lines if line and not line.startswith(("Is there a repository", "rest:", "the `unlock`"))]
    wanted = [line for line in lines if line.startswith(("Fatal", "error", "pack ", "unable"))] or lines
    text = wanted[0] if wanted else "it says nothing"
    return text.removeprefix("Fatal: ")[:300]


def failure(repository: Repository, code: int, output: str) -> BackupError:
    """Return the sentence for a restic that ended with `code` (negative: a signal)."""
    kind = classify(code, output)
    what = f"signal {-code}" if kind == "cut" and code < 0 else detail(output)
    return BackupError(kind, SENTENCES[kind].format(shown=repository.shown, detail=what).rstrip(".") + ".")


def newest(snapshots: Sequence[Snapshot], at: datetime | None = None) -> Snapshot | None:
    """Return the newest of `snapshots` that is not later than `at` (aware); None when there is none."""
    chosen = [snapshot for snapshot in snapshots if at is None or snapshot.time <= at]
    return max(chosen, key=lambda snapshot: snapshot.time, default=None)


def dated_ahead(snapshots: Sequence[Snapshot], now: datetime) -> list[Snapshot]:
    """Return the snapshots that are dated more than FUTURE ahead of `now`: some clock is or was wrong."""
    return [snapshot for snapshot in snapshots if snapshot.time > now + FUTURE]


def _answers(host: str, port: int) -> OSError | None:
    """Return why nobody answers, None when somebody does. A server that is being restarted is waited for."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
        except OSError as error:
            if time.monotonic() > deadline or not isinstance(error, ConnectionRefusedError):
                return error
            time.sleep(1)
        else:
            return None


class Restic:
    """One repository. Every method raises BackupError when restic fails."""

    def __init__(
        self,
        repository: Repository,
        *,
        cache: str = "",
        upload_kib: int = 0,
        download_kib: int = 0,
        lock_seconds: int = 0,
    ) -> None:
        """`cache`: folder for restic's own cache, none when empty; limits in KiB/s, 0 is none."""
        self.repository = repository
        self._cache, self._lock_seconds = cache, lock_seconds
        self._limits = [("--limit-upload", upload_kib), ("--limit-download", download_kib)]

    def environment(self) -> dict[str, str]:
        """Return the environment of restic: names of files with secrets; no secret itself but an S3 key."""
        found = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/nonexistent",
            "RESTIC_PROGRESS_FPS": "0.2",
            "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
            "RESTIC_PASSWORD_FILE": self.repository.password_file,
        }
        if self.repository.location_file:
            found["RESTIC_REPOSITORY_FILE"] = self.repository.location_file
        else:
            found["RESTIC_REPOSITORY"] = self.repository.shown
        if self.repository.ca_file:
            found["RESTIC_CACERT"] = self.repository.ca_file
        if self.repository.environment_file:
            for line in Path(self.repository.environment_file).read_text(encoding="utf-8").splitlines():
                name, equals, value = line.partition("=")
                if equals and not line.startswith("#"):
                    found[name.strip()] = value.strip()
        return found

    def command(self, *arguments: str) -> list[str]:
        """Return restic's command line."""
        line = [RESTIC]
        for option in self.repository.options:
            line += ["--option", option]
        for name, value in self._limits:
            if value:
                line += [name, str(value)]
        line += ["--cache-dir", self._cache] if self._cache else ["--no-cache"]
        return [*line, *arguments]

    def reach(self) -> None:
        """Raise BackupError (gone) at once when nobody answers: restic itself would try for 15 minutes."""
        shown = self.repository.shown
        if shown.startswith("rest:"):
            url = urlsplit(shown.removeprefix("rest:"))
            error = _answers(url.hostname or "", url.port or 443)
            if error is not None:
                text = SENTENCES["gone"].format(shown=shown, detail=f"{url.netloc} does not answer ({error})")
                raise BackupError("gone", f"{text}.")
        elif shown.startswith("/") and not Path(shown, "config").exists():
            text = SENTENCES["gone"].format(shown=shown, detail="there is no such folder, or it is no repository")
            raise BackupError("gone", f"{text}.")

    @contextmanager
    def open(
        self, *arguments: str, cwd: str | Path | None = None, stdin: IO[bytes] | None = None, ok: Sequence[int] = (0,)
    ) -> Iterator[IO[bytes]]:
        """Run restic; yield its standard output, to be read to its end. Raises BackupError at the end of the block.

        A server that says it is full is not asked for 15 minutes: restic is told to stop.
        """
        if "init" not in arguments:
            self.reach()
        files = (self.repository.password_file, self.repository.location_file, *arguments)
        held = [int(path.rpartition("/")[2]) for path in files if path.startswith("/dev/fd/")]
        for handle in held:
            os.lseek(handle, 0, os.SEEK_SET)
        process = subprocess.Popen(
            self.command(*arguments),
            pass_fds=held,
            cwd=cwd,
            env=self.environment(),
            stdin=stdin or subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        said: list[str] = []
        listener = threading.Thread(target=self._listen, args=(process, said), daemon=True)
        listener.start()
        assert process.stdout is not None
        try:
            yield process.stdout
            process.stdout.close()
        except BaseException:
            process.terminate()
            raise
        finally:
            code = process.wait()
            listener.join()
        if code not in ok:
            raise failure(self.repository, code, "\n".join(said))

    @staticmethod
    def _listen(process: subprocess.Popen[bytes], said: list[str]) -> None:
        """Keep what restic says on standard error; end one that a full server makes wait."""
        assert process.stderr is not None
        with process.stderr as errors:
            for raw in errors:
                line = raw.decode(errors="replace").rstrip()
                if len(said) < 2000:
                    said.append(line)
                if SIGNS[0][1].search(line) and "retrying" in line:
                    process.terminate()

    def run(
        self, *arguments: str, cwd: str | Path | None = None, stdin: IO[bytes] | None = None, ok: Sequence[int] = (0,)
    ) -> str:
        """Run restic and return what it prints."""
        with self.open(*arguments, cwd=cwd, stdin=stdin, ok=ok) as output:
            return output.read().decode(errors="replace")

    def rows(
        self, *arguments: str, cwd: str | Path | None = None, ok: Sequence[int] = (0,)
    ) -> Iterator[dict[str, Any]]:
        """Run restic with --json and yield each object that it prints on a line of its own."""
        with self.open("--json", *arguments, cwd=cwd, ok=ok) as output:
            for line in output:
                if line.startswith(b"{"):
                    yield json.loads(line)

    # --- reading; without a lock, so that a full or locked repository can still be restored from

    def snapshots(self, tag: str = "", host: str = "") -> list[Snapshot]:
        """Return the snapshots with a tag (mail, directory, host) and a --host value, oldest first."""
        chosen = (["--tag", tag] if tag else []) + (["--host", host] if host else [])
        rows = json.loads(self.run("snapshots", "--no-lock", "--json", *chosen) or "[]")
        return sorted(map(Snapshot.read, rows or []), key=lambda snapshot: snapshot.time)

    def snapshot(self, tag: str, host: str = "", at: datetime | None = None) -> Snapshot:
        """Return the newest snapshot with a tag that is not later than `at` (aware).

        Those that are dated in the future are passed over. Raises BackupError, kind "none", when there is none.
        """
        now = datetime.now(UTC)
        every = self.snapshots(tag, host)
        wrong = {snapshot.id for snapshot in dated_ahead(every, now)}
        found = newest([snapshot for snapshot in every if snapshot.id not in wrong], at)
        if found is None:
            when = f" of {at.isoformat(sep=' ', timespec='minutes')} or before" if at else ""
            first = f"; the oldest is of {every[0].time.isoformat(sep=' ', timespec='minutes')}" if every else ""
            raise BackupError("none", f"There is no snapshot of kind {tag}{when} in {self.repository.shown}{first}.")
        return found

    def files(self, snapshot: str, path: str = "/", *, recursive: bool = True) -> Iterator[dict[str, Any]]:
        """Yield restic's nodes (name, type, path, size, mtime, …) of a snapshot, at and below `path`.

        `snapshot`: its id. Paths are those in the snapshot and begin with /.
        """
        deep = ["--recursive"] if recursive else []
        for row in self.rows("ls", "--no-lock", *deep, snapshot, path):
            if row.get("message_type", row.get("struct_type")) == "node" or row.get("struct_type") == "node":
                yield row

    @contextmanager
    def dump(self, snapshot: str, path: str) -> Iterator[IO[bytes]]:
        """Yield the content of one file of a snapshot, to be read to its end."""
        with self.open("dump", "--no-lock", snapshot, path) as output:
            yield output

    def restore(
        self, snapshot: str, target: str | Path, *, below: str = "/", include: Sequence[str] = (), verify: bool = False
    ) -> dict[str, Any]:
        """Write what a snapshot has below the folder `below` to the folder `target`; return restic's summary.

        `include`: patterns (restic's, relative to `below`), everything when empty. Owner, mode and times are kept.
        `verify`: read back what was written.
        """
        chosen = [part for pattern in include for part in ("--include", pattern)]
        chosen += ["--verify"] if verify else []
        summary: dict[str, Any] = {}
        source = snapshot if below == "/" else f"{snapshot}:{below}"
        for row in self.rows("restore", "--no-lock", source, "--target", str(target), *chosen):
            if row.get("message_type") == "summary":
                summary = row
        return summary

    # --- writing

    def backup(
        self,
        tag: str,
        host: str,
        paths: Sequence[str],
        *,
        cwd: str | Path | None = None,
        unchanging: bool = False,
        dated: str = "",
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Make a snapshot of `paths`, which stand in it as given, relative to `cwd`; return restic's summary.

        `unchanging`: a file with the same name, size and time of change is the same (messages of a Maildir), whatever
        its ctime, which a link more or less sets. `dated`: another time than now (YYYY-MM-DD HH:MM:SS). `progress` is
        told restic's status (bytes_done, files_done, seconds_elapsed) every few seconds.
        """
        more = ["--ignore-ctime"] if unchanging else []
        more += ["--time", dated] if dated else []
        more += ["--retry-lock", f"{self._lock_seconds}s"] if self._lock_seconds else []
        summary: dict[str, Any] = {}
        chosen = ["--tag", tag, "--host", host, "--group-by", "host,tags", "--no-scan"]
        for row in self.rows("backup", *chosen, *more, "--", *paths, cwd=cwd):
            if row.get("message_type") == "summary":
                summary = row
            elif row.get("message_type") == "status" and progress is not None:
                progress(row)
        return summary

    def unlock(self, *, everything: bool = False) -> None:
        """Remove locks that nobody holds any more, or every lock: the operator knows that no restic runs."""
        self.run("unlock", *(["--remove-all"] if everything else []))

    def locks(self) -> list[dict[str, Any]]:
        """Return the repository's locks: time, exclusive, hostname, username, pid."""
        names = self.run("list", "locks", "--no-lock").split()
        return [json.loads(self.run("cat", "lock", name, "--no-lock")) for name in names]
