"""The memory that the worker counts: what is admitted, and how it is shared out among derivations."""

import random
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qubes_restore_svc.errors import BudgetTooSmall, Cancelled
from qubes_restore_svc.kdf.engine import KdfParameters, KdfRequest
from qubes_restore_svc.system_memory import MemoryRoom
from qubes_restore_svc.worker.keys import KeyScheduler
from qubes_restore_svc.worker.memory import MAX_LOCATED, Budget, Situation, choose_stride, least_stride
from qubes_restore_svc.worker.threads import Stop

from .lanes import LanesEngine, ManualLanes
from .support import MIB, Hanging, in_thread, join, wait_until

#: A mebibyte and a little, 128 of them; the engine here can do with a quarter.
SMALL, LARGE = KdfParameters(10, 8, 1), KdfParameters(17, 8, 1)


class Bench:
    def __init__(self, limit: int, max_chunks: int = 9, own: int = 0) -> None:
        self.engine = LanesEngine()
        self.stop = Stop()
        self.budget = Budget(limit, self.engine, max_chunks, self.stop, own=own)
        self._lanes = ManualLanes(self.engine)
        self._count = 0

    def admit(self, size: int, cost: KdfParameters = SMALL, *, buffered: bool = True) -> None:
        self.budget.admit(size, cost, buffered=buffered)

    def release(self, size: int, cost: KdfParameters = SMALL, *, buffered: bool = True) -> None:
        self.budget.release(size, cost, buffered=buffered)

    def admitting(self, size: int, cost: KdfParameters = SMALL, *, buffered: bool = True) -> threading.Thread:
        return in_thread(lambda: self.admit(size, cost, buffered=buffered))

    def begin(self, cost: KdfParameters, stride: int) -> int:
        self._count += 1
        request = KdfRequest(cost, b"", b"%d" % self._count)
        with self.budget.changed:
            assert self._lanes.begin(request, stride, self.budget.arena_room) == self._count
        return self._count

    def end(self, number: int) -> None:
        self.engine.finish(number)
        wait_until(lambda: self._lanes.advance())
        with self.budget.changed:
            self.budget.changed.notify_all()


def waits(thread: threading.Thread) -> bool:
    thread.join(0.05)
    return thread.is_alive()


def test_a_chunk_that_can_never_fit_is_refused_with_the_memory_that_it_needs() -> None:
    """What a derivation needs is its smallest form."""
    bench = Bench(100 * MIB)
    with pytest.raises(BudgetTooSmall) as caught:
        bench.admit(70 * MIB, LARGE)
    assert "takes 32 MiB" in caught.value.reason and "100 MiB" in caught.value.reason
    assert "--memory 103" in caught.value.advice
    assert bench.budget.used == 0
    Bench(103 * MIB).admit(70 * MIB, LARGE)


def test_what_the_worker_takes_itself_is_part_of_the_limit() -> None:
    bench = Bench(180 * MIB, own=80 * MIB)
    with pytest.raises(BudgetTooSmall) as caught:
        bench.admit(70 * MIB, LARGE)
    assert "it may use 180 MiB" in caught.value.reason
    assert "--memory 183" in caught.value.advice
    assert bench.budget.arena_room == 100 * MIB
    Bench(183 * MIB, own=80 * MIB).admit(70 * MIB, LARGE)


def test_a_limit_that_cannot_be_raised_is_told_instead_of_the_option() -> None:
    budget = Budget(
        100 * MIB, LanesEngine(), 9, Stop(), own=0, advice=MemoryRoom(101 * MIB, 120 * MIB, "/a").advice
    )
    with pytest.raises(BudgetTooSmall) as caught:
        budget.check(70 * MIB, LARGE)
    assert "103 MiB" in caught.value.reason
    assert "control group /a" in caught.value.advice and "--memory" not in caught.value.advice


@pytest.mark.parametrize("buffered", [True, False])
def test_a_chunk_waits_while_a_derivation_before_it_would_have_no_room(buffered: bool) -> None:
    bench = Bench(100 * MIB)
    bench.admit(30 * MIB, LARGE)
    second = bench.admitting(39 * MIB, buffered=buffered)
    assert waits(second)  # 30 + 39, and 32 for the derivation that is to come
    bench.release(30 * MIB, LARGE)
    join(second)
    assert bench.budget.used == 39 * MIB


def test_a_chunk_waits_while_what_runs_leaves_no_room_for_it() -> None:
    bench = Bench(100 * MIB)
    bench.admit(10 * MIB, LARGE)
    number = bench.begin(LARGE, 2)
    second = bench.admitting(27 * MIB)
    assert waits(second)
    bench.end(number)  # its memory is idle now, and goes
    join(second)
    assert bench.budget.used == 37 * MIB
    assert bench.budget.arena_room == 63 * MIB


def test_of_chunks_that_stay_in_the_archive_only_the_largest_counts() -> None:
    bench = Bench(100 * MIB)
    for size in (20, 60, 40):
        bench.admit(size * MIB, LARGE, buffered=False)
    assert bench.budget.used == 60 * MIB
    assert bench.budget.largest_located == 60 * MIB
    bench.release(60 * MIB, LARGE, buffered=False)
    assert bench.budget.used == 40 * MIB
    assert bench.budget.largest_located == 40 * MIB


def test_a_chunk_is_fetched_ahead_only_where_the_derivations_keep_their_room() -> None:
    bench = Bench(41 * MIB)
    bench.admit(7 * MIB, LARGE, buffered=False)  # its derivation takes 32 MiB at least
    with bench.budget.lock:
        bench.budget.count_fetched(7 * MIB)
        assert bench.budget.has_room_ahead(1 * MIB)
    bench.admit(1 * MIB, SMALL)
    with bench.budget.lock:
        assert not bench.budget.has_room_ahead(1 * MIB)
        assert bench.budget.has_room_ahead(0)


def test_buffers_leave_three_fifths_to_derivations_unless_there_is_but_one() -> None:
    bench = Bench(100 * MIB)
    bench.admit(60 * MIB)
    second = bench.admitting(1)
    assert waits(second)
    bench.release(60 * MIB)
    join(second)
    bench.admit(40 * MIB - 1)
    third = bench.admitting(1)
    assert waits(third)
    bench.release(1)
    join(third)


def test_no_more_chunks_are_on_their_way_than_may_be() -> None:
    bench = Bench(100 * MIB, max_chunks=2)
    bench.admit(1)
    bench.admit(1, buffered=False)
    third = bench.admitting(1)
    assert waits(third)
    bench.release(1)
    join(third)
    for _ in range(MAX_LOCATED - 2):  # those that stay in the archive cost next to nothing
        bench.admit(1, buffered=False)
    last = bench.admitting(1, buffered=False)
    assert waits(last)
    bench.release(1, buffered=False)
    join(last)


def test_who_holds_a_chunk_and_needs_another_is_told_before_it_waits_for_itself() -> None:
    bench = Bench(100 * MIB)
    bench.admit(50 * MIB)
    told: list[int] = []

    def give_back() -> None:
        told.append(1)
        bench.release(50 * MIB)

    bench.budget.admit(60 * MIB, SMALL, buffered=True, before_waiting=give_back)
    assert told == [1]
    bench.release(60 * MIB)
    bench.budget.admit(60 * MIB, SMALL, buffered=True, before_waiting=give_back)
    assert told == [1]


def test_a_cancel_ends_every_wait_now_and_later() -> None:
    bench = Bench(100 * MIB)
    bench.admit(60 * MIB, LARGE)
    ended: list[bool] = []

    def waiting(buffered: bool) -> None:
        with pytest.raises(Cancelled):
            bench.admit(9 * MIB, buffered=buffered)
        ended.append(buffered)

    threads = [in_thread(lambda: waiting(True)), in_thread(lambda: waiting(False))]
    assert all(waits(thread) for thread in threads)
    bench.stop.say()
    for thread in threads:
        join(thread)
    assert sorted(ended) == [False, True]
    with pytest.raises(Cancelled):
        bench.admit(1)


def test_what_is_set_aside_waits_for_what_runs_and_lets_nothing_begin() -> None:
    bench = Bench(100 * MIB)
    bench.admit(10 * MIB, LARGE)
    number = bench.begin(LARGE, 2)
    seen: list[tuple[bool, int]] = []
    go_on = threading.Event()

    def second() -> None:
        with bench.budget.set_aside(60 * MIB) as fits:
            seen.append((fits, bench.engine.memory_held))
            assert go_on.wait(10)

    thread = in_thread(second)
    wait_until(lambda: bench.budget.arena_room == 30 * MIB)
    assert waits(thread) and not seen
    bench.end(number)  # its memory is idle now, and goes
    wait_until(lambda: seen)
    assert seen == [(True, 0)]
    go_on.set()
    join(thread)
    assert bench.budget.arena_room == 90 * MIB


def test_what_can_never_be_set_aside_beside_the_chunks_is_refused_at_once() -> None:
    bench = Bench(100 * MIB)
    bench.admit(41 * MIB)
    with bench.budget.set_aside(60 * MIB) as fits:
        assert not fits
        assert bench.budget.used == 41 * MIB


def test_a_cancel_ends_the_wait_for_what_is_to_be_set_aside() -> None:
    bench = Bench(100 * MIB)
    bench.admit(10 * MIB, LARGE)
    bench.begin(LARGE, 2)

    def second() -> None:
        with pytest.raises(Cancelled), bench.budget.set_aside(60 * MIB):
            raise AssertionError("it has come to an end")

    thread = in_thread(second)
    assert waits(thread)
    bench.stop.say()
    join(thread)
    assert bench.budget.arena_room == 90 * MIB


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    limit_mib=st.integers(8, 64),
    threads=st.integers(1, 3),
    lanes=st.sampled_from([1, 2, 4]),
    strides=st.sampled_from([(1,), (1, 2, 4), (1, 2, 4, 8, 16)]),
    chunks=st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from([10, 11, 12, 13, 14, 15, 16, 18]), st.booleans()),
        max_size=14,
    ),
    seed=st.integers(0, 1 << 32),
)
def test_any_mix_of_chunks_that_fit_is_derived_within_the_limit(
    limit_mib: int,
    threads: int,
    lanes: int,
    strides: tuple[int, ...],
    chunks: list[tuple[float, int, bool]],
    seed: int,
) -> None:
    """Chunks come in order and are released in order; derivations end in whatever order they like.

    What is held is counted anew here: buffers, the one located chunk that is fetched, and all arenas."""
    limit, order = limit_mib * MIB, random.Random(seed)
    engine = LanesEngine(lanes, strides)
    plan: list[tuple[int, KdfParameters, bool]] = []
    for share, log_n, buffered in chunks:
        cost = KdfParameters(log_n, 8, 1)
        least = engine.memory(cost, strides[-1])
        if least < limit:
            plan.append((max(1, int(share * (limit - least))), cost, buffered))
    stop = Stop()
    budget = Budget(limit, engine, threads * lanes + 2, stop, own=0)
    scheduler = KeyScheduler(engine, budget, threads)
    admitted = [threading.Event() for _ in plan]
    keys: dict[int, Future[bytes]] = {}
    held: dict[int, int] = {}
    delivered: list[int] = []
    exceeded: list[int] = []

    def count() -> None:
        with budget.changed:  # nothing is admitted or begun meanwhile
            total = sum(held.copy().values()) + engine.memory_held
            if total > limit:
                exceeded.append(total)

    def take_in() -> None:
        for number, (size, cost, buffered) in enumerate(plan):
            budget.admit(size, cost, buffered=buffered)
            if buffered:
                held[number] = size
            count()
            keys[number] = scheduler.submit(KdfRequest(cost, b"", b"%d" % number))
            admitted[number].set()

    def consume() -> None:
        for number, (size, cost, buffered) in enumerate(plan):
            admitted[number].wait()
            assert keys[number].result() == bytes([number]) * 64
            held[number] = size
            count()
            delivered.append(number)
            del held[number]
            budget.release(size, cost, buffered=buffered)

    workers = [in_thread(take_in), in_thread(consume)]
    deadline = time.monotonic() + 20
    try:
        while len(delivered) < len(plan):
            running = sorted(engine.running)
            if running and (len(running) == threads * lanes or order.random() < 0.5):
                engine.finish(order.choice(running))
            assert budget.used <= limit
            count()
            if time.monotonic() > deadline:
                raise Hanging(f"only {len(delivered)} of {len(plan)} chunks came through")
            time.sleep(0.0005)
        for worker in workers:
            join(worker)
        assert exceeded == []
        assert engine.most_held <= limit
        assert [number for number, _ in engine.begun] == list(range(len(plan)))
        scheduler.close()
        wait_until(lambda: budget.used == 0, "the release of all memory")
    finally:
        stop.say()
        scheduler.close()


#: A derivation of 64 units at the strides 1, 2, 4, 8, 16.
SIZES = (64, 32, 16, 8, 4)
ALONE = Situation(sizes=SIZES, waiting=1, running=0, running_here=0, threads=2, lanes=4, room=1000, free=1000)


@pytest.mark.parametrize(
    ("situation", "index"),
    [
        (ALONE, 0),
        (replace(ALONE, room=64, free=64), 0),
        (replace(ALONE, room=63, free=63), 1),
        (replace(ALONE, room=4, free=4), 4),
        (replace(ALONE, room=3, free=3), None),
        (replace(ALONE, room=-1, free=-1), None),
        # Eight that wait for eight lanes share evenly; more that wait do not make the shares smaller.
        (replace(ALONE, waiting=8, room=512, free=512), 0),
        (replace(ALONE, waiting=6, running=2, running_here=1, room=511, free=383), 1),
        # What everything waits for gets half of what there is, even if nothing else is there yet.
        (replace(ALONE, urgent=True, room=128, free=128), 0),
        (replace(ALONE, urgent=True, room=127, free=127), 1),
        (replace(ALONE, urgent=True, waiting=8, room=128, free=128), 0),
        (replace(ALONE, urgent=True, waiting=7, running=1, room=128, free=64), 1),
        (replace(ALONE, urgent=True, waiting=7, running=1, room=128, free=4), 4),
        (replace(ALONE, urgent=True, waiting=7, running=1, room=128, free=3), None),
        (replace(ALONE, urgent=True, room=500, free=500, least=1), 1),
        # The others get their share.
        (replace(ALONE, waiting=8, room=64, free=64), 3),
        (replace(ALONE, waiting=6, running=2, running_here=1, room=64, free=32), 3),
        (replace(ALONE, waiting=8, room=511, free=511), 1),
        (replace(ALONE, waiting=8, room=255, free=255), 2),
        (replace(ALONE, waiting=800, room=512, free=512), 0),
        (replace(ALONE, waiting=8, room=16, free=16), 4),
        # What others took sparingly is for those that are still to begin, where it saves much.
        (replace(ALONE, waiting=1, running=7, running_here=3, room=64, free=48), 1),
        (replace(ALONE, waiting=1, running=7, running_here=3, room=128, free=64), 2),
        # Memory that is not worth it is left alone, unless it is there already.
        (replace(ALONE, least=2), 2),
        (replace(ALONE, least=2, kept=31), 2),
        (replace(ALONE, least=2, kept=32), 1),
        (replace(ALONE, least=2, kept=64), 0),
        (replace(ALONE, least=2, kept=64, room=63, free=63), 1),
        # The fair share is not there, a smaller form is not taken instead of the smallest: it has to wait.
        (replace(ALONE, waiting=1, running=1, room=64, free=3), None),
        (replace(ALONE, waiting=1, running=1, room=64, free=31), None),
        # Two threads: the other one has more room.
        (replace(ALONE, waiting=1, running=1, running_here=1), None),
        (replace(ALONE, waiting=1, running=1, running_here=0), 0),
        (replace(ALONE, waiting=1, running=2, running_here=1), 0),
        (replace(ALONE, waiting=9, running=4, running_here=4), None),
        # … but it is left to something else.
        (replace(ALONE, waiting=1, running=1, running_here=1, avoiding=True), 0),
        (replace(ALONE, threads=1, waiting=1, running=3, running_here=3), 0),
    ],
)
def test_the_share_that_a_derivation_gets(situation: Situation, index: int | None) -> None:
    assert choose_stride(situation) == index


@pytest.mark.parametrize(("uses", "stride"), [(1, 2), (2, 2), (3, 1), (100, 1)])
def test_new_memory_is_taken_as_far_as_it_pays(uses: float, stride: int) -> None:
    strides = (1, 2, 4, 8, 16)
    assert strides[least_stride(strides, uses)] == stride


def test_where_there_is_no_choice_none_is_made() -> None:
    assert least_stride((1,), 1) == 0


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    threads, lanes = draw(st.integers(1, 8)), draw(st.sampled_from([1, 2, 4]))
    here = draw(st.integers(0, lanes - 1))
    running = here + draw(st.integers(0, (threads - 1) * lanes))
    largest = draw(st.integers(1, 4096))
    room = draw(st.integers(-10, 20_000))
    return Situation(
        sizes=[-(-largest // stride) for stride in (1, 2, 4, 8, 16)][: draw(st.integers(1, 5))],
        waiting=draw(st.integers(1, 30)),
        running=running,
        running_here=here,
        threads=threads,
        lanes=lanes,
        room=room,
        free=room if running == 0 else draw(st.integers(-10, max(room, -10))),
        least=draw(st.integers(0, 4)),
        kept=draw(st.integers(0, 4096)),
        urgent=draw(st.booleans()),
        avoiding=draw(st.booleans()),
    )


@given(situation=situations())
def test_whatever_begins_has_its_memory(situation: Situation) -> None:
    index = choose_stride(situation)
    assert index is None or situation.sizes[index] <= situation.free


@given(situation=situations())
def test_where_nothing_runs_the_first_begins_if_its_smallest_form_fits(situation: Situation) -> None:
    assume(situation.running == 0)
    assert (choose_stride(situation) is not None) == (situation.sizes[-1] <= situation.free)


@given(situation=situations())
def test_more_memory_never_makes_one_wait_that_would_have_begun(situation: Situation) -> None:
    assume(choose_stride(situation) is not None)
    more = replace(situation, room=situation.room + 4096, free=situation.free + 4096)
    assert choose_stride(more) is not None


@given(st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(1, 20), st.integers(0, 1 << 16))
def test_threads_take_turns_and_all_lanes_get_something(
    threads: int, lanes: int, waiting: int, order: int
) -> None:
    """Memory without end; whoever may begin begins, in any order of the threads."""
    running = [0] * threads
    begun = True
    while begun and waiting:
        begun = False
        for turn in range(threads):
            here = (turn + order) % threads
            if running[here] < lanes and waiting:
                situation = Situation([1], waiting, sum(running), running[here], threads, lanes, 1000, 1000)
                if choose_stride(situation) is not None:
                    running[here], waiting, begun = running[here] + 1, waiting - 1, True
    assert waiting == 0 or sum(running) == threads * lanes
    assert max(running) - min(running) <= 1
