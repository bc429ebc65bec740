"""A call of dom0's restore service, for asyncio.

Strategy: one task listens for as long as the call is open. It gets the messages from the connection of
`wire/restore_call.py`, tells the observer, and ends with the call: with the report, or with the error that
ended it. While the caller awaits something (a plan, the report), it awaits that task, too. So it never waits
for something that cannot come any more. Nothing here waits until dom0 has read something: the messages are
small, and the listening task sees the end of the call.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Self

from qubes_restore_svc.client.transports import Streams, Transport
from qubes_restore_svc.errors import Cancelled, HostFailed, ProtocolViolation, RestoreError, UsageError
from qubes_restore_svc.waiting import to_the_end
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import Cancel, Log
from qubes_restore_svc.wire.report import Observer, Report, RestoreProgress

#: Seconds that dom0 may take to say what came of a restore that was cancelled; then the call is closed.
CANCEL_TIMEOUT_S = 60.0
#: The same before anything was confirmed.
EARLY_CANCEL_TIMEOUT_S = 15.0

_READ_SIZE = 64 << 10
_VERSIONS = "dom0 and this qube may have different versions of qubes-restore-svc: update both."
_WHERE_TO_LOOK = "What came of it stands in dom0, in the newest report below /var/log/qubes-restore-svc."


async def list_backup(transport: Transport, request: c.OpenBackup) -> c.Plan:
    """What is in the backup, as a plan that is not carried out. Raises RestoreError."""
    async with RestoreCall(transport, request.model_copy(update={"mode": "list"})) as call:
        return call.plan


class RestoreCall:
    """One call, an async context manager: entering it opens the backup, leaving it closes the call.

    When the call is closed, dom0 cancels what is under way, and undoes it. All errors that the outside can
    cause are RestoreErrors; one that dom0 told is of the class of its kind. Only `cancel` may be called by
    another task at the same time. `report` is set as soon as dom0 has sent it, however `confirm` ended.
    `patient`: what was cancelled is waited for as long as dom0 takes to undo it, not for CANCEL_TIMEOUT_S.
    """

    def __init__(
        self,
        transport: Transport,
        request: c.OpenBackup,
        observer: Observer | None = None,
        *,
        patient: bool = False,
    ) -> None:
        self.report: Report | None = None
        self._patient = patient
        self._transport = transport
        self._request = request
        self._observer: Observer = Observer() if observer is None else observer
        self._connection = c.client_end()
        self._plan: c.Plan | None = None
        self._planned = asyncio.Event()
        self._streams: Streams | None = None
        self._listening: asyncio.Task[None] | None = None
        self._confirmed = False
        self._cancel_wanted = False
        self._impatience: asyncio.TimerHandle | None = None
        self._gave_up = False

    @property
    def plan(self) -> c.Plan:
        """The plan that was told last; there is one as soon as the call was entered."""
        assert self._plan is not None, "the call has not been entered"
        return self._plan

    async def __aenter__(self) -> Self:
        """Connect, open the backup and wait for the plan. Raises RestoreError.

        That takes as long as dom0 needs to start a worker and to derive the first keys, or a person in dom0
        to be asked whether the call is allowed.
        """
        opening = self._frame(self._request)
        try:
            self._streams = await self._transport.connect(c.SERVICES[self._request.mode])
            self._streams.writer.write(opening)
            self._listening = asyncio.create_task(self._listen(self._streams))
            if self._cancel_wanted:
                self.request_cancel()
            await self._next_plan()
        except BaseException:
            await to_the_end(self._close())
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await to_the_end(self._close())

    async def choose(self, choice: c.Choice) -> c.Plan:
        """Have another plan made, from this choice alone. Raises RestoreError; the call is over then."""
        if self._connection.state is c.CallPhase.ENDING:
            await self.wait_ended()
        if self._is_over:
            raise self._why_over()
        self._send(c.Choose(choice=choice))
        self._planned.clear()
        return await self._next_plan()

    async def confirm(self) -> Report:
        """Carry out the last plan, and return the report. Raises RestoreError.

        A task that is cancelled while it waits here cancels the restore, waits until dom0 sends the `report`,
        CANCEL_TIMEOUT_S seconds at the most, and ends as cancelled.
        """
        if self._connection.state is not c.CallPhase.ENDING and not self._is_over:
            self._send(c.Confirm(plan=self.plan.number))
            self._confirmed = True
        try:
            return await self._end()
        except asyncio.CancelledError:
            self.request_cancel()
            with contextlib.suppress(RestoreError):
                await to_the_end(self._end())
            raise

    async def cancel(self) -> None:
        """Cancel: a task that awaits a plan gets an error, one that awaits the report that of a cancelled
        restore.

        Returns at once. If dom0 does not answer in time, the call is closed. Safe to repeat.
        """
        self.request_cancel()

    def request_cancel(self) -> None:
        """The same, for who is in the event loop's thread and cannot await."""
        self._cancel_wanted = True
        if self._is_over or not self._connection.may_come(Cancel):
            return
        running = self._connection.state is c.CallPhase.RUNNING
        timeout_s = CANCEL_TIMEOUT_S if running else EARLY_CANCEL_TIMEOUT_S
        self._send(Cancel())
        if not self._patient:
            self._impatience = asyncio.get_running_loop().call_later(timeout_s, self._give_up)

    async def wait_ended(self) -> None:
        """Return when dom0 has ended the call, or has been lost; `confirm` would tell at once why."""
        await asyncio.wait([self._listener])

    # --- Listening -------------------------------------------------------------------------------

    async def _listen(self, streams: Streams) -> None:
        """Returns when all is said that was to be said; raises the error that ended the call."""
        async with contextlib.aclosing(self._messages(streams)) as messages:
            async for message in messages:
                match message:
                    case Log():
                        self._observer.log(message.level, message.text)
                    case RestoreProgress():
                        self._observer.progress(message)
                    case c.VolumeStarted():
                        self._observer.volume_started(message.qube, message.volume, message.image_size)
                    case c.QubeFinished():
                        self._observer.qube_finished(message.qube)
                    case c.Refused():
                        raise message.error.to_error()
                    case Report():
                        self.report = message
                        return
                    case c.Plan() if self._connection.state is not c.CallPhase.ENDING:
                        self._plan = message
                        self._planned.set()
                        if self._connection.state is c.CallPhase.CLOSED:
                            return
        raise await self._lost(streams)

    async def _messages(self, streams: Streams) -> AsyncGenerator[c.BrokerAnswer, None]:
        """The messages of dom0 that may come now, until there are no more. Raises ProtocolViolation."""
        while True:
            try:
                untrusted_data = await streams.reader.read(_READ_SIZE)
            except OSError:
                return
            if not untrusted_data:
                return
            self._connection.receive(untrusted_data)
            while (message := self._next_message()) is not None:
                yield message

    def _next_message(self) -> c.BrokerAnswer | None:
        try:
            return self._connection.next_message()
        except ProtocolViolation as error:
            raise ProtocolViolation(f"dom0 sent {error.reason}", advice=_VERSIONS) from error

    async def _lost(self, streams: Streams) -> RestoreError:
        if self._gave_up and not self._confirmed:
            return Cancelled("it was cancelled", advice="dom0 may still be putting away what it had begun.")
        if self._gave_up:
            return HostFailed("it was cancelled, and dom0 did not say what came of it", advice=_WHERE_TO_LOOK)
        fault = await streams.fault()
        return fault or HostFailed("the call to dom0 ended without an answer", advice=_WHERE_TO_LOOK)

    def _give_up(self) -> None:
        if self._streams is not None and not self._is_over:
            self._gave_up = True
            self._streams.writer.transport.abort()

    # --- Waiting and saying ----------------------------------------------------------------------

    @property
    def _listener(self) -> asyncio.Task[None]:
        assert self._listening is not None, "the call has not been entered"
        return self._listening

    @property
    def _is_over(self) -> bool:
        return self._listening is None or self._listening.done()

    def _send(self, message: c.ClientMessage) -> None:
        """Raises UsageError for what cannot be said now. If nobody reads it, the listener notices."""
        assert self._streams is not None
        self._streams.writer.write(self._frame(message))

    def _frame(self, message: c.ClientMessage) -> bytes:
        in_time = self._connection.may_come(type(message))
        try:
            return self._connection.send(message)
        except ProtocolViolation as error:
            if in_time:
                what, advice = "too much was asked for at once:", "Name fewer qubes."
            else:
                what, advice = "dom0 cannot be told", ""
            raise UsageError(f"{what} {error.reason}", advice=advice) from error

    async def _next_plan(self) -> c.Plan:
        arrived = asyncio.ensure_future(self._planned.wait())
        try:
            await asyncio.wait([arrived, self._listener], return_when=asyncio.FIRST_COMPLETED)
        finally:
            arrived.cancel()
        if self._planned.is_set():
            return self.plan
        raise self._why_over()

    async def _end(self) -> Report:
        await asyncio.wait([self._listener])
        if self._listener.cancelled() or self._listener.exception() or self.report is None:
            raise self._why_over()
        return self.report

    def _why_over(self) -> BaseException:
        """Why nothing more comes."""
        if self._listener.cancelled():
            return HostFailed("the call has been closed here", advice="")
        if error := self._listener.exception():
            return error
        if self.report is not None and self.report.error is not None:
            return self.report.error.to_error()
        return HostFailed("dom0 has ended the call", advice="Open the backup again.")

    async def _close(self) -> None:
        if self._impatience is not None:
            self._impatience.cancel()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        if self._streams is not None:
            await self._streams.close()
