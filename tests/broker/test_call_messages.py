"""Plans and reports on their way to a client and back: what a person is shown survives."""

import pytest

from qubes_restore_svc.broker.call_messages import (
    choice_message,
    plan_message,
    plan_of,
)
from qubes_restore_svc.broker.host import Definition
from qubes_restore_svc.broker.plan import Decision, Plan, PlannedQube, PlanOptions, Problem, UnlistedQube
from qubes_restore_svc.cli.qvm_plan_table import plan_table, settings_left_behind
from qubes_restore_svc.errors import BadMetadata, ProtocolViolation, QubeExists
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.names import MAX_QUBES
from qubes_restore_svc.wire.report import MAX_REMARKS
from tests.support.wire import framed, from_dom0, heard

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


def travelled(message: c.Plan) -> c.BrokerAnswer:
    (answer,) = heard(from_dom0(), framed(message))
    return answer


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


def test_a_plan_too_large_for_a_message_loses_the_settings_and_says_so() -> None:
    many = tuple(f"property {'p' * 900}{number}" for number in range(1000))
    qubes = tuple(
        PlannedQube(qube(f"q{number}"), f"q{number}", Decision.TAKE, left_out=many) for number in range(10)
    )
    message = plan_message(Plan("b", qubes), 1, "restore")
    assert travelled(message) == message
    assert {len(one.settings_left_out) for one in message.qubes} == {1}
    assert "there was more to say" in message.qubes[0].settings_left_out[0]


def test_more_remarks_than_a_message_takes_are_cut_with_a_word() -> None:
    many = tuple(f"n{number}" for number in range(MAX_REMARKS + 1))
    planned = PlannedQube(qube("a"), "a", Decision.TAKE, notes=many)
    notes = plan_message(Plan("b", (planned,)), 1, "restore").qubes[0].notes
    assert len(notes) == MAX_REMARKS and "more to say" in notes[-1]


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
