"""A running load: people who submit and read, correspondents who hand mail in, and the reckoning afterwards.

Senders behave as mail programs and mail servers do: what was not acknowledged is tried again, at the other mail
exchanger first, until it is. Each 250 is noted. Afterwards the ids that were acknowledged are compared, as sets, with
those that lie in the mailboxes.
"""

from __future__ import annotations

import collections
import itertools
import random
import re
import secrets
import smtplib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, make_msgid

from imapclient import IMAPClient, SocketTimeout
from imapclient.exceptions import IMAPClientError, LoginError
from service import OUTSIDER, Mailbox, Service

HEADER = "X-Load-Id"
FOLDERS = ("INBOX", "Junk")  # where a message may arrive; Sent holds the sender's own copy
# Short, so that a gap is measured and not the patience of the client; the answer to a whole message may take longer.
CONNECT, ANSWER, ACCEPTANCE = 2, 5, 30
PAUSE = 0.5  # between two questions of a reader
AGAIN = 1.0  # until a sender tries again
PATIENCE = 180  # for what is under way when the load ends
WORDS = (
    "công văn",
    "báo cáo",
    "kế hoạch",
    "tờ trình",
    "đề nghị",
    "phối hợp",
    "triển khai",
    "quý",
    "năm",
    "huyện",
    "sở",
)


@dataclass(frozen=True)
class Letter:
    """A message on its way, and who sends it: a unit with its login, or a correspondent (None)."""

    id: str
    sender: Mailbox | None
    recipient: Mailbox
    data: bytes

    @property
    def way(self) -> str:
        """How it goes in."""
        return "submission" if self.sender else "mx"


@dataclass(frozen=True)
class Acknowledged:
    """A 250: when (monotonic), which way the message came in, and whose mailbox it belongs into."""

    at: float
    way: str
    recipient: str


@dataclass
class Outcome:
    """What a load saw. Lists hold ids; `failed` has the answer with each; gaps are in seconds."""

    acknowledged: int = 0
    missing: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    # Nobody knows whether the first attempt was taken: these may lie there twice by right.
    unknown_then_repeated: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unsent: list[str] = field(default_factory=list)
    deferred: int = 0
    passwords_refused: int = 0
    sessions_lost: list[int] = field(default_factory=list)  # of each reader
    gap_imap_s: float = 0.0
    gap_submission_s: float = 0.0
    gap_mx_s: float = 0.0

    @property
    def gap_s(self) -> float:
        """The longest time without service that a user saw."""
        return max(self.gap_imap_s, self.gap_submission_s)


class Load:
    """Senders and readers in a few threads, from `start` to `stop`."""

    def __init__(self, service: Service, rate: float = 5.0, recipients: int = 8, readers: int = 3) -> None:
        """`rate` is in messages per second, half by submission and half from outside."""
        self.service = service
        self.run = f"load-{secrets.token_hex(4)}"
        # Each login may send 500 messages an hour, so all units take turns.
        units = [service.unit(address.partition("@")[0]) for address in sorted(service.units)]
        self.recipients = units[:recipients]
        self.rate, self.sent = rate, Outcome()
        self.acknowledged: dict[str, Acknowledged] = {}
        self._senders, self._turn = itertools.cycle(units), itertools.cycle(self.recipients)
        self._used: set[Mailbox] = set()
        self._number = itertools.count(1)
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._deadline = float("inf")
        self._started = time.monotonic()
        self._answers: list[list[float]] = [[] for _ in range(readers)]
        self.sent.sessions_lost = [0] * readers
        self._exchangers = [
            address for host in service.in_group("mx") for address in service.hosts[host]["addresses"].values()
        ]
        hands = max(3, round(rate / 4))
        period = 2 * hands / rate
        self._threads = [
            *(self._thread(self._send, by, number, period) for by in (True, False) for number in range(hands)),
            *(self._thread(self._read, number) for number in range(readers)),
        ]

    @staticmethod
    def _thread(target: Callable[..., None], *arguments: object) -> threading.Thread:
        return threading.Thread(target=target, args=arguments, daemon=True)

    def __enter__(self) -> Load:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin."""
        self._started = time.monotonic()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End; what is under way goes on until it is acknowledged or PATIENCE is over."""
        if not self._end.is_set():
            self._deadline = time.monotonic() + PATIENCE
            self._end.set()
        for thread in self._threads:
            thread.join()

    def flows(self, seconds: float = 60) -> bool:
        """Whether both ways have taken mail and every reader has had answers within `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ways = {one.way for one in list(self.acknowledged.values())}
            if ways == {"submission", "mx"} and all(self._answers):
                return True
            time.sleep(0.2)
        return False

    # --- senders

    def _send(self, submits: bool, number: int, period: float) -> None:
        """Letter after letter, one each `period` seconds; a late one is not made up for."""
        due = time.monotonic() + random.uniform(0, period)
        while not self._end.wait(max(0, due - time.monotonic())):
            self._deliver(self._write(submits), number)
            due = max(due + period, time.monotonic())

    def _write(self, submits: bool) -> Letter:
        with self._lock:
            sender = next(self._senders) if submits else None
            if sender:
                self._used.add(sender)
            recipient, identifier = next(self._turn), f"{self.run}.{next(self._number):06}"
        message = EmailMessage(policy=SMTP)
        message["From"], message["To"] = sender.address if sender else OUTSIDER, recipient.address
        message["Subject"], message[HEADER] = f"Công văn {identifier}", identifier
        message["Date"], message["Message-ID"] = formatdate(), make_msgid(domain="thu-nghiem.example")
        lines = (" ".join(random.choices(WORDS, k=10)) for _ in range(random.randint(5, 60)))
        message.set_content("Kính gửi,\n" + "\n".join(lines) + "\n", cte="8bit")
        return Letter(identifier, sender, recipient, message.as_bytes())

    def _deliver(self, letter: Letter, number: int) -> None:
        """Try until the letter is acknowledged, refused for good, or the load has been over for PATIENCE."""
        places = self._places(letter, number)
        unknown = False
        for attempt, (address, port) in enumerate(itertools.cycle(places), 1):
            code, text, lost = self._attempt(letter, address, port)
            if code == 250:
                self.acknowledged[letter.id] = Acknowledged(time.monotonic(), letter.way, letter.recipient.address)
                if unknown:
                    self.sent.unknown_then_repeated.append(letter.id)
                return
            if code // 100 == 5:
                self.sent.failed.append(f"{letter.id} at {address}:{port}: {code} {text}")
                return
            self.sent.deferred += code // 100 == 4
            unknown |= lost
            if time.monotonic() > self._deadline:
                self.sent.unsent.append(letter.id)
                return
            if letter.sender or attempt % len(places) == 0:
                time.sleep(AGAIN)

    def _places(self, letter: Letter, number: int) -> list[tuple[str, int]]:
        """Where to try, in turn: a person's program has the service address, a mail server all mail exchangers."""
        if letter.sender:
            addresses, port = list(self.service.addresses.values()), (465, 587)[number % 2]
            turn = number % len(addresses)
            addresses = addresses[turn:] + addresses[:turn]
        else:
            # Of equal rank, so in random order.
            addresses, port = random.sample(self._exchangers, len(self._exchangers)), 25
        return [(address, port) for address in addresses]

    def _attempt(self, letter: Letter, address: str, port: int) -> tuple[int, str, bool]:
        """Last answer, 0 without one, and whether the whole message was handed over and nothing answered."""
        handed_over = False
        try:
            with self._session(address, port) as smtp:
                if letter.sender:
                    smtp.login(letter.sender.address, letter.sender.password)
                sender = letter.sender.address if letter.sender else OUTSIDER
                code, text = smtp.mail(sender, ["BODY=8BITMIME"])
                if code == 250:
                    code, text = smtp.rcpt(letter.recipient.address)
                if code == 250:
                    code, text = smtp.docmd("DATA")
                if code == 354:
                    assert smtp.sock
                    smtp.sock.settimeout(ACCEPTANCE)
                    smtp.send(re.sub(rb"(?m)^\.", b"..", letter.data) + b".\r\n")
                    handed_over = True
                    code, text = smtp.getreply()
                    handed_over = False
                    smtp.sock.settimeout(CONNECT)
                with suppress(OSError, smtplib.SMTPException):
                    smtp.quit()
                return code, text.decode(errors="replace"), False
        except smtplib.SMTPResponseException as error:
            code = error.smtp_code if error.smtp_code > 0 else 0
            return code, str(error.smtp_error), handed_over
        except (OSError, smtplib.SMTPException) as error:
            return 0, str(error), handed_over

    @contextmanager
    def _session(self, address: str, port: int) -> Iterator[smtplib.SMTP]:
        name, trust = "client.ben-ngoai.example", self.service.trust
        if port == 465:
            smtp: smtplib.SMTP = smtplib.SMTP_SSL(address, port, name, timeout=CONNECT, context=trust)
        else:
            smtp = smtplib.SMTP(address, port, name, timeout=CONNECT)
        try:
            assert smtp.sock
            smtp.sock.settimeout(ANSWER)
            if port != 465:
                smtp.starttls(context=trust)
            smtp.ehlo_or_helo_if_needed()
            yield smtp
        finally:
            smtp.close()

    # --- readers

    def _read(self, number: int) -> None:
        """One session that asks every half second, opened anew whenever it breaks; every third by IDLE."""
        box = self.recipients[number % len(self.recipients)]
        for address in itertools.cycle(self.service.addresses.values()):
            session = False
            try:
                with self._reader(box, address) as client:
                    session = True
                    while not self._end.is_set():
                        if number % 3 == 2:
                            client.idle()
                            client.idle_done()
                        else:
                            client.noop()
                        self._answers[number].append(time.monotonic())
                        self._end.wait(PAUSE)
            except LoginError as error:
                # A mail program would ask its user for a new password.
                self.sent.passwords_refused += "AUTHENTICATIONFAILED" in str(error)
            except (OSError, IMAPClientError):
                self.sent.sessions_lost[number] += session
            if self._end.wait(PAUSE):
                return

    @contextmanager
    def _reader(self, box: Mailbox, address: str) -> Iterator[IMAPClient]:
        timeout = SocketTimeout(CONNECT, ANSWER)
        client = IMAPClient(address, 993, ssl_context=self.service.trust, timeout=timeout)
        try:
            client.login(box.address, box.password)
            client.select_folder("INBOX", readonly=True)
            yield client
        finally:
            client.shutdown()

    # --- the reckoning

    def outcome(self, seconds: float = 120) -> Outcome:
        """Compare what was acknowledged with what the mailboxes hold, once nothing is missing or `seconds` are over."""
        found = self.sent
        found.acknowledged = len(self.acknowledged)
        deadline = time.monotonic() + seconds
        wanted = self._by_recipient()
        held: dict[str, collections.Counter[str]] = {}
        while True:
            for box in self.recipients:
                if box.address not in held or wanted[box.address] - held[box.address].keys():
                    # The service may still be coming back.
                    with suppress(OSError, IMAPClientError):
                        held[box.address] = self.ids(box)
            lacking = {address: ids - held.get(address, {}).keys() for address, ids in wanted.items()}
            if not any(lacking.values()) or time.monotonic() > deadline:
                break
            time.sleep(3)
        found.missing = sorted(set().union(*lacking.values()))
        twice = {identifier for ids in held.values() for identifier, count in ids.items() if count > 1}
        found.duplicated = sorted(twice - set(found.unknown_then_repeated))
        ends = self._ended()
        found.gap_imap_s = max((longest([self._started, *times, ends]) for times in self._answers), default=0.0)
        for way in ("submission", "mx"):
            times = sorted(one.at for one in self.acknowledged.values() if one.way == way)
            setattr(found, f"gap_{way}_s", longest(times))
        return found

    def _by_recipient(self) -> dict[str, set[str]]:
        wanted: dict[str, set[str]] = {box.address: set() for box in self.recipients}
        for identifier, one in self.acknowledged.items():
            wanted[one.recipient].add(identifier)
        return wanted

    def _ended(self) -> float:
        """When the load ended: a reader that never came back saw a gap until then."""
        return self._deadline - PATIENCE

    def ids(self, box: Mailbox, address: str | None = None) -> collections.Counter[str]:
        """Id → how often it lies in a mailbox, as IMAP shows it."""
        found: collections.Counter[str] = collections.Counter()
        with box.imap(address) as client:
            for folder in FOLDERS:
                client.select_folder(folder, readonly=True)
                if uids := client.search(["HEADER", HEADER, self.run]):
                    part = f"BODY.PEEK[HEADER.FIELDS ({HEADER.upper()})]"
                    for item in client.fetch(uids, [part]).values():
                        header = next(value for name, value in item.items() if name.startswith(b"BODY["))
                        found[header.decode().partition(":")[2].strip()] += 1
        return found

    def lacking_on(self, run: Callable[[str], str]) -> list[str]:
        """Acknowledged ids that a host's own copy of the mailboxes lacks; `run` gives a command's output there."""
        lacking: set[str] = set()
        field_name = f"hdr.{HEADER.lower()}"
        for address, ids in self._by_recipient().items():
            places = " or ".join(f"mailbox {folder}" for folder in FOLDERS)
            query = f"'(' {places} ')' header {HEADER} {self.run}"
            lines = run(f"doveadm -f flow fetch -u '{address}' {field_name} {query}").splitlines()
            lacking |= ids - {line.partition("=")[2].strip() for line in lines}
        return sorted(lacking)

    def clean(self) -> None:
        """Delete what the load left in the mailboxes; only after everything was there, else it is evidence."""
        for box in {*self.recipients, *self._used}:
            with box.imap() as client:
                for folder in (*FOLDERS, "Sent"):
                    if client.folder_exists(folder):
                        client.select_folder(folder)
                        if uids := client.search(["HEADER", HEADER, self.run]):
                            client.delete_messages(uids, silent=True)
                            client.expunge()


def longest(times: Iterable[float]) -> float:
    """The longest time between one moment and the next, in seconds; 0 with fewer than two."""
    return round(max((after - before for before, after in itertools.pairwise(times)), default=0.0), 2)
