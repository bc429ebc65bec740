"""The file system's steps: new, private, complete, and never in the place of something else."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from qubes_restore_svc.broker import filesystem
from qubes_restore_svc.errors import HostFailed, NoSpace


def refuse_with(number: int) -> Callable[..., None]:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.fixture
def directory(tmp_path: Path) -> int:
    return os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)


@pytest.fixture(params=["renameat2", "without renameat2"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "renameat2":
        monkeypatch.setattr(filesystem, "_rename_without_replacing", refuse_with(errno.EINVAL))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_is_an_error_of_its_own(number: int) -> None:
    with pytest.raises(NoSpace) as caught, filesystem.reporting("writing x", qube="work", volume="root"):
        raise OSError(number, os.strerror(number))
    assert (caught.value.qube, caught.value.volume) == ("work", "root")


def test_any_other_os_error_says_what_was_being_done_and_why() -> None:
    with pytest.raises(HostFailed) as caught, filesystem.reporting("writing x", qube="work"):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/secret/path")
    assert type(caught.value) is HostFailed
    assert caught.value.reason == "writing x failed: Input/output error"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_modes_are_the_owners_alone_whatever_the_umask(directory: int, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        os.close(filesystem.make_directory("d", dir_fd=directory))
        os.close(filesystem.make_file("f", dir_fd=directory))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600


def test_a_file_system_without_modes_is_no_reason_to_fail(
    directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o777)
    monkeypatch.setattr(os, "chmod", refuse_with(errno.EPERM))
    try:
        os.close(filesystem.make_file("f", dir_fd=directory))
    finally:
        os.umask(before)


def test_a_directory_that_cannot_be_made_private_is_removed_again(
    directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o777)
    monkeypatch.setattr(os, "chmod", refuse_with(errno.EIO))
    try:
        with pytest.raises(OSError, match="Input/output"):
            filesystem.make_directory("d", dir_fd=directory)
    finally:
        os.umask(before)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("target", ["victim", "nothing"])
def test_a_symbolic_link_is_neither_followed_nor_replaced(
    directory: int, tmp_path: Path, target: str
) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(FileExistsError):
        filesystem.make_file("link", dir_fd=directory)
    with pytest.raises(FileExistsError):
        filesystem.make_directory("link", dir_fd=directory)
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "nothing").exists()


def test_a_symbolic_link_is_not_opened_as_a_directory(directory: int, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        filesystem.open_directory("link", dir_fd=directory)


def test_descriptors_are_not_inherited(directory: int) -> None:
    for descriptor in (
        filesystem.make_directory("d", dir_fd=directory),
        filesystem.make_file("f", dir_fd=directory),
    ):
        assert not os.get_inheritable(descriptor)


def test_what_the_system_takes_in_parts_is_written_in_full(
    directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:7], offset))
    file = filesystem.make_file("f", dir_fd=directory)
    filesystem.write_fully(file, memoryview(bytes(range(100))), 5)
    assert (tmp_path / "f").read_bytes() == bytes(5) + bytes(range(100))


def test_a_system_that_takes_nothing_is_an_error_and_not_a_loop(
    directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="took no data"):
        filesystem.write_fully(filesystem.make_file("f", dir_fd=directory), memoryview(b"x"), 0)


def test_a_directory_that_cannot_be_synced_by_design_is_no_error(
    directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refuse_with(errno.EINVAL))
    filesystem.sync_directory(directory)
    monkeypatch.setattr(os, "fsync", refuse_with(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        filesystem.sync_directory(directory)


@pytest.mark.usefixtures("either_way")
def test_a_rename_gives_the_new_name(directory: int, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    filesystem.rename_new("old", "new", dir_fd=directory)
    assert os.listdir(tmp_path) == ["new"]
    assert os.listdir(tmp_path / "new") == ["file"]


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("kind", ["empty directory", "full directory", "file", "link to nothing"])
def test_a_rename_replaces_nothing(directory: int, tmp_path: Path, kind: str) -> None:
    (tmp_path / "old").mkdir()
    new = tmp_path / "new"
    match kind:
        case "empty directory":
            new.mkdir()
        case "full directory":
            new.mkdir()
            (new / "file").touch()
        case "file":
            new.touch()
        case _:
            new.symlink_to("nothing")
    before = new.lstat().st_ino
    with pytest.raises(OSError) as caught:
        filesystem.rename_new("old", "new", dir_fd=directory)
    assert caught.value.errno in filesystem.NAME_TAKEN
    assert new.lstat().st_ino == before
    assert (tmp_path / "old").is_dir()


def test_without_renameat2_a_claimed_name_that_others_fill_stays_theirs(
    directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    rename = os.rename

    def rename_after_others(old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        (tmp_path / new / "theirs").touch()
        rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(filesystem, "_rename_without_replacing", refuse_with(errno.ENOSYS))
    monkeypatch.setattr(os, "rename", rename_after_others)
    with pytest.raises(OSError) as caught:
        filesystem.rename_new("old", "new", dir_fd=directory)
    assert caught.value.errno in filesystem.NAME_TAKEN
    assert os.listdir(tmp_path / "new") == ["theirs"]


def test_without_renameat2_a_failed_rename_gives_its_claim_back(
    directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(filesystem, "_rename_without_replacing", refuse_with(errno.ENOSYS))
    monkeypatch.setattr(os, "rename", refuse_with(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        filesystem.rename_new("old", "new", dir_fd=directory)
    assert os.listdir(tmp_path) == ["old"]


def test_a_rename_that_fails_for_another_reason_is_not_tried_in_another_way(
    directory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(filesystem, "_rename_without_replacing", refuse_with(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        filesystem.rename_new("old", "new", dir_fd=directory)
    assert os.listdir(tmp_path) == ["old"]
