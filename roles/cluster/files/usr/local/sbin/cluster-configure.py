#!/usr/bin/python3
"""cluster-configure [--check]: bring Pacemaker's configuration to what /etc/pacemaker/hopthu.xml says.

Prints a line for each section that differs, and replaces it; with --check it only prints. What operators set stays:
moves (constraints whose id begins with cli-), standby, and options outside our own set.
"""

import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from pathlib import Path

WANTED = Path("/etc/pacemaker/hopthu.xml")
SECTIONS = ("crm_config", "rsc_defaults", "resources", "constraints")
OPTIONS = "hopthu-options"
QUORUM_SECONDS = 90


def canonical(element):
    """Return an element's text in one form, whatever the order of attributes and the white space."""
    return xml.canonicalize(xml.tostring(element, encoding="unicode"), strip_text=True)


def merged(section, live, wanted):
    """Return a section as it is to be: the wanted one with what operators have set in the live one."""
    result = xml.fromstring(xml.tostring(wanted))
    for child in live:
        name = child.get("id", "")
        if (section == "constraints" and name.startswith("cli-")) or (section == "crm_config" and name != OPTIONS):
            result.append(child)
    return result


def content(element):
    """Return a section's children, each in one form; their order has no meaning."""
    return sorted(canonical(child) for child in element)


def differences(live, wanted):
    """Yield (section, element that is to replace it) for each section that is not as it should be.

    live, wanted: the element `configuration`.
    """
    for section in SECTIONS:
        now, then = live.find(section), wanted.find(section)
        now = xml.Element(section) if now is None else now
        result = merged(section, now, then)
        if content(now) != content(result):
            yield section, result


def run(*command, text=None):
    """Run a command and return what it prints; SystemExit with one sentence when it fails."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def await_quorum():
    """Wait until the host is in a partition that may decide; what another one decided meanwhile would be lost."""
    deadline = time.monotonic() + QUORUM_SECONDS
    while True:
        done = subprocess.run(["crm_node", "--quorum"], capture_output=True, text=True, timeout=30, check=False)
        if done.stdout.strip() == "1":
            return
        if time.monotonic() > deadline:
            raise SystemExit("the cluster has no quorum: start the other host or the witness first")
        time.sleep(1)


def main():
    """Compare, and replace what differs."""
    await_quorum()
    wanted = xml.parse(WANTED).getroot()
    live = xml.fromstring(run("cibadmin", "--query", "--scope=configuration"))
    changes = dict(differences(live, wanted))
    for section, element in changes.items():
        print(section)
        if (now := live.find(section)) is not None:
            live.remove(now)
        live.append(element)
    if changes and "--check" not in sys.argv:
        # All at once: a constraint must not name a resource that is not there yet or no more. By standard input: a
        # command line is everybody's to read.
        text = xml.tostring(live, encoding="unicode")
        run("cibadmin", "--replace", "--scope=configuration", "--xml-pipe", text=text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
