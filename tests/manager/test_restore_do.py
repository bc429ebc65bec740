import logging

import pytest
from qubesadmin import exc

from qubes_restore_svc.errors import (
    HostFailed,
    MissingDependency,
    NotGranted,
    RestoreError,
    WrongPassphrase,
)
from tests.manager.adapters import MAC, QUBES, adapter
from tests.manager.script import (
    Script,
    ScriptedCall,
    finish,
    move,
    qube,
    refused,
)


def test_a_restore_that_brings_everything_returns(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qubesadmin.backup")
    script = Script(QUBES[1:3], steps=[finish("work"), finish("vault")])
    with adapter(script) as backup:
        info = backup.restore_info_verify(backup.get_restore_info())
        backup.restore_do(info)
        assert backup.report is not None and backup.report.status == 0
    assert len(script.chosen) == 1  # what was shown is what was confirmed
    assert script.is_closed
    told = [record.getMessage() for record in caplog.records if record.name == "qubesadmin.backup"]
    assert told == ["Restoring work…", "work: restored", "Restoring vault…", "vault: restored", "Done."]


def test_a_partial_failure_raises_and_says_which_and_why(caplog: pytest.LogCaptureFixture) -> None:
    script = Script(QUBES[1:3], steps=[finish("work", MAC), finish("vault")])
    backup = adapter(script)
    with pytest.raises(exc.QubesException) as caught:
        backup.restore_do(backup.get_restore_info())
    assert not isinstance(caught.value, exc.BackupCancelledError)
    assert str(caught.value).splitlines() == [
        "1 of 2 qubes restored.",
        "Restored: vault.",
        "Not restored: work. Private volume, chunk 3: the MAC does not match."
        " The backup was damaged or tampered with here; look for another copy.",
    ]
    assert [record.levelname for record in caplog.records if "not restored" in record.message] == ["ERROR"]


def test_verify_does_not_report_success_over_a_damaged_qube() -> None:
    script = Script(QUBES[1:3], steps=[finish("work", MAC), finish("vault")])
    backup = adapter(script)
    backup.options.verify_only = True
    with pytest.raises(exc.QubesException, match=r"1 of 2 qubes verified(.|\n)*Failed: work"):
        backup.restore_do(backup.get_restore_info())
    assert script.opens[0].mode == "verify"


def test_a_qube_that_does_not_fit_is_left_out_and_that_is_told(caplog: pytest.LogCaptureFixture) -> None:
    lab = refused(qube("lab"), "missing-template", MissingDependency("its template is nowhere"))
    script = Script([qube("work"), lab], steps=[finish("work")])
    backup = adapter(script)
    backup.restore_do(backup.get_restore_info())
    assert script.chosen[-1].names == ("work",)
    assert "lab: left out. Its template is nowhere." in caplog.text
    assert "--ignore-missing" not in caplog.text


def test_what_has_changed_since_it_was_shown_is_not_done() -> None:
    script = Script(QUBES[1:3])
    backup = adapter(script)
    info = backup.get_restore_info()
    del info["vault"]
    script.qubes = [qube("work").model_copy(update={"new_name": "work-1"}), qube("vault")]
    with pytest.raises(exc.QubesException, match="work has changed since it was shown"):
        backup.restore_do(info)
    assert not script.calls[0].confirmed.is_set()
    assert script.is_closed


def test_an_info_of_another_backup_is_refused() -> None:
    info = adapter(Script(QUBES)).get_restore_info()
    other = adapter(Script([qube("mail")]))
    with pytest.raises(exc.QubesException, match="holds no qube named"):
        other.restore_do({"work": info["work"]})


@pytest.mark.parametrize(
    "error",
    [WrongPassphrase("the passphrase does not open it"), NotGranted("it may not", advice="Allow it: 100%."),
     HostFailed("100% d of nothing", advice="%s")],
)  # fmt: skip
def test_an_error_of_dom0_is_told_in_full(error: RestoreError) -> None:
    backup = adapter(Script(QUBES, refusal=error))
    with pytest.raises(exc.QubesException) as caught:
        backup.get_restore_info()
    assert error.reason[1:] in str(caught.value)
    assert error.advice in str(caught.value)
    assert "secret" not in str(caught.value)


def test_after_an_error_the_backup_can_be_opened_again() -> None:
    script = Script(QUBES, refusal=WrongPassphrase("no"))
    backup = adapter(script)
    with pytest.raises(exc.QubesException):
        backup.get_restore_info()
    script.refusal = None
    assert "work" in backup.get_restore_info()
    assert script.calls[0].closed.is_set()


def test_percents_rise_and_reach_the_end_only_there() -> None:
    seen: list[int] = []
    before_the_end: list[int] = []

    def note(call: ScriptedCall) -> None:
        before_the_end.extend(seen)

    moves = [move(percent) for percent in (None, 0, 10, 10, 5, 50, 99)]
    script = Script(QUBES[1:3], steps=[*moves, note, finish("work"), finish("vault")])
    backup = adapter(script)
    backup.progress_callback = seen.append
    backup.restore_do(backup.get_restore_info())
    assert before_the_end == [0, 10, 50, 99]
    assert seen == [0, 10, 50, 99, 100]
    assert all(type(percent) is int for percent in seen)


def test_a_display_that_fails_does_not_end_the_restore(caplog: pytest.LogCaptureFixture) -> None:
    def fail(percent: int) -> None:
        raise ZeroDivisionError

    script = Script(QUBES[1:2], steps=[move(1), finish("work")])
    backup = adapter(script)
    backup.progress_callback = fail
    backup.restore_do(backup.get_restore_info())
    assert "what shows the restore failed" in caplog.text
