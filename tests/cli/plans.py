"""Plans for the tests of what is shown of them: one of everything that can be said about a qube."""

from qubes_restore_svc.broker.plan import Decision, Plan, PlannedQube, Problem, UnlistedQube
from qubes_restore_svc.errors import BadMetadata, MissingDependency, QubeExists
from qubes_restore_svc.wire.messages import ManifestQube, VolumeInfo
from qubes_restore_svc.wire.names import VmClass


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


def taken(qube: ManifestQube, name: str = "", notes: tuple[str, ...] = (), *left_out: str) -> PlannedQube:
    """It will be restored."""
    return PlannedQube(qube, name or qube.name, Decision.TAKE, notes=notes, left_out=left_out)


def not_wanted(qube: ManifestQube, problem: Problem) -> PlannedQube:
    """The person did not ask for it."""
    return PlannedQube(qube, qube.name, Decision.LEAVE_OUT, problem.value, problem=problem)


def conflicting(name: str) -> PlannedQube:
    """Its name is taken."""
    qube, error = source(name), QubeExists("a qube of this name is there already", qube=name)
    return PlannedQube(qube, name, Decision.REFUSE, "exists already", error, Problem.ALREADY_EXISTS)


def lacking(name: str, problem: Problem, reason: str) -> PlannedQube:
    """It has no template, or no netvm; or it is another user's home."""
    qube = source(name) if name != "dom0" else source("dom0", "AdminVM", None, label="black")
    return PlannedQube(
        qube, name, Decision.REFUSE, problem.value, MissingDependency(reason, qube=name), problem
    )


def plan(*qubes: PlannedQube, unlisted: tuple[str, ...] = ()) -> Plan:
    """All of them, and some that cannot be listed."""
    lost = (UnlistedQube(name, BadMetadata("its label is malformed", advice="")) for name in unlisted)
    return Plan("backup-1", qubes, tuple(lost))


ONE_OF_EACH = plan(
    taken(source("work", netvm="sys-firewall")),
    taken(source("vault", netvm="", label="black"), "vault-1", ("will be renamed to 'vault-1'",)),
    taken(source("old", template="fedora-38"), notes=("template change to 'fedora-41'", "and more")),
    taken(source("debian-12", "TemplateVM", None, label="black")),
    not_wanted(source("mail"), Problem.EXCLUDED),
    not_wanted(source("chat"), Problem.NOT_SELECTED),
    conflicting("sys-usb"),
    lacking("lab", Problem.MISSING_TEMPLATE, "its template 'arch' is nowhere to be found"),
    not_wanted(source("dom0", "AdminVM", None, label="black"), Problem.HOME_NOT_ASKED_FOR),
    unlisted=("broken",),
)
