"""How a call reaches dom0: through qrexec from a qube, as a child process in dom0 itself.

Strategy: a transport connects to a service and gives `Streams`: one to read, one to write, and the reason why
they ended. Both ways start a program that carries the stream; only the meaning of its exit code differs, and
how long it may take to end when the call is closed.

The program's standard input and output are one socket. So this side can close one direction or both, and
another process with a copy of the other end does not keep it waiting. The event loop reads standard error to
its end: the program never waits for its reader, and its last line may explain an exit code. To close the
call, the program's input is ended; a program that does not end then is killed.
"""

import asyncio
import contextlib
import re
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qubes_restore_svc.errors import HostFailed, NotGranted, RestoreError, how_ended
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.waiting import to_the_end
from qubes_restore_svc.wire.names import QUBE_NAME, last_words, strip_control
from qubes_restore_svc.wire.qrexec_call import CALL_FAILED, CALL_REFUSED, CONNECTION_BROKE, NO_SERVICE

#: The qrexec client of every qube (qubes-core-qrexec).
QREXEC_PROGRAM = "/usr/bin/qrexec-client-vm"
#: There in dom0 only.
QUBESD_SOCKET = Path("/var/run/qubesd.sock")
#: The file of dom0's policy in which the calls are granted.
GRANTS = "/etc/qubes/policy.d/include/qubes-restore-svc"

#: The service's own program, for dom0. -I: neither environment nor working directory decides what it is.
SERVICE_PROGRAM = (sys.executable, "-I", "-m", "qubes_restore_svc.dom0_service.child")
_SERVICE_FILE = Path(__file__).parents[1] / "dom0_service" / "child.py"


#: Seconds that a qrexec call may take to end by itself; dom0 knows that it is closed, however it ends.
_QREXEC_PATIENCE_S = 2.0
#: Seconds that the service may take to undo what it has begun, in dom0, as its own process.
_PROGRAM_PATIENCE_S = 60.0

_INTERRUPTED = "If a restore was under way, dom0 has undone the qube it was at; what was finished stays."

#: Makes the error of a program's end from its exit code (negative: a signal) and its last words.
Explain = Callable[[int, str], RestoreError | None]

_STDERR_KEPT = 4096  #: bytes, from the end
_READ_SIZE = 64 << 10
#: Seconds that a program may go on after it has closed its output.
_END_TIMEOUT_S = 5.0
#: Seconds in which what an ended program has written to standard error must have been read.
_TAIL_TIMEOUT_S = 2.0
#: Seconds until a program that was told to end must be gone.
_KILL_TIMEOUT_S = 5.0


class Streams(Protocol):
    """The two ways of a connected call. Who has them closes them."""

    @property
    def reader(self) -> asyncio.StreamReader:
        """What dom0 says."""

    @property
    def writer(self) -> asyncio.StreamWriter:
        """What dom0 is told."""

    async def fault(self) -> RestoreError | None:
        """Why the call ended, once `reader` has; None if nothing is known. Takes seconds at the most."""

    async def close(self) -> None:
        """Close the call, and with it everything it needed here; safe to repeat."""


class Transport(Protocol):
    """A way to dom0."""

    async def connect(self, service: str) -> Streams:
        """Call `service` (`restore.Start`); raises RestoreError. If it is cancelled, nothing is left."""


@dataclass(frozen=True, slots=True)
class Handed:
    """What a program that is started in dom0 gets besides the call. None: it does not get that.

    `archive` is the descriptor of the backup, which stays the caller's. `passphrase` is called in the event
    loop when the program wants it, and again when that was wrong. It may take its time: nothing else is to be
    done meanwhile. If it raises a RestoreError, the program gets none, and ends the call.
    """

    archive: int | None = None
    passphrase: Callable[[], str] | None = None


NOTHING_HANDED = Handed()


class QrexecTransport:
    """From a qube: a qrexec call, which dom0's policy allows or not."""

    def __init__(self, target: str = "dom0", program: str = QREXEC_PROGRAM) -> None:
        self.program = program
        self._target = target

    async def connect(self, service: str) -> Streams:
        """Raises HostFailed if there is no qrexec here. A refusal shows when the call ends."""

        def explain(exit_code: int, words: str) -> RestoreError:
            return _qrexec_fault(service, exit_code, words)

        command = [self.program, self._target, service]
        return await connect_to_program(command, explain, _QREXEC_PATIENCE_S)


class ProgramTransport:
    """In dom0: the program `command`, with the name of the service behind it, and what it is handed over."""

    def __init__(self, command: Sequence[str] = SERVICE_PROGRAM, handed: Handed = NOTHING_HANDED) -> None:
        self._command = tuple(command)
        self._handed = handed

    async def connect(self, service: str) -> Streams:
        """Raises HostFailed if the program cannot be started."""
        if self._command == SERVICE_PROGRAM and not _SERVICE_FILE.exists():
            raise HostFailed(
                "dom0's restore service is not installed here",
                advice="In dom0, install the package qubes-restore-svc-dom0. On a machine without Qubes,"
                " `qubes-restore-svc` opens the backup.",
            )
        command = [*self._command, service]
        return await connect_to_program(command, _program_fault, _PROGRAM_PATIENCE_S, self._handed)


def system_transport() -> QrexecTransport | ProgramTransport:
    """The way to dom0 from wherever this is: from dom0, or from a qube."""
    if QUBESD_SOCKET.exists():
        return ProgramTransport()
    return QrexecTransport()


def _qrexec_fault(service: str, exit_code: int, words: str) -> RestoreError:
    if exit_code == CALL_REFUSED:
        return NotGranted(
            f"dom0's policy does not let this qube call {service}, or somebody there said no",
            advice=f"To allow it, an administrator adds this line to {GRANTS} in dom0:"
            f" {service} * {_own_name()} @adminvm allow target=dom0",
        )
    if exit_code == NO_SERVICE:
        return HostFailed(
            f"dom0 has no service {service}",
            advice="Install the package qubes-restore-svc-dom0 in dom0.",
        )
    if exit_code == CALL_FAILED:
        return HostFailed(f"the call of {service} could not be made", advice=_advice_of(words))
    if exit_code == CONNECTION_BROKE:
        return HostFailed("the connection to dom0 broke off", advice=_INTERRUPTED)
    return _ended("the call to dom0", exit_code, words)


def _program_fault(exit_code: int, words: str) -> RestoreError:
    return _ended("dom0's restore service", exit_code, words)


def _ended(what: str, exit_code: int, words: str) -> RestoreError:
    how = how_ended(exit_code) if exit_code else "ended"
    said = f" ({words})" if words else ""
    return HostFailed(f"{what} {how}, without an answer{said}", advice=_INTERRUPTED)


def _advice_of(words: str) -> str:
    return f"qrexec says: {words}" if words else "Look into the system log of this qube."


def _own_name() -> str:
    """The name of this qube, which is its host name; or what to write its name for."""
    name = socket.gethostname()
    return name if re.fullmatch(QUBE_NAME, name) else "THIS-QUBE"


# --- The program that carries a call ---------------------------------------------------------------


async def connect_to_program(
    command: Sequence[str], explain: Explain, patience_s: float, handed: Handed = NOTHING_HANDED
) -> "ProgramStreams":
    """Start `command` and connect to it. Raises HostFailed; if it is cancelled, nothing is left.

    `patience_s`: seconds that it may take to end by itself when the call is closed. The descriptors that are
    handed over are named behind the words of `command` (`archive=5`); it inherits no others.
    """
    streams = ProgramStreams(explain, patience_s)
    try:
        await to_the_end(streams.start(command, handed))
    except BaseException:
        await streams.close()
        raise
    return streams


class ProgramStreams:
    """Those over a program's standard input and output."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def __init__(self, explain: Explain, patience_s: float) -> None:
        self._explain = explain
        self._patience_s = patience_s
        self._process: asyncio.subprocess.Process | None = None
        self._exit: asyncio.Task[int] | None = None
        self._tail = b""
        self._tail_task: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._sockets: list[socket.socket] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self, command: Sequence[str], handed: Handed = NOTHING_HANDED) -> None:
        """Once, before anything else. Raises HostFailed; `close` undoes what had been begun."""
        descriptors = {} if handed.archive is None else {"archive": handed.archive}
        try:
            with contextlib.ExitStack() as theirs:
                call, self.reader, self.writer = await self._connected(theirs)
                words, words_reader, _ = await self._connected(theirs)
                self._tail_task = asyncio.create_task(self._keep_tail(words_reader))
                if handed.passphrase is not None:
                    descriptors["passphrase"], wanted, answer = await self._connected(theirs)
                    self._asking = asyncio.create_task(_give_passphrase(handed.passphrase, wanted, answer))
                # A session of its own: Ctrl-C is for this process to act on.
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    *(f"{name}={fd}" for name, fd in descriptors.items()),
                    stdin=call,
                    stdout=call,
                    stderr=words,
                    pass_fds=tuple(descriptors.values()),
                    start_new_session=True,
                )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise HostFailed(
                f"{strip_control(command[0])} cannot be started: {reason}",
                advice="Is this a qube, or the dom0, of a Qubes system?",
            ) from error
        self._exit = asyncio.create_task(self._watch(self._process))

    async def fault(self) -> RestoreError | None:
        """Why the call ended, as far as exit code and last words tell; takes seconds at the most."""
        if not await _done_within(_END_TIMEOUT_S, self._exit):
            return HostFailed("dom0 hung up in the middle of the call", advice="Try again.")
        await _done_within(_TAIL_TIMEOUT_S, self._tail_task)
        assert self._exit is not None
        return self._explain(self._exit.result(), self._last_words())

    async def close(self) -> None:
        """End the program, first by the end of its input; reap it, and close everything. Safe to repeat."""
        await to_the_end(self._close())

    async def _connected(
        self, theirs: contextlib.ExitStack
    ) -> tuple[int, asyncio.StreamReader, asyncio.StreamWriter]:
        """Two connected sockets: the one's descriptor, which `theirs` closes, and the other as streams."""
        ours, other = socket.socketpair()
        theirs.enter_context(other)
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            close_read(ours)
            raise
        self._sockets.append(ours)
        self._writers.append(writer)
        return other.fileno(), reader, writer

    async def _watch(self, process: asyncio.subprocess.Process) -> int:
        """Wait for its end. What it has said stays to be read, and then comes the end (unix(7), SHUT_RD).

        Otherwise a copy of the other end that somebody else holds open would keep us waiting.
        """
        code = await process.wait()
        for ours in self._sockets:
            with contextlib.suppress(OSError):
                ours.shutdown(socket.SHUT_RD)
        return code

    async def _close(self) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(OSError):
                self.writer.write_eof()
            patience_s = self._patience_s
            drain = asyncio.create_task(self._drain())
            waiting = asyncio.create_task(process.wait())
            for number in (signal.SIGTERM, signal.SIGKILL):
                if await _done_within(patience_s, waiting):
                    break
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)
                patience_s = _KILL_TIMEOUT_S
            await _done_within(_KILL_TIMEOUT_S, waiting)
            await _cancel(drain, waiting)
        await _cancel(self._exit, self._tail_task, self._asking)
        for writer in self._writers:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _drain(self) -> None:
        """A program that waits for its reader does not see the end of its input."""
        with contextlib.suppress(OSError):
            while await self.reader.read(_READ_SIZE):
                pass

    async def _keep_tail(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(_READ_SIZE):
                self._tail = (self._tail + piece)[-_STDERR_KEPT:]

    def _last_words(self) -> str:
        return last_words(self._tail)


async def _give_passphrase(
    ask: Callable[[], str], wanted: asyncio.StreamReader, answer: asyncio.StreamWriter
) -> None:
    """Answer each request with one line, or end the answers if there is no passphrase. `ask` then raises
    RestoreError."""
    try:
        with contextlib.suppress(OSError, RestoreError):  # whoever asks knows why there is none
            while await wanted.read(1):
                answer.write(ask().encode() + b"\n")
    finally:
        with contextlib.suppress(OSError):
            answer.write_eof()


async def _done_within(timeout_s: float, task: asyncio.Task[int] | asyncio.Task[None] | None) -> bool:
    return task is not None and bool((await asyncio.wait([task], timeout=timeout_s))[0])


async def _cancel(*tasks: asyncio.Task[int] | asyncio.Task[None] | None) -> None:
    """Cancel them and wait until they have taken notice."""
    given = [task for task in tasks if task is not None]
    for task in given:
        task.cancel()
    waiting: Awaitable[object] = asyncio.gather(*given, return_exceptions=True)
    await waiting
