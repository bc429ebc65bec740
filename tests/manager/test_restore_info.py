import pytest
from qubesadmin import exc

from qubes_restore_svc.errors import (
    MissingDependency,
    RestoreError,
)
from qubes_restore_svc.manager.restore import BackupRestore
from qubes_restore_svc.wire.messages import RefusedQube
from qubes_restore_svc.wire.models import ErrorInfo
from tests.manager.adapters import QUBES, App, Named, adapter
from tests.manager.script import (
    MIB,
    Script,
    qube,
    refused,
)


def test_the_info_has_an_entry_for_each_qube_as_the_stock_one() -> None:
    work = qube("work").model_copy(update={"netvm": "", "new_name": "work-1", "new_template": "fedora-41"})
    info = adapter(Script([work, *QUBES[2:]])).get_restore_info()
    assert list(info) == ["work", "vault", "dom0"]
    entry = info["work"]
    assert (entry.name, entry.template, entry.netvm, entry.good_to_go) == ("work-1", "fedora-41", None, True)
    assert (entry.vm.name, entry.vm.klass, entry.vm.template, entry.vm.label) == (
        "work", "AppVM", "debian-12", "red",
    )  # fmt: skip
    assert entry.orig_template == "debian-12"
    assert entry.vm.properties == {"netvm": None}
    assert info["vault"].vm.properties == {}
    assert (entry.size, entry.subdir) == (100 * MIB, "vm-work")
    assert isinstance(info["dom0"], BackupRestore.Dom0ToRestore)
    assert info["dom0"].username == "user"


@pytest.mark.parametrize(
    ("problem", "constant"),
    [
        ("already-exists", BackupRestore.VMToRestore.ALREADY_EXISTS),
        ("missing-template", BackupRestore.VMToRestore.MISSING_TEMPLATE),
        ("missing-netvm", BackupRestore.VMToRestore.MISSING_NETVM),
        ("username-mismatch", BackupRestore.Dom0ToRestore.USERNAME_MISMATCH),
        (None, BackupRestore.VMToRestore.REFUSED),
    ],
)
def test_a_qube_that_does_not_fit_has_the_stock_problem(problem: str, constant: object) -> None:
    broken = refused(qube("work"), problem, MissingDependency("it does not fit"))  # type: ignore[arg-type]
    entry = adapter(Script([broken])).get_restore_info()["work"]
    assert entry.problems == {constant}
    assert not entry.good_to_go


def test_an_excluded_qube_stays_in_the_info_with_its_problem() -> None:
    backup = adapter(Script(QUBES))
    backup.options.exclude.append("work")
    info = backup.get_restore_info()
    assert info["work"].problems == {BackupRestore.VMToRestore.EXCLUDED}
    assert info["vault"].good_to_go


def test_asking_twice_opens_the_backup_once() -> None:
    script = Script(QUBES)
    backup = adapter(script)
    backup.get_restore_info()
    backup.get_restore_info()
    assert (len(script.opens), len(script.chosen)) == (1, 1)


def test_options_between_two_questions_are_honoured() -> None:
    script = Script(QUBES)
    backup = adapter(script)
    backup.options.rename_conflicting = False
    backup.options.use_default_netvm = False
    backup.get_restore_info()
    assert (script.opens[0].choice.conflicts, script.opens[0].choice.missing) == ("refuse", "refuse")
    backup.options.rename_conflicting = True
    backup.options.use_default_netvm = True
    backup.options.ignore_username_mismatch = True
    backup.options.override_pool = "ssd"
    backup.get_restore_info()
    choice = script.chosen[0]
    assert choice.pool == "ssd"
    assert (choice.conflicts, choice.missing, choice.ignore_username_mismatch) == ("rename", "default", True)


@pytest.mark.parametrize(("name", "value"), [("verify_only", True), ("ignore_size_limit", True)])
def test_an_option_that_only_an_opening_can_say_opens_anew(name: str, value: object) -> None:
    script = Script(QUBES)
    backup = adapter(script)
    backup.get_restore_info()
    setattr(backup.options, name, value)
    backup.get_restore_info()
    assert len(script.opens) == 2
    assert script.calls[0].closed.is_set()
    assert not script.calls[1].closed.is_set()
    assert (script.opens[1].mode, script.opens[1].ignore_size_limit) in (
        ("verify", False), ("restore", True),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("vm", "here", "expected"),
    [
        (None, "dom0", None),
        ("dom0", "dom0", None),
        ("sys-usb", "dom0", "sys-usb"),
        (None, "sys-gui", None),
        ("sys-gui", "sys-gui", None),
        ("dom0", "sys-gui", "dom0"),
        ("sys-usb", "sys-gui", "sys-usb"),
    ],
)
def test_the_backup_is_looked_for_where_it_was_said(vm: str | None, here: str, expected: str | None) -> None:
    script = Script(QUBES)
    adapter(script, vm, here).get_restore_info()
    assert script.opens[0].location.qube == expected
    assert script.opens[0].passphrase.get_secret_value() == "secret"


def test_everything_that_the_stock_constructor_takes_arrives() -> None:
    script = Script(QUBES)
    backup = BackupRestore(
        App(),
        "backup.Service",
        Named("nas"),
        "secret",
        location_is_service=True,
        force_compression_filter="zstd",
        tmpdir="/var/tmp",
        open_call=script,
    )
    backup.get_restore_info()
    assert script.opens[0].location.service
    assert script.opens[0].compression_filter == "zstd"
    assert backup.header_data is not None
    assert (backup.header_data.version, backup.header_data.backup_id) == (4, "20261123T140559-1234")


@pytest.mark.parametrize(
    ("location", "vm", "passphrase", "word"),
    [("", None, "x", "location"), ("a\nb", None, "x", "location"), ("/a", "-x", "x", "qube"),
     ("/a", None, "x" * 5000, "passphrase")],
)  # fmt: skip
def test_what_no_call_can_say_is_a_clear_error(
    location: str, vm: str | None, passphrase: str, word: str
) -> None:
    script = Script(QUBES)
    backup = BackupRestore(App(), location, vm and Named(vm), passphrase, open_call=script)  # type: ignore[arg-type]
    with pytest.raises(exc.QubesException, match=word) as caught:
        backup.get_restore_info()
    assert script.opens == []
    assert passphrase not in str(caught.value) or len(passphrase) == 1


def test_an_option_that_cannot_be_honoured_is_refused() -> None:
    backup = adapter(Script(QUBES))
    backup.options.use_none_netvm, backup.options.use_default_netvm = True, False
    with pytest.raises(exc.QubesException, match="use_none_netvm"):
        backup.get_restore_info()


def test_a_qube_that_cannot_be_listed_is_told_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    lost = RefusedQube(name="<b>odd</b>", error=ErrorInfo.of(RestoreError("its label is malformed")))
    backup = adapter(Script(QUBES, unlisted=(lost,)))
    for _ in range(2):
        backup.get_restore_info()
    assert caplog.text.count("Cannot be listed: ‹b›odd‹/b›: Its label is malformed") == 1
