"""What the person chooses for a qube: it is checked against this system, and goes before the backup."""

from dataclasses import replace

import pytest

from qubes_restore_svc.broker.allowlist import SettingsPolicy
from qubes_restore_svc.broker.interfaces import HostQube, HostView
from qubes_restore_svc.broker.plan import make_plan
from qubes_restore_svc.errors import MissingDependency, QubeExists, UsageError
from qubes_restore_svc.wire.restore_call import Choice, QubeChoice, Settlement
from tests.broker.planning import NET, Decided, by_name, manifest, plan_of, qube, system


def chosen(name: str, **fields: str) -> tuple[QubeChoice, ...]:
    return (QubeChoice.model_validate({"name": name, **fields}),)


def settled_by(planned: Decided) -> tuple[Settlement, ...]:
    return planned.source.settled_by


# --- Names ---------------------------------------------------------------------------------------


def test_a_chosen_name_is_given_and_references_follow_it() -> None:
    backup = (qube("net", properties=NET), qube("work", netvm="net"))
    plan = plan_of(*backup, view=system(HostQube("net", "AppVM")), qubes=chosen("net", new_name="net-old"))
    assert (plan["net"].name, plan["net"].notes) == ("net-old", ("will be renamed to 'net-old'",))
    definition = plan["work"].definition
    assert definition is not None
    assert (definition.netvm, plan["work"].netvm_key) == ("net-old", "key-net")


@pytest.mark.parametrize(
    ("new_name", "why"),
    [
        ("plain", "a qube of this name is there already"),
        ("vault", "the backup has another qube of this name"),
        ("lost", "the backup has another qube of this name"),
        ("vault-3", "'vault' of the backup is called so if its own name is taken"),
        ("DOM0", "that is a name of dom0"),
    ],
)
@pytest.mark.parametrize("conflicts", ["refuse", "skip", "rename"])
def test_a_chosen_name_that_cannot_be_had_is_refused(new_name: str, why: str, conflicts: str) -> None:
    listed = manifest(qube("work"), qube("vault"), refused=["lost"])
    choice = Choice.asked(qubes=chosen("work", new_name=new_name), conflicts=conflicts)
    refused = by_name(make_plan(listed, choice, system()))["work"]
    assert isinstance(refused.error, QubeExists)
    assert refused.error.reason == f"it cannot be called '{new_name}': {why}"
    assert "--name QUBE=NEW" in refused.error.advice
    assert (refused.decision, settled_by(refused)) == ("refuse", ("new-name", "leave-out"))


def test_no_two_qubes_get_one_name_and_no_number_makes_a_chosen_one() -> None:
    choices = (*chosen("a", new_name="new"), *chosen("b", new_name="new"))
    plan = plan_of(qube("a"), qube("b"), qubes=choices)
    assert [one.decision for one in plan.values()] == ["take", "refuse"]
    view = system(HostQube("work", "AppVM"))
    plan = plan_of(
        qube("work"), qube("b"), view=view, qubes=chosen("b", new_name="Work-1"), conflicts="rename"
    )
    assert [one.name for one in plan.values()] == ["work-2", "Work-1"]


def test_a_name_that_the_policy_gives_rights_cannot_be_chosen_outside_dom0() -> None:
    view = system()
    reserved = HostView(view.names | {"sys-usb"}, view.qubes_system)
    refused = plan_of(qube("work"), view=reserved, qubes=chosen("work", new_name="sys-usb"))["work"]
    assert refused.decision == "refuse"


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("dom0", {"new_name": "zero"}, "dom0's home cannot have another name"),
        ("alone", {"template": "tpl"}, "alone has no template: it is of the class StandaloneVM"),
        ("base", {"netvm": "sys-net"}, "base gets no netvm: it is of the class TemplateVM"),
        ("wrok", {"netvm": ""}, "the backup holds no qube named 'wrok'"),
    ],
)
def test_what_cannot_be_chosen_for_a_qube_is_a_usage_error(
    name: str, fields: dict[str, str], reason: str
) -> None:
    backup = (qube("dom0", "AdminVM"), qube("alone", "StandaloneVM"), qube("base", "TemplateVM"))
    with pytest.raises(UsageError) as caught:
        plan_of(*backup, qubes=chosen(name, **fields))
    assert caught.value.reason == reason


# --- Templates and netvms ----------------------------------------------------------------------------


@pytest.mark.parametrize(("klass", "template"), [("AppVM", "default-tpl"), ("DispVM", "default-dvm")])
@pytest.mark.parametrize("in_backup", ["tpl", "gone"])
def test_a_template_that_was_chosen_goes_before_the_one_in_the_backup(
    klass: str, template: str, in_backup: str
) -> None:
    work = qube("work", klass, template=in_backup)
    planned = plan_of(work, qube("tpl", "TemplateVM"), qubes=chosen("work", template=template))["work"]
    assert planned.decision == "take" and planned.definition is not None
    assert (planned.definition.template, planned.template_key) == (template, None)
    assert planned.notes == (f"template change to '{template}'",)


@pytest.mark.parametrize(("klass", "template", "why"), [
    ("AppVM", "gone", "'gone', which you chose, is not here"),
    ("AppVM", "new", "'new', which you chose, is not here"),
    ("AppVM", "default-dvm", "'default-dvm', which you chose, is not a template"),
    ("DispVM", "tpl", "'tpl', which you chose, is not a disposable template"),
])  # fmt: skip
@pytest.mark.parametrize("missing", ["refuse", "default"])
def test_a_chosen_template_that_is_not_here_or_does_not_fit_is_refused(
    klass: str, template: str, why: str, missing: str
) -> None:
    backup = (qube("work", klass, template="tpl"), qube("new", "TemplateVM"))
    refused = plan_of(*backup, qubes=chosen("work", template=template), missing=missing)["work"]
    assert (refused.decision, refused.problem) == ("refuse", "missing-template")
    assert isinstance(refused.error, MissingDependency) and refused.error.reason == why


def test_a_template_for_all_is_for_those_that_miss_theirs_and_that_it_fits() -> None:
    backup = (qube("work"), qube("old", template="gone"), qube("box", "DispVM", template="gone"))
    plan = plan_of(*backup, template="default-tpl")
    assert [one.definition and one.definition.template for one in plan.values()] == [
        "tpl", "default-tpl", None,
    ]  # fmt: skip
    assert plan["box"].error is not None
    assert plan["box"].error.reason.endswith(
        "and 'default-tpl', which you chose, is not a disposable template"
    )
    plan = plan_of(*backup, template="default-tpl", missing="default")
    assert plan["box"].definition is not None and plan["box"].definition.template == "default-dvm"
    assert plan_of(*backup, template="slip", missing="default")["old"].decision == "refuse"


def test_a_template_for_all_is_taken_when_that_of_the_restore_fails() -> None:
    backup = (qube("new", "TemplateVM"), qube("work", template="new"))
    assert plan_of(*backup, template="tpl")["work"].fallback_template == "tpl"


@pytest.mark.parametrize("netvm", ["sys-net", ""])
def test_a_netvm_that_was_chosen_goes_before_the_one_in_the_backup(netvm: str) -> None:
    net = qube("net", properties=NET)
    for work in (qube("work", netvm="net"), qube("work", netvm="gone"), qube("work", netvm=None)):
        planned = plan_of(work, net, qubes=chosen("work", netvm=netvm))["work"]
        assert planned.definition is not None
        assert (planned.definition.netvm, planned.netvm_key) == (netvm, None)
        assert planned.notes == (f"netvm change to {repr(netvm) if netvm else 'none'}, as you chose",)


@pytest.mark.parametrize(
    ("netvm", "expected"), [("sys-net", "sys-net"), ("", ""), ("plain", None), ("gone", None)]
)
@pytest.mark.parametrize("missing", ["refuse", "default"])
def test_a_netvm_for_all_is_for_those_that_miss_theirs(
    netvm: str, expected: str | None, missing: str
) -> None:
    view = system(HostQube("sys-fw", "AppVM", provides_network=True))
    backup = (qube("work", netvm="sys-fw"), qube("old", netvm="gone"), qube("off", netvm=""))
    plan = plan_of(*backup, view=view, netvm=netvm, missing=missing)
    definitions = {name: one.definition for name, one in plan.items()}
    assert definitions["work"] is not None and definitions["work"].netvm == "sys-fw"
    assert definitions["off"] is not None and definitions["off"].netvm == ""
    old = definitions["old"]
    assert (None if old is None else old.netvm) == expected
    assert (plan["old"].error is None) is (expected is not None)


@pytest.mark.parametrize(
    ("netvm", "why"),
    [
        ("gone", "'gone', which you chose, is not here"),
        ("plain", "'plain', which you chose, is not a netvm"),
    ],
)
def test_a_chosen_netvm_that_is_not_here_or_gives_no_network_is_refused(netvm: str, why: str) -> None:
    refused = plan_of(qube("work"), qubes=chosen("work", netvm=netvm), missing="default")["work"]
    assert (refused.decision, refused.problem) == ("refuse", "missing-netvm")
    assert refused.error is not None and refused.error.reason == why


# --- What settles a problem -----------------------------------------------------------------------------


def test_a_problem_says_what_settles_it_here() -> None:
    view = system(HostQube("work", "AppVM"))
    backup = (qube("work"), qube("old", template="gone"), qube("far", netvm="gone"))
    plan = plan_of(*backup, view=view)
    assert settled_by(plan["work"]) == ("new-name", "number", "leave-out")
    assert settled_by(plan["old"]) == ("template", "default", "leave-out")
    assert settled_by(plan["far"]) == ("netvm", "default", "leave-out")
    assert plan["old"].error is not None
    assert plan["old"].error.advice == (
        "Choose one that is here (--template QUBE=TEMPLATE), or take the default, default-tpl"
        " (--ignore-missing), or leave it out (--skip-broken)."
    )
    bare = system(default_template=None)
    assert bare.qubes_system is not None
    only = {name: one for name, one in bare.qubes_system.qubes.items() if one.klass != "TemplateVM"}
    bare = HostView(frozenset(only), replace(bare.qubes_system, qubes=only))
    refused = plan_of(qube("old", template="gone"), view=bare)["old"]
    assert settled_by(refused) == ("leave-out",)
    assert plan_of(qube("work"))["work"].source.settled_by == ()


def test_a_plan_offers_what_is_here() -> None:
    offers = make_plan(manifest(qube("work")), Choice(), system()).plan.offers
    assert offers.templates == ("default-tpl", "tpl")
    assert (offers.disposable_templates, offers.netvms) == (("default-dvm",), ("sys-net",))
    assert make_plan(manifest(qube("work")), Choice(), None).plan.offers.templates == ()


def test_a_setting_comes_back_for_one_restore_where_the_configuration_permits_it() -> None:
    policy = SettingsPolicy(choosable=("property:autostart", "tag:my-*"))
    work = qube("work", properties={"autostart": "True", "debug": "True"}, tags=("my-tag",))
    plan = make_plan(manifest(work), Choice(), system(), allow=policy).plan
    assert plan.offers.settings == ("property:autostart", "tag:my-tag")
    choice = Choice(allow=("property:autostart",))
    planned = by_name(make_plan(manifest(work), choice, system(), allow=policy))["work"]
    assert planned.definition is not None
    assert planned.definition.properties == {"autostart": "True"}
    assert planned.left_out == ("property debug", "tag my-tag")
    beyond = policy.let_through(work, ("property:debug", "tag:my-tag"))  # whoever does not ask before
    assert (dict(beyond.properties), beyond.tags) == ({}, ("my-tag",))
    for setting in ("property:debug", "device:pci", "tag:other"):
        with pytest.raises(UsageError, match="does not permit"):
            make_plan(manifest(work), Choice(allow=(setting,)), system(), allow=policy)
