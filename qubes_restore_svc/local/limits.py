"""What a local worker may take of the machine: hard resource limits, set from outside.

Strategy: generous for an honest worker, whose own budget is far tighter; for one that was taken over, an end.
Resource limits hold everywhere, but they count addresses. A control group counts every page. To have one is
the right of the service manager, so that is asked, through its own program, about a worker that runs already:
a manager that is not there, refuses or hangs costs a moment, and nothing else is different.
"""

import asyncio
import os
import resource
from asyncio.subprocess import DEVNULL
from pathlib import Path

from qubes_restore_svc.errors import WorkerLost
from qubes_restore_svc.local.sandbox import find_program
from qubes_restore_svc.system_memory import group_limit
from qubes_restore_svc.waiting import to_the_end

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
