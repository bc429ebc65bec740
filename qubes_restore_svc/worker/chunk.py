"""A chunk on its way from the archive to the unpacking: where it waits, and where it is opened.

Strategy: a chunk carries all that its user needs. `open` checks its MAC and decrypts it, and is the
only way to its content; `release` gives its memory back. What proves that it is authentic is in `proofs.py`.

If the archive can seek, a chunk stays in it until it is opened, so the derivations can use the memory.
Otherwise the store holds the chunk while it comes in. The budget counts its memory in both cases.

Threads of the store open chunks ahead of their turn, in archive order: those whose keys are there and fit, as
far as the budget has room for them beside the derivations. In difficult cases (a key that is late or does
not fit, no room) they leave the chunk to its user. So nobody waits for a thread that has not begun. A fault
is found in the same place and order, with or without these threads.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from qubes_restore_svc.archive.members import ChunkName
from qubes_restore_svc.errors import ArchiveTruncated, RestoreError
from qubes_restore_svc.worker.memory import Budget
from qubes_restore_svc.worker.proofs import Proof, Proofs, Remark
from qubes_restore_svc.worker.source import MemberStream
from qubes_restore_svc.worker.threads import as_restore_error


@dataclass(eq=False, slots=True)
class Chunk:
    """`size` bytes of the archive before position `end`, not authenticated; who has it must `release` it."""

    name: ChunkName
    size: int
    end: int
    proof: Proof
    located: bool  #: it stays in the archive until it is opened
    _memory: bytearray | None = field(repr=False)  # None: there is none for it yet
    _store: "ChunkStore" = field(repr=False)
    _begun: bool = False  # somebody has asked for it, or opens it ahead
    _busy: bool = False  # it is being opened ahead
    _content: memoryview | None = field(default=None, repr=False)  # what opening it ahead gave
    _error: RestoreError | None = None
    _released: bool = False

    def open(self, remark: Remark) -> memoryview:
        """Wait for the key, check the MAC and decrypt; once. The content is valid until `release`.

        A key that does not fit is derived once more. If that shows a fault of this computer, `remark` gets a
        text about it. Raises AuthenticationFailed, BadContainer, ArchiveUnreadable, FaultyMachine,
        SkippedOnRequest if the chunk is not wanted any more, ExcessiveCost if its key would cost too much by
        now, and what engines raise.
        """
        try:
            if self._store.begin(self):
                return self.proof.verify(self._fetch, remark)
            self._store.wait_for(self)
            if self._error is not None:
                raise as_restore_error(self._error)  # a new one: its traceback leads to this chunk
            assert self._content is not None
            return self._content
        except RestoreError as error:
            raise error.at(chunk=self.name.number) from None

    def open_ahead(self) -> None:
        """Open it before its user asks, in a thread of the store, which has begun it."""
        try:
            self._content = self.proof.verify(self._fetch, lambda _: None)
        except BaseException as error:  # noqa: BLE001 - who asks for it is told
            self._error = as_restore_error(error)

    def untrusted_content(self) -> memoryview:
        """All of it as it was stored, for a user who does not `open` it. Raises ArchiveUnreadable."""
        self._store.begin(self)
        return self._fetch()

    def release(self) -> None:
        """Give its memory back, and its derivation if that has not begun; safe to repeat."""
        if not self._released:
            self._released = True
            self.proof.withdraw()
            self._store.release(self)

    def _fetch(self) -> memoryview:
        assert self._memory is not None
        view = memoryview(self._memory)[: self.size]
        if self.located:
            self._store.load(self.end - self.size, view)
        return view


class ChunkStore:
    """Takes chunks out of `members` as the `budget` admits them, and counts their memory."""

    def __init__(self, members: MemberStream, budget: Budget) -> None:
        self.members = members
        self._budget = budget
        self._spare = bytearray()  # what the next chunk is fetched into; counted
        self._closed = False
        # Under the lock of the budget:
        self._threads = 0
        self._unopened: deque[Chunk] = deque()  # in archive order
        self._open = 0  # chunks that are begun and not released
        self._turn = threading.Condition(budget.lock)  # for the threads: the first one may be ready
        self._opened = threading.Condition(budget.lock)  # for who asks: one was opened ahead

    def open_ahead(self, threads: int) -> None:
        """From now on open chunks ahead of their turn, at most as many as there are `threads`."""
        self._threads = threads
        for number in range(threads):
            threading.Thread(target=self._work, name=f"open-{number}", daemon=True).start()

    def close(self) -> None:
        """Open nothing more ahead."""
        with self._budget.lock:
            self._closed = True
            self._turn.notify_all()

    def take(
        self,
        name: ChunkName,
        size: int,
        proofs: Proofs,
        *,
        check: Callable[[], None] = lambda: None,
        urgent: bool = False,
        before_waiting: Callable[[], None] | None = None,
    ) -> Chunk:
        """Take the current member's content, `size` bytes, as a chunk whose key is being derived.

        Waits for room in the budget; for `before_waiting` see `Budget.admit`, for `check` and `urgent`
        `KeyScheduler.submit`. Raises BadContainer, ExcessiveCost, BudgetTooSmall, ArchiveTruncated.
        """
        members = self.members
        head_size = min(size, proofs.head_size)
        start = members.source.position
        untrusted_head = members.read_content(head_size)
        proof = proofs.prove(name, size, untrusted_head)
        located = members.can_return
        self._budget.admit(size, proof.parameters, buffered=not located, before_waiting=before_waiting)
        memory = None
        try:
            proof.begin(check, urgent=urgent)
            if located:
                members.skip_content(size - head_size)
                members.source.will_need(start, size)
            else:
                memory = bytearray(size)
                memory[:head_size] = untrusted_head
                members.read_into(memoryview(memory)[head_size:])
            proof.complete(members)
        except BaseException:
            proof.withdraw()
            self._budget.release(size, proof.parameters, buffered=not located)
            raise
        chunk = Chunk(name, size, start + size, proof, located, memory, self)
        with self._budget.lock:
            self._unopened.append(chunk)
        proof.when_settled(self._next_turn)
        return chunk

    def begin(self, chunk: Chunk) -> bool:
        """Leave a chunk to its user, if nobody has begun it. Its turn has come, so there is room for it."""
        with self._budget.lock:
            return not chunk._begun and self._begin(chunk, ahead=False)

    def wait_for(self, chunk: Chunk) -> None:
        """Wait until nobody opens it."""
        with self._budget.lock:
            self._opened.wait_for(lambda: not chunk._busy)

    def load(self, position: int, target: memoryview) -> None:
        """Fetch what lies in the archive."""
        if self.members.source.read_at(position, target) < len(target):
            raise ArchiveTruncated("the archive became shorter while it was read")

    def release(self, chunk: Chunk) -> None:
        """The chunk's memory is needed no more."""
        with self._budget.lock:
            self.wait_for(chunk)
            if chunk._begun:
                self._open -= 1
            else:
                self._unopened.remove(chunk)
            memory, chunk._memory, chunk._content = chunk._memory, None, None
            self._budget.release(chunk.size, chunk.proof.parameters, buffered=not chunk.located)
            if chunk.located and memory is not None:
                unused = min(memory, self._spare, key=len)
                self._spare = memory if unused is self._spare else self._spare
                self._budget.count_fetched(-len(unused))
            if len(self._spare) > self._budget.largest_located:
                # What is to come is smaller, and only that much stays counted.
                self._budget.count_fetched(-len(self._spare))
                self._spare = bytearray()
            self._turn.notify()

    def _begin(self, chunk: Chunk, *, ahead: bool) -> bool:
        """Give it memory, if there is room. False only for one that is to be opened ahead."""
        if chunk._memory is None:
            more = max(0, chunk.size - len(self._spare))
            if ahead and not self._budget.has_room_ahead(more):
                return False
            memory, self._spare = self._spare, bytearray()
            if more:
                memory = bytearray()  # never both, the old and the new
                self._budget.count_fetched(more)
                try:
                    memory = bytearray(chunk.size)
                except MemoryError:
                    self._budget.count_fetched(-chunk.size)
                    if ahead:
                        return False
                    raise
            chunk._memory = memory
        self._unopened.remove(chunk)
        self._open += 1
        chunk._begun, chunk._busy = True, ahead
        return True

    def _work(self) -> None:
        while self._open_next():
            pass  # in a frame of its own, which holds the chunk no longer than it takes

    def _open_next(self) -> bool:
        """Open the first chunk ahead as soon as possible. False: nothing more will be opened ahead."""
        with self._budget.lock:
            while self._closed or (chunk := self._begin_ready()) is None:
                if self._closed:
                    return False
                self._turn.wait()
            self._turn.notify()  # the one behind it may be ready, too
        chunk.open_ahead()
        with self._budget.lock:
            chunk._busy = False
            self._opened.notify_all()
        return True

    def _begin_ready(self) -> Chunk | None:
        """Begin the first chunk if it can be opened ahead now."""
        if self._open > self._threads or not self._unopened:
            return None
        chunk = self._unopened[0]
        return chunk if chunk.proof.ready and self._begin(chunk, ahead=True) else None

    def _next_turn(self) -> None:
        with self._budget.lock:
            self._turn.notify()
