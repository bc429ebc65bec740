"""The memory budget: never exceeded, never a deadlock, and a number for the person when it is too small."""

import random
import threading
import time
from collections.abc import Sequence
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qubes_restore_svc.archive.kdf import KdfParameters, KdfRequest
from qubes_restore_svc.errors import BudgetTooSmall, Cancelled
from qubes_restore_svc.worker.budget import Budget
from qubes_restore_svc.worker.keys import KeyScheduler

from .support import MIB, Hanging, in_thread, join, wait_until

LIMIT = 1000 * MIB


def waits(thread: threading.Thread) -> bool:
    thread.join(0.05)
    return thread.is_alive()


def test_a_chunk_that_can_never_fit_is_refused_with_the_memory_that_it_needs() -> None:
    budget = Budget(LIMIT, max_chunks=4)
    with pytest.raises(BudgetTooSmall) as caught:
        budget.admit(100 * MIB + 1, 1024 * MIB)
    assert "1024 MiB" in caught.value.reason and "1000 MiB" in caught.value.reason
    assert "--memory 1125" in caught.value.advice
    assert budget.used == 0
    Budget(1125 * MIB, max_chunks=4).admit(100 * MIB + 1, 1024 * MIB)


def test_a_chunk_waits_while_its_derivation_would_have_no_room() -> None:
    budget = Budget(LIMIT, max_chunks=9)
    budget.admit(300 * MIB, 600 * MIB)
    second = in_thread(lambda: budget.admit(200 * MIB, 1 * MIB))
    assert waits(second)  # 300 + 200, and 600 for the derivation that is to come
    budget.start_derivation(600 * MIB)
    budget.end_derivation(600 * MIB)
    join(second)
    assert budget.used == 500 * MIB


def test_a_chunk_waits_while_derivations_that_run_side_by_side_leave_no_room_for_it() -> None:
    budget = Budget(LIMIT, max_chunks=9)
    for _ in range(2):
        budget.admit(50 * MIB, 400 * MIB)
        budget.start_derivation(400 * MIB)
    third = in_thread(lambda: budget.admit(101 * MIB, 400 * MIB))
    assert waits(third)  # beside one derivation there would be room, beside two there is none
    assert budget.used == 900 * MIB
    budget.end_derivation(400 * MIB)
    join(third)


def test_a_derivation_waits_for_its_memory() -> None:
    budget = Budget(LIMIT, max_chunks=9)
    for _ in range(2):
        budget.admit(100 * MIB, 500 * MIB)
    budget.start_derivation(500 * MIB)
    second = in_thread(lambda: budget.start_derivation(500 * MIB))
    assert waits(second)
    assert budget.used == 700 * MIB
    budget.end_derivation(500 * MIB)
    join(second)


def test_no_more_chunks_are_held_than_may_be() -> None:
    budget = Budget(LIMIT, max_chunks=2)
    budget.admit(1, 1)
    budget.admit(1, 1)
    third = in_thread(lambda: budget.admit(1, 1))
    assert waits(third)
    budget.release(1)
    join(third)


def test_a_derivation_that_is_not_wanted_any_more_makes_room() -> None:
    budget = Budget(LIMIT, max_chunks=9)
    budget.admit(100 * MIB, 900 * MIB)
    second = in_thread(lambda: budget.admit(100 * MIB, 1 * MIB))
    assert waits(second)
    budget.forget_derivation(900 * MIB)
    join(second)


def test_a_cancel_ends_every_wait_now_and_later() -> None:
    budget = Budget(LIMIT, max_chunks=1)
    budget.admit(600 * MIB, 400 * MIB)
    budget.start_derivation(400 * MIB)
    budget._waiting.append(400 * MIB)  # a second derivation, which finds no room
    ended: list[str] = []

    def waiting(what: str) -> None:
        try:
            if what == "admit":
                budget.admit(1, 1)
            else:
                budget.start_derivation(400 * MIB)
        except Cancelled:
            ended.append(what)

    threads = [in_thread(partial(waiting, what)) for what in ("admit", "start")]
    assert all(waits(thread) for thread in threads)
    budget.cancel()
    for thread in threads:
        join(thread)
    assert sorted(ended) == ["admit", "start"]
    with pytest.raises(Cancelled):
        budget.admit(1, 1)


class _Gauge:
    """A scheduler's engine whose derivations end when the test says so; it counts what is really in use."""

    name = "gauge"
    lanes = 1

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.lock = threading.Lock()
        self.held = 0
        self.started: list[int] = []
        self.running: dict[int, threading.Event] = {}
        self.exceeded = False

    def take(self, size: int) -> None:
        with self.lock:
            self.held += size
            self.exceeded = self.exceeded or self.held > self.limit

    def give_back(self, size: int) -> None:
        with self.lock:
            self.held -= size

    def derive(self, requests: Sequence[KdfRequest]) -> list[bytes]:
        (request,) = requests
        number = int(request.passphrase)
        done = threading.Event()
        self.take(request.parameters.memory)
        with self.lock:
            self.started.append(number)
            self.running[number] = done
        if not done.wait(30):
            raise Hanging("a derivation was forgotten by the test")
        self.give_back(request.parameters.memory)
        return [bytes(64)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    limit_mib=st.integers(8, 64),
    jobs=st.integers(1, 4),
    chunks=st.lists(st.tuples(st.floats(0, 1), st.sampled_from([10, 11, 12, 13, 14, 15, 16])), max_size=14),
    seed=st.integers(0, 1 << 32),
)
def test_any_mix_of_chunks_that_fit_is_derived_within_the_limit(
    limit_mib: int, jobs: int, chunks: list[tuple[float, int]], seed: int
) -> None:
    """Chunks come in order and are released in order; derivations end in whatever order they like."""
    limit, order = limit_mib * MIB, random.Random(seed)
    costs = [(share, KdfParameters(log_n, 8, 1)) for share, log_n in chunks]
    plan = [
        (max(1, int(share * (limit - cost.memory))), cost) for share, cost in costs if cost.memory < limit
    ]
    gauge = _Gauge(limit)
    budget = Budget(limit, max_chunks=jobs + 2)
    scheduler = KeyScheduler(gauge, budget, jobs)
    admitted: list[threading.Event] = [threading.Event() for _ in plan]
    keys = {}
    delivered: list[int] = []

    def take_in() -> None:
        for number, (size, cost) in enumerate(plan):
            budget.admit(size, cost.memory)
            gauge.take(size)
            keys[number] = scheduler.submit(KdfRequest(cost, bytes(32), b"%d" % number))
            admitted[number].set()

    def consume() -> None:
        for number, (size, _) in enumerate(plan):
            admitted[number].wait()
            keys[number].result()
            delivered.append(number)
            gauge.give_back(size)
            budget.release(size)

    threads = [in_thread(take_in), in_thread(consume)]
    deadline = time.monotonic() + 20
    try:
        while len(delivered) < len(plan):
            with gauge.lock:
                running = sorted(gauge.running)
                if running and (len(running) == jobs or order.random() < 0.5):
                    gauge.running.pop(order.choice(running)).set()
            assert budget.used <= limit
            if time.monotonic() > deadline:
                raise Hanging(f"only {len(delivered)} of {len(plan)} chunks came through")
            time.sleep(0)
        for thread in threads:
            join(thread)
        assert not gauge.exceeded
        assert gauge.started == sorted(gauge.started) or jobs > 1
        assert delivered == list(range(len(plan)))
        wait_until(lambda: budget.used == 0)
        assert gauge.held == 0
    finally:
        budget.cancel()
        scheduler.close()
        for done in gauge.running.values():
            done.set()
