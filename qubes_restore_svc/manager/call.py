"""The one call to dom0's broker that a restore dialog has open, and who may do what with it when.

Strategy: the call is opened by the first plan that is asked for and stays open until the end, so that the
worker's qube is started once. It is opened anew if the backup, or anything that only an opening can say, is
another one. One thread at a time works with it; any other may cancel or close, which never waits: whoever
works is told, and closes behind himself; a call that rests is closed in the background, and the next one is
opened when that is through. After an error, or a report, the call is over.

What the broker tells meanwhile is passed on by one observer: to the log, to the stock progress callback, to a
listener. It is told things in a thread of the client, in their order, and passes them on there. What an
audience raises is logged and otherwise ignored: a display that fails is no reason to lose a restore.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from qubes_restore_svc.client.sync import BlockingRestoreCall
from qubes_restore_svc.client.transports import system_transport
from qubes_restore_svc.errors import Cancelled, RestoreError
from qubes_restore_svc.manager.wording import outcome, plain, planned_name, translate
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.report import Observer, QubeReport, Report, RestoreProgress

#: Makes a call, which is not open before it is entered.
OpenCall = Callable[[c.OpenBackup, Observer], BlockingRestoreCall]


def call_dom0(request: c.OpenBackup, observer: Observer) -> BlockingRestoreCall:
    """A call to the broker of this system, over qrexec or, in dom0, with a child process."""
    return BlockingRestoreCall(system_transport(), request, observer)


#: Calls of this process that are being closed. dom0 has one restore at a time: the next waits for these.
_closings: set[threading.Thread] = set()


class KeptCall:
    """A call that is kept open between the steps of a dialog. Owns it: `close` it."""

    def __init__(self, open_call: OpenCall, observer: Observer) -> None:
        self._open_call = open_call
        self._observer = observer
        self._lock = threading.Lock()  # of the three that follow; held for moments only
        self._call: BlockingRestoreCall | None = None
        self._working = False
        self._cancelled = False
        self._opened: c.OpenBackup | None = None  # what the call was opened with, but for the choice
        self._choice: c.Choice | None = None  # what the last plan was made from

    @property
    def cancelled(self) -> bool:
        """Has it been cancelled, and not been set free since?"""
        return self._cancelled

    def cancel(self) -> None:
        """Stop what is being done, and do nothing from now on. From any thread; returns at once."""
        self._stop(cancelled=True)

    def set_free(self) -> None:
        """What was cancelled may be begun again."""
        self._cancelled = False

    def close(self) -> None:
        """End the call, if there is one. From any thread; returns at once if another one works with it."""
        self._stop(cancelled=False)

    def plan(self, request: c.OpenBackup) -> c.Plan:
        """The plan as of now. Raises RestoreError, Cancelled among them."""
        with self._work():
            if not self._is_open_for(request):
                plan = self._open(request)
            else:
                assert self._call is not None
                self._choice = None
                plan = self._call.choose(request.choice)
                self._check_cancelled()
                self._choice = request.choice
            if plan.excess is not None:  # another choice may be within the limits
                self._observer.log("warning", str(plan.excess.to_error()))
            return plan

    def last_plan(self, request: c.OpenBackup) -> c.Plan:
        """The plan that was made last if it was made from this request, otherwise a new one."""
        with self._lock:
            call = self._call
        if call is not None and self._is_open_for(request) and self._choice == request.choice:
            return call.plan
        return self.plan(request)

    def confirm(self) -> Report:
        """Carry out the last plan; the call is over then. Raises RestoreError."""
        with self._work():
            if self._call is None:
                raise RestoreError("the backup is not open any more", advice="Begin again.")
            try:
                return self._call.confirm()
            finally:
                self._end()

    def _is_open_for(self, request: c.OpenBackup) -> bool:
        return self._call is not None and self._opened == _without_choice(request)

    def _open(self, request: c.OpenBackup) -> c.Plan:
        self._end()
        for closing in tuple(_closings):
            closing.join()
        call = self._open_call(request, self._observer)
        with self._lock:
            self._check_cancelled()
            self._call = call
        try:
            call.__enter__()
        except BaseException:
            self._detach()  # it has closed itself
            raise
        self._check_cancelled()
        self._opened, self._choice = _without_choice(request), request.choice
        return call.plan

    def _end(self) -> None:
        call = self._detach()
        if call is not None:
            _close(call)

    def _detach(self) -> BlockingRestoreCall | None:
        with self._lock:
            call, self._call = self._call, None
        self._opened = self._choice = None
        return call

    @contextlib.contextmanager
    def _work(self) -> Iterator[None]:
        """The one thread that works with the call; an error ends it."""
        with self._lock:
            if self._working:
                raise RestoreError("this restore is being worked on already", advice="")
            self._working = True
        try:
            self._check_cancelled()
            yield
        except BaseException:
            self._end()
            raise
        finally:
            with self._lock:
                self._working = False

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise Cancelled("the restore was cancelled", advice="")

    def _stop(self, *, cancelled: bool) -> None:
        with self._lock:
            call, working = self._call, self._working
            self._cancelled = self._cancelled or cancelled or working
            if not working:
                self._call = None
        if call is None:
            return
        if working:
            call.cancel()
        else:
            _close_in_background(call)


def _close(call: BlockingRestoreCall) -> None:
    call.__exit__(None, None, None)


def _close_in_background(call: BlockingRestoreCall) -> None:
    if not threading.main_thread().is_alive():  # no thread outlives it, so at the very end it is done here
        _close(call)
        return

    def run() -> None:
        try:
            _close(call)
        finally:
            _closings.discard(threading.current_thread())

    thread = threading.Thread(target=run, name="closing-restore-call")
    _closings.add(thread)
    thread.start()


def _without_choice(request: c.OpenBackup) -> c.OpenBackup:
    return request.model_copy(update={"choice": c.Choice()})


# --- What the broker tells -----------------------------------------------------------------------

#: The logger of the stock package; the dialog shows what is said there.
LOG = logging.getLogger("qubesadmin.backup")


class RestoreListener(Observer):
    """Is also told of the begin and the end, in threads of the client and of whoever restores, in this order.

    A line of the broker goes to the log instead.
    """

    def started(self, plan: c.Plan) -> None:
        """This plan begins."""

    def cancelling(self) -> None:
        """The person has cancelled; what is under way is being undone. Also before `started`."""

    def ended(self, report: Report | None, error: RestoreError | None) -> None:
        """The end: a report, or what came instead of one."""


class Events(Observer):
    """The observer of a call. Its two audiences may be set at any time."""

    def __init__(self) -> None:
        #: stock: called with whole percents, each rising; 100 only at the end
        self.progress_callback: Callable[[int], None] | None = None
        self.listener: RestoreListener | None = None
        self._plan: c.Plan | None = None
        self._percent = -1
        self._announced: set[str] = set()
        self._names: dict[str, str] = {}  # as they are shown

    def started(self, plan: c.Plan) -> None:
        """This plan is about to be carried out."""
        self._plan, self._percent = plan, -1
        self._announced.clear()
        self._names = {qube.new_name: planned_name(qube) for qube in plan.taken}
        self._tell(lambda listener: listener.started(plan))

    def progress(self, progress: RestoreProgress) -> None:
        """Percents rise; before the restore has begun there are none."""
        if self._plan is None:
            return
        self._tell(lambda listener: listener.progress(progress))
        if progress.percent is not None:
            self._call_back(progress.percent)

    def log(self, level: str, text: str) -> None:
        """A line of the broker."""
        LOG.log(logging.WARNING if level == "warning" else logging.INFO, "%s", plain(text))

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        """The first volume of a qube is its beginning."""
        if qube not in self._announced:
            self._announced.add(qube)
            text = (
                translate("Restore", "Verifying {name}…")
                if self._mode == "verify"
                else translate("Restore", "Restoring {name}…")
            )
            LOG.info("%s", text.format(name=self._names.get(qube, plain(qube))))
        self._tell(lambda listener: listener.volume_started(qube, volume, image_size))

    def qube_finished(self, report: QubeReport) -> None:
        """A line on the qube, and its warnings."""
        if report.outcome != "left out":
            found = outcome(report, self._mode)
            if found.succeeded:
                LOG.info("%s: %s", found.name, ". ".join(filter(None, (found.word, found.advice))))
            else:
                LOG.error("%s: %s. %s", found.name, found.word, found.explanation)
        for warning in report.warnings:
            LOG.warning("%s: %s", plain(report.name), plain(warning))
        self._tell(lambda listener: listener.qube_finished(report))

    def cancelling(self) -> None:
        """The person has cancelled."""
        restoring = self._plan is not None and self._mode != "verify"
        text = (
            translate("Restore", "Cancelling: the qube that is under way is removed, finished ones stay…")
            if restoring
            else translate("Restore", "Cancelling…")
        )
        LOG.warning("%s", text)
        self._tell(lambda listener: listener.cancelling())

    def ended(self, report: Report | None, error: RestoreError | None) -> None:
        """It is over."""
        if report is not None and report.status == 0:
            self._call_back(100)
        for warning in () if report is None else report.warnings:
            LOG.warning("%s", plain(warning))
        self._plan = None
        self._tell(lambda listener: listener.ended(report, error))

    @property
    def _mode(self) -> str:
        return "restore" if self._plan is None else self._plan.mode

    def _call_back(self, percent: int) -> None:
        callback = self.progress_callback
        if callback is not None and percent > self._percent:
            self._percent = percent
            _guarded(lambda: callback(percent))

    def _tell(self, say: Callable[[RestoreListener], None]) -> None:
        listener = self.listener
        if listener is not None:
            _guarded(lambda: say(listener))


def _guarded(tell: Callable[[], None]) -> None:
    try:
        tell()
    except Exception:
        LOG.exception("%s", translate("Restore", "what shows the restore failed; the restore goes on"))
