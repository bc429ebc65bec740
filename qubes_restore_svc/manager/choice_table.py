"""What will become of each selected qube, and what the person chooses where the backup does not fit.

Strategy: a row for a qube, with fields only where there is something to choose: a name that is taken, a
template or a net qube that is not here. What is chosen decides nothing: `changed` is emitted, whoever has the
table asks dom0 for another plan, and shows that. A field stays from plan to plan: one can go on typing.
"""

from collections.abc import Mapping, Sequence

from PyQt6.QtCore import QRegularExpression, pyqtSignal
from PyQt6.QtGui import QPalette, QRegularExpressionValidator
from PyQt6.QtWidgets import QComboBox, QHeaderView, QLineEdit, QVBoxLayout, QWidget

from qubes_restore_svc.manager import wording
from qubes_restore_svc.manager.entries import VMToRestore
from qubes_restore_svc.manager.qube_table import TextTable, text_colours
from qubes_restore_svc.manager.wording import translate
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.names import QUBE_NAME, is_qube_name

_LETTERS = 20  #: of a field that can be seen at least
_QUBE, _CHOOSE, _WHAT = range(3)


class ChoiceTable(TextTable):
    """The table. Problems come first. `choices` is what the person has chosen so far."""

    changed = pyqtSignal()

    def __init__(self, parent: QWidget | None = None) -> None:
        headings = (
            translate("Restore", "Qube"),
            translate("Restore", "Your choice"),
            translate("Restore", "What will be done"),
        )
        super().__init__(headings, translate("Restore", "What will be restored"), parent)
        self._fields: dict[str, _Fields] = {}
        self._heading_width = 0
        if (columns := self.horizontalHeader()) is not None:  # what is in a cell does not count for it
            self._heading_width = columns.sectionSizeHint(_CHOOSE)
            columns.setSectionResizeMode(_CHOOSE, QHeaderView.ResizeMode.Fixed)

    def begin(self, info: Mapping[str, VMToRestore], chosen: Mapping[str, c.QubeChoice]) -> None:
        """Other rows: these qubes; those that do not fit come first. `chosen`: what was chosen before."""
        self.setRowCount(0)
        self._fields.clear()
        for name in sorted(info, key=lambda name: info[name].good_to_go):
            self._fields[name] = fields = _Fields(chosen.get(name) or c.QubeChoice(name=name))
            fields.changed.connect(self.changed)
            self.setCellWidget(self.add_row(), _CHOOSE, fields)

    def show_plan(self, info: Mapping[str, VMToRestore], offers: c.Offers, *, verify: bool) -> None:
        """What will become of the qubes of the rows by the last plan."""
        colours = self.palette().text().color(), text_colours(self.palette()).bad
        for row, (name, fields) in enumerate(self._fields.items()):
            planned = info[name].planned
            fields.offer(planned, offers)
            self.set_text(row, _QUBE, wording.plain(name))
            self.set_text(row, _WHAT, _what(planned, verify=verify))
            if (item := self.item(row, _QUBE)) is not None:
                item.setToolTip(wording.qube_text(planned))
            if (item := self.item(row, _WHAT)) is not None:
                item.setForeground(colours[planned.decision != "take"])
        self.setColumnHidden(_CHOOSE, all(fields.is_empty for fields in self._fields.values()))
        widths = (fields.sizeHint().width() for fields in self._fields.values())
        self.setColumnWidth(_CHOOSE, max(self._heading_width, *widths, 0))
        self.resizeRowsToContents()

    @property
    def choices(self) -> dict[str, c.QubeChoice]:
        """By the names in the backup; only of qubes for which something was chosen."""
        found = {name: fields.choice for name, fields in self._fields.items()}
        return {name: choice for name, choice in found.items() if choice != c.QubeChoice(name=name)}

    @property
    def reserved_names(self) -> list[str]:
        """Names that were typed, and that no qube can have."""
        names = (fields.typed for fields in self._fields.values())
        return [name for name in names if name and not is_qube_name(name)]


class _Fields(QWidget):
    """What can be chosen for one qube, beginning with what was. A field that was there once stays."""

    changed = pyqtSignal()

    def __init__(self, chosen: c.QubeChoice) -> None:
        super().__init__()
        self._qube = chosen.name
        self._chosen = chosen
        self._name: QLineEdit | None = None
        self._template: QComboBox | None = None
        self._netvm: QComboBox | None = None
        self._layout = QVBoxLayout(self)
        self._layout.setContentsMargins(0, 2, 8, 2)
        self._layout.addStretch(1)

    @property
    def is_empty(self) -> bool:
        return self._name is None and self._template is None and self._netvm is None

    @property
    def typed(self) -> str:
        """The name that was typed; empty: none."""
        return self._name.text() if self._name is not None and self._name.isModified() else ""

    @property
    def choice(self) -> c.QubeChoice:
        return c.QubeChoice(
            name=self._qube,
            new_name=self.typed if is_qube_name(self.typed) else None,
            template=None if self._template is None else self._template.currentData(),
            netvm=None if self._netvm is None else self._netvm.currentData(),
        )

    def offer(self, planned: c.PlanQube, offers: c.Offers) -> None:
        """Fields for what does not fit as it is in the backup, or was changed."""
        taken, settled_by = planned.decision == "take", planned.settled_by
        renamed = planned.new_name != planned.name
        chosen = self._chosen
        if self._name is None and (renamed or "new-name" in settled_by):
            self._name = self._add_name(chosen.new_name)
        if self._name is not None and not self._name.isModified():
            self._name.setText(planned.new_name if renamed else "")
        changed = taken and planned.new_template != planned.template
        if self._template is None and (changed or "template" in settled_by):
            names = offers.disposable_templates if planned.klass == "DispVM" else offers.templates
            first = planned.new_template if changed and chosen.template is None else None
            first = first or translate("Restore", "choose a template…")
            self._template = self._add_box(first, [(name, name) for name in names], chosen.template)
        if self._netvm is None and (chosen.netvm is not None or "netvm" in settled_by):
            names = offers.netvms
            nothing = (translate("Restore", "(no network)"), "")
            first = translate("Restore", "choose a net qube…")
            self._netvm = self._add_box(first, [nothing, *((name, name) for name in names)], chosen.netvm)

    def _add(self, field: QWidget) -> None:
        # On the background of a list, a field cannot be seen in a dark theme.
        self.setBackgroundRole(QPalette.ColorRole.Window)
        self.setAutoFillBackground(True)
        field.setMinimumWidth(_LETTERS * self.fontMetrics().averageCharWidth())
        self._layout.insertWidget(self._layout.count() - 1, field)
        field.show()  # until then it has no size

    def _add_name(self, chosen: str | None) -> QLineEdit:
        edit = QLineEdit(chosen)
        edit.setModified(chosen is not None)
        edit.setValidator(QRegularExpressionValidator(QRegularExpression(QUBE_NAME), edit))
        edit.setPlaceholderText(translate("Restore", "new name"))
        edit.setAccessibleName(translate("Restore", "New name of {qube}").format(qube=self._qube))
        edit.textEdited.connect(lambda: self.changed.emit())
        self._add(edit)
        return edit

    def _add_box(self, first: str, names: Sequence[tuple[str, str]], chosen: str | None) -> QComboBox:
        box = QComboBox()
        box.setAccessibleName(f"{self._qube}: {first}")
        box.addItem(first, None)
        for shown, name in names:
            box.addItem(shown, name)
        box.setCurrentIndex(max(0, box.findData(chosen)))
        box.activated.connect(lambda: self.changed.emit())
        self._add(box)
        return box


def _what(planned: c.PlanQube, *, verify: bool) -> str:
    if planned.decision != "take":
        return wording.problem_text(planned)
    if verify:
        return translate("Restore", "Will be verified.")
    parts = [translate("Restore", "Will be restored.")]
    if planned.template and planned.new_template == planned.template:  # of another one, a note tells
        parts.append(translate("Restore", "Template: {name}.").format(name=planned.template))
    if planned.netvm and planned.new_netvm == planned.netvm and planned.klass != "AdminVM":
        parts.append(translate("Restore", "Net qube: {name}.").format(name=planned.netvm))
    parts += [wording.sentence(note) for note in planned.notes]
    parts.append(wording.left_behind_text(planned.settings_left_out))
    return wording.plain(" ".join(part for part in parts if part))
