"""Template, netvm and default_dispvm: found here, found in the restore, replaced, or missing."""

import re

import pytest

from qubes_restore_svc.broker.allowlist import SettingsPolicy
from qubes_restore_svc.broker.interfaces import Definition, HostQube
from qubes_restore_svc.errors import MissingDependency
from tests.broker.planning import DISP, NET, AllowAll, Decided, is_taken, plan_of, qube, system


def defined(planned: Decided) -> Definition:
    assert planned.decision == "take"
    assert planned.definition is not None
    return planned.definition


# --- Templates -------------------------------------------------------------------------------------


def test_a_template_that_is_here_is_taken_as_it_is() -> None:
    planned = plan_of(qube("work"))["work"]
    assert (defined(planned).template, planned.template_key, planned.notes) == ("tpl", None, ())


@pytest.mark.parametrize("klass", ["TemplateVM", "StandaloneVM"])
def test_classes_without_a_template_get_none_whatever_the_backup_says(klass: str) -> None:
    odd = qube("odd", klass).model_copy(update={"template": "gone"})
    planned = plan_of(odd)["odd"]
    assert (defined(planned).template, planned.template_key, planned.fallback_template) == (None, None, None)


@pytest.mark.parametrize("name", ["gone", "plain", "sys-net", "default-dvm", "dom0"])
@pytest.mark.parametrize("default", ["default-tpl", None])
def test_what_is_no_template_here_is_missing(name: str, default: str | None) -> None:
    view = system(default_template=default)
    refused = plan_of(qube("work", template=name), view=view)["work"]
    assert (refused.decision, refused.problem) == ("refuse", "missing-template")
    assert isinstance(refused.error, MissingDependency)
    assert (refused.error.qube, refused.remark) == ("work", "no template")
    assert f"its template '{name}' is " in refused.error.reason
    assert ("--ignore-missing" in refused.error.advice) is (default is not None)
    assert "--template QUBE=TEMPLATE" in refused.error.advice
    skipped = plan_of(qube("work", template=name), view=view, missing="skip")["work"]
    assert (skipped.decision, skipped.problem) == ("leave-out", "missing-template")
    assert (skipped.error, skipped.notes) == (None, (refused.error.reason,))


def test_a_missing_template_is_replaced_by_the_default_on_request() -> None:
    planned = plan_of(qube("work", template="gone"), missing="default")["work"]
    assert defined(planned).template == "default-tpl"
    assert planned.notes == ("template change to 'default-tpl'",)
    assert (planned.template_key, planned.fallback_template) == (None, None)
    planned = plan_of(qube("box", "DispVM", template="gone"), missing="default")["box"]
    assert defined(planned).template == "default-dvm"
    assert planned.notes == ("template change to 'default-dvm'",)


@pytest.mark.parametrize("default", [None, "plain", "gone"])
@pytest.mark.parametrize("klass", ["AppVM", "DispVM"])
def test_without_a_default_that_will_do_it_stays_missing(klass: str, default: str | None) -> None:
    view = system(default_template=default, default_dispvm=default)
    planned = plan_of(qube("work", klass, template="gone"), view=view, missing="default")["work"]
    assert (planned.decision, planned.problem) == ("refuse", "missing-template")
    assert planned.error is not None
    assert re.search("and there is no default (disposable )?template here$", planned.error.reason)
    assert "--ignore-missing" not in planned.error.advice
    assert "--template QUBE=TEMPLATE" in planned.error.advice


@pytest.mark.parametrize("missing", ["refuse", "skip", "default"])
def test_a_qube_that_names_no_template_is_based_on_the_default(missing: str) -> None:
    planned = plan_of(qube("work", template=None), missing=missing)["work"]
    assert defined(planned).template == "default-tpl"
    assert planned.notes == ("template change to 'default-tpl'",)
    planned = plan_of(qube("box", "DispVM", template=None), missing=missing)["box"]
    assert defined(planned).template == "default-dvm"
    without = system(default_template=None)
    planned = plan_of(qube("work", template=None), view=without, missing=missing)["work"]
    assert planned.decision == ("leave-out" if missing == "skip" else "refuse")
    assert planned.problem == "missing-template"


def test_a_template_of_the_restore_comes_first_under_its_new_name() -> None:
    backup = (qube("work"), qube("tpl", "TemplateVM"))
    planned = plan_of(*backup, conflicts="rename")["work"]
    assert (defined(planned).template, planned.template_key) == ("tpl-1", "key-tpl")
    assert planned.notes == ()
    # If the restore does not bring it, the one that is here will do.
    for options in (
        {"conflicts": "skip"},
        {"conflicts": "refuse"},
        {"exclude": ["tpl"]},
        {"names": ["work"]},
    ):
        planned = plan_of(*backup, **options)["work"]
        assert (defined(planned).template, planned.template_key) == ("tpl", None)


def test_a_qube_of_the_restore_that_is_no_template_does_not_replace_one_here() -> None:
    planned = plan_of(qube("work"), qube("tpl", "StandaloneVM"), conflicts="rename")["work"]
    assert (defined(planned).template, planned.template_key) == ("tpl", None)
    planned = plan_of(qube("work", template="new"), qube("new", "StandaloneVM"))["work"]
    assert planned.error is not None
    assert planned.error.reason == "its template 'new' will be restored, but not as a template"


def test_the_default_is_the_systems_even_if_the_backup_has_that_name_too() -> None:
    planned = plan_of(
        qube("work", template="gone"),
        qube("default-tpl", "TemplateVM"),
        conflicts="rename",
        missing="default",
    )["work"]
    assert (defined(planned).template, planned.template_key) == ("default-tpl", None)


def test_a_fallback_for_a_template_is_named_only_if_it_was_asked_for() -> None:
    backup = (
        qube("new", "TemplateVM"),
        qube("work", template="new"),
        qube("dvm", template="new", properties=DISP),
        qube("box", "DispVM", template="dvm"),
    )
    plan = plan_of(*backup, missing="default")
    fallbacks = [planned.fallback_template for planned in plan.values()]
    assert fallbacks == [None, "default-tpl", "default-tpl", "default-dvm"]
    for missing in ("refuse", "skip"):
        assert not any(planned.fallback_template for planned in plan_of(*backup, missing=missing).values())
    plan = plan_of(*backup, missing="default", view=system(default_template=None))
    assert (plan["work"].template_key, plan["work"].fallback_template) == ("key-new", None)


@pytest.mark.parametrize(("klass", "properties", "serves"), [
    ("AppVM", DISP, True),
    ("StandaloneVM", DISP, True),
    ("AppVM", {}, False),
    ("AppVM", {"template_for_dispvms": "False"}, False),
    ("TemplateVM", DISP, False),
    ("DispVM", DISP, False),
])  # fmt: skip
def test_a_disposable_needs_a_qube_that_serves_as_its_template(
    klass: str, properties: dict[str, str], serves: bool
) -> None:
    dvm = qube("dvm", klass, template="default-dvm" if klass == "DispVM" else "tpl", properties=properties)
    plan = plan_of(qube("box", "DispVM", template="dvm"), dvm)
    assert is_taken(plan["box"]) is serves
    assert plan["box"].template_key == ("key-dvm" if serves else None)


def test_a_disposable_needs_one_here_too() -> None:
    assert is_taken(plan_of(qube("box", "DispVM", template="default-dvm"))["box"])
    for name in ("tpl", "plain", "dom0", "gone"):
        planned = plan_of(qube("box", "DispVM", template=name))["box"]
        assert planned.problem == "missing-template"


# --- Chains ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("missing", ["refuse", "skip"])
def test_what_depends_on_a_qube_that_is_not_restored_is_not_either(missing: str, backwards: bool) -> None:
    backup = [
        qube("dvm", template="gone", properties=DISP),
        qube("net", "DispVM", template="dvm", properties=NET),
        qube("work", netvm="net", properties=NET),
        qube("far", netvm="work"),
        qube("other"),
    ]
    plan = plan_of(*(reversed(backup) if backwards else backup), missing=missing)
    assert [name for name, planned in plan.items() if is_taken(planned)] == ["other"]
    problems = [plan[name].problem for name in ("dvm", "net", "work", "far")]
    assert problems == ["missing-template"] * 2 + ["missing-netvm"] * 2


@pytest.mark.parametrize("backwards", [False, True])
def test_the_reasons_are_told_as_it_ended_whatever_the_order(backwards: bool) -> None:
    backup = [
        qube("a", template="gone", properties=NET),
        qube("b", netvm="a", properties=NET),
        qube("c", netvm="b"),
        qube("d", netvm="nowhere"),
        qube("e", netvm="plain"),
    ]
    plan = plan_of(*(reversed(backup) if backwards else backup))
    reasons = {name: planned.error.reason for name, planned in plan.items() if planned.error}
    assert reasons == {
        "a": "its template 'gone' is neither here nor in the backup",
        "b": "its netvm 'a' is in the backup, but will not be restored",
        "c": "its netvm 'b' is in the backup, but will not be restored",
        "d": "its netvm 'nowhere' is neither here nor in the backup",
        "e": "its netvm 'plain' is here, but is not a netvm",
    }


def test_a_chain_ends_where_the_system_can_stand_in() -> None:
    plan = plan_of(
        qube("sys-net", template="gone", properties=NET),
        qube("work", netvm="sys-net"),
        conflicts="rename",
    )
    assert not is_taken(plan["sys-net"])
    assert (defined(plan["work"]).netvm, plan["work"].netvm_key) == ("sys-net", None)
    plan = plan_of(
        qube("dvm", template="gone", properties=DISP),
        qube("box", "DispVM", template="dvm"),
        missing="default",
        view=system(default_template=None),
    )
    assert not is_taken(plan["dvm"])
    assert defined(plan["box"]).template == "default-dvm"


@pytest.mark.parametrize("backwards", [False, True])
def test_chains_of_thousands_fall_as_one(backwards: bool) -> None:
    backup = [qube("q0", netvm="gone", properties=NET)]
    backup += [qube(f"q{n}", netvm=f"q{n - 1}", properties=NET) for n in range(1, 4096)]
    plan = plan_of(*(reversed(backup) if backwards else backup))
    assert not any(is_taken(planned) for planned in plan.values())


# --- Netvms ------------------------------------------------------------------------------------------


def test_no_netvm_and_the_default_stay_what_they_are() -> None:
    plan = plan_of(qube("offline", netvm=""), qube("usual", netvm=None))
    assert defined(plan["offline"]).netvm == ""
    assert defined(plan["usual"]).netvm is None
    assert plan["offline"].notes == plan["usual"].notes == ()


def test_a_netvm_is_found_in_the_restore_and_else_here() -> None:
    work, net = qube("work", netvm="sys-net"), qube("sys-net", properties=NET)
    planned = plan_of(work, net, conflicts="rename")["work"]
    assert (defined(planned).netvm, planned.netvm_key) == ("sys-net-1", "key-sys-net")
    planned = plan_of(work, net, conflicts="skip")["work"]
    assert (defined(planned).netvm, planned.netvm_key) == ("sys-net", None)
    planned = plan_of(work, qube("sys-net"), conflicts="rename")["work"]
    assert (defined(planned).netvm, planned.netvm_key) == ("sys-net", None)


@pytest.mark.parametrize("properties", [{}, {"provides_network": "False"}, DISP])
def test_a_qube_that_provides_no_network_is_no_netvm(properties: dict[str, str]) -> None:
    backup = (qube("work", netvm="net"), qube("net", properties=properties))
    planned = plan_of(*backup)["work"]
    assert (planned.decision, planned.problem) == ("refuse", "missing-netvm")
    assert isinstance(planned.error, MissingDependency)
    assert planned.error.reason == "its netvm 'net' will be restored, but not as a netvm"
    planned = plan_of(*backup, missing="skip")["work"]
    assert (planned.decision, planned.problem) == ("leave-out", "missing-netvm")
    planned = plan_of(*backup, missing="default")["work"]
    assert (defined(planned).netvm, planned.netvm_key) == (None, None)
    assert planned.notes == (
        "netvm change to the system's default: 'net' will be restored, but not as a netvm",
    )


@pytest.mark.parametrize("missing", ["refuse", "skip", "default"])
def test_a_qube_that_is_its_own_netvm_gets_none(missing: str) -> None:
    planned = plan_of(qube("loop", netvm="loop", properties=NET), missing=missing)["loop"]
    assert (defined(planned).netvm, planned.netvm_key) == ("", None)
    assert planned.notes == ("it will have no netvm: it is its own",)


def test_a_loop_of_netvms_is_left_without_network_and_their_clients_stay() -> None:
    plan = plan_of(
        qube("client", netvm="a"),
        qube("a", netvm="b", properties=NET),
        qube("b", netvm="a", properties=NET),
    )
    assert [defined(planned).netvm for planned in plan.values()] == ["a", "", ""]
    assert [planned.netvm_key for planned in plan.values()] == ["key-a", None, None]
    assert plan["a"].notes == (
        "it will have no netvm, because 'b' depends on it (afterwards: qvm-prefs a netvm b)",
    )


def test_a_template_whose_netvm_is_based_on_it_is_restored_without() -> None:
    plan = plan_of(
        qube("tpl", "TemplateVM", netvm="fw"),
        qube("net", properties=NET),
        qube("fw", netvm="net", properties=NET),
        conflicts="rename",
    )
    assert (plan["tpl"].name, defined(plan["tpl"]).netvm) == ("tpl-1", "")
    assert plan["tpl"].notes[1].endswith("(afterwards: qvm-prefs tpl-1 netvm fw)")
    assert (plan["fw"].template_key, plan["fw"].netvm_key) == ("key-tpl", "key-net")
    assert defined(plan["fw"]).template == "tpl-1"


# --- default_dispvm ------------------------------------------------------------------------------------


def test_a_disposable_template_is_found_in_the_restore_and_else_here() -> None:
    work = qube("work", properties={"default_dispvm": "default-dvm"})
    dvm = qube("default-dvm", properties=DISP)
    planned = plan_of(work, dvm, conflicts="rename")["work"]
    assert (defined(planned).default_dispvm, planned.default_dispvm_key) == (
        "default-dvm-1",
        "key-default-dvm",
    )
    planned = plan_of(work)["work"]
    assert (defined(planned).default_dispvm, planned.default_dispvm_key) == ("default-dvm", None)
    planned = plan_of(work, qube("default-dvm"), conflicts="rename")["work"]
    assert (defined(planned).default_dispvm, planned.default_dispvm_key) == ("default-dvm", None)


def test_a_qube_can_be_its_own_disposable_template() -> None:
    planned = plan_of(qube("dvm", properties={**DISP, "default_dispvm": "dvm"}))["dvm"]
    assert (defined(planned).default_dispvm, planned.default_dispvm_key) == ("dvm", "key-dvm")


@pytest.mark.parametrize(("properties", "expected"), [
    ({}, None), ({"default_dispvm": ""}, ""), ({"default_dispvm": "None"}, ""),
])  # fmt: skip
def test_none_at_all_is_not_the_default(properties: dict[str, str], expected: str | None) -> None:
    planned = plan_of(qube("work", properties=properties))["work"]
    assert defined(planned).default_dispvm == expected
    assert planned.notes == ()


@pytest.mark.parametrize("name", ["gone", "plain", "tpl", "dom0", "other", "unwanted", "~" * 16384])
@pytest.mark.parametrize("missing", ["refuse", "skip", "default"])
def test_one_that_is_missing_stops_nobody(name: str, missing: str) -> None:
    plan = plan_of(
        qube("work", properties={"default_dispvm": name}),
        qube("other"),
        qube("unwanted", properties=DISP),
        exclude=["unwanted"],
        missing=missing,
    )
    planned = plan["work"]
    assert (defined(planned).default_dispvm, planned.default_dispvm_key) == ("", None)
    assert planned.notes[0].startswith(f"it will have no default_dispvm: '{name[:31]}' ")
    assert len(planned.notes[0]) < 200


STRANGER = HostQube("vault-dvm", "AppVM", template_for_dispvms=True)


@pytest.mark.parametrize("missing", ["refuse", "skip", "default"])
def test_a_disposable_template_of_this_system_is_nothing_that_a_backup_can_name(missing: str) -> None:
    work = qube("work", properties={"default_dispvm": "vault-dvm"})
    planned = plan_of(work, view=system(STRANGER), allow=SettingsPolicy(), missing=missing)["work"]
    assert defined(planned).default_dispvm == ""
    assert planned.notes == (
        "it will have no default_dispvm: 'vault-dvm' is of this system, and not of this backup"
        " (afterwards: qvm-prefs work default_dispvm vault-dvm)",
    )
    assert planned.left_out == ()
    work = qube("work", properties={"default_dispvm": "default-dvm"})
    planned = plan_of(work, view=system(STRANGER), allow=SettingsPolicy())["work"]
    assert (defined(planned).default_dispvm, planned.notes) == ("default-dvm", ())


def test_a_disposable_template_of_this_system_that_the_configuration_allows_is_told() -> None:
    work = qube("work", properties={"default_dispvm": "vault-dvm"})
    allow = SettingsPolicy(properties=("@default", "default_dispvm"))
    planned = plan_of(work, view=system(STRANGER), allow=allow)["work"]
    assert defined(planned).default_dispvm == "vault-dvm"
    assert planned.notes == ("its default_dispvm is 'vault-dvm' of this system, as the configuration allows",)


@pytest.mark.parametrize("netvm", ["sys-net", "gone"])
def test_a_template_gets_no_netvm_and_is_restored(netvm: str) -> None:
    planned = plan_of(qube("mine", "TemplateVM", netvm=netvm))["mine"]
    assert defined(planned).netvm == ""
    then = " (afterwards: qvm-prefs mine netvm sys-net)" if netvm == "sys-net" else ""
    assert planned.notes == (f"a template gets no netvm{then}",)


# --- What an earlier restore of the same backup has brought ------------------------------------------


def before(name: str, *more: str, tag: str = "restored-from-backup-b", **serves: bool) -> HostQube:
    klass = "AppVM" if serves else "TemplateVM"
    return HostQube(name, klass, restored_tags=frozenset({tag, *more}), **serves)


def test_what_the_same_backup_brought_yesterday_comes_before_what_is_older_here() -> None:
    view = system(
        HostQube("debian", "TemplateVM"),
        before("debian-1"),
        HostQube("net", "AppVM", provides_network=True),
        before("net-2", provides_network=True),
        HostQube("dvm", "AppVM", template_for_dispvms=True),
        before("dvm-1", template_for_dispvms=True),
    )
    backup = (
        qube("debian", "TemplateVM"),
        qube("net", properties=NET),
        qube("dvm", properties=DISP),
        qube("work", template="debian", netvm="net", properties={"default_dispvm": "dvm"}),
    )
    planned = plan_of(*backup, view=view, names=["work"], allow=SettingsPolicy())["work"]
    found = defined(planned)
    assert (found.template, found.netvm, found.default_dispvm) == ("debian-1", "net-2", "dvm-1")
    came = "which was restored from this backup before"
    assert planned.notes == (
        f"template change to 'debian-1', {came}",
        f"netvm change to 'net-2', {came}",
        f"default_dispvm change to 'dvm-1', {came}",
    )
    planned = plan_of(*backup, view=view, conflicts="rename", allow=SettingsPolicy())["work"]
    assert (planned.template_key, planned.netvm_key) == ("key-debian", "key-net")
    assert planned.default_dispvm_key == "key-dvm"


@pytest.mark.parametrize(
    ("here", "expected", "note"),
    [
        ([before("debian-1", tag="restored-from-backup-other")], "debian", None),
        ([before("debian-1"), before("debian")], "debian", None),
        ([before("debian-2"), before("debian-1")], "debian-1", " (so were 'debian-2')"),
        ([before("debian-1", provides_network=True)], "debian", None),  # it cannot serve
        ([before("debian-3")], "debian", None),  # the name of another qube in the backup
        ([before("mint-1")], "debian", None),
    ],
)
def test_only_what_came_of_this_backup_and_can_serve_is_preferred(
    here: list[HostQube], expected: str, note: str | None
) -> None:
    plan = plan_of(
        qube("debian", "TemplateVM"),
        qube("debian-3", "TemplateVM"),
        qube("work", template="debian"),
        view=system(HostQube("debian", "TemplateVM"), *here),
        names=["work"],
    )
    assert defined(plan["work"]).template == expected
    change = f"template change to '{expected}', which was restored from this backup before{note}"
    assert plan["work"].notes == (() if note is None else (change,))


def test_a_template_that_is_not_in_the_backup_did_not_come_of_it() -> None:
    plan = plan_of(qube("work"), view=system(before("tpl-1")))
    assert defined(plan["work"]).template == "tpl"


# --- What the allow-list says --------------------------------------------------------------------------


def test_nobody_depends_on_a_service_that_may_not_come_back() -> None:
    backup = (
        qube("net", properties=NET),
        qube("dvm", properties=DISP),
        qube("client", netvm="net"),
        qube("box", "DispVM", template="dvm"),
        qube("user", properties={"default_dispvm": "dvm"}),
    )
    assert all(is_taken(planned) for planned in plan_of(*backup).values())
    plan = plan_of(*backup, allow=AllowAll("provides_network", "template_for_dispvms"))
    assert plan["client"].problem == "missing-netvm"
    assert plan["box"].problem == "missing-template"
    assert plan["user"].default_dispvm_key is None
    assert plan["net"].left_out == ("property provides_network",)
    assert defined(plan["net"]).properties == {}


def test_here_a_qube_is_what_it_is() -> None:
    view = system(HostQube("here", "AppVM", provides_network=True, template_for_dispvms=True))
    plan = plan_of(
        qube("client", netvm="here"), qube("box", "DispVM", template="here"), view=view, allow=AllowAll()
    )
    assert all(is_taken(planned) for planned in plan.values())
