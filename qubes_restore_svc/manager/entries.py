"""What there is to restore, as the restore dialog knows it: an entry for each qube of the backup.

Strategy: an entry is filled from a plan of the broker, and filled again from every later one; what it says is
what dom0 has decided, and changing it decides nothing. The names are those of the stock `VMToRestore`.
"""

from collections.abc import Iterable, Mapping

from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.wire import restore_call as c


class BackupVM:
    """A qube as it was when it was backed up."""

    def __init__(self, qube: c.PlanQube) -> None:
        self.name: str = qube.name
        self.klass: str = qube.klass
        self.label: str = qube.label
        #: name of its template; None: has none
        self.template: str | None = qube.template
        #: `netvm` (a name; None for no network) if it is not the default. Others are known to dom0 only.
        self.properties: dict[str, str | None] = {}
        if qube.netvm is not None and qube.klass != "AdminVM":
            self.properties["netvm"] = qube.netvm or None
        self.features: dict[str, str] = {}
        self.tags: set[str] = set()
        self.devices: dict[str, dict[str, str]] = {}
        self.backup_path: str = qube.key
        #: disk space that it took, bytes
        self.size: int = qube.backup_size
        self.included_in_backup = True

    @property
    def netvm(self) -> str | None:
        """Name of its netvm; None: has none, or the default one."""
        return self.properties.get("netvm")


class VMToRestore:
    """A qube of the backup, and what will become of it here."""

    #: left out, because the person said so
    EXCLUDED = object()
    #: a qube of this name is there already
    ALREADY_EXISTS = object()
    #: its netvm is nowhere
    MISSING_NETVM = object()
    #: its template is nowhere
    MISSING_TEMPLATE = object()
    #: never a problem here: kernels are not restored
    MISSING_KERNEL = object()
    #: dom0 refuses it for another reason, which `planned.error` tells (not in the stock class)
    REFUSED = object()

    def __init__(self, planned: c.PlanQube) -> None:
        self.vm = BackupVM(planned)
        self.subdir = planned.key
        self.size = planned.backup_size
        self.problems: set[object] = set()
        self.restored_vm = None
        self.update(planned)

    def update(self, planned: c.PlanQube) -> None:
        """Take over what another plan says of the same qube."""
        self.planned = planned
        #: the name that it gets
        self.name: str = planned.new_name
        #: the template that it gets; that of the backup if it is not taken
        self.template: str | None = planned.new_template or self.vm.template
        changed = self.template != self.vm.template
        self.orig_template: str | None = self.vm.template if changed else None
        self.netvm: str | None = (planned.new_netvm if self._taken else self.vm.netvm) or None
        self.problems.clear()
        if not self._taken:
            self.problems.add(_problem(planned))

    @property
    def good_to_go(self) -> bool:
        """Will it be restored, or verified?"""
        return not self.problems

    @property
    def _taken(self) -> bool:
        return self.planned.decision == "take"


class Dom0ToRestore(VMToRestore):
    """dom0's home."""

    #: it is the home of another user name
    USERNAME_MISMATCH = object()

    @property
    def username(self) -> str | None:
        """Whose home it is, if the backup says."""
        return self.planned.home_user


def restore_info(plan: c.Plan) -> dict[str, VMToRestore]:
    """All qubes of a plan by their names in the backup, in its order; dom0 last."""
    qubes = sorted(plan.qubes, key=lambda qube: qube.klass == "AdminVM")
    return {qube.name: (Dom0ToRestore if qube.klass == "AdminVM" else VMToRestore)(qube) for qube in qubes}


def checked_names(untrusted_info: Mapping[str, VMToRestore]) -> list[str]:
    """The names in a restore info; raises UsageError if it is not one that came from here, or was changed."""
    for name, entry in untrusted_info.items():
        if not isinstance(entry, VMToRestore) or entry.vm.name != name:
            raise UsageError(f"'{name}' in the restore info is not an entry of get_restore_info()", advice="")
        if entry.name != entry.planned.new_name:
            raise UsageError(
                f"'{name}' cannot be restored as '{entry.name}': dom0 gives the names",
                advice="Rename it after the restore.",
            )
    return list(untrusted_info)


def update_entries(info: Mapping[str, VMToRestore], plan: c.Plan) -> None:
    """Take over what `plan` says of the qubes in `info`; raises UsageError if it does not know one."""
    planned = {qube.name: qube for qube in plan.qubes}
    _check_known(info, planned)
    for name, entry in info.items():
        entry.update(planned[name])


def differences(info: Mapping[str, VMToRestore], plan: c.Plan) -> list[str]:
    """The qubes of `info` that are to be restored, of which `plan` says another thing than was shown."""
    planned = {qube.name: qube for qube in plan.qubes}
    _check_known(info, planned)
    return [
        name
        for name, entry in info.items()
        if entry.good_to_go and _gist(planned[name]) != _gist(entry.planned)
    ]


def _check_known(names: Iterable[str], planned: Mapping[str, c.PlanQube]) -> None:
    unknown = [name for name in names if name not in planned]
    if unknown:
        raise UsageError(f"the backup holds no qube named {', '.join(map(repr, unknown))}", advice="")


def _gist(qube: c.PlanQube) -> tuple[object, ...]:
    return qube.decision, qube.new_name, qube.new_template, qube.new_netvm


def _problem(planned: c.PlanQube) -> object:
    return _PROBLEMS.get(planned.problem or "", VMToRestore.REFUSED)


_PROBLEMS = {
    "excluded": VMToRestore.EXCLUDED,
    "not-selected": VMToRestore.EXCLUDED,
    "home-not-asked-for": VMToRestore.EXCLUDED,
    "already-exists": VMToRestore.ALREADY_EXISTS,
    "missing-template": VMToRestore.MISSING_TEMPLATE,
    "missing-netvm": VMToRestore.MISSING_NETVM,
    "username-mismatch": Dom0ToRestore.USERNAME_MISMATCH,
}
