"""A restore dialog of our own that uses the adapter as the stock one does, call by call and thread by thread.

Strategy: three steps as methods, which a test calls as a person would press Next: `select` opens the backup
in the thread of the windows, `confirm` asks again and removes what was not chosen, `commit` restores in
another. What is logged meanwhile comes through a queue that a timer empties.
"""

import logging
import logging.handlers
import queue
from collections.abc import Callable

from PyQt6.QtCore import QThread, QTimer
from PyQt6.QtGui import QCloseEvent
from PyQt6.QtWidgets import QDialog, QListWidget, QPlainTextEdit, QProgressBar, QVBoxLayout
from qubesadmin import exc

from qubes_restore_svc.manager.entries import VMToRestore
from qubes_restore_svc.manager.restore import BackupRestore

MakeBackup = Callable[[], BackupRestore]


class RestoreDialog(QDialog):
    """The dialog. `problems` are the message boxes it would show, `message` what it says at the end."""

    def __init__(self, make_backup: MakeBackup) -> None:
        super().__init__()
        self._make_backup = make_backup
        self.backup: BackupRestore | None = None
        self.info: dict[str, VMToRestore] = {}
        self.worker: _Worker | None = None
        self.problems: list[str] = []
        self.message = ""
        self.available, self.messages, self.bar = QListWidget(), QPlainTextEdit(), QProgressBar()
        layout = QVBoxLayout(self)
        for widget in (self.available, self.messages, self.bar):
            layout.addWidget(widget)
        self._records: queue.Queue[logging.LogRecord] = queue.Queue()
        self._handler = logging.handlers.QueueHandler(self._records)
        self._logger = logging.getLogger("qubesadmin.backup")
        self._logger.addHandler(self._handler)
        self._logger.setLevel(logging.INFO)
        self._timer = QTimer(self)
        self._timer.timeout.connect(self._empty_log)
        self._timer.start(20)

    def select(self, *, verify_only: bool = False) -> bool:
        """Open the backup and list what is in it; False if there was a message box instead."""
        self.backup = self._make_backup()
        self.backup.options.use_default_template = True
        self.backup.options.use_default_netvm = True
        self.backup.options.verify_only = verify_only
        try:
            self.info = self.backup.get_restore_info()
        except exc.QubesException as error:
            self.problems.append(str(error))
            return False
        self.available.clear()
        self.available.addItems(list(self.info))
        return True

    def confirm(self, *chosen: str) -> str:
        """Choose these; brings the summary."""
        assert self.backup is not None
        self.info = self.backup.get_restore_info()
        for name in list(self.info):
            if name not in chosen:
                del self.info[name]
        self.info = self.backup.restore_info_verify(self.info)
        return self.backup.get_restore_summary(self.info)

    @property
    def can_go_on(self) -> bool:
        """Does everything fit?"""
        return all(entry.good_to_go for entry in self.info.values() if entry.vm)

    def commit(self) -> None:
        """Restore."""
        assert self.backup is not None
        self.worker = _Worker(self.backup, self.info)
        self.worker.finished.connect(self._finished)
        self.worker.start()

    def cancel(self) -> None:
        """The Cancel button."""
        assert self.backup is not None
        self.backup.canceled = True

    def closeEvent(self, event: QCloseEvent | None) -> None:
        if self.worker is not None and self.worker.isRunning():
            self.cancel()
            self.worker.wait()
        self._timer.stop()
        self._logger.removeHandler(self._handler)
        self.backup = self.worker = None
        super().closeEvent(event)

    @property
    def is_over(self) -> bool:
        """Has the end been told?"""
        return bool(self.message)

    def _finished(self) -> None:
        assert self.worker is not None
        self.message = self.worker.message

    def _empty_log(self) -> None:
        while not self._records.empty():
            self.messages.appendPlainText(self._records.get_nowait().getMessage())


class _Worker(QThread):
    def __init__(self, backup: BackupRestore, info: dict[str, VMToRestore]) -> None:
        super().__init__()
        self._backup = backup
        self._info = info
        self.message = ""

    def run(self) -> None:
        try:
            self._backup.restore_do(self._info)
            self.message = "success"
        except exc.BackupCancelledError as error:
            self.message = f"cancelled: {error}"
        except exc.QubesException as error:
            self.message = f"failed: {error}"
