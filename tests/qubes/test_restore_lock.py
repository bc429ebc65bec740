"""The lock file and its guard: held by both, and let go of in every way in which a restore can end."""

import fcntl
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from qubes_restore_svc.errors import HostFailed, RestoreInProgress
from qubes_restore_svc.qubes.guard import unlock
from qubes_restore_svc.qubes.restore_lock import RestoreLock, try_lock

SOON_S = 30.0


class Noting:
    """Clears nothing up, but writes down what it was given, where descriptors and signals lead."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, names: Iterable[str]) -> None:
        open_ones = []
        for name in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # the one that lists them
                open_ones.append(os.readlink(f"/proc/self/fd/{name}"))
        ignored = [number.name for number in signal.Signals if signal.getsignal(number) is signal.SIG_IGN]
        text = f"{' '.join(sorted(names))}\n{' '.join(open_ones)}\n{' '.join(ignored)}\n{os.getcwd()}\n"
        part = self._path.with_suffix(".part")
        part.write_text(text)
        part.rename(self._path)

    def wait(self) -> list[str]:
        deadline = time.monotonic() + SOON_S
        while not self._path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return self._path.read_text().splitlines()


@pytest.fixture
def noting(tmp_path: Path) -> Noting:
    return Noting(tmp_path / "noted")


@pytest.fixture
def lock(tmp_path: Path, noting: Noting) -> RestoreLock:
    return RestoreLock(tmp_path / "lock", noting)


def hold_in_child(lock: RestoreLock, *names: str) -> int:
    """A process that holds the lock, is creating `names`, and waits to be killed."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lock.take()
            for name in names:
                lock.creating(name)
            os.write(tell, b"x")
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    return child


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def take_when_cleared(lock: RestoreLock) -> None:
    while True:
        try:
            return lock.take()
        except RestoreInProgress as error:
            assert error.ends_soon
        time.sleep(0.01)


def test_the_lock_is_held_once_and_leaves_no_file(tmp_path: Path, lock: RestoreLock, noting: Noting) -> None:
    for _ in range(2):
        lock.take()
        with pytest.raises(RestoreInProgress, match=rf"\(process {os.getpid()} of "):
            RestoreLock(tmp_path / "lock", noting).take()
        lock.release()
        lock.release()
        assert os.listdir(tmp_path) == []


def test_whoever_comes_is_told_who_restores(tmp_path: Path, noting: Noting) -> None:
    lock = RestoreLock(tmp_path / "lock", noting, "sys-gui")
    lock.take()
    with pytest.raises(RestoreInProgress, match=r"^sys-gui has been restoring since \d\d:\d\d on "):
        RestoreLock(tmp_path / "lock", noting, "other").take()
    lock.release()
    lock = RestoreLock(tmp_path / "lock", noting)
    lock.take()
    with pytest.raises(RestoreInProgress, match=r"^dom0 has been restoring since "):
        RestoreLock(tmp_path / "lock", noting).take()
    lock.release()


def test_a_restore_that_ends_by_itself_needs_no_guard(tmp_path: Path, lock: RestoreLock) -> None:
    lock.take()
    lock.creating("work")
    lock.release()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, 0)
    assert os.listdir(tmp_path) == []


def test_when_the_restore_is_killed_its_guard_clears_up(
    tmp_path: Path, lock: RestoreLock, noting: Noting
) -> None:
    child = hold_in_child(lock, "one", "two")
    end(child)
    assert noting.wait()[0] == "one two"
    take_when_cleared(lock)
    lock.release()


def test_what_is_created_is_no_longer_for_the_guard(lock: RestoreLock, noting: Noting) -> None:
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lock.take()
            for name in ("one", "two", "one"):
                lock.creating(name)
            lock.created("one")
            os.write(tell, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    os.read(ready, 1)
    os.close(ready)
    end(child)
    assert noting.wait()[0] == "two"


def test_the_guard_keeps_nothing_of_the_restore(tmp_path: Path, lock: RestoreLock, noting: Noting) -> None:
    secret = tmp_path / "secret"
    secret.touch()
    with secret.open():
        child = hold_in_child(lock)
        end(child)
        _, descriptors, ignored, directory = noting.wait()
    assert "secret" not in descriptors
    assert {word for word in descriptors.split() if not word.startswith(("pipe:", "/proc/"))} == {
        "/dev/null", str(tmp_path / "lock"),
    }  # fmt: skip
    assert descriptors.split().count("/dev/null") >= 3
    assert {"SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"} <= set(ignored.split())
    assert directory == "/"


def test_whoever_comes_while_a_guard_clears_up_is_told_that_it_ends_soon(
    tmp_path: Path, lock: RestoreLock, noting: Noting
) -> None:
    child = hold_in_child(lock)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it stays a zombie, which is no holder either
    take_when_cleared(lock)
    assert noting.wait()
    lock.release()
    os.waitpid(child, 0)


def test_nobody_waits_for_a_guard_that_hangs(tmp_path: Path) -> None:
    lock = RestoreLock(tmp_path / "lock", lambda _names: time.sleep(SOON_S))
    child = hold_in_child(lock)
    guard = int(Path(f"/proc/{child}/task/{child}/children").read_text())
    os.kill(guard, signal.SIGSTOP)
    end(child)
    try:
        with pytest.raises(RestoreInProgress, match="still being cleared up") as caught:
            lock.take()
        assert caught.value.ends_soon
    finally:
        os.kill(guard, signal.SIGKILL)


def test_a_lock_file_that_nobody_holds_is_no_lock(tmp_path: Path, lock: RestoreLock) -> None:
    (tmp_path / "lock").write_text("1 1 1 root dom0 restore\n")
    lock.take()
    lock.release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"\x1b[2J 1 2 3\n", b"9" * 5000, b"1 2 3 a b\n", b"1 2 3 a b c\n"]
)
def test_what_stands_in_a_lock_file_is_not_believed(
    tmp_path: Path, lock: RestoreLock, content: bytes
) -> None:
    file = try_lock(tmp_path / "lock")
    assert file is not None
    (tmp_path / "lock").write_bytes(content)
    with pytest.raises(RestoreInProgress) as caught:
        lock.take()
    assert caught.value.reason == "another restore is running"
    unlock(file, tmp_path / "lock")


def test_the_group_may_take_the_lock_whatever_the_umask(tmp_path: Path, lock: RestoreLock) -> None:
    before = os.umask(0o077)
    try:
        lock.take()
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o660
        lock.release()
    finally:
        os.umask(before)


def test_a_lock_on_a_file_that_is_gone_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever held it has let go of it between our open and our flock."""
    path = tmp_path / "lock"
    flock = fcntl.flock
    left = [1]

    def late(file: int, operation: int) -> None:
        if left:
            left.pop()
            path.unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    file = try_lock(path)
    assert file is not None and os.path.samestat(os.fstat(file), path.stat())
    unlock(file, path)


def test_a_link_is_not_followed(tmp_path: Path, lock: RestoreLock) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(HostFailed, match="locking"):
        lock.take()
    assert not (tmp_path / "precious").exists()


def test_where_there_is_no_run_qubes_the_error_says_where_to_go(tmp_path: Path, noting: Noting) -> None:
    with pytest.raises(HostFailed) as caught:
        RestoreLock(tmp_path / "no" / "lock", noting).take()
    assert "dom0" in caught.value.advice
