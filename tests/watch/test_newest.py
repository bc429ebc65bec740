"""Which file is the newest backup, and what becomes of a command that brings one."""

import os
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.watch import newest
from qubes_restore_svc.watch.newest import NoBackup, newest_backup
from qubes_restore_svc.watch.places import Place
from tests.system.support import wait_for


def place(**settings: Any) -> Place:
    return Place.model_validate(settings)


def file(directory: Path, name: str, minutes_ago: float) -> Path:
    path = directory / name
    path.write_text(name)
    at = time.time() - minutes_ago * 60
    os.utime(path, (at, at))
    return path


def found(**settings: Any) -> str:
    with newest_backup(place(**settings)) as backup:
        return backup.location


def test_the_newest_file_that_fits_and_is_complete_is_taken(tmp_path: Path) -> None:
    for name, minutes in (("qubes-1", 30), ("qubes-2", 20), ("other", 15), ("qubes-3", 5)):
        file(tmp_path, name, minutes)
    (tmp_path / "qubes-directory").mkdir()
    os.utime(tmp_path / "qubes-directory", (time.time() - 720,) * 2)
    directory = str(tmp_path)
    assert found(directory=directory) == f"{tmp_path}/qubes-2"
    assert found(directory=directory, settle_minutes=0) == f"{tmp_path}/qubes-3"
    assert found(directory=directory, pattern="oth*") == f"{tmp_path}/other"


def test_a_file_from_the_future_is_complete(tmp_path: Path) -> None:
    """On FAT, the clock of another zone makes hours of difference."""
    file(tmp_path, "qubes-1", 30)
    file(tmp_path, "qubes-2", -120)
    assert found(directory=str(tmp_path)) == f"{tmp_path}/qubes-2"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"directory": "{}"}, "no file in {} is complete yet"),
        ({"directory": "{}", "pattern": "b*"}, "no file in {} is called b*"),
        ({"directory": "{}/none"}, "{}/none is not there"),
        ({"file": "{}/none"}, "{}/none is not there"),
    ],
)
def test_where_no_backup_is_it_is_said(settings: dict[str, str], told: str, tmp_path: Path) -> None:
    file(tmp_path, "qubes-1", 1)
    settings = {key: value.format(tmp_path) for key, value in settings.items()}
    with pytest.raises(NoBackup) as caught:
        found(**settings)
    assert str(caught.value) == told.format(tmp_path)


def test_a_place_that_cannot_be_read_is_not_one_without_a_backup(tmp_path: Path) -> None:
    path = file(tmp_path, "qubes-1", 30)
    with pytest.raises(HostFailed, match="qubes-1 cannot be read: Not a directory"):
        found(directory=str(path))


def test_a_command_brings_its_output_and_has_ended_afterwards() -> None:
    with newest_backup(place(command="printf backup; exit 3")) as backup:
        with open(backup.location) as output:
            assert output.read() == "backup"
        assert backup.ended == 0
    assert backup.ended == 3 and backup.broke_off


@pytest.mark.parametrize("command", ["cat /dev/zero", "sleep 1000", "sh -c 'sleep 1000; true'; true"])
def test_a_command_that_goes_on_is_ended(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newest, "_GRACE_S", 0.2)
    with newest_backup(place(command=command)) as backup, open(backup.location, "rb") as output:
        if "zero" in command:
            output.read(1)
    assert backup.ended < 0 or backup.ended == 128 + signal.SIGPIPE
    assert not backup.broke_off


def test_what_a_command_has_started_is_ended_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newest, "_GRACE_S", 0.2)
    with newest_backup(place(command=f"sleep 1000 & echo $! > '{tmp_path}/id'; wait")):
        wait_for(lambda: (tmp_path / "id").exists() and (tmp_path / "id").read_text() != "")
    started = Path("/proc", (tmp_path / "id").read_text().strip())
    # Whoever inherits it may not have taken notice of its end.
    wait_for(lambda: not started.exists() or "State:\tZ" in (started / "status").read_text())


def test_a_command_is_ended_when_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newest, "_GRACE_S", 0.2)
    with pytest.raises(RuntimeError), newest_backup(place(command="sleep 1000")) as backup:
        raise RuntimeError
    assert backup.ended < 0


def test_in_another_qube_a_file_is_named_and_all_else_is_a_command() -> None:
    assert found(file="/media/it's", qube="sys-usb") == "/media/it's"
    program, option, command = shlex.split(found(command="ssh nas 'cat backup'", qube="sys-net"))
    assert (program, option, command) == ("sh", "-c", "ssh nas 'cat backup'")


def test_the_command_in_another_qube_finds_the_newest(tmp_path: Path) -> None:
    directory = tmp_path / "it's $(here)"
    directory.mkdir()
    for name, minutes in (("qubes-1", 30), ("qubes-2 new", 20), ("qubes-3", 5)):
        file(directory, name, minutes)
    location = found(directory=str(directory), qube="sys-usb")
    assert os.popen(location).read() == "qubes-2 new"
