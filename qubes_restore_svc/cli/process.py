"""The frame around a command: safe standard streams, signals, and an exit status for every kind of end.

Strategy: a command is a function that returns its status or raises. Its error is told here, in one way for
all commands, and only here the process ends.

One handler takes Ctrl-C, and the other signals that ask a program to end, for the whole life of the command.
So there is no moment at which a signal would kill it with something half done. What a signal does depends on
where the command is: before the job it raises Cancelled, during the job it cancels it, and from its end until
`resume` it does nothing, because then a report is written that says what has happened.
"""

import asyncio
import contextlib
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Coroutine, Iterator, Sequence
from types import FrameType
from typing import Any, Never, TypeVar

from qubes_restore_svc.cli.terminal import print_result, say, say_wrapped
from qubes_restore_svc.errors import Cancelled, ExitStatus, RestoreError, unforeseen
from qubes_restore_svc.hardening import prepare_process

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


def carry_out(program: str, work: Callable[[Interruption], int]) -> Never:
    """Do `work` and exit with its status. `program` is what its messages begin with."""
    prepare_process()
    interruption = Interruption()
    interruption.install()
    status = _status(program, work, interruption)
    interruption.finish()
    # If the help or the version could not be written, that shows only now.
    if print_result(program, "", end="") is False and status == ExitStatus.COMPLETE:
        status = ExitStatus.NOTHING
    sys.exit(status)


def last_resort(program: str, error: Exception, words: Sequence[str]) -> int:
    """Say what was not provided for, in a line; with -v also where it came from. The exit status."""
    # If there can be no event loop, Python complains about tasks that could not begin.
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None
    if {"-v", "--verbose"} & set(words):
        say("".join(traceback.format_tb(error.__traceback__)).rstrip())
    say_wrapped(f"{program}: {unforeseen(error)}")
    return ExitStatus.NOTHING


def _status(program: str, work: Callable[[Interruption], int], interruption: Interruption) -> int:
    try:
        return work(interruption)
    except RestoreError as error:
        say_wrapped("cancelled" if isinstance(error, Cancelled) else f"{program}: {error}")
        return error.exit_status
    except SystemExit as end:  # argparse: help, version, a mistake in the arguments
        return end.code if isinstance(end.code, int) else ExitStatus.USAGE
    except Exception as error:  # noqa: BLE001 - the last one that can say it in words
        return last_resort(program, error, sys.argv[1:])
