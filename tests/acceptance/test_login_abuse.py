"""Whoever guesses passwords is shut out; nobody else is, and least of all the victim.

The attacker is the host outside. What is done to it is undone after each test.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from service import Mailbox, Service, accepts, wait

# One guess each: IMAP on 993, submission on 465, a simple bind (RFC 4511, 4.2) on 636. Prints what the server said.
GUESS = """
import base64, collections, itertools, json, socket, ssl, sys, threading
go = json.load(sys.stdin)
context = ssl._create_unverified_context()
guesses = iter(go["guesses"])
lock, answers = threading.Lock(), collections.Counter()

def ber(tag, content):
    length = bytes([len(content)]) if len(content) < 128 else b"\\x82" + len(content).to_bytes(2)
    return bytes([tag]) + length + content

def ask(port, login, word):
    source = (go["source"], 0) if go["source"] else None
    raw = socket.create_connection((go["target"], port), timeout=3, source_address=source)
    with context.wrap_socket(raw) as channel:
        channel.settimeout(go["patience"])
        token = base64.b64encode(f"\\0{login}\\0{word}".encode())
        if port == 993:
            channel.recv(4096)
            channel.sendall(b"a AUTHENTICATE PLAIN " + token + b"\\r\\n")
            return "refused" if b"AUTHENTICATIONFAILED" in channel.recv(4096) else "other"
        if port == 465:
            channel.recv(4096)
            channel.sendall(b"EHLO thu.ben-ngoai.example\\r\\n")
            channel.recv(4096)
            channel.sendall(b"AUTH PLAIN " + token + b"\\r\\n")
            return "refused" if channel.recv(4096).startswith(b"535") else "other"
        bind = ber(0x60, b"\\x02\\x01\\x03" + ber(4, login.encode()) + ber(0x80, word.encode()))
        channel.sendall(ber(0x30, b"\\x02\\x01\\x01" + bind))
        return "refused" if b"\\x0a\\x01\\x31" in channel.recv(4096) else "other"

def work():
    while True:
        with lock:
            guess = next(guesses, None)
        if guess is None:
            return
        try:
            answer = ask(*guess)
        except OSError:
            answer = "unreachable"
        with lock:
            answers[answer] += 1

threads = [threading.Thread(target=work) for _ in range(go["parallel"])]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps(answers))
"""
# Addresses for documentation (RFC 5737, RFC 3849): nobody's, so a ban on one can only have been made up.
INNOCENT = ("203.0.113.9", "2001:db8:99::9")


def guess(
    service: Service,
    host: str,
    target: str,
    guesses: list[tuple[int, str, str]],
    source: str = "",
    parallel: int = 1,
    user: str = "root",
) -> Counter[str]:
    """Send guesses (port, login, password) from a host; how many were refused, got another answer, reached nobody."""
    go: dict[str, Any] = {"target": target, "guesses": guesses, "source": source, "parallel": parallel, "patience": 20}
    with service.python(host, GUESS, user) as process:
        output, _ = process.communicate(json.dumps(go))
    return Counter(json.loads(output))


def knocks(service: Service, source: str, target: str, port: int) -> bool:
    """Whether a connection from one of the outside host's addresses is taken."""
    script = (
        "import json, socket, sys; go = json.load(sys.stdin)\n"
        "try:\n    socket.create_connection(go[:2], timeout=3, source_address=(go[2], 0)); print('yes')\n"
        "except OSError:\n    print('no')\n"
    )
    with service.python("outside", script) as process:
        output, _ = process.communicate(json.dumps([target, port, source]))
    return output.strip() == "yes"


def banned(service: Service, host: str) -> set[str]:
    """Addresses that a host shuts out."""
    jails = json.loads(service.run(host, "fail2ban-client banned").replace("'", '"'))
    return {address for jail in jails for addresses in jail.values() for address in addresses}


def alarms(service: Service, since: float, text: str) -> list[str]:
    """Alarms login-attack on the log host that name `text`, raised after `since` (seconds since the epoch)."""
    log_host = service.in_group("monitor")[0]
    lines = service.run(
        log_host, f"cat /var/log/hosts/alarms.log 2>/dev/null | grep -F 'login-attack: {text} ' || true"
    )
    zone = service.run(log_host, f"date -d @{since:.0f} +%FT%T").strip()
    return [line for line in lines.splitlines() if line[:19] >= zone]


@pytest.fixture(params=["v4", "v6"])
def family(request: pytest.FixtureRequest) -> str:
    """Address family of the attack."""
    return str(request.param)


@pytest.fixture
def store(service: Service) -> str:
    """The host that checks passwords."""
    return service.in_group("mailstore")[0]


@pytest.fixture
def attacker(service: Service, store: str) -> Iterator[dict[str, str]]:
    """The outside host's addresses, with nothing held against them before and after."""
    addresses: dict[str, str] = service.outside["addresses"]

    def forget() -> None:
        service.run(store, f"fail2ban-client unban {' '.join(addresses.values())}; rm -rf /run/fail2ban/alarms")

    forget()
    yield addresses
    forget()


def shut_out(service: Service, store: str, address: str) -> None:
    """Wait until an address is shut out."""
    wait(f"{address} is shut out", lambda: address in banned(service, store), 30)


def test_guessing_from_one_address_is_shut_out_with_one_alarm(
    service: Service, store: str, attacker: dict[str, str], mailbox: Mailbox, family: str
) -> None:
    source, target = attacker[family], service.hosts[store]["addresses"][family]
    began = time.time()
    guesses = [((993, 465)[i % 2], mailbox.address, f"sai-{i}") for i in range(200)]
    answers = guess(service, "outside", target, guesses, source, parallel=20)
    assert answers["refused"] >= 5, answers
    assert answers["refused"] <= 60, f"the ban came late: {answers}"
    for port in (993, 465, 25):
        assert not knocks(service, source, target, port), f"port {port} still answers {source}"
    found = wait(f"alarm about {source}", lambda: alarms(service, began, source), 30)
    time.sleep(3)
    assert len(found) == len(alarms(service, began, source)) == 1, alarms(service, began, source)
    with mailbox.imap() as client:
        assert client.select_folder("INBOX")


def test_victim_logs_in_although_the_attack_locked_the_account(
    service: Service, store: str, attacker: dict[str, str], mailbox: Mailbox, family: str
) -> None:
    source, target = attacker[family], service.hosts[store]["addresses"][family]
    began = time.time()
    # All at once, so that more of them are through than the directory allows before the ban comes.
    guess(service, "outside", target, [(993, mailbox.address, "sai")] * 30, source, parallel=30)
    shut_out(service, store, source)
    lifted = f"the lock of {mailbox.dn} is lifted"
    wait(lifted, lambda: service.journal(store, began, lifted), 60)

    def logs_in() -> bool:
        try:
            with mailbox.imap():
                return True
        except Exception as error:
            if "AUTHENTICATIONFAILED" not in str(error):
                raise
            return False

    wait("the victim logs in", logs_in, 60)


def test_guessing_at_the_directory_is_shut_out(
    service: Service, store: str, attacker: dict[str, str], mailbox: Mailbox, family: str
) -> None:
    provider = service.in_group("directory")[0]
    source, target = attacker[family], service.hosts[provider]["addresses"][family]
    answers = guess(service, "outside", target, [(636, mailbox.dn, f"sai-{i}") for i in range(12)], source)
    assert answers["refused"] >= 5, answers
    shut_out(service, provider, source)
    assert not knocks(service, source, target, 636)

    def logs_in() -> bool:
        with service.ldap(mailbox.dn, mailbox.password) as session:
            return bool(session.bound)

    wait("the victim's lock is lifted", logs_in, 60)


def test_login_names_cannot_shut_out_others(
    service: Service, store: str, attacker: dict[str, str], family: str
) -> None:
    source, target = attacker[family], service.hosts[store]["addresses"][family]
    forged = [
        name.format(innocent)
        for innocent in INNOCENT
        for name in (
            "x,{},sasl:plain)<a>: ldap: unknown user",
            "x\nmail1 dovecot[1]: auth(y,{},sasl:plain)<a>: ldap: unknown user",
            "x>, method=PLAIN, rip={}, lip=192.0.2.1",
            "login failed: address={} dn='uid=x'",
        )
    ]
    guesses = [(port, name, "sai") for name in forged for port in (993, 465)]
    guess(service, "outside", target, guesses, source, parallel=len(guesses))
    shut_out(service, store, source)
    assert not banned(service, store) & set(INNOCENT)


def test_distinguished_names_cannot_shut_out_others(service: Service, attacker: dict[str, str], family: str) -> None:
    provider = service.in_group("directory")[0]
    source, target = attacker[family], service.hosts[provider]["addresses"][family]
    forged = [
        name.format(innocent)
        for innocent in INNOCENT
        for name in (
            f"cn=x\nconn=1 fd=1 ACCEPT from IP={{}}:1 (IP=0.0.0.0:636),{service.base}",
            f'cn=x" method=128 address={{}} dn=,{service.base}',
            f"cn=login failed: address={{}} dn=,{service.base}",
        )
    ]
    # All at once and often enough: a filter that believed the names would have shut the innocent out.
    guesses = [(636, name, "sai") for name in forged * 3]
    guess(service, "outside", target, guesses, source, parallel=len(guesses))
    guess(service, "outside", target, [(636, f"uid=khong-co,{service.base}", "sai")] * 6, source)
    shut_out(service, provider, source)
    assert not banned(service, provider) & set(INNOCENT)


@pytest.mark.parametrize("who", ["this machine", "peer", "service address"])
def test_trusted_addresses_are_never_shut_out(service: Service, store: str, who: str, family: str) -> None:
    address = {"v4": "ipv4", "v6": "ipv6"}[family]
    target = service.addresses[address]
    guesses = [(993, f"khong-co-{i}@{service.domain}", "sai") for i in range(12)]
    if who == "this machine":
        for _port, login, word in guesses[:6]:
            with pytest.raises(Exception, match="AUTHENTICATIONFAILED"), Mailbox(service, login, word).imap(target):
                pass
    elif who == "peer":
        peer = next(name for name in service.in_group("mx") if name != store)
        # A mail exchanger reaches the directory alone, and only as Postfix.
        guesses = [(636, f"uid=khong-co-{i},{service.base}", "sai") for i in range(12)]
        source = service.hosts[peer]["addresses"][family]
        answers = guess(service, peer, target, guesses, source, parallel=12, user="postfix")
        assert answers["refused"] == 12, answers
    else:
        answers = guess(service, store, target, guesses, target, parallel=12)
        assert answers["refused"] == 12, answers
    time.sleep(3)
    shut = banned(service, store)
    trusted = {a for host in service.hosts.values() for a in host["addresses"].values()} | set(
        service.addresses.values()
    )
    assert not shut & trusted
    assert accepts(target, 993)
    if who == "peer":
        assert guess(service, peer, target, guesses[:1], source, user="postfix")["refused"] == 1


def test_ban_outlives_the_firewall_and_ends_on_request(
    service: Service, store: str, attacker: dict[str, str], family: str, new_mailbox: Callable[..., Mailbox]
) -> None:
    source, target = attacker[family], service.hosts[store]["addresses"][family]
    guess(service, "outside", target, [(993, new_mailbox().address, "sai")] * 8, source, parallel=8)
    shut_out(service, store, source)
    service.run(store, "systemctl reload nftables")
    assert not knocks(service, source, target, 993), "the ban went with the firewall's reload"
    service.run(store, f"fail2ban-client unban {source}")
    assert knocks(service, source, target, 993), "the ban did not end"
