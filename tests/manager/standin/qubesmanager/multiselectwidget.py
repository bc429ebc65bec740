"""Two lists beside each other, and buttons that move qubes between them."""

from PyQt6 import QtCore, QtWidgets


class MultiSelectWidget(QtWidgets.QWidget):
    """What is available, and what is selected."""

    selectedChanged = QtCore.pyqtSignal()

    def __init__(self, parent: QtWidgets.QWidget | None = None) -> None:
        super().__init__(parent)
        self.available_list, self.selected_list = QtWidgets.QListWidget(), QtWidgets.QListWidget()
        self.add_selected_button, self.add_all_button = QtWidgets.QPushButton(), QtWidgets.QPushButton()
        self.remove_selected_button = QtWidgets.QPushButton()
        layout = QtWidgets.QHBoxLayout(self)
        for part in (
            self.available_list, self.add_all_button, self.add_selected_button, self.remove_selected_button,
            self.selected_list,
        ):  # fmt: skip
            layout.addWidget(part)
        for a_list in (self.available_list, self.selected_list):
            a_list.setSelectionMode(QtWidgets.QAbstractItemView.SelectionMode.ExtendedSelection)
        there, here = self.available_list, self.selected_list
        self.add_selected_button.clicked.connect(lambda: self._move(there, here, there.selectedItems()))
        self.remove_selected_button.clicked.connect(lambda: self._move(here, there, here.selectedItems()))
        self.add_all_button.clicked.connect(
            lambda: self._move(there, here, there.findItems("*", QtCore.Qt.MatchFlag.MatchWildcard))
        )

    def clear(self) -> None:
        self.available_list.clear()
        self.selected_list.clear()

    def _move(
        self,
        source: QtWidgets.QListWidget,
        target: QtWidgets.QListWidget,
        items: list[QtWidgets.QListWidgetItem],
    ) -> None:
        for item in items:
            target.addItem(source.takeItem(source.row(item)))
        target.sortItems()
        self.selectedChanged.emit()
