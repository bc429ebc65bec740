"""dom0's home: only on request, never renamed, and of the user that is here."""

from dataclasses import replace
from typing import Any

import pytest

from qubes_restore_svc.broker.interfaces import HostView
from qubes_restore_svc.broker.plan import make_plan
from qubes_restore_svc.errors import MissingDependency
from qubes_restore_svc.wire.restore_call import Choice
from tests.broker.planning import Decided, by_name, manifest, plan_of, qube, system


def home(user: str | None = "user", view: HostView | None = None, **options: Any) -> Decided:
    dom0 = qube("dom0", "AdminVM", label="black", home_user=user)
    return plan_of(dom0, qube("work"), view=view, **options)["dom0"]


def test_it_comes_when_it_is_named_or_asked_for() -> None:
    assert (home().decision, home().problem) == ("leave-out", "home-not-asked-for")
    assert home(dom0_home=True).decision == "take"
    assert home(names=["dom0"]).decision == "take"
    assert home(names=["work"]).problem == "not-selected"
    assert home(names=["work"], dom0_home=True).decision == "take"
    assert home(names=["*"]).problem == "home-not-asked-for", "no pattern stands for it"
    assert home(names=["*", "dom0"]).decision == home(names=["*"], dom0_home=True).decision == "take"
    assert home(exclude=["dom0"], dom0_home=True).problem == "excluded"
    directory = HostView(frozenset())
    assert home(view=directory).problem == "home-not-asked-for"
    assert home(view=directory, dom0_home=True).decision == "take"


def test_asking_for_it_selects_nothing_else() -> None:
    dom0 = qube("dom0", "AdminVM")
    plan = plan_of(dom0, qube("a"), qube("b"), names=["a"], dom0_home=True)
    assert [name for name, planned in plan.items() if planned.decision == "take"] == ["dom0", "a"]


def test_it_is_compared_with_what_was_extracted_and_never_with_a_system() -> None:
    extracted = HostView(frozenset({"dom0", "work"}))
    assert home(view=extracted, compare=True).decision == "take"
    here = replace(system(), names=frozenset({"work"}))
    for names in ([], ["dom0", "work"]):
        planned = home(view=here, compare=True, names=names)
        assert (planned.decision, planned.problem) == ("leave-out", "home-not-compared")


@pytest.mark.parametrize("conflicts", ["refuse", "skip", "rename"])
def test_on_qubes_dom0_is_there_and_no_conflict(conflicts: str) -> None:
    planned = home(dom0_home=True, conflicts=conflicts)
    assert (planned.decision, planned.name, planned.notes) == ("take", "dom0", ())
    assert planned.definition is None


def test_in_a_directory_a_second_one_is_never_renamed() -> None:
    view = HostView(frozenset({"dom0"}))
    for conflicts in ("refuse", "rename"):
        planned = home(view=view, dom0_home=True, conflicts=conflicts)
        assert (planned.decision, planned.problem) == ("refuse", "already-exists")
        assert planned.error is not None
        assert planned.error.reason == "a qube of this name is there already"
        assert "directory" in planned.error.advice
    assert home(view=view, dom0_home=True, conflicts="skip").decision == "leave-out"


@pytest.mark.parametrize("missing", ["refuse", "skip", "default"])
def test_the_home_of_another_user_is_refused(missing: str) -> None:
    planned = home("mallory", dom0_home=True, missing=missing)
    assert (planned.decision, planned.problem) == ("refuse", "username-mismatch")
    assert isinstance(planned.error, MissingDependency)
    assert planned.error.reason == "it is the home of the user 'mallory', and the user here is 'user'"
    assert "--ignore-username-mismatch" in planned.error.advice


def test_the_home_of_another_user_comes_on_request_with_a_note() -> None:
    planned = home("mallory", dom0_home=True, ignore_username_mismatch=True)
    assert planned.decision == "take"
    assert planned.notes == ("it is the home of the user 'mallory', and the user here is 'user'",)


def test_a_user_that_is_not_known_is_no_mismatch() -> None:
    assert home(None, dom0_home=True).decision == "take"
    assert home("x", system(dom0_user=None), dom0_home=True).decision == "take"
    assert home("x", HostView(frozenset()), dom0_home=True).decision == "take"


def test_when_only_verifying_it_is_read_like_everything_else() -> None:
    listed = manifest(qube("dom0", "AdminVM", home_user="mallory"))
    assert by_name(make_plan(listed, Choice(), None))["dom0"].decision == "take"


def test_nothing_can_refer_to_it() -> None:
    properties = {"provides_network": "True", "template_for_dispvms": "True"}
    dom0 = qube("dom0", "AdminVM", properties=properties)
    plan = plan_of(
        dom0,
        qube("app", template="dom0"),
        qube("disposable", "DispVM", template="dom0"),
        qube("client", netvm="dom0"),
        qube("user", properties={"default_dispvm": "dom0"}),
        dom0_home=True,
    )
    assert plan["app"].problem == "missing-template"
    assert plan["disposable"].problem == "missing-template"
    assert plan["client"].problem == "missing-netvm"
    assert plan["user"].default_dispvm_key is None
