"""For root: list entries, note what is safe after a takeover, bring back what a lost host took with it."""

from __future__ import annotations

import email.utils
import functools
import json
import smtplib
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from systemd import journal

from mail_journal.records import HEADER, expand, gone_unseen, open_recipients, split_maps

CONTROL = "/run/mail-journal/control.sock"
LMTP = "/run/dovecot/lmtp"
NO_SUCH_USER = 67


class Refused(Exception):
    """Nothing was done, and why."""


def request(**question: Any) -> Any:
    """Ask the daemon of this host. Refused when it does not run."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(120)
            connection.connect(CONTROL)
            connection.sendall(json.dumps(question).encode() + b"\n")
            with connection.makefile("rb") as answer:
                return json.loads(answer.readline())
    except (OSError, ValueError) as error:
        raise Refused(f"mail-journal.service of this host does not answer ({error})") from error


def output(command: list[str], none: Iterable[int] = ()) -> str:
    """What a command prints; empty when it ends with a code in `none`, Refused when it fails otherwise."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode in none:
        return ""
    if done.returncode:
        raise Refused(f"{command[0]} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


# --- this host's Postfix and Dovecot ----------------------------------------------------------


class Service:
    """What Postfix and Dovecot of this host say; each question is asked once."""

    def __init__(self, foreign: list[str]) -> None:
        """foreign: beginnings of the names of mailboxes that belong to others."""
        self.foreign = tuple(foreign)
        self._answers: dict[tuple[str, str], str] = {}
        self._users: dict[str, str] = {}
        self._present: dict[tuple[str, float], set[str]] = {}
        value = ["virtual_alias_maps", "virtual_mailbox_domains", "recipient_delimiter", "myorigin"]
        lines = output(["postconf", "-x", *value]).splitlines()
        found = dict(line.split(" = ", 1) if " = " in line else (line.rstrip(" ="), "") for line in lines)
        self.aliases = split_maps(found["virtual_alias_maps"])
        self.domains = set(found["virtual_mailbox_domains"].replace(",", " ").lower().split())
        self.delimiter = found["recipient_delimiter"][:1]
        self.origin = found["myorigin"]
        copies = output(["postconf", "-Px", "*/unix/sender_bcc_maps"], none=[1]).splitlines()
        self.copies = [name for line in copies for name in split_maps(line.split(" = ", 1)[1])]

    def lookup(self, tables: list[str], key: str) -> str:
        """The first answer of lookup tables for a key; empty without one."""
        for table in tables:
            if (table, key) not in self._answers:
                self._answers[table, key] = output(["postmap", "-q", key, table], none=[1]).strip()
            if self._answers[table, key]:
                return self._answers[table, key]
        return ""

    def final(self, entry: dict[str, Any]) -> list[str]:
        """The final recipients of an entry, as aliases and groups are now."""
        addresses = list(entry["envelope"])
        if entry["authenticated"] and (copy := self.lookup(self.copies, entry["sender"].lower())):
            addresses.append(copy)
        return expand(addresses, lambda key: self.lookup(self.aliases, key), self.origin, self.delimiter)

    def is_ours(self, address: str) -> bool:
        """Whether an address lies in a domain whose mailboxes are here."""
        return address.rpartition("@")[2].lower() in self.domains

    def user(self, address: str) -> str:
        """The mailbox behind a final recipient; empty when there is none."""
        local, _, domain = address.rpartition("@")
        base = local.partition(self.delimiter)[0] if self.delimiter else local
        name = f"{base or local}@{domain}"
        if name not in self._users:
            found = output(["doveadm", "user", "-f", "home", name], none=[NO_SUCH_USER]).strip()
            self._users[name] = name if found else ""
        return self._users[name]

    def present(self, user: str, since: float) -> set[str]:
        """The ids of all messages that came into a user's own mailboxes since a time; as they are now."""
        key = user, since
        if key not in self._present:
            day = time.strftime("%Y-%m-%d", time.gmtime(since - 86400))
            command = ["doveadm", "-f", "json", "fetch", "-u", user, f"mailbox hdr.{HEADER.lower()}"]
            answer = output([*command, "HEADER", HEADER, "-", "SAVEDSINCE", day])
            self._present[key] = {
                line[f"hdr.{HEADER.lower()}"].strip()
                for line in json.loads(answer or "[]")
                if not line["mailbox"].startswith(self.foreign or ("\0",))
            }
        return self._present[key]


# --- what is to be done ------------------------------------------------------------------------


@dataclass
class Work:
    """What a replay does, or would do: (entry, final recipient) pairs."""

    deliver: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    send: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    present: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    unknown: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    def numbers(self) -> dict[str, int]:
        """How many of each."""
        return {name: len(getattr(self, name)) for name in ("deliver", "send", "present", "unknown")}


def plan(
    entries: list[dict[str, Any]], lost: str, here: str, service: Service, unseen: Callable[[dict[str, Any]], bool]
) -> Work:
    """Sort the unsettled entries' recipients by what each needs; unseen: see gone_unseen."""
    work = Work()
    open_ones: dict[str, list[tuple[dict[str, Any], str]]] = defaultdict(list)
    oldest = min((entry["time"] for entry in entries), default=0.0)
    for entry in entries:
        blind = entry["host"] == lost or unseen(entry)
        for address in open_recipients(entry, lost, here, service.final(entry) if blind else []):
            if not service.is_ours(address):
                work.send.append((entry, address))
            elif user := service.user(address):
                open_ones[user].append((entry, address))
            else:
                work.unknown.append((entry, address))
        if entry["host"] == lost:
            work.finished.append(entry["id"])
    for user, pairs in open_ones.items():
        there = service.present(user, oldest)
        for entry, address in pairs:
            (work.present if entry["id"] in there else work.deliver).append((entry, address))
    return work


def content(folder: Path, entry: dict[str, Any]) -> bytes:
    """A message as it was accepted, with a line that says when and by whom."""
    segment, offset, size = entry["place"]
    with (folder / "segments" / f"{segment:010d}.seg").open("rb") as file:
        file.seek(offset)
        text = file.read(size)
    if len(text) != size:
        raise OSError(f"the content of {entry['id']} is not whole")
    protocol = "ESMTPA" if entry["authenticated"] else "ESMTP"
    received = (
        f"Received: from {entry['client']}\r\n\tby {entry['host']} with {protocol}"
        f" id {entry['qid']};\r\n\t{email.utils.formatdate(entry['time'], localtime=True)}\r\n"
    )
    return received.encode(errors="replace") + text


def mark(entry: dict[str, Any], recipient: str, state: str) -> None:
    """Note a recipient's state in both journals."""
    operation = {"op": "recipient", "id": entry["id"], "recipient": recipient, "state": state}
    request(do="apply", operations=[operation])


def tell(text: str) -> None:
    """A line in the system's log."""
    journal.send(text, SYSLOG_IDENTIFIER="mail-journal-replay")


def do(work: Work, folder: Path) -> dict[str, int]:
    """Carry out a plan; returns how many recipients were served and how many could not be now."""
    failed: list[str] = []
    # Nothing is given up for a mailbox that is not known now: it stays open, and listed, until it is too old.
    left = {entry["id"] for entry, _address in work.unknown}
    for entry, address in work.present:
        mark(entry, address, "safe")
    for entry, address in [*work.deliver, *work.send]:
        try:
            text = content(folder, entry)
            if (entry, address) in work.send:
                command = ["/usr/sbin/sendmail", "-i", "-f", entry["sender"] or "<>", "--", address]
                subprocess.run(command, input=text.replace(b"\r\n", b"\n"), check=True, timeout=60)
            else:
                with smtplib.LMTP(LMTP) as server:
                    server.sendmail(entry["sender"], [address], text)
        except (OSError, smtplib.SMTPException, subprocess.SubprocessError) as error:
            failed.append(entry["id"])
            tell(f"{entry['id']} to {address}: not brought back now ({error})")
            continue
        mark(entry, address, "replayed")
        tell(f"{entry['id']} to {address}: brought back")
    for entry, address in work.unknown:
        tell(f"{entry['id']} to {address}: there is no such mailbox (any more)")
    done = [{"op": "done", "id": identifier} for identifier in work.finished if identifier not in {*failed, *left}]
    if done:
        request(do="apply", operations=done)
    return {"brought_back": len(work.deliver) + len(work.send) - len(failed), "failed": len(failed)}


def is_alive(host: str, port: int) -> bool:
    """Whether a host answers: on the journal's port, SMTP or SSH."""
    for number in (port, 25, 22):
        try:
            socket.create_connection((host, number), timeout=3).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            continue
        return True
    return False


def replay(settings: dict[str, Any], lost: str, *, rebuilt: bool, dry: bool) -> dict[str, Any]:
    """Bring back what `lost` (full name) took with it; Refused while it is alive."""
    if lost != settings["peer"]:
        raise Refused(f"{lost} is not the peer of this host ({settings['peer'] or 'there is none'})")
    if not rebuilt and is_alive(lost, settings["port"]):
        raise Refused(f"{lost} answers: it is not lost. Rebuilt from nothing? Then say so (rebuilt)")
    asked = time.time()
    # Twice: what goes from one part of the queue to another during a look may be in neither.
    looks = [output(["postqueue", "-j"]) for _look in range(2)]
    queued = {json.loads(line)["queue_id"] for look in looks for line in look.splitlines()}
    if not request(do="catch_up")["caught_up"]:
        raise Refused("the log has not been read to its end yet: try again in a moment")
    entries = request(do="entries", which="unsettled")
    here = settings["host"]
    unseen = functools.partial(gone_unseen, here=here, queued=queued, before=asked)
    work = plan(entries, lost, here, Service(settings["foreign_mailboxes"]), unseen)
    result = {"brought_back": 0, "failed": 0} if dry else do(work, Path(settings["folder"]))
    what = [
        {"id": entry["id"], "recipient": address, "action": action}
        for action in ("deliver", "send", "unknown")
        for entry, address in getattr(work, action)
    ]
    return {"examined": len(entries), **work.numbers(), **result, "recipients": what}


def settle(settings: dict[str, Any]) -> dict[str, int]:
    """Note as safe whatever unsettled entry is in its recipient's mailbox here: a later deletion stays one."""
    request(do="catch_up")
    entries = [entry for entry in request(do="entries", which="unsettled") if not entry["done"]]
    service = Service(settings["foreign_mailboxes"])
    oldest = min((entry["time"] for entry in entries), default=0.0)
    operations, looked = [], 0
    for entry in entries:
        known = entry["recipients"]
        waiting = [address for address, is_at in known.items() if is_at["state"] == "delivered"]
        if entry["host"] != settings["host"]:
            waiting += [address for address in service.final(entry) if address not in known]
        for address in waiting:
            looked += 1
            user = service.user(address) if service.is_ours(address) else ""
            if user and entry["id"] in service.present(user, oldest):
                operations.append({"op": "recipient", "id": entry["id"], "recipient": address, "state": "safe"})
    request(do="apply", operations=operations)
    return {"entries": len(entries), "recipients": looked, "safe": len(operations)}


def drop_replayed(settings: dict[str, Any], seconds: float) -> int:
    """On a lost host that is back with its disk: delete from its queue what the other one has brought back meanwhile.

    seconds: how long to wait for the other one to tell; returns the number of messages.
    """
    deadline = time.monotonic() + seconds
    while settings["peer"] and not request(do="status")["peer_told"] and time.monotonic() < deadline:
        time.sleep(0.5)
    ids = [entry["qid"] for entry in request(do="entries", which="done") if entry["host"] == settings["host"]]
    if ids:
        subprocess.run(["postsuper", "-d", "-"], input="\n".join(ids), text=True, check=True, timeout=600)
    return len(ids)


def is_replayed(identifier: str) -> bool:
    """Whether a replay has dealt with an entry while its queue file was still there."""
    return any(entry["id"] == identifier for entry in request(do="entries", which="done"))


def listing(which: str) -> list[dict[str, Any]]:
    """Metadata of entries: no content, no subject, no address."""
    found = []
    for entry in request(do="entries", which=which):
        states = [is_at["state"] for is_at in entry["recipients"].values()]
        found.append(
            {
                "id": entry["id"],
                "host": entry["host"],
                "qid": entry["qid"],
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(entry["time"])),
                "octets": entry["place"][2],
                "state": "settled" if entry["settled"] else "open",
                "copies": "alone" if entry["alone"] else "both",
                "envelope": len(entry["envelope"]),
                "recipients": {state: states.count(state) for state in sorted(set(states))},
            }
        )
    return found
