"""How much of this machine's memory a local worker gets.

Strategy: what the person granted is checked against what there is. Where nobody said anything, a worker gets
what is free, as far as it is of use, and leaves something to others. Workers start one after the other, so
that each sees what the others were granted, in the command lines of their processes.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Iterable
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from qubes_restore_svc.errors import BudgetTooSmall
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.system_memory import LEAST_MEMORY, RAISE_LIMIT, MemoryRoom, memory_room

#: What a chunk of 100 MiB takes whose N is 2^21, with the worker itself, bytes.
_FOR_A_FAST_COMPUTER = 320 << 20

#: Memory for a worker that was granted no certain amount, bytes: more than this gains little
#: (docs/performance.md), and what runs beside it needs memory as well.
_ENOUGH, _ENOUGH_A_PROCESSOR = 4 << 30, 1 << 30
#: The least that a worker gets where there is so much: that, and what a worker does not touch of a grant that
#: nobody chose. As much is left for others that may come.
_LEAST, _OTHERS = _FOR_A_FAST_COMPUTER + (176 << 20), 3

#: Seconds that a start waits for another one, and between two attempts.
_TURN_S, _PAUSE_S = 3.0, 0.02


@contextlib.asynccontextmanager
async def worker_memory(granted: int | None) -> AsyncIterator[tuple[MemoryRoom, int]]:
    """What there is, and what the worker gets that starts in the block, in bytes.

    `granted` is what the person granted it, if anything.
    """
    async with _turn() if granted is None else contextlib.nullcontext():
        room = memory_room()
        yield room, granted or _default_memory(room, granted_to_workers())


def check_memory(granted: int | None) -> None:
    """Refuse what the kernel would end with a kill: it would not say why. Raises BudgetTooSmall."""
    room = memory_room()
    if granted is None and room.available < LEAST_MEMORY:
        raise BudgetTooSmall(
            f"the worker takes {LEAST_MEMORY >> 20} MiB at least, and for the backup of a fast computer about"
            f" {_FOR_A_FAST_COMPUTER >> 20} MiB; but {room.told}",
            advice=RAISE_LIMIT if room.group else "End other programs.",
        )
    if granted is not None and room.group and granted > room.available:
        raise BudgetTooSmall(
            f"--memory {granted >> 20} is more than there is: {room.told}",
            advice=f"{RAISE_LIMIT} Or give less.",
        )


def _default_memory(room: MemoryRoom, granted: int) -> int:
    """What is free, but neither more nor less than is of use, and with something left for others who come."""
    enough = max(_ENOUGH, _ENOUGH_A_PROCESSOR * len(os.sched_getaffinity(0)))
    free = room.available - granted
    share = max(free // 2, free - _OTHERS * _LEAST)
    return min(room.available, max(_LEAST, min(enough, share)))


def every_process() -> Iterable[Path]:
    """The directories of this machine's processes."""
    return Path("/proc").glob("[0-9]*")


def granted_to_workers() -> int:
    """Bytes that the local workers of this machine were granted and have not taken yet."""
    total = 0
    for process in every_process():
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"--calls-fd" in words and b"--json-status-fd" not in words:  # that is bubblewrap
                granted = int(words[words.index(b"--memory-limit") + 1])
                resident = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                total += max(0, granted - resident)
        except (OSError, ValueError, IndexError):  # it has ended, or is none of ours
            continue
    return total


@contextlib.asynccontextmanager
async def _turn() -> AsyncIterator[None]:
    """One start at a time, so that each sees what the others were granted. Whoever has waited goes on."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            file = os.open(sys.executable, os.O_RDONLY | os.O_CLOEXEC)
            held.callback(close_read, file)
            deadline = time.monotonic() + _TURN_S
            while not _locked(file) and time.monotonic() < deadline:
                await asyncio.sleep(_PAUSE_S)
        yield


def _locked(file: int) -> bool:
    try:
        flock(file, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    return True
