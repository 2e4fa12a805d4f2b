"""What the service says no to, and how."""

from __future__ import annotations

import poplib
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientError, LoginError
from service import OUTSIDER, TIMEOUT, Mailbox, ManageSieve, Service, letter, password, wait

OWN_ADDRESS_ONLY = ["DL-8.4", "LC-11.4", "HT-6.4", "CT-8.4"]
PASSWORD_RULES = ["DL-8.1", "HT-4.3c"]
LIMIT = 52428800  # octets; the province's own choice (group_vars)


def opens(box: Mailbox, way: str) -> set[str]:
    """The address families over which a mailbox's password lets someone in by a protocol, tried at the same time."""
    with ThreadPoolExecutor() as pool:
        answers = pool.map(lambda address: lets_in(box, way, address), box.service.addresses.values())
        opened = {family for family, let_in in zip(box.service.addresses, answers, strict=True) if let_in}
    if opened != BOTH:
        box.service.forgive()
    return opened


def lets_in(box: Mailbox, way: str, address: str) -> bool:
    """Whether a login works; anything but a refused password is an error."""
    service = box.service
    try:
        if way == "imap":
            with box.imap(address):
                return True
        if way == "pop3":
            with box.pop(address):
                return True
        if way == "submission":
            with service.smtp(address, 465) as smtp:
                plain = b64encode(f"\0{box.address}\0{box.password}".encode()).decode()
                code, text = smtp.docmd("AUTH", f"PLAIN {plain}")
                assert code in (235, 535), text
                return code == 235
        with ManageSieve(service, address) as sieve:
            sieve.starttls()
            return sieve.login(box.address, box.password)
    except (LoginError, poplib.error_proto) as error:
        assert "AUTHENTICATIONFAILED" in str(error) or "[AUTH]" in str(error), error
        return False


BOTH = {"ipv4", "ipv6"}
WAYS = ["imap", "pop3", "submission", "managesieve"]


def test_unknown_recipient_gets_550_at_rcpt(service: Service, mx: str) -> None:
    with service.smtp(mx) as smtp:
        smtp.mail(OUTSIDER)
        code, text = smtp.rcpt(f"khongcoai@{service.domain}")
    assert code == 550
    assert text.startswith(b"5.1.1")


def test_mail_exchanger_relays_for_nobody(service: Service, mx: str) -> None:
    with service.smtp(mx) as smtp:
        for sender, code in ((OUTSIDER, 554), ("", 554), (f"ubnd@{service.domain}", 550)):
            smtp.mail(sender)
            assert smtp.rcpt("ai@noi-khac.example")[0] == code
            assert smtp.rcpt(f'"ai@noi-khac.example"@{service.domain}')[0] in (501, 550, 553, 554)
            smtp.rset()


@pytest.mark.requirement(*OWN_ADDRESS_ONLY)
def test_nobody_outside_sends_under_an_address_of_ours(service: Service, mx: str) -> None:
    """One that exists, one that does not, in capitals, with a detail, and under an alias domain."""
    recipient = service.unit("sonoivu").address
    domains = service.run(service.in_group("mx")[0], "postconf -h virtual_mailbox_domains").replace(",", " ").split()
    senders = [f"{name}@{domain}" for domain in domains for name in ("ubnd", "UBND", "khongcoai", "ubnd+a")]
    with service.smtp(mx) as smtp:
        for sender in [*senders, f"ubnd@{service.domain.upper()}"]:
            smtp.mail(sender)
            code, text = smtp.rcpt(recipient)
            assert (code, text[:5]) == (550, b"5.7.1"), (sender, text)
            smtp.rset()


@pytest.mark.parametrize("port", [587, 465])
def test_submission_without_login_sends_nothing(service: Service, address: str, port: int) -> None:
    """Under nobody's address too, to which the rule about senders has nothing to say."""
    for sender in (OUTSIDER, f"ubnd@{service.domain}"):
        for recipient in ("ai@noi-khac.example", f"sonoivu@{service.domain}"):
            with service.smtp(address, port) as smtp:
                code = smtp.mail(sender)[0]
                assert 500 <= (smtp.rcpt(recipient)[0] if code == 250 else code) < 600


@pytest.mark.requirement(*PASSWORD_RULES)
@pytest.mark.parametrize("port", [25, 110, 143, 587, 4190])
def test_no_login_without_tls(service: Service, mailbox: Mailbox, address: str, port: int) -> None:
    """With the right password, so that only the missing TLS can be the reason. Port 25 takes no login at all."""
    plain = b64encode(f"\0{mailbox.address}\0{mailbox.password}".encode()).decode()
    if port in (25, 587):
        with service.smtp(address, port, tls=False) as smtp:
            assert not smtp.has_extn("auth")
            assert smtp.docmd("AUTH", f"PLAIN {plain}")[0] in (503, 530, 538)
        with service.smtp(address, port) as smtp:
            assert smtp.has_extn("auth") == (port == 587)
    elif port == 143:
        client = IMAPClient(address, port, ssl=False, timeout=TIMEOUT)
        assert client.has_capability("LOGINDISABLED")
        with pytest.raises(LoginError, match="PRIVACYREQUIRED"):
            client.login(mailbox.address, mailbox.password)
        client.shutdown()
    elif port == 110:
        pop = poplib.POP3(address, port, timeout=TIMEOUT)
        with pytest.raises(poplib.error_proto, match="non-secure"):
            pop.user(mailbox.address)
            pop.pass_(mailbox.password)
        pop.close()
    else:
        with ManageSieve(service, address) as sieve:
            assert '"SASL" ""' in sieve.capabilities
            assert not sieve.login(mailbox.address, mailbox.password)


@pytest.mark.requirement(*OWN_ADDRESS_ONLY)
@pytest.mark.parametrize("port", [587, 465])
def test_login_sends_as_itself_only(
    service: Service, new_mailbox: Callable[..., Mailbox], address: str, port: int
) -> None:
    """Its address and its aliases; not another unit's, not one that nobody has, and not the empty one."""
    alias = f"{password()[:8].lower().strip('-_')}x@{service.domain}"
    mailbox = new_mailbox(mailLocalAddress=alias)
    recipient = f"sonoivu@{service.domain}"

    def answer(sender: str) -> int:
        smtp.rset()
        code = smtp.mail(sender)[0]
        return smtp.rcpt(recipient)[0] if code == 250 else code

    with service.smtp(address, port) as smtp:
        smtp.login(mailbox.address, mailbox.password)
        assert [answer(mailbox.address), answer(alias)] == [250, 250]
        refused = [
            f"ubnd@{service.domain}",
            f"chicuckiemlam@{service.domain}",
            f"khongcoai@{service.domain}",
            OUTSIDER,
            "",
        ]
        assert {sender: answer(sender) for sender in refused} == dict.fromkeys(refused, 553)


@pytest.mark.requirement(*OWN_ADDRESS_ONLY)
def test_one_units_password_opens_no_other_mailbox(service: Service, mailbox: Mailbox) -> None:
    """Neither under the other's name, nor as a master user's, nor through a shared namespace."""
    other = service.unit("ubnd").address
    for user in (other, f"{other}*{mailbox.address}"):
        assert opens(Mailbox(service, user, mailbox.password), "imap") == set(), user
    with mailbox.imap() as imap:
        personal, others, shared = imap.namespace()
        assert personal and not shared and [prefix for prefix, _separator in others] == ["Units/"]
        assert not [name for _flags, _separator, name in imap.list_folders() if name.startswith("Units/")]
        for name in ("Units/ubnd", f"user/{other}/INBOX"):
            assert not imap.folder_exists(name)
            with pytest.raises(IMAPClientError):
                imap.select_folder(name)


@pytest.mark.parametrize("way", WAYS)
def test_wrong_password_fails_and_is_logged(service: Service, mailbox: Mailbox, way: str) -> None:
    """With the name that was tried and the address that it came from; the password itself is not in the log."""
    store = service.in_group("mailstore")[0]
    started = float(service.run(store, "date +%s.%N"))
    wrong = Mailbox(service, mailbox.address, password())
    assert opens(wrong, way) == set()
    lines = service.journal(store, started, mailbox.address)
    for address in service.addresses.values():
        with service.smtp(address, tls=False) as smtp:
            assert smtp.sock is not None
            client = smtp.sock.getsockname()[0]
        assert [line for line in lines if client in line and "mismatch" in line.lower()], lines
    assert not service.journal(store, started, wrong.password)


@pytest.mark.requirement(*PASSWORD_RULES)
def test_guessing_locks_the_mailbox(service: Service, mailbox: Mailbox) -> None:
    """After the policy's number of wrong passwords the right one does not work either, for a while."""
    assert opens(mailbox, "imap") == BOTH
    with service.ldap_admin() as admin:
        policy = f"cn=default,ou=policies,{service.base}"
        admin.search(policy, "(objectClass=*)", attributes=["pwdMaxFailure"])
        failures = int(admin.entries[0].pwdMaxFailure.value)
    for _ in range(failures):
        with service.ldap(mailbox.dn, password()) as connection:
            assert not connection.bound
    assert opens(mailbox, "imap") == set()


def test_too_large_message_gets_552(service: Service, mailbox: Mailbox, address: str) -> None:
    """When it is announced by SIZE, and when it turns out while it is sent."""
    with service.smtp(address, 587) as smtp:
        smtp.login(mailbox.address, mailbox.password)
        assert smtp.mail(mailbox.address, [f"SIZE={LIMIT + 1}"])[0] == 552
        assert smtp.mail(mailbox.address, [f"SIZE={LIMIT}"])[0] == 250
        smtp.rset()
        smtp.mail(mailbox.address)
        smtp.rcpt(mailbox.address)
        line = b"a" * 998 + b"\r\n"
        code, _ = smtp.data(letter(mailbox.address, mailbox.address).as_bytes() + line * (LIMIT // 1000 + 1))
        assert code == 552


def test_full_mailbox_refuses_for_now(service: Service, new_mailbox: Callable[..., Mailbox], address: str) -> None:
    """452 4.2.2 on either host; what was accepted before it was known to be too much waits until there is room."""
    mailbox = new_mailbox(mailboxQuota=65536)
    first = service.send(letter(OUTSIDER, mailbox.address, text=("x" * 70 + "\n") * 850), mailbox.address, address)
    with mailbox.imap() as imap:
        wait("the message that fills it", lambda: mailbox.has(imap, first))
    waiting = []
    for host in service.in_group("mx"):
        waiting.append(letter(OUTSIDER, mailbox.address, text=("x" * 70 + "\n") * 250))
        with service.smtp(service.hosts[host]["addresses"]["v4"]) as smtp:
            smtp.mail(OUTSIDER, ["SIZE=20000"])
            # The other host's copy knows it a moment later.
            wait(f"{host} refuses", lambda smtp=smtp: smtp.rcpt(mailbox.address)[0] == 452)
            code, text = smtp.rcpt(mailbox.address)
            assert (code, text[:5]) == (452, b"4.2.2"), text
            smtp.rset()
            smtp.mail(OUTSIDER)  # no size is announced
            assert smtp.rcpt(mailbox.address)[0] == 250
            assert smtp.data(waiting[-1].as_bytes())[0] == 250
        _queue_id, reason = service.deferred(host, mailbox.address)
        assert "4.2.2" in reason, reason
    mailbox.take(first)
    for host, message in zip(service.in_group("mx"), waiting, strict=True):
        service.run(host, "postqueue -f")
        mailbox.take(str(message["Message-ID"]))


@pytest.mark.requirement("LC-11.1", "HT-6.1", "CT-8.3")
def test_initial_password_opens_nothing_until_it_is_changed(
    service: Service, new_mailbox: Callable[..., Mailbox]
) -> None:
    """Changed by its holder through the directory (RFC 3062); what was chosen then works everywhere."""
    mailbox = new_mailbox(pwdReset="TRUE")
    assert {way: opens(mailbox, way) for way in WAYS} == {way: set() for way in WAYS}
    chosen = Mailbox(service, mailbox.address, password(), mailbox.dn)
    with service.ldap(mailbox.dn, mailbox.password) as connection:
        assert not connection.search(service.base, "(objectClass=*)", attributes=["mail"])
        changed = connection.extend.standard.modify_password(mailbox.dn, mailbox.password, chosen.password)
        assert changed, connection.result
    assert {way: opens(chosen, way) for way in WAYS} == {way: BOTH for way in WAYS}
    assert opens(mailbox, "imap") == set()


def test_suspended_mailbox_receives_and_opens_nothing(service: Service, mailbox: Mailbox) -> None:
    """What the directory says counts at once, for every daemon."""
    service.modify(mailbox.dn, mailboxState="suspended")
    identifier = service.send(letter(OUTSIDER, mailbox.address), mailbox.address, service.address)
    assert opens(mailbox, "imap") == set()
    service.modify(mailbox.dn, mailboxState="active")
    mailbox.take(identifier)
