"""The worker's side of `restore.Session`: messages in, the pipeline's answers out.

Strategy: the event loop only carries messages; what blocks runs in threads and comes back through the
outbox. Nobody waits for the threads: one that reads from a silent pipe, or derives a key, ends when it can.
Every message, in either direction, passes the one `SessionState`. The session is over when the broker
hangs up or cancels, when everything has been said, or when one side breaks the protocol.
"""

import asyncio
import concurrent.futures
import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from qubes_restore_svc.errors import Cancelled, ProtocolViolation
from qubes_restore_svc.kdf.engine import CostLimit, KdfEngine
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.framing import FrameDecoder, encode_frame
from qubes_restore_svc.wire.session import SessionState, State
from qubes_restore_svc.worker.archive_access import ArchiveAccess, ArchivePass
from qubes_restore_svc.worker.budget import Budget
from qubes_restore_svc.worker.conversation import paths_of
from qubes_restore_svc.worker.events import event_queue
from qubes_restore_svc.worker.faults import as_restore_error
from qubes_restore_svc.worker.fetches import Fetches
from qubes_restore_svc.worker.intake import Intake
from qubes_restore_svc.worker.keys import KeyScheduler
from qubes_restore_svc.worker.opening import OpenBackup, open_backup
from qubes_restore_svc.worker.outbox import Outbox
from qubes_restore_svc.worker.pipeline import Pipeline

#: Seconds between signs of life.
HEARTBEAT_S = 0.5

#: Seconds that the broker gets, when all has been said, to read it and to hang up.
LINGER_S = 10.0

_READ_SIZE = 64 << 10


@dataclass(frozen=True, slots=True)
class Resources:
    """What the daemon gives a session. `memory` is what it may use unless told otherwise, in bytes; `advice`
    says what a person can do so that it may use more."""

    engine: KdfEngine
    memory: int
    jobs: int
    archive: ArchiveAccess
    advice: Callable[[int], str]


class Session:
    """One session, over the streams of one `restore.Session` call."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        resources: Resources,
        fetches: Fetches,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._resources = resources
        self._fetches = fetches
        self._state = SessionState()
        self._outbox = Outbox(asyncio.get_running_loop())
        self._open_request: m.Open | None = None
        self._backup: OpenBackup | None = None
        self._events = event_queue()
        self._pass: ArchivePass | None = None  # the one that is being read
        self._intake: Intake | None = None
        self._pipeline: Pipeline | None = None
        self._budget: Budget | None = None
        self._scheduler: KeyScheduler | None = None
        self._costs = CostLimit()

    async def run(self) -> None:
        """Serve the session to its end."""
        tasks = [asyncio.create_task(job()) for job in (self._receive, self._send, self._heartbeat)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        except (ProtocolViolation, OSError):
            pass  # The broker broke the protocol or is gone: there is nobody to tell.
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._stop()
            # Not in an orderly way: a broker that does not read would never let it end.
            self._writer.transport.abort()

    @property
    def _closed(self) -> bool:
        return self._state.state is State.CLOSED

    async def _receive(self) -> None:
        decoder = FrameDecoder(m.Start.max_size)
        while untrusted_data := await self._reader.read(_READ_SIZE):
            for untrusted_payload in decoder.feed(untrusted_data):
                message = m.parse_broker_message(untrusted_payload)
                late = self._closed  # it was on its way when the last word was said
                if not late:
                    self._state.advance(message)
                if isinstance(message, m.Cancel):
                    return
                if not late:
                    self._try_to(message)

    def _try_to(self, message: m.BrokerMessage) -> None:
        try:
            self._act(message)
        except ProtocolViolation:
            raise
        except Exception as error:  # noqa: BLE001 - no thread or no memory is left: the broker waits for a word
            self._outbox.put_at_once(m.Failed(error=m.ErrorInfo.of(as_restore_error(error))))

    def _act(self, message: m.BrokerMessage) -> None:
        if isinstance(message, m.Open):
            jobs = message.jobs or self._resources.jobs
            engine = self._resources.engine
            # One chunk is being read, one is being unpacked, and every lane has one.
            max_chunks = jobs * engine.lanes + 2
            if message.storage is not None:
                self._resources.archive.fetch_from(message.storage)
            budget = self._budget = Budget(
                message.memory or self._resources.memory,
                engine,
                max_chunks,
                advice=self._resources.advice,
            )
            scheduler = self._scheduler = KeyScheduler(engine, budget, jobs)
            self._open_request = message
            self._in_thread("open", lambda: self._open(message, budget, scheduler))
        elif isinstance(message, m.Start):
            self._start(message)
        elif isinstance(message, m.SkipQube):
            if self._pipeline is not None:
                self._pipeline.skip(message.key)
            self._fetches.withdraw(message.key)

    async def _send(self) -> None:
        while not self._closed:
            message = await self._outbox.get()
            self._state.advance(message)
            self._writer.write(encode_frame(m.encode_message(message)))
            await self._writer.drain()
            self._outbox.sent()
        # A broker that is just saying something must not find the connection broken before it has read this.
        self._writer.write_eof()
        await asyncio.sleep(LINGER_S)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if self._state.state in (State.IDLE, State.CLOSED):
                continue
            if self._pipeline is not None:
                progress = self._pipeline.progress()
            else:
                progress = m.Progress(archive_bytes=0 if self._intake is None else self._intake.position)
            source = {
                "received": 0 if self._pass is None else self._pass.source.received,
                "waiting_for_source": self._waits_for_source(),
            }
            self._outbox.put_if_idle(progress.model_copy(update=source))

    def _waits_for_source(self) -> bool:
        """Does everything wait for the source, and neither for a key nor for the unpacking or the broker?"""
        if self._scheduler is not None and self._scheduler.busy:
            return False
        if self._pass is None:  # it has not even begun to bring the archive
            return True
        return self._pass.source.waited_for and (self._pipeline is None or self._pipeline.idle)

    def _in_thread(self, name: str, work: Callable[[], None]) -> None:
        """Run `work` in a thread; what goes wrong in it ends the session with Failed."""

        def guarded() -> None:
            try:
                work()
            except Cancelled:
                pass
            except Exception as error:  # noqa: BLE001 - the broker waits for a last word
                self._outbox.put(m.Failed(error=m.ErrorInfo.of(as_restore_error(error))))

        threading.Thread(target=guarded, name=name, daemon=True).start()

    def _open(self, request: m.Open, budget: Budget, scheduler: KeyScheduler) -> None:
        costs = self._costs = CostLimit(ignored=request.ignore_cost_limit)
        first = self._pass = self._resources.archive.first_pass()
        intake = self._intake = Intake(
            first.source,
            first.reader,
            budget,
            scheduler,
            self._events,
            costs,
        )
        # What follows qubes.xml comes in this pass only if it is the whole archive.
        ahead = request.ahead and first.whole
        scheduler.expect_more(ahead)
        try:
            backup = open_backup(
                intake,
                request.passphrase.get_secret_value(),
                request.compression_filter,
                remark=self._warn,
                ahead=ahead,
            )
        finally:
            if not first.whole:
                first.close()
        self._backup = backup
        for warning in backup.content.warnings:
            self._warn(warning)
        self._outbox.put(
            m.Manifest(
                backup_id=backup.header.backup_id,
                format=backup.header.version,
                compression_filter=backup.filter,
                qubes=tuple(qube.info for qube in backup.content.qubes),
                refused=backup.content.refused,
            )
        )

    def _start(self, request: m.Start) -> None:
        assert self._open_request is not None and self._backup is not None
        if set(request.keys) - {qube.info.key for qube in self._backup.content.qubes}:
            raise ProtocolViolation("'start' names qubes that the backup does not hold")
        reading, intake = self._main_pass(self._backup, request)
        pipeline = self._pipeline = Pipeline(
            self._backup,
            intake,
            self._events,
            request,
            ignore_size_limit=self._open_request.ignore_size_limit,
            emit=self._outbox.put,
            announce=self._announce,
            whole=reading.whole,
            doubt=reading.doubt,
        )

        def run() -> None:
            # It ends when the intake has ended, whatever happens: nobody reads from the archive any more.
            with contextlib.closing(reading):
                pipeline.run()

        self._in_thread("pipeline", run)

    def _main_pass(self, backup: OpenBackup, request: m.Start) -> tuple[ArchivePass, Intake]:
        """The pass that brings the volumes: the one that goes on behind qubes.xml, or another one."""
        assert self._pass is not None and self._intake is not None
        assert self._budget is not None and self._scheduler is not None
        if not self._pass.whole:
            keys = frozenset(request.keys)
            selected = [qube for qube in backup.content.qubes if qube.info.key in keys]
            self._pass = self._resources.archive.second_pass(
                paths_of(selected), position=self._intake.position, remark=self._warn
            )
            # The first intake has given everything back, and has put nothing into the queue.
            self._intake = Intake(
                self._pass.source,
                self._pass.reader,
                self._budget,
                self._scheduler,
                self._events,
                self._costs,
            )
        return self._pass, self._intake

    def _warn(self, text: str) -> None:
        self._outbox.put(m.Log(level="warning", text=text[:1000]))

    def _announce(self, ready: m.VolumeReady) -> "concurrent.futures.Future[socket.socket | None]":
        taker = self._fetches.offer(ready.key, ready.volume)
        self._outbox.put(ready)
        return taker

    def _stop(self) -> None:
        """Let all threads come to an end; derivations that run now take their seconds."""
        self._outbox.close()
        if self._pipeline is not None:
            self._pipeline.cancel()
        elif self._intake is not None:
            self._intake.abandon()
        if self._scheduler is not None:
            self._scheduler.close()
        self._fetches.withdraw()
