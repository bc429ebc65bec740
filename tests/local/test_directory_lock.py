"""The directory host's lock: one restore at a time, and what a killed or careless one leaves behind."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qubes_restore_svc.errors import HostFailed, RestoreInProgress
from qubes_restore_svc.local.directory import DirectoryHost
from tests.local.conftest import failing
from tests.local.sample_qubes import new_qube, restore, settings

REPOSITORY = Path(__file__).parents[2]


def test_only_one_restore_at_a_time(target: Path) -> None:
    with DirectoryHost(target).lock(), pytest.raises(RestoreInProgress), DirectoryHost(target).lock():
        pass
    with DirectoryHost(target).lock():
        pass
    assert os.listdir(target) == []


def test_a_second_lock_of_the_same_host_is_refused_and_harmless(target: Path) -> None:
    host = DirectoryHost(target)
    with host.lock():
        with pytest.raises(RestoreInProgress), host.lock():
            pass
        restore(host, "work")


def test_a_restore_that_is_refused_clears_nothing(target: Path) -> None:
    host = DirectoryHost(target)
    with host.lock():
        qube = host.begin(new_qube())
        with pytest.raises(RestoreInProgress), DirectoryHost(target).lock():
            pass
        qube.commit(settings())
    assert os.listdir(target) == ["work"]


def test_the_lock_is_let_go_when_the_restore_fails(target: Path) -> None:
    with pytest.raises(KeyError), DirectoryHost(target).lock():
        raise KeyError
    with DirectoryHost(target).lock():
        pass


def test_the_lock_is_let_go_even_if_a_child_still_has_its_descriptor(target: Path) -> None:
    with DirectoryHost(target).lock():
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
    try:
        with DirectoryHost(target).lock():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_directory_removed_just_before_it_is_locked_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The restore that had created it ended between our open and our flock."""
    path = tmp_path / "new"
    path.mkdir()
    flock = fcntl.flock
    removals = iter([True])

    def flock_after_removal(descriptor: int, operation: int) -> None:
        if next(removals, False):
            path.rmdir()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    host = DirectoryHost(path)
    with host.lock():
        restore(host, "work")
    assert os.listdir(path) == ["work"]


def test_a_directory_that_is_always_removed_is_an_error_and_not_a_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new"
    flock = fcntl.flock

    def flock_after_removal(descriptor: int, operation: int) -> None:
        path.rmdir()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    with pytest.raises(HostFailed, match="again and again"), DirectoryHost(path).lock():
        pass


def test_a_file_system_without_locks_is_refused_and_nothing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with pytest.raises(HostFailed, match="locking"), DirectoryHost(tmp_path / "new").lock():
        pass
    assert os.listdir(tmp_path) == []


def test_no_descriptor_stays_open(tmp_path: Path, target: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for path in (target, tmp_path / "new", tmp_path / "a/b"):
        host = DirectoryHost(path)
        try:
            with host.lock():
                with pytest.raises(RestoreInProgress), DirectoryHost(path).lock():
                    pass
                host.begin(new_qube("lost")).create_volume("private", 10)
                restore(host, "work")
        except HostFailed:
            assert path == tmp_path / "a/b"
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_qube_that_nobody_ended_ends_with_the_lock(target: Path) -> None:
    host = DirectoryHost(target)
    with pytest.raises(KeyError), host.lock():
        restore(host, "done")
        first = host.begin(new_qube("first"))
        second = host.begin(new_qube("second"))
        second.create_volume("private", 10).write(0, memoryview(b"x"))
        raise KeyError
    assert os.listdir(target) == ["done"]
    with pytest.raises(HostFailed):
        first.create_volume("private", 10)


def test_one_qube_that_cannot_be_removed_does_not_keep_another_or_the_lock(target: Path) -> None:
    host = DirectoryHost(target)
    with pytest.raises(HostFailed, match="not empty"), host.lock():
        host.begin(new_qube("first"))
        host.begin(new_qube("second"))
        host.begin(new_qube("third"))
        (target / ".second.partial/thesis.odt").touch()
    assert os.listdir(target) == [".second.partial"]
    with host.lock():
        assert host.kept == (".second.partial",)


def test_nothing_begins_without_the_lock(target: Path) -> None:
    host = DirectoryHost(target)
    with pytest.raises(HostFailed, match="not locked"):
        host.begin(new_qube())
    with host.lock():
        pass
    with pytest.raises(HostFailed, match="not locked"):
        host.begin(new_qube())
    assert os.listdir(target) == []


# --- A killed restore ----------------------------------------------------------------------------

KILLED = """
import sys, time
from pathlib import Path
from qubes_restore_svc.local.directory import DirectoryHost
from tests.local.conftest import failing
from tests.local.sample_qubes import new_qube
host = DirectoryHost(Path(sys.argv[1]))
with host.lock():
    sink = host.begin(new_qube("killed")).create_volume("private", 1 << 40)
    offset = 0
    while True:
        sink.write(offset, memoryview(bytes(4096)))
        offset += 8192
        if offset == 8192 * 20:
            print("writing", flush=True)
        time.sleep(0.0005)
"""


def test_a_restore_that_was_killed_is_cleared_up_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "new"
    command = [sys.executable, "-c", KILLED, str(target)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        with pytest.raises(RestoreInProgress), DirectoryHost(target).lock():
            pass
        process.kill()
    assert os.listdir(target) == [".killed.partial"]
    assert (target / ".killed.partial/private.img").stat().st_size > 0
    host = DirectoryHost(target)
    with host.lock():
        assert host.cleared == (".killed.partial",)
        assert host.kept == ()
        restore(host, "killed")
    assert os.listdir(target) == ["killed"]
    with host.lock():
        assert not host.cleared


def test_what_only_looks_like_a_leftover_is_kept_and_in_the_way(target: Path) -> None:
    (target / ".work.partial").mkdir()
    (target / ".work.partial/thesis.odt").touch()
    host = DirectoryHost(target)
    with host.lock():
        assert (host.cleared, host.kept) == ((), (".work.partial",))
        with pytest.raises(HostFailed, match="in the way"):
            host.begin(new_qube())
        restore(host, "other")
    assert (target / ".work.partial/thesis.odt").exists()
