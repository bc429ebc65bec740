"""Between the plan and the restore: the person sees what will happen, and says yes or no.

Strategy: the table is the result so far, on standard output; what is to be said about it, and the question,
go to standard error. As in the stock command, a restore that does not fit this system, and for which no
option says how it is to be made to fit, is refused as a whole; but all that does not fit is told at once.

The question does not hold up the event loop: the terminal collects the line by itself, and the loop is told
when it is there. So a cancel ends the waiting at once, and no thread is left that waits for a key. What was
typed before the question was there is no answer to it.
"""

import asyncio
import contextlib
import os
import sys
import termios
from dataclasses import dataclass

from qubes_restore_svc.cli.displays import Display
from qubes_restore_svc.cli.qvm_arguments import RestoreArguments
from qubes_restore_svc.cli.tables import listed, names_with, plan_table, settings_left_behind, takes_dom0_home
from qubes_restore_svc.cli.terminal import QuietStream, print_result, say, say_wrapped, width_of
from qubes_restore_svc.errors import Cancelled, RestoreError
from qubes_restore_svc.wire.restore_call import Plan, Problem

_QUESTION = "Do you want to proceed?"
_LONGEST_ANSWER = 1024

_DOM0_NOTE = (
    "NOTE: dom0's home comes as one archive file, in a new directory 'home-restore-<current time>' in the"
    " home directory here. It is not unpacked: move it to a qube that you trust it with, and look at it"
    " there."
)


@dataclass(frozen=True, slots=True)
class _Misfit:
    """A kind of qube that does not fit: what is wrong, what settles it, and what an option made of it."""

    problem: Problem
    statement: str
    remedy: str
    settled: str


_MISSING_REMEDY = (
    "Install or restore it first. Or use --skip-broken to leave such qubes out, or --ignore-missing to give"
    " them the default template or netvm."
)
_MISFITS = (
    _Misfit(
        "already-exists",
        "*** There are qubes of the same names here: {names} ***",
        "Remove or rename them first. Or use --skip-conflicting to restore only what is not here yet, or"
        " --rename-conflicting to restore those qubes under other names, with numbers at the end.",
        "Those in the backup will not be restored. Those here stay as they are.",
    ),
    _Misfit(
        "missing-template",
        "*** There is no matching template for: {names} ***",
        _MISSING_REMEDY,
        "They will not be restored.",
    ),
    _Misfit(
        "missing-netvm",
        "*** There is no matching netvm for: {names} ***",
        _MISSING_REMEDY,
        "They will not be restored.",
    ),
    _Misfit(
        "username-mismatch",
        "*** The user name in the backup is not the one here! This can break some settings. ***",
        "Leave dom0's home out, or use --ignore-username-mismatch to restore it all the same.",
        "",
    ),
)


class PlanReview:
    """Shows the plan and asks; to be awaited with it. `seen`: there is a plan; `accepted`: it may be done."""

    def __init__(self, program: str, arguments: RestoreArguments, display: Display) -> None:
        self.seen = False
        self.accepted = False
        self._program = program
        self._arguments = arguments
        self._display = display

    async def __call__(self, plan: Plan) -> None:
        """Raises Cancelled for a no, and another RestoreError for a plan that does not fit."""
        self.seen = True
        with self._display.paused():
            talks = self._arguments.must_ask or self._arguments.loudness >= 0
            if talks:
                self._show(plan)
            self._refuse_misfits(plan, quiet=not talks)
            if plan.excess is not None and not self._arguments.verify_only:
                raise plan.excess.to_error()
            if talks:
                self._say_what_follows(plan)
            if plan.taken and self._arguments.must_ask and not await ask(_QUESTION):
                raise Cancelled("the answer was no", advice="")
        self.accepted = True

    def _show(self, plan: Plan) -> None:
        table = plan_table(plan, width_of(sys.stdout))
        # Nobody can agree to what he has not seen: a reader that has gone away has not shown it.
        if not print_result(self._program, f"{table}\n") and self._arguments.must_ask:
            say(f"{table}\n")

    def _refuse_misfits(self, plan: Plan, *, quiet: bool) -> None:
        found, open_ones = [], []
        for misfit in _MISFITS:
            names = names_with(misfit.problem, plan)
            if not names:
                continue
            found.append(misfit)
            settled = self._is_settled(misfit.problem)
            if not settled:
                open_ones.append(misfit)
            if not (settled and quiet and plan.taken):
                say_wrapped(misfit.statement.format(names=listed(names)))
                say_wrapped(misfit.settled if settled else misfit.remedy)
        if open_ones:
            raise _refusal(plan, open_ones[0].problem)
        if found and not plan.taken:
            raise RestoreError("nothing is left that could be restored", advice="")

    def _is_settled(self, problem: Problem) -> bool:
        """Has the person said what is to become of such qubes? If that does not help, they are left out."""
        if problem == "already-exists":
            return self._arguments.skip_conflicting
        if problem == "username-mismatch":
            return False
        return self._arguments.missing != "refuse"

    def _say_what_follows(self, plan: Plan) -> None:
        if not plan.taken:
            return
        if self._arguments.verify_only:
            say_wrapped("These qubes will be verified. Nothing is created or changed.")
            return
        for line in settings_left_behind(plan, everything=self._arguments.loudness > 0):
            say_wrapped(line)
        if takes_dom0_home(plan):
            say_wrapped(_DOM0_NOTE)
        count = sum(planned.klass != "AdminVM" for planned in plan.taken)
        if count:
            which = f"{count} of them" if count < len(plan.qubes) else "The above qubes"
            say_wrapped(f"{which} will be added to your system. No qube that is here is removed or changed.")


def _refusal(plan: Plan, problem: Problem) -> RestoreError:
    """The error that ends the restore, of the kind that the qubes' own errors have."""
    cause = next(planned.error for planned in plan.qubes if planned.problem == problem)
    kind = RestoreError if cause is None else type(cause.to_error())
    return kind(
        "the backup does not fit this system as it is, so nothing was restored",
        advice="What does not fit, and which option settles it, is told above.",
    )


# --- The question --------------------------------------------------------------------------------


def can_ask() -> bool:
    """Is somebody there to answer?"""
    return os.isatty(0)


async def ask(question: str) -> bool:
    """Ask on the terminal, which standard input is; True only for a whole line that says yes."""
    with contextlib.suppress(termios.error):
        termios.tcflush(0, termios.TCIFLUSH)
    stream = QuietStream()
    stream.write(f"{question} [y/N] ")
    stream.flush()
    line = b""
    try:
        line = await _line()
    finally:
        if not line.endswith(b"\n"):  # nobody has ended the line on the screen
            say("")
    return line.lower().strip() in (b"y", b"yes") and line.endswith(b"\n")


async def _line() -> bytes:
    """What the terminal has, once it has something: a line, or nothing at the end of input."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(0, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(0)
    try:
        return os.read(0, _LONGEST_ANSWER)
    except OSError:  # the terminal is gone
        return b""
