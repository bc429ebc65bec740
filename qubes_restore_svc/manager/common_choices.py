"""What the person chooses for all qubes of a restore: storage pool, settings that come back this time.

Strategy: as in `choice_table`. A setting that was offered once stays, so that it can be taken back. Fields
with nothing to choose from are hidden.
"""

from collections.abc import Iterable

from PyQt6.QtCore import Qt, pyqtSignal
from PyQt6.QtWidgets import (
    QCheckBox,
    QComboBox,
    QFormLayout,
    QFrame,
    QGroupBox,
    QScrollArea,
    QVBoxLayout,
    QWidget,
)

from qubes_restore_svc.manager import wording
from qubes_restore_svc.manager.wording import translate

_MOST_LINES = 3  #: of settings; more is scrolled to


class CommonChoices(QWidget):
    """The fields. `pool` and `allow` are what the person has chosen so far."""

    changed = pyqtSignal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._boxes: dict[str, QCheckBox] = {}
        self._pools = QComboBox()
        self._pools.activated.connect(lambda: self.changed.emit())
        self._settings = QScrollArea()
        self._settings.setFrameShape(QFrame.Shape.NoFrame)
        self._settings.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self._settings.setWidgetResizable(True)
        self._settings.setFocusPolicy(Qt.FocusPolicy.NoFocus)  # its boxes are reached instead
        self._heading = QGroupBox(translate("Restore", "Settings that come back this time"))
        inside = QVBoxLayout(self._heading)
        inside.addWidget(self._settings)
        inside.setContentsMargins(6, 2, 6, 2)
        self._layout = QFormLayout(self)
        self._layout.setContentsMargins(0, 0, 0, 0)
        self._layout.addRow(translate("Restore", "Storage pool:"), self._pools)
        self._layout.addRow(self._heading)

    def begin(self, pools: Iterable[str], pool: str | None, allow: Iterable[str]) -> None:
        """Offer these pools; `pool` and `allow` were chosen before."""
        self._pools.clear()
        self._pools.addItem(translate("Restore", "as dom0's configuration says"), None)
        for name in pools:
            self._pools.addItem(name, name)
        self._pools.setCurrentIndex(max(0, self._pools.findData(pool)))
        self._boxes.clear()
        self._settings.setWidget(_column())
        self._add(allow, chosen=True)

    def offer(self, settings: Iterable[str], *, verify: bool) -> None:
        """Settings that stay behind by the last plan, and need not."""
        self._add(settings, chosen=False)
        for box in list(self._boxes.values())[:1]:
            self._settings.setFixedHeight(min(len(self._boxes), _MOST_LINES) * box.sizeHint().height())
        can_choose = self._pools.count() > 1
        self._layout.setRowVisible(self._heading, bool(self._boxes))
        self._layout.setRowVisible(self._pools, can_choose)
        self.setVisible(not verify and (can_choose or bool(self._boxes)))

    @property
    def pool(self) -> str | None:
        """None: as dom0's configuration says."""
        pool: str | None = self._pools.currentData()
        return pool

    @property
    def allow(self) -> tuple[str, ...]:
        """Named as in `Choice.allow`."""
        return tuple(name for name, box in self._boxes.items() if box.isChecked())

    def _add(self, settings: Iterable[str], *, chosen: bool) -> None:
        column = self._settings.widget()
        layout = None if column is None else column.layout()
        for setting in settings:
            if setting not in self._boxes and layout is not None:
                box = QCheckBox(wording.plain(setting.replace(":", " ", 1)))  # as the table calls it
                box.setChecked(chosen)
                box.toggled.connect(lambda: self.changed.emit())
                layout.addWidget(box)
                self._boxes[setting] = box


def _column() -> QWidget:
    column = QWidget()
    layout = QVBoxLayout(column)
    layout.setContentsMargins(0, 0, 0, 0)
    layout.setSpacing(0)
    return column
