"""Pipes from child processes, read to their end whatever comes.

Strategy: the event loop takes what there is, so that no child ever waits for its reader, and keeps only the
last bytes, so that none can fill our memory.
"""

import asyncio
import contextlib
import os

from qubes_restore_svc.hardening import close_read

_READ_SIZE = 1 << 16


class Tail:
    """Reads a pipe until its end, whoever writes and however much, and keeps the last bytes."""

    def __init__(self, fd: int, kept: int) -> None:
        self.content = b""
        self._fd = fd
        self._kept = kept
        self._ended = asyncio.Event()
        os.set_blocking(fd, False)
        asyncio.get_running_loop().add_reader(fd, self._read)

    async def wait_end(self, timeout_s: float) -> None:
        """Wait until every writer has closed the pipe, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()

    def close(self) -> None:
        if not self._ended.is_set():
            asyncio.get_running_loop().remove_reader(self._fd)
            close_read(self._fd)
            self._ended.set()

    def _read(self) -> None:
        try:
            piece = os.read(self._fd, _READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self.close()
        self.content = (self.content + piece)[-self._kept :]


def tail_of_pipe(kept: int, inherited: contextlib.ExitStack) -> tuple[Tail, int]:
    """A pipe: the reader of its last `kept` bytes, and the end for a child, which `inherited` closes."""
    reader, writer = os.pipe()
    inherited.callback(close_read, writer)
    return Tail(reader, kept), writer


async def readable(fd: int) -> None:
    """Wait until a descriptor can be read, its other end is closed, or the process of a pidfd has ended."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
