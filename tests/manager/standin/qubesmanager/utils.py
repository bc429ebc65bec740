"""Starting a window: application, connection to qubesd and window, in the order of the original."""

import sys
import types
import typing

import qubesadmin
from PyQt6 import QtWidgets
from qubesadmin.app import QubesBase

if typing.TYPE_CHECKING:
    from qubesmanager.restore import RestoreVMsWindow


class MakesWindow(typing.Protocol):
    def __call__(self, qt_app: QtWidgets.QApplication, qubes_app: QubesBase) -> "RestoreVMsWindow": ...


def handle_exception(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """The original shows a traceback, and calls it a bug in Qubes Manager."""
    sys.stderr.write(f"Houston, we have a problem: {error}\n")


def run_synchronous(window_class: MakesWindow) -> "RestoreVMsWindow":
    qt_app = QtWidgets.QApplication(sys.argv)
    sys.excepthook = handle_exception
    window = window_class(qt_app, qubesadmin.Qubes())
    window.setup_application()
    window.show()
    qt_app.exec()
    return window
