"""How far a restore is, how fast it goes and how long it still takes, as a display needs it.

Strategy: plain arithmetic on what the broker tells. If the size of the archive is known, progress is measured
in its bytes; otherwise in bytes of the images that are to come, of which some are only estimated. In either
case the end is reached when the broker says so, and not before.
"""

import time
from collections.abc import Callable

from qubes_restore_svc.cli.progress import Rate
from qubes_restore_svc.cli.tables import duration_text, size_text
from qubes_restore_svc.wire import restore_call as c

#: What is shown at most while it still goes on.
_NEARLY = 0.99
#: Seconds that must have been measured before a rate is told.
_LEAST_MEASURED_S = 3.0


class Progress:
    """The progress of one plan (None: of nothing that is known). `clock` counts seconds."""

    def __init__(self, plan: c.Plan | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._by_archive = plan is not None and bool(plan.archive_size)
        total = None if plan is None else plan.archive_size or _image_bytes(plan)
        self.total: int | None = total or None  #: bytes; None: not known
        self.done = 0  #: bytes
        self._clock = clock
        self._first: float | None = None  # when anything was added
        self._measured_s = 0.0
        self._rate = Rate(self.total)

    def add(self, archive_bytes: int, image_bytes: int) -> None:
        """So much is behind us; it never goes backwards."""
        self.done = max(self.done, archive_bytes if self._by_archive or not self.total else image_bytes)
        now = self._clock()
        self._first = now if self._first is None else self._first
        self._measured_s = now - self._first
        self._rate.add(now, self.done)

    @property
    def fraction(self) -> float | None:
        """0 to 0.99; None if it cannot be told."""
        return None if self.total is None else min(_NEARLY, self.done / self.total)

    @property
    def amount_text(self) -> str:
        """How much, and how fast: `1.2 GiB of 4.0 GiB, 80 MiB/s`."""
        parts = []
        if self.done and self.total is None:
            parts.append(size_text(self.done))
        elif self.done and self.total is not None:
            parts.append(f"{size_text(min(self.done, self.total))} of {size_text(self.total)}")
        if self._measured_s >= _LEAST_MEASURED_S and self._rate.per_second > 0:
            parts.append(f"{size_text(int(self._rate.per_second))}/s")
        return ", ".join(parts)

    @property
    def left_text(self) -> str:
        """How long it still takes, as a guess: `about 4 min left`; empty while there is none."""
        left = self._rate.seconds_left
        if left is None:
            return ""
        return f"about {duration_text(_rounded(left))} left" if left >= 10 else "a few seconds left"


def _image_bytes(plan: c.Plan) -> int:
    """The size of all images that are to come; where the backup does not say, what they took on disk."""
    return sum(
        sum(volume.size or 0 for volume in qube.volumes)
        if all(volume.size is not None for volume in qube.volumes)
        else qube.backup_size
        for qube in plan.taken
    )


def _rounded(seconds: float) -> float:
    """A guess is not told to the second: a number that jumps says less than one that stands."""
    step = 5 if seconds < 60 else 30 if seconds < 600 else 60
    return max(step, round(seconds / step) * step)
