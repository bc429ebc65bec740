"""The cost of each stage of a chain of generators, in one thread.

Strategy: exactly one stage runs at any moment. Whoever is about to work for a stage says so, and says when
it is through; what the clock has moved in between belongs to it, less what was said of others meanwhile. So
the stages add up to the whole, whatever the order in which they ask each other.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

_T = TypeVar("_T")


class Meter:
    """Seconds by stage, in `seconds`; `clock` is this thread's CPU time."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._stage = ""
        self._since = clock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens inside is the work of the stage `name`."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def through(self, name: str, items: Iterable[_T]) -> Iterator[_T]:
        """`items`, each of them made by the stage `name`."""
        iterator = iter(items)
        while True:
            outer = self._switch(name)
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._switch(outer)
            yield item

    def _switch(self, stage: str) -> str:
        now = self._clock()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        previous, self._stage, self._since = self._stage, stage, now
        return previous
