#!/usr/bin/python3
"""Has Postfix send what it deferred because the mail store did not answer, as soon as the store answers again.

Postfix calls a store that it could not reach dead and lets mail wait for a minute and longer, although after a takeover
another host answers within seconds. A look at the folders of the deferred queue costs next to nothing; only while mail
waits for a store that was not reached is the store itself asked. Mail that waits for anything else is left alone.
"""

from __future__ import annotations

import argparse
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

LOOK = 1.0  # seconds between two looks
ANSWER = 2.0  # seconds that the store gets for its greeting
# Seconds between two flushes while deliveries go on failing although the store greets.
PAUSES = (0, 5, 15, 60)
# Postfix's own words for a delivery that got no answer: no route, no connection, a session that broke off, bad TLS.
UNREACHED = re.compile(r"^4\.[47]\.\d+$")


def waits_for_store(text: str, domains: Iterable[str]) -> bool:
    """Tell whether a file of the folder `defer` names a recipient of `domains` for whom the store was not reached.

    The file has lines NAME=VALUE, and an empty one after each recipient.

    >>> waits_for_store("<a@tinh.gov.vn>: timeout\\nrecipient=a@tinh.gov.vn\\nstatus=4.4.1\\n\\n", ["tinh.gov.vn"])
    True
    """
    endings = tuple(f"@{domain.lower()}" for domain in domains)
    for record in text.split("\n\n"):
        fields = dict(line.split("=", 1) for line in record.splitlines() if re.match(r"[a-z_]+=", line))
        if fields.get("recipient", "").lower().endswith(endings) and UNREACHED.match(fields.get("status", "")):
            return True
    return False


class Deferred:
    """What has come to the deferred queue of a spool folder since the last look."""

    def __init__(self, spool: Path) -> None:
        """Nothing has been looked at so far."""
        self.folder = spool / "defer"
        self.seen: dict[Path, tuple[int, set[str]]] = {}

    def news(self) -> list[Path]:
        """Return the files that are new, or written anew; folders that did not change are not read."""
        found = []
        for folder in sorted(path for path in self.folder.iterdir() if path.is_dir()):
            changed, known = self.seen.get(folder, (-1, set()))
            now = folder.stat().st_mtime_ns
            if now == changed:
                continue
            names = {entry.name for entry in folder.iterdir() if entry.is_file()}
            found += [folder / name for name in sorted(names - known)]
            self.seen[folder] = (now, names)
        return found

    def forget(self) -> None:
        """Have everything that waits count as new: what is sent and deferred again within one look keeps its name."""
        self.seen.clear()


def read(path: Path) -> str:
    """Return a file's text, nothing when Postfix has just taken it away."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def greets(host: str, port: int, authorities: str) -> bool:
    """Tell whether an LMTP server greets at `host` over TLS, with a certificate of that name."""
    context = ssl.create_default_context(cafile=authorities)
    try:
        with (
            socket.create_connection((host, port), ANSWER) as plain,
            context.wrap_socket(plain, server_hostname=host) as session,
        ):
            return session.recv(512).startswith(b"220")
    except OSError:
        return False


class Watch:
    """Decides at each look; `greets` asks the store, `flush` has Postfix send what waits for it."""

    def __init__(
        self, deferred: Deferred, domains: list[str], greets: Callable[[], bool], flush: Callable[[], None]
    ) -> None:
        """Mail that waits from before the start is met at the first look."""
        self.deferred, self.domains, self.greets, self.flush = deferred, domains, greets, flush
        self.waiting = False
        self.flushes = 0
        self.last_flush = float("-inf")

    def look(self, now: float) -> bool:
        """Look once, at `now` (seconds of a clock that only goes forward); tell whether Postfix was asked to send."""
        # A list, not any(): what is not read now is not new at the next look.
        news = [path for path in self.deferred.news() if waits_for_store(read(path), self.domains)]
        self.waiting = self.waiting or bool(news)
        if now - self.last_flush > 2 * PAUSES[-1]:
            self.flushes = 0
        pause = PAUSES[min(self.flushes, len(PAUSES) - 1)]
        if not self.waiting or now - self.last_flush < pause or not self.greets():
            return False
        self.waiting = False
        self.flush()
        self.deferred.forget()
        self.flushes, self.last_flush = self.flushes + 1, now
        return True


def main() -> int:
    """Look for ever."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spool", type=Path, default=Path("/var/spool/postfix"))
    parser.add_argument("--host", required=True, help="name of the mail store")
    parser.add_argument("--port", type=int, default=24)
    parser.add_argument("--authorities", required=True, help="file of the authorities of its certificate")
    parser.add_argument("domains", nargs="+")
    options = parser.parse_args()

    def flush() -> None:
        print("The mail store answers again: what waits for it is sent", flush=True)
        for domain in options.domains:
            subprocess.run(["/usr/sbin/postqueue", "-s", domain], check=True, timeout=60)

    watch = Watch(
        Deferred(options.spool),
        options.domains,
        lambda: greets(options.host, options.port, options.authorities),
        flush,
    )
    while True:
        watch.look(time.monotonic())
        time.sleep(LOOK)


if __name__ == "__main__":
    sys.exit(main())
