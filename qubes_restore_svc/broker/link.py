"""What the broker needs of a link to a worker, whichever it is.

Strategy: an async context manager owns the worker: entering starts it, leaving destroys it, whatever
happened. In between the broker makes qrexec-style calls and gets a connected stream socket for each.
"""

import socket
from types import TracebackType
from typing import Protocol, Self

from qubes_restore_svc.errors import ArchiveUnreadable
from qubes_restore_svc.wire.messages import Storage

#: What `source` is if a program pipes the backup in.
PIPE = "the pipe that brings the backup"


class Link(Protocol):
    """A worker of one's own."""

    async def __aenter__(self) -> Self:
        """Start the worker; raises SandboxUnavailable or WorkerLost."""
        ...

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Destroy the worker and wait until it is gone (a second at the most)."""
        ...

    async def call(self, service: str, argument: str = "") -> socket.socket:
        """Call a service of the worker; the socket is blocking, and the caller's. Raises WorkerLost."""
        ...

    @property
    def source(self) -> str:
        """Where the archive comes from, as the person knows it: `sys-usb`, `the file of the backup`."""
        ...

    @property
    def storage(self) -> Storage | None:
        """Where the worker has to fetch the archive itself; None if it has it, or gets it."""
        ...

    async def provide_archive(self) -> None:
        """Let the worker have the archive, if that needs a call: once before `open`, once before `start`.

        Raises WorkerLost, and ArchiveUnreadable if the storage side does not give it.
        """
        ...

    async def archive_fault(self) -> ArchiveUnreadable | None:
        """Why the archive ends early, if the side that brings it has failed: the worker sees only its end.

        To be asked when something is missing; waits for a moment, until that side has ended as well.
        """
        ...

    @property
    def archive_gaps(self) -> str | None:
        """A clause, if the side that brings the archive could not read all of it, and brought zeros instead.

        What the worker reads itself, it tells itself.
        """
        ...

    async def wait_gone(self) -> str:
        """Return when the worker has ended, with what is known of why (printable, one line)."""
        ...
