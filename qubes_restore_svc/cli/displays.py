"""Progress for a person: a bar on a terminal, plain lines elsewhere, nothing when told to be quiet.

Strategy: one class an audience, all of them Observers of the broker. Everything goes to standard error;
standard output is for results. If the terminal of a display is gone, its words are lost.
"""

import asyncio
import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Iterator
from typing import Never, TypeVar

from tqdm import tqdm

from qubes_restore_svc.cli.tables import duration_text
from qubes_restore_svc.cli.terminal import QuietStream, can_redraw, say, width_of
from qubes_restore_svc.errors import size_text
from qubes_restore_svc.wire.report import Observer, QubeReport

_T = TypeVar("_T")

#: Seconds between plain lines.
LINE_INTERVAL_S = 10.0

#: Seconds over which the rate is measured. Progress comes in chunks of 100 MiB, each of which takes
#: seconds; the window is long enough for several, and short enough to forget what was skipped.
RATE_WINDOW_S = 60.0
#: Seconds that must have been measured before a time left is guessed.
_LEAST_MEASURED_S = 3.0

_TICK_S = 0.5
_LEAST_BAR = 8  #: columns
_ENDING = "cancelling: what is unfinished is being removed, which takes a moment; finished qubes stay"
_UNKNOWN_SIZE = "size not known in advance"


class Display(Observer):
    """An observer that owns a piece of the screen; this one owns none."""

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


def make_display(*, verbose: bool, quiet: bool, total: int | None) -> Display:
    """The display for this process. `total` is the archive's size in bytes, if known and to be read."""
    if quiet:
        return QuietDisplay()
    if can_redraw(sys.stderr):
        return BarDisplay(total, verbose=verbose)
    return LineDisplay(total, verbose=verbose)


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
        say(_ENDING)


class LineDisplay(QuietDisplay):
    """A line for every event, and one now and then for the progress: for logs and pipes."""

    def __init__(self, total: int | None, *, verbose: bool) -> None:
        self._rate = Rate(total)
        self._verbose = verbose
        self._last = time.monotonic()

    def progress(self, archive_bytes: int, image_bytes: int) -> None:
        """At most one line every ten seconds."""
        now = time.monotonic()
        self._rate.add(now, archive_bytes)
        if now - self._last >= LINE_INTERVAL_S:
            self._last = now
            say(self._rate.text())

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
        """What became of the qube."""
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
            total=total or None,
            bar_format="{percentage:3.0f}% {bar} {desc}" if total else "{desc}",
            leave=False,
            delay=0.001,  # not drawn before it has a description
            file=QuietStream(),
        )

    def progress(self, archive_bytes: int, image_bytes: int) -> None:
        """Move the bar."""
        self._rate.add(time.monotonic(), archive_bytes)
        self._bar.n = max(self._bar.n, archive_bytes)
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
            self._rate.forget()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.clear()
        self._bar.close()

    def _draw(self) -> None:
        if self._paused:
            return
        elapsed = int(time.monotonic() - self._started)
        parts = [f"{elapsed // 60}:{elapsed % 60:02d}"]
        if self._rate.measured:
            parts.append(self._rate.text(percent=False))
        # The last column stays free: some terminals would begin a new line.
        self._bar.ncols = (width_of(sys.stderr) or 80) - 1
        room = self._bar.ncols - len("100%  ") - _LEAST_BAR - len("  ".join(parts)) - 2
        if room >= min(len(self._doing), 8):
            parts.append(self._doing if len(self._doing) <= room else self._doing[: room - 1] + "…")
        self._bar.set_description_str("  ".join(parts), refresh=False)
        self._bar.refresh()


class Rate:
    """How fast it goes, measured over the last minute, and how long it still takes."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._samples: deque[tuple[float, int]] = deque()

    @property
    def measured(self) -> bool:
        """Has anything been added?"""
        return bool(self._samples)

    def add(self, now: float, done: int) -> None:
        """`done` bytes are behind us at the time `now`, in seconds of any clock."""
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] >= RATE_WINDOW_S:
            self._samples.popleft()

    def forget(self) -> None:
        """Measure anew: what was added before says nothing about what comes."""
        self._samples.clear()

    @property
    def per_second(self) -> float:
        """Bytes a second; 0 while it cannot be told."""
        if not self._samples:
            return 0.0
        (then, before), (now, done) = self._samples[0], self._samples[-1]
        return (done - before) / (now - then) if now > then else 0.0

    @property
    def seconds_left(self) -> float | None:
        """A guess; None while there is nothing to guess from."""
        if not self._total or self.per_second <= 0:
            return None
        (then, _), (now, done) = self._samples[0], self._samples[-1]
        return max(0, self._total - done) / self.per_second if now - then >= _LEAST_MEASURED_S else None

    def text(self, *, percent: bool = True) -> str:
        """One line: how much, how fast, how long still."""
        done = self._samples[-1][1] if self._samples else 0
        parts = [size_text(done) if not self._total else f"{size_text(done)} of {size_text(self._total)}"]
        if self._total and percent:
            parts.insert(0, f"{min(100, done * 100 // self._total)}%")
        if self.per_second > 0:
            parts.append(f"{size_text(int(self.per_second))}/s")
        if self.seconds_left is not None:
            parts.append(f"{duration_text(self.seconds_left)} left")
        return "  ".join(parts)
