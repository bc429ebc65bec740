"""The ways to restore that are compared: nothing counts that is not the original, bit for bit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.fixtures import VolumeExpectation

from . import sides
from .cheap import decrypt
from .samples import Sample
from .sides import check_images
from .small_sample import write_small

needs_scrypt = pytest.mark.skipif(bool(sides.missing_programs()), reason="a stock program is missing here")


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return write_small(tmp_path, log_n=10)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    directory = tmp_path / "work"
    directory.mkdir()
    return directory


def with_another_image(sample: Sample) -> Sample:
    """The same backup, with an expectation that nothing can meet."""
    volumes = dict(sample.expected.volumes)
    volumes["work/private"] = VolumeExpectation(volumes["work/private"].size, "0" * 64)
    return Sample(sample.backup, replace(sample.expected, volumes=volumes))


def test_extract_counts_worker_and_broker_and_leaves_nothing(sample: Sample, work: Path) -> None:
    outcome = sides.extract(sample, 300, work)
    # Nothing is staged by the worker; a file system may note on its bill that it has read something.
    assert outcome.measured.others_written <= 64 << 10 < outcome.data // 10
    assert outcome.measured.waited_written >= outcome.data > 0
    assert outcome.on_disk >= outcome.data
    assert outcome.measured.others_cpu_s > 0 < outcome.measured.own_cpu_s
    assert list(work.iterdir()) == []


def test_verify_writes_no_image(sample: Sample, work: Path) -> None:
    outcome = sides.verify(sample, 300, work)
    assert outcome.measured.waited_written < outcome.data
    assert outcome.on_disk == 0
    assert list(work.iterdir()) == []


@needs_scrypt
def test_the_manual_procedure_restores_the_same_and_writes_it_twice(sample: Sample, work: Path) -> None:
    outcome = sides.manual(sample, work)
    assert outcome.measured.waited_written > outcome.on_disk + sample.size // 2
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("sync", [False, True])
def test_the_stock_programs_unpack_what_was_decrypted(sample: Sample, work: Path, sync: bool) -> None:
    streams = work / "streams"
    streams.mkdir()
    decrypt(sample, streams)
    assert sides.unpack(sample, streams, work, sync=sync).on_disk > 0


@pytest.mark.parametrize(
    "side",
    [
        pytest.param(lambda sample, work: sides.extract(sample, 300, work), id="extract"),
        pytest.param(lambda sample, work: sides.verify(sample, 300, work), id="verify"),
        pytest.param(sides.manual, id="manual", marks=needs_scrypt),
    ],
)
def test_a_result_that_is_not_the_original_does_not_count(
    side: sides.Side, sample: Sample, work: Path
) -> None:
    with pytest.raises(SystemExit, match="does not count"):
        side(with_another_image(sample), work)
    assert list(work.iterdir()) == []


def test_an_image_that_is_missing_or_shorter_does_not_count(sample: Sample, tmp_path: Path) -> None:
    images = {name: tmp_path / name.replace("/", "-") for name in sample.expected.volumes}
    with pytest.raises(SystemExit, match="missing"):
        check_images(sample, images)
    for image in images.values():
        image.write_bytes(b"short")
    with pytest.raises(SystemExit, match="differs"):
        check_images(sample, images)


def test_programs_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "scrypt" else program)
    assert sides.missing_programs() == ["scrypt"]
