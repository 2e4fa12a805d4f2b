"""The connection to the peer: what goes out over TLS counts when the peer says that it is on its disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import struct
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

from mail_journal.records import PIECE, Place, pieces

# Octets of the JSON part and of the content that follow.
FRAME = struct.Struct("!IQ")
JSON_LIMIT = 16 << 20
CONNECT_SECONDS = 2.0
ACK_SECONDS = 5.0
# A large message gets more time, at this many octets a second.
ACK_OCTETS_PER_SECOND = 4 << 20
IDLE_SECONDS = 2.0
MEMORY = 1 << 20


class Away(Exception):
    """The peer has not confirmed."""


class Certificates:
    """TLS with the hosts' own certificates, both ways; files that were renewed are read again."""

    def __init__(self, ca: str, certificate: str, key: str) -> None:
        """Files in PEM."""
        self._files = ca, certificate, key
        self._read_at: list[float] = []
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.server.verify_mode = ssl.CERT_REQUIRED
        for context in (self.server, self.client):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.refresh()

    def refresh(self) -> None:
        """Read the files when they have changed; connections that are there stay."""
        changed = [Path(file).stat().st_mtime for file in self._files]
        if changed == self._read_at:
            return
        for context in (self.server, self.client):
            context.load_verify_locations(self._files[0])
            context.load_cert_chain(*self._files[1:])
        self._read_at = changed


def is_for(certificate: dict[str, Any] | None, name: str) -> bool:
    """Whether a verified certificate is one for the host `name`."""
    names = (certificate or {}).get("subjectAltName", ())
    return ("DNS", name) in [(kind, value.lower() if kind == "DNS" else value) for kind, value in names]


async def read_frame(reader: asyncio.StreamReader) -> tuple[dict[str, Any], int]:
    """Read the JSON of a frame; its content, of so many octets, is still to be read."""
    length, size = FRAME.unpack(await reader.readexactly(FRAME.size))
    if length > JSON_LIMIT:
        raise ConnectionError("a frame is too long")
    return json.loads(await reader.readexactly(length)), size


def frame(message: dict[str, Any], size: int = 0) -> bytes:
    """The head of a frame."""
    text = json.dumps(message, separators=(",", ":")).encode()
    return FRAME.pack(len(text), size) + text


class Link:
    """The outgoing side. All methods but `send` and `is_up` run in the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, peer: str, port: int, certificates: Certificates,
                 path: Callable[[int], Path]) -> None:  # fmt: skip
        """peer: its full name, empty for none; path: the file of a segment by number."""
        self.peer, self.port, self.certificates = peer, port, certificates
        self._loop, self._path = loop, path
        self._writer: asyncio.StreamWriter | None = None
        self._sending = asyncio.Lock()
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._sequence = 0
        self._queued = 0
        self.is_up = False
        # Of the connection: each has another.
        self.number = 0
        self.tried = asyncio.Event()
        self.greeted: Callable[[str], None] = lambda store: None
        self.last_error = "not connected yet"

    def send(self, meta: dict[str, Any], place: Place) -> Future[None]:
        """Hand a record to the peer, from any thread; Away when it does not confirm in time."""
        return asyncio.run_coroutine_threadsafe(self.record(meta, place), self._loop)

    async def record(self, meta: dict[str, Any], place: Place) -> None:
        """Hand a record to the peer and wait until it is on its disk."""
        if not self.tried.is_set():
            # Just started: whether the peer is there is known in a moment.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.tried.wait(), CONNECT_SECONDS + 0.5)
        await self._request({"kind": "record", "meta": meta}, place)

    async def operations(self, operations: list[dict[str, Any]]) -> None:
        """Hand operations to the peer and wait until it has them."""
        await self._request({"kind": "operations", "operations": operations}, None)

    async def _request(self, message: dict[str, Any], place: Place | None) -> None:
        writer = self._writer
        if writer is None:
            raise Away(self.last_error)
        size = place.size if place else 0
        self._queued += size
        limit = ACK_SECONDS + self._queued / ACK_OCTETS_PER_SECOND
        self._sequence += 1
        sequence = self._sequence
        answer: asyncio.Future[None] = self._loop.create_future()
        self._waiting[sequence] = answer
        try:
            async with asyncio.timeout(limit):
                async with self._sending:
                    if writer is not self._writer:
                        raise Away(self.last_error)
                    try:
                        writer.write(frame({"seq": sequence, **message}, size))
                        if place:
                            with self._path(place.segment).open("rb") as file:
                                for piece in pieces(file, place.offset, place.size):
                                    writer.write(piece)
                                    await writer.drain()
                    except (asyncio.CancelledError, OSError, EOFError):
                        # Half a frame: nothing can follow it.
                        self._drop("a record could not be sent whole")
                        raise
                await answer
        except TimeoutError as error:
            self._drop(f"no answer within {limit:.0f} s")
            raise Away(self.last_error) from error
        except (OSError, EOFError) as error:
            raise Away(str(error)) from error
        finally:
            self._queued -= size
            self._waiting.pop(sequence, None)

    def _drop(self, reason: str) -> None:
        writer, self._writer, self.is_up = self._writer, None, False
        self.last_error = reason
        if writer is not None:
            writer.transport.abort()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(Away(reason))
        self._waiting.clear()

    async def run(self) -> None:
        """Keep a connection for ever."""
        while True:
            try:
                await self._hold()
            except (OSError, ssl.SSLError, EOFError, ValueError, KeyError, TimeoutError) as error:
                self._drop(str(error) or type(error).__name__)
            self.tried.set()
            await asyncio.sleep(1)

    async def _hold(self) -> None:
        self.certificates.refresh()
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(
                self.peer, self.port, ssl=self.certificates.client, server_hostname=self.peer
            )
            keep(writer)
            hello, _size = await read_frame(reader)
        self._writer = writer
        self.greeted(str(hello["store"]))
        self.is_up = True
        self.number += 1
        self.tried.set()
        pulse = asyncio.create_task(self._pulse())
        try:
            while True:
                message, _size = await read_frame(reader)
                answer = self._waiting.pop(message["seq"], None)
                if answer is None or answer.done():
                    continue
                if message.get("ok"):
                    answer.set_result(None)
                else:
                    answer.set_exception(Away("the peer could not write"))
        finally:
            pulse.cancel()
            self._drop("the connection ended")

    async def _pulse(self) -> None:
        """Ask now and then whether the peer is still there: a message must not be the first to learn that it is not."""
        while True:
            await asyncio.sleep(IDLE_SECONDS)
            with contextlib.suppress(Away):
                await self.operations([])


def keep(writer: asyncio.StreamWriter) -> None:
    """Send small frames at once."""
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Server:
    """The incoming side: what the peer hands over."""

    def __init__(self, peer: str, certificates: Certificates, store_id: Callable[[], str], folder: Path,
                 append: Callable[[dict[str, Any], Iterable[bytes], int], Future[Place]],
                 apply: Callable[[list[dict[str, Any]]], Awaitable[None]]) -> None:  # fmt: skip
        """folder: where large records wait; append: puts a record on disk; apply: takes operations."""
        self.peer, self._certificates, self._store_id = peer, certificates, store_id
        self._folder, self._append, self._apply = folder, append, apply

    async def listen(self, addresses: list[str], port: int) -> None:
        """Begin to listen."""
        await asyncio.start_server(self._serve, addresses, port, ssl=self._certificates.server)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks: set[asyncio.Task[None]] = set()
        try:
            if not is_for(writer.get_extra_info("peercert"), self.peer):
                raise ConnectionError("the certificate is not the peer's")
            keep(writer)
            writer.write(frame({"store": self._store_id()}))
            while True:
                async with asyncio.timeout(30):
                    message, size = await read_frame(reader)
                    spool = tempfile.SpooledTemporaryFile(MEMORY, dir=self._folder)  # noqa: SIM115
                    left = size
                    while left:
                        piece = await reader.readexactly(min(left, PIECE))
                        spool.write(piece)
                        left -= len(piece)
                task = asyncio.create_task(self._answer(writer, message, spool, size))  # type: ignore[arg-type]
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        except (OSError, EOFError, ValueError, KeyError, TimeoutError) as error:
            logging.info("the peer's connection ended: %s", error or type(error).__name__)
        finally:
            writer.transport.abort()

    async def _answer(self, writer: asyncio.StreamWriter, message: dict[str, Any], spool: BinaryIO, size: int) -> None:
        done = True
        with spool:
            if message["kind"] == "record":
                try:
                    await asyncio.wrap_future(self._append(message["meta"], pieces(spool, 0, size), size))
                except (OSError, ValueError) as error:
                    logging.error("a record of the peer's could not be written: %s", error)
                    done = False
            elif message["operations"]:
                await self._apply(message["operations"])
        writer.write(frame({"seq": message["seq"], "ok": done}))
