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

import contextlib
import queue
import threading
from dataclasses import replace

from qubes_restore_svc.archive.members import ChunkName, ChunkSequence, Damage, Member
from qubes_restore_svc.errors import (
    ArchiveDamaged,
    BadArchive,
    BadContainer,
    BudgetTooSmall,
    ChunkOutOfOrder,
    ExcessiveCost,
    RestoreError,
)
from qubes_restore_svc.worker.chunk import Chunk, ChunkStore
from qubes_restore_svc.worker.files import (
    ArchiveEnd,
    Damaged,
    EventQueue,
    FileEnd,
    FileStart,
    Passed,
    event_queue,
)
from qubes_restore_svc.worker.keys import KeyScheduler
from qubes_restore_svc.worker.proofs import Proofs
from qubes_restore_svc.worker.selection import Wanted
from qubes_restore_svc.worker.threads import as_restore_error

#: The intake reports at most so many members that stand between the chunks of one file.
_MAX_PASSED_BY = 100

#: Seconds between two looks at an intake that should end.
_PATIENCE_S = 0.1


class Intake:
    """Reads the members of `store` that have not been read, and makes `events` about files. It asks for every
    chunk whether `wanted` has its file; it skips the rest of a file that is no longer wanted."""

    def __init__(self, store: ChunkStore, scheduler: KeyScheduler, wanted: Wanted) -> None:
        self.events: EventQueue = event_queue()
        self._store = store
        self._members = store.members
        self._source = store.members.source
        self._scheduler = scheduler
        self._wanted = wanted
        self._file: str | None = None
        self._last_file = ""
        self._passed_by: list[Passed] = []
        self._last_piece = ""  # the member name of the last one, format 3 only
        self._damages: list[Damage] = []  # met in the current file, or right behind it
        self._thread: threading.Thread | None = None

    def start(self, proofs: Proofs) -> None:
        """Run in a thread, unless it runs already."""
        if self._thread is None:
            self._scheduler.expect_more(True)
            self._thread = threading.Thread(target=self.run, args=(proofs,), name="intake", daemon=True)
            self._thread.start()

    def abandon(self) -> None:
        """Give back everything that has come and still comes, because nobody takes it any more. Returns when
        the thread has ended."""
        while self._thread is not None and (self._thread.is_alive() or not self.events.empty()):
            with contextlib.suppress(queue.Empty):
                event = self.events.get(timeout=_PATIENCE_S)
                if isinstance(event, Chunk):
                    event.release()

    def run(self, proofs: Proofs) -> None:
        """Put the events of all wanted files into the queue; always ends with ArchiveEnd. `proofs` are those
        of the backup's chunks."""
        error: RestoreError | None = None
        try:
            self._walk(proofs)
        except Exception as caught:  # noqa: BLE001 - the pipeline waits for the end
            error = as_restore_error(caught)
        self._scheduler.expect_more(False)
        damage = self._take_damage(at_end=error is None)
        self._end_file(error)
        damage = damage if error is not None else None
        self.events.put(ArchiveEnd(error, self._last_file, damage, self._source.position))

    def _walk(self, proofs: Proofs) -> None:
        sequence = ChunkSequence()
        failed_file: str | None = None
        while (member := self._members.next_member()) is not None:
            damage = self._take_damage()
            try:
                name = proofs.parse_name(member.name)
            except BadArchive:
                self._pass_by(Passed(member.name, foreign=True))
                self._members.skip_rest()
                continue
            if name is None:
                self._stray_mac(member, proofs)
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
                    self._pass_on(name, member.size, proofs)
            except (ChunkOutOfOrder, BadContainer, ExcessiveCost, BudgetTooSmall) as caught:
                error: RestoreError = self._source.gap(start, self._source.position) or caught
                if damage is not None and isinstance(error, ChunkOutOfOrder):
                    error = ArchiveDamaged(f"{error.reason}, because {damage}")
                if name.file != failed_file and self._wanted(name.file):
                    self._begin_file(name.file)
                    self._end_file(error.at(chunk=name.number))
                failed_file = name.file
            if is_new and self._file is None and failed_file != name.file:
                self.events.put(Passed(name.file))
            self._members.skip_rest()

    def _pass_by(self, foreign: Passed) -> None:
        """Report a member that is no chunk; not within the events of a file, because it does not end the
        file."""
        if self._file is None:
            self.events.put(foreign)
        elif len(self._passed_by) < _MAX_PASSED_BY:
            self._passed_by.append(foreign)

    def _stray_mac(self, member: Member, proofs: Proofs) -> None:
        """A MAC that was not taken with its piece: that was not wanted, or it is missing."""
        piece = member.name.removesuffix(".hmac")
        name = proofs.parse_name(piece)
        if name is not None and piece != self._last_piece and self._wanted(name.file):
            error = ChunkOutOfOrder("there is a MAC of it, but not the piece itself", chunk=name.number)
            if name.file != self._file:
                self._end_file()
            self._begin_file(name.file)
            self._end_file(error)
            self._last_file = name.file
        self._members.skip_rest()

    def _pass_on(self, name: ChunkName, size: int, proofs: Proofs) -> None:
        # In a frame of its own, which holds the chunk no longer than it takes.
        self.events.put(self._store.take(name, size, proofs, check=lambda: self._wanted.check(name.file)))

    def _begin_file(self, file: str) -> None:
        if self._file is None:
            self._file = file
            self.events.put(FileStart(file))

    def _take_damage(self, *, at_end: bool = False) -> Damage | None:
        """Damage that the reader has passed over on its way to the member, or the end, that it found."""
        damage = self._members.take_damage()
        if damage is None:
            return None
        if (gap := self._source.gap(self._members.content_end, damage.end)) is not None:
            damage = replace(damage, reason=gap.reason)
        elif at_end and not self._source.seekable:
            damage = replace(damage, harmless=True)  # zeros: a device is longer than the backup on it
        self._damages.append(damage)
        if self._file is None:
            self._tell_damages()
        return None if damage.harmless else damage

    def _tell_damages(self) -> None:
        for damage in self._damages:
            self.events.put(Damaged(damage, self._last_file))
        self._damages.clear()

    def _end_file(self, error: RestoreError | None = None) -> None:
        if self._file is not None:
            self._file = None
            harmful = [damage for damage in self._damages if not damage.harmless]
            self.events.put(FileEnd(error, harmful[-1] if harmful else None))
            for foreign in self._passed_by:
                self.events.put(foreign)
            self._passed_by.clear()
            self._tell_damages()
