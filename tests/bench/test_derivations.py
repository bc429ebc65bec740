"""What a key derivation costs, and how the worker's budget is shared out."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import pytest

from qubes_restore_svc.kdf.engine import KdfEngine, KdfParameters, OpensslEngine, best_engine
from qubes_restore_svc.system_memory import MemoryRoom

from . import derivations
from .derivations import (
    DerivationCosts,
    Job,
    Load,
    derive_side_by_side,
    sample_requests,
    share_out,
    stride_within,
)
from .engines import available_engines

SMALL = KdfParameters(4, 8, 1)
MIB = 1 << 20


def expected(job: Job) -> bytes:
    cost = job.request.parameters
    return hashlib.scrypt(
        job.request.passphrase, salt=job.request.salt, n=1 << cost.log_n, r=cost.r, p=cost.p, dklen=64
    )


@pytest.mark.parametrize("name", available_engines())
def test_more_jobs_than_lanes_are_all_done_and_stand_in_order(name: str) -> None:
    engine = available_engines()[name]
    largest = engine.strides[-1]
    jobs = [
        Job(request, 1 if number % 2 else largest)
        for number, request in enumerate(sample_requests(KdfParameters(6, 8, 1), 11))
    ]
    derived = derive_side_by_side(engine, jobs)
    assert list(derived.keys) == [expected(job) for job in jobs]


@pytest.mark.parametrize("make", [OpensslEngine, best_engine])
def test_a_limit_that_is_smaller_than_all_at_once_makes_them_wait_not_fail(
    make: Callable[[], KdfEngine],
) -> None:
    engine = make()
    jobs = [Job(request) for request in sample_requests(SMALL, 5)]
    assert list(derive_side_by_side(engine, jobs, limit=1).keys) == [expected(job) for job in jobs]
    engine.trim()
    assert engine.memory_held == 0


class Lanes(OpensslEngine):
    """An engine of which only the sizes are asked: N = 2^log_n takes 2^log_n bytes at stride 1."""

    def __init__(self, lanes: int, strides: Sequence[int] = (1, 2, 4, 8, 16)) -> None:
        super().__init__()
        self._lanes, self._strides = lanes, strides

    @property
    def lanes(self) -> int:
        return self._lanes

    @property
    def step_times(self) -> Mapping[int, float]:
        return {1: 1.0} if self._lanes == 1 else {4: 1.0, 8: 1.4}

    @property
    def strides(self) -> Sequence[int]:
        return self._strides

    def memory(self, parameters: KdfParameters, stride: int = 1) -> int:
        return (1 << parameters.log_n) // stride


@pytest.mark.parametrize(
    ("count", "room", "expected"),
    [
        (100, 8 << 20, Load(1, 4)),  # all eight lanes at full size
        (100, (8 << 20) - 8, Load(2, 4)),  # a little less: every second block
        (100, 3 << 20, Load(4, 4)),
        (100, 1 << 19, Load(16, 3)),  # all eight would take about as long
        (100, (1 << 19) - 1, Load(16, 2)),
        (100, 1 << 16, Load(16, 1)),
        (100, 1, Load(16, 1)),
        (3, 3 << 20, Load(1, 1)),  # three on two cores
        (1, 8 << 20, Load(1, 1)),
    ],
)
def test_memory_is_shared_evenly_among_the_lanes_that_have_something_to_do(
    count: int, room: int, expected: Load
) -> None:
    assert share_out(Lanes(4), KdfParameters(20, 8, 1), count=count, room=room, cores=2) == expected


@pytest.mark.parametrize(
    ("count", "room", "expected"),
    [
        (100, 16 << 20, Load(1, 8)),
        (100, 12 << 20, Load(2, 8)),
        (100, 6 << 20, Load(2, 4)),  # eight would store every third block, and take about as long
        (16, 12 << 20, Load(2, 8)),
        (8, 12 << 20, Load(1, 4)),  # no more are there
    ],
)
def test_lanes_are_filled_as_far_as_it_pays(count: int, room: int, expected: Load) -> None:
    assert share_out(Lanes(8), KdfParameters(20, 8, 1), count=count, room=room, cores=2) == expected


def test_an_engine_without_strides_has_one_and_runs_one_a_core() -> None:
    engine = Lanes(1, (1,))
    assert stride_within(engine, KdfParameters(20, 8, 1), 5) == 1
    assert share_out(engine, KdfParameters(20, 8, 1), count=9, room=5, cores=2) == Load(1, 1)


def test_a_cost_is_measured_once_and_leaves_no_memory_behind() -> None:
    costs = DerivationCosts(best_engine())
    first = costs.cost(SMALL, Load(1, 1))
    assert costs.cost(SMALL, Load(1, 1)) is first
    assert not first.reckoned
    assert costs.engine.memory_held == 0


def test_what_does_not_fit_into_memory_is_reckoned_from_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = best_engine()
    free = engine.memory(KdfParameters(12, 8, 1)) * 2  # enough for N = 2^12, and not for 2^14
    monkeypatch.setattr(derivations, "memory_room", lambda: MemoryRoom(free))
    costs = DerivationCosts(engine)
    large = costs.cost(KdfParameters(16, 8, 1), Load(1, 1))
    measured = {key: cost for key, cost in costs.known.items() if not cost.reckoned}
    ((parameters, _), small) = measured.popitem()
    assert not measured
    assert large.reckoned
    assert large.cpu_s == small.cpu_s * 2 ** (16 - parameters.log_n)
    assert engine.memory(parameters) <= free
