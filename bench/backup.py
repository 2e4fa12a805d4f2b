"""What a backup of the mail store takes, and a restore, against rsync of the same data in the same run.

    HOPTHU_LAB=build/lab.json .venv/bin/python bench/backup.py [--mailboxes 1000 --octets 5368709120]

On the active host, with mailboxes of the measurement's own; else on a lab of its own. Each mailbox gets messages of
52 KiB as Maildir files, none like another. Then: rsync of them into a folder of the same host; the first backup;
the next one with nothing changed, and one after 1 % of the messages came new and as many went; the mailboxes lost, and
all of them restored by doveadm; and again rsync back. While the first backup runs, mail goes through the service one
message after the other: the time to the 250 beside that of a quiet host. Meanwhile mail-sync rests on both hosts, so
that its copying is not measured with it, and the service stays where it is. Mailboxes are removed; their snapshots stay
until they expire.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import measure
from measure import BenchError, Row
from replication import Pair, mailboxes, one_by_one

MAILBOXES, OCTETS = 1_000, 5 << 30
MESSAGE = 52 << 10  # octets
CHANGED = 0.01  # share of the messages
COPY = "/srv/bench-copy"
INCREMENT_GOAL, RESTORE_GOAL = {"max": 0.1}, {"max": 2.0}
MEMORY_GRACE = 2  # seconds that the kernel is given to write what lies in memory

# On the host: `each` messages in the cur of each mailbox; with `drop` as many of the oldest go.
FILL = """
import base64, glob, json, os, pwd, sys, time
go = json.load(sys.stdin)
user = pwd.getpwnam("vmail")
os.setegid(user.pw_gid), os.seteuid(user.pw_uid)
os.umask(0o077)
number = 0
for name in go["names"]:
    folder = f"/srv/vmail/{name}/Maildir"
    for one in ("cur", "new", "tmp"):
        os.makedirs(f"{folder}/{one}", exist_ok=True)
    if go["drop"]:
        for path in sorted(glob.glob(f"{folder}/cur/*"))[: go["each"]]:
            os.unlink(path)
    for _ in range(go["each"]):
        number += 1
        body = base64.encodebytes(os.urandom(go["octets"] * 57 // 77))
        head = f"From: bench@{go['domain']}\\nTo: {name}@{go['domain']}\\nSubject: {name} {number}\\n"
        head += f"Message-ID: <{go['run']}.{number}@thu-nghiem.example>\\n\\n"
        data = head.encode() + body
        with open(f"{folder}/cur/{int(time.time())}.M{number}P{os.getpid()}.bench,S={len(data)}:2,S", "wb") as file:
            file.write(data)
"""
RESTORE = "mail-restore all --at \"$(date '+%F %T')\" --grounds bench --by bench"
COUNT = "find /srv/vmail/{tag}-* -path '*/cur/*' -type f | wc -l"


@contextmanager
def undisturbed(pair: Pair) -> Iterator[None]:
    """The time without copying between the hosts, and without a takeover.

    A host whose disk is as busy as here may answer too late, and the service would go to the other one.
    """
    still = ["crm_attribute", "--type", "crm_config", "--name", "maintenance-mode"]
    try:
        pair.do(*still, "--update", "true")
        # The socket too: it would start the service again.
        pair.both("systemctl", "stop", "mail-health.service", "mail-sync.socket", "mail-sync.service")
        yield
    finally:
        pair.both("systemctl", "start", "mail-sync.socket", "mail-sync.service", "mail-health.service")
        pair.do(*still, "--delete")


def timed(pair: Pair, what: str, command: str) -> float:
    """Seconds of a shell command on the active host, to the moment when its data is on the disk."""
    pair.do("sh", "-c", "sync")
    time.sleep(MEMORY_GRACE)
    started = time.monotonic()
    pair.do("sh", "-c", f"{command} && sync")
    spent = time.monotonic() - started
    print(f"{what:<40} {spent:8.1f} s", flush=True)
    return spent


def backed_up(pair: Pair, what: str) -> float:
    """Seconds of a backup of the mail store; BenchError when it fails."""
    return timed(pair, what, "mail-backup run mail")


class Load(threading.Thread):
    """Mail that goes through the service while something else is done there."""

    def __init__(self, pair: Pair) -> None:
        super().__init__(daemon=True)
        self.pair, self.going, self.times = pair, True, list[float]()

    def run(self) -> None:
        while self.going:
            self.times.append(one_by_one(self.pair.host))

    def end(self) -> float:
        """Stop it; milliseconds of a message to its 250."""
        self.going = False
        self.join()
        return statistics.median(self.times)


def rows(pair: Pair, count: int, octets: int) -> list[Row]:
    """All figures."""
    each = octets // count // MESSAGE
    with mailboxes(pair, count) as (tag, users), undisturbed(pair):
        names = [user.partition("@")[0] for user in users]
        fill = {"domain": pair.lab["domain"], "run": tag, "octets": MESSAGE, "drop": False}

        def put(names: list[str], each: int, **more: object) -> None:
            pair.do("python3", "-c", FILL, stdin=json.dumps(fill | {"names": names, "each": each} | more))

        def total() -> int:
            return int(pair.do("sh", "-c", COUNT.format(tag=tag)))

        for start in range(0, count, 100):
            put(names[start : start + 100], each, run=f"{tag}.{start}")
        pair.do("apt-get", "install", "-qq", "-y", "--no-install-recommends", "rsync")
        try:
            quiet = one_by_one(pair.host)
            copied = timed(pair, "rsync", f"mkdir -p {COPY} && rsync -a /srv/vmail/{tag}-* {COPY}/")
            load = Load(pair)
            load.start()
            first = backed_up(pair, "first backup")
            loaded = load.end()
            unchanged = backed_up(pair, "nothing changed")
            changed = max(1, round(each * CHANGED))
            few = names[: max(1, round(count * each * CHANGED / changed))]
            put(few, changed, drop=True, run=f"{tag}.again")
            increment = backed_up(pair, "1 % changed")
            before = total()
            pair.do("sh", "-c", f"rm -rf /srv/vmail/{tag}-*")
            restored = timed(pair, "restore", RESTORE)
            if (after := total()) != before:
                raise BenchError(f"{before} messages were lost and {after} came back.")
            pair.do("sh", "-c", f"rm -rf /srv/vmail/{tag}-*")
            back = timed(pair, "rsync back", f"rsync -a {COPY}/ /srv/vmail/")
        finally:
            pair.do("sh", "-c", f"rm -rf {COPY}")
            pair.do("apt-get", "purge", "-qq", "-y", "rsync")
    about = f"{count:,} mailboxes, {octets / (1 << 30):.1f} GiB"
    return [
        Row(f"{about}: first backup, against rsync", first, "s", copied),
        Row("next backup, 1 % changed, against the first", increment, "s", first, INCREMENT_GOAL),
        Row("… nothing changed", unchanged, "s", first),
        Row("all of it restored, against rsync", restored, "s", back, RESTORE_GOAL),
        Row("a message to its 250 during the first backup, against a quiet host", loaded, "ms", quiet),
    ]


def main() -> int:
    """Measure, print the table, write build/bench/backup.json; exit code 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mailboxes", type=int, default=MAILBOXES, help=f"how many ({MAILBOXES})")
    parser.add_argument("--octets", type=int, default=OCTETS, help=f"of all mail ({OCTETS})")
    options = parser.parse_args()
    with measure.lab() as lab:
        return measure.report("backup", rows(Pair(lab), options.mailboxes, options.octets))


if __name__ == "__main__":
    sys.exit(measure.run(main))
