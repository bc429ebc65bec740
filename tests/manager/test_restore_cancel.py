import gc
import threading

import pytest
from qubesadmin import exc

from qubes_restore_svc.errors import (
    HostFailed,
)
from qubes_restore_svc.manager import restore
from tests.manager.adapters import QUBES, adapter, in_thread, joined
from tests.manager.script import (
    LONG_S,
    Script,
    ScriptedCall,
    begin,
    finish,
    until_cancelled,
)


def test_a_cancel_in_the_middle_ends_as_the_exception_that_the_dialog_catches() -> None:
    script = Script(QUBES[1:3], steps=[finish("work"), begin("vault"), until_cancelled])
    backup = adapter(script)
    info = backup.get_restore_info()
    thread, errors = in_thread(lambda: backup.restore_do(info))
    assert script.calls[0].confirmed.wait(LONG_S)
    backup.canceled = True
    assert joined(thread)
    assert backup.canceled
    assert isinstance(errors[0], exc.BackupCancelledError)
    assert isinstance(errors[0], restore.BackupCanceledError)
    assert "Restored: work." in str(errors[0])
    assert script.is_closed


def test_a_cancel_while_the_backup_is_opened_ends_that() -> None:
    script = Script(QUBES, hold_opening=True)
    backup = adapter(script)
    thread, errors = in_thread(backup.get_restore_info)
    assert script.opening.wait(LONG_S)
    backup.canceled = True
    assert joined(thread)
    assert isinstance(errors[0], exc.BackupCancelledError)


def test_what_was_cancelled_before_it_began_does_not_begin() -> None:
    script = Script(QUBES)
    backup = adapter(script)
    backup.canceled = True
    with pytest.raises(exc.BackupCancelledError):
        backup.get_restore_info()
    assert script.opens == []
    backup.canceled = False
    backup.get_restore_info()


def test_a_cancel_between_plan_and_restore_closes_the_call() -> None:
    script = Script(QUBES)
    backup = adapter(script)
    info = backup.get_restore_info()
    backup.canceled = True
    assert script.is_closed
    with pytest.raises(exc.BackupCancelledError):
        backup.restore_do(info)
    assert len(script.calls) == 1


def test_a_dialog_that_is_dropped_closes_the_call() -> None:
    script = Script(QUBES)
    backup = adapter(script)
    backup.get_restore_info()
    del backup
    gc.collect()
    assert script.is_closed


def test_the_next_backup_is_opened_when_the_one_before_is_closed() -> None:
    first, second = Script(QUBES, may_close=threading.Event()), Script(QUBES)
    backup, other = adapter(first), adapter(second)
    backup.get_restore_info()
    backup.close()  # returns, though it cannot be closed yet
    thread, errors = in_thread(other.get_restore_info)
    assert not second.opening.wait(0.05)
    assert first.may_close is not None
    first.may_close.set()
    assert joined(thread)
    assert (errors, second.opening.is_set(), first.is_closed) == ([], True, True)


def test_closing_during_a_restore_cancels_it() -> None:
    script = Script(QUBES[1:2], steps=[begin("work"), until_cancelled])
    backup = adapter(script)
    info = backup.get_restore_info()
    thread, errors = in_thread(lambda: backup.restore_do(info))
    assert script.calls[0].confirmed.wait(LONG_S)
    backup.close()
    assert joined(thread)
    assert isinstance(errors[0], exc.BackupCancelledError)


def test_one_restore_is_worked_on_by_one_thread() -> None:
    script = Script(QUBES[1:2], steps=[begin("work"), until_cancelled])
    backup = adapter(script)
    info = backup.get_restore_info()
    thread, _ = in_thread(lambda: backup.restore_do(info))
    assert script.calls[0].confirmed.wait(LONG_S)
    with pytest.raises(exc.QubesException, match="worked on already"):
        backup.get_restore_info()
    backup.canceled = True
    assert joined(thread)


def test_a_lost_connection_is_an_error_and_not_a_success() -> None:
    def lose(call: ScriptedCall) -> None:
        raise HostFailed("the call to dom0 ended without an answer", advice="Look there.")

    script = Script(QUBES[1:3], steps=[finish("work"), lose])
    backup = adapter(script)
    with pytest.raises(exc.QubesException, match=r"ended without an answer\. Look there\."):
        backup.restore_do(backup.get_restore_info())
    assert backup.report is None
    assert script.is_closed
