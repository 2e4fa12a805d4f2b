"""Logs leave the hosts at once and wait for a log host that is away."""

from __future__ import annotations

import re
import secrets
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playbook import run_play
from service import Mailbox, Service, letter, wait

MINUTE = 60


@pytest.fixture
def log_host(service: Service) -> str:
    """The host that keeps the logs."""
    return service.in_group("monitor")[0]


@pytest.fixture
def kept(service: Service, log_host: str) -> Callable[[str, str, str], list[str]]:
    """Lines that the log host keeps of a host and program and that hold a text; * is any program."""

    def find(host: str, program: str, text: str) -> list[str]:
        command = (
            f"cat /var/log/hosts/{host}/????-??-??/{program}.log 2>/dev/null | grep -aF -- {shlex.quote(text)} || true"
        )
        return service.run(log_host, command).splitlines()

    return find


def mail(service: Service, mailbox: Mailbox) -> tuple[str, str, str]:
    """A delivered message leaves lines with its Message-ID."""
    store = service.in_group("mailstore")[0]
    identifier = mailbox.submit(letter(mailbox.address, mailbox.address), mailbox.address, service.address)
    return store, "postfix", identifier.strip("<>")


def login(service: Service, mailbox: Mailbox) -> tuple[str, str, str]:
    """A login leaves a line with the address."""
    with mailbox.imap():
        return service.in_group("mailstore")[0], "dovecot", f"Logged in: user=<{mailbox.address}>"


def directory_login(service: Service, mailbox: Mailbox) -> tuple[str, str, str]:
    """A bind leaves a line with the name."""
    with service.ldap(mailbox.dn, mailbox.password):
        return service.in_group("directory")[0], "slapd", f'BIND dn="{mailbox.dn}" mech=SIMPLE'


def directory_change(service: Service, mailbox: Mailbox) -> tuple[str, str, str]:
    """A change leaves a line with the name."""
    service.modify(mailbox.dn, mailboxQuota=1 << 29)
    return service.in_group("directory")[0], "slapd", f'MOD dn="{mailbox.dn}"'


def administrator(service: Service, _mailbox: Mailbox) -> tuple[str, str, str]:
    """An administrator's login leaves a line with the key."""
    host = service.in_group("mx")[-1]
    public = subprocess.run(
        ["ssh-keygen", "-l", "-f", service.ssh_config.parent / "id_ed25519.pub"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()[1]
    service.run(host, "true")
    subprocess.run(["ssh", "-F", service.ssh_config, "-o", "ControlPath=none", host, "true"], check=True)
    return host, "sshd*", public


def alarm(service: Service, _mailbox: Mailbox) -> tuple[str, str, str]:
    """An alarm is one line, whatever its text holds."""
    host, token = service.in_group("mx")[-1], secrets.token_hex(8)
    service.run(host, f"/usr/local/sbin/alarm thu-nghiem {shlex.quote(f'dòng một{chr(10)}alarm: dòng hai {token}')}")
    return host, "alarm", f"thu-nghiem: dòng một alarm: dòng hai {token}"


@pytest.mark.requirement("N-91")
@pytest.mark.parametrize("happens", [mail, login, directory_login, directory_change, administrator, alarm])
def test_what_happened_is_on_the_log_host_within_a_minute(
    service: Service,
    kept: Callable[[str, str, str], list[str]],
    mailbox: Mailbox,
    happens: Callable[[Service, Mailbox], tuple[str, str, str]],
) -> None:
    host, program, text = happens(service, mailbox)
    wait(f"{text} of {host} on the log host", lambda: kept(host, program, text), MINUTE)


def test_work_of_administrators_is_on_the_log_host(
    service: Service, lab: dict[str, Any], kept: Callable[[str, str, str], list[str]], tmp_path: Path
) -> None:
    token, host = secrets.token_hex(8), service.in_group("mx")[-1]
    play = {"hosts": host, "tasks": [{"ansible.builtin.stat": {"path": f"/tmp/{token}"}}]}
    assert run_play(lab, tmp_path, play).status == 0
    wait("the module's line on the log host", lambda: kept(host, "*", token), MINUTE)


def test_alarms_stand_together(service: Service, log_host: str, mailbox: Mailbox) -> None:
    text = alarm(service, mailbox)[2]
    command = f"grep -F -- {shlex.quote(text)} /var/log/hosts/alarms.log || true"
    wait("the alarm in alarms.log", lambda: service.run(log_host, command), MINUTE)


def test_only_the_daemons_searches_stay_on_the_host(
    service: Service, kept: Callable[[str, str, str], list[str]], mailbox: Mailbox
) -> None:
    host, began = service.in_group("directory")[0], time.time()
    hidden = f"cn=x SRCH {secrets.token_hex(6)},{service.base}"
    with mailbox.imap(), service.ldap(hidden, "sai"):
        pass
    wait("the failed bind on the log host", lambda: kept(host, "slapd", hidden), MINUTE)
    searches = service.journal(host, began, rf"^conn=\d+ op=\d+ SRCH .*{re.escape(mailbox.address)}")
    assert searches, "Dovecot asked the directory nothing: this test would prove nothing"
    assert not kept(host, "slapd", f'filter="(&(objectClass=hopThuMailbox)(mail={mailbox.address})')


@pytest.mark.requirement("N-91")
def test_nothing_is_lost_while_the_log_host_is_away(
    service: Service, log_host: str, kept: Callable[[str, str, str], list[str]]
) -> None:
    host, token = service.in_group("mx")[-1], secrets.token_hex(8)
    write = f"for i in $(seq %d %d); do echo {token}-$i; done | logger -t thu-nghiem"
    try:
        service.run(log_host, "systemctl stop rsyslog.service syslog.socket")
        service.run(host, write % (1, 300))
        # The sender's own daemon starts anew meanwhile: what waits is on its disk.
        service.run(host, "sleep 2; systemctl restart rsyslog.service")
        service.run(host, write % (301, 600))
        assert not kept(host, "thu-nghiem", token)
    finally:
        service.run(log_host, "systemctl start rsyslog.service")
    wanted = {f"{token}-{i}" for i in range(1, 601)}
    wait(
        "all 600 lines on the log host",
        lambda: wanted == {line.rsplit(" ", 1)[-1] for line in kept(host, "thu-nghiem", token)},
        2 * MINUTE,
    )


def test_who_sent_a_line_is_not_what_the_line_says(
    service: Service, kept: Callable[[str, str, str], list[str]]
) -> None:
    host, token = service.in_group("mx")[-1], secrets.token_hex(8)
    service.run(host, f"logger -t ../../../../tmp/thu-nghiem 'mail1 postfix[1]: {token}'")
    wait("the line under its sender", lambda: kept(host, "*", token), MINUTE)
    log_host = service.in_group("monitor")[0]
    assert token not in service.run(log_host, "cat /tmp/thu-nghiem* /var/log/thu-nghiem* 2>/dev/null || true")


def test_log_host_takes_lines_with_a_certificate_of_ours_only(service: Service, log_host: str) -> None:
    host, name = service.in_group("mx")[-1], f"{log_host}.{service.domain}"
    data = "relp_version=0\\nrelp_software=thu\\ncommands=syslog"
    offer = (
        "cd $(mktemp -d) && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout k"
        f" -out c -subj /CN={host} -addext subjectAltName=DNS:{host}.{service.domain} 2>/dev/null;"
        f" (printf '1 open {len(data) - 2} {data}\\n'; sleep 3) |"
        f" timeout 5 openssl s_client -quiet -connect {name}:6514 %s 2>/dev/null || true"
    )
    tls = "/etc/ssl/hopthu"
    assert "200 OK" in service.run(host, offer % f"-cert {tls}/cert.pem -key {tls}/key.pem"), (
        "our own is not taken either"
    )
    assert "200 OK" not in service.run(host, offer % "-cert c -key k")
    assert "200 OK" not in service.run(host, offer % "")


def test_logs_are_for_administrators_and_age_by_the_calendar(service: Service, log_host: str) -> None:
    folder = "/var/log/hosts/thu-nghiem"
    days = {"old": 366, "kept": 364, "yesterday": 1, "today": 0}
    try:
        for days_ago in days.values():
            day = f"{folder}/$(date -d '-{days_ago} days' +%F)"
            service.run(log_host, f"mkdir -p {day}; echo {days_ago} >{day}/thu.log; touch -d '-1 hour' {day}/thu.log")
        service.run(log_host, "systemctl start logs-age.service")
        found = service.run(log_host, f"cd {folder}; for f in */*; do echo ${{f#*/}} $(zcat -f $f); done").split("\n")
        assert sorted(filter(None, found)) == ["thu.log 0", "thu.log.gz 1", "thu.log.gz 364"]
    finally:
        service.run(log_host, f"rm -rf {folder}")
    assert not service.run(log_host, "find /var/log/hosts ! -user root -o ! -group adm -o -perm /0007")


@pytest.mark.requirement("N-91")
def test_keeping_logs_for_less_than_180_days_is_refused(
    service: Service, lab: dict[str, Any], log_host: str, tmp_path: Path
) -> None:
    play = {"hosts": log_host, "roles": ["rsyslog"], "vars": {"rsyslog_retention_days": 179}}
    run = run_play(lab, tmp_path, play)
    assert run.status != 0
    assert "N-91" in run.message and "179" in run.message, run.output
    assert "365 days" in service.run(log_host, "cat /usr/local/sbin/logs-age")
