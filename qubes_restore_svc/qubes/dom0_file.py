"""A backup in a file of dom0 on its way to the worker: read by `cat`, so that no process of ours reads it.

Strategy: `cat` stands between the file and the call that brings it. The call's own program, given the file
itself, would wait for ever where reading fails (qrexec-client takes an error of its input for a pause); `cat`
ends then, says so, and the worker sees an archive that ends early.
"""

import asyncio
import contextlib
import os
from types import TracebackType
from typing import Self

from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.waiting import to_the_end

_PROGRAM = "/bin/cat"
_KEPT = 4096  #: bytes of what it says of an error


class FileReader:
    """Reads descriptor `fd` from where it stands. An async context manager; leaving it ends the reading."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await to_the_end(self._process.communicate())

    async def open(self) -> int:
        """Begin; the descriptor to read from, which is the caller's. Raises HostFailed."""
        return await to_the_end(self._open())

    async def fault(self, timeout_s: float) -> str | None:
        """A clause, if reading has failed; waits for at most `timeout_s` seconds until that is known."""
        if self._process is None:
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        if not self._process.returncode or self._process.returncode < 0:
            return None
        assert self._process.stderr is not None
        words = (await self._process.stderr.read(_KEPT)).decode("ascii", "replace").strip()
        return f"the file could not be read ({words.rpartition(': ')[2]})"

    async def _open(self) -> int:
        try:
            reader, writer = os.pipe()
        except OSError as error:
            raise HostFailed(f"the backup cannot be read: {error.strerror}") from error
        try:
            with open(writer, "wb", buffering=0) as output:
                self._process = await asyncio.create_subprocess_exec(
                    _PROGRAM,
                    stdin=self._fd,
                    stdout=output,
                    stderr=asyncio.subprocess.PIPE,
                    env={"LC_ALL": "C"},
                    start_new_session=True,
                )
        except OSError as error:
            close_read(reader)
            raise HostFailed(f"the backup cannot be read: {_PROGRAM}: {error.strerror}") from error
        return reader
