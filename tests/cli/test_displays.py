"""Progress: a bar that says what a person wants to know, lines elsewhere, no harm if nobody looks."""

import asyncio
import io
import sys
import threading
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from qubes_restore_svc.cli import displays
from qubes_restore_svc.cli.displays import (
    BarDisplay,
    LineDisplay,
    QuietDisplay,
    Rate,
    make_display,
    with_clock,
)
from qubes_restore_svc.wire.report import QubeReport

MIB = 1 << 20
CHUNK = 100 * MIB


def test_the_rate_is_that_of_the_last_minute() -> None:
    rate = Rate(100 * CHUNK)
    for second in range(121):
        rate.add(second, (second if second <= 60 else 60 + (second - 60) * 2) * MIB)
    assert rate.per_second == 2 * MIB
    assert rate.seconds_left == (100 * CHUNK - 180 * MIB) / (2 * MIB)


def test_steps_of_a_chunk_hardly_move_the_time_left() -> None:
    """A chunk every eight seconds, told twice a second: the guess stays within a fifth of the truth."""
    rate, guesses = Rate(100 * CHUNK), []
    for half in range(2 * 200):
        rate.add(half / 2, half // 16 * CHUNK)
        if half > 150:
            true = (100 * CHUNK - half / 16 * CHUNK) / (CHUNK / 8)
            assert rate.seconds_left is not None
            guesses.append(rate.seconds_left / true)
    assert min(guesses) > 0.8 and max(guesses) < 1.2


def test_nothing_is_guessed_from_nothing() -> None:
    rate = Rate(CHUNK)
    assert (rate.per_second, rate.seconds_left) == (0, None)
    rate.add(0, 0)
    assert (rate.per_second, rate.seconds_left) == (0, None)
    rate.add(1, MIB)
    assert rate.seconds_left is None  # too early
    rate.add(1, MIB)  # a clock that stands still
    rate.add(100, MIB)
    rate.add(200, MIB)
    assert rate.per_second == 0 and rate.seconds_left is None
    assert Rate(None).seconds_left is None


def test_the_memory_of_a_long_run_is_bounded() -> None:
    rate = Rate(None)
    for half in range(100_000):
        rate.add(half / 2, half)
    assert len(rate._samples) < 200


def test_a_line_says_how_much_how_fast_how_long() -> None:
    rate = Rate(200 * MIB)
    rate.add(0, 0)
    rate.add(10, 50 * MIB)
    assert rate.text() == "25%  50.0 MiB of 200 MiB  5.0 MiB/s  30 s left"
    unknown = Rate(None)
    unknown.add(0, 0)
    unknown.add(10, 50 * MIB)
    assert unknown.text() == "50.0 MiB  5.0 MiB/s"


def test_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    display = LineDisplay(None, verbose=False)
    display.volume_started("work", "private", MIB)
    display.log("info", "nobody wants to know")
    display.log("warning", "look out")
    display.progress(5, 5)
    display.qube_finished(QubeReport(name="work", klass="AppVM", outcome="verified"))
    assert capsys.readouterr().err == "warning: look out\nwork: verified\n"
    monkeypatch.setattr(displays, "LINE_INTERVAL_S", 0)
    display.progress(5 * MIB, 5)
    assert capsys.readouterr().err.startswith("5.0 MiB")


def test_more_words_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    display = LineDisplay(None, verbose=True)
    display.volume_started("work", "private", MIB)
    display.volume_started("dom0", "home", 16 << 40)
    display.log("info", "a detail")
    assert capsys.readouterr().err == (
        "work/private: 1.0 MiB\ndom0/home: size not known in advance\na detail\n"
    )


def test_quiet_means_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    display = make_display(verbose=False, quiet=True, total=None)
    assert isinstance(display, QuietDisplay) and not isinstance(display, LineDisplay)
    display.progress(1, 1)
    display.volume_started("work", "private", MIB)
    display.log("info", "a detail")
    display.log("warning", "look out")
    display.qube_finished(QubeReport(name="work", klass="AppVM", outcome="failed"))
    display.close()
    assert capsys.readouterr().err == "warning: look out\n"


class Broken(io.StringIO):
    """A terminal that was closed, or a pipe whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [LineDisplay, BarDisplay])
@pytest.mark.parametrize("broken", [True, False])
def test_nobody_who_listens_does_no_harm(
    kind: type[LineDisplay], broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Broken() if broken else None)
    monkeypatch.setattr(displays, "LINE_INTERVAL_S", 0)
    display = kind(CHUNK, verbose=True)
    display.volume_started("work", "private", MIB)
    display.log("warning", "look out")
    display.progress(5, 5)
    display.qube_finished(QubeReport(name="work", klass="AppVM", outcome="failed"))
    display.close()


async def test_the_clock_goes_on_while_nothing_is_heard(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(displays, "_TICK_S", 0)
    monkeypatch.setattr(displays, "time", SimpleNamespace(monotonic=lambda: now))
    display = BarDisplay(CHUNK, verbose=False)

    async def work() -> str:
        nonlocal now
        for _ in range(3):
            now += 7
            await asyncio.sleep(0.001)
        return "done"

    assert await with_clock(display, work()) == "done"
    display.close()
    said = capsys.readouterr().err
    assert "0:00  opening the backup" in said and "0:21  opening the backup" in said


def test_the_bar_has_neither_a_thread_nor_a_lock_between_processes() -> None:
    """Such a lock would be a file in /dev/shm, and verify writes no files."""
    before = threading.active_count()
    display = BarDisplay(CHUNK, verbose=False)
    display.progress(5, 5)
    assert threading.active_count() == before
    assert isinstance(vars(tqdm)["_lock"], type(threading.RLock()))
    display.close()


def test_while_somebody_else_has_the_screen_nothing_is_drawn_and_no_time_passes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(displays, "time", SimpleNamespace(monotonic=lambda: now))
    display = BarDisplay(CHUNK, verbose=False)
    display.progress(CHUNK // 2, 0)
    now += 5
    display.progress(CHUNK // 2 + 5 * MIB, 0)
    capsys.readouterr()
    with display.paused():
        cleared = capsys.readouterr().err
        assert cleared.strip("\r ") == ""
        now += 3600
        display.tick()
        display.progress(CHUNK // 2 + 5 * MIB, 0)
        assert capsys.readouterr().err == ""
    now += 1
    display.tick()
    assert " 0:06  " in capsys.readouterr().err
    display.progress(CHUNK // 2 + 6 * MIB, 0)
    now += 10
    display.progress(CHUNK // 2 + 26 * MIB, 0)
    assert "2.0 MiB/s" in capsys.readouterr().err
    display.close()
