"""Segments on disk: records are appended by one thread, and one fdatasync answers for all that wait."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

from mail_journal.records import TAIL, Place, content_offset, encode

SEGMENT_OCTETS = 256 << 20
SEGMENT_SECONDS = 3600.0
GROUP = 200


class Full(OSError):
    """There is too little room left for another record."""


def sync_folder(folder: Path) -> None:
    """Make what was created or removed in a folder last."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Item:
    """A record on its way to the disk."""

    def __init__(self, meta: dict[str, Any], content: Iterable[bytes], size: int) -> None:
        """size: octets of the content."""
        self.meta, self.content, self.size = meta, content, size
        self.saved: Future[Place] = Future()
        self.written: Callable[[Place], None] = lambda place: None


class Store:
    """The segments in a folder, named by number. Each start begins a new one: nothing follows a torn record."""

    def __init__(self, folder: Path, reserve: int, saved: Callable[[dict[str, Any], Place, int], None]) -> None:
        """reserve: octets that stay free on the disk; saved: told (metadata, place, end) of each safe record."""
        self.folder, self.reserve, self._saved = folder, reserve, saved
        folder.mkdir(mode=0o700, exist_ok=True)
        self._queue: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._number = max(self.numbers(), default=0)
        self._file: BinaryIO | None = None
        self._end = 0
        self._opened = 0.0
        threading.Thread(target=self._write_for_ever, name="store", daemon=True).start()

    def path(self, number: int) -> Path:
        """File of a segment."""
        return self.folder / f"{number:010d}.seg"

    def numbers(self) -> list[int]:
        """Numbers of the segments that exist, oldest first."""
        return sorted(int(path.stem) for path in self.folder.glob("*.seg"))

    @property
    def current(self) -> int:
        """Number of the segment that is written to now."""
        return self._number

    def append(self, item: Item) -> Future[Place]:
        """Take a record; the result is there when it is on disk, or OSError when it could not be written."""
        self._queue.put(item)
        return item.saved

    def remove(self, number: int) -> None:
        """Delete a segment."""
        self.path(number).unlink(missing_ok=True)
        sync_folder(self.folder)

    def read(self, place: Place) -> bytes:
        """Content of a record; OSError when it is gone."""
        with self.path(place.segment).open("rb") as file:
            file.seek(place.offset)
            content = file.read(place.size)
        if len(content) != place.size:
            raise OSError(f"segment {place.segment} ends early")
        return content

    def octets(self) -> int:
        """Octets of all segments."""
        return sum(path.stat().st_size for path in self.folder.glob("*.seg"))

    def _write_for_ever(self) -> None:
        import time

        while True:
            group = [self._queue.get()]
            while len(group) < GROUP:
                try:
                    group.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            written: list[tuple[Item, Place, int]] = []
            for item in group:
                try:
                    now = time.monotonic()
                    if self._file is None or self._end >= SEGMENT_OCTETS or now - self._opened > SEGMENT_SECONDS:
                        self._sync(written)
                        written = []
                        self._open(now)
                    place = self._write(item)
                except (OSError, ValueError) as error:
                    item.saved.set_exception(error)
                    continue
                written.append((item, place, self._end))
                item.written(place)
            self._sync(written)

    def _open(self, now: float) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        number = self._number + 1
        self._file = self.path(number).open("xb", buffering=0)
        self._number, self._end, self._opened = number, 0, now
        sync_folder(self.folder)

    def _write(self, item: Item) -> Place:
        assert self._file is not None
        status = os.statvfs(self.folder)
        if status.f_bavail * status.f_frsize < self.reserve + item.size:
            raise Full(28, f"less than {self.reserve >> 20} MiB would stay free in {self.folder}")
        start = self._end
        try:
            for piece in encode(item.meta, item.content, item.size):
                view = memoryview(piece)
                while view:
                    view = view[self._file.write(view) :]
        except (OSError, ValueError):
            self._file.truncate(start)
            self._file.seek(start)
            raise
        offset = content_offset(start, item.meta)
        self._end = offset + item.size + TAIL.size
        return Place(self._number, offset, item.size)

    def _sync(self, written: list[tuple[Item, Place, int]]) -> None:
        if not written:
            return
        assert self._file is not None
        try:
            os.fdatasync(self._file.fileno())
        except OSError as error:
            # What the kernel failed to write once it may call written the next time: this segment is not used again.
            for item, _place, _end in written:
                item.saved.set_exception(error)
            self._file.close()
            self._file = None
            return
        for item, place, end in written:
            self._saved(item.meta, place, end)
            item.saved.set_result(place)
