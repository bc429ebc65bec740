"""How a backup is to be restored: the stock options, and what they come to in a call to dom0's broker.

Strategy: a plain object with the stock names, which whoever restores may change between any two calls; every
call reads it anew. What the isolated restore cannot honour is refused, never passed over in silence.
"""

from collections.abc import Iterable
from typing import Protocol

from pydantic import SecretStr, ValidationError

from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.wire import restore_call as c


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
    )


def open_request(
    source: RestoreSource, qube: str | None, options: BackupRestoreOptions, choice: c.Choice
) -> c.OpenBackup:
    """The message that opens the backup; raises UsageError for what no such message can say."""
    try:
        return c.OpenBackup(
            mode="verify" if options.verify_only else "restore",
            location=c.BackupLocation(
                qube=qube, text=source.backup_location, service=source.location_is_service
            ),
            passphrase=SecretStr(source.passphrase),
            choice=choice,
            compression_filter=source.force_compression_filter,
            ignore_size_limit=options.ignore_size_limit,
        )
    except ValidationError as error:
        raise UsageError(_what_is_wrong(error)) from None


_WRONG = {
    "location": "the place of the backup is empty, too long, or holds characters that no path holds",
    "text": "the place of the backup is empty, too long, or holds characters that no path holds",
    "qube": "the qube that holds the backup has a name that no qube can have",
    "passphrase": "the passphrase is longer than any can be, or holds characters that none can hold",
    "compression_filter": "the compression filter has a name that no program can have",
    "pool": "no storage pool can have this name",
}


def _what_is_wrong(error: ValidationError) -> str:
    # Never the value: it may be the passphrase.
    places = error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"]
    return _WRONG.get(str(places[0]) if places else "", "an option has a value that it cannot have")
