"""Manifests and systems to plan with, and a plan's lines in a form to compare."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qubes_restore_svc.broker.allowlist import AllowedSettings, AllowList
from qubes_restore_svc.broker.interfaces import Definition, HostQube, HostView, QubesView
from qubes_restore_svc.broker.plan import Planned, make_plan
from qubes_restore_svc.broker.references import SetUp
from qubes_restore_svc.errors import RestoreError
from qubes_restore_svc.wire.messages import ErrorInfo, Manifest, ManifestQube, RefusedQube
from qubes_restore_svc.wire.restore_call import Choice, PlanQube

NET = {"provides_network": "True"}
DISP = {"template_for_dispvms": "True"}


def qube(name: str, klass: str = "AppVM", template: str | None = "tpl", **fields: Any) -> ManifestQube:
    """A qube of a backup; an AppVM or DispVM is based on `tpl`, and netvm is none if it is not given."""
    volume = {"AdminVM": "home", "DispVM": None}.get(klass, "private")
    return ManifestQube.model_validate(
        {
            "key": f"key-{name.replace('.', '_')}",
            "name": name,
            "klass": klass,
            "label": "red",
            "template": template if klass in ("AppVM", "DispVM") else None,
            "netvm": "",
            "volumes": ({"name": volume},) if volume else (),
            **fields,
        }
    )


def manifest(*qubes: ManifestQube, refused: Sequence[str] = ()) -> Manifest:
    error = ErrorInfo(kind="bad-metadata", reason="no")
    return Manifest(
        backup_id="b",
        format=4,
        compression_filter="gzip",
        qubes=qubes,
        refused=tuple(RefusedQube(name=name, error=error) for name in refused),
    )


class AllowAll:
    """Every setting comes back but properties of the names given."""

    def __init__(self, *forbidden: str) -> None:
        self.forbidden = forbidden

    def check(self, also: Collection[str]) -> None:
        pass

    def let_through(self, qube: ManifestQube, also: Collection[str] = ()) -> AllowedSettings:
        properties = {name: value for name, value in qube.properties.items() if name not in self.forbidden}
        left_out = tuple(f"property {name}" for name in qube.properties if name in self.forbidden)
        return AllowedSettings(properties, qube.features, qube.tags, qube.devices, left_out)


#: The system that most tests restore to.
HOST = (
    HostQube("dom0", "AdminVM"),
    HostQube("tpl", "TemplateVM"),
    HostQube("default-tpl", "TemplateVM"),
    HostQube("default-dvm", "AppVM", template_for_dispvms=True),
    HostQube("sys-net", "AppVM", provides_network=True),
    HostQube("plain", "AppVM"),
)


def system(
    *more: HostQube,
    default_template: str | None = "default-tpl",
    default_dispvm: str | None = "default-dvm",
    dom0_user: str | None = "user",
) -> HostView:
    qubes = {one.name: one for one in (*HOST, *more)}
    labels = frozenset({"red", "blue", "black"})
    return HostView(frozenset(qubes), QubesView(qubes, default_template, default_dispvm, labels, dom0_user))


@dataclass(frozen=True, slots=True)
class Decided:
    """What a plan says of one qube, and how it is set up, which never leaves the broker."""

    source: PlanQube
    name: str
    decision: str
    problem: str | None
    error: RestoreError | None
    remark: str
    notes: tuple[str, ...]
    left_out: tuple[str, ...]
    definition: Definition | None = None
    template_key: str | None = None
    netvm_key: str | None = None
    default_dispvm_key: str | None = None
    fallback_template: str | None = None


def plan_of(
    *qubes: ManifestQube,
    view: HostView | None = None,
    allow: AllowList | None = None,
    compare: bool = False,
    **choice: Any,
) -> Mapping[str, Decided]:
    """The plan for `view`, or the usual system, by the qubes' names in the backup."""
    allow = AllowAll() if allow is None else allow
    wanted = Choice.asked(
        **{key: tuple(one) if isinstance(one, list) else one for key, one in choice.items()}
    )
    return by_name(make_plan(manifest(*qubes), wanted, view or system(), allow=allow, compare=compare))


def decided(planned: Planned) -> list[Decided]:
    return [_decided(qube, planned.set_ups.get(qube.key)) for qube in planned.plan.qubes]


def by_name(planned: Planned) -> Mapping[str, Decided]:
    found = {one.source.name: one for one in decided(planned)}
    assert len(found) == len(planned.plan.qubes)
    return found


def _decided(qube: PlanQube, found: SetUp | None) -> Decided:
    error = None if qube.error is None else qube.error.to_error()
    said = (qube, qube.new_name, qube.decision, qube.problem, error, qube.remark, qube.notes)
    if found is None:
        return Decided(*said, qube.settings_left_out)
    assert (qube.new_template, qube.new_netvm) == (found.definition.template, found.definition.netvm)
    return Decided(
        *said,
        qube.settings_left_out,
        found.definition,
        found.template_key,
        found.netvm_key,
        found.default_dispvm_key,
        found.fallback_template,
    )


def is_taken(planned: Decided) -> bool:
    return planned.decision == "take"
