"""The restore dialog: a wizard of four pages, with the names and the order of calls of the original.

Strategy: a page asks for what it needs when it is shown. The work is done in a thread, and a queue carries
what is logged to the window. `restore` is what the launcher replaces. The tests of the window run on the
original, too: `make conformance`.
"""

import argparse
import logging
import logging.handlers
import multiprocessing
import os
import queue
import types
from collections.abc import Callable

from PyQt6 import QtCore, QtWidgets
from qubesadmin import exc
from qubesadmin.app import QubesBase
from qubesadmin.vm import QubesVM

from qubes_restore_svc.manager.entries import VMToRestore
from qubes_restore_svc.manager.restore import BackupRestore
from qubesmanager import backup_utils, multiselectwidget

restore = types.ModuleType("stock")  # the stock module, which parses the backup in this process


class RestoreThread(QtCore.QThread):
    """Restores, and keeps what there is to say about it, as HTML."""

    def __init__(self, backup_restore: BackupRestore, vms_to_restore: dict[str, VMToRestore]) -> None:
        super().__init__()
        self.backup_restore = backup_restore
        self.vms_to_restore = vms_to_restore
        self.msg: str | None = None
        self.canceled: bool | None = None

    def run(self) -> None:
        try:
            self.backup_restore.restore_do(self.vms_to_restore)
            self.msg = '<font color="green">Finished successfully!</font>'
        except Exception as error:  # noqa: BLE001 - as broad as the original
            self.canceled = isinstance(error, exc.BackupCancelledError) or None
            left = "" if self.canceled else "<br />Partially restored files left in ~/QubesIncoming"
            self.msg = f'<b><font color="red">Finished with errors!</font></b><br />{error}{left}'


class _Page(QtWidgets.QWizardPage):
    isComplete: Callable[[], bool]  # the window replaces it


class Ui_Restore:
    """What the original has from its .ui file."""

    def setupUi(self, wizard: QtWidgets.QWizard) -> None:
        wizard.setObjectName("Restore")
        wizard.setOptions(
            QtWidgets.QWizard.WizardOption.NoBackButtonOnLastPage
            | QtWidgets.QWizard.WizardOption.NoBackButtonOnStartPage
        )
        self.select_dir_page, self.select_vms_page = _Page(), _Page()
        self.confirm_page, self.commit_page = _Page(), _Page()
        self._location(QtWidgets.QGridLayout(self.select_dir_page))
        self.select_vms_groupbox = QtWidgets.QGroupBox("Qubes to restore")
        self.select_vms_layout = QtWidgets.QVBoxLayout(self.select_vms_groupbox)
        self.verticalLayout_4 = QtWidgets.QVBoxLayout(self.select_vms_page)
        self.verticalLayout_4.addWidget(self.select_vms_groupbox)
        self.verticalLayout_2 = QtWidgets.QVBoxLayout(self.confirm_page)
        self.label_6 = QtWidgets.QLabel("You're about to perform the following actions:")
        self.confirm_text_edit = QtWidgets.QTextEdit()
        self.label_7 = QtWidgets.QLabel("To continue press Next. ")
        parts: tuple[QtWidgets.QWidget, ...] = (self.label_6, self.confirm_text_edit, self.label_7)
        for part in parts:
            self.verticalLayout_2.addWidget(part)
        self.verticalLayout_3 = QtWidgets.QVBoxLayout(self.commit_page)
        self.commit_text_edit = QtWidgets.QTextEdit()
        self.progress_bar = QtWidgets.QProgressBar()
        self.showFileDialog = QtWidgets.QCheckBox("When finished, open file selection dialog")
        self.dom0_restored_label = QtWidgets.QLabel("<b>dom0</b>")
        parts = (self.commit_text_edit, self.progress_bar, self.showFileDialog, self.dom0_restored_label)
        for part in parts:
            self.verticalLayout_3.addWidget(part)
        for page in (self.select_dir_page, self.select_vms_page, self.confirm_page, self.commit_page):
            wizard.addPage(page)
        QtCore.QMetaObject.connectSlotsByName(wizard)

    def _location(self, grid: QtWidgets.QGridLayout) -> None:
        self.gridLayout_3 = grid
        self.appvm_combobox = QtWidgets.QComboBox()
        self.dir_line_edit = QtWidgets.QLineEdit()
        self.select_path_button = QtWidgets.QToolButton()
        self.select_path_button.setObjectName("select_path_button")
        self.options_groupbox = QtWidgets.QGroupBox("Restore options")
        self.gridLayout_2 = QtWidgets.QGridLayout(self.options_groupbox)
        self.ignore_missing = QtWidgets.QCheckBox("Ignore missing templates and net qubes.")
        self.ignore_uname_mismatch = QtWidgets.QCheckBox("Ignore dom0 username mismatch.")
        self.verify_only = QtWidgets.QCheckBox("Test restore to verify backup integrity.")
        self.gridLayout_2.addWidget(self.ignore_missing, 0, 0)
        self.gridLayout_2.addWidget(self.verify_only, 0, 1)
        self.gridLayout_2.addWidget(self.ignore_uname_mismatch, 3, 0)
        self.label_2 = QtWidgets.QLabel(
            "Backup file: (For legacy backup formats, select the qubes.xml file.)"
        )
        self.label_4, self.encryption_checkbox = QtWidgets.QLabel("Encrypted backup:"), QtWidgets.QCheckBox()
        self.passphrase_line_edit = QtWidgets.QLineEdit()
        self.passphrase_line_edit.setEchoMode(QtWidgets.QLineEdit.EchoMode.Password)
        self.passwd_show_button = QtWidgets.QPushButton()
        self.passwd_show_button.setCheckable(True)
        for row, widget in enumerate(
            (
                self.appvm_combobox, self.label_2, self.dir_line_edit, self.select_path_button,
                self.options_groupbox, self.label_4, self.encryption_checkbox, self.passphrase_line_edit,
                self.passwd_show_button,
            )
        ):  # fmt: skip
            grid.addWidget(widget, row, 0)


class RestoreVMsWindow(Ui_Restore, QtWidgets.QWizard):
    """Location, selection, summary, restore."""

    def __init__(
        self,
        qt_app: QtWidgets.QApplication,
        qubes_app: QubesBase,
        parent: QtWidgets.QWidget | None = None,
    ) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--log", default="INFO")
        arguments = parser.parse_args()  # of the process, and it may end it
        super().__init__(parent)
        self.qt_app = qt_app
        self.qubes_app = qubes_app
        self.vms_to_restore: dict[str, VMToRestore] | None = None
        self.func_output: str | list[str] = []
        self.thread: RestoreThread | None = None  # type: ignore[assignment]  # as in the original
        self.feedback_queue: multiprocessing.Queue[logging.LogRecord] = multiprocessing.Queue()
        logger = logging.getLogger("qubesadmin.backup")
        logger.addHandler(logging.handlers.QueueHandler(self.feedback_queue))
        logger.setLevel(arguments.log)
        self.backup_restore: BackupRestore | None = None
        self.target_appvm: QubesVM | None = None
        self.setupUi(self)
        self.dom0_restored_label.setVisible(False)
        self.select_vms_widget = multiselectwidget.MultiSelectWidget(self)
        self.select_vms_layout.insertWidget(0, self.select_vms_widget)
        self.currentIdChanged.connect(self.current_page_changed)
        self.dir_line_edit.textChanged.connect(self.backup_location_changed)
        self.select_dir_page.isComplete = self.has_selected_dir
        self.select_vms_page.isComplete = self.has_selected_vms
        self.confirm_page.isComplete = self.all_vms_good
        self.select_vms_widget.selectedChanged.connect(self.select_vms_page.completeChanged.emit)
        backup_utils.fill_appvms_list(self)
        self.passwd_show_button.pressed.connect(self.show_hide_password)
        go_on = self.button(QtWidgets.QWizard.WizardButton.NextButton)
        assert go_on is not None
        self.passphrase_line_edit.returnPressed.connect(go_on.click)

    def show_hide_password(self) -> None:
        hidden, shown = QtWidgets.QLineEdit.EchoMode.Password, QtWidgets.QLineEdit.EchoMode.Normal
        self.passphrase_line_edit.setEchoMode(hidden if self.passwd_show_button.isChecked() else shown)

    def setup_application(self) -> None:
        self.qt_app.setApplicationName("Qubes Restore VMs")

    @QtCore.pyqtSlot(name="on_select_path_button_clicked")
    def select_path_button_clicked(self) -> None:
        backup_utils.select_path_button_clicked(self, True)

    def cleanupPage(self, p_int: int) -> None:
        if self.page(p_int) is self.select_vms_page:
            self.vms_to_restore = None
        else:
            super().cleanupPage(p_int)

    def __fill_vms_list__(self) -> None:
        if self.vms_to_restore is not None:
            return
        self.select_vms_widget.clear()
        self.target_appvm = None
        if self.appvm_combobox.currentIndex() != 0:
            self.target_appvm = self.qubes_app.domains[self.appvm_combobox.currentText()]
        try:
            self.backup_restore = restore.BackupRestore(
                self.qubes_app,
                self.dir_line_edit.text(),
                self.target_appvm,
                self.passphrase_line_edit.text(),
            )
            assert self.backup_restore is not None
            if self.ignore_missing.isChecked():
                self.backup_restore.options.use_default_template = True
                self.backup_restore.options.use_default_netvm = True
            if self.ignore_uname_mismatch.isChecked():
                self.backup_restore.options.ignore_username_mismatch = True
            if self.verify_only.isChecked():
                self.backup_restore.options.verify_only = True
            self.vms_to_restore = self.backup_restore.get_restore_info()
            self.select_vms_widget.available_list.addItems(list(self.vms_to_restore))
        except exc.QubesException as error:
            QtWidgets.QMessageBox.warning(self, "Restore error!", str(error))
            self.restart()

    def append_output(self, text: str) -> None:
        self.commit_text_edit.append(text)

    def current_page_changed(self, page_id: int) -> None:
        if self.currentPage() is self.select_vms_page:
            self.__fill_vms_list__()
        elif self.currentPage() is self.confirm_page:
            assert self.backup_restore is not None
            self.vms_to_restore = self.backup_restore.get_restore_info()
            available = self.select_vms_widget.available_list
            for row in range(available.count()):
                item = available.item(row)
                assert item is not None
                del self.vms_to_restore[item.text()]
            self.vms_to_restore = self.backup_restore.restore_info_verify(self.vms_to_restore)
            self.func_output = self.backup_restore.get_restore_summary(self.vms_to_restore)
            self.confirm_text_edit.setReadOnly(True)
            self.confirm_text_edit.setText(self.func_output)
            self.confirm_page.completeChanged.emit()
        elif self.currentPage() is self.commit_page:
            assert self.backup_restore is not None and self.vms_to_restore is not None
            finish = self.button(QtWidgets.QWizard.WizardButton.FinishButton)
            assert finish is not None
            finish.setDisabled(True)
            self.showFileDialog.setEnabled(True)
            self.showFileDialog.setChecked("media/" in self.dir_line_edit.text())
            self.thread = RestoreThread(self.backup_restore, self.vms_to_restore)
            self.thread.finished.connect(self.thread_finished)
            timer = QtCore.QTimer(self)
            timer.timeout.connect(self.update_log)
            timer.start(1000)
            self.thread.start()

    def thread_finished(self) -> None:
        raise AssertionError("its message boxes and its file selection are replaced")

    def update_log(self) -> None:
        try:
            while True:
                self.append_output(self.feedback_queue.get_nowait().getMessage())
        except queue.Empty:
            pass

    def all_vms_good(self) -> bool:
        assert self.vms_to_restore is not None
        return all(entry.good_to_go for entry in self.vms_to_restore.values() if entry.vm)

    def reject(self) -> None:
        raise AssertionError("it cancels without asking, and is replaced")

    def has_selected_dir(self) -> bool:
        place = self.dir_line_edit.text()
        if self.appvm_combobox.currentIndex() != 0:
            return bool(place)
        return os.path.isfile(place) or os.path.isfile(os.path.join(place, "qubes.xml"))

    def has_selected_vms(self) -> bool:
        return self.select_vms_widget.selected_list.count() > 0

    def backup_location_changed(self, new_dir: str | None = None) -> None:
        self.select_dir_page.completeChanged.emit()
