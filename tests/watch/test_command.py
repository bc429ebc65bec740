"""What a check leaves behind, and the exit statuses."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qubes_restore_svc.cli.process import Interruption
from qubes_restore_svc.cli.qvm_arguments import way_to_dom0
from qubes_restore_svc.errors import BadConfiguration, ExitStatus, HostFailed
from qubes_restore_svc.report_file import KeptReport, write_report
from qubes_restore_svc.watch import command
from qubes_restore_svc.watch.check import Verifier
from tests.support.documents import checked

from .reports import error, now_in_an_id, verification, whole

Check = Callable[..., int]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """`verify nas`, where the verification ends with a report."""
    settings = tmp_path / "settings"
    settings.mkdir(mode=0o755)

    def run(report: KeptReport, *more: str) -> int:
        def verify(words: object) -> int:
            assert isinstance(words, list)
            write_report(Path(words[words.index("--report") + 1]), report)
            return report.status

        monkeypatch.setattr(command, "verifier", lambda *_: Verifier((), verify))
        lines = ('command = "true"', 'passphrase_file = "/dev/null"', *more)
        (settings / "nas.toml").write_text("\n".join(lines))
        (settings / "nas.toml").chmod(0o644)
        return watched(tmp_path, "verify", "nas")

    return run


def watched(folder: Path, *words: str) -> int:
    places = ("--configuration", str(folder / "settings"), "--state", str(folder / "a" / "state"))
    return command.run([*words, *places], Interruption(), way_to_dom0)


def test_report_and_metrics_are_left_and_shown(
    check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert watched(tmp_path, "show", "nas") == 1
    assert "no report" in capsys.readouterr().out
    assert check(whole(now_in_an_id())) == 0
    state = tmp_path / "a" / "state"
    assert {path.name: path.stat().st_mode & 0o777 for path in state.iterdir()} == {
        "nas.json": 0o600, "qubes-restore-watch-nas.prom": 0o644,
    }  # fmt: skip
    assert checked((state / "nas.json").read_text(), "watch")["state"] == "good"
    assert capsys.readouterr().err == "nas: good: 1 of 1 qubes verified\n"
    assert watched(tmp_path, "show") == 0
    assert capsys.readouterr().err == "1 of 1 good.\n"
    (tmp_path / "settings" / "usb.toml").write_text("")
    assert watched(tmp_path, "show") == 1


def test_metrics_go_where_the_settings_say(check: Check, tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    assert check(whole(now_in_an_id()), f"metrics_directory = '{tmp_path / 'metrics'}'") == 0
    assert [path.name for path in (tmp_path / "metrics").iterdir()] == ["qubes-restore-watch-nas.prom"]


def test_1_for_what_is_not_good_and_130_for_a_cancel(check: Check, tmp_path: Path) -> None:
    assert check(verification(error("bad-image"))) == 1
    assert check(whole(now_in_an_id(9))) == 1
    cancelled = verification(status=ExitStatus.CANCELLED, ended_by=error("cancelled"))
    assert check(cancelled) == 130
    report = json.loads((tmp_path / "a" / "state" / "nas.json").read_text())
    assert (report["state"], report["reason"]) == ("not verified", "it is cancelled")


def test_2_for_settings_with_a_mistake(check: Check) -> None:
    with pytest.raises(BadConfiguration) as caught:
        check(whole(now_in_an_id()), "colour = 1")
    assert caught.value.exit_status == 2


def test_3_if_what_was_found_cannot_be_written(
    check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"metrics_directory = '{tmp_path / 'none'}'"
    assert check(whole(now_in_an_id()), where) == 3
    assert "none/qubes-restore-watch-nas.prom cannot be written: No such file" in capsys.readouterr().err
    assert check(verification(error("bad-image")), where) == 1


def test_3_if_the_report_alone_cannot_be_written_good_or_not(check: Check, tmp_path: Path) -> None:
    (tmp_path / "a" / "state" / "nas.json").mkdir(parents=True)
    assert check(whole(now_in_an_id())) == 3
    assert check(verification(error("bad-image"))) == 3


def kept_state(folder: Path) -> str:
    """What the report of the place says now."""
    return str(json.loads((folder / "a" / "state" / "nas.json").read_text())["state"])


def test_an_old_report_does_not_stand_for_a_check_that_did_not_end(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(whole(now_in_an_id())) == 0
    assert kept_state(tmp_path) == "good"

    def killed(*_: object) -> None:
        assert kept_state(tmp_path) == "not verified"
        metrics = (tmp_path / "a" / "state" / "qubes-restore-watch-nas.prom").read_text()
        assert 'qubes_backup_good{place="nas"} 0' in metrics
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "check", killed)
    with pytest.raises(KeyboardInterrupt):
        check(whole(now_in_an_id()))


def test_an_old_report_does_not_stand_for_one_that_cannot_be_written(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(whole(now_in_an_id())) == 0

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command, "write_whole", full)
    assert check(verification(error("bad-image"))) == 3
    assert list((tmp_path / "a" / "state").iterdir()) == []


def test_an_old_report_does_not_stand_for_settings_with_a_mistake(
    check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(whole(now_in_an_id())) == 0
    with pytest.raises(BadConfiguration):
        check(whole(now_in_an_id()), "colour = 1")
    capsys.readouterr()
    assert watched(tmp_path, "show", "nas") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "nas: not verified: " in said and "colour: there is no such key" in said


def test_a_place_for_reports_that_cannot_be_made_is_told(check: Check, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(HostFailed, match="a/state cannot be created: Not a directory"):
        check(whole(now_in_an_id()))
