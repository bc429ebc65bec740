"""The locks of a Qubes system: held by whoever restores and by a guard, and let go of however that ends."""

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import pytest

from qubes_restore_svc.errors import HostFailed, RestoreInProgress
from qubes_restore_svc.qubes.guard import unlock
from qubes_restore_svc.qubes.locks import (
    RESTORE,
    WORKER,
    Activity,
    GuardedLock,
    Holder,
    LockKind,
    read_holder,
    stock_lock,
    try_lock,
    write_holder,
)
from tests.qubes.qubes_bed import GONE, HOLDER
from tests.support.descriptors import open_descriptors

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
def path(tmp_path: Path) -> Path:
    (tmp_path / "locks").mkdir()
    return tmp_path / "locks" / "lock"


@pytest.fixture(params=[RESTORE, WORKER], ids=["restore", "worker"])
def kind(request: pytest.FixtureRequest) -> LockKind:
    given = request.param
    assert isinstance(given, LockKind)
    return given


@pytest.fixture
def lock(path: Path, noting: Noting) -> GuardedLock:
    return GuardedLock(RESTORE, path, noting)


def another(
    path: Path, kind: LockKind = RESTORE, client: str = "other", activity: Activity = "restoring"
) -> GuardedLock:
    return GuardedLock(kind, path, lambda names: None, client, activity)


def hold_in_child(lock: GuardedLock, *names: str) -> int:
    """A process that holds the lock, creates `names` (`-name` is created), and waits to be killed."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lock.take()
            for name in names:
                lock.created(name[1:]) if name.startswith("-") else lock.creating(name)
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


def take_when_cleared(lock: GuardedLock) -> None:
    while True:
        try:
            return lock.take()
        except RestoreInProgress as error:
            assert error.ends_soon
        time.sleep(0.01)


# --- Held by one ---------------------------------------------------------------------------------


def test_the_lock_is_held_once_and_nothing_is_left_of_it(path: Path, kind: LockKind) -> None:
    before = open_descriptors()
    for _ in range(2):
        with pytest.raises(KeyError), another(path, kind) as lock:
            with pytest.raises(RestoreInProgress, match=rf"\(process {os.getpid()} of "):
                another(path, kind).take()
            lock.release()
            raise KeyError
        assert os.listdir(path.parent) == []
    assert not open_descriptors() - before


@pytest.mark.parametrize("activity", get_args(Activity))
def test_whoever_comes_is_told_who_has_it_and_what_for(
    path: Path, kind: LockKind, activity: Activity
) -> None:
    told = rf"^sys-gui has been {activity} since \d\d:\d\d on "
    with (
        another(path, kind, "sys-gui", activity),
        pytest.raises(RestoreInProgress, match=told),
    ):
        another(path, kind).take()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x1b[2J 1 2 3\n", b"9" * 5000, b"1 2 3 a b c\n"])
def test_what_stands_in_a_lock_file_is_not_believed(path: Path, kind: LockKind, content: bytes) -> None:
    with another(path, kind):
        path.write_bytes(content)
        with pytest.raises(RestoreInProgress) as caught:
            another(path, kind).take()
    assert caught.value.reason == kind.running


@pytest.mark.parametrize("content", ["", GONE])
def test_a_lock_file_that_nobody_holds_is_no_lock(path: Path, content: str) -> None:
    path.write_text(content)
    with another(path):
        pass
    assert os.listdir(path.parent) == []


def test_the_group_may_take_the_lock_whatever_the_umask(path: Path) -> None:
    before = os.umask(0o077)
    try:
        with another(path):
            assert path.stat().st_mode & 0o777 == 0o660
    finally:
        os.umask(before)


def test_a_lock_on_a_file_that_is_gone_is_tried_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever held it has let go of it between our open and our flock."""
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


def test_a_link_in_the_place_of_a_lock_is_not_followed(path: Path) -> None:
    path.symlink_to(path.parent / "precious")
    with pytest.raises(HostFailed, match="locking"):
        another(path).take()
    with pytest.raises(HostFailed, match="locking"), stock_lock(path):
        pass
    assert not (path.parent / "precious").exists()


def test_where_there_is_no_run_qubes_the_error_says_where_to_go(tmp_path: Path) -> None:
    with pytest.raises(HostFailed, match=r"locking .*dom0.*group qubes"):
        another(tmp_path / "no" / "lock").take()
    with pytest.raises(HostFailed, match="locking"), stock_lock(tmp_path / "no" / "lock"):
        pass


# --- The guard -----------------------------------------------------------------------------------


def test_a_restore_that_ends_by_itself_needs_no_guard(path: Path, lock: GuardedLock, noting: Noting) -> None:
    with lock:
        lock.creating("work")
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, 0)
    assert os.listdir(path.parent) == [] and not noting._path.exists()


@pytest.mark.parametrize(
    ("created", "left"), [(["one", "two"], "one two"), (["one", "two", "one", "-one"], "two")]
)
def test_when_the_restore_is_killed_its_guard_clears_up(
    lock: GuardedLock, noting: Noting, created: list[str], left: str
) -> None:
    end(hold_in_child(lock, *created))
    assert noting.wait()[0] == left
    take_when_cleared(lock)
    lock.release()


def test_the_guard_keeps_nothing_of_the_restore(path: Path, lock: GuardedLock, noting: Noting) -> None:
    secret = path.parent / "secret"
    secret.touch()
    with secret.open():
        end(hold_in_child(lock))
        _, descriptors, ignored, directory = noting.wait()
    assert "secret" not in descriptors
    assert {word for word in descriptors.split() if not word.startswith(("pipe:", "/proc/"))} == {
        "/dev/null", str(path),
    }  # fmt: skip
    assert descriptors.split().count("/dev/null") >= 3
    assert {"SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"} <= set(ignored.split())
    assert directory == "/"


def test_whoever_comes_while_a_guard_clears_up_is_told_that_it_ends_soon(
    lock: GuardedLock, noting: Noting
) -> None:
    child = hold_in_child(lock)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it stays a zombie, which is no holder either
    take_when_cleared(lock)
    assert noting.wait()
    lock.release()
    os.waitpid(child, 0)


def test_nobody_waits_for_a_guard_that_hangs(path: Path, kind: LockKind) -> None:
    child = hold_in_child(another(path, kind))
    guard = int(Path(f"/proc/{child}/task/{child}/children").read_text())
    os.kill(guard, signal.SIGSTOP)
    end(child)
    try:
        with pytest.raises(RestoreInProgress) as caught:
            another(path, kind).take()
        assert caught.value.ends_soon and caught.value.reason == kind.clearing
    finally:
        os.kill(guard, signal.SIGKILL)


# --- Who holds one -------------------------------------------------------------------------------


def write(path: Path, client: str = "sys-gui", activity: Activity = "restoring") -> None:
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    write_holder(file, client, activity)
    os.close(file)


@pytest.mark.parametrize("activity", get_args(Activity))
def test_the_holder_that_was_written_is_read(path: Path, activity: Activity) -> None:
    path.write_text("what was there before, and longer" * 10)
    before = datetime.now(UTC).replace(microsecond=0)
    write(path, "nas_1.x-y", activity)
    holder = read_holder(path)
    assert holder is not None
    assert (holder.pid, holder.client, holder.activity) == (os.getpid(), "nas_1.x-y", activity)
    assert before <= holder.since <= datetime.now(UTC)
    assert holder.is_alive()


def test_a_holder_is_told_in_one_line_for_people() -> None:
    since = datetime(2026, 11, 23, 14, 5).astimezone().astimezone(UTC)
    holder = Holder(pid=4711, started=1, since=since, user="joan", client="sys-gui", activity="restoring")
    assert holder.describe() == (
        "sys-gui has been restoring since 14:05 on 2026-11-23 (process 4711 of joan)"
    )


def test_what_no_line_can_hold_is_not_told_of_a_holder(path: Path) -> None:
    write(path, "a b\n\x1b[2J")
    holder = read_holder(path)
    assert holder is not None and holder.client == "a b\ufffd\ufffd[2J"


@pytest.mark.parametrize(
    "content",
    ["", "9" * 5000, GONE[:-1], GONE + "more", "[]", *(
        json.dumps({**HOLDER, key: value})
        for key, value in [("pid", "1"), ("pid", -1), ("since", 5), ("activity", "stealing"), ("more", 1)]
    ), json.dumps({**HOLDER, "user": "x" * 1000}), None],
)  # fmt: skip
def test_what_is_no_holder_is_nobody(path: Path, content: str | None) -> None:
    if content is not None:
        path.write_text(content)
    assert read_holder(path) is None


def test_a_process_that_is_gone_and_another_of_its_number_do_not_hold_it() -> None:
    child = subprocess.Popen(["sleep", "60"])
    child.kill()
    child.wait()
    assert not Holder.model_validate({**HOLDER, "pid": child.pid}).is_alive()
    assert not Holder.model_validate({**HOLDER, "pid": os.getpid()}).is_alive()


# --- The stock restore ---------------------------------------------------------------------------

#: What the stock command does with the file.
_STOCK = """
import fcntl, sys
file = open(sys.argv[1], "w")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(7)
print("held", flush=True)
sys.stdin.read()
"""


def stock(path: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _STOCK, str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_stock_command_finds_its_lock_held_while_we_restore(path: Path) -> None:
    for held, status in ((True, 7), (False, 0)):
        with stock_lock(path) if held else nullcontext():
            process = stock(path)
            process.communicate()
        assert process.returncode == status


def test_a_stock_restore_that_runs_is_told(path: Path) -> None:
    process = stock(path)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RestoreInProgress, match="the stock qvm-backup-restore is running"), stock_lock(path):
        pass
    process.communicate()
    with stock_lock(path):
        pass


def test_the_stock_lock_that_root_has_created_can_be_taken_by_the_group(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with stock_lock(tmp_path / "lock"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o660
