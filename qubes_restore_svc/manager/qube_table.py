"""The qubes of a restore with what has become of each: waiting, under way, restored, or not and why.

Strategy: one row a qube from the beginning, so that the person sees what is still to come and where it
stands, and the same table is the result at the end. All cells are plain text.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from PyQt6.QtCore import QEvent, QModelIndex, QSize, Qt
from PyQt6.QtGui import QColor, QPainter, QPalette, QResizeEvent
from PyQt6.QtWidgets import (
    QAbstractItemView,
    QHeaderView,
    QStyle,
    QStyledItemDelegate,
    QStyleOptionViewItem,
    QTableWidget,
    QTableWidgetItem,
    QWidget,
)

from qubes_restore_svc.manager.wording import Outcome, planned_name, translate, volume_text
from qubes_restore_svc.wire import restore_call as c


class _Tone(enum.Enum):
    QUIET = enum.auto()
    PLAIN = enum.auto()
    GOOD = enum.auto()
    BAD = enum.auto()


class TextTable(QTableWidget):
    """A table to be read: rows of plain text as high as they need, and the last column takes what is left."""

    def __init__(self, headings: Sequence[str], name: str, parent: QWidget | None = None) -> None:
        super().__init__(0, len(headings), parent)
        self.setHorizontalHeaderLabels(headings)
        self.setAccessibleName(name)
        self.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.setSelectionMode(QAbstractItemView.SelectionMode.NoSelection)
        self.setFocusPolicy(Qt.FocusPolicy.TabFocus)
        self.setTabKeyNavigation(False)  # Tab leaves it
        self.setVerticalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setShowGrid(False)
        self.setAlternatingRowColors(True)
        self.setWordWrap(True)
        self.setItemDelegate(_Roomy(self))
        if (rows := self.verticalHeader()) is not None:
            rows.hide()
            rows.setSectionResizeMode(QHeaderView.ResizeMode.ResizeToContents)
        if (columns := self.horizontalHeader()) is not None:
            columns.setDefaultAlignment(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter)
            columns.setHighlightSections(False)
            for column in range(len(headings) - 1):
                columns.setSectionResizeMode(column, QHeaderView.ResizeMode.ResizeToContents)
            columns.setSectionResizeMode(len(headings) - 1, QHeaderView.ResizeMode.Stretch)

    def as_text(self) -> str:
        """All of it, a line for a qube."""
        lines = []
        for row in range(self.rowCount()):
            items = (self.item(row, column) for column in range(self.columnCount()))
            lines.append("\t".join(item.text() for item in items if item is not None and item.text()))
        return "\n".join(lines)

    def sizeHint(self) -> QSize:
        """Room for some rows; more is scrolled to."""
        return QSize(560, 180)

    def resizeEvent(self, event: QResizeEvent | None) -> None:
        """Text that wraps elsewhere needs other heights."""
        super().resizeEvent(event)
        self.resizeRowsToContents()

    def add_row(self) -> int:
        """A row of empty cells at the end; brings its number."""
        row = self.rowCount()
        self.insertRow(row)
        for column in range(self.columnCount()):
            self.setItem(row, column, _cell())
        return row

    def set_text(self, row: int, column: int, text: str) -> None:
        """What stands in a cell."""
        item = self.item(row, column)
        if item is not None and item.text() != text:
            item.setText(text)


class QubeTable(TextTable):
    """The table. `begin` fills it; a row is known by the name that the qube gets."""

    def __init__(self, parent: QWidget | None = None) -> None:
        headings = (
            translate("Restore", "Qube"),
            translate("Restore", "State"),
            translate("Restore", "What happened, and what to do"),
        )
        super().__init__(headings, translate("Restore", "Qubes of this restore"), parent)
        self._tones: dict[int, _Tone] = {}
        self._rows: dict[str, int] = {}
        self._settled: set[int] = set()

    def begin(self, plan: c.Plan) -> None:
        """All qubes that will be restored or verified, waiting."""
        self.setRowCount(0)
        self._rows.clear()
        self._tones.clear()
        self._settled.clear()
        for qube in plan.taken:
            waiting = translate("Restore", "waiting")
            self._set(self._row(qube.new_name), planned_name(qube), waiting, "", _Tone.QUIET)

    def set_running(self, qube: str, volume: str) -> None:
        """It is this qube's turn. It comes into view when it begins, and then the person may scroll."""
        row = self._row(qube)
        if self._tones[row] is not _Tone.PLAIN and (item := self.item(row, 0)) is not None:
            self.scrollToItem(item)
        self._set(row, None, translate("Restore", "▸ in progress"), volume_text(volume), _Tone.PLAIN)

    def set_undoing(self) -> None:
        """What is under way is being undone, and what waits will not come."""
        for row in range(self.rowCount()):
            if self._tones[row] is _Tone.PLAIN:
                self._set(row, None, translate("Restore", "▸ stopping"), "", _Tone.PLAIN)
            elif row not in self._settled:
                self._set(row, None, translate("Restore", "– not begun"), "", _Tone.QUIET)

    def set_outcome(self, qube: str, outcome: Outcome) -> None:
        """What came of it. `qube`: the name that it got, `outcome.name` the one to show."""
        mark, tone = ("✓", _Tone.GOOD) if outcome.succeeded else ("✗", _Tone.BAD)
        if outcome.cancelled:
            mark, tone = "–", _Tone.QUIET
        row = self._row(qube)
        self._settled.add(row)
        self._set(row, outcome.name, f"{mark} {outcome.word}", outcome.explanation, tone)

    def set_rest(self, word: str, explanation: str, *, failed: bool = True) -> None:
        """The same for all qubes without a result. Not `failed`: nothing is wrong with them."""
        mark, tone = ("✗", _Tone.BAD) if failed else ("–", _Tone.QUIET)
        for row in range(self.rowCount()):
            if row not in self._settled:
                self._set(row, None, f"{mark} {word}", explanation, tone)

    def show_first_failure(self) -> None:
        """Scroll to it."""
        for row in range(self.rowCount()):
            if self._tones[row] is _Tone.BAD and (item := self.item(row, 0)) is not None:
                self.scrollToItem(item, QAbstractItemView.ScrollHint.PositionAtTop)
                return

    def changeEvent(self, event: QEvent | None) -> None:
        """Another palette has other colours."""
        super().changeEvent(event)
        if event is not None and event.type() in (QEvent.Type.PaletteChange, QEvent.Type.StyleChange):
            for row, tone in self._tones.items():
                self._paint(row, tone)

    def _row(self, qube: str) -> int:
        """The qube's row; one is added for a qube that the plan did not hold."""
        if qube not in self._rows:
            self._rows[qube] = self.add_row()
            self._set(self._rows[qube], qube, "", "", _Tone.QUIET)
        return self._rows[qube]

    def _set(self, row: int, name: str | None, state: str, text: str, tone: _Tone) -> None:
        for column, cell in enumerate((name, state, text)):
            if cell is not None:
                self.set_text(row, column, cell)
        self._tones[row] = tone
        self._paint(row, tone)

    def _paint(self, row: int, tone: _Tone) -> None:
        colours = text_colours(self.palette())
        item = self.item(row, 1)
        if item is not None:
            item.setForeground(
                {
                    _Tone.QUIET: colours.quiet,
                    _Tone.PLAIN: self.palette().text().color(),
                    _Tone.GOOD: colours.good,
                    _Tone.BAD: colours.bad,
                }[tone]
            )


class _Roomy(QStyledItemDelegate):
    """Cells with air around their text, and without the marks of a selection, which there is none."""

    _BESIDE, _ABOVE = 12, 4  # pixels; on the left, texts stand below their heading

    def paint(self, painter: QPainter | None, option: QStyleOptionViewItem, index: QModelIndex) -> None:
        inner = self._inner(option)
        marks = QStyle.StateFlag.State_HasFocus | QStyle.StateFlag.State_MouseOver
        inner.state &= ~(marks | QStyle.StateFlag.State_Selected)
        super().paint(painter, inner, index)

    def sizeHint(self, option: QStyleOptionViewItem, index: QModelIndex) -> QSize:
        size = super().sizeHint(self._inner(option), index)
        return QSize(size.width() + self._BESIDE, size.height() + 2 * self._ABOVE)

    def _inner(self, option: QStyleOptionViewItem) -> QStyleOptionViewItem:
        inner = QStyleOptionViewItem(option)
        inner.rect = option.rect.adjusted(0, self._ABOVE, -self._BESIDE, -self._ABOVE)
        return inner


def _cell() -> QTableWidgetItem:
    item = QTableWidgetItem()
    item.setTextAlignment(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignTop)
    item.setFlags(Qt.ItemFlag.ItemIsEnabled | Qt.ItemFlag.ItemIsSelectable)
    return item


# --- Colours ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextColours:
    """Colours of text on the background of windows and lists, light or dark.

    Each has a contrast of at least 4.5 to 1 (WCAG 2.1, 1.4.3) to that background in the usual palettes. A
    colour never says anything alone.
    """

    good: QColor
    bad: QColor
    quiet: QColor


def text_colours(palette: QPalette) -> TextColours:
    """The colours for this palette."""
    if palette.color(QPalette.ColorRole.Base).lightness() < 128:
        return TextColours(good=QColor("#7bd88f"), bad=QColor("#ff9d94"), quiet=QColor("#b4b8be"))
    return TextColours(good=QColor("#14692c"), bad=QColor("#a81d14"), quiet=QColor("#55595f"))
