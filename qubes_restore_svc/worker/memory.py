"""The worker's memory: what may be read ahead, and how much a key derivation gets.

Strategy: chunk buffers plus the arenas of key derivations are counted in real bytes, against one limit, under
one lock and one condition. What the process takes besides is a fixed amount that is kept free. Buffers that
are held are counted one by one. Where chunks are fetched only when they are unpacked, room for the largest
of them is kept from the moment it is known; more of them may be fetched ahead of their turn where that leaves
enough. What remains is for arenas (`arena_room`). A buffer
is admitted only while that stays enough for the largest derivation that waits or runs, in its smallest form.
So whatever was admitted can be derived in the end, and nothing waits for itself.

`lanes_to_fill` says how many derivations run, and `choose_stride` shares out the room for arenas among them.
Measured, four derivations in one vector register take 1.6 times as long as one. So with much memory more
lanes are quicker, and with little memory fewer. Each lane gets the same share, and uses it as well as it
can. Not better, though: memory that was never touched is paid for page by page, so what a larger share saves
can be less than it costs.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qubes_restore_svc.errors import BudgetTooSmall
from qubes_restore_svc.kdf.engine import KdfEngine, KdfParameters
from qubes_restore_svc.system_memory import MemoryRoom
from qubes_restore_svc.worker.threads import Stop

MIB = 1 << 20

#: Where nothing is known that keeps memory from being granted.
BOUNDLESS = MemoryRoom(1 << 60)

#: Bytes that the worker takes besides what is counted: the interpreter and its libraries, a decompressor with
#: the usual window, what waits to be hashed (tests/worker/test_peak_memory.py measures it).
OWN_MEMORY = 80 * MIB

#: Chunks that may be on their way while they lie in the archive. They take no memory; a key that takes long
#: must not hold up the others behind it. Enough to fill eight lanes on each of eight processors
#: (`lanes_to_fill`).
MAX_LOCATED = 96

#: The part of the limit that chunks may take which are fetched from the archive, where more than one is.
_AHEAD = 5


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
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self._engine = engine
        self._max_chunks = max_chunks
        self._buffers: list[int] = []
        self._located: list[int] = []
        self._derivations: list[int] = []
        self._fetched = 0
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
        `release`. `before_waiting` is called if there is no room at once: a caller that holds a chunk must
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

    @property
    def largest_located(self) -> int:
        """Bytes of the largest chunk on its way that lies, or lay, in the archive. With `lock` held."""
        return max(self._located, default=0)

    def has_room_ahead(self, size: int) -> bool:
        """May chunks that are fetched before their turn take `size` bytes more? With `lock` held."""
        fetched = self._fetched + size
        taken = self._chunk_bytes(fetched) + max([self._running, *self._derivations])
        return fetched <= self._limit // _AHEAD and taken <= self._limit

    def count_fetched(self, size: int) -> None:
        """Chunks that are fetched from the archive take `size` bytes more, or less. With `lock` held.

        For the one whose turn has come there is always room: it was kept when the chunk was admitted.
        """
        self._fetched += size
        if size > 0:
            self._engine.trim(self.arena_room)
        else:
            self.changed.notify_all()

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
            chunk_bytes = self._chunk_bytes(max(size, self._fetched))
        else:
            chunk_bytes = self._chunk_bytes() + size
            if self._buffers and chunk_bytes > self._limit * 2 // 5:
                return False
        return chunk_bytes + max([least, self._running, *self._derivations]) <= self._limit

    @property
    def _running(self) -> int:
        """Bytes of the arenas in which derivations run."""
        return self._engine.memory_held - self._engine.memory_idle

    def _chunk_bytes(self, fetched: int | None = None) -> int:
        """Bytes that chunks take, or `fetched` of them are for those that are fetched from the archive."""
        fetched = self._fetched if fetched is None else fetched
        return sum(self._buffers) + max([fetched, *self._located]) + self._set_aside

    def _least(self, parameters: KdfParameters | None) -> int:
        if parameters is None:
            return 0
        return self._engine.memory(parameters, self._engine.strides[-1])


#: From this stride on, more memory saves more than it costs on any machine: below, shares of the same size
#: are worth more than some larger ones.
_SLOW = 5

#: How many times as long as with the best number of lanes it may take with fewer.
_ABOUT_THE_SAME = 1.1

#: Seconds to mix one byte, with four lanes in AVX-512 on a processor of 2024.
_MIX_COST = 2e-10

#: Seconds to touch a byte for the first time. It is 0.15 s for a GiB on a machine that has its memory, and 1
#: to 3 s on a virtual one whose host has to find it first. This is between them: with either in its place the
#: next stride would be right, and the time a fifth less at most.
_PAGE_COST = 5e-10


@dataclass(frozen=True, slots=True)
class Situation:
    """What a thread sees that has a free lane. Memory in bytes.

    `sizes` is the memory of the first waiting derivation at each stride, `urgent` whether everything else
    waits for its key; `waiting` is how many wait, `running` how many run in all threads and `running_here`
    in this one, of `threads` that fill `lanes` each; `room` is what all arenas may take, `free` how much of
    it no running derivation takes. `least` is the index of the smallest stride that is worth new memory (see
    `least_stride`), `kept` the largest arena that is there and idle: to use that costs nothing. `avoiding`:
    it is not to run beside what is urgent in another thread, so a balance between the threads does not count.
    """

    sizes: Sequence[int]
    waiting: int
    running: int
    running_here: int
    threads: int
    lanes: int
    room: int
    free: int
    least: int = 0
    kept: int = 0
    urgent: bool = False
    avoiding: bool = False


def choose_stride(situation: Situation) -> int | None:
    """The index of the stride with which to begin the first waiting derivation now; None: do not yet."""
    total = min(situation.running + situation.waiting, situation.threads * situation.lanes)
    if not situation.avoiding and situation.running_here >= -(-total // situation.threads):
        return None  # another thread has more room; two cores with one each beat one core with two
    share = situation.room // total
    if situation.urgent:
        # As soon as can be; but the rest is for those that come right behind it, even if none is there yet.
        share = situation.free // 2
    elif share * (_SLOW - 1) < situation.sizes[0]:
        # What others took sparingly is for those that are still to begin.
        share = max(share, situation.free // max(1, total - situation.running))
    index = _index(situation, share)
    return index if situation.sizes[index] <= situation.free else None


def lanes_to_fill(engine: KdfEngine, threads: int, jobs: int, sizes: Sequence[int], room: int) -> int:
    """How many lanes each of `threads` threads is to fill, when `jobs` derivations run or wait.

    Their arenas may take `room` bytes, of which one takes `sizes[i]` at the stride with the index i. More
    lanes take their steps together; but each has less memory, and needs more steps. What counts is when the
    last derivation ends. Where that is about the same, fewer lanes bring the first key sooner.
    """
    each = -(-jobs // threads)

    def seconds(lanes: int) -> float:
        """Until a thread is through, in units of its own, if it fills so many lanes again and again."""
        rounds, rest = divmod(each, lanes)
        of_the_rest = _round_time(engine, sizes, room // (threads * rest), rest) if rest else 0.0
        return rounds * _round_time(engine, sizes, room // (threads * lanes), lanes) + of_the_rest

    times = {lanes: seconds(lanes) for lanes in range(1, max(1, min(each, engine.lanes)) + 1)}
    best = min(times.values())
    return next(lanes for lanes, time in times.items() if time <= best * _ABOUT_THE_SAME)


def _round_time(engine: KdfEngine, sizes: Sequence[int], share: int, lanes: int) -> float:
    """How long derivations in `lanes` lanes take, if each may take `share` bytes; endless if that is too
    little."""
    if share < sizes[-1]:
        return math.inf
    step = min(time for count, time in engine.step_times.items() if count >= lanes)
    return step * (max(1.0, sizes[0] / share) + 3)


def least_stride(strides: Sequence[int], uses: float) -> int:
    """The index of the smallest of the rising `strides` that is worth the new memory that it needs, if `uses`
    derivations run in it one after the other.

    With the stride s instead of s + 1, a derivation of N blocks mixes N/2 blocks less (romix.h) and stores
    N/(s(s + 1)) more: every byte saves s(s + 1)/2 bytes of mixing.
    """
    worth = (i for i, s in enumerate(strides) if s * (s + 1) / 2 * _MIX_COST * uses >= _PAGE_COST)
    return next(worth, len(strides) - 1)


def _index(situation: Situation, share: int) -> int:
    """The best stride for which `share` suffices, and that is worth it; the last if there is none."""
    for index, size in enumerate(situation.sizes):
        if size <= share and (index >= situation.least or size <= situation.kept):
            return index
    return len(situation.sizes) - 1
