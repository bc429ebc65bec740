"""The restore dialog: a wizard of four pages, with the names and the order of calls of the original.

Strategy: a page asks for what it needs when it is shown. The work is done in a thread, and a queue carries
what is logged to the window. `restore` is what the launcher replaces.
"""

import logging
import logging.handlers
import queue
import sys
import types

from PyQt6 import QtCore, QtWidgets
from qubesadmin import exc
from qubesadmin.app import QubesBase
from qubesadmin.vm import QubesVM

from qubes_restore_svc.manager.entries import VMToRestore
from qubes_restore_svc.manager.restore import BackupRestore

restore = types.ModuleType("stock")  # the stock module, which parses the backup in this process


class RestoreThread(QtCore.QThread):
    """Restores, and keeps what there is to say about it."""

    def __init__(self, backup_restore: BackupRestore, info: dict[str, VMToRestore]) -> None:
        super().__init__()
        self.backup_restore = backup_restore
        self.info = info
        self.msg = ""

    def run(self) -> None:
        try:
            self.backup_restore.restore_do(self.info)
            self.msg = "Finished successfully!"
        except exc.QubesException as error:
            self.msg = f"Finished with errors! {error}"


class RestoreVMsWindow(QtWidgets.QWizard):
    """Location, selection, summary, restore."""

    def __init__(
        self,
        qt_app: QtWidgets.QApplication,
        qubes_app: QubesBase,
        parent: QtWidgets.QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.qt_app = qt_app
        self.qubes_app = qubes_app
        self.log_level = sys.argv[sys.argv.index("--log") + 1] if "--log" in sys.argv else "INFO"
        self.vms_to_restore: dict[str, VMToRestore] | None = None
        self.backup_restore: BackupRestore | None = None
        self.target_appvm: QubesVM | None = None
        self.thread: RestoreThread | None = None  # type: ignore[assignment]  # as in the original
        self.feedback_queue: queue.Queue[logging.LogRecord] = queue.Queue()
        logger = logging.getLogger("qubesadmin.backup")
        logger.addHandler(logging.handlers.QueueHandler(self.feedback_queue))
        logger.setLevel(self.log_level)
        self._build()
        self.currentIdChanged.connect(self.current_page_changed)

    def _build(self) -> None:
        self.select_dir_page, self.select_vms_page = QtWidgets.QWizardPage(), QtWidgets.QWizardPage()
        self.confirm_page, self.commit_page = QtWidgets.QWizardPage(), QtWidgets.QWizardPage()
        for page in (self.select_dir_page, self.select_vms_page, self.confirm_page, self.commit_page):
            self.addPage(page)
        form = QtWidgets.QFormLayout(self.select_dir_page)
        self.appvm_combobox = QtWidgets.QComboBox()
        self.appvm_combobox.addItem("dom0")
        self.appvm_combobox.addItems(
            [vm.name for vm in self.qubes_app.domains if vm.klass == "AppVM" and vm.is_running()]
        )
        self.dir_line_edit, self.passphrase_line_edit = QtWidgets.QLineEdit(), QtWidgets.QLineEdit()
        self.ignore_missing = QtWidgets.QCheckBox("ignore missing")
        self.ignore_uname_mismatch = QtWidgets.QCheckBox("ignore user name")
        self.verify_only = QtWidgets.QCheckBox("verify only")
        for widget in (
            self.appvm_combobox, self.dir_line_edit, self.passphrase_line_edit, self.ignore_missing,
            self.ignore_uname_mismatch, self.verify_only,
        ):  # fmt: skip
            form.addRow(widget)
        lists = QtWidgets.QHBoxLayout(self.select_vms_page)
        self.available_list, self.selected_list = QtWidgets.QListWidget(), QtWidgets.QListWidget()
        lists.addWidget(self.available_list)
        lists.addWidget(self.selected_list)
        self.confirm_text_edit = QtWidgets.QTextEdit(self.confirm_page)
        self.verticalLayout_3 = QtWidgets.QVBoxLayout(self.commit_page)
        self.commit_text_edit = QtWidgets.QTextEdit()
        self.progress_bar = QtWidgets.QProgressBar()
        self.showFileDialog = QtWidgets.QCheckBox("When finished, open file selection dialog")
        self.dom0_restored_label = QtWidgets.QLabel("<b>dom0</b>")
        for part in (self.commit_text_edit, self.progress_bar, self.showFileDialog, self.dom0_restored_label):
            self.verticalLayout_3.addWidget(part)

    def setup_application(self) -> None:
        self.qt_app.setApplicationName("Qubes Restore VMs")

    def fill_vms_list(self) -> None:
        if self.vms_to_restore is not None:
            return
        self.available_list.clear()
        self.selected_list.clear()
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
            self.available_list.addItems(list(self.vms_to_restore))
        except exc.QubesException as error:
            QtWidgets.QMessageBox.warning(self, "Restore error!", str(error))
            self.restart()

    def select(self, *names: str) -> None:
        """What the person does on the second page (not in the original)."""
        for name in names:
            row = self.available_list.findItems(name, QtCore.Qt.MatchFlag.MatchExactly)[0]
            self.selected_list.addItem(self.available_list.takeItem(self.available_list.row(row)))

    def current_page_changed(self, page_id: int) -> None:
        if self.currentPage() is self.select_vms_page:
            self.fill_vms_list()
        elif self.currentPage() is self.confirm_page:
            assert self.backup_restore is not None
            self.vms_to_restore = self.backup_restore.get_restore_info()
            for row in range(self.available_list.count()):
                item = self.available_list.item(row)
                assert item is not None
                del self.vms_to_restore[item.text()]
            self.vms_to_restore = self.backup_restore.restore_info_verify(self.vms_to_restore)
            self.confirm_text_edit.setText(self.backup_restore.get_restore_summary(self.vms_to_restore))
        elif self.currentPage() is self.commit_page:
            assert self.backup_restore is not None and self.vms_to_restore is not None
            self.thread = RestoreThread(self.backup_restore, self.vms_to_restore)
            self.thread.finished.connect(self.thread_finished)
            timer = QtCore.QTimer(self)
            timer.timeout.connect(self.update_log)
            timer.start(1000)
            self.thread.start()

    def thread_finished(self) -> None:
        self.progress_bar.setMaximum(100)
        self.progress_bar.setValue(100)

    def update_log(self) -> None:
        while not self.feedback_queue.empty():
            self.commit_text_edit.append(self.feedback_queue.get_nowait().getMessage())

    def reject(self) -> None:
        self.done(0)
