"""One qube in a directory: invisible until it is complete, sparse, on disk, and gone without a trace."""

import errno
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from qubes_restore_svc.broker import filesystem, image_directory
from qubes_restore_svc.broker.interfaces import NewQube
from qubes_restore_svc.errors import HostFailed, NoSpace, QubeExists, RestoreError
from qubes_restore_svc.local.directory import DirectoryQube
from qubes_restore_svc.wire.names import MAX_NUMBER, VolumeName
from tests.local.conftest import failing
from tests.local.sample_qubes import DOM0, new_qube, settings


def fail_with(monkeypatch: pytest.MonkeyPatch, function: str, number: int) -> None:
    monkeypatch.setattr(os, function, failing(number))


def assert_place(error: RestoreError, volume: str | None = "private") -> None:
    assert (error.qube, error.volume) == ("work", volume)


def test_a_committed_qube_has_its_images_and_its_record(tmp_path: Path, qube: DirectoryQube) -> None:
    contents: dict[VolumeName, bytes] = {"private": b"private data", "root": b"root data"}
    for volume, content in contents.items():
        sink = qube.create_volume(volume, 100)
        sink.write(10, memoryview(content))
        sink.finish(100)
    qube.commit(settings())
    assert os.listdir(tmp_path) == ["work"]
    assert sorted(os.listdir(tmp_path / "work")) == ["private.img", "qube.json", "root.img"]
    assert (tmp_path / "work/private.img").read_bytes() == b"private data".rjust(22, b"\0").ljust(100, b"\0")
    assert (tmp_path / "work/root.img").read_bytes() == b"root data".rjust(19, b"\0").ljust(100, b"\0")
    volumes = json.loads((tmp_path / "work/qube.json").read_text())["volumes"]
    assert {volume["name"]: volume["size"] for volume in volumes} == {"private": 100, "root": 100}


def test_a_qube_whose_new_name_cannot_be_looked_at_is_rolled_back(
    tmp_path: Path, qube: DirectoryQube, monkeypatch: pytest.MonkeyPatch
) -> None:
    qube.create_volume("private", 10).finish(10)
    monkeypatch.setattr(image_directory, "_leads_to", failing(errno.ENOMEM))
    with pytest.raises(HostFailed, match="Cannot allocate memory"):
        qube.commit(settings())
    monkeypatch.undo()
    qube.rollback()
    assert os.listdir(tmp_path) == []


def test_a_home_is_a_tar_file_whose_ceiling_may_be_past_what_the_file_system_holds(
    tmp_path: Path, directory: int
) -> None:
    qube = DirectoryQube(directory, NewQube("dom0", DOM0, "20260101T010203-1234"))
    sink = qube.create_volume("home", MAX_NUMBER)
    sink.write(0, memoryview(b"tar"))
    sink.finish(3)
    qube.commit(settings("dom0"))
    assert (tmp_path / "dom0/home.tar").read_bytes() == b"tar"


def test_a_qube_without_volumes_is_its_record(tmp_path: Path, qube: DirectoryQube) -> None:
    qube.commit(settings())
    assert os.listdir(tmp_path / "work") == ["qube.json"]


def test_nothing_has_the_qubes_name_before_commit(tmp_path: Path, qube: DirectoryQube) -> None:
    sink = qube.create_volume("private", 10)
    sink.write(0, memoryview(b"x"))
    sink.finish(10)
    assert os.listdir(tmp_path) == [".work.partial"]


def test_files_and_directories_are_their_owners_alone(tmp_path: Path, directory: int) -> None:
    before = os.umask(0)
    try:
        qube = DirectoryQube(directory, new_qube())
        qube.create_volume("private", 10).finish(10)
        qube.commit(settings())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "work").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "work/private.img").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "work/qube.json").stat().st_mode) == 0o600


def test_a_qube_with_an_unfinished_or_abandoned_volume_is_not_committed(
    tmp_path: Path, qube: DirectoryQube
) -> None:
    qube.create_volume("root", 10).finish(10)
    sink = qube.create_volume("private", 10)
    for _ in range(2):
        with pytest.raises(HostFailed, match="not complete") as caught:
            qube.commit(settings())
        assert_place(caught.value)
        sink.abandon()
    assert os.listdir(tmp_path) == [".work.partial"]


def test_the_settings_of_another_qube_are_refused(tmp_path: Path, qube: DirectoryQube) -> None:
    with pytest.raises(HostFailed):
        qube.commit(settings("vm11"))
    assert os.listdir(tmp_path) == [".work.partial"]


def test_a_directory_put_in_the_place_of_the_unfinished_one_is_no_success(
    tmp_path: Path, qube: DirectoryQube
) -> None:
    sink = qube.create_volume("private", 3)
    sink.write(0, memoryview(b"our"))
    sink.finish(3)
    (tmp_path / ".work.partial").rename(tmp_path / "away")
    (tmp_path / ".work.partial").mkdir()
    (tmp_path / ".work.partial/private.img").write_text("foreign")
    with pytest.raises(HostFailed, match="is not what was restored"):
        qube.commit(settings())
    qube.rollback()
    assert os.listdir(tmp_path / "away") == []
    assert (tmp_path / "work/private.img").read_text() == "foreign"


def test_a_rollback_touches_nothing_that_has_only_the_name(tmp_path: Path, qube: DirectoryQube) -> None:
    (tmp_path / ".work.partial").rename(tmp_path / "away")
    (tmp_path / "private.img").write_text("foreign")
    (tmp_path / ".work.partial").symlink_to(tmp_path)
    qube.rollback()
    assert (tmp_path / "private.img").exists() and (tmp_path / ".work.partial").is_symlink()


def test_everything_is_on_disk_before_the_name_and_the_name_before_commit_returns(
    tmp_path: Path, qube: DirectoryQube, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, filesystem.rename_new

    def noted_fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(tmp_path)))
        fsync(descriptor)

    def noted_rename(old: str, new: str, *, dir_fd: int) -> None:
        events.append("rename")
        rename(old, new, dir_fd=dir_fd)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(image_directory, "rename_new", noted_rename)
    sink = qube.create_volume("private", 10)
    sink.finish(10)
    qube.commit(settings())
    partial = "/.work.partial"
    assert events == [f"{partial}/private.img", f"{partial}/qube.json", partial, "rename", ""]


def test_a_name_that_may_not_last_is_taken_back(
    tmp_path: Path, qube: DirectoryQube, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def failing_fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(tmp_path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(HostFailed, match="Input/output error"):
        qube.commit(settings())
    assert os.listdir(tmp_path) == [".work.partial"]
    qube.rollback()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["empty directory", "qube", "file", "link to nothing"])
def test_a_name_that_was_taken_meanwhile_stays_as_it_is(
    tmp_path: Path, qube: DirectoryQube, kind: str
) -> None:
    name = tmp_path / "work"
    match kind:
        case "empty directory":
            name.mkdir()
        case "qube":
            name.mkdir()
            (name / "private.img").write_text("theirs")
        case "file":
            name.touch()
        case _:
            name.symlink_to("nothing")
    before = name.lstat().st_ino
    with pytest.raises(QubeExists) as caught:
        qube.commit(settings())
    assert_place(caught.value, volume=None)
    assert name.lstat().st_ino == before
    qube.rollback()
    assert os.listdir(tmp_path) == ["work"]


def test_no_room_for_the_record_is_no_space(
    tmp_path: Path, qube: DirectoryQube, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_with(patch, "pwrite", errno.ENOSPC)
        with pytest.raises(NoSpace) as caught:
            qube.commit(settings())
    assert_place(caught.value, volume=None)
    qube.rollback()
    assert os.listdir(tmp_path) == []


def test_rollback_removes_everything_and_does_nothing_again(tmp_path: Path, qube: DirectoryQube) -> None:
    qube.create_volume("root", 10).finish(10)
    sink = qube.create_volume("private", 10)
    sink.write(0, memoryview(b"x"))
    qube.rollback()
    assert os.listdir(tmp_path) == []
    (tmp_path / ".work.partial").mkdir()
    qube.rollback()
    assert os.listdir(tmp_path) == [".work.partial"]


def test_nothing_comes_after_commit(tmp_path: Path, qube: DirectoryQube) -> None:
    qube.commit(settings())
    with pytest.raises(HostFailed, match="committed or rolled back"):
        qube.create_volume("private", 10)
    with pytest.raises(HostFailed, match="committed or rolled back"):
        qube.commit(settings())
    qube.rollback()
    assert os.listdir(tmp_path) == ["work"]
    assert os.listdir(tmp_path / "work") == ["qube.json"]


def test_nothing_works_after_the_end(tmp_path: Path, qube: DirectoryQube) -> None:
    sink = qube.create_volume("private", 10)
    qube.rollback()
    with pytest.raises(HostFailed, match="committed or rolled back"):
        qube.create_volume("root", 10)
    with pytest.raises(HostFailed, match="takes no more"):
        sink.write(0, memoryview(b"x"))
    with pytest.raises(HostFailed, match="committed or rolled back"):
        qube.commit(settings())
    assert os.listdir(tmp_path) == []


def test_rollback_leaves_and_reports_what_others_put_there(tmp_path: Path, qube: DirectoryQube) -> None:
    qube.create_volume("private", 10).finish(10)
    (tmp_path / ".work.partial/thesis.odt").touch()
    with pytest.raises(HostFailed, match="not empty") as caught:
        qube.rollback()
    assert_place(caught.value, volume=None)
    assert os.listdir(tmp_path / ".work.partial") == ["thesis.odt"]


def test_a_directory_in_the_way_is_not_used(tmp_path: Path, directory: int) -> None:
    (tmp_path / ".work.partial").mkdir()
    with pytest.raises(HostFailed, match="in the way"):
        DirectoryQube(directory, new_qube())


def test_every_end_closes_every_descriptor(
    tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for end in ("commit", "rollback", "write", "finish", "create", "taken"):
        qube = DirectoryQube(directory, new_qube(end))
        sink = qube.create_volume("private", 10)
        try:
            with monkeypatch.context() as patch:
                if end == "create":
                    fail_with(patch, "lseek", errno.EINVAL)
                    qube.create_volume("root", 10)
                if end in ("write", "finish"):
                    fail_with(patch, {"write": "pwrite", "finish": "fsync"}[end], errno.EIO)
                sink.write(0, memoryview(b"x"))
                if end != "rollback":
                    sink.finish(10)
            if end == "taken":
                (tmp_path / end).mkdir()
            if end != "rollback":
                qube.commit(settings())
        except RestoreError:
            assert end not in ("commit", "rollback")
        qube.rollback()
    assert set(os.listdir("/proc/self/fd")) == before
    assert sorted(os.listdir(tmp_path)) == ["commit", "taken"]


def test_a_rollback_waits_for_the_write_of_another_thread(
    tmp_path: Path, qube: DirectoryQube, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, let_go = threading.Event(), threading.Event()
    pwrite = os.pwrite

    def slow_pwrite(file: int, data: memoryview, offset: int) -> int:
        inside.set()
        let_go.wait(10)
        return pwrite(file, data[:1], offset)

    monkeypatch.setattr(os, "pwrite", slow_pwrite)
    sink = qube.create_volume("private", 10)
    writer = threading.Thread(target=sink.write, args=(0, memoryview(b"abc")))
    writer.start()
    assert inside.wait(10)
    roller = threading.Thread(target=qube.rollback)
    roller.start()
    roller.join(0.1)
    assert roller.is_alive()
    let_go.set()
    writer.join(10)
    roller.join(10)
    assert os.listdir(tmp_path) == []
