"""Qt without a screen, for the tests of what is shown; they are skipped where Qt cannot be loaded."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType

import pytest

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
pytest.importorskip("PyQt6.QtWidgets", exc_type=ImportError)

from PyQt6.QtCore import QEventLoop
from PyQt6.QtWidgets import QApplication

from tests.manager.script import LONG_S


def application() -> QApplication:
    """The application of this process; made by the first who asks, and kept, as Qt wants it."""
    global _application
    if _application is None:
        _application = QApplication(["tests"])
        _application.setQuitOnLastWindowClosed(False)
        sys.excepthook = _note
    return _application


_application: QApplication | None = None


def process_events() -> None:
    """What is queued now, and what follows from it."""
    for _ in range(3):
        application().processEvents()
    _raise_noted()


def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until `condition` is true."""
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        application().processEvents(QEventLoop.ProcessEventsFlag.WaitForMoreEvents, 20)
        _raise_noted()


#: What was raised where Qt called; left alone, Qt would end the process.
_noted: list[BaseException] = []


def _note(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    traceback.print_exception(kind, error, trace)
    _noted.append(error)


def _raise_noted() -> None:
    while _noted:
        raise _noted.pop()
