"""Plans and reports on their way to a client and back: what a person is shown survives."""

from datetime import UTC, datetime

import pytest

from qubes_restore_svc.broker.call_messages import (
    choice_message,
    plan_message,
    plan_of,
    qube_message,
    qube_result,
    report_message,
    report_of,
)
from qubes_restore_svc.broker.host import Definition
from qubes_restore_svc.broker.plan import Decision, Plan, PlannedQube, PlanOptions, Problem, UnlistedQube
from qubes_restore_svc.broker.report import CUT, ErrorReport, QubeReport, Report, VolumeReport
from qubes_restore_svc.cli.qvm_plan_table import plan_table, settings_left_behind
from qubes_restore_svc.errors import BadMetadata, NoSpace, ProtocolViolation, QubeExists
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.models import encode_message
from qubes_restore_svc.wire.names import MAX_QUBES

from .planning import qube

TAKEN = PlannedQube(
    qube("work", netvm="sys-firewall"),
    "work1",
    Decision.TAKE,
    notes=("will be renamed to 'work1'",),
    left_out=("property kernelopts",),
    definition=Definition("red", template="debian-13", netvm=""),
)
REFUSED = PlannedQube(
    qube("vault"),
    "vault",
    Decision.REFUSE,
    Problem.ALREADY_EXISTS.value,
    QubeExists("a qube of this name is there already", qube="vault", advice="Rename it."),
    Problem.ALREADY_EXISTS,
)
LEFT_OUT = PlannedQube(
    qube("mail"), "mail", Decision.LEAVE_OUT, Problem.EXCLUDED.value, problem=Problem.EXCLUDED
)
HOME = PlannedQube(
    qube("dom0", "AdminVM", None, home_user="user"),
    "dom0",
    Decision.LEAVE_OUT,
    problem=Problem.HOME_NOT_ASKED_FOR,
)
UNLISTED = UnlistedQube("b\u00e4d", BadMetadata("its class is none", qube="b\u00e4d"))
PLAN = Plan("b-1", (TAKEN, REFUSED, LEFT_OUT, HOME), (UNLISTED,))

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
ERROR = ErrorReport(kind="no-space", reason="the pool is full", advice="Make room.", chunk=3)
REPORT = Report(
    mode="restore",
    backup_id="b-1",
    started=NOON,
    warnings=["little room"],
    qubes=[
        QubeReport(
            name="work1",
            name_in_backup="work",
            klass="AppVM",
            outcome="restored",
            warnings=["w"],
            settings_left_out=["property kernelopts"],
            volumes=[
                VolumeReport(name="private", outcome="ok", size=9, data_bytes=8, sha256="a" * 64),
                VolumeReport(name="root", outcome="failed", error=ERROR),
            ],
        ),
        QubeReport(name="?!", klass="?", outcome="refused", remark="r", error=ERROR),
    ],
)


def travelled(message: c.Plan | c.RestoreReport) -> c.BrokerAnswer:
    return c.parse_broker_answer(encode_message(message))


def test_a_plan_is_shown_to_a_client_as_it_is_in_dom0() -> None:
    message = travelled(plan_message(PLAN, 2, "restore", 77))
    assert isinstance(message, c.Plan)
    assert (message.number, message.mode, message.archive_size) == (2, "restore", 77)
    plan = plan_of(message)
    for width in (None, 60):
        assert plan_table(plan, width) == plan_table(PLAN, width)
    assert settings_left_behind(plan, everything=True) == settings_left_behind(PLAN, everything=True)
    assert [(q.name, q.decision, q.problem, q.source.volumes) for q in plan.qubes] == [
        (q.name, q.decision, q.problem, q.source.volumes) for q in PLAN.qubes
    ]
    assert str(plan.qubes[1].error) == str(REFUSED.error) and type(plan.qubes[1].error) is QubeExists


def test_a_client_is_told_which_template_and_netvm_a_qube_will_get() -> None:
    work, vault, *_ = plan_message(PLAN, 1, "restore").qubes
    assert (work.new_name, work.new_template, work.new_netvm) == ("work1", "debian-13", "")
    assert (vault.new_name, vault.new_template, vault.new_netvm) == ("vault", None, None)


def test_every_decision_and_every_problem_has_its_word() -> None:
    for decision in Decision:
        for problem in (None, *Problem):
            planned = PlannedQube(qube("a"), "a", decision, problem=problem)
            there = plan_of(plan_message(Plan("b", (planned,)), 1, "verify")).qubes[0]
            assert (there.decision, there.problem) == (decision, problem)


def test_a_plan_with_a_qube_that_cannot_be_is_refused() -> None:
    message = plan_message(PLAN, 1, "restore")
    impossible = message.qubes[0].model_copy(update={"klass": "AdminVM"})
    with pytest.raises(ProtocolViolation, match="a qube that cannot be"):
        plan_of(message.model_copy(update={"qubes": (impossible,)}))


#: As much as a worker can make a report or a plan say.
LONG = "\U0001f600" * 300
LONG_ERROR = ErrorReport(kind="error", reason=LONG, advice=LONG)


def the_longest_report() -> Report:
    qubes = [
        QubeReport(
            name=f"q{number}" + "q" * 26,
            name_in_backup="n" * 31,
            klass="StandaloneVM",
            remark=LONG,
            error=LONG_ERROR,
            warnings=[LONG] * 2,
            volumes=[
                VolumeReport(name=name, outcome="failed", size=1 << 62, sha256="f" * 64, error=LONG_ERROR)
                for name in ("root", "private", "home")
            ],
        )
        for number in range(MAX_QUBES)
    ]
    report = Report(mode="restore", backup_id="b" * 128, started=NOON, warnings=[LONG] * 100, qubes=qubes)
    report.close(NOON, NoSpace(LONG, advice=LONG))
    return report


def test_the_longest_report_reaches_the_client_with_all_its_outcomes() -> None:
    message = travelled(report_message(the_longest_report()))
    assert isinstance(message, c.RestoreReport)
    assert [qube.outcome for qube in message.qubes] == ["failed"] * MAX_QUBES
    assert all(qube.error is not None and qube.error.reason.endswith("\u2026") for qube in message.qubes)
    assert message.status == 1 and message.warnings[-1] == CUT


def test_the_longest_plan_reaches_the_client_with_all_its_decisions() -> None:
    error = BadMetadata(LONG, qube="q", advice=LONG)
    planned = [
        PlannedQube(
            qube(f"q{number}" + "q" * 26, "StandaloneVM", None),
            "n" * 31,
            Decision.REFUSE,
            LONG,
            error,
            Problem.ALREADY_EXISTS,
            (LONG,),
        )
        for number in range(MAX_QUBES)
    ]
    message = travelled(plan_message(Plan("b" * 128, tuple(planned)), 1, "restore"))
    assert isinstance(message, c.Plan)
    assert [qube.decision for qube in message.qubes] == ["refuse"] * MAX_QUBES


def test_a_qube_of_which_too_much_is_said_is_told_in_short() -> None:
    many = ["\U0001f600" * 1000] * 700
    whole = QubeReport(name="a", klass="AppVM", outcome="restored", warnings=many, settings_left_out=many)
    message = c.parse_broker_answer(encode_message(qube_message(whole)))
    assert isinstance(message, c.QubeFinished)
    assert message.qube.outcome == "restored" and len(message.qube.warnings) == 10


def test_a_plan_too_large_for_a_message_loses_the_settings_and_says_so() -> None:
    many = tuple(f"property {'p' * 900}{number}" for number in range(1000))
    qubes = tuple(
        PlannedQube(qube(f"q{number}"), f"q{number}", Decision.TAKE, left_out=many) for number in range(10)
    )
    message = plan_message(Plan("b", qubes), 1, "restore")
    assert travelled(message) == message
    assert {len(one.settings_left_out) for one in message.qubes} == {1}
    assert "the report in dom0 has more of it" in message.qubes[0].settings_left_out[0]


def test_more_remarks_than_a_message_takes_are_cut_with_a_word() -> None:
    many = tuple(f"n{number}" for number in range(c.MAX_REMARKS + 1))
    planned = PlannedQube(qube("a"), "a", Decision.TAKE, notes=many)
    notes = plan_message(Plan("b", (planned,)), 1, "restore").qubes[0].notes
    assert len(notes) == c.MAX_REMARKS and "more to say" in notes[-1]


def test_what_the_person_chose_travels() -> None:
    options = PlanOptions(
        names=["a"],
        exclude=["b"],
        conflicts="rename",
        missing="skip",
        dom0_home=True,
        ignore_username_mismatch=True,
    )
    assert choice_message(options) == c.Choice(
        names=("a",),
        exclude=("b",),
        conflicts="rename",
        missing="skip",
        dom0_home=True,
        ignore_username_mismatch=True,
    )


def test_a_report_comes_back_as_it_was() -> None:
    report = REPORT.model_copy(deep=True)
    report.close(NOON, NoSpace("the pool is full", advice="Make room."))
    message = travelled(report_message(report))
    assert isinstance(message, c.RestoreReport)
    assert report_of(message) == report
    assert message.status == 3


def test_a_report_too_large_for_a_message_loses_warnings_and_says_so() -> None:
    report = REPORT.model_copy(deep=True)
    report.warnings = ["w" * 1000] * 20
    report.qubes = [
        QubeReport(name=f"q{number}", klass="AppVM", outcome="restored", warnings=["w" * 1000] * 100)
        for number in range(100)
    ]
    report.close(NOON)
    message = report_message(report)
    assert travelled(message) == message
    assert [qube.outcome for qube in message.qubes] == ["restored"] * 100
    assert {len(qube.warnings) for qube in message.qubes} == {10}
    assert message.warnings[-1] == CUT and len(message.warnings) == 11


def test_control_characters_and_long_texts_are_made_harmless() -> None:
    result = qube_result(QubeReport(name="a\x1b[2J", klass="AppVM", remark="r" * 2000, warnings=["a\nb"]))
    assert (result.name, len(result.remark), result.warnings) == ("a\ufffd[2J", 1000, ("a\ufffdb",))


def test_a_time_that_is_none_is_refused() -> None:
    report = REPORT.model_copy(deep=True)
    report.close(NOON)
    message = report_message(report).model_copy(update={"started": "2026-13-45T99:00:00Z"})
    with pytest.raises(ProtocolViolation, match="a time that is none"):
        report_of(message)
