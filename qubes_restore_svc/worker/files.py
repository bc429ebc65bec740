"""What goes from the intake to the pipeline: files, their chunks, and their verified content.

Strategy: the intake puts small frozen values, and chunks, into a bounded queue, in archive order. They go one
way. A wanted file is one `FileStart`, its `Chunk`s and one `FileEnd`, any other one `Passed`; between files
there may be `Damaged`, and after the last there is one `ArchiveEnd`.

At the other end, `pieces` is a generator over the chunks of the current file. It has a chunk's MAC checked
before it gives anything of it, gives its memory back when it is through, and ends with the file. If nobody
wants the rest of a file, the rest is drained.
"""

import queue
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeAlias

from qubes_restore_svc.archive.members import Damage
from qubes_restore_svc.errors import RestoreError
from qubes_restore_svc.worker.chunk import Chunk
from qubes_restore_svc.worker.proofs import Remark

#: Events that may wait. The budget bounds the chunks, and this the files that come without any.
_MAX_EVENTS = 128

#: Content is handed on in pieces of this size, bytes, so that a cancel is noticed.
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class FileStart:
    """The chunks of the file `name` (`vm10/private.img`) follow."""

    name: str


@dataclass(frozen=True, slots=True)
class FileEnd:
    """The file is over; `error` if chunks of it are missing or unusable.

    `damage` was met in it or right behind it: its last chunks may have been there.
    """

    error: RestoreError | None = None
    damage: Damage | None = None


@dataclass(frozen=True, slots=True)
class Passed:
    """The file `name` is in the archive, and not wanted. `foreign`: it is a member that is no chunk."""

    name: str
    foreign: bool = False


@dataclass(frozen=True, slots=True)
class Damaged:
    """Something was passed over behind the file `after` (the last that was seen, wanted or not)."""

    damage: Damage
    after: str


@dataclass(frozen=True, slots=True)
class ArchiveEnd:
    """The archive is over; `error` if it could not be read to its end.

    `last_file` is the file, wanted or not, of the last member that was seen. `damage`: no more files were
    found behind this. `position` is how far it was read, bytes.
    """

    error: RestoreError | None = None
    last_file: str = ""
    damage: Damage | None = None
    position: int = 0


Event = FileStart | Chunk | FileEnd | Passed | Damaged | ArchiveEnd
EventQueue: TypeAlias = "queue.Queue[Event]"


def event_queue() -> EventQueue:
    """The way from an intake to its pipeline; an intake that is too far ahead waits."""
    return queue.Queue(_MAX_EVENTS)


class PlaintextFiles:
    """The files of one pass over the archive."""

    def __init__(self, events: EventQueue) -> None:
        self._events = events
        self._in_file = False
        self._position = 0
        self.idle = False  #: does it wait for what the intake has not brought yet?
        self.opening = False  #: does it wait for a key?
        self._unpacked = 0  # bytes of the chunks that were taken
        self._current: Chunk | None = None
        self._dealt = 0  # bytes of the current one
        self.chunk: int | None = None  #: number of the chunk that is being read
        self.damage: Damage | None = None  #: met right behind the file that was read last

    def position(self, read: int) -> int:
        """How much of the archive has been dealt with, bytes, when `read` have been read; never goes back."""
        # Between two files with nothing waiting: what is read now is being skipped.
        if not self._in_file and self._events.empty():
            self._position = max(self._position, read)
        return self._position

    @property
    def unpacked(self) -> int:
        """How much of the wanted chunks has been dealt with, bytes."""
        return self._unpacked + self._dealt

    def ahead(self) -> float:
        """How much of those behind has its key, bytes; of a key that is being derived, its part. From any
        thread."""
        with self._events.mutex:
            chunks = [event for event in self._events.queue if isinstance(event, Chunk)]
        bytes_ahead = sum(chunk.size * chunk.proof.derived for chunk in chunks)
        if (current := self._current) is not None:
            bytes_ahead += max(0, current.size - self._dealt) * current.proof.derived
        return bytes_ahead

    def next_file(self) -> str | Passed | Damaged | ArchiveEnd:
        """The name of the next wanted file, or the event that comes instead."""
        event = self._next_event()
        if isinstance(event, Passed | Damaged | ArchiveEnd):
            return event
        assert isinstance(event, FileStart)
        self._in_file = True
        self.damage = None
        return event.name

    def pieces(self, check: Callable[[], None], remark: Remark) -> Generator[memoryview, None, None]:
        """The content of the current file. Raises what is wrong with its chunks, and what `check` raises.

        `check` is called often, and may raise to stop the file; `remark` gets lines for the person.

        A caller that does not exhaust it must close it before `drain`: it holds a chunk, and the intake may
        be waiting for its memory.
        """
        while isinstance(event := self._next_event(), Chunk):
            self.chunk = event.name.number
            dealt_with = event.end - event.size
            self._position = max(self._position, dealt_with)
            self._current, self.opening = event, True
            try:
                check()
                content = event.open(remark)
                self.opening = False
                for start in range(0, len(content), _PIECE):
                    check()
                    piece = content[start : start + _PIECE]
                    yield piece
                    dealt_with += len(piece)
                    self._dealt += len(piece)
                    self._position = max(self._position, dealt_with)
                self._position = max(self._position, event.end)
            finally:
                event.release()
                self._current, self.opening = None, False
                self._take_off(event)
        self._end_file(event)

    def drain(self) -> RestoreError | None:
        """Pass over the rest of the current file; returns what was wrong with that part."""
        error = None
        while self._in_file:
            event = self._next_event()
            if isinstance(event, Chunk):
                event.release()
                self._take_off(event)
                continue
            try:
                self._end_file(event)
            except RestoreError as caught:
                error = caught
        self.chunk = None
        return error

    def _next_event(self) -> Event:
        self.idle = True
        event = self._events.get()
        self.idle = False
        return event

    def _take_off(self, chunk: Chunk) -> None:
        self._unpacked, self._dealt = self._unpacked + chunk.size, 0

    def _end_file(self, event: Event) -> None:
        assert isinstance(event, FileEnd)
        self._in_file = False
        self.damage = event.damage
        if event.error is not None:
            raise event.error
