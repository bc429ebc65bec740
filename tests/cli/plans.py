"""Plans for the tests of what is shown of them: one of everything that can be said about a qube."""

from qubes_restore_svc.broker.plan import _advice
from qubes_restore_svc.errors import BadMetadata, MissingDependency, QubeExists, RestoreError
from qubes_restore_svc.wire.messages import ManifestQube, RefusedQube, VolumeInfo
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.names import VmClass
from qubes_restore_svc.wire.restore_call import Plan, PlanQube, Problem, Settlement

SETTLED_BY: dict[Problem, tuple[Settlement, ...]] = {
    "already-exists": ("new-name", "number", "leave-out"),
    "missing-template": ("template", "default", "leave-out"),
    "missing-netvm": ("netvm", "default", "leave-out"),
    "username-mismatch": ("ignore", "leave-out"),
}


def source(
    name: str,
    klass: VmClass = "AppVM",
    template: str | None = "fedora-41",
    netvm: str | None = None,
    label: str = "red",
) -> ManifestQube:
    """A qube of the backup."""
    volume = VolumeInfo(name="home" if klass == "AdminVM" else "private")
    return ManifestQube(
        key=f"k-{name.replace('.', '-')}",
        name=name,
        klass=klass,
        label=label,
        template=template,
        netvm=netvm,
        volumes=(volume,),
    )


def taken(qube: ManifestQube, name: str = "", notes: tuple[str, ...] = (), *left_out: str) -> PlanQube:
    """It will be restored."""
    said = {"new_name": name or qube.name, "notes": notes, "settings_left_out": left_out}
    return PlanQube.taken(qube).model_copy(update=said)


def not_wanted(qube: ManifestQube, problem: Problem) -> PlanQube:
    """The person did not ask for it."""
    return PlanQube.taken(qube).model_copy(update={"decision": "leave-out", "problem": problem})


def refused(qube: ManifestQube, problem: Problem, error: RestoreError) -> PlanQube:
    """It cannot be restored."""
    ways = SETTLED_BY[problem]
    error.advice = _advice(problem, ways, "fedora-41")
    said = {
        "decision": "refuse", "problem": problem, "error": ErrorInfo.of(error), "settled_by": ways,
    }  # fmt: skip
    return PlanQube.taken(qube).model_copy(update=said)


def conflicting(name: str) -> PlanQube:
    """Its name is taken."""
    return refused(
        source(name), "already-exists", QubeExists("a qube of this name is there already", qube=name)
    )


def lacking(name: str, problem: Problem, reason: str) -> PlanQube:
    """It has no template, or no netvm; or it is another user's home."""
    qube = source(name) if name != "dom0" else source("dom0", "AdminVM", None, label="black")
    return refused(qube, problem, MissingDependency(reason, qube=name))


def plan(*qubes: PlanQube, unlisted: tuple[str, ...] = ()) -> Plan:
    """All of them, and some that cannot be listed."""
    error = ErrorInfo.of(BadMetadata("its label is malformed", advice=""))
    lost = tuple(RefusedQube(name=name, error=error) for name in unlisted)
    return Plan(number=1, mode="restore", backup_id="backup-1", qubes=qubes, unlisted=lost)


ONE_OF_EACH = plan(
    taken(source("work", netvm="sys-firewall")),
    taken(source("vault", netvm="", label="black"), "vault-1", ("will be renamed to 'vault-1'",)),
    taken(source("old", template="fedora-38"), notes=("template change to 'fedora-41'", "and more")),
    taken(source("debian-12", "TemplateVM", None, label="black")),
    not_wanted(source("mail"), "excluded"),
    not_wanted(source("chat"), "not-selected"),
    conflicting("sys-usb"),
    lacking("lab", "missing-template", "its template 'arch' is nowhere to be found"),
    not_wanted(source("dom0", "AdminVM", None, label="black"), "home-not-asked-for"),
    unlisted=("broken",),
)
