"""The second copy of the mail store and the message journal: what they take, and how far behind they are.

    HOPTHU_LAB=build/lab.json .venv/bin/python bench/replication.py [--mailboxes 2000]     else on a lab of its own

On two full hosts. First the journal: the same path through Postfix, filters and Dovecot with its milter and without,
alternating, three times each; 600 messages over ten connections, and the time of one message after the other over
one. Then mailboxes of the measurement's own, each with five messages of 10 KiB: the sweep over all of them with
nothing to do, the nightly `sync -f`, the processor time at rest, and 50 messages a second by LMTP for a minute. A
message's lag is the time between the births of the two files that hold it: what a host that burns takes with it, before
the journal brings it back. Mailboxes and configuration are put back.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import delivery
import filters
import measure
from delivery import POSTFIX, TIMEOUT, Host
from measure import BenchError, Row

MAILBOXES, EACH = 2_000, 5
MESSAGES, ROUNDS, SINGLE = 600, 3, 60
RATE, SECONDS = 50, 60
REST = 60
LAG_GOAL = {"max": 1.0}  # seconds
STATUS = "/run/mail-sync/status.json"
SWEEP, FULL = ("mail-sync", "sweep"), ("mail-sync", "full")
UNITS = ("mail-sync.service", "dovecot.service")
JOURNAL = re.compile(r"\bjournal/milter\b")  # its milter
ITEM = re.compile(r"\{[^}]*\}|[^\s,]+")

# On a host: processor seconds of a unit's processes and of their children that have ended.
USAGE = """
import glob, json, os, sys
spent = dict.fromkeys(sys.argv[1:], 0)
for folder in glob.glob("/proc/[0-9]*"):
    try:
        units, stat = open(folder + "/cgroup").read(), open(folder + "/stat").read()
    except OSError:
        continue  # it has just ended
    for unit in spent:
        if "/" + unit in units:
            spent[unit] += sum(map(int, stat[stat.rindex(")") + 2 :].split()[11:15]))
print(json.dumps({unit: ticks / os.sysconf("SC_CLK_TCK") for unit, ticks in spent.items()}))
"""
# On the active host: messages by LMTP, `rate` a second or as fast as it goes (0); the seconds that it took.
LMTP = """
import itertools, json, smtplib, sys, threading, time
go = json.load(sys.stdin)
numbers, lock, started = itertools.count(), threading.Lock(), time.monotonic()
failed = []
def work():
    lmtp = smtplib.LMTP("/run/dovecot/lmtp")
    lmtp.ehlo("bench")
    while True:
        with lock:
            number = next(numbers)
        if number >= go["count"]:
            return lmtp.quit()
        if go["rate"]:
            time.sleep(max(0, started + number / go["rate"] - time.monotonic()))
        to = go["users"][number % len(go["users"])]
        head = f"From: bench@{go['domain']}\\r\\nTo: {to}\\r\\nSubject: bench\\r\\n"
        head += f"X-Hopthu-Bench: {go['run']}.{number}\\r\\n\\r\\n"
        lmtp.mail("bench@" + go["domain"])
        code, text = lmtp.rcpt(to)
        if code == 250:
            code, text = lmtp.data((head + go["line"] * go["lines"]).encode())
        if code != 250:
            failed.append(f"{to}: {code} {text.decode(errors='replace')}")
threads = [threading.Thread(target=work) for _ in range(go["hands"])]
[thread.start() for thread in threads], [thread.join() for thread in threads]
print(json.dumps({"seconds": time.monotonic() - started, "failed": failed[:3]}))
"""
# On a host: when the file of each of a run's messages was made there: its birth; names and other times come along.
WRITTEN = """
import glob, json, re, subprocess, sys
found = {}
paths = glob.glob(f"/srv/vmail/{sys.argv[1]}-*/Maildir/*/*,*")
command = ["xargs", "-d", chr(10), "stat", "-c", "%.9W %n"]
told = subprocess.run(command, input=chr(10).join(paths), stdout=subprocess.PIPE, text=True, check=True).stdout
for birth, path in (line.split(" ", 1) for line in told.splitlines()):
    mark = re.search(rb"^X-Hopthu-Bench: (\\S+)", open(path, "rb").read(2048), re.M)
    if mark and mark[1].decode().startswith(sys.argv[2] + "."):
        found[mark[1].decode()] = float(birth)
print(json.dumps(found))
"""


class Pair:
    """The two full hosts of a lab: the one that holds the service address, and the other."""

    def __init__(self, lab: dict[str, Any]) -> None:
        """Find them; BenchError when this is no pair."""
        self.lab = lab
        full = [host for host in lab["hosts"].values() if {"mx", "mailstore"} <= set(host["groups"])]
        if len(full) != 2:
            raise BenchError("This lab has not two full hosts: there is nothing to replicate.")
        asked = ["sh", "-c", "systemctl is-active holder.target || true"]
        full.sort(key=lambda host: measure.inside(host["container"], asked).strip() != "active")
        self.containers = [str(host["container"]) for host in full]
        self.host = Host(lab)
        self.host.container, self.host.address = self.containers[0], str(full[0]["addresses"]["v4"])

    def do(self, *command: str, stdin: str = "") -> str:
        """Run a command on the active host."""
        return self.host.do(*command, stdin=stdin)

    def both(self, *command: str) -> list[str]:
        """Run a command on both hosts, the active one first."""
        return [measure.inside(container, command) for container in self.containers]

    def await_sync(self) -> None:
        """Wait until neither host is behind, by what it says later than now; BenchError after TIMEOUT."""
        asked, deadline = time.time() + 1, time.monotonic() + TIMEOUT
        while any(told["behind"] or told["time"] < asked for told in map(json.loads, self.both("cat", STATUS))):
            if time.monotonic() > deadline:
                raise BenchError(f"The mail stores are not in sync after {TIMEOUT} s: mail-sync status")
            time.sleep(1)

    def lmtp(self, run: str, users: list[str], count: int, rate: float, hands: int) -> float:
        """Deliver `count` messages of 10 KiB to `users` in turn; the seconds it took."""
        go = {"run": run, "users": users, "count": count, "rate": rate, "hands": hands, "domain": self.lab["domain"]}
        go |= {"line": "x" * 76 + "\r\n", "lines": 10 * 1024 // 78}
        told = json.loads(self.do("python3", "-c", LMTP, stdin=json.dumps(go)))
        if told["failed"]:
            raise BenchError(f"Dovecot does not take mail: {told['failed'][0]}")
        return float(told["seconds"])


# --- the journal -----------------------------------------------------------------------------


@contextmanager
def without_journal(host: Host) -> Iterator[None]:
    """Have Postfix accept without the journal's milter; its file is put back whatever happens."""
    text = host.do("cat", POSTFIX)
    items = ITEM.findall(host.do("postconf", "-h", "smtpd_milters"))
    left = [item for item in items if not JOURNAL.search(item)]
    if left == items:
        raise BenchError(f"{POSTFIX}: smtpd_milters names no journal.")
    try:
        host.do("postconf", "-e", f"smtpd_milters={', '.join(left)}")
        host.do("systemctl", "reload", "postfix.service")
        yield
    finally:
        host.write(POSTFIX, text)
        host.do("systemctl", "reload", "postfix.service")


def one_by_one(host: Host) -> float:
    """Milliseconds from the beginning of a message to its 250, one after the other over one connection."""
    run = f"bench-{secrets.token_hex(8)}"
    recipients = [host.mailboxes[i % len(host.mailboxes)] for i in range(SINGLE)]
    started = time.monotonic()
    delivery.send(host.address, recipients, run)
    spent = time.monotonic() - started
    deadline = time.monotonic() + TIMEOUT
    while host.count(run) < SINGLE and time.monotonic() < deadline:
        time.sleep(1)
    host.expunge(run)
    return spent / SINGLE * 1000


def journal(pair: Pair) -> list[Row]:
    """The same path with the journal and without."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    times: dict[bool, list[float]] = {True: [], False: []}

    def round_of(with_journal: bool) -> None:
        rates[with_journal].append(filters.through(pair.host, MESSAGES)[0])
        times[with_journal].append(one_by_one(pair.host))
        print(f"journal {with_journal!s:<5} {rates[with_journal][-1]:6.1f} messages/s", flush=True)

    for _round in range(ROUNDS):
        round_of(True)
        with without_journal(pair.host):
            round_of(False)
    rate, time_of = ({key: statistics.median(runs) for key, runs in one.items()} for one in (rates, times))
    return [
        Row("whole path with the journal", rate[True], "messages/s", rate[False], runs=rates[True]),
        Row("… one message after the other, to its 250", time_of[True], "ms", time_of[False], runs=times[True]),
    ]


# --- the mail store --------------------------------------------------------------------------


@contextmanager
def mailboxes(pair: Pair, count: int) -> Iterator[tuple[str, list[str]]]:
    """Mailboxes of the measurement's own on both hosts; the beginning of their names, and their addresses."""
    tag, base, domain = f"bench{secrets.token_hex(3)}", pair.lab["ldap"]["base"], pair.lab["domain"]
    names = [f"{tag}-{number}" for number in range(count)]
    entry = (
        "dn: uid={0},ou=units,{1}\nobjectClass: organizationalUnit\nobjectClass: hopThuMailbox\n"
        "objectClass: inetLocalMailRecipient\nuid: {0}\nou: {0}\nmail: {0}@{2}\nmailboxState: active\n"
        "mailboxClass: unit\nmailboxQuota: 1073741824\n"
    )
    root = ("-Q", "-Y", "EXTERNAL", "-H", "ldapi:///")
    try:
        pair.do("ldapadd", *root, stdin="\n".join(entry.format(name, base, domain) for name in names))
        yield tag, [f"{name}@{domain}" for name in names]
    finally:
        pair.do("ldapdelete", "-c", *root, stdin="".join(f"uid={name},ou=units,{base}\n" for name in names))
        pair.both("sh", "-c", f"rm -rf /srv/vmail/{tag}-*")


def seconds(pair: Pair, command: tuple[str, ...]) -> float:
    """How long a command takes on the active host."""
    started = time.monotonic()
    pair.do(*command)
    return time.monotonic() - started


def at_rest(pair: Pair) -> dict[str, float]:
    """Processor seconds a minute of each unit, on both hosts together, without any mail."""

    def spent() -> list[dict[str, float]]:
        return [json.loads(text) for text in pair.both("python3", "-c", USAGE, *UNITS)]

    before = spent()
    time.sleep(REST)
    after = spent()
    ends = zip(before, after, strict=True)
    sums = [{unit: now[unit] - then[unit] for unit in UNITS} for then, now in ends]
    return {unit: sum(one[unit] for one in sums) * 60 / REST for unit in UNITS}


def lags(pair: Pair, tag: str, users: list[str]) -> tuple[list[float], float]:
    """Seconds by which each of the messages reached the other host later, sorted; and messages per second."""
    run = f"lag-{secrets.token_hex(6)}"
    count = RATE * SECONDS
    took = pair.lmtp(run, users, count, RATE, 16)
    pair.await_sync()
    here, there = (json.loads(text) for text in pair.both("python3", "-c", WRITTEN, tag, run))
    if len(here) != count or here.keys() != there.keys():
        raise BenchError(f"{count} messages were delivered; {len(here)} and {len(there)} of them lie on the hosts.")
    return sorted(there[mark] - here[mark] for mark in here), count / took


def store(pair: Pair, count: int) -> list[Row]:
    """Sweep, nightly run, rest and lag with `count` mailboxes."""
    with mailboxes(pair, count) as (tag, users):
        time.sleep(5)  # the other directory has them too
        print(f"{count} mailboxes are filled", flush=True)
        pair.lmtp("fill", users, count * EACH, 0, 8)
        pair.await_sync()
        # The first sweep notes what it sees; the second has nothing to do.
        pair.do(*SWEEP)
        sweeps = [seconds(pair, SWEEP) for _round in range(ROUNDS)]
        print(f"sweep {min(sweeps):.1f} s", flush=True)
        full = seconds(pair, FULL)
        print(f"full  {full:.1f} s", flush=True)
        pair.await_sync()
        rest = at_rest(pair)
        late, rate = lags(pair, tag, users)
    name = f"{count:,} mailboxes"
    return [
        Row(f"{name}: sweep, nothing to do", statistics.median(sweeps), "s", runs=sweeps),
        Row(f"{name}: nightly sync -f", full, "s"),
        *(Row(f"{name}: at rest, {unit}, both hosts", value, "s/min") for unit, value in rest.items()),
        Row(f"{name}: rate of the next three", rate, "messages/s"),
        Row("lag of the slowest message", late[-1], "s", 1.0, LAG_GOAL),
        Row("… 99 of 100 are faster than", late[len(late) * 99 // 100], "s"),
        Row("… half of them", statistics.median(late), "s"),
    ]


def main() -> int:
    """Measure, print the table, write build/bench/replication.json; exit code 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mailboxes", type=int, default=MAILBOXES, help=f"how many ({MAILBOXES})")
    parser.add_argument("--only", choices=("journal", "store"), help="one half (default: both)")
    options = parser.parse_args()
    with measure.lab() as lab:
        pair = Pair(lab)
        rows = journal(pair) if options.only != "store" else []
        rows += store(pair, options.mailboxes) if options.only != "journal" else []
    size = "" if options.mailboxes == MAILBOXES else f"-{options.mailboxes}"
    return measure.report(f"replication{size}", rows)


if __name__ == "__main__":
    sys.exit(measure.run(main))
