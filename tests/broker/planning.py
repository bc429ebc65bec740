"""Manifests and systems to plan with, and a plan's lines in a form to compare."""

from collections.abc import Mapping, Sequence
from typing import Any

from qubes_restore_svc.broker.allowlist import AllowedSettings
from qubes_restore_svc.broker.host import HostQube, HostView, QubesView
from qubes_restore_svc.broker.plan import Decision, Plan, PlannedQube, PlanOptions, make_plan
from qubes_restore_svc.wire.messages import ErrorInfo, Manifest, ManifestQube, RefusedQube

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

    def choose(self, qube: ManifestQube) -> AllowedSettings:
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


def plan_of(*qubes: ManifestQube, view: HostView | None = None, **options: Any) -> Mapping[str, PlannedQube]:
    """The plan for `view`, or the usual system, by the qubes' names in the backup."""
    return by_name(
        make_plan(manifest(*qubes), PlanOptions(**{"allow": AllowAll(), **options}), view or system())
    )


def by_name(plan: Plan) -> Mapping[str, PlannedQube]:
    found = {planned.source.name: planned for planned in plan.qubes}
    assert len(found) == len(plan.qubes)
    return found


def is_taken(planned: PlannedQube) -> bool:
    return planned.decision is Decision.TAKE
