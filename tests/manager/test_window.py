import base64
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Never

import pytest
import qubesadmin
from qubesadmin.exc import QubesDaemonAccessError

from tests.manager import qt  # first: without Qt, all of this is skipped

from PyQt6.QtCore import QEvent, QLocale, QPoint, QRect, QSize, Qt, QTranslator  # isort: skip
from PyQt6.QtGui import QKeyEvent  # isort: skip
from PyQt6.QtWidgets import (
    QAbstractButton,
    QCheckBox,
    QComboBox,
    QLineEdit,
    QMessageBox,
    QToolButton,
    QWidget,
    QWizard,
)  # isort: skip

from qubesmanager import backup_utils  # isort: skip

from qubes_restore_svc.client.transports import QrexecTransport
from qubes_restore_svc.errors import (
    AuthenticationFailed,
    Cancelled,
    HostFailed,
    MissingDependency,
    NotGranted,
    QubeExists,
    RestoreError,
    WrongPassphrase,
)
from qubes_restore_svc.manager import call, restore
from qubes_restore_svc.manager import window as manager_window
from qubes_restore_svc.manager.window import IsolatedRestoreWindow
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import RefusedQube
from qubes_restore_svc.wire.models import ErrorInfo
from tests.emulation.small_system import small_system
from tests.manager.script import (
    LONG_S,
    Script,
    ScriptedCall,
    Step,
    begin,
    finish,
    qube,
    refused,
    result,
    undo_when,
    wait_for,
)

QUBES = (qube("debian-12", "TemplateVM"), qube("work"), qube("vault"))
FINISH, CANCEL = QWizard.WizardButton.FinishButton, QWizard.WizardButton.CancelButton
NEXT = QWizard.WizardButton.NextButton


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    played = Script(QUBES)
    monkeypatch.setattr(restore, "call_dom0", played)
    monkeypatch.setattr(sys, "argv", ["qubes-restore-manager", "--log", "INFO"])
    return played


@pytest.fixture
def choosers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """File selections that were opened; each is closed at once."""
    opened: list[tuple[bool, bool]] = []
    monkeypatch.setattr(backup_utils, "select_path_button_clicked", lambda _, *how: opened.append(how))
    return opened


@pytest.fixture
def large_letters() -> Iterator[None]:
    usual, large = qt.application().font(), qt.application().font()
    large.setPointSize(14)
    qt.application().setFont(large)
    yield
    qt.application().setFont(usual)


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts of message boxes that wait for a person; each is closed at once."""
    texts: list[str] = []
    monkeypatch.setattr(QMessageBox, "exec", lambda box: texts.append(box.text()))
    for name in ("warning", "information"):
        monkeypatch.setattr(QMessageBox, name, lambda *words: texts.append(words[-1]))
    return texts


@pytest.fixture
def window(script: Script, tmp_path: Path) -> Iterator[IsolatedRestoreWindow]:
    qt.application()
    logger = logging.getLogger("qubesadmin.backup")
    handlers = list(logger.handlers)
    backup = tmp_path / "backup"
    backup.touch()
    with small_system(tmp_path):
        shown = IsolatedRestoreWindow(qt.application(), qubesadmin.Qubes())
        hook = sys.excepthook
        shown.setup_application()
        sys.excepthook = hook  # that of the tests
        shown.show()
        shown.dir_line_edit.setText(str(backup))
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
    """Through the wizard up to the restore, or to where it does not go on."""
    press_button(window, NEXT)
    select(window, *names)
    press_button(window, NEXT)
    press_button(window, NEXT)


def select(window: IsolatedRestoreWindow, *names: str) -> None:
    """What the person does on the second page."""
    available = window.select_vms_widget.available_list
    available.clearSelection()
    for name in names:
        (item,) = available.findItems(name, Qt.MatchFlag.MatchExactly)
        item.setSelected(True)
    window.select_vms_widget.add_selected_button.click()


def enabled(window: IsolatedRestoreWindow, which: QWizard.WizardButton) -> bool:
    button = window.button(which)
    return button is not None and button.isEnabled()


def type_in(widget: QWidget, text: str) -> None:
    for letter in text:
        key = Qt.Key.Key_Return if letter == "\r" else Qt.Key.Key_A
        kind, no_modifier = QEvent.Type.KeyPress, Qt.KeyboardModifier.NoModifier
        qt.application().sendEvent(widget, QKeyEvent(kind, key.value, no_modifier, letter))


def why_not(window: IsolatedRestoreWindow) -> str:
    """The line above the buttons."""
    return "".join(line.text() for line in window._why_not.values() if line.isVisible())


def press_button(window: IsolatedRestoreWindow, which: QWizard.WizardButton) -> None:
    button = window.button(which)
    assert button is not None
    button.click()


def is_over(window: IsolatedRestoreWindow) -> bool:
    return window.progress_page.is_over and enabled(window, FINISH) and not enabled(window, CANCEL)


def question(window: IsolatedRestoreWindow) -> QMessageBox:
    boxes = [box for box in window.findChildren(QMessageBox) if box.isVisible()]
    assert len(boxes) == 1
    return boxes[0]


def answer(window: IsolatedRestoreWindow, text: str) -> None:
    buttons = question(window).buttons()
    next(button for button in buttons if button.text() == text).click()


def press(widget: QWidget, key: Qt.Key) -> None:
    for kind in (QEvent.Type.KeyPress, QEvent.Type.KeyRelease):
        event = QKeyEvent(kind, key.value, Qt.KeyboardModifier.NoModifier)
        qt.application().sendEvent(widget, event)


def held(at: str = "work") -> tuple[threading.Event, list[Step]]:
    """Steps that wait in a qube until the event is set or it is cancelled, and then for the event."""
    undone = threading.Event()
    return undone, [undo_when(undone, at)]


def test_a_restore_goes_through_the_wizard_and_its_result_stands(
    window: IsolatedRestoreWindow, script: Script, told: list[str]
) -> None:
    mac = AuthenticationFailed("the MAC does not match")
    script.steps = [finish("work", mac), finish("vault")]
    window.next()
    assert (window.select_vms_widget.available_list.count(), script.opens[0].location.text) == (
        3,
        window.dir_line_edit.text(),
    )
    select(window, "work", "vault")
    window.next()
    assert "vault\tWill be restored. Template: debian-12." in window.choices.as_text()
    window.next()
    qt.until(lambda: is_over(window))
    assert script.chosen[-1].names == ("work", "vault")
    assert window.progress_page.headline.text() == "1 of 2 qubes restored"
    failed = "work: not restored. The MAC does not match."
    qt.until(lambda: failed in window.commit_text_edit.toPlainText())
    everything = window.commit_text_edit.toPlainText() + window.progress_page.table.as_text()
    assert "QubesIncoming" not in everything
    assert not window.progress_bar.isVisible()
    assert told == []


def test_the_dialogs_own_options_arrive(window: IsolatedRestoreWindow, script: Script) -> None:
    window.verify_only.setChecked(True)
    window.ignore_uname_mismatch.setChecked(True)
    window.passphrase_line_edit.setText("secret")
    window.next()
    opened = script.opens[0]
    assert (opened.mode, opened.choice.ignore_username_mismatch) == ("verify", True)
    assert opened.passphrase.get_secret_value() == "secret"


def test_a_wrong_passphrase_leads_back_to_the_passphrase_and_to_nothing_else(
    window: IsolatedRestoreWindow, script: Script, told: list[str]
) -> None:
    place = window.dir_line_edit.text()
    window.passphrase_line_edit.setText("wrong")
    script.refusal = WrongPassphrase("the passphrase does not open it")
    window.next()
    assert window.currentPage() is window.select_dir_page
    assert told == [
        "The backup cannot be opened.\n\nThe passphrase does not open it. Check the keyboard layout and Caps"
        " Lock, and try again."
    ]
    qt.until(lambda: window.focusWidget() is window.passphrase_line_edit)
    assert window.passphrase_line_edit.selectedText() == "wrong"
    assert window.dir_line_edit.text() == place
    script.refusal = None
    press(window.passphrase_line_edit, Qt.Key.Key_Return)
    assert len(script.opens) == 2
    assert window.select_vms_widget.available_list.count() == 3


@pytest.mark.parametrize("page", ["selection", "summary"])
def test_a_cancel_while_the_backup_is_asked_is_no_error(
    window: IsolatedRestoreWindow, script: Script, told: list[str], page: str
) -> None:
    if page == "summary":
        window.next()
        select(window, "work")
        assert window.backup_restore is not None
        window.backup_restore.close()  # it is opened anew
    script.hold_opening = True
    script.opening.clear()

    def cancel() -> None:
        assert script.opening.wait(LONG_S)
        assert window.backup_restore is not None
        window.backup_restore.canceled = True

    canceller = threading.Thread(target=cancel)
    canceller.start()
    window.next()
    canceller.join()
    assert told == []
    assert window.currentPage() is window.select_dir_page
    script.hold_opening = False
    window.next()
    assert window.select_vms_widget.available_list.count() == 3


def test_a_cancel_that_came_from_dom0_is_told(
    window: IsolatedRestoreWindow, script: Script, told: list[str]
) -> None:
    script.refusal = Cancelled("somebody in dom0 said no", advice="")
    window.next()
    assert told == ["The backup was not opened.\n\nSomebody in dom0 said no."]


def test_what_a_qube_is_can_be_seen_where_it_is_selected(
    window: IsolatedRestoreWindow, script: Script
) -> None:
    window.next()
    item = window.select_vms_widget.available_list.item(1)
    assert item is not None
    assert (item.text(), item.toolTip()) == (
        "work",
        "AppVM, red\nSize in the backup: 100 MiB\nTemplate: debian-12",
    )


def test_a_page_says_why_there_is_no_going_on(window: IsolatedRestoreWindow, script: Script) -> None:
    missing = RestoreError("its template is nowhere", advice="")
    script.qubes = (qube("work"), refused(qube("vault"), "missing-template", missing))
    place = window.dir_line_edit.text()
    for path, told in (
        ("", "choose the file"),
        (place + "x", "There is no file"),
        (str(Path(place).parent), "is a directory"),
        (place, ""),
    ):
        window.dir_line_edit.setText(path)
        assert told in why_not(window)
        assert bool(why_not(window)) == bool(told) != enabled(window, NEXT)
    window.next()
    assert "list on the right" in why_not(window)
    select(window, "work", "vault")
    assert why_not(window) == ""
    window.next()
    assert why_not(window).startswith("This does not fit yet: vault.")
    assert not enabled(window, NEXT)


def test_a_qube_that_cannot_be_restored_at_all_is_told_where_qubes_are_selected(
    window: IsolatedRestoreWindow, script: Script
) -> None:
    error = ErrorInfo.of(RestoreError("its label is malformed"))
    script.unlisted = (RefusedQube(name="<b>odd</b>", error=error),)
    window.next()
    select(window, "work")
    assert why_not(window) == "Cannot be listed: ‹b›odd‹/b›: Its label is malformed."
    assert enabled(window, NEXT)


def test_a_qube_that_is_gone_is_told(window: IsolatedRestoreWindow, script: Script, told: list[str]) -> None:
    window.appvm_combobox.addItem("sys-gone")
    window.appvm_combobox.setCurrentIndex(window.appvm_combobox.count() - 1)
    window.next()
    assert told == ["The backup cannot be opened.\n\nThe qube that holds the backup is not there any more."]
    assert (window.currentPage() is window.select_dir_page, script.opens) == (True, [])


def test_another_qube_has_other_files(window: IsolatedRestoreWindow, script: Script) -> None:
    window.dir_line_edit.setText("/nowhere/backup")
    assert not enabled(window, NEXT)
    window.appvm_combobox.addItem("sys-usb")
    window.appvm_combobox.setCurrentIndex(window.appvm_combobox.count() - 1)
    assert enabled(window, NEXT)


def test_tab_goes_on_from_everything_that_shows_text(window: IsolatedRestoreWindow, script: Script) -> None:
    script.steps = [finish("work")]
    window.next()
    select(window, "work")
    window.next()
    leaves(window.choices)
    window.next()
    qt.until(lambda: is_over(window))
    leaves(window.progress_page.table)
    leaves(window.commit_text_edit)


def leaves(widget: QWidget) -> None:
    widget.setFocus()
    press(widget, Qt.Key.Key_Tab)
    assert not widget.hasFocus()


def test_with_large_letters_on_a_small_screen_everything_can_be_reached(
    large_letters: None, window: IsolatedRestoreWindow, script: Script
) -> None:
    script.steps = [finish("work", RestoreError("its image is damaged", advice="Look for another copy."))]
    script.offers = c.Offers(settings=("property:autostart", "property:kernelopts", "device:pci"))
    steps: tuple[Callable[[], object], ...] = (
        lambda: window.next(),
        lambda: select(window, "work"),
        lambda: window.next(),
        lambda: window.next(),
        lambda: qt.until(lambda: is_over(window)),
    )
    screen = window.screen()
    assert screen is not None
    for step in steps:
        qt.process_events()
        assert screen.availableGeometry().contains(QRect(QPoint(), window.frameSize()))
        window.resize(window.size().boundedTo(QSize(1024, 700)))
        qt.process_events()
        assert window.height() <= 700
        for part in (part for part in window.findChildren(QAbstractButton) if part.isVisible()):
            assert window.rect().contains(QRect(part.mapTo(window, QPoint()), part.size()))
            if part.text() and not isinstance(part, QToolButton):
                assert part.width() >= part.minimumSizeHint().width(), part.text()
        step()


def test_without_a_way_to_dom0_the_backup_is_not_opened_and_it_is_said(
    window: IsolatedRestoreWindow, told: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(restore, "call_dom0", call.call_dom0)
    monkeypatch.setattr(call, "system_transport", lambda: QrexecTransport(program=str(tmp_path / "none")))
    window.next()
    assert window.currentPage() is window.select_dir_page
    assert told[0].startswith("The backup cannot be opened.\n\n")
    assert f"{tmp_path}/none" in told[0]


def test_a_translation_that_was_put_there_is_used(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "qubes-restore-manager_de.qm").write_bytes(base64.b64decode(GERMAN))
    monkeypatch.setattr(manager_window, "TRANSLATIONS", str(tmp_path))
    usual = QLocale()
    QLocale.setDefault(QLocale("de_DE"))
    application = qt.application()
    try:
        with small_system(tmp_path / "system"):
            shown = IsolatedRestoreWindow(application, qubesadmin.Qubes())
        assert shown.windowTitle() == "Sicherung"
        shown.done(0)
    finally:
        QLocale.setDefault(usual)
        for translator in application.findChildren(QTranslator):
            application.removeTranslator(translator)


def test_a_mistake_of_ours_is_told_in_a_sentence_and_not_blamed_on_qubes_manager(
    window: IsolatedRestoreWindow, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "__excepthook__", lambda *_: None)
    hook = sys.excepthook
    window.setup_application()
    try:
        sys.excepthook(ZeroDivisionError, ZeroDivisionError("<b>x</b>"), None)
    finally:
        sys.excepthook = hook
    assert told == [
        "Something went wrong in this dialog.\n\nSomething failed that must not fail (ZeroDivisionError)."
        " This is a mistake of the program; please report it."
    ]


#: "Restore Backup (isolated)" is "Sicherung", as lrelease writes it.
GERMAN = (
    "PLhkGMrvnJXNIRy/YKG93acAAAACZGVCAAAACAeI6xkAAAAAaQAAAEcDAAAAEgBTAGkAYwBoAGUAcgB1AG4AZwgAAAAABgAAABlS"
    "ZXN0b3JlIEJhY2t1cCAoaXNvbGF0ZWQpBwAAAAdSZXN0b3JlAYgAAAACAQE="
)
TAKEN = QubeExists("a qube of this name is here", advice="Use --name work=NAME.")
LACKING = MissingDependency("its template is nowhere", advice="Use --template.")


def test_what_does_not_fit_is_settled_in_the_summary(window: IsolatedRestoreWindow, script: Script) -> None:
    taken = refused(qube("work"), "already-exists", TAKEN)
    lacking = refused(qube("vault"), "missing-template", LACKING)
    script.qubes = (
        qube("debian-12", "TemplateVM"),
        taken.model_copy(update={"settled_by": ("new-name", "leave-out")}),
        lacking.model_copy(update={"settled_by": ("template", "netvm", "leave-out")}),
    )
    script.offers = c.Offers(templates=("fedora-41", "debian-13"), netvms=("sys-firewall",))
    script.steps = [finish("work-2"), finish("vault")]
    start(window, "work", "vault", "debian-12")
    assert window.currentPage() is window.confirm_page  # Next was grey
    table = window.choices
    assert table.as_text().splitlines() == [
        "work\tA qube of this name is here. Give it another name, or leave it out.",
        "vault\tIts template is nowhere. Choose a template, or choose a net qube, or leave it out.",
        "debian-12\tWill be restored.",
    ]
    (name,) = table.findChildren(QLineEdit)
    template, netvm = table.findChildren(QComboBox)
    assert [box.itemText(1) for box in (template, netvm)] == ["fedora-41", "(no network)"]
    qt.process_events()
    for field in (name, template, netvm):
        cell = field.parentWidget()
        assert cell is not None and cell.rect().contains(field.geometry())  # nothing is cut off
        assert cell.width() <= table.columnWidth(1)
    name.setFocus()
    type_in(name, "work 2-dm")  # the blank is not taken
    assert not enabled(window, NEXT)
    qt.until(lambda: "No qube can have the name “work2-dm”" in why_not(window))
    name.selectAll()
    type_in(name, "work-2")
    choose(template, "debian-13")
    choose(netvm, "(no network)")
    qt.until(lambda: enabled(window, NEXT))
    chosen = {one.name: one for one in script.chosen[-1].qubes}
    assert chosen["work"].new_name == "work-2"
    assert (chosen["vault"].template, chosen["vault"].netvm) == ("debian-13", "")
    window.next()
    qt.until(lambda: is_over(window))
    assert script.calls[0].confirmed.is_set()
    qt.until(lambda: "Restoring work-2 (was work)…" in window.commit_text_edit.toPlainText())


def test_who_goes_back_finds_again_what_was_selected_and_chosen(
    window: IsolatedRestoreWindow, script: Script
) -> None:
    lacking = refused(qube("vault"), "missing-template", LACKING)
    renamed = qube("work").model_copy(update={"new_name": "work-1"})
    script.qubes = (renamed, lacking.model_copy(update={"settled_by": ("template", "netvm")}))
    script.offers = c.Offers(templates=("fedora-41", "debian-13"), netvms=("sys-firewall",))
    start(window, "work", "vault")
    template, netvm = window.choices.findChildren(QComboBox)
    choose(template, "debian-13")
    choose(netvm, "sys-firewall")
    qt.until(lambda: enabled(window, NEXT))
    window.back()
    window.back()
    assert window.currentPage() is window.select_dir_page
    press_button(window, NEXT)
    assert window.select_vms_widget.selected_list.count() == 2
    press_button(window, NEXT)
    assert len(script.opens) == 1
    qt.process_events()
    boxes = [box for box in window.choices.findChildren(QComboBox) if box.isVisible()]
    assert [box.currentText() for box in boxes] == ["debian-13", "sys-firewall"]
    (name,) = (edit for edit in window.choices.findChildren(QLineEdit) if edit.isVisible())
    type_in(name, "x")  # and what was chosen before stays
    qt.until(lambda: enabled(window, NEXT))
    chosen = {one.name: one for one in script.chosen[-1].qubes}
    assert (chosen["work"].new_name, chosen["vault"].template) == ("work-1x", "debian-13")
    window.back()
    window.back()
    window.passphrase_line_edit.setText("another")
    press_button(window, NEXT)
    assert (window.select_vms_widget.selected_list.count(), len(script.opens)) == (0, 2)


def choose(box: QComboBox, text: str) -> None:
    box.setCurrentText(text)
    box.activated.emit(box.currentIndex())


def start_with_settings(window: IsolatedRestoreWindow, script: Script) -> tuple[QComboBox, list[QCheckBox]]:
    """Up to the summary of a qube with settings that may be let in; the fields for that."""
    script.offers = c.Offers(settings=("property:autostart", "device:pci"))
    press_button(window, NEXT)
    select(window, "work")
    press_button(window, NEXT)
    qt.process_events()
    (pools,) = window.common_choices.findChildren(QComboBox)
    return pools, window.common_choices.findChildren(QCheckBox)


def test_pool_and_settings_of_one_restore_are_chosen_in_the_summary(
    window: IsolatedRestoreWindow, script: Script
) -> None:
    pools, boxes = start_with_settings(window, script)
    names = [pools.itemText(row) for row in range(pools.count())]
    assert names[0] == "as dom0's configuration says"
    assert sorted(names[1:]) == ["lvm", "varlibqubes", "vm-pool"]  # the one of kernels takes nothing else
    assert [box.text() for box in boxes] == ["property autostart", "device pci"]
    assert (script.chosen[-1].pool, script.chosen[-1].allow) == (None, ())
    choose(pools, "lvm")
    script.offers = c.Offers(settings=("device:pci",))  # the other one does not stay behind any more
    boxes[0].click()
    assert not enabled(window, NEXT)
    qt.until(lambda: enabled(window, NEXT))
    assert (script.chosen[-1].pool, script.chosen[-1].allow) == ("lvm", ("property:autostart",))
    window.back()
    press_button(window, NEXT)
    qt.process_events()
    again = [box for box in window.common_choices.findChildren(QCheckBox) if box.isVisible()]
    assert (pools.currentText(), [box.isChecked() for box in again]) == ("lvm", [True, False])
    again[0].click()
    qt.until(lambda: enabled(window, NEXT))
    press_button(window, NEXT)
    qt.until(lambda: is_over(window))
    assert (script.chosen[-1].pool, script.chosen[-1].allow) == ("lvm", ())


def test_tab_leads_through_the_summary_from_above_to_below(
    window: IsolatedRestoreWindow, script: Script
) -> None:
    pools, boxes = start_with_settings(window, script)
    window.choices.setFocus()
    reached: list[QWidget | None] = []
    for _ in range(4):
        press(window.focusWidget() or window, Qt.Key.Key_Tab)
        reached.append(window.focusWidget())
    assert reached == [pools, *boxes, window.button(QWizard.WizardButton.BackButton)]


def test_what_there_is_nothing_to_choose_from_does_not_show(
    window: IsolatedRestoreWindow, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools, _ = start_with_settings(window, script)
    assert pools.isVisible()
    window.back()
    window.back()
    window.verify_only.setChecked(True)
    press_button(window, NEXT)
    press_button(window, NEXT)
    assert window.currentPage() is window.confirm_page
    assert not window.common_choices.isVisible()
    window.back()
    window.back()
    window.verify_only.setChecked(False)
    monkeypatch.setattr(type(window.qubes_app), "pools", property(denied), raising=False)
    script.offers = c.Offers()
    window.passphrase_line_edit.setText("another")
    press_button(window, NEXT)
    select(window, "work")
    press_button(window, NEXT)
    assert not window.common_choices.isVisible()


def denied(_: object) -> None:
    raise QubesDaemonAccessError("Got empty response from qubesd")


def test_a_choice_that_dom0_refuses_is_taken_back_so_that_it_can_be_opened_again(
    window: IsolatedRestoreWindow, script: Script, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools, _ = start_with_settings(window, script)
    error = NotGranted("sys-gui may not have qubes restored to lvm", advice="Ask.")
    monkeypatch.setattr(ScriptedCall, "choose", lambda *_: refuse(error))
    choose(pools, "lvm")
    qt.until(lambda: bool(told))
    assert window.currentPage() is window.select_dir_page
    monkeypatch.undo()
    monkeypatch.setattr(restore, "call_dom0", script)
    press_button(window, NEXT)
    assert script.opens[-1].choice.pool is None
    assert window.select_vms_widget.selected_list.count() == 1


def test_what_is_beyond_the_administrators_limits_does_not_begin(
    window: IsolatedRestoreWindow, script: Script
) -> None:
    script.limit = 1
    start(window, "work", "vault")
    assert window.currentPage() is window.confirm_page
    assert why_not(window) == "2 qubes are to be restored. Restore fewer."
    window.back()
    selected = window.select_vms_widget.selected_list
    selected.setCurrentItem(selected.item(0))
    window.select_vms_widget.remove_selected_button.click()
    press_button(window, NEXT)
    assert (why_not(window), enabled(window, NEXT)) == ("", True)


def refuse(error: RestoreError) -> Never:
    raise error


def test_return_in_a_name_does_not_go_on_with_the_old_one(
    window: IsolatedRestoreWindow, script: Script
) -> None:
    script.qubes = (qube("work").model_copy(update={"new_name": "work-1"}),)
    window.next()
    select(window, "work")
    window.next()
    (name,) = window.choices.findChildren(QLineEdit)
    assert name.text() == "work-1"
    type_in(name, "x\r")
    assert window.currentPage() is window.confirm_page
    qt.until(lambda: enabled(window, NEXT))
    assert [one.new_name for one in script.chosen[-1].qubes] == ["work-1x"]


def test_what_the_configuration_leaves_behind_is_in_the_summary_and_in_the_result(
    window: IsolatedRestoreWindow, script: Script
) -> None:
    behind = {"settings_left_out": ("property autostart",)}
    script.qubes = (qube("work").model_copy(update=behind),)
    script.steps = [lambda call: call.results.append(result("work").model_copy(update=behind))]
    window.next()
    select(window, "work")
    window.next()
    told = "These settings stay behind, as dom0's configuration says: property autostart."
    assert told in window.choices.as_text()
    window.next()
    qt.until(lambda: is_over(window))
    assert told in window.progress_page.table.as_text()


def test_in_a_gui_domain_what_can_be_chosen_is_looked_up(
    window: IsolatedRestoreWindow, script: Script
) -> None:
    lacking = refused(qube("work"), "missing-template", LACKING)
    script.qubes = (lacking.model_copy(update={"settled_by": ("template",)}),)
    start(window, "work")
    (box,) = window.choices.findChildren(QComboBox)
    assert [box.itemText(row) for row in range(box.count())] == ["choose a template…", "fedora"]


def test_an_error_on_the_summary_is_told_and_leads_back(
    window: IsolatedRestoreWindow, script: Script, told: list[str]
) -> None:
    window.next()
    select(window, "work")
    assert window.backup_restore is not None
    window.backup_restore.close()
    script.refusal = HostFailed("dom0 is busy", advice="Wait.")
    window.next()
    assert window.currentPage() is window.select_vms_page
    assert told == ["The backup cannot be restored like this.\n\nDom0 is busy. Wait."]


def test_a_cancel_is_asked_for_and_said_at_once(window: IsolatedRestoreWindow, script: Script) -> None:
    undone, script.steps = held()
    start(window, "work", "vault")
    assert script.calls[0].confirmed.wait(LONG_S)
    press_button(window, CANCEL)
    assert not script.calls[0].cancelled.is_set()
    answer(window, "Cancel the restore")
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


ENDINGS: dict[str, Callable[[IsolatedRestoreWindow], object]] = {
    "Escape": lambda window: press(window, Qt.Key.Key_Escape),
    "Cancel": lambda window: press_button(window, CANCEL),
    "X": lambda window: window.close(),
}


@pytest.mark.parametrize("end", ENDINGS.values(), ids=ENDINGS)
def test_the_question_can_be_answered_with_no(
    window: IsolatedRestoreWindow, script: Script, end: Callable[[IsolatedRestoreWindow], object]
) -> None:
    go_on = threading.Event()
    script.steps = [begin("work"), wait_for(go_on), finish("work")]
    start(window, "work")
    assert script.calls[0].confirmed.wait(LONG_S)
    end(window)
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


@pytest.mark.parametrize("ticked", [True, False])
def test_the_file_selection_to_unmount_comes_when_the_result_has_been_seen(
    window: IsolatedRestoreWindow,
    script: Script,
    choosers: list[tuple[bool, bool]],
    tmp_path: Path,
    ticked: bool,
) -> None:
    script.steps = [finish("work")]
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "backup").touch()
    window.dir_line_edit.setText(str(tmp_path / "media" / "backup"))
    start(window, "work")
    assert window.showFileDialog.isChecked()
    qt.until(lambda: is_over(window))
    assert choosers == []
    assert window.showFileDialog.isEnabled()
    window.showFileDialog.setChecked(ticked)
    press_button(window, FINISH)
    assert choosers == ([(False, True)] if ticked else [])
    assert not window.isVisible()


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
