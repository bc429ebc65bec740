"""Which derivation begins, and in how much memory: never more than is free, never nobody."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qubes_restore_svc.worker.shares import Situation, choose, least_stride

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
    assert choose(situation) == index


@pytest.mark.parametrize(("uses", "stride"), [(1, 2), (3, 2), (4, 1), (100, 1)])
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
    index = choose(situation)
    assert index is None or situation.sizes[index] <= situation.free


@given(situation=situations())
def test_where_nothing_runs_the_first_begins_if_its_smallest_form_fits(situation: Situation) -> None:
    assume(situation.running == 0)
    assert (choose(situation) is not None) == (situation.sizes[-1] <= situation.free)


@given(situation=situations())
def test_more_memory_never_makes_one_wait_that_would_have_begun(situation: Situation) -> None:
    assume(choose(situation) is not None)
    more = replace(situation, room=situation.room + 4096, free=situation.free + 4096)
    assert choose(more) is not None


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
                if choose(situation) is not None:
                    running[here], waiting, begun = running[here] + 1, waiting - 1, True
    assert waiting == 0 or sum(running) == threads * lanes
    assert max(running) - min(running) <= 1
