"""The worker as a process: started, made ready, limited, called, killed and reaped.

Strategy: every descriptor and process has one owner, this object, from the moment it exists; a start that was
begun is carried on until its process is known, even if cancelled, and is then undone. bubblewrap is not
simply killed: before it has told the first process of its process namespace, that process may wait for it for
ever. That first process is killed, and with it the kernel ends everything inside. If this process is killed
itself, the kernel kills bubblewrap, and the worker reads the end of its calls. (One gap of microseconds stays
in bubblewrap: if it is killed between asking for that and releasing its child, the child stays.)
"""

import asyncio
import contextlib
import os
import re
import signal
import socket
import struct
from collections.abc import AsyncIterator, Sequence

from qubes_restore_svc.errors import WorkerLost, exhausted
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.local.memory import limit_group, limit_resources, memory_reserve
from qubes_restore_svc.local.sandbox import sandbox_command
from qubes_restore_svc.waiting import to_the_end
from qubes_restore_svc.wire.names import last_words
from qubes_restore_svc.wire.qrexec_call import READY

#: Seconds a worker may take to get ready: an interpreter's start on a slow, busy machine.
START_TIMEOUT_S = 60.0
#: Seconds until a killed worker must be gone.
END_TIMEOUT_S = 1.0
#: Bytes of the worker's standard error that are kept, from its end.
STDERR_KEPT = 4096

_READ_SIZE = 1 << 16
_STATUS_SIZE = 4096
_SHORTLY_S = 0.2
_MOMENT_S = 0.002
_CREDENTIALS = struct.Struct("3i")  #: process, user, group (unix(7))
_LAST_LINE_LENGTH = 300


class SandboxFailed(Exception):
    """bubblewrap ended and did not start the command. It wrote `words` to standard error."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words = words


class WorkerProcess:
    """One process, in a sandbox if `bubblewrap` is the path of that program, and all that belongs to it.

    After `start` it must be destroyed; a failed `start` has done so itself.
    """

    def __init__(self, bubblewrap: str | None, *, disable_userns: bool = True) -> None:
        self._bubblewrap = bubblewrap
        self._disable_userns = disable_userns
        self._process: asyncio.subprocess.Process | None = None
        self._calls: socket.socket | None = None
        self._stderr: _Tail | None = None
        self._status: int | None = None  #: pipe into which bubblewrap writes what it has done
        self._told = b""  #: what came out of it
        self._first_inside: int | None = None  #: pidfd of the first process in the sandbox
        self._ended_here = False
        self.in_group = False  #: its memory is limited by a control group of its own

    async def start(self, command: Sequence[str], archive_fd: int, memory_limit: int) -> None:
        """Run `command` and wait until it says that it is ready.

        Raises WorkerLost, SandboxFailed, or OSError if there is nothing to be run.
        """
        try:
            await to_the_end(self._spawn(command, archive_fd, memory_limit))
            process_id = await self._wait_ready()
            limit_resources(process_id, memory_limit, own_namespace=self._bubblewrap is not None)
            self.in_group = await limit_group(process_id, memory_limit + memory_reserve())
        except BaseException:
            await to_the_end(self.destroy())
            raise

    def call(self, descriptor: bytes) -> socket.socket:
        """A new connection to the worker, on which it finds `descriptor` first. Raises WorkerLost."""
        if self._calls is None:
            raise WorkerLost("the worker is not running")
        with contextlib.ExitStack() as undo:
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                undo.callback(close_read, ours)
                try:
                    ours.sendall(descriptor)
                    socket.send_fds(self._calls, [b"call"], [theirs.fileno()])
                finally:
                    close_read(theirs)
            except BlockingIOError:
                raise WorkerLost("the worker takes no calls any more") from None
            except OSError as error:
                if (found := exhausted(error)) is not None:
                    raise found from error
                raise WorkerLost(f"the worker cannot be called: {error.strerror}") from error
            undo.pop_all()
        return ours

    async def wait_gone(self) -> str:
        """Wait until the process has ended. Returns the reason, as far as known (printable, one line)."""
        if self._process is None:
            return "the worker was not started"
        status = await self._process.wait()
        if self._stderr is not None:
            await self._stderr.wait_end(_SHORTLY_S)
        if self._ended_here:
            return "the worker was ended"
        return _describe_end(status, self._last_words(), through_bubblewrap=self._bubblewrap is not None)

    async def destroy(self) -> None:
        """Kill and reap all processes, close all descriptors. Safe to repeat."""
        if self._process is not None and self._process.returncode is None:
            self._ended_here = True
        if self._calls is not None:
            close_read(self._calls)
            self._calls = None
        try:
            if self._process is not None:
                await self._kill(self._process)
        finally:
            if self._stderr is not None:
                self._stderr.close()
            for descriptor in (self._status, self._first_inside):
                if descriptor is not None:
                    close_read(descriptor)
            self._status = self._first_inside = None

    # --- Starting --------------------------------------------------------------------------------

    async def _spawn(self, command: Sequence[str], archive_fd: int, memory_limit: int) -> None:
        """Start the process. What it inherits is closed here as soon as it has it."""
        with contextlib.ExitStack() as inherited:
            self._calls, calls = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            inherited.callback(close_read, calls)
            self._calls.setblocking(False)
            self._calls.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            # Another number: our standard input can be the archive, and is something else for the child.
            archive_fd = os.dup(archive_fd)
            inherited.callback(close_read, archive_fd)
            self._stderr, stderr = _tail_of_pipe(STDERR_KEPT, inherited)
            command = [
                *command,
                *("--calls-fd", str(calls.fileno())),
                *("--archive-fd", str(archive_fd)),
                *("--memory-limit", str(memory_limit)),
            ]
            descriptors = [calls.fileno(), archive_fd]
            if self._bubblewrap is not None:
                self._status, status = _status_pipe(inherited)
                command = sandbox_command(
                    self._bubblewrap,
                    command,
                    status_fd=status,
                    disable_userns=self._disable_userns,
                )
                descriptors.append(status)
            # No environment, sandbox or not. A session of its own: Ctrl-C is for the broker to act on.
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=descriptors,
                env={},
                cwd="/",
                start_new_session=True,
            )

    async def _wait_ready(self) -> int:
        """Wait for the worker's first message; returns the id of its process."""
        assert self._calls is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._called_or_ended(self._calls.fileno())
                message, ancillary, _, _ = self._calls.recvmsg(
                    len(READY) + 1, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
        except TimeoutError:
            raise WorkerLost(f"the worker was not ready after {START_TIMEOUT_S:.0f} seconds") from None
        except OSError:
            message, ancillary = b"", []
        for level, kind, content in ancillary:
            if message == READY and (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                self._find_first_inside()
                return int(_CREDENTIALS.unpack(content)[0])
        raise await self._failure()

    async def _called_or_ended(self, calls: int) -> None:
        """Wait for a message, or the end of the process: what it leaves behind can hold the socket open."""
        assert self._process is not None
        waits = {asyncio.ensure_future(_readable(calls)), asyncio.ensure_future(self._process.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _find_first_inside(self) -> bool:
        """Take hold of the first process of the sandbox; False if bubblewrap has not told it yet."""
        told = self._has_told(rb'"child-pid": (\d+)')
        if told is not None and self._first_inside is None:
            with contextlib.suppress(ProcessLookupError):
                self._first_inside = os.pidfd_open(int(told[1]))
        return told is not None

    def _has_told(self, pattern: bytes) -> re.Match[bytes] | None:
        """The match of `pattern` in what bubblewrap has told so far."""
        if self._status is not None and len(self._told) < _STATUS_SIZE:
            with contextlib.suppress(BlockingIOError):
                self._told += os.read(self._status, _STATUS_SIZE)
        return re.search(pattern, self._told)

    async def _failure(self) -> Exception:
        """Why there is no ready worker."""
        assert self._process is not None
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                end = await self.wait_gone()
        except TimeoutError:
            return WorkerLost("the worker does not keep to the protocol of its link")
        # The exit code is told only if the command was started.
        if self._bubblewrap is not None and self._has_told(rb'"exit-code"') is None:
            return SandboxFailed(self._words())
        return WorkerLost(f"{end}, before it was ready")

    # --- Ending ----------------------------------------------------------------------------------

    async def _kill(self, process: asyncio.subprocess.Process) -> None:
        if self._status is not None:
            async with _at_most(END_TIMEOUT_S):
                while process.returncode is None and not self._find_first_inside():
                    await asyncio.sleep(_MOMENT_S)
        if self._first_inside is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(self._first_inside, signal.SIGKILL)
            async with _at_most(END_TIMEOUT_S):
                # bubblewrap first: it reaps the other one.
                await process.wait()
                await _readable(self._first_inside)
        # A bubblewrap that was killed while it held up its child leaves that child, in its process group.
        left_child = self._status is not None and not self._find_first_inside()
        if process.returncode is None or left_child:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            async with _at_most(END_TIMEOUT_S):
                await process.wait()

    def _words(self) -> str:
        return self._stderr.content.decode(errors="replace") if self._stderr is not None else ""

    def _last_words(self) -> str:
        return last_words(self._stderr.content, _LAST_LINE_LENGTH) if self._stderr is not None else ""


# --- Its pipes -----------------------------------------------------------------------------------


class _Tail:
    """Reads all that comes through a pipe, until its end, and keeps the last bytes."""

    def __init__(self, fd: int, kept: int) -> None:
        self.content = b""
        self._fd = fd
        self._kept = kept
        self._ended = asyncio.Event()
        os.set_blocking(fd, False)
        asyncio.get_running_loop().add_reader(fd, self._read)

    async def wait_end(self, timeout_s: float) -> None:
        """Wait until every writer has closed the pipe, or the time is over."""
        async with _at_most(timeout_s):
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


def _tail_of_pipe(kept: int, inherited: contextlib.ExitStack) -> tuple[_Tail, int]:
    """A pipe: the reader of its last `kept` bytes, and the end for a child, which `inherited` closes."""
    reader, writer = os.pipe()
    inherited.callback(close_read, writer)
    return _Tail(reader, kept), writer


async def _readable(fd: int) -> None:
    """Wait until a descriptor can be read, its other end is closed, or the process of a pidfd has ended."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


def _status_pipe(inherited: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe: our end, which does not block, and the end for bubblewrap, which `inherited` closes.

    bubblewrap must not die of writing while it holds up its child. So its end is open for reading too: nobody
    ends it for a pipe without a reader if we are gone. And a pipe knows no limit of a file's size.
    """
    reader, writer = os.pipe()
    try:
        os.set_blocking(reader, False)
        both = os.open(f"/proc/self/fd/{writer}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        close_read(reader)
        raise
    finally:
        close_read(writer)
    inherited.callback(close_read, both)
    return reader, both


@contextlib.asynccontextmanager
async def _at_most(timeout_s: float) -> AsyncIterator[None]:
    """What is awaited in the block is given up after so many seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            yield


def _describe_end(status: int, last_words: str, *, through_bubblewrap: bool) -> str:
    """A text that says how a process ended by itself. bubblewrap passes a signal on as 128 + n."""
    number = -status if status < 0 else status - 128 if through_bubblewrap else 0
    if number > 0:
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        text = f"the worker was killed ({name})"
        if number == signal.SIGKILL:
            text += ", perhaps for want of memory"
    else:
        text = f"the worker ended with status {status}"
    return f"{text}: {last_words}" if last_words else text
