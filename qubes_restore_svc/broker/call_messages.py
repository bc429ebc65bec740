"""Plans and reports as messages of `restore_call`, and back.

Strategy: the broker's own values on one side, the wire's models on the other, field by field. What is too
much for one message is shortened until it fits, the least important first, and that is said; nothing else is
lost that a person is shown. A client that speaks for a person (the command in a GUI domain) turns them back,
and shows them with what shows them in dom0.
"""

from pydantic import ValidationError

from qubes_restore_svc.broker.plan import Decision, Plan, PlannedQube, PlanOptions, Problem, UnlistedQube
from qubes_restore_svc.errors import ProtocolViolation
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import ManifestQube, RefusedQube
from qubes_restore_svc.wire.models import MAX_FRAME, ErrorInfo, encoded_size
from qubes_restore_svc.wire.names import MAX_TEXT, shortened
from qubes_restore_svc.wire.report import CUT, remarks

_DECISIONS: dict[Decision, c.Decision] = {
    Decision.TAKE: "take",
    Decision.LEAVE_OUT: "leave-out",
    Decision.REFUSE: "refuse",
}
_PROBLEMS: dict[Problem, c.Problem] = {
    Problem.EXCLUDED: "excluded",
    Problem.NOT_SELECTED: "not-selected",
    Problem.ALREADY_EXISTS: "already-exists",
    Problem.MISSING_TEMPLATE: "missing-template",
    Problem.MISSING_NETVM: "missing-netvm",
    Problem.USERNAME_MISMATCH: "username-mismatch",
    Problem.HOME_NOT_ASKED_FOR: "home-not-asked-for",
}
_DECISION_OF = {word: decision for decision, word in _DECISIONS.items()}
_PROBLEM_OF = {word: problem for problem, word in _PROBLEMS.items()}


#: Characters of a text and remarks on a qube in a plan that would be too large, from the most to the least.
_PLAN_ROOMS = ((MAX_TEXT, 1), (300, 1), (100, 0), (20, 0))


# --- Plans -----------------------------------------------------------------------------------------


def plan_message(plan: Plan, number: int, mode: c.Mode, archive_size: int | None = None) -> c.Plan:
    """The message that tells a client of `plan`, shortened until it fits."""
    message = c.Plan(
        number=number,
        mode=mode,
        backup_id=plan.backup_id,
        archive_size=archive_size,
        qubes=tuple(_plan_qube(qube) for qube in plan.qubes),
        unlisted=tuple(
            RefusedQube(name=_text(qube.name), error=ErrorInfo.of(qube.error)) for qube in plan.unlisted
        ),
    )
    rooms = iter(_PLAN_ROOMS)
    short = message
    while encoded_size(short) > MAX_FRAME and (room := next(rooms, None)) is not None:
        short = _plan_within(message, *room)
    return short


def plan_of(message: c.Plan) -> Plan:
    """The plan that a message tells of: all that is shown of it. Raises ProtocolViolation."""
    return Plan(
        message.backup_id,
        tuple(_planned_qube(qube) for qube in message.qubes),
        tuple(UnlistedQube(qube.name, qube.error.to_error()) for qube in message.unlisted),
    )


def choice_message(options: PlanOptions) -> c.Choice:
    """What a client asks for, from the options of a plan; what settings are allowed is dom0's to say."""
    return c.Choice(
        names=tuple(options.names),
        exclude=tuple(options.exclude),
        conflicts=options.conflicts,
        missing=options.missing,
        dom0_home=options.dom0_home,
        ignore_username_mismatch=options.ignore_username_mismatch,
    )


def _plan_within(plan: c.Plan, length: int, remarks: int) -> c.Plan:
    def error(info: ErrorInfo | None) -> ErrorInfo | None:
        if info is None:
            return None
        texts = {"reason": shortened(info.reason, length), "advice": shortened(info.advice, length)}
        return info.model_copy(update=texts if remarks else texts | {"advice": ""})

    def qube(whole: c.PlanQube) -> c.PlanQube:
        return whole.model_copy(
            update={
                "remark": shortened(whole.remark, length),
                "error": error(whole.error),
                "notes": tuple(shortened(note, length) for note in whole.notes[: 10 * remarks]),
                "settings_left_out": (CUT,)[:remarks],
            }
        )

    unlisted = tuple(
        one.model_copy(update={"name": shortened(one.name, length), "error": error(one.error)})
        for one in plan.unlisted
    )
    return plan.model_copy(update={"qubes": tuple(map(qube, plan.qubes)), "unlisted": unlisted})


def _plan_qube(planned: PlannedQube) -> c.PlanQube:
    source, definition = planned.source, planned.definition
    return c.PlanQube(
        key=source.key,
        name=source.name,
        klass=source.klass,
        label=source.label,
        template=source.template,
        netvm=source.netvm,
        home_user=source.home_user,
        backup_size=source.backup_size,
        volumes=source.volumes,
        decision=_DECISIONS[planned.decision],
        new_name=planned.name,
        new_template=None if definition is None else definition.template,
        new_netvm=None if definition is None else definition.netvm,
        problem=None if planned.problem is None else _PROBLEMS[planned.problem],
        remark=_text(planned.remark),
        error=None if planned.error is None else ErrorInfo.of(planned.error),
        notes=remarks(planned.notes),
        settings_left_out=remarks(planned.left_out),
    )


def _planned_qube(qube: c.PlanQube) -> PlannedQube:
    try:
        source = ManifestQube(
            key=qube.key,
            name=qube.name,
            klass=qube.klass,
            label=qube.label,
            template=qube.template,
            netvm=qube.netvm,
            home_user=qube.home_user,
            backup_size=qube.backup_size,
            volumes=qube.volumes,
        )
    except ValidationError:
        raise ProtocolViolation("a plan with a qube that cannot be") from None
    return PlannedQube(
        source,
        qube.new_name,
        _DECISION_OF[qube.decision],
        qube.remark,
        None if qube.error is None else qube.error.to_error(),
        None if qube.problem is None else _PROBLEM_OF[qube.problem],
        qube.notes,
        qube.settings_left_out,
    )


# --- Small things ----------------------------------------------------------------------------------


def _text(text: str) -> str:
    return shortened(text, MAX_TEXT)
