"""A program that carries a call: started, connected, listened to, ended and reaped.

Strategy: its standard input and output are one socket, so that this side can close one direction or both, and
is not kept waiting by whoever else holds a copy of the other end. Standard error is read to its end by the
event loop, so that the program never waits for its reader, and its last line may explain an exit code.
Closing is gentle first (the end of its input closes the call), then not.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from qubes_restore_svc.errors import HostFailed, RestoreError
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.waiting import to_the_end
from qubes_restore_svc.wire.names import last_words, strip_control

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


@dataclass(frozen=True, slots=True)
class Handed:
    """What a program that is started in dom0 gets besides the call. None: it does not get that.

    `archive` is the descriptor of the backup, which stays the caller's. `passphrase` is called in the event
    loop when the program wants it, and may take its time: nothing else is to be done meanwhile. If it raises
    a RestoreError, the program gets none, and ends the call.
    """

    archive: int | None = None
    passphrase: Callable[[], str] | None = None


NOTHING_HANDED = Handed()


async def connect_to_program(
    command: Sequence[str], explain: Explain, patience_s: float, handed: Handed = NOTHING_HANDED
) -> "ProcessConnection":
    """Start `command` and connect to it. Raises HostFailed; if it is cancelled, nothing is left.

    `patience_s`: seconds that it may take to end by itself when the call is closed. The descriptors that are
    handed over are named behind the words of `command` (`archive=5`); it inherits no others.
    """
    connection = ProcessConnection(explain, patience_s)
    try:
        await to_the_end(connection.start(command, handed))
    except BaseException:
        await connection.close()
        raise
    return connection


class ProcessConnection:
    """A connection over a program's standard input and output; see `transports.Connection`."""

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
    try:
        with contextlib.suppress(OSError):
            if not await wanted.read(1):
                return
        with contextlib.suppress(RestoreError):  # whoever asks knows it
            answer.write(ask().encode())
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
