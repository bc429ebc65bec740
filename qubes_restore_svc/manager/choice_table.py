"""What will become of each selected qube, and what the person chooses where the backup does not fit.

Strategy: a row for a qube, with fields only where there is something to choose: a name that is taken, a
template or a net qube that is not here. What is chosen decides nothing: `changed` is emitted, whoever has the
table asks dom0 for another plan, and shows that. Fields stay while it is asked, so that one can go on typing.
"""

from collections.abc import Mapping

from PyQt6.QtCore import QRegularExpression, pyqtSignal
from PyQt6.QtGui import QRegularExpressionValidator
from PyQt6.QtWidgets import QComboBox, QLineEdit, QWidget

from qubes_restore_svc.manager import wording
from qubes_restore_svc.manager.entries import VMToRestore
from qubes_restore_svc.manager.qube_table import TextTable, text_colours
from qubes_restore_svc.manager.wording import translate
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.names import QUBE_NAME, is_qube_name

_NAME_LETTERS = 16  #: of a name that can be seen while it is typed
_QUBE, _NAME, _TEMPLATE, _NETVM, _WHAT = range(5)


class ChoiceTable(TextTable):
    """The table. Problems come first. `choices` is what the person has chosen so far."""

    changed = pyqtSignal()

    def __init__(self, parent: QWidget | None = None) -> None:
        headings = (
            translate("Restore", "Qube"),
            translate("Restore", "Name here"),
            translate("Restore", "Template"),
            translate("Restore", "Net qube"),
            translate("Restore", "What will be done"),
        )
        super().__init__(headings, translate("Restore", "What will be restored"), parent)
        self._names: tuple[str, ...] = ()

    def begin(self, info: Mapping[str, VMToRestore]) -> None:
        """Other rows: these qubes; those that do not fit come first."""
        self.setRowCount(0)
        self._names = tuple(sorted(info, key=lambda name: info[name].good_to_go))
        for _ in self._names:
            self.add_row()

    def show_plan(self, info: Mapping[str, VMToRestore], offers: c.Offers, *, verify: bool) -> None:
        """What will become of the qubes of the rows by the last plan."""
        for row, name in enumerate(self._names):
            planned = info[name].planned
            taken = planned.decision == "take"
            self.set_text(row, _QUBE, wording.plain(name))
            if (item := self.item(row, _QUBE)) is not None:
                item.setToolTip(wording.qube_text(planned))
            renamed = planned.new_name != name
            if renamed or "new-name" in planned.settled_by or self._field(row, _NAME):
                self._offer_name(row, planned.new_name if renamed else "")
            else:
                self.set_text(row, _NAME, wording.plain(name))
            template = planned.new_template if taken else planned.template
            if (
                template != planned.template
                or "template" in planned.settled_by
                or self._field(row, _TEMPLATE)
            ):
                is_disposable = planned.klass == "DispVM"
                names = offers.disposable_templates if is_disposable else offers.templates
                self._offer(row, _TEMPLATE, [(one, one) for one in names], template if taken else None)
            else:
                self.set_text(row, _TEMPLATE, template or "–")
            if "netvm" in planned.settled_by or self._field(row, _NETVM):
                nothing = (translate("Restore", "(no network)"), "")
                self._offer(row, _NETVM, [nothing, *((one, one) for one in offers.netvms)], None)
            else:
                self.set_text(row, _NETVM, _netvm_text(planned))
            self.set_text(row, _WHAT, _what(planned, verify=verify))
            if (item := self.item(row, _WHAT)) is not None:
                colour = self.palette().text().color() if taken else text_colours(self.palette()).bad
                item.setForeground(colour)
        self.resizeRowsToContents()

    @property
    def choices(self) -> dict[str, c.QubeChoice]:
        """By the names in the backup; only of qubes for which something was chosen."""
        found = {}
        for row, name in enumerate(self._names):
            new_name, template, netvm = (self._chosen(row, column) for column in (_NAME, _TEMPLATE, _NETVM))
            new_name = new_name if new_name is not None and is_qube_name(new_name) else None
            choice = c.QubeChoice(name=name, new_name=new_name, template=template, netvm=netvm)
            if choice != c.QubeChoice(name=name):
                found[name] = choice
        return found

    @property
    def reserved_names(self) -> list[str]:
        """Names that were typed, and that no qube can have."""
        names = [self._chosen(row, _NAME) for row in range(self.rowCount())]
        return [name for name in names if name is not None and not is_qube_name(name)]

    def _chosen(self, row: int, column: int) -> str | None:
        field = self._field(row, column)
        if isinstance(field, QLineEdit):
            return field.text() or None if field.isModified() else None
        return str(field.currentData()) if isinstance(field, QComboBox) and field.currentIndex() > 0 else None

    def _field(self, row: int, column: int) -> QWidget | None:
        return self.cellWidget(row, column)

    def _offer_name(self, row: int, name: str) -> None:
        edit = self._field(row, _NAME)
        if not isinstance(edit, QLineEdit):
            edit = QLineEdit()
            edit.setMinimumWidth(_NAME_LETTERS * self.fontMetrics().averageCharWidth())
            edit.setValidator(QRegularExpressionValidator(QRegularExpression(QUBE_NAME), edit))
            edit.setPlaceholderText(translate("Restore", "new name"))
            edit.textEdited.connect(lambda: self.changed.emit())
            self._put(row, _NAME, edit)
        if not edit.isModified():
            edit.setText(name)

    def _offer(self, row: int, column: int, names: list[tuple[str, str]], chosen: str | None) -> None:
        if self._field(row, column) is not None:
            return
        box = QComboBox()
        box.addItem(chosen or translate("Restore", "choose…"), None)
        for shown, name in names:
            box.addItem(shown, name)
        box.activated.connect(lambda: self.changed.emit())
        self._put(row, column, box)

    def _put(self, row: int, column: int, field: QWidget) -> None:
        heading = self.horizontalHeaderItem(column)
        field.setAccessibleName(f"{self._names[row]}: {heading.text() if heading is not None else ''}")
        self.set_text(row, column, "")
        self.setCellWidget(row, column, field)


def _netvm_text(planned: c.PlanQube) -> str:
    if planned.klass == "AdminVM":
        return "–"
    netvm = planned.new_netvm if planned.decision == "take" else planned.netvm
    if netvm is None:
        return translate("Restore", "(default)")
    return netvm or translate("Restore", "(no network)")


def _what(planned: c.PlanQube, *, verify: bool) -> str:
    if planned.decision != "take":
        return wording.problem_text(planned)
    done = translate("Restore", "Verified.") if verify else translate("Restore", "Restored.")
    behind = "" if verify else wording.left_behind_text(planned.settings_left_out)
    notes = (wording.sentence(note) for note in planned.notes)
    return wording.plain(" ".join(part for part in (done, *notes, behind) if part))
