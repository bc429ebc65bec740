"""The verified content of one file after the other, out of the intake's events.

Strategy: `pieces` is a generator over the chunks of the current file. It decrypts a chunk only after its MAC
has been checked, gives its memory back when it is through, and ends with the file. What is left of a
file that nobody wants to the end is drained.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator

from qubes_restore_svc.archive.members import Damage
from qubes_restore_svc.errors import RestoreError
from qubes_restore_svc.worker.events import (
    ArchiveEnd,
    Chunk,
    Damaged,
    Event,
    EventQueue,
    FileEnd,
    FileStart,
    Passed,
    Piece,
)
from qubes_restore_svc.worker.intake import Intake
from qubes_restore_svc.worker.opening import OpenChunk


class PlaintextFiles:
    """The files of one pass over the archive."""

    def __init__(self, intake: Intake, events: EventQueue, open_chunk: OpenChunk) -> None:
        self._open_chunk = open_chunk
        self._intake = intake
        self._events = events
        self._in_file = False
        self._position = 0
        self.idle = False  #: does it wait for what the intake has not brought yet?
        self.chunk: int | None = None  #: number of the chunk that is being read
        self.damage: Damage | None = None  #: met right behind the file that was read last

    @property
    def position(self) -> int:
        """How much of the archive has been dealt with, bytes; it never goes back."""
        # Between two files with nothing waiting: what the intake passes now is being skipped.
        if not self._in_file and self._events.empty():
            self._position = self._intake.position
        return self._position

    def next_file(self) -> str | Passed | Damaged | ArchiveEnd:
        """The name of the next wanted file, or what is there in its place."""
        event = self._next_event()
        if isinstance(event, Passed | Damaged | ArchiveEnd):
            return event
        assert isinstance(event, FileStart)
        self._in_file = True
        self.damage = None
        return event.name

    def pieces(
        self, check: Callable[[], None], remark: Callable[[str], None]
    ) -> Generator[bytes, None, None]:
        """The content of the current file. Raises what is wrong with its chunks, and what `check` raises.

        `check` is called often, and may raise to stop the file; `remark` gets lines for the person.

        Whoever does not exhaust it must close it before `drain`: it holds a chunk, and the intake may be
        waiting for its memory.
        """
        while isinstance(event := self._next_event(), Chunk | Piece):
            self.chunk = event.name.number
            dealt_with = event.end - event.size
            self._position = max(self._position, dealt_with)
            with self._holding(event):
                check()
                for piece in self._open_chunk(self._intake, event, remark).plaintext():
                    check()
                    yield piece
                    dealt_with += len(piece)
                    self._position = max(self._position, dealt_with)
                self._position = max(self._position, event.end)
        self._end_file(event)

    def drain(self) -> RestoreError | None:
        """Pass over what is left of the current file; what was wrong with that part of it."""
        error = None
        while self._in_file:
            event = self._next_event()
            if isinstance(event, Chunk | Piece):
                self._intake.release(event)
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

    def _end_file(self, event: Event) -> None:
        assert isinstance(event, FileEnd)
        self._in_file = False
        self.damage = event.damage
        if event.error is not None:
            raise event.error

    @contextlib.contextmanager
    def _holding(self, chunk: Chunk | Piece) -> Iterator[None]:
        try:
            yield
        finally:
            self._intake.release(chunk)
