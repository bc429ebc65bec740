"""What the broker needs of a host, whichever it is.

Strategy: a restore holds the host's lock, opens one transaction a qube, writes volumes through sinks, and
commits or rolls back. Everything here blocks; the broker calls it from a thread where it may take long. What
a host raises is a `RestoreError`, most often `HostFailed` or `NoSpace`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from qubes_restore_svc.wire.messages import ManifestQube, QubeSettings
from qubes_restore_svc.wire.names import VolumeName


@dataclass(frozen=True, slots=True)
class NewQube:
    """A qube that is to be created: the broker's choice of name, and what the backup says of it."""

    name: str
    source: ManifestQube
    backup_id: str
    warnings: tuple[str, ...] = field(default=())


class VolumeSink(Protocol):
    """One volume being written."""

    def write(self, offset: int, data: memoryview) -> None:
        """Put `data` (1 byte to 1 MiB) at `offset`, in bytes; offsets rise from call to call."""
        ...

    def finish(self, size: int) -> None:
        """The volume is complete and `size` bytes long; what was not written is zero."""
        ...

    def abandon(self) -> None:
        """The volume will not be completed; gives back what it holds. Harmless after `finish`."""
        ...


class QubeTransaction(Protocol):
    """One qube on its way: invisible, or unable to start, until `commit`."""

    def create_volume(self, volume: VolumeName, image_size: int) -> VolumeSink:
        """A sink for a volume of at most `image_size` bytes."""
        ...

    def commit(self, settings: QubeSettings) -> None:
        """Apply the settings and make the qube a finished one."""
        ...

    def rollback(self) -> None:
        """Remove all that was created, volumes that are not finished included.

        Does nothing after `commit` or a second time.
        """
        ...


class Host(Protocol):
    """A place where qubes can be created."""

    def lock(self) -> AbstractContextManager[Sequence[str]]:
        """The one-restore lock, also clears up what an interrupted restore left behind.

        Brings remarks on that for the person (clauses, fit for a terminal). Raises RestoreInProgress when
        somebody else holds it.
        """
        ...

    def existing_names(self) -> frozenset[str]:
        """Names that are taken."""
        ...

    def free_space(self) -> int | None:
        """Bytes that volumes can still take, if the host knows."""
        ...

    def begin(self, qube: NewQube) -> QubeTransaction:
        """Start a qube; raises QubeExists if its name is taken by now."""
        ...
