"""What the broker tells while it works, passed on: to the log, to the stock progress callback, to a listener.

Strategy: one observer of the call for all three. It is told things in a thread of the client, in their order,
and passes them on there. What an audience raises is logged and otherwise ignored: a display that fails is no
reason to lose a restore.
"""

import logging
from collections.abc import Callable

from qubes_restore_svc.errors import RestoreError
from qubes_restore_svc.manager.wording import outcome, plain, planned_name, translate
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.report import Observer, QubeReport, Report, RestoreProgress

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
