"""Dovecot's doveadm service, this host's or the peer's, over one lasting connection.

A `doveadm` process for each user costs twice the time of the sync itself (it reads the whole configuration first); the
service, which the command line talks to with -S, serves one user after the other. The protocol is Dovecot 2.4's own,
version 1: lines of tab-separated, escaped fields; answers come in frames of a channel (1 octet) and a length (4).
"""

from __future__ import annotations

import base64
import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path

LOCAL_SOCKET = "/run/dovecot/mail-sync"
SETTINGS = Path("/etc/mail-sync.json")
PATIENCE = 120.0  # seconds without an octet after which a connection is given up
_ESCAPES = {b"0": b"\0", b"1": b"\1", b"t": b"\t", b"r": b"\r", b"n": b"\n"}


class Failed(Exception):
    """A command that was not carried out; `code` is doveadm's word for why, such as TEMPFAIL, CHANGED or NOUSER."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"{code} {detail}".strip())
        self.code = code


class Unreachable(Exception):
    """The service does not answer, or not in a way that is understood."""


@dataclass(frozen=True)
class Settings:
    """What /etc/mail-sync.json holds; `meta/argument_specs.yml` of the role explains it."""

    peer: str
    tunnel: str
    password: str
    workers: int
    full_workers: int
    full_after: float
    alarm_after: float
    probe_every: float
    lock_wait: int
    journal_socket: str
    units_prefix: str

    @property
    def destination(self) -> str:
        """The peer as doveadm's sync names it: this host's end of the tunnel there."""
        return f"tcp:{self.tunnel}"


def load(path: Path = SETTINGS) -> Settings:
    """Read the settings; OSError, ValueError and TypeError say what is wrong with the file."""
    return Settings(**json.loads(path.read_text(encoding="utf-8")))


def escape(field: str) -> bytes:
    """Return a field as the protocol has it."""
    octets = field.encode()
    for code, octet in ((b"1", b"\1"), (b"0", b"\0"), (b"t", b"\t"), (b"r", b"\r"), (b"n", b"\n")):
        octets = octets.replace(octet, b"\1" + code)
    return octets


def unescape(field: bytes) -> str:
    """Return what an escaped field stands for; octets that are no UTF-8 become U+FFFD."""
    return re.sub(rb"\x01(.)", lambda match: _ESCAPES.get(match[1], match[1]), field).decode(errors="replace")


class Doveadm:
    """One connection; not for two threads at once. It is opened by the first command, and anew after a failure."""

    def __init__(self, settings: Settings | None = None, patience: float = PATIENCE) -> None:
        """`settings`: of the peer, None for this host's own service; `patience`: seconds without an octet."""
        self._settings = settings
        self._patience = patience
        self._socket: socket.socket | None = None
        self._rest = bytearray()

    def __enter__(self) -> Doveadm:
        return self

    def __exit__(self, *_reason: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        self._rest.clear()

    def open(self) -> None:
        """Connect, and log in at the peer; raises Unreachable."""
        if self._socket is not None:
            return
        try:
            self._socket = self._connect()
            self._socket.sendall(b"VERSION\tdoveadm-server\t1\t3\n")
            version = self._line().split(b"\t")
            if version[:3] != [b"VERSION", b"doveadm-client", b"1"]:
                raise Unreachable(f"speaks another protocol: {version!r}")
            if self._line() == b"-":
                secret = f"\0doveadm\0{self._settings.password if self._settings else ''}".encode()
                self._socket.sendall(b"PLAIN\t" + base64.b64encode(secret) + b"\n")
                if self._line() != b"+":
                    raise Unreachable("refuses the password")
        except (OSError, Unreachable) as error:
            self.close()
            raise Unreachable(f"{self.name}: {error}") from None

    @property
    def name(self) -> str:
        """Whose service this is, for messages."""
        return f"doveadm of {self._settings.peer if self._settings else 'this host'}"

    def call(self, user: str, command: str, *arguments: str) -> list[str]:
        """Run a doveadm command for `user` ("" for none) and return the fields of its answer, one after the other.

        Raises Failed and Unreachable.
        """
        who = ("-u", user) if user else ()
        line = b"\t".join([b"", *map(escape, (user, command, *who, *arguments))]) + b"\n"
        reused = self._socket is not None
        self.open()
        try:
            data, status = self._exchange(line)
        except (OSError, Unreachable) as error:
            self.close()
            if not reused or isinstance(error, TimeoutError):
                raise Unreachable(f"{self.name}: {error or 'no answer'}") from None
            # The service ends a process now and then, or was restarted: once more with a new one.
            self.open()
            try:
                data, status = self._exchange(line)
            except (OSError, Unreachable) as again:
                self.close()
                raise Unreachable(f"{self.name}: {again}") from None
        if not status.startswith(b"+"):
            raise Failed(status[1:].decode(errors="replace") or "refused", command)
        fields = data.split(b"\t")
        if not fields[-1]:  # what is no table comes without a tab at its end
            fields.pop()
        return [unescape(field) for field in fields]

    def rows(self, width: int, user: str, command: str, *arguments: str) -> list[tuple[str, ...]]:
        """Return the answer as rows of `width` fields."""
        fields = self.call(user, command, *arguments)
        return list(zip(*[iter(fields)] * width, strict=True))

    def users(self) -> list[str]:
        """Return every user that the userdb lists, sorted."""
        return sorted(json.loads(self.call("", "user", "*")[0])["userList"])

    def _connect(self) -> socket.socket:
        if self._settings is None:
            local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            local.settimeout(self._patience)
            local.connect(LOCAL_SOCKET)
            return local
        host, _colon, port = self._settings.tunnel.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=self._patience)

    def _exchange(self, line: bytes) -> tuple[bytes, bytes]:
        """Send a command; return the fields of the answer, still escaped, and the status line."""
        assert self._socket is not None
        self._socket.sendall(line)
        data = bytearray()
        # Neither part has a line feed of its own: it is escaped.
        while data.count(b"\n", -4096 if len(data) > 4096 else 0) < 2:
            head = self._octets(5)
            part = self._octets(int.from_bytes(head[1:], "big"))
            if head[0] == 0:
                data += part
        fields, status, _rest = bytes(data).rsplit(b"\n", 2)
        return fields, status

    def _octets(self, count: int) -> bytes:
        assert self._socket is not None
        while len(self._rest) < count:
            received = self._socket.recv(65536)
            if not received:
                raise Unreachable("closes the connection")
            self._rest += received
        found = bytes(self._rest[:count])
        del self._rest[:count]
        return found

    def _line(self) -> bytes:
        assert self._socket is not None
        while b"\n" not in self._rest:
            received = self._socket.recv(4096)
            if not received:
                raise Unreachable("closes the connection")
            self._rest += received
        line, _feed, rest = bytes(self._rest).partition(b"\n")
        self._rest[:] = rest
        return line
