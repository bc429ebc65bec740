"""dom0's home: one archive in a new directory, for its owner alone, or nothing at all."""

import errno
import grp
import os
import pwd
import stat
from pathlib import Path

import pytest

from qubes_restore_svc.broker import image_directory
from qubes_restore_svc.errors import HostFailed, NoSpace
from qubes_restore_svc.qubes import dom0_home
from qubes_restore_svc.qubes.dom0_home import ARCHIVE_NAME, Dom0Home, clear_unfinished_homes, dom0_user
from tests.qubes.qubes_bed import new_qube, settings

QUBE = new_qube("dom0", klass="AdminVM", key="dom0-home")
SETTINGS = settings("dom0-home")


def write_archive(home: Dom0Home) -> None:
    sink = home.create_volume("home", 1 << 40)
    sink.write(0, memoryview(b"archive"))
    sink.finish(7)


def test_the_directory_appears_when_it_is_complete_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        home = Dom0Home(tmp_path, QUBE)
        write_archive(home)
        [hidden] = os.listdir(tmp_path)
        assert hidden.startswith(".home-restore-") and hidden.endswith(".partial")
        home.commit(SETTINGS, None)
    finally:
        os.umask(before)
    [name] = os.listdir(tmp_path)
    assert f".{name}.partial" == hidden
    assert os.listdir(tmp_path / name) == [ARCHIVE_NAME]
    assert (tmp_path / name / ARCHIVE_NAME).read_bytes() == b"archive"
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / name / ARCHIVE_NAME).stat().st_mode) == 0o600
    home.rollback()
    assert os.listdir(tmp_path) == [name]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_root_gives_it_to_whom_the_home_belongs(tmp_path: Path) -> None:
    os.chown(tmp_path, 1234, 4321)
    home = Dom0Home(tmp_path, QUBE)
    write_archive(home)
    home.commit(SETTINGS, None)
    [directory] = tmp_path.iterdir()
    for path in (directory, directory / ARCHIVE_NAME):
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)


def test_a_name_that_is_taken_is_never_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes = [Dom0Home(tmp_path, QUBE) for _ in range(3)]
    for name in os.listdir(tmp_path):
        taken = tmp_path / name.removeprefix(".").removesuffix(".partial")
        taken.mkdir()
        (taken / "mine").touch()
    for home in homes:
        write_archive(home)
        home.commit(SETTINGS, None)
    found = list(tmp_path.iterdir())
    assert len(found) == 6
    assert sorted(path.name for directory in found for path in directory.iterdir()) == sorted(
        3 * ["mine"] + 3 * [ARCHIVE_NAME]
    )


def test_too_many_names_that_are_taken_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dom0_home, "_MAX_ATTEMPTS", 0)
    with pytest.raises(HostFailed, match="too many things"):
        Dom0Home(tmp_path, QUBE)


@pytest.mark.parametrize("written", [False, True])
def test_a_rollback_leaves_nothing(tmp_path: Path, written: bool) -> None:
    before = set(os.listdir("/proc/self/fd"))
    home = Dom0Home(tmp_path, QUBE)
    if written:
        write_archive(home)
    else:
        home.create_volume("home", 100).write(0, memoryview(b"x"))
    home.rollback()
    home.rollback()
    assert os.listdir(tmp_path) == []
    assert set(os.listdir("/proc/self/fd")) == before
    for action in (lambda: home.commit(SETTINGS, None), lambda: home.create_volume("home", 1)):
        with pytest.raises(HostFailed, match="committed or rolled back"):
            action()


def test_what_is_not_complete_is_not_committed(tmp_path: Path) -> None:
    home = Dom0Home(tmp_path, QUBE)
    with pytest.raises(HostFailed, match="not complete"):
        home.commit(SETTINGS, None)
    home.create_volume("home", 100).write(0, memoryview(b"x"))
    with pytest.raises(HostFailed, match="not complete"):
        home.commit(SETTINGS, None)
    home.rollback()
    assert os.listdir(tmp_path) == []


def test_settings_of_another_are_refused(tmp_path: Path) -> None:
    home = Dom0Home(tmp_path, QUBE)
    write_archive(home)
    with pytest.raises(HostFailed):
        home.commit(settings("vm10"), None)
    home.rollback()


@pytest.mark.parametrize("volume", ["root", "private"])
def test_dom0_has_no_other_volume(tmp_path: Path, volume: str) -> None:
    home = Dom0Home(tmp_path, QUBE)
    with pytest.raises(HostFailed, match="no such volume"):
        home.create_volume(volume, 10)  # type: ignore[arg-type]
    with pytest.raises(HostFailed, match="no template"):
        home.change_template("x")
    home.rollback()


@pytest.mark.parametrize("step", ["rename", "fsync", "rename_new"])
def test_a_disk_that_fails_at_the_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_arguments: object, **_keywords: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    home = Dom0Home(tmp_path, QUBE)
    write_archive(home)
    with monkeypatch.context() as patch, pytest.raises(NoSpace):
        patch.setattr(image_directory if step == "rename_new" else os, step, fail)
        home.commit(SETTINGS, None)
    home.rollback()
    assert os.listdir(tmp_path) == []


def test_a_publication_that_may_not_last_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def fail_second(directory: int) -> None:
        synced.append(directory)
        if len(synced) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    home = Dom0Home(tmp_path, QUBE)
    write_archive(home)
    monkeypatch.setattr(image_directory, "sync_directory", fail_second)
    with pytest.raises(HostFailed):
        home.commit(SETTINGS, None)
    home.rollback()
    assert os.listdir(tmp_path) == []


def test_what_others_put_there_stays_and_is_told(tmp_path: Path) -> None:
    home = Dom0Home(tmp_path, QUBE)
    [hidden] = os.listdir(tmp_path)
    (tmp_path / hidden / "thesis.odt").touch()
    with pytest.raises(HostFailed, match="not empty"):
        home.rollback()
    assert clear_unfinished_homes(tmp_path) == ((), (hidden,))
    assert (tmp_path / hidden / "thesis.odt").exists()


def test_a_link_in_place_of_a_leftover_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "home.tar").touch()
    (tmp_path / ".home-restore-2026-01-01-010203.partial").symlink_to(target)
    assert clear_unfinished_homes(tmp_path)[0] == ()
    assert (target / "home.tar").exists()


def test_a_home_that_is_not_there_is_an_error_and_nothing_to_clear(tmp_path: Path) -> None:
    with pytest.raises(HostFailed, match="opening"):
        Dom0Home(tmp_path / "no", QUBE)
    assert clear_unfinished_homes(tmp_path / "no") == ((), ())


def test_the_user_of_dom0_is_the_first_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {"qubes": grp.struct_group(("qubes", "x", 98, ["lena", "root"]))}
    monkeypatch.setattr(grp, "getgrnam", groups.__getitem__)
    assert dom0_user() == "lena"
    groups["qubes"] = grp.struct_group(("qubes", "x", 98, []))
    assert dom0_user() == pwd.getpwuid(os.getuid()).pw_name
    groups.clear()
    assert dom0_user() == pwd.getpwuid(os.getuid()).pw_name


def test_the_home_is_that_of_the_account() -> None:
    assert dom0_home.dom0_home("root") == Path(pwd.getpwnam("root").pw_dir)
    with pytest.raises(HostFailed, match="no account"):
        dom0_home.dom0_home("no-such-account")
