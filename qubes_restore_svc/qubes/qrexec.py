"""Calls over qrexec: each is a process, and this module owns these processes.

Strategy: a call begins in a thread and is known here before a cancel can count. The event loop watches the
process and reaps it as soon as it has ended. On leaving, all that still run are killed: with its process a
call ends in the qube as well, and a reader of its socket here reads the end.

Changes of the system are undone step by step. If a step fails, the next one is tried all the same, and no
step is waited for without end. What could not be undone is told in the advice of the error that ended the
work. If there is no such error, it is an error of its own.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from qubes_restore_svc.errors import Cancelled, HostFailed, RestoreError, WorkerLost, how_ended
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.qubes.system import QubesSystem, ServiceProcess
from qubes_restore_svc.waiting import started, to_the_end
from qubes_restore_svc.wire.qrexec_call import CALL_FAILED, CALL_REFUSED, CONNECTION_BROKE, NO_SERVICE

_MEANINGS = {
    CALL_FAILED: "the call could not be made",
    CALL_REFUSED: "the call was refused",
    NO_SERVICE: "there is no such service",
    CONNECTION_BROKE: "the connection broke off",
}
#: Seconds until a killed process must be gone.
_KILL_TIMEOUT_S = 5.0

#: Seconds that the system may take to undo one thing: a qube is killed and its volumes are removed. More than
#: it takes to say by itself that it cannot.
UNDO_TIMEOUT_S = 90.0


# --- Undoing -------------------------------------------------------------------------------------


class Undoable:
    """An async context manager that sets something up in steps, and takes it down however it ends."""

    async def set_up(self) -> None:
        """What entering does. If it fails, `take_down` is called as well."""

    async def take_down(self, error: BaseException | None) -> list[str]:
        """What leaving does, because of `error` perhaps; clauses on what could not be undone."""
        return []

    async def __aenter__(self) -> Self:
        try:
            await self.set_up()
        except BaseException as error:
            await self._leave(error)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._leave(exc)

    async def _leave(self, error: BaseException | None) -> None:
        tell_what_is_left(await to_the_end(self.take_down(error)), error)


async def undo(step: Callable[[], None], what_is_left: str) -> list[str]:
    """Run the blocking `step` in a thread; if it fails or takes too long, a clause that says what is left."""
    task = started(step)
    done, _ = await asyncio.wait([task], timeout=UNDO_TIMEOUT_S)
    if not done:
        task.add_done_callback(_look_at)
        return [f"{what_is_left} (no answer for {UNDO_TIMEOUT_S:.0f} seconds)"]
    error = task.exception()
    if error is None:
        return []
    return [f"{what_is_left} ({error.reason if isinstance(error, RestoreError) else error})"]


def tell_what_is_left(left: list[str], error: BaseException | None) -> None:
    """Say what the clauses in `left` name, beside `error`, which ended the work; nothing if there are none.

    Raises HostFailed if there is no error, and Cancelled for a cancel, which can say nothing itself.
    """
    if not left:
        return
    sentence = f"Left behind, to be removed by hand: {'; '.join(left)}."
    if isinstance(error, RestoreError):
        error.advice = f"{error.advice} {sentence}".strip()
    elif error is None:
        raise HostFailed("not everything could be cleared up", advice=sentence)
    elif isinstance(error, asyncio.CancelledError):
        raise Cancelled("it was cancelled", advice=sentence) from error
    else:
        error.add_note(sentence)


def _look_at(task: "asyncio.Future[None]") -> None:
    if not task.cancelled():
        task.exception()


# --- Calls ---------------------------------------------------------------------------------------


class QrexecCall:
    """A call under way, or one that has ended; `name` is `restore.Volume+vm10.private in disp1234`."""

    def __init__(self, name: str, process: ServiceProcess) -> None:
        """Takes the process over; raises OSError if it cannot be watched."""
        self.name = name
        self._process = process
        self._ended = asyncio.Event()
        self._ended_here = False
        self._pidfd: int | None = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._release)

    @property
    def exit_code(self) -> int | None:
        """The exit code, if it is known at this moment; None while the call lasts."""
        return self._process.poll()

    @property
    def fault(self) -> str | None:
        """What went wrong, a clause, if the call has ended by itself and not well."""
        code = self.exit_code
        if not code or self._ended_here:
            return None
        meaning = f" ({_MEANINGS[code]})" if code in _MEANINGS else ""
        return f"{self.name} {how_ended(code)}{meaning}"

    async def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait until it has ended: the exit code; None if it still lasts after `timeout_s` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        return self.exit_code

    async def end(self, patience_s: float = 0.0) -> bool:
        """Give it `patience_s` seconds to end by itself, then kill it. False if it cannot be ended."""
        if patience_s:
            await self.wait(patience_s)
        if self.exit_code is None:
            self._ended_here = True
            self._process.kill()
            await self.wait(_KILL_TIMEOUT_S)
        self._release()
        return self.exit_code is not None

    def _release(self) -> None:
        """Watch it no longer: it has ended, or cannot be ended."""
        self._ended.set()
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            close_read(self._pidfd)
            self._pidfd = None


class QrexecCalls(Undoable):
    """All calls of one restore; leaving this ends those that still last."""

    def __init__(self, system: QubesSystem) -> None:
        self._system = system
        self._calls: set[QrexecCall] = set()
        self._closed = False

    async def take_down(self, error: BaseException | None) -> list[str]:
        """End those that still last."""
        self._closed = True
        calls = sorted(self._calls, key=lambda call: call.name)
        ended = await asyncio.gather(*(call.end() for call in calls))
        return [f"the process of {call.name}" for call, gone in zip(calls, ended, strict=True) if not gone]

    async def open(self, qube: str, service: str, *, stdin: int, stdout: int) -> QrexecCall:
        """Call `service` (`NAME+ARG`); the descriptors can be closed afterwards. Raises HostFailed."""
        return await to_the_end(self._open(qube, service, stdin, stdout))

    async def converse(self, qube: str, service: str) -> tuple[socket.socket, QrexecCall]:
        """Call `service` over a blocking socket, which is the caller's. Raises HostFailed.

        The socket ends with the process, not with the service's own half of the stream.
        """
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise HostFailed(f"{service} cannot be called: {error.strerror}") from error
        try:
            try:
                call = await self.open(qube, service, stdin=theirs.fileno(), stdout=theirs.fileno())
            finally:
                close_read(theirs)
        except BaseException:
            close_read(ours)
            raise
        return ours, call

    async def _open(self, qube: str, service: str, stdin: int, stdout: int) -> QrexecCall:
        process = await started(lambda: self._system.run_service(qube, service, stdin=stdin, stdout=stdout))
        try:
            call = QrexecCall(f"{service} in {qube}", process)
        except OSError as error:
            process.kill()
            await started(_reap, process)
            raise HostFailed(f"{service} cannot be called: {error.strerror}") from error
        self._calls = {other for other in self._calls if other.exit_code is None} | {call}
        if self._closed:
            await call.end()
            raise HostFailed(f"{service} cannot be called any more")
        return call


@contextlib.contextmanager
def worker_called() -> Iterator[None]:
    """Around a call of the worker: if it cannot be made, that is WorkerLost."""
    try:
        yield
    except HostFailed as error:
        raise WorkerLost(f"the worker cannot be called: {error.reason}") from error


async def read_answer(connection: socket.socket, size: int, end: bytes | None = None) -> bytes:
    """At most `size` bytes: that many, or up to `end`, or up to the end of the stream."""
    loop = asyncio.get_running_loop()
    untrusted_answer = b""
    while len(untrusted_answer) < size and not (end and untrusted_answer.endswith(end)):
        try:
            untrusted_byte = await loop.sock_recv(connection, 1)
        except OSError:
            break
        if not untrusted_byte:
            break
        untrusted_answer += untrusted_byte
    return untrusted_answer


def _reap(process: ServiceProcess) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    process.poll()
