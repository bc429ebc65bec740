"""What is taken, left out and refused."""

from collections.abc import Iterable, Sequence

import pytest

from qubes_restore_svc.broker.interfaces import HostView
from qubes_restore_svc.broker.plan import make_plan
from qubes_restore_svc.errors import BadMetadata, QubeExists, UsageError
from qubes_restore_svc.wire.messages import Manifest
from qubes_restore_svc.wire.restore_call import Choice, Plan

from .planning import manifest, qube


def backup(*names: str, refused: Sequence[str] = ()) -> Manifest:
    qubes = (qube(name, "AdminVM" if name == "dom0" else "AppVM") for name in names)
    return manifest(*qubes, refused=refused)


def plan_for(
    held: Manifest,
    *,
    names: Sequence[str] = (),
    exclude: Sequence[str] = (),
    existing: Iterable[str] | None = None,
) -> Plan:
    """The plan for a host that knows nothing but names, or (None) for no host."""
    view = None if existing is None else HostView(frozenset(existing))
    return make_plan(held, Choice(names=tuple(names), exclude=tuple(exclude)), view).plan


def taken(plan: Plan) -> list[str]:
    return [planned.new_name for planned in plan.taken]


def test_everything_is_taken_unless_told_otherwise() -> None:
    plan = plan_for(backup("work", "vault"), existing=())
    assert taken(plan) == ["work", "vault"]
    assert [planned.name for planned in plan.taken] == ["work", "vault"]
    assert plan.backup_id == "b"


def test_names_select_and_excludes_leave_out_in_the_order_of_the_backup() -> None:
    plan = plan_for(backup("a", "b", "c"), names=["c", "a", "b"], exclude=["b"], existing=())
    assert taken(plan) == ["a", "c"]
    assert [(planned.decision, planned.remark) for planned in plan.qubes] == [
        ("take", ""),
        ("leave-out", "excluded"),
        ("take", ""),
    ]
    plan = plan_for(backup("a", "b"), names=["a"], existing=())
    assert (plan.qubes[1].decision, plan.qubes[1].remark) == ("leave-out", "not selected")


@pytest.mark.parametrize(("names", "exclude"), [(["x"], []), ([], ["x"]), (["a", "x"], []), (["A"], [])])
def test_a_name_that_the_backup_lacks_is_a_usage_error_that_lists_its_names(
    names: list[str], exclude: list[str]
) -> None:
    with pytest.raises(UsageError, match=r"no qube named '[xA]'") as caught:
        plan_for(backup("b", "a", refused=["lost"]), names=names, exclude=exclude)
    assert caught.value.advice == "It holds: a, b, lost."


@pytest.mark.parametrize(
    ("names", "exclude", "expected"),
    [
        (["work-*"], [], ["work-a", "work-b"]),
        (["work-?"], ["*-b"], ["work-a"]),
        (["*"], [], ["work-a", "work-b", "Work-c"]),  # no pattern stands for dom0's home
        (["[w]ork-*", "vault"], [], None),  # a bracket is no pattern
        (["vault*"], [], None),
        ([], ["vault?"], None),
    ],
)
def test_stars_and_question_marks_stand_for_characters_of_names(
    names: list[str], exclude: list[str], expected: list[str] | None
) -> None:
    held = backup("dom0", "work-a", "work-b", "Work-c")
    if expected is not None:
        assert taken(plan_for(held, names=names, exclude=exclude, existing=())) == expected
    else:
        with pytest.raises(UsageError, match="the backup holds no qube that fits"):
            plan_for(held, names=names, exclude=exclude)


def test_a_pattern_takes_qubes_that_cannot_be_listed_too() -> None:
    plan = plan_for(backup("work", refused=["work-lost", "lost"]), names=["work*"])
    assert [qube.name for qube in plan.unlisted] == ["work-lost"]


@pytest.mark.parametrize(("slip", "meant"), [("pesonal-email", "personal-email"), ("tow", "two")])
def test_a_name_with_a_slip_in_it_is_answered_with_those_like_it(slip: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_for(backup("personal-email", "vault", "two"), names=[slip])
    assert caught.value.advice.startswith(f"Did you mean {meant}? It holds: ")


def test_patterns_are_few() -> None:
    with pytest.raises(UsageError, match="more than 100 patterns"):
        plan_for(backup("work"), names=[f"*{number}" for number in range(101)])


def test_dom0_can_be_left_out_of_a_backup_that_does_not_hold_it() -> None:
    assert taken(plan_for(backup("work"), exclude=["dom0"], existing=())) == ["work"]


def test_a_usage_error_does_not_list_thousands() -> None:
    with pytest.raises(UsageError) as caught:
        plan_for(backup(*(f"q{n:04}" for n in range(4000))), names=["x"])
    assert caught.value.advice.endswith("q0048, q0049, and 3950 more.")


def test_all_names_that_are_not_there_are_told_quoted() -> None:
    with pytest.raises(UsageError, match="no qube named 'x', '\ufffd\\[2J'") as caught:
        plan_for(backup(), names=["x", "\x1b[2J"])
    assert caught.value.advice == "It holds: none at all."


def test_a_name_that_is_taken_is_refused_and_one_that_differs_in_case_is_not() -> None:
    plan = plan_for(backup("work", "Work", "vault"), existing=["other", "work"])
    assert taken(plan) == ["Work", "vault"]
    refused = plan.qubes[0]
    assert refused.decision == "refuse"
    assert refused.error is not None and refused.error.kind == QubeExists.kind
    assert refused.error.qube == "work"


def test_a_taken_name_is_no_conflict_for_a_qube_that_is_left_out_or_only_verified() -> None:
    plan = plan_for(backup("work", "vault"), exclude=["work"], existing=["work"])
    assert plan.qubes[0].decision == "leave-out"
    assert taken(plan_for(backup("work"), existing=None)) == ["work"]


def test_dom0s_home_is_restored_only_by_name_and_always_verified() -> None:
    assert taken(plan_for(backup("dom0", "work"), existing=())) == ["work"]
    assert taken(plan_for(backup("dom0", "work"), names=["work"], existing=())) == ["work"]
    assert taken(plan_for(backup("dom0", "work"), names=["dom0"], existing=())) == ["dom0"]
    assert taken(plan_for(backup("dom0", "work"), existing=None)) == ["dom0", "work"]
    assert taken(plan_for(backup("dom0", "work"), names=["dom0"], existing=["dom0"])) == []


def test_a_qube_that_could_not_be_listed_is_told_if_it_was_wanted() -> None:
    def unlisted(names: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
        plan = plan_for(backup("work", refused=["lost", "gone"]), names=names, exclude=exclude)
        return [qube.name for qube in plan.unlisted]

    assert unlisted() == ["lost", "gone"]
    assert unlisted(exclude=["lost"]) == ["gone"]
    assert unlisted(names=["work"]) == []
    assert unlisted(names=["work", "gone"]) == ["gone"]
    plan = plan_for(backup(refused=["lost"]))
    assert plan.unlisted[0].error.kind == BadMetadata.kind
