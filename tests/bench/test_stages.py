"""The stages of a restore, and the limits that follow from them."""

from dataclasses import replace
from pathlib import Path

import pytest

from qubes_restore_svc.kdf.engine import KdfParameters, OpensslEngine
from qubes_restore_svc.wire.volume import encode_end, encode_header, encode_record
from tests.support.fixtures import Expectation, VolumeExpectation

from .anatomy import dissect
from .derivations import Cost, DerivationCosts, Load
from .samples import Sample
from .small_sample import write_small
from .stages import ONE_THREAD, ONLY_RESTORE, STAGES, Amounts, StageCosts, measure_stages

N19, N20 = KdfParameters(19, 8, 1), KdfParameters(20, 8, 1)


def test_a_backup_is_measured_to_its_last_byte(tmp_path: Path) -> None:
    sample = write_small(tmp_path)
    costs = measure_stages(sample, tmp_path)
    amounts, containers = costs.amounts, dissect(sample).containers
    assert list(costs.seconds) == list(STAGES)
    assert all(cost > 0 for cost in costs.seconds.values())
    assert amounts.archive == sample.size
    assert amounts.images == sum(volume.size for volume in sample.expected.volumes.values())
    assert 0 < amounts.data < amounts.images
    assert amounts.records >= 4
    framing = 4 * (len(encode_header(0)) + len(encode_end(0))) + amounts.records * len(encode_record(0, 1))
    assert amounts.crossing == amounts.data + framing
    assert amounts.largest == max(container.size for container in containers)
    assert costs.mix == {KdfParameters(4, 8, 1): len(containers)}
    assert costs.derivations.engine.memory_held == 0
    assert {path.name for path in tmp_path.iterdir()} == {"small.qbackup", "small.qbackup.json"}


def test_an_image_that_is_not_the_original_ends_the_measuring(tmp_path: Path) -> None:
    sample = write_small(tmp_path)
    volumes = dict(sample.expected.volumes)
    volumes["tiny/private"] = VolumeExpectation(volumes["tiny/private"].size, "0" * 64)
    wrong = Sample(sample.backup, replace(sample.expected, volumes=volumes))
    with pytest.raises(SystemExit, match="tiny/private"):
        measure_stages(wrong, tmp_path)


def test_a_volume_that_the_backup_lacks_ends_the_measuring(tmp_path: Path) -> None:
    sample = write_small(tmp_path)
    volumes = {**sample.expected.volumes, "more/private": VolumeExpectation(1, "0" * 64)}
    more = Sample(sample.backup, Expectation(sample.expected.passphrase, "", volumes))
    with pytest.raises(ValueError):
        measure_stages(more, tmp_path)


def costs_of(seconds: float, mix: dict[KdfParameters, int]) -> StageCosts:
    """Every stage costs `seconds`; one derivation of 2^19 costs 2 s, of 2^20 4 s."""
    known = {(N19, Load(1, 1)): Cost(2.0), (N20, Load(1, 1)): Cost(4.0)}
    amounts = Amounts(archive=1000, data=1500, images=3000, records=3, crossing=1600, largest=100)
    return StageCosts(
        dict.fromkeys(STAGES, seconds), amounts, mix, DerivationCosts(OpensslEngine(), dict(known))
    )


def test_the_limit_is_the_sum_of_all_stages_divided_by_the_cores() -> None:
    costs = costs_of(1.0, {N19: 3, N20: 2})
    memory = 64 << 30
    assert costs.derivation_s(memory, 2) == 3 * 2.0 + 2 * 4.0
    assert costs.limit_s(memory, 2) == (14 + len(STAGES)) / 2
    assert costs.limit_s(memory, 4) == (14 + len(STAGES)) / 4


def test_a_verify_neither_sends_nor_writes() -> None:
    costs = costs_of(1.0, {N19: 1})
    assert costs.limit_s(1 << 36, 2, verify_only=True) == (2 + len(STAGES) - len(ONLY_RESTORE)) / 2


def test_more_chunks_cost_as_much_more_when_they_are_mixed_alike() -> None:
    costs = costs_of(1.0, {N19: 3, N20: 2})
    assert costs.derivation_s(1 << 36, 2, count=50) == pytest.approx(140)


def test_every_stage_that_is_named_is_known() -> None:
    assert set(ONE_THREAD) < set(STAGES) and set(ONLY_RESTORE) < set(STAGES)
