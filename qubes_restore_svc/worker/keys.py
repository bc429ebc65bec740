"""Key derivations: several at once, out of order, in the memory that the budget leaves.

Strategy: requests queue in archive order. Each thread has lanes of its own in the engine; whenever one is
free it looks at the first request that waits, and `memory.choose_stride` says whether to begin it and how
much memory it gets. A result is a future; nobody waits for the others. What goes wrong with a request fails
it; what goes wrong in the lanes fails what runs in them, and the thread goes on with new ones.

What everything else waits for (the keys of the header and of qubes.xml) is quicker with few beside it; so
while there is other work, it has a thread of its own. A few derivations in one thread take hardly longer
than one of them. So when the last ones are left, and a processor is wanted for the unpacking, the thread with
the fewest offers them to the others, and rests.

Processors and memory are not always right. So a key that does not fit is derived once more before the backup
is blamed (`derive_again`), by an engine that shares no code with the first one, where its memory is there.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import NamedTuple

from qubes_restore_svc.errors import BudgetTooSmall, Cancelled
from qubes_restore_svc.kdf.engine import CostLimit, KdfEngine, KdfLanes, KdfRequest, OpensslEngine
from qubes_restore_svc.worker.memory import Budget, Situation, choose_stride, lanes_to_fill, least_stride

#: The thread that only urgent requests use.
_URGENT_THREAD = 0

#: How much the derivations give way to the unpacking of the current volume (setpriority(2)).
_NICENESS = 5


class Key(Future[bytes]):
    """A key of 64 bytes that will be there some time."""

    turns = 0.0  #: how often its lanes are advanced for it, about; 0: it has not begun
    taken = 0  #: how often they have been

    @property
    def part(self) -> float:
        """How much of it is there, 0 to 1. From any thread."""
        if self.done():
            return 1.0
        return min(1.0, self.taken / self.turns) if self.turns else 0.0


@dataclass(frozen=True, slots=True)
class _Job:
    request: KdfRequest
    urgent: bool
    check: Callable[[], None]
    result: Key


class _Load(NamedTuple):
    """What a thread has in its lanes: how many derivations, and whether one of them is urgent."""

    derivations: int
    urgent: bool


@dataclass(eq=False, slots=True)
class _Offer:
    """What one thread's lanes hold, for any other thread to take over; `jobs` by their tickets there."""

    lanes: KdfLanes
    jobs: dict[int, _Job]


class KeyScheduler:
    """`threads` threads around one `engine`, under the `budget` to which the chunks were admitted before.

    `second` is the engine of `derive_again`; OpenSSL's, unless told otherwise. `costs` says what all keys may
    cost together, to those who submit.
    """

    def __init__(
        self,
        engine: KdfEngine,
        budget: Budget,
        threads: int,
        second: KdfEngine | None = None,
        *,
        costs: CostLimit | None = None,
    ) -> None:
        self.costs = CostLimit() if costs is None else costs
        self._engine = engine
        self._second = OpensslEngine() if second is None else second
        self._budget = budget
        self._threads = threads
        self._waiting: deque[_Job] = deque()
        self._running = 0
        self.derivations = 0  #: keys that were derived
        self._closed = False
        self._more_to_come = False
        self._processors_wanted = False
        self._loads: dict[int, _Load] = {}
        self._offers: list[_Offer] = []
        for number in range(threads):
            threading.Thread(target=self._work, args=(number,), name=f"kdf-{number}", daemon=True).start()

    def expect_more(self, more_to_come: bool) -> None:
        """Say whether there will be requests for all lanes: then each gets its share of memory at once."""
        with self._budget.changed:
            self._more_to_come = more_to_come
            self._budget.changed.notify_all()

    def leave_processors(self) -> None:
        """From now on there is other work for the processors: derive in as few threads as is as quick."""
        with self._budget.changed:
            self._processors_wanted = True
            self._budget.changed.notify_all()

    def submit(
        self, request: KdfRequest, *, urgent: bool = False, check: Callable[[], None] = lambda: None
    ) -> Key:
        """The 64-byte key of `request`, some time. `cancel` on the future takes it back while it waits.

        `urgent`: nothing can be done before it is there, so it gets the memory that makes it quick. `check`
        is called when its turn comes; if it raises, the key is not derived, and that is the result.
        """
        job = _Job(request, urgent, check, Key())
        self._queue(job, self._waiting.append)
        return job.result

    def derive_again(self, request: KdfRequest) -> tuple[bytes, str]:
        """The key of `request` once more, as soon as can be, and the name of what derived it; blocks.

        By the second engine, which needs the full memory; where that is not there, by the first one, in
        whatever lane and with whatever stride. Raises what engines raise, and Cancelled.
        """
        with self._budget.set_aside(self._second.memory(request.parameters)) as fits:
            if fits:
                with contextlib.suppress(BudgetTooSmall):  # the first one may do with less
                    return self._second.derive([request])[0], self._second.name
        job = _Job(request, True, lambda: None, Key())
        self._queue(job, self._waiting.appendleft)
        return job.result.result(), f"{self._engine.name}, once more"

    @property
    def engine_name(self) -> str:
        """What derives the keys, for reports."""
        return self._engine.name

    def _queue(self, job: _Job, put: Callable[[_Job], None]) -> None:
        with self._budget.changed:
            if not self._closed:
                put(job)
                self._budget.changed.notify_all()
                return
        _drop(job)

    @property
    def busy(self) -> bool:
        """Is a key being derived at this moment? From any thread."""
        return self._running > 0

    def close(self) -> None:
        """Give up what runs, within a tenth of a second, and drop what waits."""
        with self._budget.changed:
            self._closed = True
            dropped, self._waiting = self._waiting, deque()
            self._budget.changed.notify_all()
        for job in dropped:
            _drop(job)

    def _work(self, thread: int) -> None:
        with contextlib.suppress(OSError):  # it is only a wish
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while self._wait_for_work():
            jobs: dict[int, _Job] = {}
            try:
                with self._engine.open_lanes() as lanes:
                    while self._fill(thread, lanes, jobs):
                        self._advance(lanes, jobs)
            except BaseException as error:  # noqa: BLE001 - somebody waits for these futures, whatever happened
                self._give_up(thread, jobs, error)
            else:
                self._give_up(thread, jobs, Cancelled("the restore was cancelled"))
        self._engine.trim()

    def _wait_for_work(self) -> bool:
        """False: the scheduler is closed."""
        with self._budget.changed:
            self._budget.changed.wait_for(lambda: self._closed or self._waiting)
            return not self._closed

    def _fill(self, thread: int, lanes: KdfLanes, jobs: dict[int, _Job]) -> bool:
        """Begin the derivations that may begin; waits until there is something to do. False: the scheduler is
        closed."""
        with self._budget.changed:
            while not self._closed:
                while lanes.free and self._begin_next(thread, lanes, jobs):
                    pass
                self._take_over(lanes, jobs)
                load = _Load(len(jobs), any(job.urgent for job in jobs.values()))
                if self._loads.get(thread) != load:
                    self._loads[thread] = load
                    self._budget.changed.notify_all()
                if jobs and not self._others_can_take(thread):
                    return True
                offer = _Offer(lanes, jobs)
                self._offers.append(offer)  # the others look after each of their turns
                self._budget.changed.wait()
                self._offers.remove(offer)
        return False

    def _others_can_take(self, thread: int) -> bool:
        """Do the others have free lanes for everything in this thread, at next to no cost, and at least as
        much to do?"""
        loads = {other: load.derivations for other, load in self._loads.items() if load.derivations}
        mine = loads.pop(thread, 0)
        room = sum(max(0, self._engine.lanes_for_one - load) for load in loads.values())
        least = all((load, other) > (mine, thread) for other, load in loads.items())
        # What waits only waits for memory; until it has some, nothing can be unpacked that needs a processor.
        return self._processors_wanted and not self._waiting and least and 0 < mine <= room

    def _take_over(self, lanes: KdfLanes, jobs: dict[int, _Job]) -> None:
        if not jobs:
            return  # nothing is gained
        for offer in self._offers:
            while offer.jobs and len(jobs) < self._engine.lanes_for_one and lanes.free:
                ticket, job = next(iter(offer.jobs.items()))
                jobs[lanes.take_over(offer.lanes, ticket)] = job
                del offer.jobs[ticket]

    def _begin_next(self, thread: int, lanes: KdfLanes, jobs: dict[int, _Job]) -> bool:
        self._drop_refused()
        if not self._waiting:
            return False
        job = self._waiting[0]
        if self._is_for_others(thread, job, jobs):
            return False
        try:
            ticket = self._begin(thread, lanes, job, len(jobs))
        except BaseException as error:  # noqa: BLE001 - it is about this request, whose future is waited for
            if isinstance(error, BudgetTooSmall) and self._running:
                return False  # the system has no memory now; when one of those that run ends, it may have
            self._waiting.popleft()
            if job.result.set_running_or_notify_cancel():
                job.result.set_exception(error)
            return True
        if ticket is None:
            return False
        self._waiting.popleft()
        if not job.result.set_running_or_notify_cancel():
            # Taken back in this moment: it is derived for nobody.
            job = replace(job, result=Key())
        jobs[ticket] = job
        self._running += 1
        return True

    def _drop_refused(self) -> None:
        """Look whether the first one that waits is still to be derived."""
        while self._waiting:
            job = self._waiting[0]
            try:
                job.check()
            except Exception as error:  # noqa: BLE001 - somebody waits for this future, whatever happened
                if job.result.set_running_or_notify_cancel():
                    job.result.set_exception(error)
            if not job.result.done():
                return
            self._waiting.popleft()

    def _is_for_others(self, thread: int, job: _Job, jobs: dict[int, _Job]) -> bool:
        if self._threads == 1 or self._engine.lanes == 1:
            return False
        if job.urgent:
            others_come = self._more_to_come or not all(waiting.urgent for waiting in self._waiting)
            return others_come and thread != _URGENT_THREAD
        return (
            any(mine.urgent for mine in jobs.values())
            and self._threads_with_urgent(thread) + 1 < self._threads
        )

    def _threads_with_urgent(self, without: int) -> int:
        return sum(load.urgent for thread, load in self._loads.items() if thread != without)

    def _begin(self, thread: int, lanes: KdfLanes, job: _Job, running_here: int) -> int | None:
        """The ticket, or None: not yet. Raises what the engine raises."""
        strides = self._engine.strides
        sizes = [self._engine.memory(job.request.parameters, stride) for stride in strides]
        room = self._budget.arena_room
        waiting = len(self._waiting)
        if self._more_to_come:
            waiting = max(waiting, self._threads * self._engine.lanes_for_few - self._running)
        each = lanes_to_fill(self._engine, self._threads, waiting + self._running, sizes, room)
        uses = max(1.0, (waiting + self._running) / (self._threads * each))
        index = choose_stride(
            Situation(
                sizes=sizes,
                waiting=waiting,
                running=self._running,
                running_here=running_here,
                threads=self._threads,
                lanes=each,
                room=room,
                free=room - (self._engine.memory_held - self._engine.memory_idle),
                least=least_stride(strides, uses),
                kept=self._engine.largest_idle,
                urgent=job.urgent,
                avoiding=not job.urgent and self._threads_with_urgent(thread) > 0,
            )
        )
        if index is None:
            return None
        job.result.turns = self._engine.advances(job.request.parameters, strides[index])
        return lanes.begin(job.request, strides[index], room)

    def _advance(self, lanes: KdfLanes, jobs: dict[int, _Job]) -> None:
        finished = lanes.advance()
        for job in jobs.values():
            job.result.taken += 1
        if not finished:
            return
        with self._budget.changed:
            self._running -= len(finished)
            self.derivations += len(finished)
            self._budget.changed.notify_all()
        for ticket, key in finished:
            jobs.pop(ticket).result.set_result(key)

    def _give_up(self, thread: int, jobs: dict[int, _Job], error: BaseException) -> None:
        """Fail what runs in this thread's lanes, which are closed."""
        failed = list(jobs.values())
        with self._budget.changed:
            self._running -= len(jobs)
            self._loads[thread] = _Load(0, urgent=False)
            if not failed and self._waiting:
                # There are not even lanes; to try again and again for the same request would never end.
                failed.append(self._waiting.popleft())
            self._budget.changed.notify_all()
        for job in failed:
            if job.result.running() or job.result.set_running_or_notify_cancel():
                job.result.set_exception(error)


def _drop(job: _Job) -> None:
    if job.result.set_running_or_notify_cancel():
        job.result.set_exception(Cancelled("the restore was cancelled"))
