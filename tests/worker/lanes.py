"""An engine with lanes and strides whose derivations end when a test says so, and whose memory only counts.

Strategy: it behaves as the native engine does towards scheduler and budget: memory stays with it, idle, after
a derivation, and goes when a later one needs the room. The key of a request is its passphrase's number.
"""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from qubes_restore_svc.kdf.engine import KdfParameters, KdfRequest

from .support import PATIENCE_S


class LanesEngine:
    """A KdfEngine; `trouble` maps the number of a request to what is raised when it begins or is advanced."""

    name = "lanes"

    def __init__(self, lanes: int = 4, strides: Sequence[int] = (1, 2, 4)) -> None:
        self.lanes = lanes
        self.lanes_for_one = self.lanes_for_few = lanes
        self.step_times = {lanes: 1.0}
        self.strides = strides
        self.changed = threading.Condition()
        self.running: dict[int, int] = {}  #: number of the request: bytes
        self.begun: list[tuple[int, int]] = []  #: numbers and strides, in their order
        self.threads: dict[int, str] = {}  #: which thread began it
        self.idle: list[int] = []
        self.done: set[int] = set()
        self.trouble_in_begin: dict[int, BaseException] = {}
        self.trouble_in_advance: dict[int, BaseException] = {}
        self.trouble_in_open: list[BaseException] = []
        self.most_held = 0
        self.turns = 0

    @property
    def memory_held(self) -> int:
        with self.changed:
            return sum(self.running.values()) + sum(self.idle)

    @property
    def memory_idle(self) -> int:
        with self.changed:
            return sum(self.idle)

    @property
    def largest_idle(self) -> int:
        with self.changed:
            return max(self.idle, default=0)

    def memory(self, parameters: KdfParameters, stride: int = 1) -> int:
        return -(-parameters.memory // stride)

    def advances(self, parameters: KdfParameters, stride: int) -> float:
        return self.turns

    def trim(self, keep: int = 0) -> int:
        with self.changed:
            before = sum(self.idle)
            while self.idle and sum(self.running.values()) + sum(self.idle) > keep:
                self.idle.remove(max(self.idle))
            return before - sum(self.idle)

    def open_lanes(self) -> "ManualLanes":
        if self.trouble_in_open:
            raise self.trouble_in_open.pop(0)
        return ManualLanes(self)

    def derive(self, requests: Sequence[KdfRequest]) -> list[bytes]:
        raise NotImplementedError

    def turns_without_change(self, count: int) -> None:
        """Wait until lanes have been advanced so often."""
        with self.changed:
            until = self.turns + count
            assert self.changed.wait_for(lambda: self.turns >= until, PATIENCE_S)

    def finish(self, *numbers: int) -> None:
        """Let these derivations end."""
        with self.changed:
            self.done.update(numbers)
            self.changed.notify_all()


class ManualLanes:
    """The lanes of one thread."""

    def __init__(self, engine: LanesEngine) -> None:
        self._engine = engine
        self._mine: set[int] = set()

    @property
    def free(self) -> int:
        return self._engine.lanes - len(self._mine)

    def take_over(self, other: Self, ticket: int) -> int:
        assert self.free and ticket in other._mine
        other._mine.remove(ticket)
        self._mine.add(ticket)
        self._engine.threads[ticket] = threading.current_thread().name
        return ticket

    def begin(self, request: KdfRequest, stride: int, limit: int) -> int | None:
        engine, number = self._engine, int(request.passphrase)
        assert self.free and stride in engine.strides
        if number in engine.trouble_in_begin:
            raise engine.trouble_in_begin[number]
        size = engine.memory(request.parameters, stride)
        engine.trim(limit - size)
        with engine.changed:
            held = sum(engine.running.values()) + sum(engine.idle) + size
            if held > limit:
                return None
            engine.running[number] = size
            engine.begun.append((number, stride))
            engine.threads[number] = threading.current_thread().name
            engine.most_held = max(engine.most_held, held)
        self._mine.add(number)
        return number

    def advance(self) -> list[tuple[int, bytes]]:
        engine = self._engine
        with engine.changed:
            engine.turns += 1
            engine.changed.notify_all()
            for number in self._mine & engine.trouble_in_advance.keys():
                raise engine.trouble_in_advance[number]
            engine.changed.wait_for(lambda: self._mine & engine.done, 0.002)
            ended = sorted(self._mine & engine.done)
            for number in ended:
                self._give_back(number)
        return [(number, bytes([number % 256]) * 64) for number in ended]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with self._engine.changed:
            for number in list(self._mine):
                self._give_back(number)

    def _give_back(self, number: int) -> None:
        self._mine.remove(number)
        self._engine.idle.append(self._engine.running.pop(number))
