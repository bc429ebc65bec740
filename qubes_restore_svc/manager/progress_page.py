"""The page that shows a restore while it runs, and its result at the end.

Strategy: a widget of its own, which needs neither the wizard nor Qubes Manager. It is fed by the signals of a
`ProgressFeed`, which may be told things in any thread: Qt queues the signals to the thread of the page. The
page keeps no state but what it shows. All texts are plain text.
"""

import enum
import time

from PyQt6.QtCore import QEvent, QObject, Qt, QTimer, pyqtSignal
from PyQt6.QtGui import QFont, QGuiApplication, QPalette
from PyQt6.QtWidgets import QHBoxLayout, QLabel, QProgressBar, QPushButton, QSizePolicy, QVBoxLayout, QWidget

from qubes_restore_svc.cli.displays import A_MOMENT_S, rounded
from qubes_restore_svc.cli.tables import duration_text
from qubes_restore_svc.errors import Cancelled, RestoreError, size_text
from qubes_restore_svc.manager import wording
from qubes_restore_svc.manager.call import RestoreListener
from qubes_restore_svc.manager.qube_table import QubeTable, text_colours
from qubes_restore_svc.manager.wording import translate
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.report import QubeReport, Report, RestoreProgress

_STEPS = 100  # of the bar


class ProgressFeed(QObject, RestoreListener):
    """Turns what it is told into signals, from whatever thread it is told."""

    begun = pyqtSignal(object)
    moved = pyqtSignal(object)
    volume_begun = pyqtSignal(str, str)
    qube_through = pyqtSignal(object)
    undoing = pyqtSignal()
    over = pyqtSignal(object, object)

    def started(self, plan: c.Plan) -> None:
        """Emits `begun`."""
        self.begun.emit(plan)

    def progress(self, progress: RestoreProgress) -> None:
        """Emits `moved`."""
        self.moved.emit(progress)

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        """Emits `volume_begun`."""
        self.volume_begun.emit(qube, volume)

    def qube_finished(self, report: QubeReport) -> None:
        """Emits `qube_through`."""
        self.qube_through.emit(report)

    def cancelling(self) -> None:
        """Emits `undoing`."""
        self.undoing.emit()

    def ended(self, report: Report | None, error: RestoreError | None) -> None:
        """Emits `over`."""
        self.over.emit(report, error)


class _State(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    CANCELLING = enum.auto()
    OVER = enum.auto()


class ProgressPage(QWidget):
    """Shows what its `feed` is told. `finished` is emitted when the result stands."""

    finished = pyqtSignal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.feed = ProgressFeed(self)
        self._state = _State.WAITING
        self._succeeded = self._cancelled = self._any_done = False
        self._was_asked_to = False  # cancel
        self._mode = "restore"
        self._archive_size: int | None = None
        self._time_left = ""
        self._began = time.monotonic()
        self._set_up()
        self._clock = QTimer(self)
        self._clock.setInterval(1000)
        self._clock.timeout.connect(self._show_elapsed)
        self.feed.begun.connect(self._on_begun)
        self.feed.moved.connect(self._on_moved)
        self.feed.volume_begun.connect(self._on_volume)
        self.feed.qube_through.connect(self._on_qube)
        self.feed.undoing.connect(self._on_cancelling)
        self.feed.over.connect(self._on_over)

    @property
    def is_over(self) -> bool:
        """Does the result stand?"""
        return self._state is _State.OVER

    # --- What is told ---

    def _on_begun(self, plan: c.Plan) -> None:
        self._mode, self._archive_size, self._began = plan.mode, plan.archive_size, time.monotonic()
        self.table.begin(plan)
        if self._state is _State.CANCELLING:  # the person was faster
            self._show_cancelling()
            return
        count = len(plan.taken)
        if plan.mode == "verify":
            one, more = translate("Restore", "Verifying a qube"), translate("Restore", "Verifying {n} qubes")
        else:
            one, more = translate("Restore", "Restoring a qube"), translate("Restore", "Restoring {n} qubes")
        self.headline.setText(one if count == 1 else more.format(n=count))
        self.doing.setText(translate("Restore", "Starting…"))
        self.bar.setRange(0, 0)  # until it is known how far it is
        self._state = _State.RUNNING
        self._clock.start()
        self._show_elapsed()

    def _on_moved(self, progress: RestoreProgress) -> None:
        if self._state is not _State.RUNNING:
            return
        if progress.percent is not None:
            self.bar.setRange(0, _STEPS)
            self.bar.setValue(progress.percent)
        self.amount.setText(_amount_text(progress, self._archive_size))
        self._time_left = _left_text(progress)
        self._show_elapsed()

    def _on_volume(self, qube: str, volume: str) -> None:
        if self._state is _State.RUNNING:
            now = translate("Restore", "Now: {qube}, {volume}")
            self.doing.setText(now.format(qube=qube, volume=wording.volume_text(volume)))
            self.table.set_running(qube, volume)

    def _on_qube(self, result: QubeReport) -> None:
        self._any_done = self._any_done or result.succeeded
        if result.outcome != "left out":
            self.table.set_outcome(result.name, wording.outcome(result, self._mode))

    def _on_cancelling(self) -> None:
        if self._state in (_State.CANCELLING, _State.OVER):
            return
        self._state = _State.CANCELLING
        self._show_cancelling()

    def _show_cancelling(self) -> None:
        self.headline.setText(translate("Restore", "Cancelling…"))
        self.doing.setText(
            translate("Restore", "The verification is being stopped.")
            if self._mode == "verify"
            else translate(
                "Restore", "The qube that was under way is being removed. Qubes that are complete stay."
            )
        )
        self.amount.setText("")
        self.left.setText("")
        self.table.set_undoing()
        self.bar.setRange(0, 0)  # how long the undoing takes is not known

    def _on_over(self, report: Report | None, error: RestoreError | None) -> None:
        self._was_asked_to = self._state is _State.CANCELLING
        self._state = _State.OVER
        self._clock.stop()
        if report is not None:
            self._show_report(report)
        elif error is not None:
            self._show_error(error)
        self.amount.hide()
        self.left.hide()
        self._set_bar_at_the_end()
        self._paint_headline()
        self.copy_button.setVisible(self.table.rowCount() > 0)
        self.table.show_first_failure()
        self.finished.emit()

    # --- The end ---

    def _show_report(self, report: Report) -> None:
        cancelled = self._cancelled = wording.is_cancelled(report)
        for result in report.qubes:
            self._on_qube(result)
        found = wording.outcomes(report)
        self._succeeded = not cancelled and report.status == 0 and all(one.succeeded for one in found)
        summary = wording.headline(report.mode, found)
        told = translate("Restore", "Cancelled. {summary}").format(summary=summary)
        self.headline.setText(told if cancelled else summary)
        if report.error is not None and not cancelled:
            self.doing.setText(wording.error_text(report.error.to_error()))
        elif cancelled:
            removed = translate("Restore", "What was not complete has been removed again.")
            undone = removed if report.mode == "restore" else ""
            self._show_why(None if report.error is None else report.error.to_error(), undone)
        elif self._succeeded:
            elapsed = translate("Restore", "It took {time}.").format(
                time=duration_text(time.monotonic() - self._began)
            )
            self.doing.setText(" ".join(part for part in (wording.what_next(report), elapsed) if part))
        else:
            self.doing.setText(
                translate("Restore", "The table says what is wrong with the others, and what to do.")
            )
        self.table.set_rest(wording.outcome_word("failed", report.mode), "")

    def _show_error(self, error: RestoreError) -> None:
        nothing = wording.headline(self._mode, ())
        if isinstance(error, Cancelled):
            self._cancelled = True
            self.headline.setText(translate("Restore", "Cancelled"))
            self._show_why(error, "" if self._any_done else f"{nothing}.")
            self.table.set_rest(translate("Restore", "not begun"), "", failed=False)
            return
        broken_off = (
            translate("Restore", "The verification did not finish")
            if self._mode == "verify"
            else translate("Restore", "The restore did not finish")
        )
        self.headline.setText(broken_off if self.table.rowCount() else nothing)
        self.doing.setText(wording.error_text(error))
        self.table.set_rest(
            translate("Restore", "not known"),
            translate("Restore", "What came of it stands in dom0's report."),
        )

    def _show_why(self, error: RestoreError | None, text: str) -> None:
        """`text`, and before it why it was cancelled, if it was not the person here who did it."""
        why = "" if error is None or self._was_asked_to else wording.error_text(error)
        self.doing.setText(" ".join(part for part in (why, text) if part))

    def _set_bar_at_the_end(self) -> None:
        self.bar.setRange(0, _STEPS)
        if self._succeeded:
            self.bar.setValue(_STEPS)
        else:
            self.bar.hide()  # a bar that has stopped somewhere says nothing

    # --- The look ---

    def _set_up(self) -> None:
        self.headline = _label(larger=True)
        self.headline.setText(translate("Restore", "Starting…"))
        self.doing = _label()
        self.bar = QProgressBar()
        self.bar.setRange(0, 0)
        self.bar.setTextVisible(True)
        self.bar.setFormat("%p %")
        self.bar.setAccessibleName(translate("Restore", "Progress of the restore"))
        self.amount = _label()
        self.left = _label()
        self.left.setAlignment(Qt.AlignmentFlag.AlignRight)
        self.table = QubeTable()
        self.copy_button = QPushButton(translate("Restore", "&Copy as text"))
        self.copy_button.clicked.connect(self._copy)
        self.copy_button.hide()
        figures = QHBoxLayout()
        figures.addWidget(self.amount, 1)
        figures.addWidget(self.left, 1)
        bottom = QHBoxLayout()
        bottom.addStretch(1)
        bottom.addWidget(self.copy_button)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.headline)
        layout.addWidget(self.doing)
        layout.addSpacing(4)
        layout.addWidget(self.bar)
        layout.addLayout(figures)
        layout.addSpacing(8)
        layout.addWidget(self.table, 1)
        layout.addLayout(bottom)

    def changeEvent(self, event: QEvent | None) -> None:
        """Another palette has other colours."""
        super().changeEvent(event)
        if event is not None and event.type() is QEvent.Type.PaletteChange and hasattr(self, "headline"):
            self._paint_headline()

    def _paint_headline(self) -> None:
        palette = QPalette(self.palette())
        if self._state is _State.OVER and not self._cancelled:
            colours = text_colours(self.palette())
            colour = colours.good if self._succeeded else colours.bad
            palette.setColor(QPalette.ColorRole.WindowText, colour)
        self.headline.setPalette(palette)

    def _show_elapsed(self) -> None:
        if self._state is _State.RUNNING:
            elapsed = translate("Restore", "{time} so far").format(
                time=duration_text(time.monotonic() - self._began)
            )
            parts = [elapsed, self._time_left]
            self.left.setText(", ".join(part for part in parts if part))

    def _copy(self) -> None:
        clipboard = QGuiApplication.clipboard()
        if clipboard is not None:
            clipboard.setText("\n".join((self.headline.text(), self.doing.text(), self.table.as_text())))


def _amount_text(progress: RestoreProgress, archive_size: int | None) -> str:
    """How much, and how fast: `1.2 GiB of 4.0 GiB, 80 MiB/s`."""
    text = size_text(progress.archive_bytes)
    if archive_size:
        of = translate("Restore", "{done} of {total}")
        text = of.format(done=text, total=size_text(archive_size))
    return f"{text}, {size_text(progress.per_second)}/s" if progress.per_second else text


def _left_text(progress: RestoreProgress) -> str:
    """How long it still takes, as a guess: `about 4 min left`; empty while there is none."""
    if progress.seconds_left is None:
        return ""
    if progress.seconds_left < A_MOMENT_S:
        return translate("Restore", "a few seconds left")
    time_left = duration_text(rounded(progress.seconds_left))
    return translate("Restore", "about {time} left").format(time=time_left)


def _label(*, larger: bool = False) -> QLabel:
    label = QLabel()
    label.setTextFormat(Qt.TextFormat.PlainText)
    label.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
    label.setWordWrap(True)
    label.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Minimum)
    if larger:
        font = QFont(label.font())
        font.setBold(True)
        font.setPointSizeF(font.pointSizeF() * 1.25)
        label.setFont(font)
    return label
