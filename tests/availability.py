"""Every fault of a running lab, under a running load, and what came of it: build/availability.json.

    python tests/availability.py --lab build/soak/lab.json [--only "active host killed" ...] [--list]

Each row says how many messages were acknowledged, how many of them are missing or there twice, the longest gap that a
user saw and how long two hosts held the service address. A later run replaces the row of the same fault. Exit code 1
when something was lost, doubled or refused, or was not well again in time.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT / "tests" / "acceptance"))

from faults import COMPARE_MAIL, FAULTS, FULL, FaultError, Hosts, host_killed, record, save, silent_difference, trial  # noqa: E402 - its folder is named above
from load import HEADER  # noqa: E402
from playbook import Files, Province  # noqa: E402
from service import Service  # noqa: E402

BURNS = 5
LETTERS = 500  # acknowledged before the host burns
WRITES = 20  # on each side of a split
PEOPLE = 120  # of the directory run: long enough to be killed in
REBUILT = 900  # seconds until a host that was made anew has to be in sync


class Campaign:
    """A running lab and its province, for one fault after the other."""

    def __init__(self, path: Path, hold: float) -> None:
        """`hold` is how many seconds a fault lasts."""
        self.lab: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.name = Path(self.lab["inventory"]).parents[1].name
        self.service = Service(self.lab)
        self.hosts, self.hold = Hosts(self.service), hold

    def playbook(self, name: str, *arguments: str) -> None:
        """Run a playbook on the lab; FaultError with the end of what it said when it fails."""
        with tempfile.TemporaryDirectory() as folder:
            run = Province(self.lab, Path(folder)).run(name, *arguments)
        if run.status:
            raise FaultError(f"{name} ended with {run.status}: {run.message or run.output[-1500:]}")

    def fault(self, name: str) -> bool:
        """One of the faults that are a matter of power, cables, disks and single daemons."""
        with trial(self.hosts, name, after=self.hold / 2) as seen, FAULTS[name](self.hosts):
            time.sleep(self.hold)
        return seen.good

    def change(self, name: str, playbook: str) -> bool:
        """A planned change: nothing is refused, and a session is interrupted at most once."""
        with trial(self.hosts, name) as seen:
            self.playbook(playbook)
        return seen.good and seen.row["sessions_lost"] <= 1

    def burnt(self, name: str) -> bool:
        """The active host burns with its disks; the other brings back what it had not sent yet; it is made anew."""
        with trial(self.hosts, name, well=REBUILT) as seen:
            seen.await_acknowledged(LETTERS)
            host = self.hosts.active()
            self.hosts.destroy(host)
            time.sleep(self.hold)
            self.playbook("replay.yml", "-e", f"lost={host}")
            seen.load.stop()
            create = [sys.executable, "lab/lab.py", "create", "--name", self.name, "--province", self.lab["province"]]
            if subprocess.run(create, cwd=CHECKOUT).returncode:
                raise FaultError(f"{host} could not be made anew")
            self.playbook("site.yml")
        return seen.good

    def split(self, name: str) -> bool:
        """Cut apart, written to on both sides, together again: both hold the union, nothing twice."""
        hosts = self.hosts
        box = self.service.unit(min(self.service.units).partition("@")[0])
        run = f"split-{secrets.token_hex(4)}"
        written = set()
        with FAULTS["hosts cut apart"](hosts):
            time.sleep(self.hold)
            for number in range(WRITES):
                for host in hosts.full:
                    identifier = f"{run}.{host}.{number}"
                    head = f"From: {box.address}\nTo: {box.address}\nSubject: {identifier}\n{HEADER}: {identifier}\n"
                    save(hosts, host, box.address, f"{head}Message-ID: <{identifier}@thu-nghiem.example>\n\n.\n")
                    written.add(identifier)
        problems = hosts.await_well(users=[box.address])
        query = f"-u '{box.address}' hdr.{HEADER.lower()} mailbox INBOX header {HEADER} {run}"
        missing, twice = set(), set()
        for host in hosts.full:
            lines = hosts.run(host, f"doveadm -f flow fetch {query}").splitlines()
            held = Counter(line.partition("=")[2].strip() for line in lines)
            missing |= written - held.keys()
            twice |= {identifier for identifier, count in held.items() if count > 1}
        found = {"acknowledged": len(written), "missing": len(missing), "duplicated": len(twice)}
        record({"fault": name, **found, "gap_s": None, "two_holders_s": None, "problems": problems})
        if missing or twice or problems:
            return False
        hosts.run(hosts.active(), f"doveadm expunge -u '{box.address}' mailbox INBOX header {HEADER} {run}")
        return True

    def silent(self, name: str) -> bool:
        """A difference of which neither side knows is found by comparing both, and repaired."""
        hosts = self.hosts
        with self.service.new_mailbox() as box:
            compare = f"{COMPARE_MAIL} '{box.address}'"
            message = f"From: {box.address}\nSubject: {name}\nMessage-ID: <{secrets.token_hex(8)}@thu-nghiem.example>\n"
            with silent_difference(hosts, box.address, f"{message}\n.\n"):
                noticed = hosts.attempt(hosts.active(), compare).returncode == 1
            hosts.run(hosts.active(), FULL)
            repaired = hosts.attempt(hosts.active(), compare).returncode == 0
            with box.imap() as client:
                client.select_folder("INBOX", readonly=True)
                held = len(client.search())
        found = {"acknowledged": 1, "missing": 1 - min(held, 1), "duplicated": max(held - 1, 0)}
        told = {"noticed": noticed, "repaired": repaired}
        record({"fault": name, **found, "gap_s": None, "two_holders_s": None, **told})
        return noticed and repaired and held == 1

    def directory(self, name: str) -> bool:
        """The active host is killed while a directory run writes; nothing half-made shows, the next run completes."""
        tag = f"av{secrets.token_hex(3)}"
        with tempfile.TemporaryDirectory() as folder:
            files = Files(self.lab, Path(folder))
            files.policy |= {"required_refs": {}, "removal_limit": 1, "eligibility": {}, "delegates": {}}
            unit = {"id": tag, "name": f"Phòng {tag}", "code": tag, "local_part": tag, "class": "administrative"}
            files.units.append(unit)
            for number in range(PEOPLE):
                person = {"id": f"{tag}-p{number}", "ho": "Đặng", "ten": "An", "unit": tag, "class": "civil_servant"}
                files.people.append(person | {"local_part": f"{tag}p{number}"})
            files.save()
            with trial(self.hosts, name, after=self.hold) as seen:
                process = files.start("directory.yml")
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith("TASK [directory : Bring units"):
                        break
                time.sleep(1)
                with host_killed(self.hosts):
                    # Its connection to the dead host would outlast the test.
                    time.sleep(self.hold)
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    halves = self._half_made(tag)
            run = files.apply()
            made = self._mailboxes(tag)
        seen.row |= {"half_made": halves, "completed": len(made) == PEOPLE + 1}
        record(seen.row)
        self._forget(made)
        return seen.good and run.status == 0 and not halves and len(made) == PEOPLE + 1

    def _mailboxes(self, tag: str) -> dict[str, dict[str, Any]]:
        """DN → attributes of the mailboxes that the directory run makes."""
        needed = ["uid", "mail", "mailboxState", "mailboxClass", "mailboxQuota", "userPassword"]
        with self.service.ldap_admin() as admin:
            query = f"(&(objectClass=hopThuMailbox)(|(uid={tag})(uid={tag}-*)))"
            found = admin.extend.standard.paged_search(self.service.base, query, attributes=needed)
            return {item["dn"]: {name: item["attributes"].get(name) for name in needed} for item in found}

    def _half_made(self, tag: str) -> list[str]:
        return [dn for dn, values in self._mailboxes(tag).items() if not all(values.values())]

    def _forget(self, made: dict[str, Any]) -> None:
        """Take the mailboxes away again, people before their unit."""
        with self.service.ldap_admin() as admin:
            for dn in sorted(made, key=len, reverse=True):
                admin.delete(dn)  # type: ignore[no-untyped-call]


def scenarios(campaign: Campaign, burns: int) -> dict[str, Callable[[str], bool]]:
    """Every fault by its name, the cheap ones first."""
    return {
        **{name: campaign.fault for name in FAULTS},
        "planned switch-over": functools.partial(campaign.change, playbook="switchover.yml"),
        "rolling update": functools.partial(campaign.change, playbook="rolling-update.yml"),
        "split with writes on both sides": campaign.split,
        "silent difference": campaign.silent,
        "active host killed during a directory run": campaign.directory,
        **{f"active host burnt, run {number}": campaign.burnt for number in range(1, burns + 1)},
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", type=Path, required=True, help="lab.json of a running lab")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="FAULT", help="these alone, by the beginning of a name"
    )
    parser.add_argument("--hold", type=float, default=40, help="seconds that a fault lasts (40)")
    parser.add_argument("--burns", type=int, default=BURNS, help=f"how often a host burns ({BURNS})")
    parser.add_argument("--list", action="store_true", help="say what there is")
    options = parser.parse_args()
    campaign = Campaign(options.lab, options.hold)
    chosen = {
        name: run
        for name, run in scenarios(campaign, options.burns).items()
        if not options.only or name.startswith(tuple(options.only))
    }
    if options.list or not chosen:
        print("\n".join(scenarios(campaign, options.burns)))
        return 0 if options.list else 2
    results = []
    for name, run in chosen.items():
        started = time.monotonic()
        try:
            good, reason = run(name), ""
        except (Exception, pytest.fail.Exception) as error:  # the next fault is another matter
            good, reason = False, f"{type(error).__name__}: {error}"
        results.append(good)
        print(f"{'passed' if good else 'FAILED'} {time.monotonic() - started:5.0f} s  {name}  {reason}", flush=True)
    print(f"{results.count(True)} passed, {results.count(False)} failed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
