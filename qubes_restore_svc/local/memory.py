"""How much of this machine's memory a local worker gets, and what holds it to that.

Strategy: what the person granted is checked against what there is. If the person granted nothing, a worker
gets of the free memory as much as is useful, and something stays for others. Workers start one after the
other, so that each sees what the others were granted, in the command lines of their processes.

A worker is held to it from outside: the limits are generous for an honest worker, whose own budget is far
tighter; a worker that was taken over cannot pass them. Resource limits hold everywhere, but they count
addresses. A control group counts every page. Only the service manager may make one. So it is asked, through
its own program, about a worker that runs already: a manager that is not there, refuses or hangs costs a
moment, and nothing else is different.
"""

import asyncio
import contextlib
import os
import resource
import sys
import time
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Iterable
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from qubes_restore_svc.errors import BudgetTooSmall, WorkerLost
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.local.sandbox import find_program
from qubes_restore_svc.system_memory import LEAST_MEMORY, RAISE_LIMIT, MemoryRoom, group_limit, memory_room
from qubes_restore_svc.waiting import to_the_end

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
    """The memory for a worker: of the free memory as much as is useful, with a rest for later workers."""
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
        except (OSError, ValueError, IndexError):  # the process has ended, or is not ours
            continue
    return total


@contextlib.asynccontextmanager
async def _turn() -> AsyncIterator[None]:
    """One start at a time, so that each sees what the others were granted. A start waits only so long."""
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


#: Bytes that a worker may take besides its memory limit: interpreter, libraries, and stacks of the threads.
_MEMORY_RESERVE, _MEMORY_A_PROCESSOR = 1 << 30, 4 << 20
#: Bytes of addresses besides its memory limit: allocators reserve far more than they use.
_ADDRESS_RESERVE = 16 << 30
#: A core dump would hold the passphrase. 1, because 0 does not keep the kernel from piping it to a collector
#: (core(5)); with 1 it dumps nowhere.
_CORE_LIMIT = 1
_MAX_DESCRIPTORS = 256
_MAX_THREADS = 1024

#: Seconds that the service manager may take to make a control group.
_MANAGER_TIMEOUT_S = 1.0
_MOMENT_S = 0.002
_START_UNIT = (
    *("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"),
    *("StartTransientUnit", "ssa(sv)a(sa(sv))"),
)


def memory_reserve() -> int:
    """Bytes that a worker may take besides its memory limit."""
    return _MEMORY_RESERVE + _MEMORY_A_PROCESSOR * len(os.sched_getaffinity(0))


def limit_resources(process_id: int, memory_limit: int, *, own_namespace: bool) -> None:
    """Limit the worker's resources for good: it has no right to raise them again. Raises WorkerLost.

    `memory_limit` is the memory that it was granted, bytes. `own_namespace`: no other processes of the user
    are counted together with it. A process that has ended already is passed over.
    """
    limits = {
        resource.RLIMIT_CORE: _CORE_LIMIT,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: _MAX_DESCRIPTORS,
        resource.RLIMIT_DATA: memory_limit + memory_reserve(),
        resource.RLIMIT_AS: memory_limit + _ADDRESS_RESERVE,
    }
    if own_namespace:  # elsewhere all processes of the user count
        limits[resource.RLIMIT_NPROC] = _MAX_THREADS
    try:
        for kind, limit in limits.items():
            _, hard = resource.prlimit(process_id, kind)
            if hard != resource.RLIM_INFINITY:
                limit = min(limit, hard)
            resource.prlimit(process_id, kind, (limit, limit))
    except ProcessLookupError:
        return
    except OSError as error:
        raise WorkerLost(f"the worker's resources cannot be limited: {error.strerror}") from error


async def limit_group(process_id: int, limit: int) -> bool:
    """Have the process put into a control group that may take `limit` bytes, and nothing of the swap.

    False: there is no systemd that does it. The group is a transient scope (systemd.scope(5)), which ends
    with the process.
    """
    program = find_program("busctl")
    if program is None or not _can_be_grouped():
        return False
    properties = {
        "Description": ("s", "Worker that reads a Qubes OS backup"),
        "PIDs": ("au", "1", str(process_id)),
        "MemoryMax": ("t", str(limit)),
        "MemorySwapMax": ("t", "0"),
        "CollectMode": ("s", "inactive-or-failed"),
    }
    command = [
        *(program, "--system" if os.geteuid() == 0 else "--user", "--quiet", "call", *_START_UNIT),
        *(f"qubes-restore-worker-{process_id}.scope", "fail", str(len(properties))),
        *(word for name, value in properties.items() for word in (name, *value)),
        "0",
    ]
    try:
        manager = await asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True
        )
    except OSError:
        return False
    try:
        async with asyncio.timeout(_MANAGER_TIMEOUT_S):
            if await manager.wait() != 0:
                return False
            # What was asked for is done a little later.
            while (group_limit(process_id) or limit + 1) > limit:
                await asyncio.sleep(_MOMENT_S)
            return True
    except TimeoutError:
        return False
    finally:
        if manager.returncode is None:
            manager.kill()
            await to_the_end(manager.wait())


def _can_be_grouped() -> bool:
    """There may be a manager that can, and it would not free the worker of a limit that we have already."""
    try:
        # Elsewhere the manager could take the id of our process for that of another one.
        ours = Path("/proc/1/comm").read_text() == "systemd\n"
    except OSError:
        return False
    # In the hierarchies of version 1 a user's manager has no memory to give.
    manages_memory = os.geteuid() == 0 or Path("/sys/fs/cgroup/cgroup.controllers").exists()
    return ours and manages_memory and group_limit(os.getpid()) is None
