"""Between the plan and the restore: the person sees what will happen, and says yes or no.

Strategy: the table is the result so far, on standard output; what is to be said about it, and the question,
go to standard error, what does not fit first. As in the stock command, a restore that does not fit this
system, and for which no option says how it is to be made to fit, is refused as a whole; but all that does not
fit is told at once, and where somebody is asked anyway, he is asked what is to become of it. Another plan is
made from the answers, and shown.

The question does not hold up the event loop: the terminal collects the line by itself, and the loop is told
when it is there. So a cancel ends the waiting at once, and no thread is left that waits for a key. What was
typed before the question was there is no answer to it.
"""

import asyncio
import contextlib
import os
import sys
import termios
from collections.abc import Sequence

from qubes_restore_svc.cli.displays import Display
from qubes_restore_svc.cli.qvm_arguments import NONE, RestoreArguments
from qubes_restore_svc.cli.tables import listed, names_with, plan_table, settings_left_behind, takes_dom0_home
from qubes_restore_svc.cli.terminal import QuietStream, print_result, say, say_wrapped, width_of
from qubes_restore_svc.errors import Cancelled, RestoreError
from qubes_restore_svc.wire.names import is_qube_name
from qubes_restore_svc.wire.restore_call import (
    Choice,
    Offers,
    Plan,
    PlanQube,
    Problem,
    QubeChoice,
    Settlement,
)

_QUESTION = "Do you want to proceed?"
_LONGEST_ANSWER = 1024

_DOM0_NOTE = (
    "NOTE: dom0's home comes as one archive file, in a new directory 'home-restore-<current time>' in the"
    " home directory here. It is not unpacked: move it to a qube that you trust it with, and look at it"
    " there."
)


#: The sentence about qubes that do not fit, for each problem.
_MISFITS: dict[Problem, str] = {
    "already-exists": "There are qubes of the same names here: {names}",
    "missing-template": "There is no matching template for: {names}",
    "missing-netvm": "There is no matching netvm for: {names}",
    "username-mismatch": "The user name in the backup is not the one here! This can break some settings.",
}
_COMPARED = (
    "These qubes will be compared with those here. Their volumes are cloned for that, one qube at a time, and"
    " the clones are removed. No qube that is here is changed."
)

#: The sentence about qubes that are left out.
_LEFT_OUT: dict[Problem, str] = {
    "already-exists": "Those in the backup will not be restored. Those here stay as they are."
}


class PlanReview:
    """Shows the plan and asks the person; await it with the plan. `seen`: there is a plan; `accepted`: it may
    be carried out.

    The plan was made from `choice`.
    """

    def __init__(
        self, program: str, arguments: RestoreArguments, display: Display, choice: Choice | None = None
    ) -> None:
        self.seen = False
        self.accepted = False
        self._choice = Choice() if choice is None else choice
        self._program = program
        self._arguments = arguments
        self._display = display

    async def __call__(self, plan: Plan) -> Choice | None:
        """None if the plan may be carried out; else what another one is to be made from.

        Raises Cancelled for a no, and another RestoreError for a plan that does not fit.
        """
        self.seen = True
        with self._display.paused():
            talks = self._arguments.must_ask or self._arguments.loudness >= 0
            open_ones = self._tell_misfits(plan, quiet=not talks)
            if talks:
                self._show(plan)
            if open_ones:
                asked = self._arguments.must_ask
                choice = await settled(self._choice, open_ones, plan.offers) if asked else None
                if choice is None:
                    raise _refusal(open_ones[0])
                self._choice = choice
                return choice
            if plan.excess is not None and self._arguments.mode == "restore":
                raise plan.excess.to_error()
            if talks:
                self._say_what_follows(plan)
            if plan.taken and self._arguments.must_ask and not await ask(_QUESTION):
                raise Cancelled("the answer was no", advice="")
        self.accepted = True
        return None

    def _show(self, plan: Plan) -> None:
        table = plan_table(plan, width_of(sys.stdout))
        # Nobody can agree to what he has not seen: a reader that has gone away has not shown it.
        if not print_result(self._program, f"{table}\n") and self._arguments.must_ask:
            say(f"{table}\n")

    def _tell_misfits(self, plan: Plan, *, quiet: bool) -> list[PlanQube]:
        """Say what does not fit; those that nobody has said about what is to become of them."""
        found, open_ones = False, list[PlanQube]()
        for problem, statement in _MISFITS.items():
            those = [qube for qube in plan.qubes if qube.problem == problem]
            still = [qube for qube in those if not self._is_settled(qube)]
            found, open_ones = found or bool(those), open_ones + still
            if not those or (not still and quiet and plan.taken):
                continue
            say_wrapped(f"*** {statement.format(names=listed([qube.name for qube in still or those]))} ***")
            if not still:
                say_wrapped(_LEFT_OUT.get(problem, "They will not be restored."))
            advice: dict[str, list[str]] = {}
            for qube in still:
                advice.setdefault("" if qube.error is None else qube.error.advice, []).append(qube.name)
            for text, names in advice.items():
                say_wrapped(text if len(advice) == 1 else f"{listed(names)}: {text}")
        if found and not open_ones and not plan.taken and not names_with("already-restored", plan):
            raise RestoreError("nothing is left that could be restored", advice="")
        return open_ones

    def _is_settled(self, qube: PlanQube) -> bool:
        """Has the person said what is to become of it? If the default does not help, it is left out."""
        if qube.decision == "leave-out":
            return True
        chosen = [self._choice.template, self._choice.netvm, *self._choice.qubes]
        defaults = self._arguments.missing == "default" and not any(one is not None for one in chosen)
        return defaults and qube.problem in ("missing-template", "missing-netvm")

    def _say_what_follows(self, plan: Plan) -> None:
        if not plan.taken:
            return
        if self._arguments.verify_only:
            say_wrapped("These qubes will be verified. Nothing is created or changed.")
            return
        if self._arguments.compare:
            say_wrapped(_COMPARED)
            return
        for line in settings_left_behind(plan, everything=self._arguments.loudness > 0):
            say_wrapped(line)
        if takes_dom0_home(plan):
            say_wrapped(_DOM0_NOTE)
        count = sum(planned.klass != "AdminVM" for planned in plan.taken)
        if count:
            which = f"{count} of them" if count < len(plan.qubes) else "The above qubes"
            say_wrapped(f"{which} will be added to your system. No qube that is here is removed or changed.")


def _refusal(qube: PlanQube) -> RestoreError:
    """The error that ends the restore, of the kind that the qube's own error has."""
    kind = RestoreError if qube.error is None else type(qube.error.to_error())
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
    return (await answer(f"{question} [y/N] ") or "").lower() in ("y", "yes")


async def answer(question: str) -> str | None:
    """What the person answers, without space around it; None if that is no whole line."""
    with contextlib.suppress(termios.error):
        termios.tcflush(0, termios.TCIFLUSH)
    stream = QuietStream()
    stream.write(question)
    stream.flush()
    line = b""
    try:
        line = await _line()
    finally:
        if not line.endswith(b"\n"):  # nobody has ended the line on the screen
            say("")
    return line.decode(errors="replace").strip() if line.endswith(b"\n") else None


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


# --- What is to become of qubes that do not fit ----------------------------------------------------

#: How a person says it, and what it means.
_ANSWERS: dict[Settlement, str] = {
    "new-name": "another name",
    "template": "the name of a template",
    "netvm": f"the name of a netvm or '{NONE}'",
    "number": "'number' (a number after its name)",
    "default": "'default' (the system's)",
    "ignore": "'ignore' (restore it all the same)",
    "leave-out": "'skip' (leave it out)",
}


async def settled(choice: Choice, qubes: Sequence[PlanQube], offers: Offers) -> Choice | None:
    """The choice with what the person says of each of some qubes that do not fit; None if he gives up."""
    groups: dict[tuple[Problem | None, str | None], list[PlanQube]] = {}
    for qube in qubes:
        alike = {"missing-template": qube.template, "missing-netvm": qube.netvm}
        groups.setdefault((qube.problem, alike.get(qube.problem or "", qube.name)), []).append(qube)
    for those in groups.values():
        ways = those[0].settled_by
        if (choice.conflicts == "rename" and "number" in ways) or (
            choice.missing == "default" and "default" in ways
        ):
            continue  # the person has chosen that for another qube, and for all
        changed = None
        while changed is None:
            _say_what_can_be_chosen(those, offers)
            say_wrapped(f"Answer with {', '.join(_ANSWERS[way] for way in ways)}, or nothing to end.")
            said = await answer("What is to become of it? ")
            if not said:
                return None
            changed = _changed(choice, those, said)
        choice = changed
    return choice


def _say_what_can_be_chosen(qubes: Sequence[PlanQube], offers: Offers) -> None:
    reason = "" if qubes[0].error is None else f": {qubes[0].error.reason}"
    say_wrapped(f"{listed([qube.name for qube in qubes])}{reason}.")
    is_disposable = qubes[0].klass == "DispVM"
    templates = offers.disposable_templates if is_disposable else offers.templates
    for way, names in (("template", templates), ("netvm", offers.netvms)):
        if way in qubes[0].settled_by and names:
            say_wrapped(f"Here are: {', '.join(names)}.")


def _changed(choice: Choice, qubes: Sequence[PlanQube], said: str) -> Choice | None:
    """The choice with this answer; None if it is none that there can be."""
    ways, names = qubes[0].settled_by, tuple(qube.name for qube in qubes)
    words: dict[str, tuple[Settlement, dict[str, object]]] = {
        "skip": ("leave-out", {"exclude": (*choice.exclude, *names)}),
        "number": ("number", {"conflicts": "rename"}),
        "default": ("default", {"missing": "default"}),
        "ignore": ("ignore", {"ignore_username_mismatch": True}),
    }
    if said in words and words[said][0] in ways:
        return choice.model_copy(update=words[said][1])
    value = "" if said == NONE and "netvm" in ways else said
    fields = {"new-name": "new_name", "template": "template", "netvm": "netvm"}
    field = next((fields[way] for way in ways if way in fields), None)
    if said in words or field is None or (value and not is_qube_name(value)):
        say_wrapped(f"{said!r} is no answer to that.")
        return None
    chosen = {one.name: one for one in choice.qubes}
    for name in names:
        chosen[name] = chosen.get(name, QubeChoice(name=name)).model_copy(update={field: value})
    return choice.model_copy(update={"qubes": tuple(chosen.values())})
