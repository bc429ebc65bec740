"""Waiting for work that must not be left running: a cancel counts only when it is through."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

_T = TypeVar("_T")


async def in_thread(function: Callable[..., _T], *arguments: object) -> _T:
    """Run blocking work in a thread; a cancel waits until it is through, so that nothing runs on unseen."""
    return await to_the_end(asyncio.to_thread(function, *arguments))


async def to_the_end(work: Awaitable[_T]) -> _T:
    """Await `work` without letting any cancel into it; one that came counts when it is done."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # it is known now
        raise cancelled
    return task.result()
