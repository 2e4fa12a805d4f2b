"""Two hosts and a witness: what is accepted is never lost, and the service goes on without a host, a cable, a daemon.

The three faults that every run of `make test` makes; all of them are made by tests/availability.py.
"""

from __future__ import annotations

import functools
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from faults import COMPARE_DIRECTORY, COMPARE_MAIL, FAULTS, FULL, JOURNAL_LIST, Hosts, save, silent_difference, trial
from playbook import Province
from service import OUTSIDER, Mailbox, Service, letter, wait

# What is stored besides, for the latter two, test_backup.py and test_restore.py show.
RUNS = ["DL-6.3", "HT-4.1a", "CT-6.2"]
HOLD = 20  # seconds that a fault lasts
# Figures are in build/availability.json; these are for a machine that is busy with something else.
GAP, TWO_HOLDERS = 60, 20


@pytest.fixture(scope="module")
def hosts(service: Service) -> Hosts:
    """The lab's hosts from outside; two full ones and the witness, and all is well."""
    found = Hosts(service)
    assert len(found.full) == 2, "this lab has one full host only"
    return found


@pytest.mark.requirement(*RUNS)
@pytest.mark.parametrize("fault", ["active host killed", "hosts cut apart", "slapd killed"])
def test_nothing_accepted_is_lost(hosts: Hosts, fault: str) -> None:
    """Under a running load: every id that got its 250 is in its mailbox, once, on both hosts."""
    with trial(hosts, fault) as seen, FAULTS[fault](hosts):
        time.sleep(HOLD)
    assert seen.good, seen.row
    assert seen.row["passwords_refused"] == 0, "a mail program would have asked its user for a new password"
    assert seen.row["gap_s"] < GAP and seen.row["two_holders_s"] < TWO_HOLDERS, seen.row


@pytest.mark.requirement(*RUNS)
def test_planned_switch_over_interrupts_a_session_once(hosts: Hosts, lab: dict[str, Any], tmp_path: Path) -> None:
    """And the other host then serves everything; nothing is refused, nothing is lost."""
    before, service = hosts.active(), hosts.service
    with trial(hosts, "planned switch-over") as seen:
        run = Province(lab, tmp_path).run("switchover.yml")
        assert run.status == 0, run.output
    assert hosts.active() != before
    assert seen.good, seen.row
    assert seen.row["sessions_lost"] <= 1 and seen.row["gap_s"] < GAP, seen.row
    with service.ldap_admin(), seen.load.recipients[0].imap():
        pass


def test_both_hosts_hold_every_message(hosts: Hosts, mailbox: Mailbox) -> None:
    """A moment after its delivery; flags and deletions as well."""
    identifier = mailbox.service.send(letter(OUTSIDER, mailbox.address), mailbox.address, mailbox.service.address)
    query = f"-u '{mailbox.address}' flags mailbox INBOX header Message-ID '{identifier}'"

    def flags(host: str) -> str:
        return hosts.attempt(host, f"doveadm -f flow fetch {query}").stdout.strip()

    for host in hosts.full:
        wait(f"{identifier} on {host}", functools.partial(flags, host))
    with mailbox.imap() as client:
        uid = mailbox.has(client, identifier)
        client.add_flags([uid], [b"\\Flagged"])
        wait("the flag on both", lambda: all("Flagged" in flags(host) for host in hosts.full))
        client.delete_messages([uid])
        client.expunge()
    wait("the deletion on both", lambda: not any(flags(host) for host in hosts.full))


def test_what_a_sync_left_twice_is_there_once(hosts: Hosts, mailbox: Mailbox) -> None:
    """Dovecot may number a message anew and keep it under the old number too; a copy within the folder is the same."""
    message = letter(OUTSIDER, mailbox.address)
    save(hosts, hosts.active(), mailbox.address, message.as_string())
    query = f"mailbox INBOX header Message-ID '{message['Message-ID']}'"
    hosts.run(hosts.active(), f"doveadm copy -u {mailbox.address} INBOX {query}")
    counted = f"doveadm -f flow fetch -u {mailbox.address} 'uid guid' {query} | sort"
    first, second = hosts.run(hosts.active(), counted).splitlines()
    assert first.split()[1] == second.split()[1], "not the same GUID: nothing that a sync would leave"
    hosts.run(hosts.active(), f"mail-sync user {mailbox.address}")
    for host in hosts.full:
        wait(f"one of them on {host}", lambda host=host: hosts.run(host, counted).splitlines() == [first])


def test_both_directories_are_equal(hosts: Hosts, mailbox: Mailbox) -> None:
    """Entry by entry, not only by their own counters."""
    done = hosts.attempt(hosts.active(), COMPARE_DIRECTORY)
    assert done.returncode == 0, done.stdout + done.stderr
    for host in hosts.full:
        address = hosts.service.hosts[host]["addresses"]["v4"]
        with hosts.service.ldap(mailbox.dn, mailbox.password, address) as connection:
            assert connection.bound, f"{host} does not know a mailbox that was made on the other"


def test_journal_holds_a_message_on_both_hosts_when_it_is_acknowledged(hosts: Hosts, mailbox: Mailbox, mx: str) -> None:
    message = letter(OUTSIDER, mailbox.address)
    with mailbox.service.smtp(mx) as smtp:
        smtp.mail(OUTSIDER)
        smtp.rcpt(mailbox.address)
        code, answer = smtp.data(message.as_bytes())
    queued = re.search(rb"queued as (\w+)", answer)
    assert code == 250 and queued, answer
    listed = {host: map(json.loads, hosts.run(host, JOURNAL_LIST).splitlines()) for host in hosts.full}
    ids = [{entry["id"] for entry in entries if entry["qid"] == queued[1].decode()} for entries in listed.values()]
    assert len(ids[0]) == 1 and ids[0] == ids[1], ids
    (identifier,) = ids[0]
    assert f"X-Journal-Id: {identifier}".encode() in mailbox.take(str(message["Message-ID"]))

    def state(host: str) -> str:
        entries = map(json.loads, hosts.run(host, JOURNAL_LIST).splitlines())
        return next(entry["state"] for entry in entries if entry["id"] == identifier)

    # Delivered and in both stores, as Postfix's log and mail-sync say: only what is not so would be brought back.
    for host in hosts.full:
        wait(f"{host} knows that nothing is left to do", lambda host=host: state(host) == "settled")


def test_silent_difference_is_found_and_repaired(hosts: Hosts, mailbox: Mailbox) -> None:
    """Plain sync may leave two copies different and report success; the check does not believe it."""
    first = letter(OUTSIDER, mailbox.address)
    mailbox.take(mailbox.service.send(first, mailbox.address, mailbox.service.address))
    compare = f"{COMPARE_MAIL} '{mailbox.address}'"
    wait("both copies are equal", lambda: hosts.attempt(hosts.active(), compare).returncode == 0)
    second = letter(OUTSIDER, mailbox.address)
    with silent_difference(hosts, mailbox.address, second.as_string()):
        done = hosts.attempt(hosts.active(), compare)
        assert done.returncode == 1, done.stdout + done.stderr
    hosts.run(hosts.active(), FULL)
    done = hosts.attempt(hosts.active(), compare)
    assert done.returncode == 0, done.stdout + done.stderr
    mailbox.take(str(second["Message-ID"]))
