"""The scheduler of key derivations: started in order, ended in any order, every future answered."""

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future

import pytest

from qubes_restore_svc.errors import BudgetTooSmall, Cancelled
from qubes_restore_svc.kdf.engine import KdfParameters, KdfRequest, OpensslEngine
from qubes_restore_svc.worker.keys import KeyScheduler
from qubes_restore_svc.worker.memory import Budget
from qubes_restore_svc.worker.threads import Stop

from .lanes import LanesEngine
from .support import MIB, PATIENCE_S, wait_until

SMALL = KdfParameters(10, 8, 1)  # a mebibyte
LARGE = KdfParameters(13, 8, 1)  # eight
LARGER = KdfParameters(14, 8, 1)  # sixteen


class ManualEngine(OpensslEngine):
    """Derivations that wait for the test, and give the number of their request 64 times."""

    def __init__(self) -> None:
        super().__init__()
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
        self.stop = Stop()
        self.budget = Budget(limit, self.engine, 50, self.stop, own=0)
        self.scheduler = KeyScheduler(self.engine, self.budget, jobs)
        self._count = 0

    def submit(self, cost: KdfParameters = SMALL, *, urgent: bool = False) -> "Future[bytes]":
        self.budget.admit(1, cost, buffered=True)
        self._count += 1
        request = KdfRequest(cost, bytes(32), b"%d" % (self._count - 1))
        return self.scheduler.submit(request, urgent=urgent)

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
    assert not bench.scheduler._waiting


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
    wait_until(lambda: len(bench.scheduler._waiting) == 2, "both being queued")
    assert unwanted.cancel()
    bench.engine.finish(0)
    bench.engine.finish(2)
    assert wanted.result(PATIENCE_S)
    assert bench.engine.started == [0, 2]
    wait_until(lambda: (bench.budget.used, len(bench.scheduler._waiting)) == (3, 0))


@pytest.mark.parametrize(
    "error", [BudgetTooSmall("no memory"), MemoryError(), ValueError("a bug"), SystemExit()]
)
def test_an_error_of_the_engine_reaches_the_one_who_waits_and_the_thread_goes_on(
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
    before = set(threading.enumerate())
    bench = Bench(jobs=2, limit=9 * MIB)
    running = bench.submit(SMALL)
    bench.started(0)
    first_waits, queued, taken_back = bench.submit(LARGE), bench.submit(SMALL), bench.submit(SMALL)
    wait_until(lambda: len(bench.scheduler._waiting) == 3)
    taken_back.cancel()
    bench.stop.say()
    bench.scheduler.close()
    assert isinstance(first_waits.exception(PATIENCE_S), Cancelled)
    assert isinstance(queued.exception(PATIENCE_S), Cancelled)
    with pytest.raises(CancelledError):
        taken_back.result(0)
    bench.engine.finish(0)
    assert running.result(PATIENCE_S)
    wait_until(lambda: set(threading.enumerate()) <= before, "the end of the threads")
    assert (bench.budget.used, len(bench.scheduler._waiting)) == (4, 0)
    assert bench.engine.started == [0]


def test_what_comes_after_closing_is_answered_as_well() -> None:
    bench = Bench(jobs=1)
    bench.scheduler.close()
    assert isinstance(bench.submit().exception(PATIENCE_S), Cancelled)
    assert not bench.scheduler._waiting


# --- Lanes ---------------------------------------------------------------------------------------


class LanesBench(Bench):
    """As above, over an engine with lanes."""

    def __init__(self, threads: int, limit: int = 100 * MIB, lanes: int = 4) -> None:
        self.lanes = LanesEngine(lanes)
        self.budget = Budget(limit, self.lanes, 50, Stop(), own=0)
        self.scheduler = KeyScheduler(self.lanes, self.budget, threads)
        self._count = 0

    def began(self, *numbers: int) -> None:
        wait_until(lambda: [number for number, _ in self.lanes.begun] == list(numbers), f"{numbers}")

    def ended(self, *results: "Future[bytes]") -> None:
        """All of them are answered, and no memory is in use."""
        for result in results:
            result.exception(PATIENCE_S)
        wait_until(lambda: not self.lanes.running, "the end of all derivations")
        assert self.scheduler._running == 0


def test_each_gets_its_own_key_in_whatever_order_they_end() -> None:
    for seed in range(10):
        bench = LanesBench(threads=2)
        results = [bench.submit() for _ in range(25)]
        left, order = list(range(25)), random.Random(seed)
        while left:
            running = sorted(set(bench.lanes.running) & set(left))
            assert len(running) <= 8
            if running:
                number = order.choice(running)
                bench.lanes.finish(number)
                assert results[number].result(PATIENCE_S) == bytes([number]) * 64
                left.remove(number)
        bench.began(*range(25))
        bench.ended(*results)
        bench.scheduler.close()


def test_derivations_are_spread_over_the_threads() -> None:
    bench = LanesBench(threads=2)
    for count in range(1, 9):
        bench.submit()
        bench.began(*range(count))
    names = list(bench.lanes.threads.values())
    assert sorted(names.count(name) for name in set(names)) == [4, 4]
    first_two = [bench.lanes.threads[number] for number in (0, 1)]
    assert len(set(first_two)) == 2
    bench.scheduler.close()


def test_with_little_memory_they_run_in_less_instead_of_waiting() -> None:
    bench = LanesBench(threads=1, limit=9 * MIB)
    gate = bench.submit(LARGER)  # 8 MiB of 16, alone
    bench.began(0)
    second = bench.submit(LARGE)  # there is 1 MiB left, and a quarter takes 2
    with pytest.raises(TimeoutError):
        second.result(0.05)
    third, fourth = bench.submit(LARGE), bench.submit(LARGE)
    bench.lanes.finish(0)
    assert gate.result(PATIENCE_S)
    bench.began(0, 1, 2, 3)
    assert bench.lanes.begun == [(0, 2), (1, 4), (2, 4), (3, 4)]
    bench.lanes.finish(1, 2, 3)
    bench.ended(second, third, fourth)
    assert bench.lanes.most_held <= 9 * MIB
    bench.scheduler.close()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "error", [BudgetTooSmall("no memory"), MemoryError(), ValueError("a bug"), SystemExit()]
)
def test_what_cannot_begin_fails_alone(error: BaseException, threads: int) -> None:
    bench = LanesBench(threads)
    bench.lanes.trouble_in_begin[1] = error
    results = [bench.submit() for _ in range(4)]
    if isinstance(error, BudgetTooSmall):
        bench.began(0)  # it may be had when the other one has ended
        bench.lanes.finish(0)
        assert results[0].result(PATIENCE_S)
    assert results[1].exception(PATIENCE_S) is error
    bench.lanes.finish(0, 2, 3, 4)
    assert [len(results[number].result(PATIENCE_S)) for number in (0, 2, 3)] == [64] * 3
    assert bench.submit().result(PATIENCE_S) == bytes([4]) * 64
    bench.ended()
    bench.scheduler.close()


def test_what_could_not_begin_for_want_of_memory_begins_when_there_is_some() -> None:
    bench = LanesBench(threads=2)
    first = bench.submit()
    bench.began(0)
    bench.lanes.trouble_in_begin[1] = BudgetTooSmall("not now")
    second = bench.submit()
    with pytest.raises(TimeoutError):
        second.result(0.05)
    del bench.lanes.trouble_in_begin[1]
    bench.lanes.finish(0, 1)
    assert first.result(PATIENCE_S) and second.result(PATIENCE_S) == bytes([1]) * 64
    bench.scheduler.close()


def test_lanes_that_break_fail_what_runs_in_them_and_nothing_else() -> None:
    bench = LanesBench(threads=2)
    results = [bench.submit() for _ in range(8)]
    bench.began(*range(8))
    waiting = [bench.submit() for _ in range(3)]
    error = RuntimeError("broken")
    bench.lanes.trouble_in_advance[3] = error
    thread = bench.lanes.threads[3]
    here = [number for number in range(8) if bench.lanes.threads[number] == thread]
    for number in here:
        assert results[number].exception(PATIENCE_S) is error
    bench.lanes.finish(*range(11))
    for number in set(range(8)) - set(here):
        assert results[number].result(PATIENCE_S) == bytes([number]) * 64
    assert [one.result(PATIENCE_S)[0] for one in waiting] == [8, 9, 10]
    # The thread whose lanes broke has new ones.
    later = [bench.submit() for _ in range(8)]
    wait_until(lambda: len(bench.lanes.running) == 8)
    assert thread in {bench.lanes.threads[number] for number in range(11, 19)}
    bench.lanes.finish(*range(11, 19))
    bench.ended(*later)
    bench.scheduler.close()


def test_where_no_lanes_can_be_opened_nobody_waits_for_ever() -> None:
    bench = LanesBench(threads=1)
    bench.lanes.trouble_in_open = [MemoryError("one"), MemoryError("two")]
    first, second, third = bench.submit(), bench.submit(), bench.submit()
    assert isinstance(first.exception(PATIENCE_S), MemoryError)
    assert isinstance(second.exception(PATIENCE_S), MemoryError)
    bench.lanes.finish(2)
    assert third.result(PATIENCE_S)
    bench.scheduler.close()


def test_what_is_taken_back_runs_for_nobody_and_gives_way() -> None:
    bench = LanesBench(threads=1, lanes=1)
    running, unwanted, wanted = (bench.submit() for _ in range(3))
    bench.began(0)
    assert not running.cancel() and unwanted.cancel()
    bench.lanes.finish(0, 2)
    assert wanted.result(PATIENCE_S) == bytes([2]) * 64
    bench.began(0, 2)
    bench.ended(running)
    bench.scheduler.close()


def test_closing_gives_up_what_runs_and_what_waits_and_all_memory() -> None:
    before = set(threading.enumerate())
    bench = LanesBench(threads=2, lanes=2)
    done, *results = (bench.submit() for _ in range(7))
    bench.lanes.finish(0)
    assert done.result(PATIENCE_S)
    wait_until(lambda: len(bench.lanes.running) == 4)
    bench.scheduler.close()
    for result in results:
        assert isinstance(result.exception(PATIENCE_S), Cancelled)
    wait_until(lambda: set(threading.enumerate()) <= before, "the end of the threads")
    assert bench.lanes.memory_held == 0
    assert isinstance(bench.submit().exception(PATIENCE_S), Cancelled)


# --- What everything waits for ---------------------------------------------------------------------


def test_while_more_is_to_come_what_is_urgent_has_a_thread_of_its_own() -> None:
    bench = LanesBench(threads=2)
    bench.scheduler.expect_more(True)
    results = [bench.submit(urgent=True)]
    bench.began(0)
    results.append(bench.submit(urgent=True))
    bench.began(0, 1)
    results += [bench.submit() for _ in range(6)]
    bench.began(*range(6))  # and two lanes stay empty
    bench.lanes.turns_without_change(20)
    bench.began(*range(6))
    assert [len(threads_of(bench, *some)) for some in ((0, 1), (2, 3, 4, 5), range(6))] == [1, 1, 2]
    bench.lanes.finish(1)
    results[1].result(PATIENCE_S)
    bench.lanes.turns_without_change(20)
    bench.began(*range(6))
    bench.lanes.finish(0)
    bench.began(*range(8))
    assert threads_of(bench, 0, 1) == threads_of(bench, 6, 7)
    bench.lanes.finish(*range(2, 8))
    bench.ended(*results)
    bench.scheduler.close()


@pytest.mark.parametrize(("lanes", "more"), [(4, False), (1, True)])
def test_two_urgent_keys_take_a_thread_each_if_lanes_are_single_or_no_more_come(
    lanes: int, more: bool
) -> None:
    bench = LanesBench(2, lanes=lanes)
    bench.scheduler.expect_more(more)
    results = [bench.submit(urgent=True)]
    bench.began(0)
    results.append(bench.submit(urgent=True))
    bench.began(0, 1)
    assert len(threads_of(bench, 0, 1)) == 2
    bench.lanes.finish(0, 1)
    bench.ended(*results)
    bench.scheduler.close()


def test_others_that_wait_are_enough_for_it_to_have_a_thread_of_its_own() -> None:
    bench = LanesBench(threads=2)
    bench.scheduler.expect_more(True)
    results = [bench.submit(urgent=True)]
    bench.began(0)
    results += [bench.submit() for _ in range(6)]
    bench.began(*range(5))
    bench.scheduler.expect_more(False)
    results += [bench.submit(urgent=True), bench.submit()]
    bench.lanes.finish(1, 2)  # makes room for those that wait before it
    wait_until(lambda: len(bench.lanes.begun) == 8)
    assert threads_of(bench, 7) == threads_of(bench, 0)
    bench.lanes.finish(*range(9))
    bench.ended(*results)
    bench.scheduler.close()


def test_where_each_thread_has_something_urgent_the_others_go_beside_it() -> None:
    bench = LanesBench(threads=2)
    results = [bench.submit(urgent=True)]
    bench.began(0)
    results.append(bench.submit(urgent=True))
    bench.began(0, 1)
    results += [bench.submit() for _ in range(6)]
    bench.began(*range(8))
    bench.lanes.finish(*range(8))
    bench.ended(*results)
    bench.scheduler.close()


@pytest.mark.parametrize(("threads", "lanes", "more"), [(1, 4, True), (1, 4, False), (2, 1, True)])
def test_where_that_would_leave_too_much_idle_it_has_not(threads: int, lanes: int, more: bool) -> None:
    bench = LanesBench(threads, lanes=lanes)
    bench.scheduler.expect_more(more)
    results = [bench.submit(urgent=True)]
    bench.began(0)
    results += [bench.submit() for _ in range(threads * lanes - 1)]
    bench.began(*range(threads * lanes))
    bench.lanes.finish(*range(threads * lanes))
    bench.ended(*results)
    bench.scheduler.close()


@pytest.mark.parametrize(
    ("waiting", "limit", "begun"),
    [
        (16, 64 * MIB, 8),
        (4, 64 * MIB, 4),  # no more wait
        (16, 3 * MIB, 4),  # with eight, each would have to compute what it has no memory for
    ],
)
def test_all_lanes_are_filled_only_where_much_waits_and_memory_is_there(
    waiting: int, limit: int, begun: int
) -> None:
    bench = LanesBench(threads=1, lanes=8, limit=limit)
    bench.lanes.step_times = {4: 1.0, 8: 1.5}
    with bench.budget.changed:  # they come all at once
        results = [bench.submit() for _ in range(waiting)]
    bench.began(*range(begun))
    time.sleep(0.05)
    assert len(bench.lanes.begun) == begun
    bench.lanes.finish(*range(waiting))
    bench.ended(*results)
    bench.scheduler.close()


def test_what_is_urgent_gets_half_of_the_memory_that_is_free() -> None:
    bench = LanesBench(threads=1, limit=17 * MIB)
    bench.scheduler.expect_more(True)
    results = [bench.submit(LARGER, urgent=True) for _ in range(2)]
    bench.began(0, 1)
    assert bench.lanes.begun == [(0, 2), (1, 4)]  # 8 MiB of 17, then 4 of 9
    bench.lanes.finish(0, 1)
    bench.ended(*results)
    bench.scheduler.close()


# --- Processors for others ------------------------------------------------------------------------


def threads_of(bench: LanesBench, *numbers: int) -> set[str]:
    return {bench.lanes.threads[number] for number in numbers}


def test_the_last_ones_run_in_one_thread_when_a_processor_is_wanted() -> None:
    bench = LanesBench(threads=2)
    results = [bench.submit() for _ in range(4)]
    bench.began(0, 1, 2, 3)
    assert len(threads_of(bench, 0, 1, 2, 3)) == 2
    bench.scheduler.leave_processors()
    wait_until(lambda: len(threads_of(bench, 0, 1, 2, 3)) == 1)
    bench.lanes.finish(0, 1, 2, 3)
    bench.ended(*results)
    bench.scheduler.close()


def test_they_stay_if_nobody_needs_a_processor_or_one_thread_is_too_slow_for_all() -> None:
    bench = LanesBench(threads=2)
    bench.lanes.lanes_for_one = 3
    results = [bench.submit() for _ in range(4)]
    bench.began(0, 1, 2, 3)
    bench.lanes.turns_without_change(20)
    bench.scheduler.leave_processors()
    bench.lanes.turns_without_change(20)
    assert len(threads_of(bench, 0, 1, 2, 3)) == 2
    bench.lanes.finish(0, 1, 2, 3)
    bench.ended(*results)
    bench.scheduler.close()


def test_they_stay_where_they_are_while_others_wait_for_memory() -> None:
    bench = LanesBench(threads=2, limit=5 * MIB)
    results = [bench.submit(LARGER)]
    bench.began(0)
    results.append(bench.submit(SMALL))
    bench.began(0, 1)
    results.append(bench.submit(LARGER))  # takes 4 MiB at least, as the first one does
    bench.scheduler.leave_processors()
    bench.lanes.turns_without_change(20)
    bench.began(0, 1)
    assert len(threads_of(bench, 0, 1)) == 2
    bench.lanes.finish(*range(3))
    bench.ended(*results)
    bench.scheduler.close()


def test_a_thread_that_has_handed_over_its_last_ones_begins_new_ones() -> None:
    bench = LanesBench(threads=2)
    bench.scheduler.leave_processors()
    results = [bench.submit() for _ in range(2)]
    bench.began(0, 1)
    wait_until(lambda: len(threads_of(bench, 0, 1)) == 1)
    results += [bench.submit() for _ in range(6)]
    bench.began(*range(8))
    wait_until(lambda: len(threads_of(bench, *range(8))) == 2)
    bench.lanes.finish(*range(8))
    bench.ended(*results)
    bench.scheduler.close()


def test_what_fails_in_the_thread_that_took_over_fails_there_and_the_others_go_on() -> None:
    bench = LanesBench(threads=2)
    results = [bench.submit() for _ in range(2)]
    bench.began(0, 1)
    bench.scheduler.leave_processors()
    wait_until(lambda: len(threads_of(bench, 0, 1)) == 1)
    bench.lanes.trouble_in_advance[0] = RuntimeError("lost")
    for result in results:
        with pytest.raises(RuntimeError, match="lost"):
            result.result(PATIENCE_S)
    third = bench.submit()
    bench.lanes.finish(2)
    assert third.result(PATIENCE_S)
    bench.scheduler.close()


def test_nothing_is_left_to_a_thread_that_has_failed() -> None:
    bench = LanesBench(threads=2)
    results = [bench.submit() for _ in range(4)]
    bench.began(0, 1, 2, 3)
    failed = [number for number, thread in bench.lanes.threads.items() if thread == "kdf-1"]
    bench.lanes.trouble_in_advance[failed[0]] = RuntimeError("lost")
    for number in failed:
        with pytest.raises(RuntimeError, match="lost"):
            results[number].result(PATIENCE_S)
    bench.scheduler.leave_processors()
    bench.lanes.finish(*range(4))
    bench.ended(*results)
    bench.scheduler.close()


def test_closing_ends_what_is_offered_too() -> None:
    bench = LanesBench(threads=2)
    results = [bench.submit() for _ in range(6)]
    bench.began(*range(6))
    bench.scheduler.leave_processors()
    bench.lanes.finish(0, 1)
    bench.scheduler.close()
    for result in results[2:]:
        with pytest.raises(Cancelled):
            result.result(PATIENCE_S)
