"""The directory's run, its module and slapd killed at random points: the next run reaches the very tree that a calm
run reaches, nothing half-made was visible meanwhile, and whoever has an initial password has its slip.

HOPTHU_KILLS says how often (3, each kind once); HOPTHU_SEED makes a campaign repeatable.
"""

from __future__ import annotations

import base64
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from faults import Hosts
from ldap3.core.exceptions import LDAPExceptionError
from playbook import Files, plan
from service import Service, accepts, wait

KILLS = int(os.environ.get("HOPTHU_KILLS", "3"))
SEED = int(os.environ.get("HOPTHU_SEED", str(random.SystemRandom().randrange(10**6))))
PEOPLE = 120  # to a round: long enough a window to be killed in
VICTIMS = ("the run", "the module", "slapd")
# What differs between two runs of the same change: clocks, hashes, the name of the slip and slapd's own attributes.
CLOCKED = re.compile(
    r"^(userPassword|pwd\w+|mailboxSlip|mailboxDigest|mailboxStateSince|mailboxRetainUntil|mailboxSessionsSince"
    r"|entry\w+|creat\w+|modif\w+|structuralObjectClass)(:|$)"
)
CALM = "calm"


class Rounds:
    """Two units and 120 people to a round, all with a tag in their ids; `settle` is where each begins."""

    def __init__(self, service: Service, files: Files, prefix: str) -> None:
        self.service, self.files, self.prefix = service, files, prefix
        self.hosts = Hosts(service)
        self.plain_units, self.plain_people = list(files.units), list(files.people)
        self.files.policy |= {"required_refs": {}, "removal_limit": 1, "eligibility": {}, "delegates": {}}
        self.changed: set[str] = set()
        self.tags = [CALM, *(f"r{number}" for number in range(KILLS))]

    def write(self) -> None:
        """Put every round's records into the lists, as they are before or after its change."""
        self.files.units[:], self.files.people[:] = list(self.plain_units), list(self.plain_people)
        for tag in self.tags:
            after = tag in self.changed
            name = f"{self.prefix}{tag}"
            for letter in "ab":
                unit = {"id": f"{name}-{letter}", "name": f"Phòng {letter} {name}", "code": f"{name}{letter}"}
                self.files.units.append(unit | {"local_part": f"{name}{letter}", "class": "administrative"})
            # The head changes; one person in three joins, moves with a new address, or leaves.
            self.files.units[-2]["head"] = f"{name}-p{1 if after else 4}"
            for number in range(PEOPLE):
                person: dict[str, Any] = {"id": f"{name}-p{number}", "ho": "Đặng", "ten": "An", "unit": f"{name}-a"}
                person |= {"local_part": f"{name}p{number}", "class": "civil_servant"}
                if number % 3 == 0 and not after:
                    continue
                if number % 3 == 1 and after:
                    person |= {"unit": f"{name}-b", "local_part": f"{name}q{number}"}
                if number % 3 == 2 and after:
                    person |= {"state": "left"}
                self.files.people.append(person)

    def tree(self, tag: str) -> str:
        """The round's part of the tree, the same on all hosts, without what differs from run to run and its tag."""
        wait("the hosts have the same directory", lambda: not self.hosts.differences())
        dump = self.service.run(self.hosts.active(), f"slapcat -o ldif-wrap=no -b {self.service.base}")
        entries = []
        for entry in dump.split("\n\n"):
            if f"uid={self.prefix}{tag}-" in entry:
                lines = [_plain(line) for line in entry.splitlines() if not CLOCKED.match(line)]
                entries.append("\n".join([lines[0], *sorted(lines[1:])]).replace(f"{self.prefix}{tag}", "TAG"))
        assert len(entries) >= PEOPLE
        return "\n\n".join(sorted(entries))

    def start(self) -> subprocess.Popen[str]:
        """Start the playbook; return when it is about to apply the plan."""
        process = self.files.start("directory.yml")
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("TASK [directory : Bring units"):
                return process
        raise AssertionError("the run ended before it applied anything")

    def kill(self, victim: str, process: subprocess.Popen[str]) -> None:
        """Kill the run, or on the host that it writes to its module or slapd; then wait until the run is over."""
        host = self.hosts.active()
        if victim == "the run":
            os.killpg(process.pid, signal.SIGKILL)
        elif victim == "the module":
            self.service.inside(host).run("pkill -KILL -f 'AnsiballZ_[d]irectory'")
        else:
            self.service.run(host, "systemctl kill -s KILL slapd")
        process.communicate(timeout=120)
        wait("slapd is back", lambda: accepts(self.service.hosts[host]["addresses"]["v4"], 636))
        wait("the directory answers where the service is now", self._answers, 30)

    def _answers(self) -> bool:
        try:
            with self.service.ldap_admin():
                return True
        except LDAPExceptionError:
            return False

    def half_made(self, tag: str) -> list[str]:
        """Mailboxes of the round that Postfix and Dovecot see without all that a mailbox needs."""
        needed = ["uid", "mail", "mailboxState", "mailboxClass", "mailboxQuota", "userPassword"]
        with self.service.ldap_admin() as admin:
            found = admin.extend.standard.paged_search(
                self.service.base, f"(&(objectClass=hopThuMailbox)(uid={self.prefix}{tag}-*))", attributes=needed
            )
            return [item["dn"] for item in found if not all(item["attributes"].get(name) for name in needed)]

    def unslipped(self, tag: str) -> list[str]:
        """Mailboxes of the round with an initial password that is not on their slip."""
        slips = self.files.slips()
        with self.service.ldap_admin() as admin:
            admin.search(self.service.base, f"(&(pwdReset=TRUE)(uid={self.prefix}{tag}-*))", attributes=["uid"])
            dns = {entry.uid.value: entry.entry_dn for entry in admin.entries}
        lost = sorted(dns.keys() - slips.keys())
        for identity in random.sample(sorted(dns.keys() & slips.keys()), 12):
            with self.service.ldap(dns[identity], slips[identity]) as connection:
                if not connection.bound:
                    lost.append(identity)
        return lost


def _plain(line: str) -> str:
    """A line of LDIF with its value decoded and without times."""
    name, encoded, value = line.partition(":: ")
    text = f"{name}: {base64.b64decode(value).decode()}" if encoded else line
    return re.sub(r"\b\d{14}Z", "TIME", text)


@pytest.fixture(scope="module")
def rounds(lab: dict[str, Any], service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rounds]:
    """All rounds before their change, and a calm one that shows what the change leads to."""
    files = Files(lab, tmp_path_factory.mktemp("killed"))
    made = Rounds(service, files, f"kill{random.randrange(10**5)}")
    try:
        made.write()
        assert (run := files.apply()).status == 0, run.output
        made.changed.add(CALM)
        made.write()
        assert (run := files.apply()).status == 0, run.output
        yield made
    finally:
        host = service.in_group("directory")[0]
        names = f"slapcat -o ldif-wrap=no -b {service.base} | sed -n 's/^dn: \\(uid={made.prefix}.*\\)/\\1/p'"
        delete = "ldapdelete -Q -Y EXTERNAL -H ldapi:///"
        service.run(host, f"{names} > /tmp/{made.prefix} && {delete} -f /tmp/{made.prefix} && rm /tmp/{made.prefix}")
        for store in service.in_group("mailstore"):
            service.run(store, f"rm -rf -- /srv/vmail/{made.prefix}*")


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_run_is_finished_by_the_next(rounds: Rounds, number: int) -> None:
    chance = random.Random(SEED + number)
    tag, victim, delay = f"r{number}", VICTIMS[number % len(VICTIMS)], chance.uniform(0, 2.5)
    rounds.changed.add(tag)
    rounds.write()
    rounds.files.save()
    process = rounds.start()
    time.sleep(delay)
    rounds.kill(victim, process)
    about = f"{victim} killed {delay:.2f} s into the task, HOPTHU_SEED={SEED}"
    assert rounds.half_made(tag) == [], about
    run = rounds.files.apply()
    assert run.status == 0, f"{about}\n{run.output}"
    assert rounds.tree(tag) == rounds.tree(CALM), about
    assert rounds.unslipped(tag) == [], about
    assert not list((rounds.files.build / "slips").glob("*.pending.*")), about


def test_a_further_run_plans_nothing(rounds: Rounds) -> None:
    run = rounds.files.apply()
    assert run.status == 0, run.output
    assert "directory : Plan" in run.output
    assert set(run.changed.values()) == {0}, run.output
    assert plan()["changes"] == []
