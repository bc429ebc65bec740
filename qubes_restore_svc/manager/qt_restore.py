"""The adapter for a dialog that calls it in its own thread: a backup that is being opened can be waited for.

Strategy: opening a backup starts a disposable qube and derives keys, which takes from seconds to minutes. The
dialog asks for it as if it took no time. So the question is put in another thread, and a small window with a
Cancel button stands before the dialog meanwhile. Before that shows, nothing that is pressed reaches the
dialog: it is between two pages, and the second click of a double click would be taken for an answer to what
nobody has seen. The module has the names that the dialog takes from `qubesadmin.backup.restore`.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from PyQt6 import sip
from PyQt6.QtCore import QCoreApplication, QEvent, QEventLoop, QObject, Qt, QThread, pyqtSignal
from PyQt6.QtGui import QKeyEvent
from PyQt6.QtWidgets import QApplication, QLineEdit, QProgressDialog, QWidget

from qubes_restore_svc.manager import restore
from qubes_restore_svc.manager.entries import VMToRestore
from qubes_restore_svc.manager.restore import BackupCanceledError, BackupRestoreOptions
from qubes_restore_svc.manager.wording import translate

__all__ = ["BackupCanceledError", "BackupRestore", "BackupRestoreOptions"]

_T = TypeVar("_T")

#: Milliseconds before the window shows: most answers of an open backup come sooner.
_SHOWN_AFTER_MS = 400


def title() -> str:
    """Of all our windows."""
    return translate("Restore", "Restore Backup (isolated)")


class BackupRestore(restore.BackupRestore):
    """The same, for the thread of the windows."""

    def get_restore_info(self) -> dict[str, VMToRestore]:
        """As in the base; the windows stay alive meanwhile, and the person may cancel."""
        return self._patiently(super().get_restore_info)

    def restore_info_verify(self, restore_info: dict[str, VMToRestore]) -> dict[str, VMToRestore]:
        """As in the base; the same."""
        verify = super().restore_info_verify
        return self._patiently(lambda: verify(restore_info))

    def _patiently(self, ask: Callable[[], _T]) -> _T:
        application = QCoreApplication.instance()
        if application is None or QThread.currentThread() is not application.thread():
            return ask()
        return _wait_for(ask, self._cancel)

    def _cancel(self) -> None:
        self.canceled = True


class _Answered(QObject):
    signal = pyqtSignal()


def _wait_for(ask: Callable[[], _T], cancel: Callable[[], None]) -> _T:
    """What `ask` returns or raises, asked in another thread while events go on here."""
    answered, loop = _Answered(), QEventLoop()
    answered.signal.connect(loop.quit)

    window = _waiting_window(QApplication.activeWindow())
    window.canceled.connect(lambda: _say_cancelling(window, cancel))

    def run() -> _T:
        try:
            return ask()
        finally:
            answered.signal.emit()  # from another thread than the loop's, so that it is queued there

    with (
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="opening-backup") as pool,
        _deaf_without(window),
    ):
        answer = pool.submit(run)
        loop.exec()
    if not sip.isdeleted(window):  # with its parent, if that was closed meanwhile
        window.canceled.disconnect()
        window.close()
        window.deleteLater()
    return answer.result()


@contextlib.contextmanager
def _deaf_without(window: QWidget) -> Iterator[None]:
    """While `window` does not show, no input arrives anywhere; when it does, it is modal."""
    application, deaf = QCoreApplication.instance(), _Deaf(window)
    assert application is not None
    application.installEventFilter(deaf)
    try:
        yield
    finally:
        application.removeEventFilter(deaf)


class _Deaf(QObject):
    def __init__(self, window: QWidget) -> None:
        super().__init__()
        self._window = window

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:
        if event is None or event.type() not in _INPUT:
            return False
        if sip.isdeleted(self._window) or self._window.isVisible():
            return False
        if isinstance(event, QKeyEvent) and isinstance(QApplication.focusWidget(), QLineEdit):
            return not _is_letter(event)  # it starts nothing, and is not to get lost
        if event.type() is QEvent.Type.Close:
            event.ignore()  # otherwise it counts as taken, and the window goes
        return True


def _is_letter(event: QKeyEvent) -> bool:
    no_command = Qt.KeyboardModifier.ShiftModifier | Qt.KeyboardModifier.KeypadModifier
    return bool(event.text()) and event.text().isprintable() and not event.modifiers() & ~no_command


_INPUT = frozenset(
    {
        QEvent.Type.MouseButtonPress,
        QEvent.Type.MouseButtonRelease,
        QEvent.Type.MouseButtonDblClick,
        QEvent.Type.TouchBegin,
        QEvent.Type.TouchUpdate,
        QEvent.Type.TouchEnd,
        QEvent.Type.KeyPress,
        QEvent.Type.KeyRelease,
        QEvent.Type.ShortcutOverride,
        QEvent.Type.Shortcut,
        QEvent.Type.Close,
    }
)


def _waiting_window(parent: QWidget | None) -> QProgressDialog:
    window = QProgressDialog(
        translate("Restore", "Opening the backup in a disposable qube.\nThis can take a minute."),
        translate("Restore", "Cancel"),
        0,
        0,
        parent,
    )
    window.setWindowTitle(title())
    window.setWindowModality(Qt.WindowModality.ApplicationModal)
    window.setAutoReset(False)
    window.setMinimumDuration(_SHOWN_AFTER_MS)
    return window


def _say_cancelling(window: QProgressDialog, cancel: Callable[[], None]) -> None:
    cancel()
    window.setLabelText(translate("Restore", "Cancelling: the disposable qube is being removed."))
    window.setCancelButton(None)
    window.show()  # its Cancel has hidden it
