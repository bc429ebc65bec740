"""Scrypt derivations side by side in vector registers.

Strategy: scrypt is PBKDF2, scryptROMix, PBKDF2 (RFC 7914 section 6). PBKDF2 costs nothing and is
OpenSSL's; scryptROMix is the C extension's, which runs up to `lanes` derivations at once on one core for
little more than the time of one. Each thread that derives has lanes of its own; the arenas are common to
all, so what one thread gives back the next one takes.

A derivation runs in less memory when it stores only every second, third, … up to sixteenth block (the
`stride`) and computes the others again. It is worth a lane: four at stride 4 fit where one does at stride
1, and together need about half the time that one after the other would.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import pbkdf2_hmac
from types import TracebackType
from typing import Self

from qubes_restore_svc.errors import BudgetTooSmall
from qubes_restore_svc.kdf import _romix
from qubes_restore_svc.kdf.arenas import ArenaPool
from qubes_restore_svc.kdf.engine import KdfParameters, KdfRequest, check_possible, out_of_memory

#: Bytes of a derived key.
KEY_SIZE = 64

#: The strides that there are, and the steps that a derivation takes with each, relative to the first.
#: The time grows a little less: what is computed again is not waited for.
STRIDE_WORK = {stride: (stride + 3) / 4 for stride in range(1, 17)}

#: Instruction set: lanes that one of its registers holds (`blockmix_*.c`); one in the others.
_LANES_IN_REGISTER = {"AVX-512": 4, "AVX2": 2}

#: Instruction set: by how many lanes are filled, how long a step of all takes, in steps of one lane (see
#: docs/performance.md). The strides 2 to 8 have about the same.
_STEP_TIMES = {
    "AVX-512": {1: 1.0, 2: 1.1, 4: 1.65, 8: 2.35},
    "AVX2": {1: 1.0, 2: 1.1, 4: 1.45},
    "SSE2": {1: 1.0, 2: 1.3},
}

#: Instruction set: lanes to begin with; in the others, all of them.
_LANES_FOR_FEW = {"AVX-512": 4}

#: What arenas are multiples of, bytes; less than that is not counted.
_UNIT = 2 << 20

#: Steps of every lane between two looks at the world, some 100 ms with the usual r: an interrupt is answered
#: that soon, and a request that comes later joins that soon. Less would cost: the interpreter lock may take
#: 5 ms to get.
STEPS_AT_ONCE = 1 << 17


class NativeEngine:
    """A `KdfEngine` on the C extension; see there. For any number of threads.

    `instruction_set` is "AVX-512", "AVX2", "SSE2" or "portable"; None takes the fastest that this
    machine runs. ValueError if it cannot run the one given.
    """

    def __init__(self, instruction_set: str | None = None) -> None:
        lanes = _romix.Lanes(instruction_set)
        self._instruction_set = lanes.instruction_set
        self._arenas = ArenaPool()
        self._name = f"native ({lanes.instruction_set})"
        self._lanes = lanes.count

    @property
    def name(self) -> str:
        """What carries the derivations out."""
        return self._name

    @property
    def lanes(self) -> int:
        """How many a thread runs side by side."""
        return self._lanes

    @property
    def lanes_for_one(self) -> int:
        """How many take hardly longer than one does: as many as lie in one register."""
        return _LANES_IN_REGISTER.get(self._instruction_set, 1)

    @property
    def step_times(self) -> Mapping[int, float]:
        """How long a step takes with so many lanes, in steps of one lane."""
        return _STEP_TIMES.get(self._instruction_set, {1: 1.0})

    @property
    def lanes_for_few(self) -> int:
        """How many a thread fills while nobody knows yet how many derivations come."""
        return _LANES_FOR_FEW.get(self._instruction_set, self._lanes)

    @property
    def strides(self) -> Sequence[int]:
        """The strides that there are."""
        return tuple(STRIDE_WORK)

    def derive(self, requests: Sequence[KdfRequest], stride: int = 1) -> list[bytes]:
        """The key of each request, 64 bytes, in their order; any number of them, `lanes` at a time.

        Blocks, without the interpreter lock. Runs fewer at a time where there is no memory for more;
        BudgetTooSmall if there is not even for one. ValueError for parameters that scrypt does not have.
        """
        for request in requests:
            check_possible(request.parameters)
            self.memory(request.parameters, stride)
        keys: dict[int, bytes] = {}
        index_of: dict[int, int] = {}
        waiting = deque(enumerate(requests))
        with self.open_lanes() as lanes:
            while waiting or lanes.running:
                while waiting and lanes.free:
                    index, request = waiting[0]
                    try:
                        ticket = lanes.begin(request, stride)
                    except BudgetTooSmall:
                        if not lanes.running:
                            raise
                        break
                    assert ticket is not None  # there was no limit
                    index_of[ticket] = index
                    waiting.popleft()
                for ticket, key in lanes.advance():
                    keys[index_of.pop(ticket)] = key
        return [keys[index] for index in range(len(requests))]

    def open_lanes(self) -> "NativeLanes":
        """Lanes for one thread, to be used as a context manager: requests may join while others run."""
        return NativeLanes(self._instruction_set, self._arenas)

    def memory(self, parameters: KdfParameters, stride: int = 1) -> int:
        """Bytes that one derivation takes while it runs; ValueError if scrypt has no such parameters."""
        return _memory(parameters, stride)

    def advances(self, parameters: KdfParameters, stride: int) -> float:
        """How often lanes have to `advance` for one derivation; more often where others end meanwhile."""
        # A step with a larger r takes longer, and the lanes take fewer at once.
        steps = 2 * (1 << parameters.log_n) * parameters.p * STRIDE_WORK[stride] * max(1, parameters.r / 8)
        return steps / STEPS_AT_ONCE

    @property
    def memory_held(self) -> int:
        """Bytes of all arenas: of running derivations, and kept for the next ones."""
        return self._arenas.held

    @property
    def memory_idle(self) -> int:
        """Bytes of `memory_held` that no derivation uses, and that `trim` can give back."""
        return self._arenas.idle

    @property
    def largest_idle(self) -> int:
        """Bytes of the largest arena that no derivation uses."""
        return self._arenas.largest_idle

    def trim(self, keep: int = 0) -> int:
        """Wipe and give back idle memory until at most `keep` bytes are held; the bytes given back."""
        return self._arenas.trim(keep)

    def close(self) -> None:
        """Give back all memory; nothing may be running. The engine can still be used."""
        self.trim()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


@dataclass(slots=True)
class _Running:
    """A derivation: `blocks` is scrypt's B, which the lane works on, empty until it has one."""

    ticket: int
    request: KdfRequest
    stride: int
    arena: _romix.Arena
    blocks: bytearray


class NativeLanes:
    """Derivations of one thread that run side by side; the others are given up when it is closed."""

    def __init__(self, instruction_set: str, arenas: ArenaPool) -> None:
        self._lanes = _romix.Lanes(instruction_set)
        self._arenas = arenas
        self._begun: deque[_Running] = deque()  #: not in a lane yet
        self._running: dict[int, _Running] = {}
        self._tickets = 0

    @property
    def running(self) -> int:
        """How many derivations have a lane."""
        return len(self._running) + len(self._begun)

    @property
    def free(self) -> int:
        """How many more could be."""
        return self._lanes.count - self.running

    def begin(self, request: KdfRequest, stride: int = 1, limit: int | None = None) -> int | None:
        """Occupy a free lane; returns the ticket that `advance` will name.

        None if its memory does not fit into the `limit`, in bytes, of all arenas together. RuntimeError if no
        lane is free; BudgetTooSmall, ExcessiveCost and ValueError as `NativeEngine.derive`.
        """
        if not self.free:
            raise RuntimeError("no lane is free")
        check_possible(request.parameters)
        size = _memory(request.parameters, stride)
        try:
            arena = self._arenas.take(size, limit)
        except MemoryError:
            raise out_of_memory(size) from None
        if arena is None:
            return None
        self._tickets += 1
        self._begun.append(_Running(self._tickets, request, stride, arena, bytearray()))
        return self._tickets

    def take_over(self, other: Self, ticket: int) -> int:
        """Go on with a derivation that others have begun, in a free lane of these; its ticket here.

        Nobody may be advancing either of them. RuntimeError if no lane is free, KeyError for a ticket that
        the others have not.
        """
        if not self.free:
            raise RuntimeError("no lane is free")
        for begun in other._begun:
            if begun.ticket == ticket:
                other._begun.remove(begun)
                self._begun.append(begun)
                break
        else:
            lane = next((lane for lane, one in other._running.items() if one.ticket == ticket), None)
            if lane is None:
                raise KeyError(ticket)
            begun = other._running.pop(lane)
            self._running[self._lanes.take_over(other._lanes, lane)] = begun
        self._tickets += 1
        begun.ticket = self._tickets
        return begun.ticket

    def advance(self, steps: int = STEPS_AT_ONCE) -> list[tuple[int, bytes]]:
        """Compute for a while: ticket and key of what is finished, maybe nothing; their lanes are free."""
        while self._begun:
            self._enter_lane(self._begun[0])
            self._begun.popleft()
        return [self._finish(self._running.pop(lane)) for lane in self._lanes.advance(steps)]

    def close(self) -> None:
        """Give up what is running."""
        self._lanes.abandon()
        given_up = [*self._begun, *self._running.values()]
        self._begun.clear()
        self._running.clear()
        for derivation in given_up:
            self._discard(derivation)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _enter_lane(self, begun: _Running) -> None:
        # Not in `begin`, which is to be quick: with a large p this takes its time.
        request, cost = begun.request, begun.request.parameters
        begun.blocks = bytearray(
            pbkdf2_hmac("sha256", request.passphrase, request.salt, 1, 128 * cost.r * cost.p)
        )
        lane = self._lanes.begin(begun.blocks, cost.log_n, cost.r, begun.stride, begun.arena)
        self._running[lane] = begun

    def _finish(self, done: _Running) -> tuple[int, bytes]:
        try:
            key = pbkdf2_hmac("sha256", done.request.passphrase, done.blocks, 1, KEY_SIZE)
        finally:
            self._discard(done)
        return done.ticket, key

    def _discard(self, done: _Running) -> None:
        done.blocks[:] = bytes(len(done.blocks))
        self._arenas.put_back(done.arena)


def _memory(parameters: KdfParameters, stride: int) -> int:
    if stride not in STRIDE_WORK:
        raise ValueError(f"the stride is one of {', '.join(map(str, STRIDE_WORK))}")
    if parameters.p < 1 or parameters.r < 1 or parameters.r * parameters.p >= 1 << 30:
        raise ValueError("scrypt parameters out of bounds")
    arena = _romix.memory(parameters.log_n, parameters.r, stride)
    # Scrypt's B stands beside the arena, twice for a moment, and a large p makes it larger than the table.
    # So the arena is made larger by as much and that part of it is never touched: all count arenas only.
    beside = 2 * 128 * parameters.r * parameters.p
    return arena + beside // _UNIT * _UNIT
