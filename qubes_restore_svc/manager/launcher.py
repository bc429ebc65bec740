"""`qubes-restore-manager`: starts the restore dialog of the installed Qubes Manager on the isolated restore.

Strategy: everything that can be missing is looked for first, and said in a sentence: on standard error, and
in a window if there is a screen, because the desktop entry has no terminal.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from qubes_restore_svc import __version__
from qubes_restore_svc.hardening import loading

_PROGRAM = "qubes-restore-manager"
#: Modules of others, and the packages that bring them.
_PACKAGES = {
    "PyQt6": "python3-pyqt6",
    "qubesadmin": "qubes-core-admin-client",
    "qubesmanager": "qubes-manager",
}
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def main(arguments: Sequence[str] | None = None) -> None:
    """Show the dialog until it is closed; exit status 0, or 1 if it cannot be shown."""
    level = _parse(arguments)
    with loading(_PROGRAM):
        try:
            from qubesadmin import exc
            from qubesmanager.utils import run_synchronous

            from qubes_restore_svc.errors import unforeseen
            from qubes_restore_svc.manager.window import IsolatedRestoreWindow
        except ImportError as error:
            _fail(_missing(error))
    sys.argv[1:] = ["--log", level]  # the stock dialog reads it once more
    try:
        run_synchronous(IsolatedRestoreWindow)
    except (exc.QubesException, exc.PermissionDenied) as error:
        _fail(f"the system's qubes cannot be listed: {error}")
    except OSError as error:
        _fail(
            f"the system's qubes cannot be listed: {error.filename or 'dom0'}: {error.strerror}."
            " The dialog runs in dom0, or in a GUI domain."
        )
    except AttributeError as error:
        _fail(
            f"the installed Qubes Manager is another than this was made for ({error}). Update it, or use"
            " “qvm-backup-restore --mgmt-vm” in a terminal."
        )
    except Exception as error:  # noqa: BLE001 - the last one that can say it in words
        _fail(str(unforeseen(error)))


def _parse(arguments: Sequence[str] | None) -> str:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Restore a Qubes backup: it is read in a disposable qube, never in dom0.",
        allow_abbrev=False,
    )
    parser.add_argument("--log", choices=_LEVELS, default="INFO", help="how much the dialog tells")
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    return str(parser.parse_args(arguments).log)


def _missing(error: ImportError) -> str:
    name = (error.name or "").split(".")[0]
    package = _PACKAGES.get(name)
    if package is None or not isinstance(error, ModuleNotFoundError):
        return f"the restore dialog cannot be loaded: {error}"
    return (
        f"the package {package} is not installed here, and the restore dialog needs it. Install it, or use"
        " “qvm-backup-restore --mgmt-vm” in a terminal."
    )


def _fail(text: str) -> NoReturn:
    sys.stderr.write(f"{_PROGRAM}: {text}\n")
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        _show(text)
    raise SystemExit(1)


def _show(text: str) -> None:
    try:
        from PyQt6.QtCore import Qt
        from PyQt6.QtWidgets import QApplication, QMessageBox
    except ImportError:
        return
    application = QApplication.instance() or QApplication([_PROGRAM])
    box = QMessageBox(QMessageBox.Icon.Critical, "Restore Backup (isolated)", f"{text[:1].upper()}{text[1:]}")
    box.setTextFormat(Qt.TextFormat.PlainText)
    box.exec()
    del application
