"""Messages per second into Dovecot through Postfix: Debian's stock LMTP service settings against the kit's.

    HOPTHU_LAB=build/lab.json .venv/bin/python bench/delivery.py     without HOPTHU_LAB: on a lab of its own

Two variants of /etc/dovecot/dovecot.conf on one host, alternating, three times each: as the kit wrote it, and
without restart_request_count and process_min_avail in `service lmtp`, so with Dovecot's own defaults. Nothing else
differs. Each time 600 messages of 10 KiB to all mailboxes are put into Postfix's hold queue by SMTP, then released
at once: intake is not measured. The time runs from the release to the last `status=sent` of the LMTP client, and
the messages are counted in the mailboxes afterwards. Configuration, queue and mailboxes are put back.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import smtplib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import Any

import measure
from measure import BenchError, Row

MESSAGES = 600
OCTETS = 10 * 1024
CONNECTIONS = 10
ROUNDS = 3
TIMEOUT = 300  # seconds for all deliveries of one round
GOAL = {"min": 1.5}
# A correspondent and a client that the lab's DNS outside knows: strangers without names are put off by the filter.
SENDER = "bench@chua-khai-bao.example"
CLIENT = "client.ben-ngoai.example"
HEADER = "X-Hopthu-Bench"
DOVECOT = "/etc/dovecot/dovecot.conf"
POSTFIX = "/etc/postfix/main.cf"
KIT_SETTINGS = re.compile(r"^\s*(restart_request_count|process_min_avail)\s*=.*\n", re.MULTILINE)
LMTP_SERVICE = re.compile(r"^service lmtp \{\n(?:.*\n)*?^\}\n", re.MULTILINE)
QUEUED = re.compile(r"queued as (\w+)")
DELIVERY = re.compile(r"^(\d+\.\d+) .*?postfix/lmtp\[\d+\]: (\w+): .*\bstatus=(\w+)", re.MULTILINE)


def stock(configuration: str) -> str:
    """dovecot.conf without the kit's own settings of `service lmtp`; BenchError when it has none."""
    service = LMTP_SERVICE.search(configuration)
    if service is None or len(KIT_SETTINGS.findall(service[0])) != 2:
        raise BenchError(
            f"{DOVECOT} does not hold the two settings of `service lmtp` that are measured: run playbooks/site.yml."
        )
    return configuration.replace(service[0], KIT_SETTINGS.sub("", service[0]))


def message(recipient: str, run: str) -> bytes:
    """One message of OCTETS octets (RFC 5322), all of its content random."""
    head = f"From: {SENDER}\r\nTo: {recipient}\r\nSubject: {run}\r\n{HEADER}: {run}\r\n"
    head += f"Date: {formatdate()}\r\nMessage-ID: {make_msgid(domain='thu-nghiem.example')}\r\n\r\n"
    line = base64.b64encode(os.urandom(57)).decode() + "\r\n"
    return (head + line * OCTETS)[: OCTETS - 2].encode().rstrip(b"\r\n") + b"\r\n"


def send(address: str, recipients: Sequence[str], run: str, make: Callable[[str, str], bytes] = message) -> list[str]:
    """Send a message that `make` makes to each of `recipients` on port 25 over one connection; the queue ids."""
    ids = []
    with smtplib.SMTP(address, 25, timeout=60) as smtp:
        smtp.ehlo(CLIENT)
        for recipient in recipients:
            smtp.mail(SENDER)
            code, answer = smtp.rcpt(recipient)
            if code == 250:
                code, answer = smtp.data(make(recipient, run))
            queued = QUEUED.search(answer.decode(errors="replace"))
            if code != 250 or queued is None:
                raise BenchError(f"{address} does not take mail to {recipient}: {code} {answer.decode()}")
            ids.append(queued[1])
    return ids


class Host:
    """The host whose Postfix delivers into its own Dovecot."""

    def __init__(self, lab: dict[str, Any]) -> None:
        """Choose it from lab.json; BenchError when no host has both."""
        both = [host for host in lab["hosts"].values() if {"mx", "mailstore"} <= set(host["groups"])]
        if not both:
            raise BenchError("No host of this lab is in both groups mx and mailstore: measure on another lab.")
        self.container = str(both[0]["container"])
        self.address = str(both[0]["addresses"]["v4"])
        self.mailboxes = sorted(json.loads(Path(lab["credentials_file"]).read_text(encoding="utf-8")))

    def do(self, *command: str, stdin: str = "") -> str:
        """Run a command on the host."""
        return measure.inside(self.container, command, stdin)

    def write(self, path: str, text: str) -> None:
        """Replace a file's content, leaving its owner and mode."""
        self.do("sh", "-c", 'cat > "$1"', "sh", path, stdin=text)

    def use(self, configuration: str, restart_request_count: str) -> None:
        """Run Dovecot with `configuration`; BenchError when the setting did not become what it should."""
        self.write(DOVECOT, configuration)
        self.do("systemctl", "reload", "dovecot.service")
        found = self.do("doveconf", "-h", "service/lmtp/restart_request_count").strip()
        if found != restart_request_count:
            raise BenchError(f"{DOVECOT}: restart_request_count is {found}, not {restart_request_count}.")

    def sent(self, since: str) -> dict[str, float]:
        """Queue id → time of its delivery, for all since the time `since` (s since the epoch)."""
        log = self.do("journalctl", "-q", "-t", "postfix/lmtp", "--since", f"@{since}", "-o", "short-unix")
        return {queue_id: float(at) for at, queue_id, status in DELIVERY.findall(log) if status == "sent"}

    def count(self, run: str) -> int:
        """How many messages of a run the mailboxes hold."""
        return len(self.do("doveadm", "search", "-A", "mailbox", "INBOX", "header", HEADER, run).splitlines())

    def expunge(self, run: str) -> None:
        """Remove the messages of a run from the mailboxes."""
        self.do("doveadm", "expunge", "-A", "mailbox", "INBOX", "header", HEADER, run)

    def empty_queue(self) -> None:
        """Remove what SENDER has in the queue: something only after a round that failed."""
        queue = [json.loads(line) for line in self.do("postqueue", "-j").splitlines()]
        left = [entry["queue_id"] for entry in queue if entry["sender"] == SENDER]
        self.do("postsuper", "-d", "-", stdin="\n".join(left))


@contextmanager
def prepared(host: Host) -> Iterator[str]:
    """Have Postfix hold what SENDER sends, give dovecot.conf, and put both files back whatever happens."""
    dovecot, postfix = host.do("cat", DOVECOT), host.do("cat", POSTFIX)
    restrictions = host.do("postconf", "-h", "smtpd_sender_restrictions").strip()
    try:
        hold = f"check_sender_access inline:{{{SENDER}=HOLD}}"
        host.do("postconf", "-e", f"smtpd_sender_restrictions={hold}, {restrictions}")
        yield dovecot
    finally:
        for path, text in ((DOVECOT, dovecot), (POSTFIX, postfix)):
            host.write(path, text)
        host.do("systemctl", "reload", "dovecot.service", "postfix.service")


def deliver(host: Host, messages: int) -> float:
    """Queue `messages`, release them together, wait for the last; return messages per second."""
    # The queue manager forgets what it learned about the destination: every round begins alike.
    host.do("systemctl", "reload", "postfix.service")
    time.sleep(3)
    run = f"bench-{secrets.token_hex(8)}"
    recipients = [host.mailboxes[i % len(host.mailboxes)] for i in range(messages)]
    ids: list[str] = []
    try:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            parts = [recipients[i::CONNECTIONS] for i in range(CONNECTIONS)]
            for some in pool.map(lambda part: send(host.address, part, run), parts):
                ids += some
        time.sleep(2)
        release = "date +%s.%N; postsuper -H - >/dev/null 2>&1 && postqueue -f"
        started = host.do("sh", "-c", release, stdin="\n".join(ids)).strip()
        deadline = time.monotonic() + TIMEOUT
        while len(times := {i: at for i, at in host.sent(started).items() if i in ids}) < messages:
            if time.monotonic() > deadline:
                raise BenchError(
                    f"{len(times)} of {messages} messages were delivered in {TIMEOUT} s: "
                    f"podman exec {host.container} postqueue -p"
                )
            time.sleep(1)
        if (arrived := host.count(run)) != messages:
            raise BenchError(f"{messages} messages were sent and the mailboxes hold {arrived}.")
        return messages / (max(times.values()) - float(started))
    finally:
        host.empty_queue()
        host.expunge(run)


def main() -> int:
    """Measure, print the table, write build/bench/delivery.json; exit code 1 when the goal is missed."""
    rates: dict[str, list[float]] = {"stock": [], "kit": []}
    with measure.lab() as lab:
        host = Host(lab)
        with prepared(host) as kit:
            kit_value = host.do("doveconf", "-h", "service/lmtp/restart_request_count").strip()
            variants: dict[str, Callable[[], None]] = {
                "stock": lambda: host.use(stock(kit), "1"),
                "kit": lambda: host.use(kit, kit_value),
            }
            # First deliveries make folders: not measured.
            deliver(host, len(host.mailboxes))
            for name in list(variants) * ROUNDS:
                variants[name]()
                rates[name].append(deliver(host, MESSAGES))
                print(f"{name:<6} {rates[name][-1]:6.1f} messages/s", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = [
        Row(
            "through Postfix into Dovecot, the kit's LMTP service settings",
            medians["kit"],
            "messages/s",
            medians["stock"],
            GOAL,
            rates["kit"],
        ),
        Row("reference: Dovecot's default settings, as in Debian", medians["stock"], "messages/s", runs=rates["stock"]),
    ]
    return measure.report("delivery", rows)


if __name__ == "__main__":
    sys.exit(measure.run(main))
