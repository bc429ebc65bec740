"""One worker at a time."""

import asyncio
import fcntl
import os
import stat
from pathlib import Path
from typing import get_args

import pytest

from qubes_restore_svc.errors import HostFailed, RestoreInProgress
from qubes_restore_svc.qubes import worker_lock as lock
from qubes_restore_svc.qubes.holders import Activity
from qubes_restore_svc.qubes.worker_lock import wait_cleared, worker_lock
from tests.support.descriptors import open_descriptors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "worker.lock"


def test_a_second_one_is_refused_until_the_first_has_ended(path: Path) -> None:
    with worker_lock(path):
        with pytest.raises(RestoreInProgress), worker_lock(path):
            pass
        assert path.exists()
    with worker_lock(path):
        pass


@pytest.mark.parametrize("activity", get_args(Activity))
def test_whoever_comes_is_told_who_has_a_worker_and_what_for(path: Path, activity: Activity) -> None:
    with (
        worker_lock(path, "sys-gui", activity),
        pytest.raises(RestoreInProgress, match=rf"^sys-gui has been {activity} since \d\d:\d\d on "),
        worker_lock(path),
    ):
        pass


@pytest.mark.parametrize("content", ["", "nonsense", "1 1 1 root sys-gui restore\n"])
def test_who_has_not_written_himself_down_has_it_all_the_same(path: Path, content: str) -> None:
    with worker_lock(path):
        path.write_text(content)
        with pytest.raises(RestoreInProgress, match="another restore or verification"), worker_lock(path):
            pass


def test_whoever_is_of_the_group_can_take_it_whatever_the_umask(path: Path) -> None:
    before = os.umask(0o077)
    try:
        with worker_lock(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
    finally:
        os.umask(before)


def test_one_that_only_clears_up_after_a_killed_holder_is_waited_for(path: Path) -> None:
    async def come() -> None:
        with worker_lock(path) as held:
            path.write_text("1 1 1 root sys-gui restore\n")
            waiting = asyncio.ensure_future(wait_cleared(path))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            os.fstat(held)
        await asyncio.wait_for(waiting, 5)

    asyncio.run(come())


def test_one_that_holds_it_or_nobody_is_not_waited_for(path: Path) -> None:
    asyncio.run(wait_cleared(path))
    path.write_text("1 1 1 root sys-gui restore\n")
    asyncio.run(wait_cleared(path))
    with worker_lock(path):
        asyncio.run(wait_cleared(path))


def test_nobody_waits_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "CLEARING_TIMEOUT_S", 0.05)
    with worker_lock(path):
        path.write_text("1 1 1 root sys-gui restore\n")
        with pytest.raises(RestoreInProgress, match="still being removed"):
            asyncio.run(wait_cleared(path))


def test_nothing_is_left_of_it(path: Path) -> None:
    before = open_descriptors()
    with pytest.raises(KeyError), worker_lock(path):
        raise KeyError
    assert not path.exists()
    with worker_lock(path), pytest.raises(RestoreInProgress), worker_lock(path):
        pass
    assert not open_descriptors() - before


def test_what_a_killed_holder_has_left_is_no_obstacle(path: Path) -> None:
    path.write_text("")
    with worker_lock(path):
        pass
    assert not path.exists()


def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, attempts = fcntl.flock, 0

    def flock(descriptor: int, operation: int) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:  # the holder before us removes its file between our opening and our locking
            path.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with worker_lock(path):
        assert attempts == 2
        with pytest.raises(RestoreInProgress), worker_lock(path):
            pass


def test_a_place_where_no_lock_can_be_is_an_error_with_advice(tmp_path: Path) -> None:
    with pytest.raises(HostFailed, match=r"cannot be taken.*group qubes"), worker_lock(tmp_path / "no" / "x"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(HostFailed), worker_lock(tmp_path / "link"):
        pass
    assert not (tmp_path / "target").exists()
