"""What the threads of the worker share: the signal that stops them, and the way from a failure to an error
message.

Strategy: if a thread died without a word, the others would wait for ever. So each of them catches everything
at its outermost place, and `as_restore_error` makes of it an error that can be sent. Errors of the archive
are such errors already. If a resource has run out, the error says which one. Everything else is a mistake of
this program; it is named by its type only, because its text might quote what is secret, or what the archive
says.
"""

import sys
import threading
import traceback
from collections.abc import Callable

from qubes_restore_svc.errors import BudgetTooSmall, Cancelled, RestoreError, exhausted


class Stop:
    """The signal that ends a session. It is given once, to all threads, and never taken back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said = False
        self._wakers: list[Callable[[], object]] = []

    def check(self) -> None:
        """Raise Cancelled if the signal was given."""
        if self._said:
            raise Cancelled("the restore was cancelled")

    @property
    def said(self) -> bool:
        """Was it given?"""
        return self._said

    def wakes(self, waker: Callable[[], object]) -> None:
        """Call `waker` when the signal is given (at once if it was), for a thread that cannot `check`."""
        with self._lock:
            if not self._said:
                self._wakers.append(waker)
                return
        waker()

    def say(self) -> None:
        """Stop; from any thread."""
        with self._lock:
            self._said = True
            wakers, self._wakers = self._wakers, []
        for waker in wakers:
            waker()


def as_restore_error(error: BaseException) -> RestoreError:
    """The error to report for `error`; for a mistake of this program, where it happened goes to stderr.

    It is always a new one, fit to be kept: the traceback of the old one holds all frames that it came
    through, and with them the chunk in which it was found.
    """
    if isinstance(error, RestoreError):
        return type(error)(
            error.reason, qube=error.qube, volume=error.volume, chunk=error.chunk, advice=error.advice
        )
    if isinstance(error, MemoryError):
        return BudgetTooSmall(
            "the system has less memory than the worker was told it may use",
            advice="Close other programs, or give --memory MIB with a smaller number.",
        )
    found = exhausted(error, "in the worker")
    if found is not None:
        return found
    traceback.print_tb(error.__traceback__)
    print(type(error).__name__, file=sys.stderr, flush=True)  # noqa: T201 - the worker's log
    return RestoreError(
        f"the worker failed ({type(error).__name__})",
        advice="This is a mistake of the program; please report it.",
    )
