"""Waiting for blocking work, and what a cancel does meanwhile.

Strategy: a cancel waits for work that changes something, because nothing may go on unseen. Code that can end
such work sooner is told at once. Work that only reads has nothing to undo. A cancel does not wait for it, and
its thread ends alone. Every piece of work has a thread of its own, so that none waits for a free one.
"""

import _thread
import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from qubes_restore_svc.errors import RestoreInProgress

_T = TypeVar("_T")

#: Seconds to wait for what clears up after a restore that was killed: to kill a qube can take a minute.
CLEARING_TIMEOUT_S = 90.0
_PAUSE_S = 0.1

#: Seconds in which a thread has begun, or never will.
_BEGIN_S = 10.0


async def in_thread(
    function: Callable[..., _T], *arguments: object, on_cancel: Callable[[], None] | None = None
) -> _T:
    """Run blocking work in a thread; a cancel waits until it is through, so that nothing runs on unseen.

    `on_cancel`: see `to_the_end`.
    """
    return await to_the_end(started(function, *arguments), on_cancel)


async def ask(function: Callable[..., _T], *arguments: object) -> _T:
    """Run blocking work that changes nothing in a thread. A cancel counts at once; the answer is dropped."""
    return await started(function, *arguments)


async def to_the_end(work: Awaitable[_T], on_cancel: Callable[[], None] | None = None) -> _T:
    """Await `work` without letting any cancel into it; one that came counts when it is done.

    `on_cancel` is called at once when a cancel comes: it makes the work end sooner, and must not block.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
            if on_cancel is not None:
                on_cancel()
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # it is known now
        raise cancelled
    return task.result()


async def when_cleared(take: Callable[[], _T]) -> _T:
    """Take a lock, once what a killed restore left is cleared up. A cancel does not wait for that."""
    deadline = time.monotonic() + CLEARING_TIMEOUT_S
    while True:
        try:
            return await in_thread(take)
        except RestoreInProgress as error:
            if not error.ends_soon or time.monotonic() > deadline:
                raise
        await asyncio.sleep(_PAUSE_S)


def started(function: Callable[..., _T], *arguments: object) -> asyncio.Future[_T]:
    """Begin blocking work in a thread of its own, which does not keep the process from ending.

    If the system has no thread left, the work is done here and now, because work that undoes something must
    not fail for that reason.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        patience.cancel()
        if answer.done():  # it was cancelled
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)  # type: ignore[arg-type] # there is no error, so it is the result

    claim = _thread.allocate_lock()

    def give_up() -> None:
        if claim.acquire(blocking=False):  # the thread died before it came to the work
            settle(None, MemoryError())

    patience = loop.call_later(_BEGIN_S, give_up)

    def work() -> None:
        if not claim.acquire(blocking=False):
            return
        result, error = None, None
        try:
            result = function(*arguments)
        except BaseException as caught:  # noqa: BLE001 - the task that waits raises it
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    try:
        # `Thread.start` would wait until the thread runs: for ever, if it dies first for want of memory.
        _thread.start_new_thread(work, ())
    except RuntimeError:
        work()
    return answer
