"""The restore dialog of the installed Qubes Manager, on the isolated restore, with a page that shows it.

Strategy: a subclass of the stock wizard. Its pages for location, selection and summary stay as they are; its
last page gets our progress page in place of the bar and of the message box at the end, and its log below.
Only names of its .ui file and methods that it connects by itself are used. Texts that came with the backup
are never shown as HTML.
"""

import logging
from queue import Empty

from PyQt6.QtCore import QSize, Qt
from PyQt6.QtGui import QCloseEvent, QKeyEvent, QTextCharFormat, QTextCursor
from PyQt6.QtWidgets import QApplication, QLabel, QMessageBox, QTextEdit, QWidget, QWizard
from qubesadmin import exc
from qubesadmin.app import QubesBase
from qubesmanager import backup_utils
from qubesmanager import restore as stock

from qubes_restore_svc.errors import RestoreError
from qubes_restore_svc.manager import qt_restore
from qubes_restore_svc.manager.progress_page import ProgressPage
from qubes_restore_svc.manager.qube_table import text_colours

TITLE = "Restore Backup (isolated)"

_HOME_NOTE = (
    "dom0's home comes as one archive file, in a new directory “home-restore-…” in dom0's home. It is not"
    " unpacked: move it to a qube that you trust it with, and look at it there."
)
_ODD = "Look for the reason in the messages below, and in dom0's report."
#: The question before a cancel, and its two answers.
_CANCEL_RESTORE = (
    "The restore is still running.\n\nIf you cancel it, the qube that is under way is removed again. Qubes"
    " that are complete stay.",
    "Cancel the restore",
    "Continue restoring",
)
_CANCEL_VERIFICATION = (
    "The verification is still running.\n\nIf you cancel it, you do not know whether the rest is good.",
    "Cancel the verification",
    "Continue verifying",
)


class IsolatedRestoreWindow(stock.RestoreVMsWindow):
    """The wizard."""

    def __init__(self, qt_app: QApplication, qubes_app: QubesBase, parent: QWidget | None = None) -> None:
        stock.restore = qt_restore
        super().__init__(qt_app, qubes_app, parent)
        self._closing = False
        self._question: QMessageBox | None = None
        self.setWindowTitle(TITLE)
        self.setSizeGripEnabled(True)
        self.resize(self.size().expandedTo(self.sizeHint()).expandedTo(_least_size(self)))
        self.progress_page = ProgressPage()
        self.progress_bar.hide()
        self.verticalLayout_3.insertWidget(0, self.progress_page, 1)
        self.confirm_text_edit.setLineWrapMode(QTextEdit.LineWrapMode.NoWrap)  # it shows a table
        self.commit_text_edit.setReadOnly(True)
        self.commit_text_edit.setAccessibleName("Messages")
        self.commit_text_edit.setPlaceholderText("Messages of the restore appear here.")
        self.commit_text_edit.setMaximumHeight(6 * self.fontMetrics().lineSpacing())
        self.dom0_restored_label.setTextFormat(Qt.TextFormat.PlainText)
        self.dom0_restored_label.setWordWrap(True)
        self.dom0_restored_label.setText(_HOME_NOTE)
        for label in self.select_dir_page.findChildren(QLabel):
            if "qubes.xml" in label.text():  # formats of that time are not read here
                label.setText("Backup file:")
        self._name_this_qube()

    def setup_application(self) -> None:
        """The name that the window is known by."""
        super().setup_application()
        self.qt_app.setApplicationName(TITLE)
        self.qt_app.setDesktopFileName("qubes-restore-manager")

    # --- Steps of the wizard ---

    def current_page_changed(self, page_id: int) -> None:
        """Called by the stock dialog for each page that shows."""
        if self.currentPage() is self.commit_page and isinstance(
            self.backup_restore, qt_restore.BackupRestore
        ):
            self.backup_restore.listener = self.progress_page.feed
        try:
            super().current_page_changed(page_id)
        except exc.QubesException as error:
            self._warn("The backup cannot be restored like this", str(error))
            self.back()
            return
        if self.currentPage() is self.commit_page:
            self.dom0_restored_label.setVisible(
                "dom0" in (self.vms_to_restore or {}) and not self.verify_only.isChecked()
            )
            self.setOption(QWizard.WizardOption.NoBackButtonOnLastPage)

    def thread_finished(self) -> None:
        """Called by the stock dialog when its thread has ended; the page has been told by its own feed."""
        self.update_log()
        if not self.progress_page.is_over:  # something went wrong that nobody has foreseen
            self.progress_page.feed.ended(None, RestoreError("the restore ended unexpectedly", advice=_ODD))
        if self._question is not None:
            self._question.reject()
        self._set_button(QWizard.WizardButton.FinishButton, enabled=True)
        self._set_button(QWizard.WizardButton.CancelButton, enabled=False)
        if self._closing:
            self.done(0)
            return
        if self.showFileDialog.isChecked():
            self.append_plain("Please unmount the disk with the backup, and cancel the file selection.")
            backup_utils.select_path_button_clicked(self, False, True)
        self.showFileDialog.setEnabled(False)

    # --- Ending it early ---

    @property
    def is_restoring(self) -> bool:
        """Is a restore under way?"""
        return self.currentPage() is self.commit_page and self.thread is not None and self.thread.isRunning()

    def reject(self) -> None:
        """The Cancel button: at once, and it is said."""
        if self.is_restoring:
            self._cancel_restore()
            return
        self._close_backup()
        self.done(0)

    def closeEvent(self, event: QCloseEvent | None) -> None:
        """The window's own button: not without asking, and not before all is undone."""
        if not self.is_restoring or event is None:
            self._close_backup()
            super().closeEvent(event)
            return
        event.ignore()
        self._closing = self._closing or self._is_cancelled
        if not self._closing:
            self._ask_whether_to_cancel(close=True)

    def keyPressEvent(self, event: QKeyEvent | None) -> None:
        """Escape is pressed by mistake too easily to end hours of work."""
        if event is not None and event.key() == Qt.Key.Key_Escape and self.is_restoring:
            if not self._is_cancelled:
                self._ask_whether_to_cancel(close=False)
            return
        super().keyPressEvent(event)

    def _ask_whether_to_cancel(self, *, close: bool) -> None:
        """Ask; the restore goes on meanwhile, and the question goes away if it ends."""
        if self._question is not None:
            return
        question = QMessageBox(self)
        question.setIcon(QMessageBox.Icon.Question)
        question.setWindowTitle(TITLE)
        question.setTextFormat(Qt.TextFormat.PlainText)
        text, cancel, go_on = _CANCEL_VERIFICATION if self.verify_only.isChecked() else _CANCEL_RESTORE
        question.setText(text)
        yes = question.addButton(cancel, QMessageBox.ButtonRole.DestructiveRole)
        no = question.addButton(go_on, QMessageBox.ButtonRole.RejectRole)
        question.setDefaultButton(no)
        question.setEscapeButton(no)
        question.finished.connect(lambda: self._answered(cancel=question.clickedButton() is yes, close=close))
        self._question = question
        question.open()

    def _answered(self, *, cancel: bool, close: bool) -> None:
        self._question = None
        if cancel and self.is_restoring:
            self._closing = close
            self._cancel_restore()

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
        box = QMessageBox(QMessageBox.Icon.Warning, TITLE, f"{what}.\n\n{text}", parent=self)
        box.setTextFormat(Qt.TextFormat.PlainText)
        box.exec()

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


def _least_size(window: QWidget) -> QSize:
    letter = window.fontMetrics()
    return QSize(104 * letter.averageCharWidth(), 38 * letter.lineSpacing())
