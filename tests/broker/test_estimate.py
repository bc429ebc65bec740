"""How far a restore is said to be, and how long it is said to take, against how real ones went."""

import itertools
from collections.abc import Iterator

import pytest

from qubes_restore_svc.broker.estimate import Estimate
from qubes_restore_svc.wire.messages import Progress
from qubes_restore_svc.wire.report import RestoreProgress
from qubes_restore_svc.worker.meter import ALL, Meter
from tests.worker.progress_recording import FOLDER, Recording, load

RECORDINGS = sorted(path.stem for path in FOLDER.glob("*.json"))


def told(recording: Recording) -> Iterator[tuple[float, RestoreProgress]]:
    """What a person was told, and when: as a part of the whole time."""
    meter, estimate = Meter(), Estimate()
    for seen in recording.seen:
        progress = Progress(archive_bytes=seen.position, done=meter.done(seen))
        yield seen.now / recording.ended, estimate.of(progress, seen.now)


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_time_left_is_right_within_a_factor_when_a_half_is_over(name: str) -> None:
    recording = load(name)
    for part, progress in told(recording):
        left = progress.seconds_left
        true = (1 - part) * recording.ended
        if 0.25 <= part <= 0.75 and left is not None:
            assert true / 2 - 2 < left < true * 2 + 2, (part, left, true)
        if part >= 0.5:
            assert left is not None


@pytest.mark.parametrize("name", RECORDINGS)
def test_it_never_stands_and_never_runs_backwards(name: str) -> None:
    percents = [progress.percent or 0 for _, progress in told(load(name))]
    assert percents == sorted(percents)
    quarters = [percents[len(percents) * quarter // 4] for quarter in (1, 2, 3)]
    assert quarters[0] >= 5 and quarters[1] >= 25 and quarters[2] >= 45
    longest = max(len(list(same)) for _, same in itertools.groupby(percents))
    assert longest <= len(percents) / 5
    lefts = [progress.seconds_left for _, progress in told(load(name)) if progress.seconds_left is not None]
    risen = max(after - before for before, after in itertools.pairwise(lefts))
    assert risen <= max(3, lefts[0] / 4)


def test_nothing_is_guessed_from_nothing() -> None:
    estimate = Estimate()
    assert estimate.of(Progress(archive_bytes=5), 0) == RestoreProgress(archive_bytes=5)
    early = estimate.of(Progress(archive_bytes=10, done=10_000), 1)
    assert early == RestoreProgress(archive_bytes=10, percent=1)
    measured = estimate.of(Progress(archive_bytes=25, done=50_000), 5)
    assert (measured.percent, measured.per_second, measured.seconds_left) == (5, 4, 95)


@pytest.mark.parametrize("done", [0, 1, ALL])
def test_whatever_a_worker_says_is_within_bounds(done: int) -> None:
    estimate = Estimate()
    highest = 0
    for step in range(10_000):
        said = Progress(
            archive_bytes=(2**63 - 1) * (step % 2), image_bytes=2**63 - 1, done=done * (step % 3 // 2)
        )
        found = estimate.of(said, step / 1000)
        assert found.percent is not None and highest <= found.percent <= 99
        highest = found.percent
        assert found.seconds_left is None or found.seconds_left >= 0


def test_the_memory_of_a_long_restore_is_bounded() -> None:
    estimate = Estimate()
    for half in range(50_000):
        estimate.of(Progress(archive_bytes=half, done=half), half / 2)
    assert len(estimate._samples) < 1300


def test_the_guess_follows_a_change_of_the_rate() -> None:
    """Twice as fast from the middle on: a little later it is known."""
    estimate = Estimate()
    for second in range(500):
        done = 1000 * second if second < 250 else 250_000 + 2000 * (second - 250)
        found = estimate.of(Progress(archive_bytes=0, done=done), second)
    assert found.seconds_left is not None
    assert found.seconds_left == pytest.approx((ALL - done) / 2000, rel=0.2)
