"""What the broker tells while it works, passed on: to the log, to the stock progress callback, to a listener.

Strategy: one observer of the call for all three. It is told things in a thread of the client, in their order,
and passes them on there. What an audience raises is logged and otherwise ignored: a display that fails is no
reason to lose a restore.
"""

import logging
from collections.abc import Callable
from typing import Protocol

from qubes_restore_svc.errors import RestoreError
from qubes_restore_svc.manager.progress import Progress
from qubes_restore_svc.manager.wording import outcome, plain
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.report import Observer, QubeReport, Report

#: The logger of the stock package; the dialog shows what is said there.
LOG = logging.getLogger("qubesadmin.backup")


class RestoreListener(Protocol):
    """Told how a restore goes, in threads of the client and of whoever restores, in this order."""

    def started(self, plan: c.Plan) -> None:
        """This plan begins."""
        ...

    def progress(self, archive_bytes: int, image_bytes: int) -> None:
        """How much of the archive is dealt with, and how much of all images is produced, bytes."""
        ...

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        """A volume begins; `image_size` in bytes, of `home` a ceiling."""
        ...

    def qube_finished(self, report: QubeReport) -> None:
        """A qube is through, one way or the other."""
        ...

    def cancelling(self) -> None:
        """The person has cancelled; what is under way is being undone. Also before `started`."""
        ...

    def ended(self, report: Report | None, error: RestoreError | None) -> None:
        """The end: a report, or what came instead of one."""
        ...


class Events(Observer):
    """The observer of a call. Its two audiences may be set at any time."""

    def __init__(self) -> None:
        #: stock: called with whole percents, each rising; 100 only at the end
        self.progress_callback: Callable[[int], None] | None = None
        self.listener: RestoreListener | None = None
        self._plan: c.Plan | None = None
        self._progress = Progress(None)
        self._percent = -1
        self._announced: set[str] = set()

    def started(self, plan: c.Plan) -> None:
        """This plan is about to be carried out."""
        self._plan, self._progress, self._percent = plan, Progress(plan), -1
        self._announced.clear()
        self._tell(lambda listener: listener.started(plan))

    def progress(self, archive_bytes: int, image_bytes: int) -> None:
        """Percents rise; before the restore has begun there are none."""
        if self._plan is None:
            return
        self._progress.add(archive_bytes, image_bytes)
        self._tell(lambda listener: listener.progress(archive_bytes, image_bytes))
        if self._progress.fraction is not None:
            self._call_back(int(self._progress.fraction * 100))

    def log(self, level: str, text: str) -> None:
        """A line of the broker."""
        LOG.log(logging.WARNING if level == "warning" else logging.INFO, "%s", plain(text))

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        """The first volume of a qube is its beginning."""
        if qube not in self._announced:
            self._announced.add(qube)
            LOG.info("%s %s…", "Verifying" if self._mode == "verify" else "Restoring", plain(qube))
        self._tell(lambda listener: listener.volume_started(qube, volume, image_size))

    def qube_finished(self, report: QubeReport) -> None:
        """A line on the qube, and its warnings."""
        if report.outcome != "left out":
            found = outcome(report, self._mode)
            if found.succeeded:
                LOG.info("%s: %s", found.name, found.word)
            else:
                LOG.error("%s: %s. %s", found.name, found.word, found.explanation)
        for warning in report.warnings:
            LOG.warning("%s: %s", plain(report.name), plain(warning))
        self._tell(lambda listener: listener.qube_finished(report))

    def cancelling(self) -> None:
        """The person has cancelled."""
        restoring = self._plan is not None and self._mode != "verify"
        undone = ": the qube that is under way is removed, finished ones stay" if restoring else ""
        LOG.warning("Cancelling%s…", undone)
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
        LOG.exception("what shows the restore failed; the restore goes on")
