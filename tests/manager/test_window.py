import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import qubesadmin

from tests.manager import qt  # first: without Qt, all of this is skipped

from PyQt6.QtCore import QEvent, Qt  # isort: skip
from PyQt6.QtGui import QKeyEvent  # isort: skip
from PyQt6.QtWidgets import QMessageBox, QWizard  # isort: skip
from qubesmanager import backup_utils  # isort: skip

from qubes_restore_svc.errors import AuthenticationFailed, HostFailed, WrongPassphrase
from qubes_restore_svc.manager import restore
from qubes_restore_svc.manager.window import IsolatedRestoreWindow
from tests.emulation.small_system import small_system
from tests.manager.script import LONG_S, Script, Step, begin, finish, qube, undo_when, wait_for

QUBES = (qube("debian-12", "TemplateVM"), qube("work"), qube("vault"))
FINISH, CANCEL = QWizard.WizardButton.FinishButton, QWizard.WizardButton.CancelButton


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    played = Script(QUBES)
    monkeypatch.setattr(restore, "call_dom0", played)
    backup_utils.asked.clear()
    return played


@pytest.fixture
def window(script: Script, tmp_path: Path) -> Iterator[IsolatedRestoreWindow]:
    qt.application()
    logger = logging.getLogger("qubesadmin.backup")
    handlers = list(logger.handlers)
    with small_system(tmp_path):
        shown = IsolatedRestoreWindow(qt.application(), qubesadmin.Qubes())
        shown.setup_application()
        shown.show()
        shown.dir_line_edit.setText("/home/user/backup")
        yield shown
        if shown.backup_restore is not None:
            shown.backup_restore.canceled = True
        if shown.thread is not None:
            shown.thread.wait()
        shown.done(0)
        shown.deleteLater()
        qt.process_events()
    logger.handlers[:] = handlers


def start(window: IsolatedRestoreWindow, *names: str) -> None:
    """Through the wizard up to the restore."""
    window.next()
    window.select(*names)
    window.next()
    window.next()


def enabled(window: IsolatedRestoreWindow, which: QWizard.WizardButton) -> bool:
    button = window.button(which)
    return button is not None and button.isEnabled()


def is_over(window: IsolatedRestoreWindow) -> bool:
    return window.progress_page.is_over and enabled(window, FINISH) and not enabled(window, CANCEL)


def question(window: IsolatedRestoreWindow) -> QMessageBox:
    boxes = [box for box in window.findChildren(QMessageBox) if box.isVisible()]
    assert len(boxes) == 1
    return boxes[0]


def answer(window: IsolatedRestoreWindow, text: str) -> None:
    buttons = question(window).buttons()
    next(button for button in buttons if button.text() == text).click()


def press_escape(window: IsolatedRestoreWindow) -> None:
    kind, no_modifier = QEvent.Type.KeyPress, Qt.KeyboardModifier.NoModifier
    qt.application().sendEvent(window, QKeyEvent(kind, Qt.Key.Key_Escape.value, no_modifier))


def held(at: str = "work") -> tuple[threading.Event, list[Step]]:
    """Steps that wait in a qube until the event is set or it is cancelled, and then for the event."""
    undone = threading.Event()
    return undone, [begin(at), undo_when(undone)]


def test_a_restore_goes_through_the_wizard_and_its_result_stands(
    window: IsolatedRestoreWindow, script: Script
) -> None:
    mac = AuthenticationFailed("the MAC does not match")
    script.steps = [finish("work", mac), finish("vault")]
    window.next()
    assert (window.available_list.count(), script.opens[0].location.text) == (3, "/home/user/backup")
    window.select("work", "vault")
    window.next()
    assert "vault" in window.confirm_text_edit.toPlainText()
    window.next()
    qt.until(lambda: is_over(window))
    assert script.chosen[-1].names == ("work", "vault")
    assert window.progress_page.headline.text() == "1 of 2 qubes restored"
    assert "work: not restored. The MAC does not match." in window.commit_text_edit.toPlainText()
    everything = window.commit_text_edit.toPlainText() + window.progress_page.table.as_text()
    assert "QubesIncoming" not in everything
    assert not window.progress_bar.isVisible()
    assert backup_utils.asked == []


def test_the_dialogs_own_options_arrive(window: IsolatedRestoreWindow, script: Script) -> None:
    window.verify_only.setChecked(True)
    window.ignore_uname_mismatch.setChecked(True)
    window.passphrase_line_edit.setText("secret")
    window.next()
    opened = script.opens[0]
    assert (opened.mode, opened.choice.ignore_username_mismatch) == ("verify", True)
    assert opened.passphrase.get_secret_value() == "secret"


def test_a_wrong_passphrase_leads_back_to_the_first_page(
    window: IsolatedRestoreWindow, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    monkeypatch.setattr(QMessageBox, "warning", lambda *words: told.append(words[-1]))
    script.refusal = WrongPassphrase("the passphrase does not open it")
    window.next()
    assert window.currentPage() is window.select_dir_page
    assert told == [
        "The passphrase does not open it. Check the keyboard layout and Caps Lock, and try again."
    ]
    script.refusal = None
    window.next()
    assert window.available_list.count() == 3


def test_an_error_on_the_summary_is_told_and_leads_back(
    window: IsolatedRestoreWindow, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(QMessageBox, "exec", lambda box: told.append(box.text()))
    window.next()
    window.select("work")
    assert window.backup_restore is not None
    window.backup_restore.close()
    script.refusal = HostFailed("dom0 is busy", advice="Wait.")
    window.next()
    assert window.currentPage() is window.select_vms_page
    assert told == ["The backup cannot be restored like this.\n\nDom0 is busy. Wait."]


def test_the_lines_of_the_summary_are_not_broken(window: IsolatedRestoreWindow, script: Script) -> None:
    renamed = "will be renamed to 'work-1', and everything else that there is to say of it, in one line"
    script.qubes = (qube("work").model_copy(update={"notes": (renamed,)}),)
    window.next()
    window.select("work")
    window.next()
    qt.process_events()
    document = window.confirm_text_edit.document()
    assert document is not None
    block = document.begin()
    while block.isValid():
        layout = block.layout()
        assert layout is not None and layout.lineCount() <= 1, block.text()
        block = block.next()


def test_cancel_cancels_at_once_and_says_so(window: IsolatedRestoreWindow, script: Script) -> None:
    undone, script.steps = held()
    start(window, "work", "vault")
    assert script.calls[0].confirmed.wait(LONG_S)
    window.reject()
    assert script.calls[0].cancelled.is_set()
    qt.until(lambda: window.progress_page.headline.text() == "Cancelling…")
    assert not enabled(window, CANCEL)
    assert window.isVisible()
    undone.set()
    qt.until(lambda: is_over(window))
    assert window.progress_page.headline.text() == "Cancelled. No qube was restored"
    assert window.isVisible()


def test_closing_the_window_asks_and_waits_for_the_undoing(
    window: IsolatedRestoreWindow, script: Script
) -> None:
    undone, script.steps = held()
    start(window, "work")
    assert script.calls[0].confirmed.wait(LONG_S)
    window.close()
    assert window.isVisible()
    assert "still running" in question(window).text()
    answer(window, "Cancel the restore")
    assert script.calls[0].cancelled.is_set()
    window.close()
    qt.process_events()
    assert window.isVisible()  # until it is undone
    assert "being removed" in window.progress_page.doing.text()
    undone.set()
    qt.until(lambda: not window.isVisible())
    assert script.is_closed


def test_of_a_verification_it_is_asked_whether_to_cancel_that(
    window: IsolatedRestoreWindow, script: Script
) -> None:
    go_on = threading.Event()
    script.steps = [begin("work"), wait_for(go_on), finish("work")]
    window.verify_only.setChecked(True)
    start(window, "work")
    assert script.calls[0].confirmed.wait(LONG_S)
    window.close()
    assert "removed" not in question(window).text()
    answer(window, "Cancel the verification")
    go_on.set()
    qt.until(lambda: not window.isVisible())
    assert "removed" not in window.commit_text_edit.toPlainText()


@pytest.mark.parametrize("by_key", [False, True])
def test_the_question_can_be_answered_with_no(
    window: IsolatedRestoreWindow, script: Script, by_key: bool
) -> None:
    go_on = threading.Event()
    script.steps = [begin("work"), wait_for(go_on), finish("work")]
    start(window, "work")
    assert script.calls[0].confirmed.wait(LONG_S)
    if by_key:
        press_escape(window)
    else:
        window.close()
    answer(window, "Continue restoring")
    go_on.set()
    qt.until(lambda: is_over(window))
    assert not script.calls[0].cancelled.is_set()
    assert window.progress_page.headline.text() == "The qube was restored"
    assert window.isVisible()


def test_a_question_that_is_still_open_at_the_end_goes_away(
    window: IsolatedRestoreWindow, script: Script
) -> None:
    go_on = threading.Event()
    script.steps = [begin("work"), wait_for(go_on), finish("work")]
    start(window, "work")
    assert script.calls[0].confirmed.wait(LONG_S)
    window.close()
    assert question(window)
    go_on.set()
    qt.until(lambda: is_over(window))
    assert not any(box.isVisible() for box in window.findChildren(QMessageBox))
    assert not script.calls[0].cancelled.is_set()


def test_closing_the_window_before_the_restore_closes_the_call(
    window: IsolatedRestoreWindow, script: Script
) -> None:
    window.next()
    window.close()
    assert not window.isVisible()
    assert script.is_closed


def test_the_file_dialog_to_unmount_comes_if_it_was_asked_for(
    window: IsolatedRestoreWindow, script: Script
) -> None:
    script.steps = [finish("work")]
    window.showFileDialog.setChecked(True)
    start(window, "work")
    qt.until(lambda: backup_utils.asked == [(False, True)])
    assert "unmount" in window.commit_text_edit.toPlainText()


def test_what_is_logged_is_shown_as_it_is(window: IsolatedRestoreWindow) -> None:
    window.append_plain("<b>bold</b>", logging.ERROR)
    window.append_plain("plain")
    assert window.commit_text_edit.toPlainText() == "<b>bold</b>\nplain"


def test_dom0s_home_is_announced_only_if_it_comes(window: IsolatedRestoreWindow, script: Script) -> None:
    script.steps = [finish("work")]
    start(window, "work")
    qt.until(lambda: is_over(window))
    assert not window.dom0_restored_label.isVisible()
    assert "not unpacked" in window.dom0_restored_label.text()


def test_outside_dom0_the_first_place_is_called_by_its_name(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qt.application()
    with small_system(tmp_path):
        app = qubesadmin.Qubes()
        monkeypatch.setattr(type(app), "local_name", "work", raising=False)
        shown = IsolatedRestoreWindow(qt.application(), app)
        texts = [shown.appvm_combobox.itemText(row) for row in range(shown.appvm_combobox.count())]
        assert texts[0] == "work"
        assert texts.count("work") == 1
        shown.done(0)
