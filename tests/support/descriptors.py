"""Which descriptors a test has left open.

Strategy: what is open is known by number and target, so that one that an earlier test let go of meanwhile is
no news; and what an event loop closes a turn later is waited for.
"""

import asyncio
import gc
import os

Descriptors = frozenset[tuple[str, str]]

_PATIENCE_S = 60.0


def open_descriptors() -> Descriptors:
    """Number and target of what this process has open now."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
        except FileNotFoundError:
            continue  # the listing's own
    return frozenset(found)


async def until_closed(before: Descriptors) -> None:
    """Wait until nothing is open that was not open `before`; AssertionError names what stays open."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while open_descriptors() - before:
                gc.collect()
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(f"still open: {sorted(open_descriptors() - before)}") from None
