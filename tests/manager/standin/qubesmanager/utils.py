"""Starting a window: application, connection to qubesd and window, in the order of the original."""

import sys
import typing

import qubesadmin
from PyQt6 import QtWidgets
from qubesadmin.app import QubesBase

if typing.TYPE_CHECKING:
    from qubesmanager.restore import RestoreVMsWindow


class MakesWindow(typing.Protocol):
    def __call__(self, qt_app: QtWidgets.QApplication, qubes_app: QubesBase) -> "RestoreVMsWindow": ...


def run_synchronous(window_class: MakesWindow) -> "RestoreVMsWindow":
    running = QtWidgets.QApplication.instance()
    qt_app = running if isinstance(running, QtWidgets.QApplication) else QtWidgets.QApplication(sys.argv)
    window = window_class(qt_app, qubesadmin.Qubes())
    window.setup_application()
    window.show()
    qt_app.exec()
    return window
