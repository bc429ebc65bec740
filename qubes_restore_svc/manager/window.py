"""The restore dialog of the installed Qubes Manager, on the isolated restore, with a page that shows it.

Strategy: a subclass of the stock wizard, with its pages, its order and its names. Below each page stands why
one cannot go on from it. The last page gets our progress page in place of the bar and of the message box at
the end, and its log below. Only names of its .ui file and methods that it connects by itself are used. Texts
that came with the backup are never shown as HTML.
"""

import logging
import os
import sys
from queue import Empty
from types import TracebackType

from PyQt6.QtCore import QLocale, QSize, Qt, QTimer, QTranslator
from PyQt6.QtGui import QCloseEvent, QFont, QTextCharFormat, QTextCursor
from PyQt6.QtWidgets import (
    QApplication,
    QBoxLayout,
    QGridLayout,
    QLabel,
    QListWidgetItem,
    QMessageBox,
    QWidget,
    QWizard,
    QWizardPage,
)
from qubesadmin import exc
from qubesadmin.app import QubesBase
from qubesmanager import backup_utils
from qubesmanager import restore as stock

from qubes_restore_svc.errors import RestoreError, WrongPassphrase, unforeseen
from qubes_restore_svc.manager import qt_restore, wording
from qubes_restore_svc.manager.choice_table import ChoiceTable
from qubes_restore_svc.manager.common_choices import CommonChoices
from qubes_restore_svc.manager.entries import VMToRestore
from qubes_restore_svc.manager.progress_page import ProgressPage
from qubes_restore_svc.manager.qube_table import text_colours
from qubes_restore_svc.manager.wording import translate
from qubes_restore_svc.wire import restore_call as c

#: Where translations are put: `qubes-restore-manager_de.qm`.
TRANSLATIONS = "/usr/share/qubes-restore-svc/translations"


class IsolatedRestoreWindow(stock.RestoreVMsWindow):
    """The wizard."""

    def __init__(self, qt_app: QApplication, qubes_app: QubesBase, parent: QWidget | None = None) -> None:
        stock.restore = qt_restore
        translator = QTranslator(qt_app)
        if translator.load(QLocale(), "qubes-restore-manager", "_", TRANSLATIONS):
            qt_app.installTranslator(translator)
        super().__init__(qt_app, qubes_app, parent)
        self._closing = False
        self._question: QMessageBox | None = None
        self.setWindowTitle(qt_restore.title())
        self.setSizeGripEnabled(True)
        self.progress_page = ProgressPage()
        self._set_up_location()
        self._set_up_summary()
        self._set_up_restore()
        self._why_not = {
            page: _add_line(page) for page in (self.select_dir_page, self.select_vms_page, self.confirm_page)
        }
        for page in self._why_not:
            page.completeChanged.connect(self._show_why_not)
        self._name_this_qube()
        self._show_why_not()
        self.resize(_size(self))

    def setup_application(self) -> None:
        """The name that the window is known by, and what is shown of a mistake of ours."""
        super().setup_application()
        self.qt_app.setApplicationName(qt_restore.title())
        self.qt_app.setDesktopFileName("qubes-restore-manager")
        sys.excepthook = self._tell_unforeseen

    def _set_up_location(self) -> None:
        for label in self.select_dir_page.findChildren(QLabel):
            if "qubes.xml" in label.text():  # formats of that time are not read here
                label.setText(translate("Restore", "Backup file:"))
                label.setAlignment(Qt.AlignmentFlag.AlignVCenter)  # it had two lines
        self.label_4.hide()  # it has no effect: the backup itself says it
        self.encryption_checkbox.hide()
        self.gridLayout_2.addWidget(self.verify_only, self.gridLayout_2.rowCount(), 0)  # too wide for beside
        for widget in self.findChildren(QWidget):
            if widget.font().weight() < QFont.Weight.Normal:  # a number that meant normal to Qt 5
                widget.setFont(QFont())
        self.appvm_combobox.currentIndexChanged.connect(lambda: self.backup_location_changed())

    def _set_up_summary(self) -> None:
        self.choices = ChoiceTable()
        self.common_choices = CommonChoices()
        for part in (self.choices, self.common_choices):
            part.changed.connect(self._on_choice)
        self._stale = False  # is something chosen that the plan does not know yet?
        self._choosing = QTimer(self)
        self._choosing.setSingleShot(True)
        self._choosing.setInterval(_TYPING_MS)
        self._choosing.timeout.connect(self._plan_again)
        self.verticalLayout_2.insertWidget(1, self.choices, 1)
        self.verticalLayout_2.insertWidget(2, self.common_choices)
        self.confirm_text_edit.hide()
        self.label_7.hide()

    def _set_up_restore(self) -> None:
        self.progress_bar.hide()
        self.verticalLayout_3.insertWidget(0, self.progress_page, 1)
        self.commit_text_edit.setReadOnly(True)
        self.commit_text_edit.setTabChangesFocus(True)
        self.commit_text_edit.setAccessibleName(translate("Restore", "Messages"))
        self.commit_text_edit.setPlaceholderText(translate("Restore", "Messages of the restore appear here."))
        lines = self.fontMetrics().lineSpacing()
        self.commit_text_edit.setMinimumHeight(2 * lines)
        self.commit_text_edit.setMaximumHeight(6 * lines)
        self.showFileDialog.setText(
            translate("Restore", "When I press “Finish”, open the file selection, to unmount the disk.")
        )
        self.dom0_restored_label.setTextFormat(Qt.TextFormat.PlainText)
        self.dom0_restored_label.setWordWrap(True)
        self.dom0_restored_label.setText(
            translate(
                "Restore",
                "dom0's home comes as one archive file, in a new directory “home-restore-…” in dom0's home."
                " It is not unpacked: move it to a qube that you trust it with, and look at it there.",
            )
        )

    # --- Steps of the wizard ---

    def __fill_vms_list__(self) -> None:
        """Called by the stock dialog for the page of the qubes: opens the backup, and lists what is in it."""
        if self.vms_to_restore is not None:
            return
        lists = self.select_vms_widget
        selected = {item.text() for item in lists.selected_list.findItems("*", Qt.MatchFlag.MatchWildcard)}
        before = self.backup_restore
        lists.clear()
        try:
            found = self.vms_to_restore = self._open_backup()
        except exc.BackupCancelledError as error:
            if not self._is_cancelled:
                self._warn(translate("Restore", "The backup was not opened"), str(error))
            self.restart()
        except (exc.QubesException, exc.PermissionDenied) as error:
            self._warn(translate("Restore", "The backup cannot be opened"), str(error))
            self.restart()
            if isinstance(error.__cause__, WrongPassphrase):
                QTimer.singleShot(0, self._ask_for_passphrase_again)
        else:
            for name, entry in found.items():
                item = QListWidgetItem(name)  # and no more: the stock dialog takes its text for the name
                item.setToolTip(wording.qube_text(entry.planned))
                again = self.backup_restore is before and name in selected
                (lists.selected_list if again else lists.available_list).addItem(item)
            self.select_vms_page.completeChanged.emit()

    def _open_backup(self) -> dict[str, VMToRestore]:
        self.target_appvm = None
        if self.appvm_combobox.currentIndex() > 0:
            try:
                self.target_appvm = self.qubes_app.domains[self.appvm_combobox.currentText()]
            except KeyError:
                raise exc.QubesException("%s", _gone()) from None
        place, passphrase = self.dir_line_edit.text(), self.passphrase_line_edit.text()
        backup = self.backup_restore
        if not (
            backup is not None
            and (backup.backup_location, backup.backup_vm) == (place, self.target_appvm)
            and backup.passphrase == passphrase
            and not backup.canceled
        ):
            self._close_backup()
            backup = qt_restore.BackupRestore(self.qubes_app, place, self.target_appvm, passphrase)
            self.backup_restore = backup
        options = backup.options
        options.use_default_template = options.use_default_netvm = self.ignore_missing.isChecked()
        options.ignore_username_mismatch = self.ignore_uname_mismatch.isChecked()
        options.verify_only = self.verify_only.isChecked()
        return backup.get_restore_info()

    def _ask_for_passphrase_again(self) -> None:
        self.passphrase_line_edit.setFocus()
        self.passphrase_line_edit.selectAll()

    def current_page_changed(self, page_id: int) -> None:
        """Called by the stock dialog for each page that shows."""
        if self.currentPage() is self.commit_page and isinstance(
            self.backup_restore, qt_restore.BackupRestore
        ):
            self.backup_restore.listener = self.progress_page.feed
        try:
            super().current_page_changed(page_id)
        except exc.BackupCancelledError:
            self.restart()  # what was cancelled is begun anew
            return
        except exc.QubesException as error:
            self._warn(translate("Restore", "The backup cannot be restored like this"), str(error))
            self.back()
            return
        if self.currentPage() is self.confirm_page:
            self._stale = False
            if self.backup_restore is not None:
                options = self.backup_restore.options
                self.choices.begin(self.vms_to_restore or {}, options.qubes)
                pools = _pools_of(self.qubes_app)
                self.common_choices.begin(pools, options.override_pool, options.allow)
            self._show_plan()
        elif self.currentPage() is self.commit_page:
            self.dom0_restored_label.setVisible(
                "dom0" in (self.vms_to_restore or {}) and not self.verify_only.isChecked()
            )
            self.setOption(QWizard.WizardOption.NoBackButtonOnLastPage)

    def _show_plan(self) -> None:
        backup = self.backup_restore
        if backup is not None and self.vms_to_restore is not None:
            offers = _with_qubes_of(self.qubes_app, backup.offers)
            verify = backup.options.verify_only
            self.choices.show_plan(self.vms_to_restore, offers, verify=verify)
            self.common_choices.offer(offers.settings, verify=verify)
        self.confirm_page.completeChanged.emit()

    def _on_choice(self) -> None:
        """Nothing goes on before dom0 has said what comes of it."""
        self._stale = True
        self.confirm_page.completeChanged.emit()
        self._choosing.start()

    def _plan_again(self) -> None:
        if self.currentPage() is not self.confirm_page or self.backup_restore is None:
            return
        chosen, options = self._chosen, self.backup_restore.options
        before = options.qubes, options.override_pool, options.allow
        options.qubes, options.override_pool, options.allow = chosen
        try:
            self.vms_to_restore = self.backup_restore.restore_info_verify(self.vms_to_restore or {})
        except exc.BackupCancelledError:
            self.restart()
        except exc.QubesException as error:
            self._warn(translate("Restore", "The backup cannot be restored like this"), str(error))
            options.qubes, options.override_pool, options.allow = before  # with them it can be opened again
            self.restart()
        else:
            self._stale = self._chosen != chosen
            self._show_plan()

    @property
    def _chosen(self) -> tuple[dict[str, c.QubeChoice], str | None, tuple[str, ...]]:
        return self.choices.choices, self.common_choices.pool, self.common_choices.allow

    def thread_finished(self) -> None:
        """Called by the stock dialog when its thread has ended; the page has been told by its own feed."""
        self.update_log()
        if not self.progress_page.is_over:  # something went wrong that nobody has foreseen
            odd = translate("Restore", "Look for the reason in the messages below, and in dom0's report.")
            what = translate("Restore", "the restore ended unexpectedly")
            self.progress_page.feed.ended(None, RestoreError(what, advice=odd))
        if self._question is not None:
            self._question.reject()
        self._set_button(QWizard.WizardButton.FinishButton, enabled=True)
        self._set_button(QWizard.WizardButton.CancelButton, enabled=False)
        if self._closing:
            self.done(0)

    def accept(self) -> None:
        """Finish. By now the person has seen how the restore ended, and may want to unmount the disk."""
        if self.showFileDialog.isChecked():
            try:
                backup_utils.select_path_button_clicked(self, False, True)
            except KeyError:  # the qube that has the disk is not there any more
                self._warn(translate("Restore", "The disk cannot be unmounted here"), _gone())
        super().accept()

    # --- Why the person cannot go on ---

    def has_selected_dir(self) -> bool:
        """Called by the stock dialog: can what is given be a backup?"""
        return not self._why_no_location()

    def _why_no_location(self) -> str:
        path = self.dir_line_edit.text()
        if not path:
            return translate("Restore", "Next: choose the file of the backup.")
        if self.appvm_combobox.currentIndex() > 0 or os.path.isfile(path):
            return ""
        if os.path.isdir(path):
            return translate("Restore", "This is a directory. Choose the file of the backup in it.")
        return translate("Restore", "There is no file “{path}” in {qube}.").format(
            path=path, qube=self.appvm_combobox.currentText()
        )

    def _why_nothing_selected(self) -> str:
        backup = self.backup_restore
        told = [] if backup is None else [wording.unlisted_text(qube) for qube in backup.unlisted]
        if not self.has_selected_vms():
            told.append(
                translate(
                    "Restore",
                    "Next: move what you want to the list on the right. A qube under the pointer tells more.",
                )
            )
        return "\n".join(told)

    def _why_no_restore(self) -> str:
        entries = (self.vms_to_restore or {}).values()
        bad = [entry for entry in entries if not entry.good_to_go]
        if reserved := self.choices.reserved_names:
            return translate("Restore", "No qube can have the name “{name}”.").format(name=reserved[0])
        if not bad:
            return "" if self.backup_restore is None else self.backup_restore.excess
        names = ", ".join(entry.vm.name for entry in bad)
        return translate(
            "Restore", "This does not fit yet: {names}. Choose in the table, or go back and leave it out."
        ).format(names=names)

    def all_vms_good(self) -> bool:
        """Called by the stock dialog: can it begin?"""
        return not self._stale and not self._why_no_restore()

    def _show_why_not(self) -> None:
        reasons = {
            self.select_dir_page: self._why_no_location,
            self.select_vms_page: self._why_nothing_selected,
            self.confirm_page: self._why_no_restore,
        }
        for page, line in self._why_not.items():
            line.setText(reasons[page]())
            line.setVisible(bool(line.text()))

    # --- Ending it early ---

    @property
    def is_restoring(self) -> bool:
        """Is a restore under way?"""
        return self.currentPage() is self.commit_page and self.thread is not None and self.thread.isRunning()

    def reject(self) -> None:
        """The Cancel button, the Escape key, and the window's own button: a restore is not ended unasked."""
        if not self.is_restoring:
            self._close_backup()
            self.done(0)
        elif not self._is_cancelled:
            self._ask_whether_to_cancel()

    def closeEvent(self, event: QCloseEvent | None) -> None:
        """The window's own button: it goes, but not before all is undone."""
        self._closing = self.is_restoring
        super().closeEvent(event)  # rejects, and stays if it is still there

    def _ask_whether_to_cancel(self) -> None:
        """Ask; the restore goes on meanwhile, and the question goes away if it ends."""
        if self._question is not None:
            return
        question = QMessageBox(self)
        question.setIcon(QMessageBox.Icon.Question)
        question.setWindowTitle(qt_restore.title())
        question.setTextFormat(Qt.TextFormat.PlainText)
        text, cancel, go_on = _cancel_question(verify=self.verify_only.isChecked())
        question.setText(text)
        yes = question.addButton(cancel, QMessageBox.ButtonRole.DestructiveRole)
        no = question.addButton(go_on, QMessageBox.ButtonRole.RejectRole)
        question.setDefaultButton(no)
        question.setEscapeButton(no)
        question.finished.connect(lambda: self._answered(cancel=question.clickedButton() is yes))
        self._question = question
        question.open()

    def _answered(self, *, cancel: bool) -> None:
        self._question = None
        if cancel and self.is_restoring:
            self._cancel_restore()
        else:
            self._closing = False

    @property
    def _is_cancelled(self) -> bool:
        return self.backup_restore is not None and self.backup_restore.canceled

    def _cancel_restore(self) -> None:
        if self.backup_restore is not None:
            self.backup_restore.canceled = True
        self._set_button(QWizard.WizardButton.CancelButton, enabled=False)

    def _close_backup(self) -> None:
        if self.backup_restore is not None:
            self.backup_restore.close()

    # --- Words ---

    def append_plain(self, text: str, level: int = logging.INFO) -> None:
        """A line below the progress; errors in a colour that can be read."""
        look = QTextCharFormat()
        if level >= logging.ERROR:
            look.setForeground(text_colours(self.commit_text_edit.palette()).bad)
        cursor = self.commit_text_edit.textCursor()
        cursor.movePosition(QTextCursor.MoveOperation.End)
        if cursor.position() > 0:
            cursor.insertBlock()
        cursor.insertText(text, look)
        self.commit_text_edit.setTextCursor(cursor)
        self.commit_text_edit.ensureCursorVisible()

    def update_log(self) -> None:
        """Called by the stock dialog every second."""
        while True:
            try:
                record = self.feedback_queue.get_nowait()
            except Empty:
                return
            self.append_plain(record.getMessage(), record.levelno)

    def _warn(self, what: str, text: str) -> None:
        box = QMessageBox(QMessageBox.Icon.Warning, qt_restore.title(), f"{what}.\n\n{text}", parent=self)
        box.setTextFormat(Qt.TextFormat.PlainText)
        box.exec()

    def _tell_unforeseen(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Instead of the stock text, which takes it for a mistake of Qubes Manager."""
        sys.__excepthook__(kind, error, trace)
        foreseen = isinstance(error, exc.QubesException | exc.PermissionDenied)
        text = str(error) if foreseen else wording.error_text(unforeseen(error))
        self._warn(translate("Restore", "Something went wrong in this dialog"), text)

    def _name_this_qube(self) -> None:
        """Outside dom0, the first of the qubes is the one that the dialog runs in; it is called dom0."""
        here = getattr(self.qubes_app, "local_name", "dom0")
        if here == "dom0" or here not in self.qubes_app.domains:
            return
        again = self.appvm_combobox.findText(here)
        if again > 0:
            self.appvm_combobox.removeItem(again)
        self.appvm_combobox.setItemText(0, here)

    def _set_button(self, which: QWizard.WizardButton, *, enabled: bool) -> None:
        button = self.button(which)
        if button is not None:
            button.setEnabled(enabled)


def _gone() -> str:
    return translate("Restore", "The qube that holds the backup is not there any more.")


def _cancel_question(*, verify: bool) -> tuple[str, str, str]:
    """The question before a cancel, and its two answers."""
    if verify:
        return (
            translate(
                "Restore",
                "The verification is still running.\n\nIf you cancel it, you do not know whether the rest is"
                " good.",
            ),
            translate("Restore", "Cancel the verification"),
            translate("Restore", "Continue verifying"),
        )
    return (
        translate(
            "Restore",
            "The restore is still running.\n\nIf you cancel it, the qube that is under way is removed again."
            " Qubes that are complete stay.",
        ),
        translate("Restore", "Cancel the restore"),
        translate("Restore", "Continue restoring"),
    )


def _with_qubes_of(app: QubesBase, offers: c.Offers) -> c.Offers:
    """What can be chosen: a GUI domain is not told it by the plan, but may look for itself."""
    if offers.templates or offers.netvms:
        return offers
    domains = tuple(app.domains)
    return offers.model_copy(
        update={
            "templates": tuple(vm.name for vm in domains if vm.klass == "TemplateVM"),
            "disposable_templates": tuple(
                vm.name for vm in domains if getattr(vm, "template_for_dispvms", False)
            ),
            "netvms": tuple(vm.name for vm in domains if getattr(vm, "provides_network", False)),
        }
    )


def _pools_of(app: QubesBase) -> list[str]:
    """Storage pools for volumes of qubes, as far as this domain may look for them."""
    try:
        return [str(pool) for pool in app.pools.values() if pool.driver != _KERNELS]
    except exc.QubesException:  # a GUI domain that may not; then there is no choice
        return []


def _add_line(page: QWizardPage) -> QLabel:
    """A line at the bottom of a page, just above the buttons."""
    line = QLabel()
    line.setTextFormat(Qt.TextFormat.PlainText)
    line.setWordWrap(True)
    layout = page.layout()
    if isinstance(layout, QGridLayout):
        layout.addWidget(line, layout.rowCount(), 0)
    elif isinstance(layout, QBoxLayout):
        layout.addWidget(line)
    return line


def _size(window: QWidget) -> QSize:
    """Room for what is shown, within the screen: its buttons must be reached."""
    letter = window.fontMetrics()
    wanted = QSize(104 * letter.averageCharWidth(), 38 * letter.lineSpacing())
    wanted = wanted.expandedTo(window.size()).expandedTo(window.sizeHint())
    screen = window.screen()
    if screen is None:
        return wanted
    return wanted.boundedTo(screen.availableGeometry().size() - _FRAME)


#: Milliseconds after the last letter of a name, until dom0 is asked what comes of it.
_TYPING_MS = 500
#: The driver of pools that hold kernels, and take nothing else.
_KERNELS = "linux-kernel"
#: What a window manager may take around a window, in pixels.
_FRAME = QSize(16, 48)
