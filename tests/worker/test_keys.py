"""The scheduler of key derivations: started in order, ended in any order, every future answered."""

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future

import pytest

from qubes_restore_svc.archive.kdf import KdfParameters, KdfRequest
from qubes_restore_svc.errors import BudgetTooSmall, Cancelled
from qubes_restore_svc.worker.budget import Budget
from qubes_restore_svc.worker.keys import KeyScheduler

from .support import MIB, PATIENCE_S, wait_until

SMALL = KdfParameters(10, 8, 1)  # a mebibyte
LARGE = KdfParameters(13, 8, 1)  # eight


class ManualEngine:
    """Derivations that wait for the test, and give the number of their request 64 times."""

    name = "manual"
    lanes = 1

    def __init__(self) -> None:
        self.started: list[int] = []
        self.gates: dict[int, threading.Event] = {}
        self.error: BaseException | None = None

    def derive(self, requests: Sequence[KdfRequest]) -> list[bytes]:
        (request,) = requests
        number = int(request.passphrase)
        gate = self.gates.setdefault(number, threading.Event())
        self.started.append(number)
        gate.wait(3 * PATIENCE_S)
        if self.error is not None:
            raise self.error
        return [bytes([number]) * 64]

    def finish(self, number: int) -> None:
        self.gates.setdefault(number, threading.Event()).set()


class Bench:
    def __init__(self, jobs: int, limit: int = 100 * MIB) -> None:
        self.engine = ManualEngine()
        self.budget = Budget(limit, max_chunks=50)
        self.scheduler = KeyScheduler(self.engine, self.budget, jobs)
        self._count = 0

    def submit(self, cost: KdfParameters = SMALL) -> "Future[bytes]":
        self.budget.admit(1, cost.memory)
        self._count += 1
        return self.scheduler.submit(KdfRequest(cost, bytes(32), b"%d" % (self._count - 1)))

    def started(self, *numbers: int) -> None:
        wait_until(lambda: sorted(self.engine.started) == list(numbers), f"the start of {numbers}")


def test_as_many_run_side_by_side_as_there_are_jobs_and_each_ends_for_itself() -> None:
    bench = Bench(jobs=2)
    first, second, third = (bench.submit() for _ in range(3))
    bench.started(0, 1)
    bench.engine.finish(1)
    assert second.result(PATIENCE_S) == bytes([1]) * 64
    bench.started(0, 1, 2)
    bench.engine.finish(2)
    assert third.result(PATIENCE_S) == bytes([2]) * 64
    assert not first.done()
    bench.engine.finish(0)
    assert first.result(PATIENCE_S) == bytes(64)
    wait_until(lambda: bench.budget.used == 3)


def test_a_large_derivation_is_not_overtaken_by_small_ones_behind_it() -> None:
    bench = Bench(jobs=3, limit=9 * MIB)
    bench.submit(SMALL)
    bench.started(0)
    large, small = (
        bench.submit(LARGE),
        bench.submit(SMALL),
    )  # the large one has to wait, the small one could start
    with pytest.raises(TimeoutError):
        small.result(0.1)
    assert bench.engine.started == [0]
    bench.engine.finish(0)
    wait_until(lambda: bench.engine.started[:2] == [0, 1])
    bench.engine.finish(1)
    bench.engine.finish(2)
    assert large.result(PATIENCE_S) and small.result(PATIENCE_S)
    assert bench.engine.started == [0, 1, 2]


def test_what_is_taken_back_while_it_queues_is_never_derived() -> None:
    bench = Bench(jobs=1)
    bench.submit()
    bench.started(0)
    unwanted, wanted = bench.submit(), bench.submit()
    assert unwanted.cancel()
    bench.engine.finish(0)
    bench.engine.finish(2)
    assert wanted.result(PATIENCE_S)
    assert bench.engine.started == [0, 2]
    assert bench.budget._waiting == []


def test_nobody_waits_for_the_memory_of_what_was_taken_back() -> None:
    bench = Bench(jobs=2, limit=9 * MIB)
    bench.submit(SMALL)
    bench.submit(SMALL)
    bench.started(0, 1)
    unwanted, _ = bench.submit(LARGE), bench.submit(SMALL)
    assert unwanted.cancel()
    bench.engine.finish(0)
    bench.started(0, 1, 3)
    bench.engine.finish(1)
    bench.engine.finish(3)


def test_what_is_taken_back_while_it_waits_for_its_memory_is_never_derived() -> None:
    bench = Bench(jobs=2, limit=9 * MIB)
    bench.submit(SMALL)
    bench.started(0)
    unwanted, wanted = bench.submit(LARGE), bench.submit(SMALL)
    wait_until(lambda: len(bench.scheduler._jobs) == 1, "the large one coming to the front")
    assert unwanted.cancel()
    bench.engine.finish(0)
    bench.engine.finish(2)
    assert wanted.result(PATIENCE_S)
    assert bench.engine.started == [0, 2]
    wait_until(lambda: (bench.budget.used, bench.budget._waiting) == (3, []))


@pytest.mark.parametrize(
    "error", [BudgetTooSmall("no memory"), MemoryError(), ValueError("a bug"), SystemExit()]
)
def test_whatever_the_engine_raises_reaches_the_one_who_waits_and_the_thread_goes_on(
    error: BaseException,
) -> None:
    bench = Bench(jobs=1)
    bench.engine.error = error
    failing = bench.submit()
    bench.engine.finish(0)
    assert failing.exception(PATIENCE_S) is error
    assert bench.budget.used == 1
    bench.engine.error = None
    following = bench.submit()
    bench.engine.finish(1)
    assert following.result(PATIENCE_S)


def test_closing_drops_what_waits_and_lets_the_threads_end() -> None:
    before = threading.active_count()
    bench = Bench(jobs=2, limit=9 * MIB)
    running = bench.submit(SMALL)
    bench.started(0)
    first_waits, queued, taken_back = bench.submit(LARGE), bench.submit(SMALL), bench.submit(SMALL)
    wait_until(lambda: len(bench.scheduler._jobs) == 2)
    taken_back.cancel()
    bench.budget.cancel()
    bench.scheduler.close()
    assert isinstance(first_waits.exception(PATIENCE_S), Cancelled)
    assert isinstance(queued.exception(PATIENCE_S), Cancelled)
    with pytest.raises(CancelledError):
        taken_back.result(0)
    bench.engine.finish(0)
    assert running.result(PATIENCE_S)
    wait_until(lambda: threading.active_count() == before, "the end of the threads")
    assert (bench.budget.used, bench.budget._waiting) == (4, [])
    assert bench.engine.started == [0]


def test_what_comes_after_closing_is_answered_as_well() -> None:
    bench = Bench(jobs=1)
    bench.scheduler.close()
    assert isinstance(bench.submit().exception(PATIENCE_S), Cancelled)
    assert bench.budget._waiting == []
