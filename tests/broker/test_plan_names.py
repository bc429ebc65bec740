"""Names that are taken: refused, skipped, or numbered as the stock command numbers them."""

from dataclasses import replace

import pytest

from qubes_restore_svc.broker.interfaces import HostQube, HostView
from qubes_restore_svc.broker.plan import make_plan
from qubes_restore_svc.errors import QubeExists
from qubes_restore_svc.wire.restore_call import Choice
from tests.broker.planning import Decided, by_name, manifest, plan_of, qube, system


def there(*names: str) -> HostView:
    return system(*(HostQube(name, "AppVM") for name in names))


def renamed(name: str, *existing: str, others: tuple[str, ...] = ()) -> Decided:
    plan = plan_of(
        qube(name), *(qube(other) for other in others), view=there(name, *existing), conflicts="rename"
    )
    return plan[name]


def test_a_taken_name_is_refused_with_what_can_be_done() -> None:
    refused = plan_of(qube("work"), view=there("work"))["work"]
    assert (refused.decision, refused.problem) == ("refuse", "already-exists")
    assert refused.remark == "exists already"
    assert isinstance(refused.error, QubeExists)
    assert refused.error.qube == "work"
    assert "--rename-conflicting" in refused.error.advice
    assert "--skip-conflicting" in refused.error.advice
    assert refused.definition is None


def test_a_taken_name_is_skipped_on_request() -> None:
    skipped = plan_of(qube("work"), view=there("work"), conflicts="skip")["work"]
    assert (skipped.decision, skipped.problem) == ("leave-out", "already-exists")
    assert (skipped.remark, skipped.error) == ("exists already", None)


def test_a_taken_name_is_numbered_on_request() -> None:
    planned = renamed("work")
    assert (planned.decision, planned.name) == ("take", "work-1")
    assert planned.notes == ("will be renamed to 'work-1'",)
    assert planned.source.name == "work"


def test_a_free_name_is_kept_when_others_are_renamed() -> None:
    planned = plan_of(qube("work"), view=there("other"), conflicts="rename")["work"]
    assert (planned.name, planned.notes) == ("work", ())


def test_a_number_is_not_given_that_the_host_the_backup_or_the_restore_has() -> None:
    assert renamed("work", "work-1", "work-3").name == "work-2"
    assert renamed("work", "WORK-1").name == "work-2"
    assert renamed("Work", "work-1").name == "Work-2"
    assert renamed("work", others=("work-1",)).name == "work-2"
    plan = plan_of(qube("a.b"), qube("A.B-1"), view=there("a.b", "A.B-1"), conflicts="rename")
    assert [planned.name for planned in plan.values()] == ["a.b-2", "A.B-1-1"]


def test_a_name_of_an_unselected_or_unlisted_qube_is_not_given_either() -> None:
    plan = plan_of(qube("work"), qube("work-1"), view=there("work"), conflicts="rename", names=["work"])
    assert plan["work"].name == "work-2"
    listed = manifest(qube("work"), refused=["work-1"])
    plan = by_name(make_plan(listed, Choice(conflicts="rename"), there("work")))
    assert plan["work"].name == "work-2"


def test_two_qubes_that_are_cut_to_the_same_name_get_different_ones() -> None:
    first, second = "a" * 29 + "x", "a" * 29 + "y"
    plan = plan_of(qube(first), qube(second), view=there(first, second), conflicts="rename")
    assert [planned.name for planned in plan.values()] == ["a" * 29, "a" * 29 + "-1"]


@pytest.mark.parametrize(
    ("name", "taken", "expected"),
    [
        ("a" * 29, [], "a" * 29 + "-1"),
        ("a" * 30, [], "a" * 29),
        ("a" * 31, ["a" * 29], "a" * 29 + "-1"),
        ("a" * 29, [f"{'a' * 29}-{n}" for n in range(1, 10)], "a" * 28 + "-10"),
        ("a" * 26 + "-dm" + "ab", [], "a" * 26 + "-dm-1"),
    ],
)
def test_long_names_are_cut_so_that_they_stay_names(name: str, taken: list[str], expected: str) -> None:
    assert renamed(name, *taken).name == expected


def test_the_last_number_is_99() -> None:
    taken = [f"work-{number}" for number in range(1, 100)]
    assert renamed("work", *taken[:-1]).name == "work-99"
    refused = renamed("work", *taken)
    assert (refused.decision, refused.problem) == ("refuse", "already-exists")
    assert refused.error is not None
    assert (
        refused.error.reason
        == "a qube of this name is there already, and so are those with a number up to 99"
    )
    assert (refused.name, refused.notes) == ("work", ())


def test_a_free_name_that_the_policy_gives_rights_is_told() -> None:
    view = system()
    assert view.qubes_system is not None
    known = replace(view.qubes_system, policy_names={"sys-usb": "50-config-input.policy"})
    plan = plan_of(qube("sys-usb"), qube("work"), view=replace(view, qubes_system=known))
    told = "rules of this system's policy are for its name (50-config-input.policy)"
    assert (plan["sys-usb"].notes, plan["work"].notes) == ((told,), ())
    reserved = HostView(view.names | {"sys-usb"}, known)  # for who asks from outside dom0
    refused = plan_of(qube("sys-usb"), view=reserved)["sys-usb"]
    assert refused.error is not None and refused.error.reason == told
    assert "in dom0" in refused.error.advice
    assert plan_of(qube("sys-usb"), view=reserved, conflicts="rename")["sys-usb"].name == "sys-usb-1"


@pytest.mark.parametrize("view", [there("work"), HostView(frozenset({"work"}))])
def test_names_are_compared_exactly(view: HostView) -> None:
    assert plan_of(qube("Work"), view=view)["Work"].decision == "take"
    assert plan_of(qube("work"), view=view)["work"].decision == "refuse"


@pytest.mark.parametrize("name", ["Dom0", "DOM0", "domain-0"])
def test_no_qube_can_be_taken_for_dom0(name: str) -> None:
    assert plan_of(qube(name))[name].problem == "already-exists"
    assert plan_of(qube(name), conflicts="rename")[name].name == f"{name}-1"
    directory = HostView(frozenset({"dom0"}))  # where it is nothing but a file's name
    assert plan_of(qube(name), view=directory)[name].name == name


def test_a_renamed_qube_that_is_then_refused_keeps_its_name_in_the_report() -> None:
    broken = qube("work", template="gone")
    for missing in ("refuse", "skip"):
        planned = plan_of(broken, view=there("work"), conflicts="rename", missing=missing)["work"]
        assert planned.name == "work"
        assert not any("renamed" in note for note in planned.notes)


def test_when_only_verifying_no_name_is_taken() -> None:
    plan = by_name(make_plan(manifest(qube("work", template="gone")), Choice(), None))
    assert plan["work"].decision == "take"
    assert plan["work"].definition is None
