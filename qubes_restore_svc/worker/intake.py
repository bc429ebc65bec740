"""From archive bytes to chunks: the first stage of the pipeline, in a thread of its own.

Strategy: walk through the members in archive order. A wanted file becomes a run of events in a queue:
`FileStart`, its `Chunk`s, `FileEnd`; what is not wanted is skipped without a key derivation. A chunk's
derivation is submitted as soon as the head of its container is there, while the rest is still coming
in. What is wrong with one file ends that file (`FileEnd.error`) and no other; what is wrong with the
archive itself ends everything (`ArchiveEnd.error`).

Nothing in here looks into a chunk further than its container's head: the MAC has not been checked.
"""

import queue
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeAlias

from qubes_restore_svc.archive.chunks import ChunkName, ChunkSequence, parse_chunk_name
from qubes_restore_svc.archive.container import HEAD_SIZE, OVERHEAD, ContainerHead, parse_head
from qubes_restore_svc.archive.kdf import KdfRequest
from qubes_restore_svc.archive.members import Member, MemberReader
from qubes_restore_svc.errors import (
    ArchiveTruncated,
    BadContainer,
    BudgetTooSmall,
    Cancelled,
    ChunkOutOfOrder,
    ExcessiveCost,
    RestoreError,
)
from qubes_restore_svc.worker.budget import Budget
from qubes_restore_svc.worker.faults import as_restore_error
from qubes_restore_svc.worker.keys import KeyScheduler
from qubes_restore_svc.worker.source import ArchiveSource

#: Content is read in pieces of this size, bytes: the reader must see it, and a cancel must be noticed.
_PIECE = 4 << 20

#: What is not wanted is skipped in pieces of this size, bytes, so that a cancel is noticed.
_SKIP_PIECE = 64 << 20

#: Events that may wait. The budget bounds the chunks, and this the files that come without any.
_MAX_EVENTS = 64


@dataclass(frozen=True, slots=True)
class FileStart:
    """The chunks of the file `name` (`vm10/private.img`) follow."""

    name: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """A whole container, not authenticated; `key` comes when its derivation is done.

    Whoever takes it from the queue must call `Intake.release` when done with it. `end` is the position in the
    archive behind it, bytes.
    """

    name: ChunkName
    head: ContainerHead
    container: bytearray
    key: "Future[bytes]"
    end: int


@dataclass(frozen=True, slots=True)
class FileEnd:
    """The file is over; `error` if chunks of it are missing or unusable."""

    error: RestoreError | None = None


@dataclass(frozen=True, slots=True)
class ArchiveEnd:
    """The archive is over; `error` if it could not be read to its end.

    `last_file` is the file, wanted or not, of the last member that was seen.
    """

    error: RestoreError | None = None
    last_file: str = ""


Event = FileStart | Chunk | FileEnd | ArchiveEnd
EventQueue: TypeAlias = "queue.Queue[Event]"


def event_queue() -> EventQueue:
    """The way from an intake to its pipeline; an intake that is too far ahead waits."""
    return queue.Queue(_MAX_EVENTS)


class Intake:
    """One pass over an archive.

    The first members are taken one by one with `next_member`, `read_content` and `take`; `run` does the rest.
    """

    def __init__(
        self,
        source: ArchiveSource,
        reader: MemberReader,
        budget: Budget,
        scheduler: KeyScheduler,
        events: EventQueue,
    ) -> None:
        self._source = source
        self._reader = reader
        self._budget = budget
        self._scheduler = scheduler
        self._events = events
        self._next: Member | None = None
        self._file: str | None = None
        self._last_file = ""
        self._cancelled = False

    @property
    def position(self) -> int:
        """How far the archive has been read, bytes."""
        return self._source.position

    def next_member(self) -> Member | None:
        """Step to the next member, None at the end of the archive. Raises what readers raise."""
        if self._next is not None:
            pushed_back, self._next = self._next, None
            return pushed_back
        while wanted := self._reader.wanted:
            header = self._source.read(wanted)
            if len(header) < wanted:
                self._reader.eof(header)
                return None
            member = self._reader.feed(header)
            if member is not None:
                return member
        return None

    def push_back(self, member: Member) -> None:
        """`member`, whose content has not been touched, is to be the next one again."""
        self._next = member

    def read_content(self, size: int) -> bytearray:
        """The next `size` bytes of the current member's content. Raises ArchiveTruncated."""
        content = bytearray(size)
        self._read_into(memoryview(content))
        return content

    def skip_content(self, size: int) -> None:
        """Pass over `size` bytes of the current member's content. Raises ArchiveTruncated."""
        while size:
            self._stop_if_cancelled()
            piece = min(size, _SKIP_PIECE)
            if self._reader.skip(piece):
                if self._source.skip(piece) < piece:
                    raise ArchiveTruncated("the archive ends inside a chunk")
            else:
                piece = len(self.read_content(min(piece, _PIECE)))
            size -= piece

    def run(self, wanted: Callable[[str], bool], passphrase_of: Callable[[str], bytes]) -> None:
        """Put the events of all files for which `wanted` is true into the queue; always ends with ArchiveEnd.

        `wanted` is asked again for every chunk: the rest of a file that is no longer wanted is skipped.
        `passphrase_of` makes the scrypt passphrase of a chunk from its member name (without `.enc`).
        """
        error: RestoreError | None = None
        try:
            self._walk(wanted, passphrase_of)
        except Exception as caught:  # noqa: BLE001 - the pipeline waits for the end
            error = as_restore_error(caught)
        self._end_file(error)
        self._events.put(ArchiveEnd(error, self._last_file))

    def take(self, name: ChunkName, size: int, passphrase: bytes) -> Chunk:
        """Read the current member's content, `size` bytes, as a chunk whose key is being derived.

        Waits for room in the budget. Raises BadContainer, ExcessiveCost, BudgetTooSmall, ArchiveTruncated.
        """
        if size < OVERHEAD:
            raise BadContainer(f"it has {size} bytes, fewer than an empty container", chunk=name.number)
        untrusted_head = self.read_content(HEAD_SIZE)
        head = parse_head(untrusted_head)
        self._budget.admit(size, head.parameters.memory)
        key = self._scheduler.submit(KdfRequest(head.parameters, head.salt, passphrase))
        try:
            container = bytearray(size)
            container[:HEAD_SIZE] = untrusted_head
            self._read_into(memoryview(container)[HEAD_SIZE:])
        except BaseException:
            key.cancel()
            self._budget.release(size)
            raise
        return Chunk(name, head, container, key, self._source.position)

    def release(self, chunk: Chunk) -> None:
        """The chunk's memory is needed no more. A derivation that has not started is taken back."""
        chunk.key.cancel()
        self._budget.release(len(chunk.container))

    def cancel(self) -> None:
        """Make `run` stop soon, with Cancelled in its ArchiveEnd."""
        self._cancelled = True
        self._budget.cancel()

    def _walk(self, wanted: Callable[[str], bool], passphrase_of: Callable[[str], bytes]) -> None:
        sequence = ChunkSequence()
        failed_file: str | None = None
        while (member := self.next_member()) is not None:
            self._stop_if_cancelled()
            name = parse_chunk_name(member.name)
            self._last_file = name.file
            if name.file != self._file:
                self._end_file()
            try:
                sequence.expect(name)
                if name.file != failed_file and wanted(name.file):
                    self._begin_file(name.file)
                    self._events.put(self.take(name, member.size, passphrase_of(name.member)))
            except (ChunkOutOfOrder, BadContainer, ExcessiveCost, BudgetTooSmall) as error:
                if name.file != failed_file and wanted(name.file):
                    self._begin_file(name.file)
                    self._end_file(error.at(chunk=name.number))
                failed_file = name.file
            self.skip_content(self._reader.content_left)

    def _begin_file(self, file: str) -> None:
        if self._file is None:
            self._file = file
            self._events.put(FileStart(file))

    def _end_file(self, error: RestoreError | None = None) -> None:
        if self._file is not None:
            self._file = None
            self._events.put(FileEnd(error))

    def _read_into(self, target: memoryview) -> None:
        for start in range(0, len(target), _PIECE):
            self._stop_if_cancelled()
            piece = target[start : start + _PIECE]
            read = self._source.read_into(piece)
            self._reader.content(piece[:read])
            if read < len(piece):
                self._reader.eof()
                raise ArchiveTruncated("the archive ends inside a chunk")

    def _stop_if_cancelled(self) -> None:
        if self._cancelled:
            raise Cancelled("the restore was cancelled")
