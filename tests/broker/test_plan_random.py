"""What holds for the plan of any backup, on any host, with any choice."""

import re
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.broker.interfaces import HostQube, HostView, QubesView
from qubes_restore_svc.broker.plan import make_plan
from qubes_restore_svc.broker.references import netvms_to_give_up
from qubes_restore_svc.errors import RestoreError
from qubes_restore_svc.wire.messages import Manifest, ManifestQube
from qubes_restore_svc.wire.models import encode_message
from qubes_restore_svc.wire.restore_call import Choice, PlanQube
from tests.broker.planning import AllowAll, Decided, decided, is_taken, manifest, qube
from tests.support.wire import from_dom0, parsed

#: Few, so that they meet; some are cut when they are numbered, and some then end in what no name may.
NAMES = ["a", "b", "c", "d", "A", "a-1", "b-1", "x" * 29, "x" * 30, "x" * 31, "y" * 26 + "-dmzz", "Dom0"]
NAME = st.sampled_from(NAMES)
KLASS = st.sampled_from(["AppVM", "TemplateVM", "StandaloneVM", "DispVM"])
SWITCH = st.sampled_from(["True", "True", "False"])

PROPERTIES = st.fixed_dictionaries(
    {},
    optional={
        "provides_network": SWITCH,
        "template_for_dispvms": SWITCH,
        "default_dispvm": NAME | st.sampled_from(["", "None", "dom0"]),
        "name": NAME,
        "template": NAME,
    },
)
BACKEND = st.sampled_from(["a", "b", "dom0"])
DEVICE = st.fixed_dictionaries({"bus": st.just("pci"), "backend": BACKEND, "port": st.just("1")})


@st.composite
def qubes(draw: st.DrawFn, name: str) -> ManifestQube:
    """One qube. A worker that was taken over can also give a template to a class that has none."""
    source = qube(
        name,
        draw(KLASS),
        netvm=draw(NAME | st.sampled_from([None, "", "dom0"])),
        label=draw(st.sampled_from(["red", "mauve"])),
        properties=draw(PROPERTIES),
        devices=tuple(draw(st.lists(DEVICE, max_size=2))),
    )
    return source.model_copy(update={"template": draw(NAME | st.sampled_from([None, "dom0"]))})


@st.composite
def backups(draw: st.DrawFn) -> Manifest:
    names = draw(st.lists(NAME, unique=True, max_size=9))
    listed = [draw(qubes(name)) for name in names]
    if "Dom0" not in names and draw(st.booleans()):
        user = draw(st.sampled_from([None, "user", "other"]))
        listed.append(qube("dom0", "AdminVM", home_user=user, properties=draw(PROPERTIES)))
    return manifest(*draw(st.permutations(listed)))


@st.composite
def systems(draw: st.DrawFn) -> HostView:
    names = draw(st.lists(NAME, unique=True, max_size=6))
    there = [HostQube(name, draw(KLASS), draw(st.booleans()), draw(st.booleans())) for name in names]
    default = NAME | st.none()
    return HostView(
        frozenset({"dom0", *names}),
        QubesView(
            {one.name: one for one in (HostQube("dom0", "AdminVM"), *there)},
            draw(default),
            draw(default),
            frozenset({"red"}),
            draw(st.sampled_from([None, "user"])),
        ),
    )


@st.composite
def choices(draw: st.DrawFn, backup: Manifest) -> Choice:
    names = [one.name for one in backup.qubes]
    some = st.lists(st.sampled_from(names), max_size=4) if names else st.just([])
    return Choice(
        names=tuple(draw(some)),
        exclude=tuple(draw(some)),
        conflicts=draw(st.sampled_from(["refuse", "skip", "rename"])),
        missing=draw(st.sampled_from(["refuse", "skip", "default"])),
        dom0_home=draw(st.booleans()),
        ignore_username_mismatch=draw(st.booleans()),
    )


FORBIDDEN = st.sets(st.sampled_from(["provides_network", "template_for_dispvms"]))
ALLOWED = FORBIDDEN.map(lambda names: AllowAll(*names))
Case = tuple[Manifest, Choice, AllowAll, HostView]
CASES = backups().flatmap(lambda backup: st.tuples(st.just(backup), choices(backup), ALLOWED, systems()))
MANY = settings(max_examples=150, deadline=None)


def fits(one: HostQube | Decided, role: str) -> bool:
    """Can a qube of the host, or a taken one, serve?"""
    if isinstance(one, HostQube):
        return {
            "template": one.klass == "TemplateVM",
            "dispvm": one.template_for_dispvms,
            "netvm": one.provides_network,
        }[role]
    klass, settings = one.source.klass, one.definition
    if settings is None:
        return False
    return {
        "template": klass == "TemplateVM",
        "dispvm": settings.properties.get("template_for_dispvms") == "True"
        and klass in ("AppVM", "StandaloneVM"),
        "netvm": settings.properties.get("provides_network") == "True",
    }[role]


@MANY
@given(CASES)
def test_every_qube_of_the_backup_is_decided_on_once(case: Case) -> None:
    backup, options, allow, view = case
    plan = decided(make_plan(backup, options, view, allow=allow))
    assert [PlanQube.taken(planned.source) for planned in plan] == [*map(PlanQube.taken, backup.qubes)]
    for planned in plan:
        assert (planned.decision == "take") == (planned.problem is None)
        assert (planned.decision == "refuse") == (planned.error is not None)
        assert (planned.remark == "") == (planned.problem is None)
        if planned.decision == "take":
            assert planned.source.name not in options.exclude
            is_home = planned.source.klass == "AdminVM"
            if options.names or is_home:
                assert planned.source.name in options.names or (is_home and options.dom0_home)
            assert (planned.definition is None) == is_home
        else:
            assert planned.name == planned.source.name
            assert planned.definition is None
            assert not (planned.template_key or planned.netvm_key or planned.default_dispvm_key)
        texts = [*planned.notes, planned.error.reason if planned.error else "", planned.remark]
        assert all(re.fullmatch(r"[\x20-\x7e]{0,300}", text) for text in texts)


@MANY
@given(CASES)
def test_every_plan_is_one_that_a_client_takes(case: Case) -> None:
    backup, options, allow, view = case
    plan = make_plan(backup, options, view, allow=allow).plan
    assert parsed(from_dom0(), encode_message(plan)) == plan


@MANY
@given(CASES)
def test_every_taken_name_is_a_free_one(case: Case) -> None:
    backup, options, allow, view = case
    plan = decided(make_plan(backup, options, view, allow=allow))
    names = [planned.name for planned in plan if is_taken(planned)]
    assert len(set(names)) == len(names)
    for planned in filter(is_taken, plan):
        if planned.source.klass == "AdminVM":
            assert planned.name == "dom0"
            continue
        assert planned.name not in view.names
        assert planned.name.casefold() != "dom0"
        qube(planned.name)  # a name that a qube can have
        if planned.name != planned.source.name:
            assert options.conflicts == "rename"
            in_backup = {one.name.casefold() for one in backup.qubes}
            assert planned.name.casefold() not in in_backup | {name.casefold() for name in view.names}
            assert planned.notes[0] == f"will be renamed to '{planned.name}'"


@MANY
@given(CASES)
def test_every_reference_leads_to_what_can_serve(case: Case) -> None:
    backup, options, allow, view = case
    plan = decided(make_plan(backup, options, view, allow=allow))
    assert view.qubes_system is not None
    taken = {planned.source.key: planned for planned in plan if is_taken(planned)}

    def check(name: str, key: str | None, role: str) -> None:
        assert view.qubes_system is not None
        if key is not None:
            assert taken[key].name == name
            assert fits(taken[key], role)
        else:
            assert fits(view.qubes_system.qubes[name], role)

    for planned in taken.values():
        if planned.definition is None:
            continue
        role = {"AppVM": "template", "DispVM": "dispvm"}.get(planned.source.klass)
        if role is None:
            assert (planned.definition.template, planned.template_key) == (None, None)
        else:
            assert planned.definition.template is not None
            check(planned.definition.template, planned.template_key, role)
            if planned.fallback_template is not None:
                assert planned.template_key is not None and options.missing == "default"
                check(planned.fallback_template, None, role)
        for name, key, role in (
            (planned.definition.netvm, planned.netvm_key, "netvm"),
            (planned.definition.default_dispvm, planned.default_dispvm_key, "dispvm"),
        ):
            if name:
                check(name, key, role)
            else:
                assert key is None
        assert planned.definition.label in view.qubes_system.labels
        assert not {"name", "template", "netvm", "default_dispvm"} & planned.definition.properties.keys()
        assert all(device.backend in view.qubes_system.qubes for device in planned.definition.devices)


def waits(plan: Sequence[Decided]) -> tuple[dict[str, str], dict[str, str]]:
    templates = {one.source.key: one.template_key for one in plan if is_taken(one) and one.template_key}
    netvms = {one.source.key: one.netvm_key for one in plan if is_taken(one) and one.netvm_key}
    return templates, netvms


@MANY
@given(CASES)
def test_nobody_waits_for_itself(case: Case) -> None:
    backup, options, allow, view = case
    plan = decided(make_plan(backup, options, view, allow=allow))
    templates, netvms = waits(plan)
    left = {one.source.key for one in plan if is_taken(one)}
    while ready := {
        key for key in left if not {found.get(key) for found in (templates, netvms)} & left
    }:  # as the restore does: finish whatever waits for nothing that is unfinished
        left -= ready
    assert left == set()
    assert netvms_to_give_up(templates, netvms) == set()


@MANY
@given(CASES)
def test_what_is_missing_is_missing_whatever_the_order(case: Case) -> None:
    backup, options, allow, view = case
    plan = decided(make_plan(backup, options, view, allow=allow))
    assert view.qubes_system is not None
    taken = {planned.source.name: planned for planned in plan if is_taken(planned)}
    for planned in plan:
        source = planned.source
        role = "dispvm" if source.klass == "DispVM" else "template"
        if planned.problem == "missing-template":
            name = source.template
        elif planned.problem == "missing-netvm":
            name, role = source.netvm, "netvm"
        else:
            continue
        assert (planned.decision == "leave-out") == (options.missing == "skip")
        assert not (role == "netvm" and options.missing == "default")
        if name is None:
            continue
        assert name not in taken or not fits(taken[name], role)
        assert name not in view.qubes_system.qubes or not fits(view.qubes_system.qubes[name], role)
    turned = make_plan(backup.model_copy(update={"qubes": backup.qubes[::-1]}), options, view, allow=allow)
    assert outcome(decided(turned)) == outcome(plan)


def outcome(plan: Sequence[Decided]) -> dict[str, Any]:
    return {
        one.source.key: (one.decision, one.problem, reason(one.error), one.template_key, one.netvm_key)
        for one in plan
    }


def reason(error: RestoreError | None) -> str | None:
    return None if error is None else error.reason


@MANY
@given(CASES)
def test_verifying_depends_on_nothing_but_the_choice(case: Case) -> None:
    backup, options, *_ = case
    plan = decided(make_plan(backup, options, None))
    for planned in plan:
        assert planned.problem in (None, "excluded", "not-selected")
        assert (planned.name, planned.notes, planned.definition) == (planned.source.name, (), None)
