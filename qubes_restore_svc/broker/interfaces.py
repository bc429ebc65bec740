"""The two interfaces of the broker: the host that gets the qubes, and the link to a worker.

Strategy: a restore holds the host's lock, looks at the host once to make its plan, opens one transaction a
qube, writes volumes through sinks, and commits or rolls back. Everything here blocks; the broker calls it
from a thread where it may take long. A host raises a `RestoreError`, most often `HostFailed` or
`NoSpace`.

A link is an async context manager that owns the worker: entering starts it, leaving destroys it, whatever
happened. In between the broker makes qrexec-style calls and gets a connected stream socket for each.
"""

import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol, Self

from qubes_restore_svc.errors import ArchiveUnreadable, RestoreError
from qubes_restore_svc.wire.messages import DeviceInfo, ManifestQube, QubeSettings, Storage
from qubes_restore_svc.wire.names import VolumeName
from qubes_restore_svc.wire.report import Difference, VolumeReport

#: On a restored qube, with the backup's id after it.
RESTORED_TAG = "restored-from-backup-"

_NOT_IN_A_TAG = re.compile(r"[^a-zA-Z0-9_-]")
_MAX_TAG = 128


def restored_tag(backup_id: str) -> str:
    """The tag of a qube that was restored from this backup."""
    return (RESTORED_TAG + _NOT_IN_A_TAG.sub("-", backup_id))[:_MAX_TAG]


@dataclass(frozen=True, slots=True)
class HostQube:
    """A qube that is there already, with the facts that a plan needs. `restored_tags` say from which backups
    it is."""

    name: str
    klass: str
    provides_network: bool = False
    template_for_dispvms: bool = False
    restored_tags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class QubesView:
    """A Qubes system, with the facts that a plan needs. Defaults are names of qubes that are there, or None.

    `default_dispvm` is the disposable template; `dom0_user` is the account whose home dom0's home is.
    `policy_names` are the names in this system's policy, and for each a file that it stands in.
    """

    qubes: Mapping[str, HostQube]
    default_template: str | None
    default_dispvm: str | None
    labels: frozenset[str]
    dom0_user: str | None = None
    policy_names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HostView:
    """What a plan must know of a host: the names that are taken, and the system if it is a Qubes system.

    Names that the policy speaks of are among them, if the restore is for somebody outside dom0.
    `qubes_system` None: a place that keeps images and knows neither templates nor netvms. `remarks` are
    sentences, without a stop, on what could not be found out about it.
    """

    names: frozenset[str]
    qubes_system: QubesView | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Definition:
    """How a qube is to be set up here: the broker's choice, never the backup's.

    Names are those of qubes that are there, or that this restore creates. For `netvm` and `default_dispvm`,
    None means the system's default and "" none at all. Properties, features, tags and devices have passed the
    broker's allow-list; `properties` holds none of those that have a field here.
    """

    label: str
    template: str | None = None
    netvm: str | None = None
    default_dispvm: str | None = None
    properties: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    devices: tuple[DeviceInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class NewQube:
    """A qube that is to be created: the broker's choice of name, and what the backup says of it.

    `definition` is None on a host without a Qubes system (see `HostView`), and for dom0's home. `pool` is the
    storage pool that the person chose; None: the host's own choice.
    """

    name: str
    source: ManifestQube
    backup_id: str
    warnings: tuple[str, ...] = field(default=())
    definition: Definition | None = None
    pool: str | None = None


@dataclass(frozen=True, slots=True)
class RestoredQube:
    """A qube that is here whole, as an earlier restore of the same backup left it: its proof says so.

    `volumes` are all that came, each with its size, and with the digest that was told then. `has_firewall`:
    rules came with it; without, it has the default.
    """

    name: str
    name_in_backup: str
    volumes: tuple[VolumeReport, ...]
    has_firewall: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of a sink that writes nothing: how the volume here is. `error`: why that is not known."""

    outcome: Literal["same", "differs", "newer", "missing", "failed"]
    difference: Difference | None = None
    error: RestoreError | None = None


class VolumeSink(Protocol):
    """One volume being written, or compared with what is here."""

    def write(self, offset: int, data: memoryview) -> None:
        """Put `data` (1 byte to 1 MiB) at `offset`, in bytes; offsets rise from call to call."""

    def finish(self, size: int) -> Comparison | None:
        """The volume is complete and `size` bytes long; what was not written is zero.

        Returns the result if it was compared. A fault of the volume here is such a result, too. A comparison
        does not raise it, because the other volumes of the qube are compared all the same.
        """

    def abandon(self) -> None:
        """The volume will not be completed; gives back what it holds. Harmless after `finish`.

        To be called at any time, from any thread: a `write` or `finish` that is under way ends as soon as the
        system lets it, and this does not wait for it.
        """


class QubeTransaction(Protocol):
    """One qube on its way: invisible, or unable to start, until `commit`.

    It exists from the moment of `begin`: other qubes of the same restore may name it as their template.
    """

    def create_volume(self, volume: VolumeName, image_size: int) -> VolumeSink:
        """A sink for a volume of at most `image_size` bytes (exactly as many, but for `home`)."""

    def change_template(self, template: str) -> None:
        """The template of the definition could not be restored: use this one, which is there."""

    def commit(
        self,
        settings: QubeSettings,
        definition: Definition | None,
        volumes: Sequence[VolumeReport] = (),
    ) -> Sequence[str]:
        """Apply settings and definition, and make the qube a finished one.

        `definition` is that of `begin`, with its references as they have turned out. Every qube that it names
        is finished by now. `volumes` are those of the qube, with their digests, for the proof that it is
        finished (see `Host.restored_from`); the proof is written last. Returns remarks for the person on
        settings that could not be applied, and whose absence does no harm (clauses, fit for a terminal).
        """

    def rollback(self) -> None:
        """Remove all that was created, volumes that are not finished included.

        Does nothing after `commit` or a second time.
        """


class Host(Protocol):
    """A place where qubes can be created; or one where they are, and are compared with those of the backup.

    For a comparison, `begin` finds a qube instead of creating it, `commit` and `rollback` let it go, and
    `view` names those that can be compared.
    """

    def lock(self) -> AbstractContextManager[Sequence[str]]:
        """The one-restore lock, also clears up what an interrupted restore left behind.

        Brings remarks on that for the person (clauses, fit for a terminal). Raises RestoreInProgress at once
        when somebody else holds it.
        """

    def view(self) -> HostView:
        """The host as it is now."""

    def free_space(self, pool: str | None = None) -> int | None:
        """Bytes that volumes can still take, in the pool that the person chose if one was, if it is known."""

    def begin(self, qube: NewQube) -> QubeTransaction:
        """Start a qube; raises QubeExists if its name is taken by now."""

    def set_default_dispvm(self, qube: str, default_dispvm: str) -> None:
        """Give a finished qube the disposable template that has been restored after it."""

    def restored_from(self, backup_id: str) -> Sequence[RestoredQube]:
        """The qubes here that restores of this backup have finished, as far as that is proven."""

    def take_back(self, qube: str, backup_id: str, *, from_before: bool) -> bool:
        """A finished qube is not complete: it is none that `restored_from` names, from now on.

        Its network is taken away, if it is halted and still as this backup brought it; not if an earlier
        restore has brought it (`from_before`): somebody uses it as it is. Says whether that was done.
        """


#: What `source` is if a program pipes the backup in.
PIPE = "the pipe that brings the backup"


class Link(Protocol):
    """A worker for this restore alone."""

    async def __aenter__(self) -> Self:
        """Start the worker; raises SandboxUnavailable or WorkerLost."""

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Destroy the worker and wait until it is gone (a second at the most)."""

    async def call(self, service: str, argument: str = "") -> socket.socket:
        """Call a service of the worker; the socket is blocking, and the caller's. Raises WorkerLost."""

    @property
    def source(self) -> str:
        """Where the archive comes from, as the person knows it: `sys-usb`, `the file of the backup`."""

    @property
    def storage(self) -> Storage | None:
        """The place from which the worker has to fetch the archive itself; None if the worker has it, or gets
        it."""

    async def provide_archive(self) -> None:
        """Let the worker have the archive, if that needs a call: once before `open`, once before `start`.

        Raises WorkerLost, and ArchiveUnreadable if the storage side does not give it.
        """

    async def archive_fault(self) -> ArchiveUnreadable | None:
        """Why the archive ends early, if the side that brings it has failed: the worker sees only its end.

        To be asked when something is missing; waits for a moment, until that side has ended as well.
        """

    @property
    def archive_gaps(self) -> str | None:
        """A clause, if the side that brings the archive could not read all of it, and brought zeros instead.

        What the worker reads itself, it reports itself.
        """

    async def wait_gone(self) -> str:
        """Wait until the worker has ended. Returns the reason as far as it is known (printable, one line)."""
