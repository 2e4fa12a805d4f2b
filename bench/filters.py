"""Messages per second through the whole chain of filters against the same hosts without them, in one run.

    HOPTHU_LAB=build/lab.json .venv/bin/python bench/filters.py     without HOPTHU_LAB: on a lab of its own

Two variants on one host, alternating, three times each: as the kit wrote it (every message through Rspamd and clamd,
which holds a million synthetic signatures), and with `smtpd_milters` empty. Nothing else differs. Each time 600
messages of 10 KiB, half of it an attachment, go in by SMTP over 10 connections and the time runs from the first
connection to the last delivery into a mailbox; the messages are counted in the mailboxes afterwards. The profile is
the processor time of each daemon per message, the memory its proportional set size. Everything is put back.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, make_msgid

import delivery
import measure
from delivery import CONNECTIONS, HEADER, POSTFIX, SENDER, TIMEOUT, Host
from measure import BenchError, Row

MESSAGES = 600
OCTETS = 10 * 1024
ROUNDS = 3
HASHES, BODIES = 900_000, 100_000
SIGNATURES = "/var/lib/clamav/bench"
GOAL = {"min": 0.5}
DAEMONS = ("rspamd", "clamd", "valkey-server", "unbound", "stunnel")

# On the host: command → [processor ticks so far with those of ended children, proportional set size in KiB].
USAGE = """
import glob, json
found = {}
for folder in glob.glob("/proc/[0-9]*"):
    try:
        stat = open(folder + "/stat").read()
        lines = open(folder + "/smaps_rollup").read().splitlines()
    except OSError:
        continue  # it has just ended, or is the kernel's
    name = stat[stat.index("(") + 1 : stat.rindex(")")]
    fields = stat[stat.rindex(")") + 2 :].split()
    pss = next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    row = found.setdefault(name, [0, 0])
    row[0] += sum(map(int, fields[11:15]))
    row[1] += pss
print(json.dumps(found))
"""
# What the last signature of each kind finds: only a clamd that has read the whole file knows it.
LAST_HASH = b"the last hash"
LAST_BODY = hashlib.sha256(f"bench {BODIES - 1}".encode()).digest()[:24]
# On the host: signatures of files and of parts of files that do not exist.
MAKE = f"""
import hashlib
with open("{SIGNATURES}.hdb", "w") as hashes:
    for i in range({HASHES}):
        hashes.write(f"{{hashlib.md5(b'bench %d' % i).hexdigest()}}:{{1000 + i}}:Bench.Hash-{{i}}\\n")
    hashes.write(f"{{hashlib.md5({LAST_HASH!r}).hexdigest()}}:{len(LAST_HASH)}:Bench.Hash-last\\n")
with open("{SIGNATURES}.ndb", "w") as bodies:
    for i in range({BODIES}):
        bodies.write(f"Bench.Body-{{i}}:0:*:{{hashlib.sha256(b'bench %d' % i).hexdigest()[:48]}}\\n")
"""


def message(recipient: str, run: str) -> bytes:
    """One message of OCTETS octets (RFC 5322): text and an attachment, all of it random."""
    made = EmailMessage(policy=SMTP)
    made["From"], made["To"], made["Subject"], made[HEADER] = SENDER, recipient, run, run
    made["Date"], made["Message-ID"] = formatdate(), make_msgid(domain="thu-nghiem.example")
    made.set_content("".join(base64.b64encode(os.urandom(57)).decode() + "\n" for _ in range(OCTETS // 2 // 78)))
    # Not random from the first octet on: now and then one would begin like a program, which is refused.
    made.add_attachment(
        b"bench" + os.urandom(OCTETS // 2 * 57 // 78), "application", "octet-stream", filename="bench.bin"
    )
    return made.as_bytes()


def usage(host: Host) -> dict[str, tuple[int, int]]:
    """Command → processor ticks and memory in KiB of all its processes on the host."""
    return {name: (ticks, pss) for name, (ticks, pss) in json.loads(host.do("python3", "-c", USAGE)).items()}


@contextmanager
def prepared(host: Host) -> Iterator[None]:
    """Have clamd hold the signatures; take them away and put Postfix's file back whatever happens."""
    postfix = host.do("cat", POSTFIX)
    try:
        host.do("python3", "-c", MAKE)
        host.do("systemctl", "restart", "clamav-daemon.service")
        await_signatures(host)
        yield
    finally:
        host.write(POSTFIX, postfix)
        host.do("sh", "-c", f"rm -f {SIGNATURES}.hdb {SIGNATURES}.ndb")
        host.do("systemctl", "reload", "postfix.service")
        host.do("systemctl", "restart", "clamav-daemon.service")


def await_signatures(host: Host) -> None:
    """Wait until clamd answers; BenchError when it does not know the last signatures."""
    deadline = time.monotonic() + TIMEOUT
    while "PONG" not in host.do("sh", "-c", "clamdscan --ping 1 2>/dev/null || true"):
        if time.monotonic() > deadline:
            raise BenchError(f"clamd does not answer: podman exec {host.container} journalctl -u clamav-daemon")
        time.sleep(1)
    for content, name in ((LAST_HASH, "Bench.Hash-last"), (LAST_BODY, f"Bench.Body-{BODIES - 1}")):
        scan = f"printf %s {base64.b64encode(content).decode()} | base64 -d | clamdscan --no-summary - || true"
        if name not in (answer := host.do("sh", "-c", scan)):
            raise BenchError(f"clamd does not know the signature {name}: {answer.strip()}")


def through(host: Host, messages: int) -> tuple[float, dict[str, float]]:
    """Send `messages`, wait for the last delivery; messages per second, and each daemon's milliseconds a message."""
    host.do("systemctl", "reload", "postfix.service")
    time.sleep(3)
    run = f"bench-{secrets.token_hex(8)}"
    recipients = [host.mailboxes[i % len(host.mailboxes)] for i in range(messages)]
    before = usage(host)
    started = host.do("date", "+%s.%N").strip()
    try:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            parts = [recipients[i::CONNECTIONS] for i in range(CONNECTIONS)]
            ids = {i for some in pool.map(lambda p: delivery.send(host.address, p, run, message), parts) for i in some}
        deadline = time.monotonic() + TIMEOUT
        while len(times := {i: at for i, at in host.sent(started).items() if i in ids}) < messages:
            if time.monotonic() > deadline:
                raise BenchError(f"{len(times)} of {messages} messages were delivered in {TIMEOUT} s.")
            time.sleep(1)
        after = usage(host)
        if (arrived := host.count(run)) != messages:
            raise BenchError(f"{messages} messages were sent and the mailboxes hold {arrived}.")
        ticks = float(host.do("getconf", "CLK_TCK"))
        spent = {name: (after[name][0] - before.get(name, (0, 0))[0]) / ticks * 1000 / messages for name in after}
        return messages / (max(times.values()) - float(started)), spent
    finally:
        host.empty_queue()
        host.expunge(run)


def main() -> int:
    """Measure, print the table, write build/bench/filters.json; exit code 1 when the goal is missed."""
    rates: dict[str, list[float]] = {"without": [], "whole": []}
    spent: dict[str, list[dict[str, float]]] = {"without": [], "whole": []}
    with measure.lab() as lab:
        host = Host(lab)
        milters = host.do("postconf", "-h", "smtpd_milters").strip()
        if not milters:
            raise BenchError(f"{POSTFIX} names no milter: run playbooks/site.yml.")
        with prepared(host):
            through(host, len(host.mailboxes))  # first deliveries make folders: not measured
            for name in list(rates) * ROUNDS:
                host.do("postconf", "-e", f"smtpd_milters={milters if name == 'whole' else ''}")
                rate, times = through(host, MESSAGES)
                rates[name].append(rate)
                spent[name].append(times)
                print(f"{name:<8} {rate:6.1f} messages/s", flush=True)
            memory = usage(host)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = [
        Row("whole chain", medians["whole"], "messages/s", medians["without"], GOAL, rates["whole"]),
        Row("reference: no filters", medians["without"], "messages/s", runs=rates["without"]),
    ]
    profile = {
        name: {key: statistics.median(each.get(key, 0.0) for each in spent[name]) for key in spent[name][0]}
        for name in spent
    }
    shown = sorted(profile["whole"], key=lambda key: -profile["whole"][key])
    rows += [
        Row(f"processor time: {key}", profile["whole"][key], "ms/message", profile["without"].get(key) or None)
        for key in shown
        if profile["whole"][key] >= 0.2
    ]
    rows += [Row(f"memory: {key}", memory[key][1] / 1024, "MiB") for key in DAEMONS if key in memory]
    return measure.report("filters", rows)


if __name__ == "__main__":
    sys.exit(measure.run(main))
