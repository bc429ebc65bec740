"""What the broker tells while it works, passed on: to the log, to the stock progress callback, to a listener.

Strategy: one observer of the call for all three. It is told things in a thread of the client, in their order,
and passes them on there. What an audience raises is logged and otherwise ignored: a display that fails is no
reason to lose a restore.
"""

import logging
import time
from collections.abc import Callable

from qubes_restore_svc.cli.displays import Rate
from qubes_restore_svc.cli.tables import duration_text
from qubes_restore_svc.errors import RestoreError, size_text
from qubes_restore_svc.manager.wording import outcome, plain, planned_name, translate
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.report import Observer, QubeReport, Report

#: The logger of the stock package; the dialog shows what is said there.
LOG = logging.getLogger("qubesadmin.backup")


#: What is shown at most while it still goes on.
_NEARLY = 0.99
#: Seconds that must have been measured before a rate is told.
_LEAST_MEASURED_S = 3.0


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
        self._progress = PlanProgress(None)
        self._percent = -1
        self._announced: set[str] = set()
        self._names: dict[str, str] = {}  # as they are shown

    def started(self, plan: c.Plan) -> None:
        """This plan is about to be carried out."""
        self._plan, self._progress, self._percent = plan, PlanProgress(plan), -1
        self._announced.clear()
        self._names = {qube.new_name: planned_name(qube) for qube in plan.taken}
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


# --- How far it is ---------------------------------------------------------------------------------


class PlanProgress:
    """How far a plan is, how fast it goes and how long it still takes; None: nothing is known of it.

    If the size of the archive is known, progress is measured in its bytes; otherwise in bytes of the images
    that are to come, of which some are only estimated. In either case the end is reached when the broker says
    so, and not before. `clock` counts seconds.
    """

    def __init__(self, plan: c.Plan | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._by_archive = plan is not None and bool(plan.archive_size)
        total = None if plan is None else plan.archive_size or _image_bytes(plan)
        self.total: int | None = total or None  #: bytes; None: not known
        self.done = 0  #: bytes
        self._clock = clock
        self._first: float | None = None  # when anything was added
        self._measured_s = 0.0
        self._rate = Rate(self.total)

    def add(self, archive_bytes: int, image_bytes: int) -> None:
        """So much is behind us; it never goes backwards."""
        self.done = max(self.done, archive_bytes if self._by_archive or not self.total else image_bytes)
        now = self._clock()
        self._first = now if self._first is None else self._first
        self._measured_s = now - self._first
        self._rate.add(now, self.done)

    @property
    def fraction(self) -> float | None:
        """0 to 0.99; None if it cannot be told."""
        return None if self.total is None else min(_NEARLY, self.done / self.total)

    @property
    def amount_text(self) -> str:
        """How much, and how fast: `1.2 GiB of 4.0 GiB, 80 MiB/s`."""
        parts = []
        if self.done and self.total is None:
            parts.append(size_text(self.done))
        elif self.done and self.total is not None:
            done, total = size_text(min(self.done, self.total)), size_text(self.total)
            parts.append(translate("Restore", "{done} of {total}").format(done=done, total=total))
        if self._measured_s >= _LEAST_MEASURED_S and self._rate.per_second > 0:
            parts.append(f"{size_text(int(self._rate.per_second))}/s")
        return ", ".join(parts)

    @property
    def left_text(self) -> str:
        """How long it still takes, as a guess: `about 4 min left`; empty while there is none."""
        left = self._rate.seconds_left
        if left is None:
            return ""
        if left < 10:
            return translate("Restore", "a few seconds left")
        return translate("Restore", "about {time} left").format(time=duration_text(_rounded(left)))


def _image_bytes(plan: c.Plan) -> int:
    """The size of all images that are to come; where the backup does not say, what they took on disk."""
    return sum(
        sum(volume.size or 0 for volume in qube.volumes)
        if all(volume.size is not None for volume in qube.volumes)
        else qube.backup_size
        for qube in plan.taken
    )


def _rounded(seconds: float) -> float:
    """A guess is not told to the second: a number that jumps says less than one that stands."""
    step = 5 if seconds < 60 else 30 if seconds < 600 else 60
    return max(step, round(seconds / step) * step)
