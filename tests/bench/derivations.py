"""What a key derivation costs: several side by side on one core, at a stride, in arenas that are warm.

Strategy: an engine is driven through its lanes as the worker drives it, in this thread, whose CPU time is
the cost. `DerivationCosts` measures what it is asked for and remembers it; what does not fit into memory
is reckoned from half of its size, and marked. `share_out` says what the worker's budget makes of a
memory limit: the same rule as in `worker/memory.py`, for a restore under way.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from qubes_restore_svc.kdf.engine import KdfEngine, KdfParameters, KdfRequest
from qubes_restore_svc.system_memory import memory_room
from qubes_restore_svc.worker.memory import lanes_to_fill

#: Share of the free memory that is used for measuring.
_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Job:
    """One derivation, and every how many blocks it stores."""

    request: KdfRequest
    stride: int = 1


@dataclass(frozen=True, slots=True)
class Derived:
    """The keys, in the order of the jobs, and the seconds of this thread's CPU, and of the clock."""

    keys: Sequence[bytes]
    cpu_s: float
    wall_s: float


def derive_side_by_side(engine: KdfEngine, jobs: Sequence[Job], limit: int | None = None) -> Derived:
    """Derive all keys in this thread, as many at a time as there are lanes.

    The engine takes at most `limit` bytes, in all threads together, or as many as the largest job needs.
    None: what the jobs of all lanes need, and what it holds already.
    """
    sizes = sorted(engine.memory(job.request.parameters, job.stride) for job in jobs)
    if limit is None:
        limit = max(engine.memory_held, sum(sizes[-engine.lanes :]))
    limit = max(limit, sizes[-1])
    keys: dict[int, bytes] = {}
    begun: dict[int, int] = {}
    waiting = list(enumerate(jobs))
    start, cpu_start = time.monotonic(), time.thread_time()
    with engine.open_lanes() as lanes:
        while len(keys) < len(jobs):
            while waiting and lanes.free:
                number, job = waiting[0]
                ticket = lanes.begin(job.request, job.stride, limit)
                if ticket is None:
                    break  # another thread has the memory, or what runs here
                begun[ticket] = number
                waiting.pop(0)
            if len(begun) == len(keys):
                time.sleep(0.01)
                continue
            for ticket, key in lanes.advance():
                keys[begun[ticket]] = key
    wall_s, cpu_s = time.monotonic() - start, time.thread_time() - cpu_start
    return Derived([keys[number] for number in range(len(jobs))], cpu_s, wall_s)


def sample_requests(parameters: KdfParameters, count: int) -> list[KdfRequest]:
    """Derivations that differ in their salts, as those of a backup do."""
    return [KdfRequest(parameters, bytes([number]) * 32, b"passphrase") for number in range(count)]


def stride_within(engine: KdfEngine, parameters: KdfParameters, memory: int) -> int:
    """The smallest stride with which a derivation takes at most `memory` bytes; the largest if none does."""
    fitting = (stride for stride in engine.strides if engine.memory(parameters, stride) <= memory)
    return next(fitting, engine.strides[-1])


@dataclass(frozen=True, slots=True, order=True)
class Load:
    """How derivations run: at a stride, `beside` each other on each core."""

    stride: int
    beside: int


def share_out(engine: KdfEngine, parameters: KdfParameters, *, count: int, room: int, cores: int) -> Load:
    """How the worker runs one of `count` derivations that wait, when arenas may take `room` bytes."""
    sizes = [engine.memory(parameters, stride) for stride in engine.strides]
    each = lanes_to_fill(engine, cores, count, sizes, room)
    lanes = min(count, cores * each)
    stride = stride_within(engine, parameters, room // lanes)
    fitting = min(lanes, max(1, room // engine.memory(parameters, stride)))
    return Load(stride, max(1, min(each, fitting // cores)))


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds of one derivation; `reckoned` if they come from a smaller one."""

    cpu_s: float
    reckoned: bool = False


@dataclass(slots=True)
class DerivationCosts:
    """Measures once, and remembers, what a derivation costs with `engine`."""

    engine: KdfEngine
    known: dict[tuple[KdfParameters, Load], Cost] = field(default_factory=dict)

    def cost(self, parameters: KdfParameters, load: Load) -> Cost:
        """The cost of one of `load.beside` derivations, on one core that does nothing else."""
        key = (parameters, load)
        if key not in self.known:
            self.known[key] = self._measured(parameters, load)
        return self.known[key]

    def _measured(self, parameters: KdfParameters, load: Load) -> Cost:
        size = self.engine.memory(parameters, load.stride) * load.beside
        if size > memory_room().available * _SHARE and parameters.log_n > 10:
            smaller = KdfParameters(parameters.log_n - 1, parameters.r, parameters.p)
            return Cost(2 * self.cost(smaller, load).cpu_s, reckoned=True)
        jobs = [Job(request, load.stride) for request in sample_requests(parameters, load.beside)]
        # Arenas of the same size are made, and touched, by as many derivations that do not recompute.
        smaller = KdfParameters(parameters.log_n - load.stride.bit_length() + 1, parameters.r, parameters.p)
        warming = [Job(request) for request in sample_requests(smaller, load.beside)]
        derive_side_by_side(self.engine, warming)
        derived = derive_side_by_side(self.engine, jobs)
        self.engine.trim()  # whatever is measured next is to find the memory free
        return Cost(derived.cpu_s / load.beside)
