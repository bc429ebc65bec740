import pytest

from qubes_restore_svc.manager.events import PlanProgress
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import VolumeInfo
from tests.manager.script import MIB, Script, qube


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plan(*qubes: c.PlanQube, archive_size: int | None = None) -> c.Plan:
    return Script(qubes, archive_size=archive_size).plan(1, "restore", c.Choice(dom0_home=True))


def test_the_size_of_the_archive_is_the_measure_if_it_is_known() -> None:
    progress = PlanProgress(plan(qube("work"), archive_size=200 * MIB))
    progress.add(50 * MIB, 99 * MIB)
    assert progress.fraction == 0.25


def test_otherwise_the_images_of_the_taken_qubes_are() -> None:
    left_out = qube("mail").model_copy(update={"decision": "leave-out"})
    progress = PlanProgress(plan(qube("work"), left_out))
    progress.add(0, 25 * MIB)
    assert progress.fraction == 0.25


def test_a_volume_without_a_size_counts_what_it_took_on_disk() -> None:
    odd = qube("work", size=40 * MIB).model_copy(update={"volumes": (VolumeInfo(name="private"),)})
    progress = PlanProgress(plan(odd, qube("dom0", "AdminVM", size=60 * MIB)))
    assert progress.total == 100 * MIB


def test_nothing_is_told_of_what_is_not_known() -> None:
    progress = PlanProgress(plan(qube("work", size=0)))
    progress.add(5 * MIB, 5 * MIB)
    assert progress.fraction is None
    assert progress.amount_text == "5.0 MiB"
    assert progress.left_text == ""


@pytest.mark.parametrize("image_bytes", [100 * MIB, 10**15])
def test_it_never_says_that_all_is_done(image_bytes: int) -> None:
    progress = PlanProgress(plan(qube("work")))
    progress.add(0, image_bytes)
    assert progress.fraction == 0.99
    assert progress.amount_text == "100 MiB of 100 MiB"


def test_it_never_goes_backwards() -> None:
    progress = PlanProgress(plan(qube("work")))
    progress.add(0, 50 * MIB)
    progress.add(0, 10 * MIB)
    assert progress.fraction == 0.5


def test_rate_and_time_left_are_told_once_they_have_been_measured() -> None:
    clock = Clock()
    progress = PlanProgress(plan(qube("work", size=1000 * MIB)), clock)
    progress.add(0, 0)
    clock.now = 2.0
    progress.add(0, 20 * MIB)
    assert (progress.amount_text, progress.left_text) == ("20.0 MiB of 1000 MiB", "")
    clock.now = 10.0
    progress.add(0, 100 * MIB)
    assert progress.amount_text == "100 MiB of 1000 MiB, 10.0 MiB/s"
    assert progress.left_text == "about 1 min 30 s left"
    clock.now = 99.0
    progress.add(0, 990 * MIB)
    assert progress.left_text == "a few seconds left"
