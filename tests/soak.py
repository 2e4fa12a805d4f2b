"""Sabotage: break each setting that an acceptance test guards, on a host of a lab, and demand that the test turns red.

    python tests/soak.py --lab build/soak/lab.json [--only test_name ...]

Each row of tests/sabotage.yml is broken, tried and mended by itself, whatever happens. At the end all acceptance
tests (with --only those of the same files) must be green again and a run of site.yml must change nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

CHECKOUT = Path(__file__).resolve().parents[1]
ROWS = CHECKOUT / "tests" / "sabotage.yml"
SAVED = "/var/lib/hopthu-sabotage.tar"
FIELDS = {"test", "setting", "group", "file", "replace", "reload", "command", "ldif", "back"}


class SabotageError(Exception):
    """A row cannot be carried out; the sentence says which and why."""


@dataclass(frozen=True)
class Row:
    """One sabotage: what the test guards, where it is broken and how."""

    test: str
    setting: str
    group: str
    file: str | None = None
    replace: dict[str, str] | None = None
    reload: str | None = None
    command: str | None = None
    ldif: str | None = None
    back: str | None = None


def read_rows(path: Path) -> tuple[list[Row], dict[str, str]]:
    """Rows of a sabotage.yml, and test → reason of those that stand without one.

    Raises SabotageError, one sentence with file and row, when a row is not a whole one.
    """
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = []
    for number, item in enumerate(data["sabotage"], 1):
        place = f"{path.name}, row {number}"
        if unknown := item.keys() - FIELDS:
            raise SabotageError(f"{place}: unknown field {sorted(unknown)[0]}; there are {', '.join(sorted(FIELDS))}")
        if missing := {"test", "setting", "group"} - item.keys():
            raise SabotageError(f"{place}: {sorted(missing)[0]} is missing")
        in_file = {"file", "replace"} <= item.keys() and bool({"reload", "command"} & item.keys())
        in_directory = {"ldif", "back"} <= item.keys()
        if in_file == in_directory or (in_file and item["replace"].keys() != {"pattern", "with"}):
            raise SabotageError(
                f"{place}: needs either file, replace (pattern, with) and reload or command, or ldif and back"
            )
        rows.append(Row(**item))
    return rows, data.get("unguarded") or {}


class Lab:
    """Hosts of a running lab, reached over SSH as lab.json says."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.ssh_config = Path(self.data["ssh_private_key"]).parent / "config"

    def hosts(self, group: str) -> list[str]:
        """Names of a group's hosts; `all` is every host."""
        return [name for name, host in self.data["hosts"].items() if group in [*host["groups"], "all"]]

    def run(self, host: str, command: str, text: str = "") -> str:
        """Output of a command on a host; SabotageError when it fails."""
        call = ["ssh", "-F", str(self.ssh_config), "-o", "ConnectTimeout=60", host, command]
        result = subprocess.run(call, input=text, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SabotageError(f"{host}: {command.splitlines()[0]}: {result.stderr.strip() or result.returncode}")
        return result.stdout


def apply_ldif(lab: Lab, host: str, ldif: str) -> None:
    """Change the directory or its configuration as root of its host; BASE and DOMAIN stand for the lab's."""
    text = ldif.replace("BASE", lab.data["ldap"]["base"]).replace("DOMAIN", lab.data["domain"])
    lab.run(host, "ldapmodify -Q -Y EXTERNAL -H ldapi:///", text)


def activate(lab: Lab, row: Row, host: str) -> None:
    """Make the daemon use its file as it stands now."""
    lab.run(host, row.command or f"systemctl reload {row.reload}")


def restore(lab: Lab, host: str) -> bool:
    """Put back the file that a sabotage saved on a host; whether there was one."""
    return bool(lab.run(host, f"test ! -e {SAVED} || {{ tar -C / -xpvf {SAVED} && rm {SAVED}; }}"))


@contextmanager
def broken(lab: Lab, row: Row) -> Iterator[None]:
    """The time with one setting broken; SabotageError when there was nothing to break."""
    hosts = lab.hosts(row.group)
    if not hosts:
        raise SabotageError(f"no host is in group {row.group}")
    if row.ldif and row.back:
        apply_ldif(lab, hosts[0], row.ldif)
        try:
            yield
        finally:
            apply_ldif(lab, hosts[0], row.back)
        return
    assert row.file and row.replace
    touched = []
    try:
        for host in hosts:
            before = lab.run(host, f"cat {shlex.quote(row.file)}")
            after, count = re.subn(row.replace["pattern"], row.replace["with"], before, flags=re.MULTILINE)
            if not count or after == before:
                raise SabotageError(f"{host}:{row.file}: nothing there matches {row.replace['pattern']!r}")
            file = shlex.quote(row.file)
            lab.run(host, f"tar -C / -cf {SAVED}.new {file.lstrip('/')} && mv {SAVED}.new {SAVED}")
            touched.append(host)
            lab.run(host, f"cat > {file}", after)
            activate(lab, row, host)
        yield
    finally:
        for host in touched:
            restore(lab, host)
            activate(lab, row, host)


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended: pytest's exit code, why tests failed, and how many could not be set up."""

    status: int
    failures: list[str]
    errors: int


def outcome(lab: Lab, tests: list[str]) -> Outcome:
    """Run tests against the lab."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        environment = {**os.environ, "HOPTHU_LAB": str(lab.path)}
        result = subprocess.run(call, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
        if not report.exists():
            raise SabotageError(f"pytest wrote no report: {(result.stdout + result.stderr).strip()[-300:]}")
        cases = ElementTree.parse(report)
        failures = [" ".join(str(case.get("message")).split())[:110] for case in cases.iterfind(".//failure")]
        return Outcome(result.returncode, failures, len(cases.findall(".//error")))


def sabotage(lab: Lab, row: Row) -> tuple[bool, str]:
    """Break a row's setting and run its test: whether the test turned red, and why it did or did not."""
    try:
        with broken(lab, row):
            found = outcome(lab, ["-x", f"tests/acceptance/{row.test}"])
        # Mail that the broken setting let through waits for hosts that do not exist.
        for host in lab.hosts("mx"):
            lab.run(host, "postsuper -d ALL")
    except SabotageError as error:
        return False, str(error)
    if found.status == 1 and found.failures and not found.errors:
        return True, f"red: {found.failures[0]}"
    return False, f"not red: exit code {found.status}, {len(found.failures)} failed, {found.errors} errors"


def all_green(lab: Lab, tests: list[str]) -> tuple[bool, str]:
    """Run acceptance tests: whether they passed, and which did not."""
    found = outcome(lab, tests)
    return not found.status, f"{found.errors} errors, {len(found.failures)} failed {' | '.join(found.failures[:3])}"


def converged(lab: Lab) -> tuple[bool, str]:
    """Run site.yml: whether it changed nothing, and what it did."""
    inventory = Path(lab.data["inventory"])
    build = inventory.parents[1]
    call = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(inventory)]
    call += ["--vault-password-file", str(build / "vault-password"), "-e", f"@{build / 'vault.yml'}"]
    environment = {**os.environ, "ANSIBLE_NOCOLOR": "1"}
    result = subprocess.run(
        [*call, "playbooks/site.yml"], cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False
    )
    changed = dict(re.findall(r"^(\S+) +: .*changed=(\d+)", result.stdout, re.MULTILINE))
    if result.returncode or not changed:
        return False, f"site.yml ended with {result.returncode}: {result.stdout.strip()[-300:]}"
    return set(changed.values()) == {"0"}, ", ".join(f"{host} changed {number}" for host, number in changed.items())


def main() -> int:
    """Entry point; 0 when every row turned red and everything is green and unchanged afterwards."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lab", type=Path, default=CHECKOUT / "build" / "soak" / "lab.json")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEST", help="rows of these tests alone")
    options = parser.parse_args()
    if not options.lab.is_file():
        parser.error(f"{options.lab} is not there: stand a lab up first")
    try:
        rows, _unguarded = read_rows(ROWS)
        lab = Lab(options.lab)
        if any([restore(lab, host) for host in lab.hosts("all")]):
            converged(lab)  # a soak was killed here: the daemons still run with the broken file
    except SabotageError as error:
        parser.error(str(error))
    if unknown := set(options.only) - {row.test.partition("::")[2] for row in rows}:
        parser.error(f"no row has the test {min(unknown)}: names stand without their file")
    results = []

    def tell(name: str, check: Callable[[], tuple[bool, str]]) -> None:
        started = time.monotonic()
        good, reason = check()
        results.append(good)
        seconds = time.monotonic() - started
        print(f"{'passed' if good else 'FAILED'} {seconds:5.0f} s  {name}\n                {reason}", flush=True)

    if options.only:
        rows = [row for row in rows if row.test.partition("::")[2] in options.only]
    for row in rows:
        tell(f"{row.test.partition('::')[2]}: {row.setting}", functools.partial(sabotage, lab, row))
    tests = sorted(
        {f"tests/acceptance/{row.test.partition('::')[0]}" for row in rows} if options.only else ["tests/acceptance"]
    )
    tell(f"afterwards {', '.join(tests)} are green", functools.partial(all_green, lab, tests))
    tell("afterwards a run changes nothing", functools.partial(converged, lab))
    print(f"{results.count(True)} passed, {results.count(False)} failed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
