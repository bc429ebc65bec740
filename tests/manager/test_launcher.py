import os
import subprocess
import sys
from pathlib import Path

import pytest

from qubes_restore_svc.manager import launcher
from tests.manager import qt
from tests.support.fixtures import REPOSITORY

import qubesadmin  # isort: skip
import qubesmanager  # isort: skip
from qubesmanager import utils  # isort: skip

#: Where `qubesadmin` and `qubesmanager` lie: the stand-ins, or the real ones.
STANDINS = tuple(Path(str(module.__file__)).parents[1] for module in (qubesadmin, qubesmanager))
RUN = "from qubes_restore_svc.manager.launcher import main; main()"


def launched(
    tmp_path: Path, *standins: Path, code: str = RUN, arguments: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """The launcher in a process of its own, without a screen and without qubesd."""
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (REPOSITORY, *standins)))
    environment["QT_QPA_PLATFORM"] = "offscreen"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_without_qubes_manager_it_says_what_to_install(tmp_path: Path) -> None:
    done = launched(tmp_path, STANDINS[0])
    assert done.returncode == 1
    assert done.stderr == (
        "qubes-restore-manager: the package qubes-manager is not installed here, and the restore dialog needs"
        " it. Install it, or use “qvm-backup-restore --mgmt-vm” in a terminal.\n"
    )


def test_without_qt_it_says_what_to_install(tmp_path: Path) -> None:
    done = launched(tmp_path, *STANDINS, code=f"import sys; sys.modules['PyQt6'] = None; {RUN}")
    assert done.returncode == 1
    assert "the package python3-pyqt6 is not installed here" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_admin_api_it_says_so(tmp_path: Path) -> None:
    done = launched(tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "the package qubes-core-admin-client is not installed here" in done.stderr


def test_without_an_answer_of_qubesd_it_says_so(tmp_path: Path) -> None:
    done = launched(tmp_path, *STANDINS)
    assert done.returncode == 1
    assert "the system's qubes cannot be listed" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_way_to_dom0_it_says_so(tmp_path: Path) -> None:
    missing = "FileNotFoundError(2, 'No such file or directory', '/usr/bin/qrexec-client-vm')"
    code = f"""
import qubesadmin
def no_way(): raise {missing}
qubesadmin.Qubes = no_way
{RUN}"""
    done = launched(tmp_path, *STANDINS, code=code)
    assert done.returncode == 1
    assert done.stderr == (
        "qubes-restore-manager: the system's qubes cannot be listed: /usr/bin/qrexec-client-vm: No such file"
        " or directory. The dialog runs in dom0, or in a GUI domain.\n"
    )


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_need_no_dialog(tmp_path: Path, option: str) -> None:
    done = launched(tmp_path, STANDINS[0], arguments=(option,))
    assert done.returncode == 0
    assert "qubes-restore-manager" in done.stdout


def test_it_starts_the_installed_dialog_and_passes_the_level_on(monkeypatch: pytest.MonkeyPatch) -> None:
    qt.application()
    shown: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(sys, "argv", ["qubes-restore-manager"])
    monkeypatch.setattr(
        utils, "run_synchronous", lambda window: shown.append((window.__name__, sys.argv[1:]))
    )
    launcher.main(["--log", "DEBUG"])
    assert shown == [("IsolatedRestoreWindow", ["--log", "DEBUG"])]


def test_a_mistake_of_our_dialog_is_not_blamed_on_qubes_manager(tmp_path: Path) -> None:
    code = f"""
import sys
import qubesadmin
from PyQt6.QtWidgets import QApplication, QMessageBox
class Nothing:
    domains, local_name = (), "dom0"
qubesadmin.Qubes = Nothing
QMessageBox.exec = lambda box: print(box.windowTitle(), "|", box.text())
QApplication.exec = lambda *_: sys.excepthook(ValueError, ValueError("x"), None)
{RUN}"""
    done = launched(tmp_path, *STANDINS, code=code)
    assert done.stdout == (
        "Restore Backup (isolated) | Something went wrong in this dialog.\n\nSomething failed that must not"
        " fail (ValueError). This is a mistake of the program; please report it.\n"
    ), done.stderr
    assert done.returncode == 0


def test_another_dialog_than_the_one_it_knows_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(window: object) -> None:
        raise AttributeError("no attribute 'commit_page'")

    monkeypatch.setattr(utils, "run_synchronous", run)
    monkeypatch.setattr(sys, "argv", ["qubes-restore-manager"])
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(SystemExit) as caught:
        launcher.main([])
    assert caught.value.code == 1
    assert "another than this was made for (no attribute 'commit_page')" in capsys.readouterr().err


def test_the_desktop_entry_starts_it() -> None:
    lines = (REPOSITORY / "desktop" / "qubes-restore-manager.desktop").read_text().splitlines()
    assert lines[0] == "[Desktop Entry]"
    entry = dict(line.split("=", 1) for line in lines[1:])
    assert entry["Name"] == "Restore Backup (isolated)"
    assert entry["Terminal"] == "false"
    command = REPOSITORY / "bin" / entry["Exec"]
    assert os.access(command, os.X_OK)
    assert "qubes_restore_svc.manager.launcher" in command.read_text()
