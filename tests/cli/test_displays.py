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
    make_display,
    progress_texts,
    with_clock,
)
from qubes_restore_svc.wire.report import QubeReport, RestoreProgress

MIB = 1 << 20
CHUNK = 100 * MIB


def progress(archive_bytes: int, **known: int) -> RestoreProgress:
    return RestoreProgress.model_validate({"archive_bytes": archive_bytes, **known})


@pytest.mark.parametrize(
    ("told", "total", "texts"),
    [
        (progress(0), None, ["0 B"]),
        (progress(50 * MIB, percent=3), 200 * MIB, ["50.0 MiB of 200 MiB"]),
        (progress(50 * MIB, per_second=5 * MIB), None, ["50.0 MiB", "5.0 MiB/s"]),
        (progress(0, seconds_left=9), None, ["0 B", "a few seconds left"]),
        (progress(0, seconds_left=32), None, ["0 B", "about 30 s left"]),
        (progress(0, seconds_left=100), None, ["0 B", "about 1 min 30 s left"]),
        (progress(0, seconds_left=3700), None, ["0 B", "about 1 h 02 min left"]),
    ],
)
def test_how_much_how_fast_how_long_as_far_as_it_is_known(
    told: RestoreProgress, total: int | None, texts: list[str]
) -> None:
    assert progress_texts(told, total) == texts


def test_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    display = LineDisplay(None, verbose=False)
    display.volume_started("work", "private", MIB)
    display.log("info", "nobody wants to know")
    display.log("warning", "look out")
    display.progress(progress(5))
    display.qube_finished(QubeReport(name="work", klass="AppVM", outcome="verified"))
    assert capsys.readouterr().err == "warning: look out\nwork: verified\n"
    monkeypatch.setattr(displays, "LINE_INTERVAL_S", 0)
    display.progress(progress(5 * MIB))
    display.progress(progress(5 * MIB, percent=7, per_second=MIB, seconds_left=60))
    assert capsys.readouterr().err == "5.0 MiB\n7%  5.0 MiB  1.0 MiB/s  about 1 min left\n"


def test_more_words_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    display = LineDisplay(None, verbose=True)
    display.volume_started("work", "private", MIB)
    display.volume_started("dom0", "home", 16 << 40)
    display.log("info", "a detail")
    assert capsys.readouterr().err == (
        "work/private: 1.0 MiB\ndom0/home: size not known in advance\na detail\n"
    )


def test_quiet_means_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    display = make_display(verbose=False, quiet=True, total=None, creates=True)
    assert isinstance(display, QuietDisplay) and not isinstance(display, LineDisplay)
    display.progress(progress(1))
    display.volume_started("work", "private", MIB)
    display.log("info", "a detail")
    display.log("warning", "look out")
    display.qube_finished(QubeReport(name="work", klass="AppVM", outcome="failed"))
    display.close()
    assert capsys.readouterr().err == "warning: look out\n"


@pytest.mark.parametrize("quiet", [True, False])
def test_only_where_qubes_are_created_a_cancel_speaks_of_removing_them(
    quiet: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for creates in (True, False):
        make_display(verbose=False, quiet=quiet, total=None, creates=creates).ending()
        said = capsys.readouterr().err
        assert said.startswith("cancelling") and ("removed" in said) == ("stay" in said) == creates


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
    display.progress(progress(5))
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
    display.progress(progress(5))
    assert threading.active_count() == before
    assert isinstance(vars(tqdm)["_lock"], type(threading.RLock()))
    display.close()


def test_while_somebody_else_has_the_screen_nothing_is_drawn_and_no_time_passes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(displays, "time", SimpleNamespace(monotonic=lambda: now))
    display = BarDisplay(CHUNK, verbose=False)
    display.progress(progress(CHUNK // 2, percent=50))
    now += 5
    capsys.readouterr()
    with display.paused():
        cleared = capsys.readouterr().err
        assert cleared.strip("\r ") == ""
        now += 3600
        display.tick()
        display.progress(progress(CHUNK // 2, percent=50))
        assert capsys.readouterr().err == ""
    now += 1
    display.tick()
    assert " 0:06  " in capsys.readouterr().err
    display.progress(progress(CHUNK // 2, percent=51, per_second=2 * MIB))
    said = capsys.readouterr().err
    assert " 51% " in said and "2.0 MiB/s" in said
    display.close()
