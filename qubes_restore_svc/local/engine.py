"""What the worker derives keys with, for `--version`.

Strategy: only the worker knows, and the broker's side imports nothing of it; so it is asked, in a process of
its own. There is no archive and no input, so no sandbox either: what runs is this package alone.
"""

import asyncio
from asyncio.subprocess import DEVNULL, PIPE

from qubes_restore_svc.local.interpreter import worker_command

_TIMEOUT_S = 20
_MAX_LENGTH = 100


async def worker_engine() -> str | None:
    """Name and version of the engine, printable and on one line; None if the worker does not say."""
    command = [*worker_command(), "--engine"]
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)
    except OSError:
        return None
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            answer, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return None
    name = answer[:_MAX_LENGTH].decode("ascii", "replace").strip()
    return name if process.returncode == 0 and name.isascii() and name.isprintable() and name else None
