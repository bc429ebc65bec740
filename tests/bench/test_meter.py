"""The cost of each stage of a chain of generators."""

from collections.abc import Iterable, Iterator

import pytest

from .meter import Meter


class Clock:
    """Moves only when somebody works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_stages_that_ask_each_other_pay_for_their_own_work_only() -> None:
    clock = Clock()
    meter = Meter(clock)

    def numbers() -> Iterator[int]:
        for number in range(3):
            clock.work(1)
            yield number
        clock.work(0.5)

    def doubled(source: Iterable[int]) -> Iterator[int]:
        for number in source:
            clock.work(10)
            yield 2 * number

    result = []
    for number in meter.through("doubled", doubled(meter.through("numbers", numbers()))):
        clock.work(1000)  # belongs to nobody
        with meter.stage("sink"):
            clock.work(100)
            result.append(number)
    assert result == [0, 2, 4]
    assert meter.seconds == pytest.approx({"numbers": 3.5, "doubled": 30, "sink": 300})


def test_a_stage_that_fails_has_paid_and_the_one_that_asked_goes_on_paying() -> None:
    clock = Clock()
    meter = Meter(clock)

    def failing() -> Iterator[int]:
        clock.work(1)
        yield from ()
        raise ValueError

    with meter.stage("outer"):
        with pytest.raises(ValueError):
            list(meter.through("inner", failing()))
        clock.work(20)
    clock.work(300)
    assert meter.seconds == pytest.approx({"inner": 1, "outer": 20})
