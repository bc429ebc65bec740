"""A worker on this machine: a child process in a sandbox, called through sockets that only it can have.

Strategy: the worker inherits one end of a socket pair. A call makes another pair and sends one half of it
along. So there is no name under which anybody else could reach the worker, or a worker that was taken over
could be reached by an accomplice; and nothing in the file system. The same pair is the lifeline:
when the broker is gone, however it went, the worker reads its end. The worker's first message says that it
is ready, before it has touched the archive; a sandbox that cannot be had is known by then.
"""

import asyncio
import contextlib
import os
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from fcntl import F_GETFL, LOCK_EX, LOCK_NB, fcntl, flock
from typing import Self

from qubes_restore_svc.broker.link import PIPE
from qubes_restore_svc.errors import BudgetTooSmall, SandboxUnavailable, UsageError, WorkerLost, exhausted
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.local.interpreter import worker_command
from qubes_restore_svc.local.limits import granted_to_workers
from qubes_restore_svc.local.sandbox import find_bubblewrap, sandbox_failed
from qubes_restore_svc.local.worker_process import SandboxFailed, WorkerProcess
from qubes_restore_svc.system_memory import LEAST_MEMORY, RAISE_LIMIT, MemoryRoom, memory_room
from qubes_restore_svc.waiting import to_the_end
from qubes_restore_svc.wire.service import ServiceCall, encode_descriptor

#: What a chunk of 100 MiB takes whose N is 2^21, with the worker itself, bytes.
_FOR_A_FAST_COMPUTER = 320 << 20

#: Memory for a worker that was granted no certain amount, bytes: more than this gains little
#: (docs/performance.md), and what runs beside it needs memory as well.
_ENOUGH, _ENOUGH_A_PROCESSOR = 4 << 30, 1 << 30
#: The least that a worker gets where there is so much: that, and what a worker does not touch of a grant that
#: nobody chose. As much is left for others that may come.
_LEAST, _OTHERS = _FOR_A_FAST_COMPUTER + (176 << 20), 3

#: Seconds that a start waits for another one, and between two attempts.
_TURN_S, _PAUSE_S = 3.0, 0.02

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
        _check_memory(memory_room(), self._memory_limit)
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
        """Return when the worker has ended, with what is known of why (printable, one line)."""
        return await self._running().wait_gone()

    async def _start(self, bubblewrap: str | None, *, disable_userns: bool) -> WorkerProcess:
        worker = WorkerProcess(bubblewrap, disable_userns=disable_userns)
        try:
            async with _turn() if self._memory_limit is None else contextlib.nullcontext():
                room = memory_room()
                limit = self._memory_limit or _default_memory(room, granted_to_workers())
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


def _default_memory(room: MemoryRoom, granted: int) -> int:
    """What is free, but neither more nor less than is of use, and with something left for others who come."""
    enough = max(_ENOUGH, _ENOUGH_A_PROCESSOR * len(os.sched_getaffinity(0)))
    free = room.available - granted
    share = max(free // 2, free - _OTHERS * _LEAST)
    return min(room.available, max(_LEAST, min(enough, share)))


@contextlib.asynccontextmanager
async def _turn() -> AsyncIterator[None]:
    """One start at a time, so that each sees what the others were granted. Whoever has waited goes on."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            file = os.open(sys.executable, os.O_RDONLY | os.O_CLOEXEC)
            held.callback(close_read, file)
            deadline = time.monotonic() + _TURN_S
            while not _locked(file) and time.monotonic() < deadline:
                await asyncio.sleep(_PAUSE_S)
        yield


def _locked(file: int) -> bool:
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_memory(room: MemoryRoom, granted: int | None) -> None:
    """Refuse what the kernel would end with a kill: it would not say why."""
    if granted is None and room.available < LEAST_MEMORY:
        raise BudgetTooSmall(
            f"the worker takes {LEAST_MEMORY >> 20} MiB at least, and for the backup of a fast computer about"
            f" {_FOR_A_FAST_COMPUTER >> 20} MiB; but {room.told}",
            advice=RAISE_LIMIT if room.group else "End other programs.",
        )
    if granted is not None and room.group and granted > room.available:
        raise BudgetTooSmall(
            f"--memory {granted >> 20} is more than there is: {room.told}",
            advice=f"{RAISE_LIMIT} Or give less.",
        )


def _check_archive(fd: int) -> None:
    """Refuse what would give the worker more than the archive's bytes: writing, a directory, a terminal."""
    mode = os.fstat(fd).st_mode
    readable = stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISBLK(mode) or stat.S_ISCHR(mode)
    if not readable or os.isatty(fd) or fcntl(fd, F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
        raise UsageError(
            "the backup must be a file, a pipe or a device that is open for reading only",
            advice="Give the name of the file, or pipe the backup in: cat FILE | …",
        )
