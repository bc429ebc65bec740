"""Which derivation a free lane takes next, and how much memory it gets.

Strategy: measured, four derivations in one vector register take little longer than one, and to store fewer
blocks costs less than to leave a lane empty; so memory is shared evenly among all lanes that have something
to do, and only then each share is used as well as it can be. Not better, though: memory that was never
touched is paid for page by page, so what a larger share saves can be less than it costs. Pure functions of
what is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

#: The index of the first stride with which more memory saves more than it costs on any machine: below, shares
#: of the same size are worth more than some larger ones.
_SLOW = 3

#: Seconds to mix one byte, with four lanes in AVX-512 on a processor of 2024.
_MIX_COST = 2e-10

#: Seconds to touch a byte for the first time. It is 0.15 s for a GiB on a machine that has its memory, and 1
#: to 3 s on a virtual one whose host has to find it first. This is between them: with either in its place the
#: next stride would be right, and the time a fifth less at most.
_PAGE_COST = 6.5e-10


@dataclass(frozen=True, slots=True)
class Situation:
    """What a thread sees that has a free lane. Memory in bytes.

    `sizes` is the memory of the first waiting derivation at each stride, `urgent` whether everything else
    waits for its key; `waiting` is how many wait, `running` how many run in all threads and `running_here`
    in this one, of `threads` with `lanes` each; `room` is what all arenas may take, `free` how much of it
    no running derivation takes. `least` is the index of the smallest stride that is worth new memory (see
    `least_stride`), `kept` the largest arena that is there and idle: to use that costs nothing. `avoiding`:
    it is not to run beside what is urgent in another thread, so a balance between the threads does not count.
    """

    sizes: Sequence[int]
    waiting: int
    running: int
    running_here: int
    threads: int
    lanes: int
    room: int
    free: int
    least: int = 0
    kept: int = 0
    urgent: bool = False
    avoiding: bool = False


def choose(situation: Situation) -> int | None:
    """The index of the stride with which to begin the first waiting derivation now; None: do not yet."""
    total = min(situation.running + situation.waiting, situation.threads * situation.lanes)
    if not situation.avoiding and situation.running_here >= -(-total // situation.threads):
        return None  # another thread has more room; two cores with one each beat one core with two
    share = situation.room // total
    if situation.urgent:
        # As soon as can be; but the rest is for those that come right behind it, even if none is there yet.
        share = situation.free // 2
    elif _index(situation, share) >= _SLOW:
        # What others took sparingly is for those that are still to begin.
        share = max(share, situation.free // max(1, total - situation.running))
    index = _index(situation, share)
    return index if situation.sizes[index] <= situation.free else None


def least_stride(strides: Sequence[int], uses: float) -> int:
    """The index of the smallest of the rising `strides` that is worth the new memory that it needs, if `uses`
    derivations run in it one after the other.

    With the stride s instead of 2s, a derivation of N blocks mixes N·s/2 blocks less (romix.h) and stores
    N/(2s) more: every byte saves s² bytes of mixing.
    """
    worth = (i for i, stride in enumerate(strides) if stride * stride * _MIX_COST * uses >= _PAGE_COST)
    return next(worth, len(strides) - 1)


def _index(situation: Situation, share: int) -> int:
    """The best stride for which `share` suffices, and that is worth it; the last if there is none."""
    for index, size in enumerate(situation.sizes):
        if size <= share and (index >= situation.least or size <= situation.kept):
            return index
    return len(situation.sizes) - 1
