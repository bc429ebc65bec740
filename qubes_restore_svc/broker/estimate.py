"""How fast a restore is, and how long it still takes: from what the worker says is done, and from the clock.

Strategy: the worker says how much is done. The type bounds that number. If it is wrong, it can only cause
wrong figures. The highest number so far counts. The rate is measured over the last part of the restore; the
longer the restore has run, the longer is that part. So one slow stretch is neither forgotten nor
extrapolated. A new guess moves the shown guess by a part of the difference, and the time that passes reduces
it.
"""

from collections import deque

from qubes_restore_svc.wire.messages import Progress
from qubes_restore_svc.wire.names import MAX_COUNT
from qubes_restore_svc.wire.report import RestoreProgress

_ALL = 1_000_000
#: Seconds, and millionths of the work, that must have been measured before anything is guessed from them.
_LEAST_S, _LEAST_DONE = 3.0, 5_000
#: Seconds over which it is measured at the least and at the most; in between it is half of the time so far.
_SHORTEST_S, _LONGEST_S = 15.0, 600.0
#: The part of the time left in which a new guess takes the place of the old one, and seconds at the least.
_SETTLING, _LEAST_SETTLING_S = 0.2, 1.0
#: The most that is shown before the end.
_NEARLY = 99


class Estimate:
    """Gets the worker's progress, in order; each time it returns what to show."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, int]] = deque()  # time, bytes of the archive, what is done
        self._began: float | None = None
        self._left: float | None = None

    def of(self, progress: Progress, now: float) -> RestoreProgress:
        """What to show at the time `now`, in seconds of any clock."""
        last, archive_bytes, done = self._samples[-1] if self._samples else (now, 0, 0)
        archive_bytes, done = max(archive_bytes, progress.archive_bytes), max(done, progress.done or 0)
        self._began = now if self._began is None else self._began
        self._samples.append((now, archive_bytes, done))
        window_s = min(_LONGEST_S, max(_SHORTEST_S, (now - self._began) / 2))
        while len(self._samples) > 2 and now - self._samples[1][0] >= window_s:
            self._samples.popleft()
        then, bytes_then, done_then = self._samples[0]
        measured_s = now - then
        self._guess(now - last, (done - done_then) / measured_s if measured_s >= _LEAST_S else 0.0, done)
        per_second = (archive_bytes - bytes_then) / measured_s if measured_s >= _LEAST_S else 0.0
        return RestoreProgress(
            archive_bytes=archive_bytes,
            image_bytes=progress.image_bytes,
            percent=None if progress.done is None and not done else min(_NEARLY, done * 100 // _ALL),
            per_second=int(per_second),
            seconds_left=None if self._left is None else min(MAX_COUNT, round(self._left)),
        )

    def _guess(self, passed_s: float, rate: float, done: int) -> None:
        if rate <= 0 or done < _LEAST_DONE:
            return
        left = (_ALL - done) / rate
        if self._left is None:
            self._left = left
            return
        self._left = max(0.0, self._left - passed_s)
        settling_s = max(_LEAST_SETTLING_S, _SETTLING * min(left, self._left))
        self._left += (left - self._left) * min(1.0, passed_s / settling_s)
