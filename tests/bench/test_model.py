"""The model of a backup of 200 GB."""

import os

import pytest

from qubes_restore_svc.kdf.engine import OpensslEngine

from . import processes
from .derivations import Cost, DerivationCosts, Load
from .model import CHUNK_SIZE, CHUNKS, DISK_BYTES_PER_S, Estimate, estimate, on_cores
from .stages import ONE_THREAD, STAGES, Amounts, StageCosts
from .test_stages import N19

GIB = 1 << 30


def costs(stage_s: float, derivation_s: float, data: int = CHUNK_SIZE) -> StageCosts:
    """A sample of one chunk: every stage costs `stage_s`, its derivation `derivation_s`."""
    amounts = Amounts(CHUNK_SIZE, data, 2 * data, 100, data, CHUNK_SIZE)
    known = {(N19, Load(1, 1)): Cost(derivation_s)}
    return StageCosts(
        dict.fromkeys(STAGES, stage_s), amounts, {N19: 1}, DerivationCosts(OpensslEngine(), known)
    )


def test_costs_grow_with_the_chunks_and_are_divided_by_the_cores() -> None:
    found = estimate(costs(0.01, 3.0), 4, 16 * GIB)
    assert found.derivations_s == pytest.approx(CHUNKS * 3.0 / 4)
    assert found.all_cores_s == pytest.approx(CHUNKS * (3.0 + 0.01 * len(STAGES)) / 4)
    assert found.one_thread_s == pytest.approx(CHUNKS * 0.01 * len(ONE_THREAD))
    assert found.disk_s == pytest.approx(CHUNKS * CHUNK_SIZE / DISK_BYTES_PER_S)


def test_the_disk_has_the_larger_of_archive_and_data_to_do() -> None:
    found = estimate(costs(0.01, 3.0, data=3 * CHUNK_SIZE), 4, 16 * GIB)
    assert found.disk_s == pytest.approx(3 * CHUNKS * CHUNK_SIZE / DISK_BYTES_PER_S)


def test_the_sample_itself_is_reckoned_with_its_own_chunks() -> None:
    found = estimate(costs(0.01, 3.0), 2, 16 * GIB, CHUNK_SIZE, None)
    assert found.derivations_s == pytest.approx(3.0 / 2)
    assert found.all_cores_s == pytest.approx((3.0 + 0.01 * len(STAGES)) / 2)


def test_cores_are_taken_away_only_meanwhile() -> None:
    before = os.sched_getaffinity(0)
    with on_cores({min(before)}):
        assert processes.cores() == 1
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("found", "bound"),
    [
        (Estimate(derivations_s=9, all_cores_s=10, one_thread_s=2, disk_s=3), "derivations"),
        (Estimate(derivations_s=4, all_cores_s=10, one_thread_s=2, disk_s=3), "all cores"),
        (Estimate(derivations_s=4, all_cores_s=5, one_thread_s=10, disk_s=3), "unpacking in one thread"),
        (Estimate(derivations_s=4, all_cores_s=5, one_thread_s=2, disk_s=10), "disk"),
    ],
)
def test_the_slowest_bounds(found: Estimate, bound: str) -> None:
    assert (found.wall_s, found.bound) == (10, bound)
