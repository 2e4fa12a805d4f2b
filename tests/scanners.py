"""Scanners that are not ours against a running lab: testssl.sh, ssh-audit and Lynis, as Debian packages them.

    python tests/scanners.py --lab build/soak/lab.json

The first two run on the lab's host outside, Lynis on every host; they are removed afterwards. Prints a Markdown table
of what they found. What is of medium severity or higher (testssl.sh), fails or warns (ssh-audit), or warns (Lynis)
ends with exit code 1 unless tests/scanner_exceptions.yml gives a reason for it.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from soak import CHECKOUT, Lab, SabotageError

EXCEPTIONS = CHECKOUT / "tests" / "scanner_exceptions.yml"
OUTSIDE = "outside"
# Port → what testssl.sh calls the protocol that begins in the clear, nothing where TLS comes first; by function.
PORTS = {
    "mx": {25: "smtp"},
    "mailstore": {587: "smtp", 465: "", 143: "imap", 993: "", 110: "pop3", 995: "", 4190: "sieve", 11334: ""},
    "directory": {636: ""},
}
SEVERE = {"MEDIUM", "HIGH", "CRITICAL", "FATAL"}


@dataclass(frozen=True)
class Finding:
    """What a scanner says against a target; `id` is the scanner's own name of it."""

    scanner: str
    target: str
    id: str
    text: str


def read_exceptions(path: Path) -> dict[tuple[str, str], str]:
    """(scanner, id of a finding) → reason why it stands.

    Raises SabotageError, one sentence with file and row, when one is not whole.
    """
    found = {}
    for number, item in enumerate(yaml.safe_load(path.read_text(encoding="utf-8"))["exceptions"], 1):
        if set(item) != {"scanner", "id", "reason"} or len(str(item["reason"]).split()) < 4:
            raise SabotageError(
                f"{path.name}, row {number}: needs scanner, id and a reason of some words, nothing else"
            )
        found[item["scanner"], item["id"]] = str(item["reason"])
    return found


@contextmanager
def installed(lab: Lab, host: str, packages: list[str]) -> Iterator[None]:
    """The time with Debian packages on a host; those that were not there go again."""
    had = lab.run(host, "dpkg-query -W -f '${Package} ${db:Status-Status}\\n'").splitlines()
    missing = " ".join(package for package in packages if f"{package} installed" not in had)
    apt = "DEBIAN_FRONTEND=noninteractive apt-get -qq -o APT::Install-Recommends=false"
    if missing:
        lab.run(host, f"{apt} update && {apt} install -y {missing} >/dev/null")
    try:
        yield
    finally:
        if missing:
            lab.run(host, f"{apt} purge -y --autoremove {missing} >/dev/null")


def testssl_findings(report: str, target: str) -> list[Finding]:
    """Findings of medium severity or higher in testssl.sh's flat JSON report.

    Raises SabotageError when the report shows no TLS at all: a scan that did not happen is no pass.
    """
    entries: list[dict[str, Any]] = json.loads(report)
    if not any(entry["id"] == "TLS1_3" for entry in entries):
        raise SabotageError(f"testssl.sh could not scan {target}: {entries[-1]['finding'] if entries else 'no report'}")
    severe = [entry for entry in entries if entry["severity"] in SEVERE]
    return [Finding("testssl.sh", target, entry["id"], entry["finding"]) for entry in severe]


def ssh_audit_findings(report: str, target: str) -> list[Finding]:
    """Algorithms that fail or make ssh-audit warn in its JSON report, and known holes."""
    data: dict[str, Any] = json.loads(report)
    if not data.get("kex"):
        raise SabotageError(f"ssh-audit could not scan {target}")
    found = [Finding("ssh-audit", target, cve["name"], cve.get("description", "")) for cve in data.get("cves", [])]
    for kind in ("kex", "key", "enc", "mac"):
        for item in data[kind]:
            for level in ("fail", "warn"):
                found += [
                    Finding("ssh-audit", target, item["algorithm"], f"{level}: {note}")
                    for note in item.get("notes", {}).get(level, [])
                ]
    return found


def lynis_findings(report: str, target: str) -> tuple[list[Finding], str]:
    """Warnings in Lynis' report, and its summary: hardening index and number of suggestions."""
    index = re.search(r"^hardening_index=(\d+)$", report, re.MULTILINE)
    if not index:
        raise SabotageError(f"Lynis did not finish on {target}")
    lines = re.findall(r"^warning\[\]=([^|]+)\|([^|]*)\|", report, re.MULTILINE)
    suggestions = len(re.findall(r"^suggestion\[\]=", report, re.MULTILINE))
    warnings = [Finding("Lynis", target, name, text) for name, text in lines]
    return warnings, f"hardening index {index[1]}, {suggestions} suggestions"


def scan(lab: Lab) -> Iterator[tuple[str, str, list[Finding], str]]:
    """Yield (scanner, target, findings, remark) for every scan."""
    with installed(lab, OUTSIDE, ["testssl.sh", "ssh-audit", "socat"]):
        lab.run(OUTSIDE, "cat > /tmp/ca.pem", Path(lab.data["ca_file"]).read_text(encoding="ascii"))
        for group, ports in PORTS.items():
            host = lab.hosts(group)[0]
            address, name = lab.data["hosts"][host]["addresses"]["v4"], f"{host}.{lab.data['domain']}"
            for port, protocol in ports.items():
                target, report = f"{name}:{port}", f"/tmp/testssl-{port}.json"
                start = f"--starttls {protocol}" if protocol else ""
                # Its exit code counts findings; whether it scanned at all, the report tells.
                lab.run(
                    OUTSIDE,
                    f"rm -f {report}; testssl --quiet --color 0 --warnings off --add-ca /tmp/ca.pem --nodns none "
                    f"--ip {address} {start} --jsonfile {report} {shlex.quote(target)} >/dev/null 2>&1 || true",
                )
                yield "testssl.sh", target, testssl_findings(lab.run(OUTSIDE, f"cat {report}; rm {report}"), target), ""
        for host, values in lab.data["hosts"].items():
            report = lab.run(OUTSIDE, f"ssh-audit -j {values['addresses']['v4']} || true")
            yield "ssh-audit", host, ssh_audit_findings(report, host), ""
        lab.run(OUTSIDE, "rm /tmp/ca.pem")
    for host in lab.hosts("all"):
        with installed(lab, host, ["lynis"]):
            lab.run(host, "lynis audit system --quick --quiet --no-colors >/dev/null 2>&1 || true")
            report = lab.run(host, "cat /var/log/lynis-report.dat; rm -f /var/log/lynis-report.dat /var/log/lynis.log")
            findings, remark = lynis_findings(report, host)
            yield "Lynis", host, findings, remark


def main() -> int:
    """Run the command line; exit code 1 when a finding has no reason to stand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", type=Path, required=True, help="lab.json of a running lab")
    options = parser.parse_args()
    try:
        reasons = read_exceptions(EXCEPTIONS)
        print("| scanner | target | result |\n|---|---|---|", flush=True)
        bad, stood = 0, set()
        for scanner, target, findings, remark in scan(Lab(options.lab)):
            words = [remark] if remark else []
            for finding in dict.fromkeys(findings):
                reason = reasons.get((finding.scanner, finding.id))
                stood.add((finding.scanner, finding.id))
                bad += reason is None
                words.append(f"{finding.id}: {finding.text} ({f'stands: {reason}' if reason else 'NO REASON GIVEN'})")
            print(f"| {scanner} | {target} | {'; '.join(words) or 'nothing'} |", flush=True)
    except SabotageError as error:
        print(error, file=sys.stderr)
        return 1
    for scanner, name in reasons.keys() - stood:
        print(f"{EXCEPTIONS.name}: {scanner} no longer finds {name}; take the row out.", file=sys.stderr)
        bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
