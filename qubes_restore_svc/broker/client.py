"""The broker's side of `restore.Session`.

Strategy: send models, receive models. Both pass the connection of `wire/messages.py`, which refuses what may
not come. Silence is a WorkerStalled, and the end of the stream a WorkerLost with what the link knows of the
reason.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, field

from pydantic import ValidationError

from qubes_restore_svc.broker.interfaces import PIPE, Link
from qubes_restore_svc.broker.ledger import believed_error, one_phrase
from qubes_restore_svc.errors import (
    ArchiveDamaged,
    ArchiveTruncated,
    ArchiveUnreadable,
    AuthenticationFailed,
    BadArchive,
    BadContainer,
    BadHeader,
    ChunkOutOfOrder,
    EmptyInput,
    ExcessiveCost,
    MissingVolume,
    NotABackup,
    ProtocolViolation,
    RestoreError,
    SourceStalled,
    UsageError,
    WorkerLost,
    WorkerStalled,
    WrongPassphrase,
    exhausted,
)
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire import qrexec_call
from qubes_restore_svc.wire.names import DigestKind

#: Seconds of silence after which a worker counts as stalled; it says something every half second.
STALL_S = 60.0

#: Most lines that a worker may log in one session.
MAX_LOG_LINES = 10_000

#: If the worker sends more progress messages than this within PACE_S seconds, the broker reads nothing more
#: from it until these are over. An honest one sends two a second.
MAX_PROGRESS = 100
PACE_S = 1.0

#: Stands before every line that a worker logs, so that none can pass for one of ours.
WORKER_SAYS = "worker: "

#: The errors that an archive can end with if the source has not brought all of it.
EARLY_ENDS = (EmptyInput, NotABackup, ArchiveTruncated, ArchiveUnreadable, BadArchive, MissingVolume)
#: The errors that zeros can cause in place of the archive's own bytes, beside these.
_DAMAGE = (
    ArchiveDamaged,
    AuthenticationFailed,
    BadContainer,
    BadHeader,
    ChunkOutOfOrder,
    ExcessiveCost,
    WrongPassphrase,
)

#: The errors that appear if the program that writes the backup into a pipe fails, and the advice for them.
_ENDS_OF_A_PIPE = (EmptyInput, ArchiveTruncated, MissingVolume)
_PIPE_ADVICE = "The program that writes into the pipe may have failed: look at what it said."

#: After so many seconds without data, a message names the source.
NAMED_AFTER_S = 60
#: Bytes that count as data: less than that within the time counts as nothing.
LEAST_PROGRESS = 64 << 10
#: Seconds that may lie between two signs of life of a worker that is listened to.
_LONGEST_TICK_S = 1.0

_READ_SIZE = 64 << 10
#: Seconds more, in which a worker that only seemed to be silent can be heard.
_GRACE_S = 1.0
#: Seconds to wait for the link's word on why the worker is gone.
_REASON_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How the worker is to read the backup; `memory` in bytes, None leaves it to the worker."""

    passphrase: str = field(repr=False)
    memory: int | None = None
    jobs: int | None = None
    compression_filter: str | None = None
    ignore_size_limit: bool = False
    ignore_cost_limit: bool = False
    digest: DigestKind = "fsverity"  #: which one of each volume is wanted
    ahead: bool = False
    retry: bool = False
    stall_timeout_s: int | None = None  #: without data from the source, after which it ends; None: never


class SourceClock:
    """How long the worker has waited for the source, which brought next to nothing.

    Time counts only while the worker does nothing but wait for the source. So the source is blamed neither
    for a derivation that takes minutes nor for a slow disk. It is set back by `LEAST_PROGRESS` bytes, not by
    any byte.
    """

    def __init__(self) -> None:
        self.stalled_s = 0.0
        self._received = 0
        self._last: float | None = None

    def heard(self, progress: m.Progress, now: float) -> None:
        """The worker has said this at the time `now`, in seconds of any clock."""
        if not self._received <= progress.received < self._received + LEAST_PROGRESS:
            self._received, self.stalled_s = progress.received, 0.0
        elif progress.waiting_for_source and self._last is not None:
            # No more than two signs of life are apart: this process may have been stopped, or busy.
            self.stalled_s += min(now - self._last, _LONGEST_TICK_S)
        self._last = now


class SessionClient:
    """One session with the worker behind `link`. An async context manager; leaving it hangs up."""

    def __init__(self, link: Link, stall_s: float = STALL_S) -> None:
        self._link = link
        self._stall_s = stall_s
        self._connection = m.broker_end()
        self._log_lines = 0
        self._clock = SourceClock()
        self._stall_named = False
        self._stall_timeout_s: int | None = None
        self._opened = False
        self._progress: deque[float] = deque(maxlen=MAX_PROGRESS)
        self._failure: Exception | None = None
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def __aenter__(self) -> "SessionClient":
        connection = await self._link.call(qrexec_call.SESSION)
        try:
            self._reader, self._writer = await asyncio.open_connection(sock=connection)
        except BaseException:
            close_read(connection)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        # Not in an orderly way: a worker that does not read would never let it end.
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def open(self, options: SessionOptions) -> AsyncGenerator[m.WorkerMessage, None]:
        """Ask for the manifest; yields log and progress on the way, and the manifest as the last message.

        May be called again with another passphrase after WrongPassphrase.
        """
        message = _open_message(options, self._link.storage)
        self._stall_timeout_s = options.stall_timeout_s
        if not self._opened:  # the worker keeps the archive, whatever passphrase is tried next
            self._opened = True
            await self._link.provide_archive()
        await self._send(message)
        while self._connection.state is m.State.OPENING:
            yield await self._receive()

    async def start(self, request: m.Start) -> AsyncGenerator[m.WorkerMessage, None]:
        """Ask for the volumes; yields everything that the worker says, `finished` as the last message.

        What comes after `finished` is not looked at.
        """
        await self._link.provide_archive()
        await self._send(request)
        while self._connection.state is not m.State.CLOSED:
            yield await self._receive()

    async def skip_qube(self, key: str) -> None:
        """Tell the worker that nothing more of this qube is wanted."""
        if self._connection.state is not m.State.CLOSED:
            await self._send(m.SkipQube(key=key))

    def cancel(self) -> None:
        """Tell the worker to stop, if it still listens; waits for nothing."""
        if self._opened and self._connection.may_come(m.Cancel):
            self._writer.write(self._connection.send(m.Cancel()))

    def fail(self, error: Exception) -> None:
        """End the session with `error`: everybody who waits for a message, now or later, gets the error
        instead."""
        self._failure = error
        self._reader.set_exception(error)

    async def lost(self, otherwise: str = "the worker hung up") -> WorkerLost:
        """The error for a worker that is gone; `otherwise` is why, if the link does not know it soon."""
        reason = otherwise
        with contextlib.suppress(TimeoutError):
            reason = await asyncio.wait_for(self._link.wait_gone(), _REASON_TIMEOUT_S)
        return WorkerLost(reason)

    async def explained(self, error: RestoreError) -> RestoreError:
        """`error`, or why the archive ended too early for it, if the side that brings it knows the reason.

        If that side could not read all of it, that may be the reason of any damage.
        """
        if (gaps := self._link.archive_gaps) is not None and isinstance(error, (*EARLY_ENDS, *_DAMAGE)):
            error.reason = f"{error.reason}; {gaps}"
        if not isinstance(error, EARLY_ENDS):
            return error
        fault = await self._link.archive_fault()
        if fault is None:
            if self._link.source == PIPE and isinstance(error, _ENDS_OF_A_PIPE):
                error.advice = f"{_PIPE_ADVICE} {error.advice}".rstrip()
            return error
        reason = f"{error.reason}; {fault.reason}"
        told = ArchiveUnreadable(reason, advice=fault.advice)
        return told.at(qube=error.qube, volume=error.volume, chunk=error.chunk)

    async def _send(self, message: m.Message) -> None:
        frame = self._connection.send(message)
        try:
            self._writer.write(frame)
            async with asyncio.timeout(self._stall_s):
                await self._writer.drain()
        except TimeoutError:
            raise WorkerStalled("the worker takes no messages") from None
        except OSError as error:
            if (found := exhausted(error)) is not None:
                raise found from error
            # Its last words may still be there to be read, and the end after them.

    async def _receive(self) -> m.WorkerMessage:
        """The next message; a `failed` is raised as its error."""
        while True:
            message = self._connection.next_message()
            if message is None:
                self._connection.receive(await self._read())
                continue
            if isinstance(message, m.Failed):
                raise await self.explained(believed_error(message.error))
            if isinstance(message, m.Log):
                self._log_lines += 1
                if self._log_lines > MAX_LOG_LINES:
                    raise ProtocolViolation(f"more than {MAX_LOG_LINES} lines of log")
                return message.model_copy(update={"text": WORKER_SAYS + one_phrase(message.text)})
            if isinstance(message, m.Progress):
                await self._pace()
                return self._watched(message) or message
            return message

    def _watched(self, progress: m.Progress) -> m.Log | None:
        """A warning, once, if the source has stalled. Raises SourceStalled if it has for too long."""
        self._clock.heard(progress, time.monotonic())
        stalled_s = int(self._clock.stalled_s)
        what = f"no data from {self._link.source} for {stalled_s} s"
        if self._stall_timeout_s is not None and stalled_s >= self._stall_timeout_s:
            raise SourceStalled(what)
        was_named, self._stall_named = self._stall_named, stalled_s >= NAMED_AFTER_S
        return m.Log(level="warning", text=what) if self._stall_named and not was_named else None

    async def _read_in_time(self) -> bytes:
        # Twice: when this process has been stopped (Ctrl-Z) the first wait is over before it has looked.
        for stall_s in (self._stall_s, min(_GRACE_S, self._stall_s / 2)):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(stall_s):
                    return await self._reader.read(_READ_SIZE)
        raise WorkerStalled(f"the worker has said nothing for {self._stall_s:.0f} seconds")

    async def _read(self) -> bytes:
        try:
            untrusted_data = await self._read_in_time()
        except OSError as error:
            if error is self._failure:
                raise
            if (found := exhausted(error)) is not None:
                raise found from error
            untrusted_data = b""
        if not untrusted_data:
            raise await self.lost()
        return untrusted_data

    async def _pace(self) -> None:
        """Wait if the worker sends more progress than anybody can use; then the worker has to wait, too."""
        now = asyncio.get_running_loop().time()
        if len(self._progress) == MAX_PROGRESS and (wait_s := self._progress[0] + PACE_S - now) > 0:
            await asyncio.sleep(wait_s)
            now += wait_s
        self._progress.append(now)


def _open_message(options: SessionOptions, storage: m.Storage | None) -> m.Open:
    """The request; raises UsageError for an option that no message can hold."""
    fields = {**asdict(options), "storage": storage}
    del fields["stall_timeout_s"], fields["digest"]
    try:
        return m.Open.model_validate(fields)
    except ValidationError as error:
        # Never the value: it may be the passphrase.
        what = str(error.errors(include_input=False)[0]["loc"][0]).replace("_", "-")
        raise UsageError(f"the {what} is outside of what is possible") from None
