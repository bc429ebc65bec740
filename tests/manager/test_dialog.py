import gc
import threading

from qubes_restore_svc.errors import AuthenticationFailed, NotGranted, QubeExists, WrongPassphrase
from tests.manager import qt
from tests.manager.adapters import App
from tests.manager.script import (
    LONG_S,
    Script,
    begin,
    finish,
    move,
    qube,
    refused,
    undo_when,
    until_cancelled,
    wait_for,
)

from PyQt6.QtCore import QEvent, QPointF, Qt, QTimer  # isort: skip
from PyQt6.QtGui import QKeyEvent, QMouseEvent  # isort: skip
from PyQt6.QtWidgets import QApplication, QLineEdit, QProgressDialog, QPushButton  # isort: skip

from qubes_restore_svc.manager import qt_restore  # isort: skip
from qubes_restore_svc.manager.restore import BackupRestore  # isort: skip
from tests.manager.dialog import RestoreDialog  # isort: skip

QUBES = (qube("debian-12", "TemplateVM"), qube("work"), qube("vault"))


def dialog(script: Script, kind: type[BackupRestore] = BackupRestore) -> RestoreDialog:
    qt.application()
    shown = RestoreDialog(lambda: kind(App(), "/home/user/backup", None, "secret", open_call=script))
    shown.show()
    return shown


def test_a_restore_goes_through_the_dialog_to_its_end() -> None:
    script = Script(QUBES, steps=[finish("work"), finish("vault")])
    shown = dialog(script)
    assert shown.select()
    assert shown.available.count() == 3
    assert "vault" in shown.confirm("work", "vault")
    assert shown.can_go_on
    shown.commit()
    qt.until(lambda: shown.is_over)
    assert shown.message == "success"
    assert script.chosen[-1].names == ("work", "vault")
    qt.until(lambda: "vault: restored" in shown.messages.toPlainText())
    assert len(script.calls) == 1
    shown.close()


def test_a_partial_failure_is_no_success() -> None:
    mac = AuthenticationFailed("the MAC does not match")
    shown = dialog(Script(QUBES, steps=[finish("work", mac), finish("vault")]))
    assert shown.select()
    shown.confirm("work", "vault")
    shown.commit()
    qt.until(lambda: shown.is_over)
    assert shown.message.startswith("failed: 1 of 2 qubes restored.")
    assert "Not restored: work. The MAC does not match." in shown.message
    shown.close()


def test_verifying_goes_through_the_dialog() -> None:
    script = Script(QUBES, steps=[finish("work")])
    shown = dialog(script)
    assert shown.select(verify_only=True)
    shown.confirm("work")
    shown.commit()
    qt.until(lambda: shown.is_over)
    assert (shown.message, script.opens[0].mode) == ("success", "verify")
    shown.close()


def test_a_wrong_passphrase_and_a_refusal_are_told_and_another_try_works() -> None:
    script = Script(QUBES, refusal=WrongPassphrase("the passphrase does not open it"))
    shown = dialog(script)
    assert not shown.select()
    script.refusal = NotGranted("sys-gui may not restore", advice="Allow it in dom0.")
    assert not shown.select()
    script.refusal = None
    assert shown.select()
    assert shown.problems == [
        "The passphrase does not open it. Check the keyboard layout and Caps Lock, and try again.",
        "Sys-gui may not restore. Allow it in dom0.",
    ]
    shown.close()


def test_a_qube_that_does_not_fit_stops_the_dialog_until_it_is_left_out() -> None:
    there = refused(qube("work"), "already-exists", QubeExists("a qube of this name is there already"))
    shown = dialog(Script([there, qube("vault")]))
    assert shown.select()
    assert "A qube of this name is there already." in shown.confirm("work", "vault")
    assert not shown.can_go_on
    shown.confirm("vault")
    assert shown.can_go_on
    shown.close()


def test_a_cancel_in_the_middle_does_not_hold_the_window_up() -> None:
    undone = threading.Event()
    script = Script(QUBES, steps=[finish("work"), undo_when(undone, "vault")])
    shown = dialog(script)
    shown.select()
    shown.confirm("work", "vault")
    shown.commit()
    assert script.calls[0].confirmed.wait(LONG_S)
    shown.cancel()  # returns, though nothing has been undone yet
    assert script.calls[0].cancelled.is_set()
    assert not shown.is_over
    undone.set()
    qt.until(lambda: shown.is_over)
    assert shown.message.startswith("cancelled: ")
    shown.close()


def test_a_window_that_is_closed_in_the_middle_leaves_no_call() -> None:
    script = Script(QUBES, steps=[begin("work"), until_cancelled])
    shown = dialog(script)
    shown.select()
    shown.confirm("work")
    shown.commit()
    assert script.calls[0].confirmed.wait(LONG_S)
    shown.close()
    assert script.is_closed


def test_a_window_that_is_closed_before_the_restore_leaves_no_call() -> None:
    script = Script(QUBES)
    shown = dialog(script)
    shown.select()
    shown.close()
    gc.collect()
    assert script.is_closed


def test_percents_arrive_while_the_window_lives() -> None:
    seen: list[int] = []
    go_on = threading.Event()
    script = Script(QUBES, steps=[move(50), wait_for(go_on), finish("work")])
    shown = dialog(script)
    shown.select()
    shown.confirm("work")
    assert shown.backup is not None
    shown.backup.progress_callback = seen.append
    shown.commit()
    qt.until(lambda: seen == [50])
    go_on.set()
    qt.until(lambda: shown.is_over)
    assert seen == [50, 100]
    shown.close()


# --- The windows stay alive while the backup is opened ----------------------------------------------


def test_an_opening_can_be_waited_for_and_cancelled() -> None:
    script = Script(QUBES, hold_opening=True)
    shown = dialog(script, qt_restore.BackupRestore)
    texts: list[str] = []

    def press_cancel() -> None:
        windows = [window for window in QApplication.topLevelWidgets() if isinstance(window, QProgressDialog)]
        opening = [window for window in windows if window.isVisible()]
        if not opening:
            return
        timer.stop()
        texts.append(opening[0].labelText())
        opening[0].findChildren(QPushButton)[0].click()
        texts.append(opening[0].labelText())

    timer = QTimer()
    timer.timeout.connect(press_cancel)
    timer.start(20)
    assert not shown.select()
    assert "Opening the backup" in texts[0]
    assert "Cancelling" in texts[1]
    assert shown.problems == ["The call was cancelled."]
    shown.close()


def press(button: QPushButton) -> None:
    """With the mouse, and with the space bar."""
    left, none = Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier
    point = QPointF(button.rect().center())
    place = button.mapToGlobal(point)
    mouse = (QEvent.Type.MouseButtonPress, QEvent.Type.MouseButtonRelease)
    keys = (QEvent.Type.KeyPress, QEvent.Type.KeyRelease)
    for kind in mouse:
        qt.application().sendEvent(button, QMouseEvent(kind, point, place, left, left, none))
    for kind in keys:
        qt.application().sendEvent(button, QKeyEvent(kind, Qt.Key.Key_Space.value, none, " "))


def test_what_is_pressed_before_the_waiting_shows_does_not_reach_the_page_below() -> None:
    shown = dialog(Script(QUBES, hold_opening=True), qt_restore.BackupRestore)
    pressed: list[str] = []
    below = QPushButton("Next")
    below.clicked.connect(lambda: pressed.append("below"))
    below.show()
    press(below)
    assert pressed == ["below", "below"]

    def press_early() -> None:
        windows = [window for window in QApplication.topLevelWidgets() if isinstance(window, QProgressDialog)]
        assert not any(window.isVisible() for window in windows)
        press(below)
        seen.append(below.close())
        assert shown.backup is not None
        shown.backup.canceled = True

    seen: list[bool] = []
    QTimer.singleShot(0, press_early)
    assert not shown.select()
    assert (pressed, seen, below.isVisible()) == (["below", "below"], [False], True)
    press(below)
    assert len(pressed) == 4
    assert below.close()
    shown.close()


def test_letters_that_are_typed_before_the_waiting_shows_do_not_get_lost() -> None:
    shown = dialog(Script(QUBES, hold_opening=True), qt_restore.BackupRestore)
    typed, entered = QLineEdit(shown), list[str]()
    typed.returnPressed.connect(lambda: entered.append("return"))
    typed.show()
    typed.setFocus()
    qt.process_events()
    assert typed.hasFocus()

    def type_early() -> None:
        for text, modifier in (("a", none), ("B", Qt.KeyboardModifier.ShiftModifier), ("\r", none),
                               ("c", Qt.KeyboardModifier.AltModifier), ("", none)):  # fmt: skip
            key = Qt.Key.Key_Return if text == "\r" else Qt.Key.Key_A
            event = QKeyEvent(QEvent.Type.KeyPress, key.value, modifier, text)
            arrived.append(qt.application().sendEvent(typed, event) and event.type() is not None)
        assert shown.backup is not None
        shown.backup.canceled = True

    none, arrived = Qt.KeyboardModifier.NoModifier, list[bool]()
    QTimer.singleShot(0, type_early)
    assert not shown.select()
    assert (len(arrived), typed.text(), entered) == (5, "aB", [])
    shown.close()


def test_a_patient_adapter_brings_what_the_other_brings() -> None:
    script = Script(QUBES, steps=[finish("work")])
    shown = dialog(script, qt_restore.BackupRestore)
    assert shown.select()
    assert shown.confirm("work")
    shown.commit()
    qt.until(lambda: shown.is_over)
    assert shown.message == "success"
    shown.close()


def test_a_patient_adapter_raises_what_the_other_raises() -> None:
    shown = dialog(Script(QUBES, refusal=WrongPassphrase("no")), qt_restore.BackupRestore)
    assert not shown.select()
    assert shown.problems[0].startswith("No. Check")
    shown.close()
