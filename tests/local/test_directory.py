"""The directory host: which directory it takes, which names are taken there, and a full disk."""

import errno
import os
import stat
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qubes_restore_svc.broker import filesystem
from qubes_restore_svc.errors import HostFailed, NoSpace, QubeExists, RestoreInProgress
from qubes_restore_svc.local.directory import DirectoryHost
from tests.local.conftest import failing
from tests.local.sample_qubes import new_qube, restore, settings

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "none", path], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def as_ordinary_user(action: Callable[[], None]) -> None:
    """Call `action` in a child without root's rights; raises AssertionError if it raises anything."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that every user may write to (pytest's own are closed to others)."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


# --- The directory -------------------------------------------------------------------------------


def test_a_missing_directory_is_created_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        host = DirectoryHost(tmp_path / "new")
        with host.lock():
            restore(host, "work")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert os.listdir(tmp_path / "new") == ["work"]


def test_a_umask_that_keeps_even_the_owner_out_does_no_harm(open_place: Path) -> None:
    def action() -> None:
        os.umask(0o777)
        host = DirectoryHost(open_place / "new")
        with host.lock():
            restore(host, "work")
        modes = [
            (open_place / path).stat().st_mode & 0o777 for path in ("new", "new/work", "new/work/private.img")
        ]
        assert modes == [0o700, 0o700, 0o600]

    as_ordinary_user(action)


def test_a_directory_that_was_created_for_nothing_is_removed(tmp_path: Path) -> None:
    host = DirectoryHost(tmp_path / "new")
    with host.lock():
        assert (tmp_path / "new").is_dir()
        host.begin(new_qube()).rollback()
    assert os.listdir(tmp_path) == []


def test_a_created_directory_is_on_disk_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    with DirectoryHost(tmp_path / "new").lock():
        assert synced == [str(tmp_path)]


def test_a_created_directory_that_may_not_last_is_removed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(HostFailed, match="Input/output error"), DirectoryHost(tmp_path / "new").lock():
        pass
    assert os.listdir(tmp_path) == []


def test_a_parent_that_can_be_written_to_but_not_read_will_do(open_place: Path) -> None:
    open_place.chmod(0o333)

    def action() -> None:
        host = DirectoryHost(open_place / "new")
        with host.lock():
            restore(host, "work")

    as_ordinary_user(action)
    open_place.chmod(0o777)
    assert (open_place / "new/work").is_dir()


def test_a_directory_that_was_there_stays_even_if_it_is_empty(target: Path) -> None:
    with DirectoryHost(target).lock():
        pass
    assert target.is_dir()


def test_a_directory_put_in_the_place_of_the_created_one_stays(tmp_path: Path) -> None:
    with DirectoryHost(tmp_path / "new").lock():
        (tmp_path / "new").rename(tmp_path / "moved")
        (tmp_path / "new").mkdir()
    assert sorted(os.listdir(tmp_path)) == ["moved", "new"]


def test_only_the_last_component_is_created(tmp_path: Path) -> None:
    with pytest.raises(HostFailed, match="does not exist"), DirectoryHost(tmp_path / "a/b").lock():
        pass
    assert os.listdir(tmp_path) == []


def test_a_file_is_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HostFailed, match="is not a directory"), DirectoryHost(tmp_path / "file").lock():
        pass
    with pytest.raises(HostFailed), DirectoryHost(tmp_path / "file/below").lock():
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_to_a_directory_is_as_good_as_the_directory(tmp_path: Path, target: Path) -> None:
    (tmp_path / "link").symlink_to(target)
    host = DirectoryHost(tmp_path / "link")
    with host.lock():
        with pytest.raises(RestoreInProgress), DirectoryHost(target).lock():
            pass
        restore(host, "work")
    assert os.listdir(target) == ["work"]
    assert (tmp_path / "link").is_symlink()


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(HostFailed, match="link to nothing"), DirectoryHost(tmp_path / "link").lock():
        pass
    assert os.listdir(tmp_path) == ["link"]


def test_a_directory_that_may_not_be_written_to_is_refused_before_anything_happens(open_place: Path) -> None:
    (open_place / "closed").mkdir()
    (open_place / "closed").chmod(0o555)

    def action() -> None:
        with (
            pytest.raises(HostFailed, match="cannot be written to"),
            DirectoryHost(open_place / "closed").lock(),
        ):
            pass
        with pytest.raises(HostFailed, match="denied"), DirectoryHost(open_place / "closed/new").lock():
            pass

    as_ordinary_user(action)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A directory of another user."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory to another user")
    path = tmp_path / "home"
    path.mkdir()
    os.chown(path, 4321, -1)
    return path


@pytest.mark.parametrize("below", [".", "restored", "link"])
def test_root_does_not_restore_where_another_user_can_change_it(foreign: Path, below: str) -> None:
    (foreign / "link").symlink_to(foreign.parent)
    with pytest.raises(HostFailed, match="home belongs to user 4321, who could put other files") as caught:
        DirectoryHost(foreign / below).lock().__enter__()
    assert "without sudo" in caught.value.advice
    assert os.listdir(foreign) == ["link"]


def test_root_does_not_restore_where_everybody_can_write(target: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("an ordinary user may share a directory")
    target.chmod(0o777)
    with pytest.raises(HostFailed, match="everybody may write to"):
        DirectoryHost(target).lock().__enter__()
    target.chmod(0o1777)
    with DirectoryHost(target).lock():
        pass


def test_a_user_does_not_restore_to_a_directory_of_somebody_else(open_place: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory to another user")
    os.chown(open_place, 4321, -1)

    def refused() -> None:
        with pytest.raises(HostFailed, match="belongs to user 4321"):
            DirectoryHost(open_place).lock().__enter__()

    as_ordinary_user(refused)


def test_a_directory_that_was_moved_away_takes_no_more_qubes(target: Path) -> None:
    host = DirectoryHost(target)
    with host.lock():
        target.rename(target.with_name("away"))
        target.mkdir()
        with pytest.raises(HostFailed, match="was moved or replaced meanwhile"):
            host.begin(new_qube())


def test_a_path_is_shown_without_its_control_characters(tmp_path: Path) -> None:
    with pytest.raises(HostFailed) as caught, DirectoryHost(tmp_path / "\x1b[2J/\udcff").lock():
        pass
    assert "\x1b" not in str(caught.value)
    str(caught.value).encode("utf-8")


def test_a_change_of_the_working_directory_does_not_move_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    host = DirectoryHost(Path("new"))
    monkeypatch.chdir("/")
    with host.lock():
        restore(host, "work")
    assert (tmp_path / "new/work").is_dir()


# --- Names and space -----------------------------------------------------------------------------


def test_names_of_everything_are_taken(target: Path) -> None:
    (target / "Qube").mkdir()
    (target / "file.txt").touch()
    (target / "link").symlink_to("nothing")
    host = DirectoryHost(target)
    assert host.existing_names() == {"Qube", "file.txt", "link"}
    with host.lock():
        assert host.existing_names() == {"Qube", "file.txt", "link"}


def test_a_directory_that_is_not_there_has_no_names_and_no_known_space(tmp_path: Path) -> None:
    host = DirectoryHost(tmp_path / "new")
    assert host.existing_names() == frozenset()
    assert host.free_space() is None
    assert os.listdir(tmp_path) == []


def test_a_taken_name_is_refused(target: Path) -> None:
    (target / "work").symlink_to("nothing")
    host = DirectoryHost(target)
    with host.lock(), pytest.raises(QubeExists) as caught:
        host.begin(new_qube("work"))
    assert caught.value.qube == "work"
    assert os.listdir(target) == ["work"]


@pytest.mark.parametrize("folds", [False, True])
def test_whether_a_name_in_another_case_is_taken_the_file_system_decides(
    target: Path, folds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (target / "Work").mkdir()
    if folds:  # as vfat does: no such file system can be mounted here
        stat = os.stat
        monkeypatch.setattr(os, "stat", lambda path, **how: stat("Work" if path == "work" else path, **how))
    host = DirectoryHost(target)
    with host.lock():
        if folds:
            with pytest.raises(QubeExists):
                host.begin(new_qube("work"))
        else:
            host.begin(new_qube("work")).rollback()
    assert os.listdir(target) == ["Work"]


@pytest.mark.parametrize("name", ["", "..", "../escape", "/etc/x", ".hidden", "a/b", "a\0b"])
def test_a_name_that_no_qube_may_have_is_refused(target: Path, name: str) -> None:
    host = DirectoryHost(target)
    with host.lock(), pytest.raises(HostFailed):
        host.begin(new_qube(name))
    assert os.listdir(target) == []
    assert os.listdir(target.parent) == ["restored"]


def test_free_space_is_what_an_ordinary_user_can_write(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = DirectoryHost(target)
    blocks = os.statvfs_result((4096, 1024, 1000, 300, 200, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: blocks)
    assert host.free_space() == 200 * 1024
    unknown = os.statvfs_result((4096, 1024, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: unknown)
    assert host.free_space() is None


def test_errors_of_the_directory_are_host_errors(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = DirectoryHost(target)
    monkeypatch.setattr(os, "listdir", failing(errno.EIO))
    monkeypatch.setattr(os, "statvfs", failing(errno.EIO))
    for action in (host.existing_names, host.free_space, host.lock().__enter__):
        with pytest.raises(HostFailed, match="Input/output error"):
            action()
    monkeypatch.undo()
    with host.lock():
        pass


# --- A full disk ---------------------------------------------------------------------------------


def test_a_disk_that_fills_up_fails_one_qube_and_not_the_next(small_disk: Path) -> None:
    host = DirectoryHost(small_disk)
    with host.lock():
        before = host.free_space()
        assert before is not None
        assert MIB < before <= 2 * MIB
        qube = host.begin(new_qube("large"))
        sink = qube.create_volume("private", 4 * MIB)
        with pytest.raises(NoSpace) as caught:
            for number in range(4):
                sink.write(number * MIB, memoryview(bytes(MIB)))
        assert (caught.value.qube, caught.value.volume) == ("large", "private")
        qube.rollback()
        assert host.free_space() == before
        restore(host, "small", 100 * MIB)
    assert os.listdir(small_disk) == ["small"]


def test_a_restore_leaves_a_part_of_the_disk_free(small_disk: Path) -> None:
    host = DirectoryHost(small_disk)
    with host.lock():
        sink = host.begin(new_qube()).create_volume("private", 4 * MIB)
        with pytest.raises(NoSpace, match=r"104 KiB are left on the disk, of which 102 KiB stay free"):
            for number in range(1024):
                sink.write(4096 * number, memoryview(bytes(4096)))
        free = host.free_space()
        assert free is not None and 2 * MIB // 20 <= free < 2 * MIB // 20 + 8192


def test_a_disk_without_room_for_the_record_is_no_space(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "RESERVE", 0)
    host = DirectoryHost(small_disk)
    with host.lock():
        qube = host.begin(new_qube())
        free = host.free_space()
        assert free is not None
        sink = qube.create_volume("private", free)
        sink.write(0, memoryview(bytes(free)))
        sink.finish(free)
        with pytest.raises(NoSpace):
            qube.commit(settings())
        qube.rollback()
    assert os.listdir(small_disk) == []
