"""Which derivation a free lane takes next, and how much memory it gets.

Strategy: measured, four derivations in one vector register take little longer than one, and to store fewer
blocks costs less than to leave a lane empty; so memory is shared evenly among all lanes that have something
to do, and only then each share is used as well as it can be. A pure function of what is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Situation:
    """What a thread sees that has a free lane. Memory in bytes.

    `sizes` is the memory of the first waiting derivation at each stride, `waiting` how many wait, `running`
    how many run in all threads and `running_here` in this one, of `threads` with `lanes` each; `room` is
    what all arenas may take, `free` how much of it no running derivation takes.
    """

    sizes: Sequence[int]
    waiting: int
    running: int
    running_here: int
    threads: int
    lanes: int
    room: int
    free: int


def choose(situation: Situation) -> int | None:
    """The index of the stride with which to begin the first waiting derivation now; None: do not yet."""
    total = min(situation.running + situation.waiting, situation.threads * situation.lanes)
    if situation.running_here >= -(-total // situation.threads):
        return None  # another thread has more room; two cores with one each beat one core with two
    fair = situation.room // total
    still_to_begin = max(1, total - situation.running)
    share = max(fair, situation.free // still_to_begin)
    if situation.running < situation.threads:
        # The first ones (header, qubes.xml) are what everything behind them waits for. More than is free
        # would be no share at all: nobody would begin.
        share = max(share, min(2 * share, situation.free))
    smallest = len(situation.sizes) - 1
    index = next((i for i, size in enumerate(situation.sizes) if size <= share), smallest)
    return index if situation.sizes[index] <= situation.free else None
