"""What a local worker may take of the machine: hard resource limits, set from outside.

Strategy: generous for an honest worker, whose own budget is far tighter; for one that was taken over, an end.
"""

import os
import resource

from qubes_restore_svc.errors import WorkerLost

#: Bytes that a worker may take besides its memory limit: interpreter, libraries, and stacks of the threads.
_MEMORY_RESERVE, _MEMORY_A_PROCESSOR = 1 << 30, 4 << 20
#: Bytes of addresses besides its memory limit: allocators reserve far more than they use.
_ADDRESS_RESERVE = 16 << 30
#: A core dump would hold the passphrase. 1, because 0 does not keep the kernel from piping it to a collector
#: (core(5)); with 1 it dumps nowhere.
_CORE_LIMIT = 1
_MAX_DESCRIPTORS = 256
_MAX_THREADS = 1024


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
