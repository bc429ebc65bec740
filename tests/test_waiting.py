"""Work that a cancel does not leave running."""

import _thread
import asyncio
import threading
from collections.abc import Callable

import pytest

from qubes_restore_svc import waiting
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.waiting import ask, in_thread, to_the_end


async def test_a_result_and_an_error_come_through() -> None:
    async def work(number: int) -> int:
        if not number:
            raise HostFailed("no")
        return number

    assert await to_the_end(work(3)) == 3
    with pytest.raises(HostFailed, match="no"):
        await to_the_end(work(0))
    assert await in_thread(max, 3, 5) == 5


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancel_counts_when_the_work_is_through(fails: bool) -> None:
    begun, go_on = threading.Event(), threading.Event()
    done: list[bool] = []

    def work() -> None:
        begun.set()
        go_on.wait(20)
        done.append(True)
        if fails:
            raise HostFailed("no")

    task = asyncio.create_task(in_thread(work))
    await asyncio.to_thread(begun.wait, 20)
    for _ in range(3):
        task.cancel()
        await asyncio.wait([task], timeout=0.01)
        assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == [True]


async def test_whoever_can_make_the_work_end_sooner_is_told_of_a_cancel_at_once() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work() -> bool:
        begun.set()
        return go_on.wait(20)

    task = asyncio.create_task(in_thread(work, on_cancel=go_on.set))
    await asyncio.to_thread(begun.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)
    assert go_on.is_set()


async def test_a_question_is_left_to_itself_by_a_cancel() -> None:
    begun, go_on, over = threading.Event(), threading.Event(), threading.Event()

    def question() -> None:
        begun.set()
        go_on.wait(20)
        over.set()

    task = asyncio.create_task(ask(question))
    await asyncio.to_thread(begun.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not over.is_set()
    go_on.set()
    assert await asyncio.to_thread(over.wait, 20)


async def test_work_is_done_here_and_now_where_no_thread_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    assert await in_thread(max, 3, 5) == 5
    assert await ask(max, 3, 5) == 5


async def test_a_thread_that_dies_before_its_work_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Callable[[], None]] = []

    def die(work: Callable[[], None], _: tuple[()]) -> int:
        begun.append(work)
        return 0

    monkeypatch.setattr(_thread, "start_new_thread", die)
    monkeypatch.setattr(waiting, "_BEGIN_S", 0.01)
    done: list[int] = []
    with pytest.raises(MemoryError):
        await asyncio.wait_for(in_thread(done.append, 1), 20)
    begun[0]()  # it was only slow: the work is given up all the same
    assert not done


async def test_work_that_cancels_itself_is_cancelled() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(to_the_end(work()), 20)
