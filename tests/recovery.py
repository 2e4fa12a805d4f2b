"""A whole province back from the repository alone, on a running lab: both mail hosts burn with their disks.

    python tests/recovery.py --lab build/soak/lab.json [--messages 2000]

Only the third host, which keeps the repository, and the controller are left. The hosts are made anew, directory and
mailboxes restored as docs/restore.md says, and everything is compared by the hash of its body with what was there. The
row is in build/restore.json. Exit code 1 when something is missing or changed, or the service is not usable.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT / "tests" / "acceptance"))

from faults import FaultError, Hosts  # noqa: E402 - its folder is named above
from playbook import Province  # noqa: E402
from service import Mailbox, Service, letter, wait  # noqa: E402
from test_restore import EACH, FOLDERS, Content, compare, content, record, write  # noqa: E402

CASE = "the whole province on empty hosts"
GROUNDS = "Biên bản sự cố 01/BB"
# Enough for the directory and the way to the repository; nothing yet that would make a directory of its own.
FIRST = "base,unbound,certificates,openssh,rsyslog,openldap,backup"
TREE = "slapcat -o ldif-wrap=no -s 'ou={branch},{base}' | grep -v '^[a-zA-Z]*\\(Timestamp\\|CSN\\): ' | sha256sum"


class Recovery:
    """A running lab before and after."""

    def __init__(self, path: Path) -> None:
        self.lab: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.name = Path(self.lab["inventory"]).parents[1].name
        self.service = Service(self.lab)
        self.hosts = Hosts(self.service)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Say what is done and how long it took."""
        began = time.monotonic()
        print(f"{name} …", flush=True)
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        print(f"{name}: {self.seconds[name]:.0f} s", flush=True)

    def playbook(self, name: str, *arguments: str) -> None:
        """Run a playbook on the lab; FaultError with the end of what it said when it fails."""
        with tempfile.TemporaryDirectory() as folder:
            run = Province(self.lab, Path(folder)).run(name, *arguments)
        if run.status:
            raise FaultError(f"{name} ended with {run.status}: {run.message or run.output[-1500:]}")

    def boxes(self) -> list[Mailbox]:
        """Every mailbox whose password is known."""
        return [self.service.unit(address.partition("@")[0]) for address in sorted(self.service.units)]

    def fill(self, number: int) -> None:
        """Have so many messages in the mailboxes, in folders of their own, with flags and times of arrival."""
        boxes = self.boxes()
        each = max(1, number // (len(boxes) * len(FOLDERS)))
        for box in boxes:
            with box.imap() as client:
                for folder in FOLDERS:
                    if folder != "INBOX" and not client.folder_exists(folder):
                        client.create_folder(folder)
                    for count in range(each):
                        write(box, client, folder, count % EACH)

    def tree(self) -> str:
        """What the directory's mailboxes are, operational attributes but times with them."""
        host = self.hosts.active()
        commands = (TREE.format(branch=branch, base=self.service.base) for branch in ("units", "people", "released"))
        return "\n".join(self.hosts.run(host, command) for command in commands)

    def contents(self) -> dict[str, Content]:
        """What every mailbox holds, over IMAP."""
        return {box.address: content(box) for box in self.boxes()}

    def burn(self) -> None:
        """Both mail hosts go with all their disks, and new ones of the same names stand there, empty."""
        for host in self.hosts.full:
            self.hosts.destroy(host)
        create = [sys.executable, "lab/lab.py", "create", "--name", self.name, "--province", self.lab["province"]]
        if subprocess.run(create, cwd=CHECKOUT).returncode:
            raise FaultError("the hosts could not be made anew")

    def restore(self, what: str, at: str, *arguments: str) -> None:
        """Run playbooks/restore.yml."""
        self.playbook("restore.yml", "-e", json.dumps({"what": what, "at": at, "grounds": GROUNDS}), *arguments)

    def usable(self) -> None:
        """A message goes from one unit to another, and the directory answers."""
        one, other = self.boxes()[:2]
        message = letter(one.address, other.address, "Sau khôi phục")
        other.take(one.submit(message, other.address, self.service.address), seconds=120)
        with self.service.ldap_admin():
            pass

    def run(self, number: int) -> dict[str, Any]:
        """Do it; the row."""
        if problems := self.hosts.await_well():
            raise FaultError(f"before anything was broken: {'; '.join(problems)}")
        with self.step("fill"):
            self.fill(number)
        before, tree = self.contents(), self.tree()
        with self.step("backup"):
            self.hosts.run(self.hosts.active(), "mail-backup run")
            at = datetime.now(UTC).isoformat()
        with self.step("burn both hosts and make them anew"):
            self.burn()
        began = time.monotonic()
        with self.step(f"site.yml --tags {FIRST}"):
            self.playbook("site.yml", "--tags", FIRST)
        with self.step("restore the directory"):
            self.restore("directory", at, "-e", "empty=true")
        with self.step("site.yml"):
            self.playbook("site.yml")
        with self.step("restore the mailboxes"):
            self.restore("all", at)
        with self.step("see that the service is usable"):
            wait("the service", self._answers, 120)
            self.usable()
        total = time.monotonic() - began
        now = self.contents()
        rows = [compare("", some, {}, now.get(address, {}), 0) for address, some in before.items()]
        row: dict[str, Any] = {"case": CASE}
        row |= {
            name: sum(one[name] for one in rows) for name in ("expected", "missing", "changed", "overwritten_newer")
        }
        row |= {"seconds": round(total, 1), "steps": self.seconds, "directory_equal": self.tree() == tree}
        row["problems"] = self.hosts.await_well(users=[box.address for box in self.boxes()])
        record(row)
        return row

    def _answers(self) -> bool:
        try:
            with self.boxes()[0].imap():
                return True
        except OSError:
            return False


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", type=Path, required=True, help="lab.json of a running lab")
    parser.add_argument("--messages", type=int, default=2000, help="so many are put into the mailboxes first (2000)")
    options = parser.parse_args()
    try:
        row = Recovery(options.lab).run(options.messages)
    except (FaultError, pytest.fail.Exception) as error:
        print(f"FAILED: {error}")
        return 1
    print(json.dumps(row, indent=1, ensure_ascii=False))
    good = not (row["missing"] or row["changed"] or row["problems"]) and row["expected"] and row["directory_equal"]
    print("passed" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
