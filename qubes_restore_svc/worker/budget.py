"""The memory budget: chunk buffers plus the arenas of key derivations, in real bytes, against one limit.

Strategy: one lock and one condition over everything that counts. What the process takes besides is a fixed
amount that is kept free. Buffers that are held are counted one by
one. Where chunks are fetched only when they are unpacked, one at a time, room for the largest of them is
kept from the moment it is known. What remains is for arenas (`arena_room`); a buffer is admitted only
while that stays enough for the largest derivation that waits or runs, in its smallest form. So whatever
was admitted can be derived in the end, and nothing waits for itself.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

from qubes_restore_svc.errors import BudgetTooSmall
from qubes_restore_svc.kdf.engine import KdfEngine, KdfParameters
from qubes_restore_svc.system_memory import MemoryRoom
from qubes_restore_svc.worker.threads import Stop

MIB = 1 << 20

#: Where nothing is known that keeps memory from being granted.
BOUNDLESS = MemoryRoom(1 << 60)

#: Bytes that the worker takes besides what is counted: the interpreter and its libraries, a decompressor with
#: the usual window, what waits to be hashed (tests/worker/test_memory.py measures it).
OWN_MEMORY = 80 * MIB

#: Chunks that may be on their way while they lie in the archive. They take no memory; a key that takes long
#: must not hold up the others behind it.
MAX_LOCATED = 48


class Budget:
    """`limit` bytes less `own`, shared by all threads of the pipeline and the derivations of `engine`.

    At most `max_chunks` chunks with a buffer are on their way, and no more than take two fifths of the limit,
    so that derivations are not crowded out by what waits for them. `stop` ends all waiting, and `advice` says
    what a person can do so that so many bytes can be granted.
    """

    def __init__(
        self,
        limit: int,
        engine: KdfEngine,
        max_chunks: int,
        stop: Stop,
        *,
        own: int = OWN_MEMORY,
        advice: Callable[[int], str] = BOUNDLESS.advice,
    ) -> None:
        self._advice = advice
        self._granted = limit
        self._limit = limit - own
        self.changed = threading.Condition()
        self._engine = engine
        self._max_chunks = max_chunks
        self._buffers: list[int] = []
        self._located: list[int] = []
        self._derivations: list[int] = []
        self._set_aside = 0
        self._stop = stop
        stop.wakes(self._wake)

    def check(self, size: int, parameters: KdfParameters | None) -> None:
        """Raise BudgetTooSmall if a chunk of `size` bytes and its derivation can never fit."""
        least = self._least(parameters)
        if size + least > self._limit:
            need = -(-(size + least + self._granted - self._limit) // MIB)
            what = f"one key derivation of this backup takes {least // MIB} MiB, with its chunk and"
            if parameters is None:
                what = f"one piece of this backup has {size // MIB} MiB, with"
            raise BudgetTooSmall(
                f"{what} the worker itself {need} MiB, and it may use {self._granted // MIB} MiB",
                advice=self._advice(need * MIB),
            )

    def admit(
        self,
        size: int,
        parameters: KdfParameters | None,
        *,
        buffered: bool,
        before_waiting: Callable[[], None] | None = None,
    ) -> None:
        """Wait until one more chunk of `size` bytes may be on its way, and count it. `parameters` are those
        of its derivation, None if there is none.

        `buffered`: it is held in memory from now on; otherwise it is fetched when its turn comes. Ends with
        `release`. `before_waiting` is called if there is no room at once: whoever holds a chunk himself must
        give it back there, or would wait for himself. Raises BudgetTooSmall if it can never be, Cancelled
        after `stop`.
        """
        self.check(size, parameters)
        least = self._least(parameters)
        if before_waiting is not None:
            with self.changed:
                at_once = self._stop.said or self._admissible(size, least, buffered)
            if not at_once:
                before_waiting()
        with self.changed:
            self.changed.wait_for(lambda: self._stop.said or self._admissible(size, least, buffered))
            self._stop.check()
            (self._buffers if buffered else self._located).append(size)
            self._derivations.append(least)
            self._engine.trim(self.arena_room)

    def release(self, size: int, parameters: KdfParameters | None, *, buffered: bool) -> None:
        """The chunk that was admitted with these values is on its way no more."""
        with self.changed:
            (self._buffers if buffered else self._located).remove(size)
            self._derivations.remove(self._least(parameters))
            self.changed.notify_all()

    def largest_located(self, without: int) -> int:
        """Bytes of the largest chunk that is yet to be fetched, one of `without` bytes left aside."""
        with self.changed:
            others = list(self._located)
        others.remove(without)
        return max(others, default=0)

    @contextlib.contextmanager
    def set_aside(self, size: int) -> Iterator[bool]:
        """Wait until the arenas leave `size` bytes, and keep them for the caller; True inside, if it can be.

        False at once if they do not fit beside the chunks that are held. Raises Cancelled after `stop`.
        """
        with self.changed:
            fits = self._chunk_bytes() + size <= self._limit
            if fits:
                self._set_aside += (
                    size  # at once: what runs comes to its end, and nothing new takes its place
                )
        try:
            if fits:
                with self.changed:
                    self.changed.wait_for(lambda: self._stop.said or self._running <= self.arena_room)
                    self._stop.check()
                    self._engine.trim(self.arena_room)
            yield fits
        finally:
            with self.changed:
                self._set_aside -= size if fits else 0
                self.changed.notify_all()

    @property
    def arena_room(self) -> int:
        """Bytes that all arenas may take together now. To be asked for with `changed` held."""
        return self._limit - self._chunk_bytes()

    @property
    def used(self) -> int:
        """Bytes counted now."""
        with self.changed:
            return self._chunk_bytes() + self._engine.memory_held

    def _wake(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def _admissible(self, size: int, least: int, buffered: bool) -> bool:
        on_their_way = len(self._buffers) + len(self._located)
        if on_their_way >= (self._max_chunks if buffered else MAX_LOCATED):
            return False
        if not buffered:
            chunk_bytes = sum(self._buffers) + max([size, *self._located]) + self._set_aside
        else:
            chunk_bytes = self._chunk_bytes() + size
            if self._buffers and chunk_bytes > self._limit * 2 // 5:
                return False
        return chunk_bytes + max([least, self._running, *self._derivations]) <= self._limit

    @property
    def _running(self) -> int:
        """Bytes of the arenas in which derivations run."""
        return self._engine.memory_held - self._engine.memory_idle

    def _chunk_bytes(self) -> int:
        return sum(self._buffers) + max(self._located, default=0) + self._set_aside

    def _least(self, parameters: KdfParameters | None) -> int:
        if parameters is None:
            return 0
        return self._engine.memory(parameters, self._engine.strides[-1])
