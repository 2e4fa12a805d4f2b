#!/usr/bin/python3
"""cluster-switch [--check] move [HOST] | standby HOST | rejoin HOST

Moves the service as planned work demands, from the host that holds it. Prints what was done, nothing when nothing was
to do; what is not safe is refused in one sentence, and nothing is changed. With --check it prints what it would do.
"""

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass
from pathlib import Path

SYNC_STATUS = Path("/run/mail-sync/status.json")
SYNC_SECONDS = 60
MOVE_SECONDS = 60
# Ends by itself what this program could not end.
LIFETIME = "PT5M"


class Refused(Exception):
    """Why nothing is done; the message is one sentence."""


class Failed(Exception):
    """What went wrong on the way; the message is one clause."""


@dataclass(frozen=True)
class Member:
    """A host of the cluster: does it run Pacemaker, may it have the service, can it serve, does it hold the service."""

    online: bool
    standby: bool
    green: bool
    holder: bool


def members(text):
    """Return the hosts by name, from what `crm_mon --output-as=xml` prints."""
    root = xml.fromstring(text)
    holders = {node.get("name") for node in root.iterfind(".//resource[@id='holder']/node")}
    return {
        node.get("name"): Member(
            online=node.get("online") == "true" and node.get("pending") != "true",
            standby=node.get("standby") == "true",
            green=node.get("health") == "green",
            holder=node.get("name") in holders,
        )
        for node in root.iterfind("./nodes/node")
    }


def check_successor(cluster, name):
    """Refuse a host that cannot take the service over."""
    host = cluster[name]
    if not host.online:
        raise Refused(f"{name} is not in the cluster: start it first")
    if host.standby:
        raise Refused(f"{name} is in standby: take it in again first (-e rejoin={name})")
    if not host.green:
        raise Refused(f"{name} cannot serve: /run/mail-health/status.json there says why")


def plan(cluster, wish, name):
    """Return (what is to be done or "", host that the service goes to or "").

    wish: move, standby or rejoin; name: a host, "" for the other one of a move. Raises Refused.
    """
    if name and name not in cluster:
        raise Refused(f"there is no host {name} in the cluster: name one of {', '.join(sorted(cluster))}")
    holder = next((host for host, member in cluster.items() if member.holder), None)
    if wish == "rejoin":
        return ("rejoin" if cluster[name].standby else ""), ""
    if holder is None:
        raise Refused("no host holds the service: crm_mon -1 on one of them says why")
    if wish == "standby" and cluster[name].standby:
        return "", ""
    others = [host for host in cluster if host != (name if wish == "standby" else holder)]
    if wish == "standby" and name != holder:
        return "standby", ""
    target = name if wish == "move" and name else others[0]
    if target == holder:
        return "", ""
    check_successor(cluster, target)
    return wish, target


def run(*command):
    """Run a command and return what it prints; Failed when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise Failed(f"{command[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def look():
    """Return the hosts as they are."""
    return members(run("crm_mon", "--one-shot", "--output-as=xml"))


def await_copies():
    """Wait until the peer's copies of the mailboxes are as new as this host's, where something counts that."""
    deadline = time.monotonic() + SYNC_SECONDS
    while SYNC_STATUS.exists():
        behind = json.loads(SYNC_STATUS.read_text(encoding="utf-8")).get("behind", 0)
        if not behind:
            return
        if time.monotonic() > deadline:
            raise Refused(
                f"the other host's copies of {behind} mailboxes are not up to date after {SYNC_SECONDS} s: "
                f"{SYNC_STATUS} says more"
            )
        time.sleep(1)


def await_holder(target):
    """Wait until a host holds the service and no other does."""
    deadline = time.monotonic() + MOVE_SECONDS
    while {name for name, member in look().items() if member.holder} != {target}:
        if time.monotonic() > deadline:
            raise Failed(f"the service is not on {target} after {MOVE_SECONDS} s: crm_mon -1 says where it is")
        time.sleep(0.5)


def act(step, name, target):
    """Do what was planned."""
    if step == "rejoin":
        run("crm_standby", "--node", name, "--delete")
        return
    if target:
        await_copies()
    if step == "standby":
        run("crm_standby", "--node", name, "--update", "on")
    else:
        run("crm_resource", "--move", "--resource", "service", "--node", target, "--lifetime", LIFETIME)
    try:
        if target:
            await_holder(target)
    finally:
        if step == "move":
            # It stays there by itself, and may leave it again when it must.
            run("crm_resource", "--clear", "--resource", "service")


def main():
    """Do what the command line says."""
    words = [word for word in sys.argv[1:] if word != "--check"]
    wish, name = words[0], words[1] if len(words) > 1 else ""
    if wish not in ("move", "standby", "rejoin") or (wish != "move" and not name):
        print(__doc__, file=sys.stderr)
        return 64
    try:
        step, target = plan(look(), wish, name)
        if step and "--check" not in sys.argv:
            act(step, name, target)
    except Refused as refusal:
        print(f"{refusal}. Nothing has been changed.", file=sys.stderr)
        return 1
    except Failed as failure:
        print(f"{failure}.", file=sys.stderr)
        return 1
    said = {"move": "", "standby": f"{name} is in standby", "rejoin": f"{name} is back"}
    parts = [said[step]] if step else []
    if target:
        parts.append(f"the service is on {target}")
    if parts := [part for part in parts if part]:
        print("; ".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
