"""Ctrl-C, and the other signals that ask a program to end.

Strategy: one handler for the whole life of the command, so that there is no moment at which a signal would
kill it with something half done. What a signal does depends on where the command is: before the job it
raises Cancelled, during the job it cancels it, and from its end until `resume` it does nothing, because then
a report is written that says what has happened.
"""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, TypeVar

from qubes_restore_svc.errors import Cancelled

_T = TypeVar("_T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: Seconds after which a cancelled job that still clears up says so: a cancel is answered within two.
ANSWER_S = 1.0


def _raise_cancelled() -> None:
    raise Cancelled("it was cancelled", advice="")


class Interruption:
    """To be installed once, in the main thread, for as long as the process lives.

    A signal that is ignored from the start, as `nohup` makes it, stays ignored.
    """

    def __init__(self) -> None:
        self._act: Callable[[], None] = _raise_cancelled
        self._taken: list[signal.Signals] = []

    def install(self) -> None:
        """From now on signals do what is said above."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._taken.append(number)
                signal.signal(number, self._received)

    def finish(self) -> None:
        """Nothing is left to be interrupted: the interpreter can end undisturbed, with the right status."""
        for number in self._taken:
            signal.signal(number, signal.SIG_IGN)

    def run(self, work: Coroutine[Any, Any, _T], still_ending: Callable[[], None] = lambda: None) -> _T:
        """Run the job in an event loop of its own. The first signal cancels it, and then it may clean up.

        `still_ending` is called, once, when that takes longer than a moment: somebody waits for an answer.
        Raises Cancelled if it does not come back with a result all the same. Signals do nothing
        afterwards, until `resume`.
        """
        requested = False
        wake: Callable[[], None] | None = None

        def request() -> None:
            nonlocal requested
            requested = True
            if wake is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: the job has ended
                    wake()

        async def guarded() -> _T:
            nonlocal wake
            task = asyncio.ensure_future(work)
            loop = asyncio.get_running_loop()

            def stop() -> None:
                if not task.cancelling():
                    task.cancel()
                    loop.call_later(ANSWER_S, still_ending)

            def wake_loop() -> None:
                loop.call_soon_threadsafe(stop)

            wake = wake_loop
            if requested:
                stop()
            try:
                return await task
            except asyncio.CancelledError:
                raise Cancelled("it was cancelled", advice="") from None

        self._act = request
        try:
            return asyncio.run(guarded())
        finally:
            self.hold()

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """For a question within the job that keeps its event loop waiting: a signal raises Cancelled."""
        before, self._act = self._act, _raise_cancelled
        try:
            yield
        finally:
            self._act = before

    def hold(self) -> None:
        """Signals do nothing until `resume`."""
        self._act = lambda: None

    def resume(self) -> None:
        """What had to be finished is: from now on a signal raises Cancelled again."""
        self._act = _raise_cancelled

    def _received(self, number: int, frame: FrameType | None) -> None:
        self._act()
