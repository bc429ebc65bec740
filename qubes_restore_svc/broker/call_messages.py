"""Plans and reports as messages of `restore_call`, and back.

Strategy: the broker's own values on one side, the wire's models on the other, field by field. What is too
much for one message is shortened until it fits, the least important first, and that is said; nothing else is
lost that a person is shown. A client that speaks for a person (the command in a GUI domain) turns them back,
and shows them with what shows them in dom0.
"""

from collections.abc import Iterable
from datetime import UTC, datetime

from pydantic import ValidationError

from qubes_restore_svc.broker.plan import Decision, Plan, PlannedQube, PlanOptions, Problem, UnlistedQube
from qubes_restore_svc.broker.report import ErrorReport, QubeReport, Report, VolumeReport
from qubes_restore_svc.errors import ERROR_KINDS, ProtocolViolation, RestoreError
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.framing import MAX_FRAME
from qubes_restore_svc.wire.messages import ManifestQube, RefusedQube
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.names import MAX_TEXT, shortened

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

_TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
_CUT = "there was more to say than one message holds; the report in dom0 has more of it"

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
    while _size(short) > MAX_FRAME and (room := next(rooms, None)) is not None:
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
                "settings_left_out": (_CUT,)[:remarks],
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
        notes=_texts(planned.notes),
        settings_left_out=_texts(planned.left_out),
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


# --- Reports ---------------------------------------------------------------------------------------


def report_message(report: Report) -> c.RestoreReport:
    """The message that tells a client of a closed report, shortened until it fits."""
    return _report_message(report.fitting(lambda short: _size(_report_message(short)), MAX_FRAME))


def _report_message(report: Report) -> c.RestoreReport:
    assert report.finished is not None, "it is told when it is closed"
    return c.RestoreReport(
        mode=report.mode,
        version=_text(report.version),
        backup_id=report.backup_id,
        started=report.started.astimezone(UTC).strftime(_TIME_FORMAT),
        finished=report.finished.astimezone(UTC).strftime(_TIME_FORMAT),
        status=report.status,
        error=_error_info(report.error),
        warnings=_texts(report.warnings),
        qubes=tuple(qube_result(qube) for qube in report.qubes),
    )


def report_of(message: c.RestoreReport) -> Report:
    """The report that a message tells of."""
    return Report(
        version=message.version,
        mode=message.mode,
        backup_id=message.backup_id,
        started=_moment(message.started),
        finished=_moment(message.finished),
        status=message.status,
        error=_error_report(message.error),
        warnings=list(message.warnings),
        qubes=[qube_report(qube) for qube in message.qubes],
    )


def qube_message(report: QubeReport) -> c.QubeFinished:
    """The message that tells a client of a qube that is through, shortened until it fits."""

    def message(report: QubeReport) -> c.QubeFinished:
        return c.QubeFinished(qube=qube_result(report))

    return message(report.fitting(lambda short: _size(message(short)), MAX_FRAME))


def qube_result(report: QubeReport) -> c.QubeResult:
    """What a client is told of one qube."""
    return c.QubeResult.model_validate(
        {
            "name": _text(report.name),
            "name_in_backup": None if report.name_in_backup is None else _text(report.name_in_backup),
            "klass": report.klass,
            "outcome": report.outcome,
            "remark": _text(report.remark),
            "error": _error_info(report.error),
            "warnings": _texts(report.warnings),
            "settings_left_out": _texts(report.settings_left_out),
            "volumes": tuple(_volume_result(volume) for volume in report.volumes),
        }
    )


def qube_report(result: c.QubeResult) -> QubeReport:
    """The same, back."""
    return QubeReport(
        name=result.name,
        name_in_backup=result.name_in_backup,
        klass=result.klass,
        outcome=result.outcome,
        remark=result.remark,
        error=_error_report(result.error),
        warnings=list(result.warnings),
        settings_left_out=list(result.settings_left_out),
        volumes=[_volume_report(volume) for volume in result.volumes],
    )


def _volume_result(report: VolumeReport) -> c.VolumeResult:
    return c.VolumeResult.model_validate(
        {**report.model_dump(exclude={"error"}), "error": _error_info(report.error)}
    )


def _volume_report(result: c.VolumeResult) -> VolumeReport:
    return VolumeReport.model_validate(
        {**result.model_dump(exclude={"error"}), "error": _error_report(result.error)}
    )


# --- Small things ----------------------------------------------------------------------------------


def _error_info(report: ErrorReport | None) -> ErrorInfo | None:
    if report is None:
        return None
    kind = ERROR_KINDS.get(report.kind, RestoreError)
    return ErrorInfo.of(kind(report.reason, chunk=report.chunk, advice=report.advice))


def _error_report(info: ErrorInfo | None) -> ErrorReport | None:
    if info is None:
        return None
    return ErrorReport(kind=info.kind, reason=info.reason, advice=info.advice, chunk=info.chunk)


def _size(message: c.Plan | c.QubeFinished | c.RestoreReport) -> int:
    return len(message.model_dump_json().encode())


def _moment(text: str) -> datetime:
    try:
        return datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        raise ProtocolViolation("a report of a time that is none") from None


def _texts(texts: Iterable[str]) -> tuple[str, ...]:
    cut = tuple(_text(text) for text in texts)
    return cut if len(cut) <= c.MAX_REMARKS else (*cut[: c.MAX_REMARKS - 1], _CUT)


def _text(text: str) -> str:
    return shortened(text, MAX_TEXT)
