"""The work of one session, in one thread: open the backup, list it, wait until it is said what to read, read.

Strategy: one function does the whole work. It makes each part (memory, keys, the archive, the intake, the
pipeline) where it needs it, and passes it on. Each part knows the parts before it, and no part knows all.
Meanwhile the session talks to the work through `Work`: which qubes are wanted, which are not wanted any more,
how far the work is, and that it shall end.
"""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass

from qubes_restore_svc.archive.qubes_xml import BackupContent
from qubes_restore_svc.errors import Cancelled, ProtocolViolation, WrongPassphrase
from qubes_restore_svc.kdf.engine import CostLimit, KdfEngine
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.worker.archive_access import ArchiveAccess
from qubes_restore_svc.worker.chunk import ChunkStore
from qubes_restore_svc.worker.intake import Intake
from qubes_restore_svc.worker.keys import KeyScheduler
from qubes_restore_svc.worker.memory import Budget
from qubes_restore_svc.worker.opening import OpenedBackup, open_backup
from qubes_restore_svc.worker.pipeline import Announce, Emit, Pipeline
from qubes_restore_svc.worker.selection import Selection, Wanted
from qubes_restore_svc.worker.source import ArchivePass, ArchiveSource, MemberStream
from qubes_restore_svc.worker.storage_qube import paths_of
from qubes_restore_svc.worker.threads import Stop, as_restore_error


@dataclass(frozen=True, slots=True)
class Resources:
    """What the daemon gives a session. `memory` is what it may use unless told otherwise, in bytes; `advice`
    says what a person can do so that it may use more."""

    engine: KdfEngine
    memory: int
    jobs: int
    archive: ArchiveAccess
    advice: Callable[[int], str]


@dataclass(slots=True)
class _Gauge:
    """Where it can be seen how far the work is, from any thread. Each part is put here when it begins."""

    scheduler: KeyScheduler | None = None
    source: ArchiveSource | None = None
    pipeline: Pipeline | None = None

    def progress(self) -> m.Progress:
        read = 0 if self.source is None else self.source.position
        if self.pipeline is None or self.source is None or self.scheduler is None:
            progress = m.Progress(archive_bytes=read)
        else:
            progress = self.pipeline.progress(read, self.source.size, deriving=self.scheduler.busy)
        source = {
            "received": 0 if self.source is None else self.source.received,
            "waiting_for_source": self._waits_for_source(),
        }
        return progress.model_copy(update=source)

    def _waits_for_source(self) -> bool:
        """Does everything wait for the source, and neither for a key nor for the unpacking or the broker?"""
        if self.scheduler is not None and self.scheduler.busy:
            return False
        if self.source is None:  # it has not even begun to bring the archive
            return True
        return self.source.waited_for and (self.pipeline is None or self.pipeline.idle)


class Work:
    """What `request` asks for; it begins at once. `emit` takes the answers, and may block; `announce` offers
    a volume to the broker."""

    def __init__(self, request: m.Open, resources: Resources, emit: Emit, announce: Announce) -> None:
        self._request = request
        self._resources = resources
        self._emit = emit
        self._announce = announce
        self._stop = Stop()
        self._gauge = _Gauge()
        self._content: BackupContent | None = None
        self.waits_for_passphrase = False  #: was one wrong, and can another one be tried?
        self._whole = True
        self._selection: Selection | None = None
        self._other_passphrase: Future[str] = Future()
        self._started: Future[tuple[m.Start, Selection]] = Future()
        self._stop.wakes(self._started.cancel)
        threading.Thread(target=self._carry_out, name="work", daemon=True).start()

    # --- On the event loop -------------------------------------------------------------------------

    def open_with(self, passphrase: str) -> None:
        """Try this one after one that was wrong. Raises ProtocolViolation if that is not what was wrong."""
        if self._other_passphrase.done() or not self.waits_for_passphrase:
            raise ProtocolViolation("'open' again, and it was not the passphrase that was wrong")
        self.waits_for_passphrase = False
        self._other_passphrase.set_result(passphrase)

    def start(self, request: m.Start) -> None:
        """Read these qubes; once, when the manifest was sent. Raises ProtocolViolation if it lacks one."""
        assert self._content is not None
        asked = {*request.keys, *(qube.key for qube in request.here)}
        if asked - {qube.info.key for qube in self._content.qubes}:
            raise ProtocolViolation("'start' names qubes that the backup does not hold")
        # A storage service sends the directories that it is asked for: of what is here, nothing comes.
        here = request.here if self._whole else ()
        self._selection = Selection(self._content, request.keys, here, only=request.only, whole=self._whole)
        self._started.set_result((request, self._selection))

    def skip(self, key: str) -> None:
        """Nothing more of this qube is wanted."""
        if self._selection is not None:
            self._selection.skip(key)

    def progress(self) -> m.Progress:
        """How far it is."""
        return self._gauge.progress()

    def stop(self) -> None:
        """Let all threads come to an end; derivations that run now take a tenth of a second."""
        self._stop.say()

    # --- In its thread -----------------------------------------------------------------------------

    def _carry_out(self) -> None:
        with contextlib.ExitStack() as clearing_up:
            try:
                self._serve(clearing_up)
            except Cancelled:
                self._stop.say()
            except Exception as error:  # noqa: BLE001 - the broker waits for a last word
                self._emit(m.Failed(error=m.ErrorInfo.of(as_restore_error(error))))
                self._stop.say()

    def _serve(self, clearing_up: contextlib.ExitStack) -> None:
        """Do all of it. Everything that must be given back in the end is put into `clearing_up`."""
        request, archive, engine = self._request, self._resources.archive, self._resources.engine
        jobs = request.jobs or self._resources.jobs
        budget = Budget(
            request.memory or self._resources.memory,
            engine,
            # One chunk is being read, one is being unpacked, and every lane has one that is filled with few.
            jobs * engine.lanes_for_few + 2,
            self._stop,
            advice=self._resources.advice,
        )
        costs = CostLimit(ignored=request.ignore_cost_limit)
        scheduler = self._gauge.scheduler = KeyScheduler(engine, budget, jobs, costs=costs)
        self._stop.wakes(scheduler.close)
        wanted = Wanted()

        def begin(reading: ArchivePass) -> tuple[ChunkStore, Intake]:
            clearing_up.callback(reading.close)
            self._gauge.source = reading.source
            store = ChunkStore(MemberStream(reading.source, reading.reader, self._stop.check), budget)
            intake = Intake(store, scheduler, wanted)
            clearing_up.callback(intake.abandon)
            return store, intake

        reading = archive.first_pass()
        store, intake = begin(reading)
        # What follows qubes.xml comes in this pass only if it is the whole archive.
        ahead = request.ahead and reading.whole
        # Keys that are derived before the passphrase has proved right are those of one passphrase.
        at_once = ahead and not request.retry
        scheduler.expect_more(at_once)
        try:
            backup = open_backup(
                store,
                scheduler,
                request.passphrase.get_secret_value(),
                request.compression_filter,
                remark=self._warn,
                go_ahead=intake.start if at_once else None,
                other_passphrase=self._ask_for_another if request.retry else None,
            )
        finally:
            if not reading.whole:
                reading.close()
        if ahead:
            intake.start(backup.proofs)
        self._list(backup, whole=reading.whole)
        start, selection = self._wait_for_start()
        if not reading.whole:
            if not start.keys:
                position = reading.source.position
                self._emit(m.Finished(archive_bytes=position, derivations=scheduler.derivations))
                return
            paths = paths_of(qube.backup for qube in selection)
            reading = archive.second_pass(paths, position=reading.source.position, remark=self._warn)
            store, intake = begin(reading)
        wanted.narrow(selection)
        scheduler.leave_processors()  # chunks are unpacked as they come
        store.open_ahead(jobs)
        clearing_up.callback(store.close)
        self._stop.wakes(store.close)
        pipeline = self._gauge.pipeline = Pipeline(
            backup,
            selection,
            intake.events,
            self._stop,
            restoring=start.mode == "restore",
            digest=start.digest,
            ignore_size_limit=request.ignore_size_limit,
            emit=self._emit,
            announce=self._announce,
            doubt=reading.doubt,
            derivations=lambda: scheduler.derivations,
        )
        intake.start(backup.proofs)
        pipeline.run()

    def _list(self, backup: OpenedBackup, *, whole: bool) -> None:
        for warning in backup.content.warnings:
            self._warn(warning)
        self._content, self._whole = backup.content, whole
        self._emit(
            m.Manifest(
                backup_id=backup.header.backup_id,
                format=backup.header.version,
                compression_filter=backup.filter,
                qubes=tuple(qube.info for qube in backup.content.qubes),
                refused=backup.content.refused,
            )
        )

    def _ask_for_another(self, error: WrongPassphrase) -> str:
        """Tell that the passphrase is wrong, and wait for another one; the archive stays where it is."""
        self._other_passphrase = Future()
        self._stop.wakes(self._other_passphrase.cancel)
        self.waits_for_passphrase = True
        self._emit(m.Failed(error=m.ErrorInfo.of(error)))
        try:
            return self._other_passphrase.result()
        except CancelledError:
            raise Cancelled("the restore was cancelled") from None

    def _wait_for_start(self) -> tuple[m.Start, Selection]:
        try:
            return self._started.result()
        except CancelledError:
            raise Cancelled("the restore was cancelled") from None

    def _warn(self, text: str) -> None:
        self._emit(m.Log(level="warning", text=text[:1000]))
