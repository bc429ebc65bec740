"""What there is to restore, as the restore dialog knows it, and how: an entry for each qube of the backup,
and the stock options with what they come to in a call to dom0's broker.

Strategy: an entry is filled from a plan of the broker, and filled again from every later one; what it says is
what dom0 has decided, and changing it decides nothing. The names are those of the stock `VMToRestore`.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

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
    """The selected qubes of `info` for which `plan` differs from what the person saw."""
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
    "already-restored": VMToRestore.EXCLUDED,
    "already-exists": VMToRestore.ALREADY_EXISTS,
    "missing-template": VMToRestore.MISSING_TEMPLATE,
    "missing-netvm": VMToRestore.MISSING_NETVM,
    "username-mismatch": Dom0ToRestore.USERNAME_MISMATCH,
}


# --- The options ---------------------------------------------------------------------------------
#
# A plain object with the stock names, which whoever restores may change between any two calls; every call
# reads it anew. What the isolated restore cannot honour is refused, never passed over in silence.


class BackupRestoreOptions:
    """The options of `qubesadmin.backup.restore.BackupRestoreOptions`, with its defaults."""

    def __init__(self) -> None:
        #: take the system's netvm instead of one that is nowhere (only together with the next but one)
        self.use_default_netvm = True
        #: not supported: a netvm that is nowhere is replaced by the default, or refused
        self.use_none_netvm = False
        #: take the system's template instead of one that is nowhere
        self.use_default_template = True
        #: kernels are never restored: a qube gets the system's, whatever this says
        self.use_default_kernel = True
        #: offer dom0's home; it is restored if 'dom0' is left in the restore info. In another qube than dom0
        #: it is offered only to be verified.
        self.dom0_home = True
        #: restore dom0's home even if it is that of another user name
        self.ignore_username_mismatch = False
        #: restore nothing, check the backup to its last byte
        self.verify_only = False
        #: restore a qube whose name is taken under another name
        self.rename_conflicting = True
        #: names of qubes to leave out, as they are called in the backup
        self.exclude: list[str] = []
        #: storage pool for all restored qubes; None: as dom0's configuration says
        self.override_pool: str | None = None
        #: accept images larger than the backup's own list says
        self.ignore_size_limit = False
        #: what was chosen for single qubes, by their names in the backup (not in the stock class)
        self.qubes: dict[str, c.QubeChoice] = {}
        #: settings that come back this time, as in `Choice.allow` (not in the stock class)
        self.allow: tuple[str, ...] = ()


class RestoreSource(Protocol):
    """What a backup is opened from."""

    backup_location: str
    passphrase: str
    location_is_service: bool
    force_compression_filter: str | None


def choice_from(
    options: BackupRestoreOptions, names: Iterable[str] = (), *, dom0_home: bool = False
) -> c.Choice:
    """What is asked for: these names, or without any of them everything (dom0's home if `dom0_home`).

    Raises UsageError for options that cannot be honoured.
    """
    if options.use_none_netvm and not options.use_default_netvm:
        raise UsageError(
            "the isolated restore cannot leave a qube without a network instead of with a missing netvm",
            advice="Leave use_none_netvm off, and change the netvm after the restore.",
        )
    # One answer for both; where they differ, a qube that lacks either is refused rather than changed.
    both = options.use_default_template and options.use_default_netvm
    return c.Choice.asked(
        names=tuple(names),
        exclude=tuple(options.exclude),
        conflicts="rename" if options.rename_conflicting else "refuse",
        missing="default" if both else "refuse",
        dom0_home=dom0_home,
        ignore_username_mismatch=options.ignore_username_mismatch,
        pool=options.override_pool,
        qubes=tuple(options.qubes.values()),
        allow=options.allow,
    )


def open_request(
    source: RestoreSource, qube: str | None, options: BackupRestoreOptions, choice: c.Choice
) -> c.OpenBackup:
    """The message that opens the backup; raises UsageError for what no such message can say."""
    return c.OpenBackup.asked(
        mode="verify" if options.verify_only else "restore",
        location={"qube": qube, "text": source.backup_location, "service": source.location_is_service},
        passphrase=source.passphrase,
        choice=choice,
        compression_filter=source.force_compression_filter,
        ignore_size_limit=options.ignore_size_limit,
    )
