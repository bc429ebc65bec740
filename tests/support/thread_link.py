"""The real worker in a thread of the test's process: for tests of what it says, not of how it is held.

Strategy: the same daemon, behind the same socket of passed calls, as in the sandbox; only the process
around it is missing. A restore through it takes a tenth of a second less than none at all.
"""

import asyncio
import os
import socket
import threading
from types import TracebackType
from typing import Self

from qubes_restore_svc.errors import WorkerLost
from qubes_restore_svc.kdf.engine import KdfEngine, OpensslEngine
from qubes_restore_svc.wire.qrexec_call import READY, ServiceCall, encode_descriptor
from qubes_restore_svc.worker.daemon import Daemon, PassedCalls

MEMORY = 256 << 20  #: bytes; the budget of a worker here, unless the session says otherwise


class ThreadLink:
    """A link (see `broker.interfaces.Link`) to a worker of this process. `archive_fd` stays the caller's."""

    def __init__(self, archive_fd: int, engine: KdfEngine | None = None, jobs: int = 2) -> None:
        self._archive_fd = archive_fd
        self._engine = engine or OpensslEngine()
        self._jobs = jobs
        self._calls: socket.socket
        self._thread: threading.Thread
        self._ended = threading.Event()

    async def __aenter__(self) -> Self:
        """Start the thread."""
        self._calls, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        archive_fd = os.dup(self._archive_fd)

        async def serve() -> None:
            calls = PassedCalls(theirs)
            daemon = Daemon(calls.accept, self._engine, memory=MEMORY, jobs=self._jobs, archive_fd=archive_fd)
            await daemon.serve()

        def run() -> None:
            try:
                asyncio.run(serve())
            finally:
                theirs.close()
                os.close(archive_fd)
                self._ended.set()

        self._thread = threading.Thread(target=run, name="worker", daemon=True)
        self._thread.start()
        assert await asyncio.to_thread(self._calls.recv, 16) == READY
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Hang up and wait for the thread."""
        self._calls.close()
        await asyncio.to_thread(self._thread.join, 10)
        assert not self._thread.is_alive(), "the worker did not end"

    async def call(self, service: str, argument: str = "") -> socket.socket:
        """Call a service of the worker."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            ours.sendall(encode_descriptor(ServiceCall(service, argument, "dom0")))
            try:
                socket.send_fds(self._calls, [b"call"], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise WorkerLost("the worker is not running") from error
        return ours

    @property
    def source(self) -> str:
        """It is always a file."""
        return "the file of the backup"

    @property
    def storage(self) -> None:
        """The worker has the archive from the start."""

    async def provide_archive(self) -> None:
        """The worker has the archive from the start."""

    async def archive_fault(self) -> None:
        """The archive is a descriptor."""

    @property
    def archive_gaps(self) -> None:
        """The same."""

    async def wait_gone(self) -> str:
        """Return when the thread has ended."""
        while not self._ended.is_set():
            await asyncio.sleep(0.01)
        return "the thread ended"
