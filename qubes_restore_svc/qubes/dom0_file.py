"""A backup in a file of dom0 on its way to the worker: read by `cat`, so that no process of ours reads it.

Strategy: `cat` stands between the file and the call that brings it. (The call's own program, given the file
itself, would wait for ever where reading fails: qrexec-client takes an error of its input for a pause.) Where
a place of a file or a disk cannot be read (EIO), `cat` ends; it has written all that it has read, and the
position that it shares with us is that place. `head` then writes zeros for the place, and another `cat` reads
on behind it. A program is started for every step, so steps grow with the gap, and are counted.
"""

import asyncio
import contextlib
import os

from qubes_restore_svc.errors import HostFailed, exhausted
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.qubes.qrexec import Undoable
from qubes_restore_svc.waiting import to_the_end

_CAT = "/bin/cat"
_HEAD = "/bin/head"
_ZEROS = "/dev/zero"
#: What `cat` says of a place that cannot be read.
_EIO = "Input/output error"

#: A place that cannot be read is stepped over in pages of the system's memory, bytes, as it reads them; …
_PAGE = 4096
#: … in a long gap, by this part of what has been stepped over.
_GROWTH = 64
#: With so much that cannot be read in one place, it is the medium that has gone, bytes.
_MAX_GAP = 16 << 20
#: So many steps are a medium that has gone, too.
_MAX_STEPS = 10_000


class FileReader(Undoable):
    """Reads descriptor `fd` from where it stands; leaving this ends the reading."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._process: asyncio.subprocess.Process | None = None
        self._work: asyncio.Task[None] | None = None
        self._left = False
        self._fault: str | None = None
        self._steps = 0
        self._gaps: list[tuple[int, int]] = []  # where each begins and ends, bytes

    async def take_down(self, error: BaseException | None) -> list[str]:
        """End the reading."""
        self._left = True
        self._kill()
        if self._work is not None:
            await self._work
        return []

    async def open(self) -> int:
        """Begin; the descriptor to read from, which is the caller's. Raises HostFailed."""
        return await to_the_end(self._open())

    async def fault(self, timeout_s: float) -> str | None:
        """A clause, if reading has failed; waits for at most `timeout_s` seconds until that is known."""
        if self._work is not None:
            await asyncio.wait([self._work], timeout=timeout_s)
        return self._fault

    @property
    def gaps(self) -> str | None:
        """A clause, if places of the file could not be read so far; zeros were given for them."""
        if not self._gaps:
            return None
        others = f" and in {len(self._gaps) - 1} other places" if len(self._gaps) > 1 else ""
        size = sum(end - start for start, end in self._gaps)
        return (
            f"the file could not be read at byte {self._gaps[0][0]}{others} ({_EIO}), and {size} bytes of it"
            " were taken for zeros"
        )

    async def _open(self) -> int:
        try:
            reader, writer = os.pipe()
        except OSError as error:
            raise HostFailed(f"the backup cannot be read: {error.strerror}") from error
        try:
            await self._start(_CAT, self._fd, writer)
        except OSError as error:
            close_read(reader)
            close_read(writer)
            raise HostFailed(f"the backup cannot be read: {_CAT}: {error.strerror}") from error
        self._work = asyncio.create_task(self._follow(writer))
        return reader

    async def _follow(self, writer: int) -> None:
        """Go on until the file, or what can be read of it, has been written."""
        try:
            failure = await self._failure()
            while failure == _EIO and (size := self._step()):
                with open(_ZEROS, "rb") as zeros:
                    await self._start(_HEAD, zeros.fileno(), writer, f"--bytes={size}")
                failure = await self._failure()
                if failure is None:
                    await self._start(_CAT, self._fd, writer)
                    failure = await self._failure()
        except (OSError, MemoryError, RuntimeError) as error:  # no program can be started
            found = exhausted(error)
            failure = str(error) if found is None else found.reason
        finally:
            close_read(writer)
        if failure and not self._left:
            self._fault = f"the file could not be read ({failure})"

    def _step(self) -> int:
        """Pass over bytes that cannot be read; how many, 0 where that is of no use."""
        try:
            here, end = os.lseek(self._fd, 0, os.SEEK_CUR), _end_of(self._fd)
        except OSError:  # it is neither a file nor a disk
            return 0
        start = self._gaps[-1][0] if self._gaps and self._gaps[-1][1] == here else here
        growth = (here - start) // _GROWTH // _PAGE * _PAGE
        size = min(_PAGE - here % _PAGE + growth, end - here)
        self._steps += 1
        if size <= 0 or here + size - start > _MAX_GAP or self._steps > _MAX_STEPS:
            return 0
        if start != here:
            self._gaps.pop()
        self._gaps.append((start, here + size))
        os.lseek(self._fd, size, os.SEEK_CUR)
        return size

    async def _start(self, program: str, stdin: int, stdout: int, *options: str) -> None:
        self._process = await asyncio.create_subprocess_exec(
            program,
            *options,
            stdin=stdin,
            stdout=stdout,
            stderr=asyncio.subprocess.PIPE,
            env={"LC_ALL": "C"},
            start_new_session=True,
        )
        if self._left:
            self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _failure(self) -> str | None:
        """Wait for the program; the reason, if it has failed by itself. "" if it was ended."""
        assert self._process is not None
        _, said = await self._process.communicate()
        if self._process.returncode:
            return said.decode("ascii", "replace").strip().rpartition(": ")[2]
        return None


def _end_of(fd: int) -> int:
    """Where a file or a disk ends, bytes. It stands where it stood. Raises OSError if it is neither."""
    here = os.lseek(fd, 0, os.SEEK_CUR)
    end = os.lseek(fd, 0, os.SEEK_END)
    os.lseek(fd, here, os.SEEK_SET)
    return end
