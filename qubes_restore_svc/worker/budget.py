"""The memory budget: chunk buffers plus key derivations, in real bytes, against one limit.

Strategy: a chunk is admitted when there is room for it, and while room stays for the largest derivation
that waits or runs. So whatever was admitted can always be derived in the end, one at a time if need be, and
there is no order of events in which everybody waits. Derivations start in archive order, in which the
chunks are wanted.
"""

import threading

from qubes_restore_svc.errors import BudgetTooSmall, Cancelled

MIB = 1 << 20


class Budget:
    """`limit` bytes, shared by all threads of the pipeline; at most `max_chunks` chunks are held."""

    def __init__(self, limit: int, max_chunks: int) -> None:
        self.limit = limit
        self._max_chunks = max_chunks
        self._changed = threading.Condition()
        self._chunks: list[int] = []
        self._waiting: list[int] = []
        self._running: list[int] = []
        self._cancelled = False

    def check(self, size: int, derivation: int) -> None:
        """Raise BudgetTooSmall if a chunk of `size` bytes and its `derivation` bytes can never fit."""
        if size + derivation > self.limit:
            need = -(-(size + derivation) // MIB)
            raise BudgetTooSmall(
                f"one key derivation of this backup takes {derivation // MIB} MiB, with its chunk {need} MiB,"
                f" and the worker may use {self.limit // MIB} MiB",
                advice=f"Grant it at least that much: --memory {need}.",
            )

    def admit(self, size: int, derivation: int) -> None:
        """Wait until a chunk of `size` bytes can be held and derived, and count it.

        `derivation` is the memory of its key derivation in bytes. Ends with `release`. Raises
        BudgetTooSmall if it can never be, Cancelled after `cancel`.
        """
        self.check(size, derivation)
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or self._admissible(size, derivation))
            self._stop_if_cancelled()
            self._chunks.append(size)
            self._waiting.append(derivation)

    def start_derivation(self, memory: int) -> None:
        """Wait for the `memory` of the derivation of a chunk that was admitted, and take it."""
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or self._used() + memory <= self.limit)
            self._waiting.remove(memory)
            self._stop_if_cancelled()
            self._running.append(memory)

    def end_derivation(self, memory: int) -> None:
        """Give back what `start_derivation` took."""
        with self._changed:
            self._running.remove(memory)
            self._changed.notify_all()

    def forget_derivation(self, memory: int) -> None:
        """A chunk that was admitted will not be derived after all."""
        with self._changed:
            self._waiting.remove(memory)
            self._changed.notify_all()

    def release(self, size: int) -> None:
        """A chunk of `size` bytes is held no more."""
        with self._changed:
            self._chunks.remove(size)
            self._changed.notify_all()

    def cancel(self) -> None:
        """Make everyone who waits, or will wait, stop with Cancelled."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    @property
    def used(self) -> int:
        """Bytes counted now."""
        with self._changed:
            return self._used()

    def _admissible(self, size: int, derivation: int) -> bool:
        largest = max([derivation, *self._waiting, *self._running])
        return (
            len(self._chunks) < self._max_chunks
            and sum(self._chunks) + size + largest <= self.limit
            and self._used() + size <= self.limit
        )

    def _used(self) -> int:
        return sum(self._chunks) + sum(self._running)

    def _stop_if_cancelled(self) -> None:
        if self._cancelled:
            raise Cancelled("the restore was cancelled")
