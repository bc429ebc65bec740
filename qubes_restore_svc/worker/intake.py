"""From archive bytes to chunks: the first stage of the pipeline, in a thread of its own.

Strategy: walk through the members in archive order. A wanted file becomes a run of events in a queue:
`FileStart`, its `Chunk`s, `FileEnd`; what is not wanted is skipped without a derivation (`Passed`). A chunk's
derivation is submitted as soon as the head of its container is there. Where the input can seek, the rest
stays where it is until the chunk is unpacked, so that the memory is left to the derivations; elsewhere it
is held while it comes in. What is wrong with one file ends that file (`FileEnd.error`) and no other; what
is wrong with the archive itself ends everything (`ArchiveEnd.error`), but for damage that the reader has
passed over (`Damaged`): what was lost by it shows in what is missing.

Nothing in here looks into a chunk further than its container's head: the MAC has not been checked.
"""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace

from qubes_restore_svc.archive.chunks import ChunkName, ChunkSequence, parse_chunk_name, parse_piece_name
from qubes_restore_svc.archive.container import HEAD_SIZE, OVERHEAD, keys_match, parse_head
from qubes_restore_svc.archive.members import Damage, Member, MemberReader
from qubes_restore_svc.archive.openssl import MAX_MAC_LINE
from qubes_restore_svc.errors import (
    ArchiveDamaged,
    ArchiveTruncated,
    BadArchive,
    BadContainer,
    BudgetTooSmall,
    Cancelled,
    ChunkOutOfOrder,
    ExcessiveCost,
    FaultyMachine,
    RestoreError,
    SkippedOnRequest,
)
from qubes_restore_svc.kdf.engine import CostLimit
from qubes_restore_svc.worker.budget import Budget
from qubes_restore_svc.worker.events import (
    ArchiveEnd,
    Chunk,
    Damaged,
    EventQueue,
    FileEnd,
    FileStart,
    Passed,
    Piece,
)
from qubes_restore_svc.worker.faults import as_restore_error
from qubes_restore_svc.worker.keys import KeyScheduler
from qubes_restore_svc.worker.selection import IMAGES, SETTINGS
from qubes_restore_svc.worker.source import ArchiveSource

#: Content is read in pieces of this size, bytes: the reader must see it, and a cancel must be noticed.
_PIECE = 4 << 20

#: Most members between the chunks of one file that are told of.
_MAX_PASSED_BY = 100

#: What is not wanted is skipped in pieces of this size, bytes, so that a cancel is noticed.
_SKIP_PIECE = 64 << 20


#: Makes the scrypt passphrase of a chunk from its member name (without `.enc`).
PassphraseOf = Callable[[str], bytes]


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
        costs: CostLimit,
    ) -> None:
        self._costs = costs
        self._source = source
        self._reader = reader
        self._budget = budget
        self._scheduler = scheduler
        self._events = events
        self._next: Member | None = None
        self._file: str | None = None
        self._last_file = ""
        self._passed_by: list[Passed] = []
        self._last_piece = ""  # the member name of the last one, format 3 only
        self._content_end = 0  # of the last member, bytes from the beginning
        self._damages: list[Damage] = []  # met in the current file, or right behind it
        self._cancelled = False
        self._wanted: Callable[[str], bool] = might_be_wanted
        self._loaded = bytearray()
        self._started = False
        self._outstanding: dict[int, Chunk] = {}

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
            self._stop_if_cancelled()
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

    def want(self, wanted: Callable[[str], bool]) -> None:
        """From now on, only files for which `wanted` is true come; before, all that might be wanted do."""
        self._wanted = wanted
        self._scheduler.leave_processors()  # they are unpacked as they come
        self.withdraw_unwanted()

    def withdraw_unwanted(self) -> None:
        """Take back the waiting derivations of chunks that are wanted no more; from any thread."""
        for chunk in list(self._outstanding.values()):
            if not self._wanted(chunk.name.file):
                chunk.key.cancel()

    def start(self, passphrase_of: PassphraseOf | None) -> None:
        """Run in a thread, unless it does already."""
        if not self._started:
            self._started = True
            self._scheduler.expect_more(True)
            threading.Thread(target=self.run, args=(passphrase_of,), name="intake", daemon=True).start()

    def run(self, passphrase_of: PassphraseOf | None) -> None:
        """Put the events of all wanted files into the queue; always ends with ArchiveEnd.

        It is asked for every chunk whether it is wanted: the rest of a file that no longer is, is skipped.
        `passphrase_of` makes the scrypt passphrase of a chunk from its member name (without `.enc`). None: it
        is a backup of format 3, and what comes are pieces.
        """
        error: RestoreError | None = None
        try:
            self._walk(passphrase_of)
        except Exception as caught:  # noqa: BLE001 - the pipeline waits for the end
            error = as_restore_error(caught)
        self._scheduler.expect_more(False)
        damage = self._take_damage(at_end=error is None)
        self._end_file(error)
        self._events.put(ArchiveEnd(error, self._last_file, damage if error is not None else None))

    def take(
        self,
        name: ChunkName,
        size: int,
        passphrase: bytes,
        *,
        urgent: bool = False,
        before_waiting: Callable[[], None] | None = None,
    ) -> Chunk:
        """Take the current member's content, `size` bytes, as a chunk whose key is being derived.

        Waits for room in the budget; for `before_waiting` see `Budget.admit`, for `urgent`
        `KeyScheduler.submit`. Raises BadContainer,
        ExcessiveCost, BudgetTooSmall, ArchiveTruncated.
        """
        if size < OVERHEAD:
            raise BadContainer(f"it has {size} bytes, fewer than an empty container", chunk=name.number)
        untrusted_head = self.read_content(HEAD_SIZE)
        head = parse_head(untrusted_head, ignore_cost_limit=self._costs.ignored)
        self._costs.check(head.parameters)
        start = self._source.position - HEAD_SIZE
        located = self._source.seekable and self._reader.skip(0)
        self._budget.admit(size, head.parameters, buffered=not located, before_waiting=before_waiting)
        request = head.request(passphrase)
        key = self._scheduler.submit(request, urgent=urgent)
        held = None
        try:
            if located:
                self.skip_content(size - HEAD_SIZE)
                self._source.will_need(start, size)
            else:
                held = bytearray(size)
                held[:HEAD_SIZE] = untrusted_head
                self._read_into(memoryview(held)[HEAD_SIZE:])
        except BaseException:
            key.cancel()
            self._budget.release(size, head.parameters, buffered=not located)
            raise
        chunk = Chunk(name, head, size, request, key, start + size, held)
        self._outstanding[id(chunk)] = chunk
        return chunk

    def take_piece(self, name: ChunkName, size: int) -> Piece:
        """Take the current member's content, `size` bytes, and its MAC, which must be the next member.

        Waits for room in the budget. Raises BadContainer, BudgetTooSmall, ArchiveTruncated.
        """
        start = self._source.position
        located = self._source.seekable and self._reader.skip(0)
        self._budget.admit(size, None, buffered=not located)
        held = None
        try:
            if located:
                self.skip_content(size)
                self._source.will_need(start, size)
            else:
                held = self.read_content(size)
            line = self._mac_line(name)
        except BaseException:
            self._budget.release(size, None, buffered=not located)
            raise
        return Piece(name, size, line, start + size, held)

    def _mac_line(self, name: ChunkName) -> bytes:
        member = self.next_member()
        if member is not None and member.name == f"{name.member}.hmac" and member.size <= MAX_MAC_LINE:
            return bytes(self.read_content(member.size))
        if member is not None:
            self.push_back(member)
        raise BadContainer("its MAC does not follow it", chunk=name.number)

    def container(self, chunk: Chunk | Piece) -> memoryview:
        """The whole container. Valid until the next call, or `release`. Raises ArchiveUnreadable."""
        if chunk.held is not None:
            return memoryview(chunk.held)
        if len(self._loaded) < chunk.size:
            self._loaded = bytearray()  # never both in memory, the old one and the new one
            self._loaded = bytearray(chunk.size)
        view = memoryview(self._loaded)[: chunk.size]
        if self._source.read_at(chunk.end - chunk.size, view) < chunk.size:
            raise ArchiveTruncated("the archive became shorter while it was read")
        return view

    def fitting_key(self, chunk: Chunk, remark: Callable[[str], None], *, name: str) -> bytes | None:
        """The key of a chunk; None if none fits its head, whoever derives it. Blocks.

        `remark` is told, in a line about `name`, when one that did not fit was the fault of this computer.
        Raises FaultyMachine if it must be, SkippedOnRequest if the derivation was taken back, ExcessiveCost
        if that was because of what it costs, and what engines raise.
        """
        parameters = chunk.head.parameters
        try:
            key = chunk.key.result()
        except CancelledError:
            if self._wanted(chunk.name.file):
                self._costs.check(parameters)
            raise SkippedOnRequest("it is not wanted any more") from None
        if keys_match(chunk.head, key):
            self._costs.fitted(parameters)
            return key
        self._costs.check(parameters)  # nobody derives a second time what would be refused by now
        again, by = self._scheduler.derive_again(chunk.request)
        if keys_match(chunk.head, again):
            first = self._scheduler.engine_name
            remark(
                f"the key of {name} came out wrong from {first} and right from {by}:"
                " the processor or the memory of this computer may be faulty"
            )
            self._costs.fitted(parameters)
            return again
        if again != key:
            raise FaultyMachine(
                "its key was derived twice, with two results, of which none is right: the processor or the"
                " memory of this computer is faulty"
            )
        self._costs.misfitted(parameters)
        for other in list(self._outstanding.values()):
            if self._costs.refuses(other.head.parameters):
                other.key.cancel()
        return None

    def release(self, chunk: Chunk | Piece) -> None:
        """The chunk's memory is needed no more. A derivation that has not started is taken back."""
        parameters = None
        if isinstance(chunk, Chunk):
            self._outstanding.pop(id(chunk), None)
            chunk.key.cancel()
            parameters = chunk.head.parameters
        if chunk.held is None and len(self._loaded) > self._budget.largest_located(without=chunk.size):
            self._loaded = bytearray()  # what is to come is smaller, and only that much stays counted
        self._budget.release(chunk.size, parameters, buffered=chunk.held is not None)

    def cancel(self) -> None:
        """Make `run` stop soon, with Cancelled in its ArchiveEnd."""
        self._cancelled = True
        self._budget.cancel()

    def abandon(self) -> None:
        """Cancel, where nobody takes the events and nobody will: what came ahead is given back."""
        self.cancel()
        if self._started:
            threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        while not isinstance(event := self._events.get(), ArchiveEnd):
            if isinstance(event, Chunk | Piece):
                self.release(event)

    def _walk(self, passphrase_of: PassphraseOf | None) -> None:
        parse_name = parse_piece_name if passphrase_of is None else parse_chunk_name
        sequence = ChunkSequence()
        failed_file: str | None = None
        while (member := self.next_member()) is not None:
            self._stop_if_cancelled()
            damage = self._take_damage()
            try:
                name = parse_name(member.name)
            except BadArchive:
                self._pass_by(Passed(member.name, foreign=True))
                self.skip_content(self._reader.content_left)
                continue
            if name is None:
                self._stray_mac(member)
                continue
            if name.file != self._file:
                self._end_file()
            is_new, self._last_file = name.file != self._last_file, name.file
            self._last_piece = name.member
            start = self._source.position
            try:
                sequence.expect(name)
                if name.file != failed_file and self._wanted(name.file):
                    self._begin_file(name.file)
                    self._pass_on(name, member.size, passphrase_of)
            except (ChunkOutOfOrder, BadContainer, ExcessiveCost, BudgetTooSmall) as caught:
                error: RestoreError = self._source.gap(start, self._source.position) or caught
                if damage is not None and isinstance(error, ChunkOutOfOrder):
                    error = ArchiveDamaged(f"{error.reason}, because {damage}")
                if name.file != failed_file and self._wanted(name.file):
                    self._begin_file(name.file)
                    self._end_file(error.at(chunk=name.number))
                failed_file = name.file
            if is_new and self._file is None and failed_file != name.file:
                self._events.put(Passed(name.file))
            if self._next is None:
                self.skip_content(self._reader.content_left)
                self._content_end = self._source.position

    def _pass_by(self, foreign: Passed) -> None:
        """Tell of a member that is no chunk; not within the events of a file, which it does not end."""
        if self._file is None:
            self._events.put(foreign)
        elif len(self._passed_by) < _MAX_PASSED_BY:
            self._passed_by.append(foreign)

    def _stray_mac(self, member: Member) -> None:
        """A MAC that was not taken with its piece: that was not wanted, or it is missing."""
        piece = member.name.removesuffix(".hmac")
        name = parse_piece_name(piece)
        if name is not None and piece != self._last_piece and self._wanted(name.file):
            error = ChunkOutOfOrder("there is a MAC of it, but not the piece itself", chunk=name.number)
            if name.file != self._file:
                self._end_file()
            self._begin_file(name.file)
            self._end_file(error)
            self._last_file = name.file
        self.skip_content(self._reader.content_left)

    def _pass_on(self, name: ChunkName, size: int, passphrase_of: PassphraseOf | None) -> None:
        # In a frame of its own, which holds the chunk no longer than it takes.
        if passphrase_of is None:
            self._events.put(self.take_piece(name, size))
            return
        chunk = self.take(name, size, passphrase_of(name.member))
        if not self._wanted(name.file):  # since a moment ago, when it was not yet outstanding
            chunk.key.cancel()
        self._events.put(chunk)

    def _begin_file(self, file: str) -> None:
        if self._file is None:
            self._file = file
            self._events.put(FileStart(file))

    def _take_damage(self, *, at_end: bool = False) -> Damage | None:
        """Damage that the reader has passed over on its way to the member, or the end, that it found."""
        damage = self._reader.take_damage()
        if damage is None:
            return None
        if (gap := self._source.gap(self._content_end, damage.end)) is not None:
            damage = replace(damage, reason=gap.reason)
        elif at_end and not self._source.seekable:
            damage = replace(damage, harmless=True)  # zeros: a device is longer than the backup on it
        self._damages.append(damage)
        if self._file is None:
            self._tell_damages()
        return None if damage.harmless else damage

    def _tell_damages(self) -> None:
        for damage in self._damages:
            self._events.put(Damaged(damage, self._last_file))
        self._damages.clear()

    def _end_file(self, error: RestoreError | None = None) -> None:
        if self._file is not None:
            self._file = None
            harmful = [damage for damage in self._damages if not damage.harmless]
            self._events.put(FileEnd(error, harmful[-1] if harmful else None))
            for foreign in self._passed_by:
                self._events.put(foreign)
            self._passed_by.clear()
            self._tell_damages()

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


def might_be_wanted(file: str) -> bool:
    """Could a restore want this file, whatever qubes.xml says? Only images, settings and dom0's home."""
    directory, _, name = file.rpartition("/")
    return name in IMAGES or name in SETTINGS or directory == "dom0-home"
