"""A worker on this machine: a child process in a sandbox, called through sockets that only it can have.

Strategy: the worker inherits one end of a socket pair. A call makes another pair and sends one half of it
along. So there is no name and no file under which another process could reach the worker, not even an
accomplice of a worker that was taken over. The same pair tells the worker when the broker is gone: it reads
the end then. The worker's first message says that it is ready, before it has touched the archive. So a
sandbox that cannot start is noticed before that.
"""

import os
import socket
import stat
from collections.abc import Callable, Sequence
from fcntl import F_GETFL, fcntl
from typing import Self

from qubes_restore_svc.broker.interfaces import PIPE
from qubes_restore_svc.errors import SandboxUnavailable, UsageError, WorkerLost, exhausted
from qubes_restore_svc.local.memory import check_memory, worker_memory
from qubes_restore_svc.local.sandbox import find_bubblewrap, sandbox_failed, worker_command
from qubes_restore_svc.local.worker_process import SandboxFailed, WorkerProcess
from qubes_restore_svc.waiting import to_the_end
from qubes_restore_svc.wire.qrexec_call import ServiceCall, encode_descriptor

_OWN_GROUP = "the worker has a control group of its own, which limits its memory"
_NO_GROUP = "the worker has no control group of its own: limits of its addresses bound its memory"


class LocalLink:
    """The link to a worker of one's own on this machine; to be entered once, in the main thread.

    `archive_fd` is the backup, open for reading only: a file, a pipe or a device. It stays the caller's.
    `memory_limit` is how much memory the worker may take, bytes; None: what is available now, and no more
    than is of use.
    `command` is a program to run instead of the worker. Options are appended: `--calls-fd N`, the socket on
    which calls come, each a message with a descriptor; `--archive-fd N`; `--memory-limit BYTES`;
    `--memory-room TEXT`, what could be granted at most.

    `log` is told, with a level and a text, how the worker is limited.

    Without `sandbox` the worker has the rights, the files and the network of this process.
    """

    def __init__(
        self,
        archive_fd: int,
        *,
        sandbox: bool = True,
        memory_limit: int | None = None,
        command: Sequence[str] | None = None,
        log: Callable[[str, str], None] | None = None,
    ) -> None:
        self._archive_fd = archive_fd
        self._sandbox = sandbox
        self._memory_limit = memory_limit
        self._command = command
        self._log = log
        self._worker: WorkerProcess | None = None

    async def __aenter__(self) -> Self:
        """Start the worker and wait until it is ready.

        Raises SandboxUnavailable; WorkerLost if it ends instead; UsageError for a descriptor that a
        worker must not have.
        """
        _check_archive(self._archive_fd)
        check_memory(self._memory_limit)
        bubblewrap = find_bubblewrap() if self._sandbox else None
        try:
            self._worker = await self._start(bubblewrap, disable_userns=True)
        except SandboxFailed:
            # Old versions do not know the option, some systems forbid it, in words that differ: so it is
            # tried without. The filter of system calls stands in for it.
            try:
                self._worker = await self._start(bubblewrap, disable_userns=False)
            except SandboxFailed as second_failure:
                raise sandbox_failed(second_failure.words) from None
        if self._log is not None:
            self._log("info", _OWN_GROUP if self._worker.in_group else _NO_GROUP)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Kill the worker and wait until nothing is left of it, even if cancelled meanwhile."""
        if self._worker is not None:
            await to_the_end(self._worker.destroy())

    async def call(self, service: str, argument: str = "") -> socket.socket:
        """Call a service of the worker; the socket is blocking, and the caller's. Raises WorkerLost.

        It never waits: what the worker does not answer is for the caller's own timeouts.
        """
        return self._running().call(encode_descriptor(ServiceCall(service, argument, "dom0")))

    @property
    def source(self) -> str:
        """What kind of thing the descriptor is: its name is the caller's."""
        mode = os.fstat(self._archive_fd).st_mode
        if stat.S_ISFIFO(mode):
            return PIPE
        return "the file of the backup" if stat.S_ISREG(mode) else "the device that holds the backup"

    @property
    def storage(self) -> None:
        """The worker has the archive from the start."""

    async def provide_archive(self) -> None:
        """The worker has the archive from the start."""

    async def archive_fault(self) -> None:
        """The worker reads it itself and has said all that can be known."""

    @property
    def archive_gaps(self) -> None:
        """The same."""

    async def wait_gone(self) -> str:
        """Wait until the worker has ended. Returns the reason as far as it is known (printable, one line)."""
        return await self._running().wait_gone()

    async def _start(self, bubblewrap: str | None, *, disable_userns: bool) -> WorkerProcess:
        worker = WorkerProcess(bubblewrap, disable_userns=disable_userns)
        try:
            async with worker_memory(self._memory_limit) as (room, limit):
                command = [*(self._command or worker_command()), "--memory-room", str(room)]
                await worker.start(command, self._archive_fd, limit)
        except OSError as error:
            if (found := exhausted(error)) is not None:
                raise found from error
            reason = f"the worker cannot be started: {error.strerror or error}"
            raise (SandboxUnavailable(reason) if bubblewrap else WorkerLost(reason)) from error
        return worker

    def _running(self) -> WorkerProcess:
        if self._worker is None:
            raise WorkerLost("the worker was not started")
        return self._worker


def _check_archive(fd: int) -> None:
    """Refuse what would give the worker more than the archive's bytes: writing, a directory, a terminal."""
    mode = os.fstat(fd).st_mode
    readable = stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISBLK(mode) or stat.S_ISCHR(mode)
    if not readable or os.isatty(fd) or fcntl(fd, F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
        raise UsageError(
            "the backup must be a file, a pipe or a device that is open for reading only",
            advice="Give the name of the file, or pipe the backup in: cat FILE | …",
        )
