"""How much of the work is done: derived keys and unpacked chunks both count.

Strategy: arithmetic over what can be seen from time to time, without a look into the clock or at a thread.
What each of the two costs is learned from the time in which one was seen at work. Where the size of the
archive is not known, or not all of it is wanted, it is guessed from the data that the backup says its volumes
hold, and from how much of the archive the data took that has come.
"""

from dataclasses import dataclass

#: The whole work, in the unit in which progress is reported.
ALL = 1_000_000

#: Bytes of data that count as known already: at this ratio of the archive to them, and at this cost of
#: keys and of unpacking, in seconds for a byte, so that the first few do not decide.
_PRIOR, _RATIO, _DERIVING_S, _UNPACKING_S = 8 << 20, 0.6, 1e-8, 5e-9
#: Seconds between two looks that count at the most.
_LONGEST_S = 2.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen at the time `now`, in seconds of any clock. The rest is in bytes.

    `archive_size`: if it is known and all of it is wanted, otherwise 0; `position`: how much of it is dealt
    with. `unpacked`: of the chunks that were wanted; `ahead`: of those behind them whose keys are there, each
    key that is being derived as far as it is. `data` of the `expected` data has come. `deriving` and
    `unpacking`: is anybody at it?
    """

    now: float
    archive_size: int
    position: int
    unpacked: int
    ahead: float
    data: float
    expected: int
    deriving: bool
    unpacking: bool


class Meter:
    """Gets everything that is seen, in order."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._deriving_s = 0.0
        self._unpacking_s = 0.0
        self._derived_before = 0.0  # bytes whose keys nobody was seen to derive
        self._done = 0

    def done(self, seen: Seen) -> int | None:
        """How many of the `ALL` parts are done; it never falls. None: not known."""
        derived = seen.unpacked + seen.ahead
        if self._last is None:
            self._last, self._derived_before = seen.now, derived
        passed = min(seen.now - self._last, _LONGEST_S)
        self._last = seen.now
        self._deriving_s += passed * seen.deriving
        self._unpacking_s += passed * seen.unpacking
        if seen.archive_size:
            behind, total = seen.position, float(seen.archive_size)
        elif seen.expected:
            ratio = (seen.unpacked + _PRIOR * _RATIO) / (seen.data + _PRIOR)
            behind = seen.unpacked
            total = max(derived, behind + ratio * max(0.0, seen.expected - seen.data))
        else:
            return None
        derived_since = max(0.0, derived - self._derived_before)
        for_keys = (self._deriving_s + _PRIOR * _DERIVING_S) / (derived_since + _PRIOR)
        for_data = (self._unpacking_s + _PRIOR * _UNPACKING_S) / (seen.unpacked + _PRIOR)
        done = behind + seen.ahead * for_keys / (for_keys + for_data)
        self._done = max(self._done, min(ALL, int(done / max(total, 1) * ALL)))
        return self._done
