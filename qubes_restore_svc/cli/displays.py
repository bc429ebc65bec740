"""Progress for a person: a bar on a terminal, plain lines elsewhere, nothing when told to be quiet.

Strategy: one class an audience, all of them Observers of the broker. Everything goes to standard error;
standard output is for results. If the terminal of a display is gone, its words are lost.
"""

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Awaitable, Iterator
from typing import Never, TypeVar

from tqdm import tqdm

from qubes_restore_svc.cli.tables import duration_text
from qubes_restore_svc.cli.terminal import QuietStream, can_redraw, say, width_of
from qubes_restore_svc.errors import size_text
from qubes_restore_svc.wire.report import Observer, QubeReport, RestoreProgress

_T = TypeVar("_T")

#: Seconds between plain lines.
LINE_INTERVAL_S = 10.0

#: Seconds left below which nothing is counted any more.
A_MOMENT_S = 10

_TICK_S = 0.5
_LEAST_BAR = 8  #: columns
_WITH_BAR = "{percentage:3.0f}% {bar} {desc}"
#: The text if a cancel takes a while, for a run that creates qubes and for one that does not.
_ENDING = "cancelling: what is unfinished is being removed, which takes a moment; finished qubes stay"
_ENDING_UNCHANGED = "cancelling, which takes a moment; nothing here has been changed"
_UNKNOWN_SIZE = "size not known in advance"


class Display(Observer):
    """An observer that owns a piece of the screen; this one owns none. `creates`: the run creates qubes."""

    creates = True

    def tick(self) -> None:
        """Time has passed, nothing else."""

    def ending(self) -> None:
        """The job was cancelled and takes a while to undo what it did: the person must know."""

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While somebody else has the screen: nothing is drawn, and the time does not count."""
        yield

    def close(self) -> None:
        """Leave the screen clean."""


def make_display(*, verbose: bool, quiet: bool, total: int | None, creates: bool) -> Display:
    """The display for this process. `total` is the archive's size in bytes, if known and to be read."""
    display: Display
    if quiet:
        display = QuietDisplay()
    elif can_redraw(sys.stderr):
        display = BarDisplay(total, verbose=verbose)
    else:
        display = LineDisplay(total, verbose=verbose)
    display.creates = creates
    return display


async def with_clock(display: Display, work: Awaitable[_T]) -> _T:
    """Await `work`, and let the display know twice a second that time passes."""

    async def tick() -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            display.tick()

    display.tick()
    ticking = asyncio.create_task(tick())
    try:
        return await work
    finally:
        ticking.cancel()


class QuietDisplay(Display):
    """Warnings only."""

    def log(self, level: str, text: str) -> None:
        """A warning is said even so."""
        if level == "warning":
            say(f"warning: {text}")

    def ending(self) -> None:
        """It is an answer to the person, and said even so."""
        say(_ENDING if self.creates else _ENDING_UNCHANGED)


class LineDisplay(QuietDisplay):
    """A line for every event, and one now and then for the progress: for logs and pipes."""

    def __init__(self, total: int | None, *, verbose: bool) -> None:
        self._total = total
        self._progress: RestoreProgress | None = None
        self._verbose = verbose
        self._last = time.monotonic()

    def progress(self, progress: RestoreProgress) -> None:
        """At most one line every ten seconds."""
        self._progress = progress
        now = time.monotonic()
        if now - self._last >= LINE_INTERVAL_S:
            self._last = now
            percent = "" if progress.percent is None else f"{progress.percent}%  "
            say(percent + "  ".join(progress_texts(progress, self._total)))

    def log(self, level: str, text: str) -> None:
        """Warnings always, the rest when verbose."""
        if level == "warning":
            say(f"warning: {text}")
        elif self._verbose:
            say(text)

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        """The volume and its size, when verbose."""
        if self._verbose:
            # The size of a home is not recorded; what is announced is a ceiling.
            say(f"{qube}/{volume}: {_UNKNOWN_SIZE if volume == 'home' else size_text(image_size)}")

    def qube_finished(self, report: QubeReport) -> None:
        """The result of the qube."""
        reason = "" if report.error is None else f": {report.error.reason}"
        say(f"{report.name}: {report.outcome}{reason}")


class BarDisplay(LineDisplay):
    """A bar with time, bytes, rate, time left and what is on its way; lines pass above it."""

    def __init__(self, total: int | None, *, verbose: bool) -> None:
        super().__init__(total, verbose=verbose)
        self._started = time.monotonic()
        self._paused = False
        self._doing = "opening the backup"
        # Left to itself, tqdm makes a lock between processes, with a file in /dev/shm, and a thread.
        tqdm.set_lock(threading.RLock())
        tqdm.monitor_interval = 0
        self._bar: tqdm[Never] = tqdm(
            total=100,
            bar_format=_WITH_BAR if total else "{desc}",
            leave=False,
            delay=0.001,  # not drawn before it has a description
            file=QuietStream(),
        )

    def progress(self, progress: RestoreProgress) -> None:
        """Move the bar; if the archive's size is not known, there is none before a percentage is."""
        self._progress = progress
        if progress.percent is not None:
            self._bar.bar_format = _WITH_BAR
            self._bar.n = progress.percent
        self._draw()

    def log(self, level: str, text: str) -> None:
        """Above the bar."""
        self._bar.clear()
        super().log(level, text)
        self._draw()

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        """The bar says what is on its way."""
        self._doing = f"{qube}/{volume}"
        self._bar.clear()
        super().volume_started(qube, volume, image_size)
        self._draw()

    def qube_finished(self, report: QubeReport) -> None:
        """Above the bar."""
        self._bar.clear()
        super().qube_finished(report)
        self._draw()

    def ending(self) -> None:
        """Above the bar."""
        self._bar.clear()
        super().ending()
        self._doing = "clearing up"
        self._draw()

    def tick(self) -> None:
        """The clock goes on: while the first keys are derived, it is the only sign of life."""
        self._draw()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The bar is not there meanwhile, and begins anew afterwards."""
        began = time.monotonic()
        self._bar.clear()
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            self._started += time.monotonic() - began

    def close(self) -> None:
        """Remove the bar."""
        self._bar.clear()
        self._bar.close()

    def _draw(self) -> None:
        if self._paused:
            return
        elapsed = int(time.monotonic() - self._started)
        parts = [f"{elapsed // 60}:{elapsed % 60:02d}"]
        if self._progress is not None:
            parts += progress_texts(self._progress, self._total)
        # The last column stays free: some terminals would begin a new line.
        self._bar.ncols = (width_of(sys.stderr) or 80) - 1
        room = self._bar.ncols - len("100%  ") - _LEAST_BAR - len("  ".join(parts)) - 2
        if room >= min(len(self._doing), 8):
            parts.append(self._doing if len(self._doing) <= room else self._doing[: room - 1] + "…")
        self._bar.set_description_str("  ".join(parts), refresh=False)
        self._bar.refresh()


def progress_texts(progress: RestoreProgress, total: int | None) -> list[str]:
    """How much of an archive of `total` bytes, how fast, and how long still, as far as it is known."""
    done = size_text(progress.archive_bytes)
    texts = [f"{done} of {size_text(total)}" if total else done]
    if progress.per_second:
        texts.append(f"{size_text(progress.per_second)}/s")
    seconds = progress.seconds_left
    if seconds is not None:
        texts.append(
            "a few seconds left" if seconds < A_MOMENT_S else f"about {duration_text(rounded(seconds))} left"
        )
    return texts


def rounded(seconds: int) -> int:
    """A guess is not told to the second: a number that jumps says less than one that stands."""
    step = 5 if seconds < 60 else 30 if seconds < 600 else 60
    return max(step, round(seconds / step) * step)
