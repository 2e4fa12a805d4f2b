"""How long mail is kept after its holder has left, what is reported of it, and who reads a mailbox otherwise."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import zipfile
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from imapclient.exceptions import IMAPClientError
from playbook import CHECKOUT, Files, Province, Run
from service import OUTSIDER, Mailbox, Service, letter, wait

# As the engine marks what it has written: an entry without it was made by hand, and no timer touches that.
WRITTEN = {"mailboxDigest": "0" * 64}


def time(days: int) -> str:
    """The time so many days from now, as LDAP writes it."""
    return (datetime.now(UTC) + timedelta(days=days)).strftime("%Y%m%d%H%M%SZ")


def places(service: Service, box: Mailbox) -> list[str]:
    """Where something of a mailbox lies: "HOST PATH", in the store and in the copy for backups."""
    name = box.dn.split(",")[0].removeprefix("uid=")
    found = []
    for store in service.in_group("mailstore"):
        for path in (name, f".backup/mailboxes/{name}", f".backup/catalogue/{name}.jsonl"):
            path = f"/srv/vmail/{path}"
            if service.inside(store).file(path).exists:
                found.append(f"{store} {path}")
    return found


def purge(service: Service) -> None:
    """What the timers start: the holder's ends the retention, each store's removes the content."""
    service.run(service.in_group("directory")[0], "systemctl start directory-purge.service")
    for store in service.in_group("mailstore"):
        service.run(store, "systemctl start mailbox-purge.service")


@pytest.mark.requirement("DL-7.3", "CT-7.3")
def test_leaver_is_kept_without_login_then_purged_on_both_hosts(
    service: Service, lab: dict[str, Any], new_mailbox: Callable[..., Mailbox], tmp_path: Path
) -> None:
    """No administrator has to remember it, and the record says until when backups hold it."""
    kept = Files(lab, tmp_path).policy["retention"]
    box = new_mailbox(**WRITTEN)
    name = box.dn.split(",")[0].removeprefix("uid=")
    stores = service.in_group("mailstore")
    service.send(letter(OUTSIDER, box.address), box.address, service.address)
    wait("the mail on each host", lambda: len(places(service, box)) >= len(stores))
    for store in stores:
        # Where a backup was made the copy is that one's; where none was, one as it would lie after a switch-over.
        tree = "/srv/vmail/.backup"
        made = f"umask 077; mkdir -p {tree}/mailboxes/{name} {tree}/catalogue; touch {tree}/catalogue/{name}.jsonl"
        service.run(store, f"if systemctl -q is-active holder.target; then mail-backup run mail; else {made}; fi")
    service.modify(box.dn, mailboxState="dissolved", mailboxStateSince=time(-10), mailboxRetainUntil=time(1))
    with pytest.raises(IMAPClientError), box.imap():
        pass
    purge(service)
    assert len(places(service, box)) == 3 * len(stores), "it was purged before its time"

    service.modify(box.dn, mailboxRetainUntil=time(-1))
    try:

        def gone() -> bool:
            purge(service)
            return not places(service, box)

        wait("nothing of it on any host", gone)  # the other host hears of it a moment later
        with service.ldap_admin() as admin:
            assert not admin.search(f"ou=units,{service.base}", f"(uid={name})")
            admin.search(f"ou=released,{service.base}", f"(uid={name})", attributes=["mailboxBackupsUntil"])
            (until,) = [str(entry.mailboxBackupsUntil.value) for entry in admin.entries]
        expected = date.today() + timedelta(days=max(kept["backups"].values()) + 7)
        assert abs(datetime.strptime(until[:8], "%Y%m%d").date() - expected) <= timedelta(days=1)
        assert [row for row in decisions(service) if row.get("id") == name and row["action"] == "purge"]
    finally:
        with service.ldap_admin() as admin:
            admin.delete(f"uid={name},ou=released,{service.base}")


def decisions(service: Service) -> list[dict[str, Any]]:
    """The changes in the decision log, as its auditor reads them."""
    word = service.secrets["vault_openldap_auditor_password"]
    with service.ldap(f"cn=auditor,ou=services,{service.base}", word) as auditor:
        auditor.search(f"ou=decisions,{service.base}", "(decisionChange=*)", attributes=["decisionChange"])
        return [json.loads(value) for entry in auditor.entries for value in entry.decisionChange.values]


def test_report_names_what_is_kept_and_what_is_overdue(
    service: Service, lab: dict[str, Any], new_mailbox: Callable[..., Mailbox], tmp_path: Path
) -> None:
    """The entries are made by hand, so that no timer ends their retention meanwhile."""
    since = {"mailboxState": "dissolved", "mailboxStateSince": time(-100)}
    late = new_mailbox(**since, mailboxRetainUntil=time(-2))
    waiting = new_mailbox(**since, mailboxRetainUntil=time(80))
    files = Files(lab, tmp_path)
    run = files.run("retention.yml")
    assert run.status != 0 and f"<{late.address}> should have been purged" in run.message, run.output
    assert waiting.address not in run.message
    assert not any(run.changed[host] for host in service.hosts), run.changed
    report = json.loads((CHECKOUT / "build" / "retention.json").read_text(encoding="utf-8"))
    known = {row["address"]: row for row in report["leavers"]}
    assert known[late.address]["overdue"] and not known[waiting.address]["overdue"]
    assert known[waiting.address]["until"] == (datetime.now(UTC) + timedelta(days=80)).date().isoformat()
    days = {row["what"]: row["days"] for row in report["kept"]}
    kept = files.policy["retention"]
    assert (days["logs"], days["Junk"], days["Trash"], days["message journal"], days["mailboxes of leavers"]) == tuple(
        kept[name] for name in ("logs_days", "junk_days", "trash_days", "journal_days", "leaver_days")
    )


@pytest.mark.requirement("BD-2.4")
def test_mailbox_is_read_on_stated_grounds_only(
    service: Service, lab: dict[str, Any], new_mailbox: Callable[..., Mailbox], tmp_path: Path
) -> None:
    """Written down before, encrypted to the operator, no more than what was asked for; the mailbox does not change."""
    box = new_mailbox()
    wanted = letter(OUTSIDER, box.address, subject="Công văn số 12")
    other = letter(OUTSIDER, box.address, subject="Việc riêng")
    with box.imap() as client:
        for message in (wanted, other):
            client.append("INBOX", message.as_bytes())
    province = Province(lab, tmp_path)

    def access(*more: str) -> Run:
        values = [f"mailbox={box.address}", "what=messages", "subject='công văn'", *more]
        return province.run("mailbox-access.yml", *(part for value in values for part in ("-e", value)))

    for grounds in ((), ("grounds=' '",)):
        run = access(*grounds)
        assert run.status != 0 and "Nobody reads mail without grounds" in run.message, run.output
    assert not [row for row in decisions(service) if row.get("address") == box.address]
    assert not list(tmp_path.glob("access/*"))

    run = access("grounds='15/QĐ-thử'")
    assert run.status == 0, run.output
    (noted,) = [row for row in decisions(service) if row.get("address") == box.address]
    assert (noted["action"], noted["refs"], noted["subject"]) == ("access", {"grounds": "15/QĐ-thử"}, "công văn")
    (copy,) = tmp_path.glob("access/*.cms")
    command = ["openssl", "cms", "-decrypt", "-binary", "-inform", "DER", "-inkey", province.build / "operator-key.pem"]
    done = subprocess.run([*command, "-in", copy], check=True, capture_output=True)
    with zipfile.ZipFile(io.BytesIO(done.stdout)) as archive:
        rows = list(csv.DictReader(io.StringIO(archive.read("list.csv").decode("utf-8-sig"))))
        assert [row["message_id"] for row in rows] == [wanted["Message-ID"]]
        assert str(wanted["Message-ID"]).encode() in archive.read(rows[0]["file"])
        assert len(archive.namelist()) == 2
    assert b"C\xc3\xb4ng" not in copy.read_bytes()
    with box.imap() as client:
        client.select_folder("INBOX", readonly=True)
        assert len(client.search("UNSEEN")) == 2
