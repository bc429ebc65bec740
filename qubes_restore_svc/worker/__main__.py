"""`python -m qubes_restore_svc.worker`: started by the link, inside the sandbox or the DisposableVM."""

import argparse
import asyncio
import os
import resource
import socket
import sys
import threading
from collections.abc import Callable, Sequence

from qubes_restore_svc.hardening import forbid_core_dumps, loading

with loading("qubes-restore-worker"):
    from qubes_restore_svc.errors import UsageError
    from qubes_restore_svc.kdf.engine import KdfEngine, best_engine
    from qubes_restore_svc.system_memory import LEAST_MEMORY, MemoryRoom, memory_room
    from qubes_restore_svc.worker.daemon import (
        Accept,
        Daemon,
        ListeningCalls,
        PassedCalls,
        inherited_listener,
    )
    from qubes_restore_svc.worker.system_calls import forbid_the_rest
    from qubes_restore_svc.worker.threads import as_restore_error

#: Bytes that stay free for the kernel, the sockets and other programs of the qube, unless an option says
#: otherwise.
_RESERVE = 176 << 20
#: Bytes of stack for a thread: what `ulimit -s` grants can be more than the worker may take in all.
_STACK_SIZE = 2 << 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve one session and leave, whatever threads still run."""
    parser = argparse.ArgumentParser(prog="qubes-restore-worker")
    parser.add_argument("--engine", action="store_true", help="only say what derives the keys")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--calls-fd", type=int, help="socket on which calls come")
    ways.add_argument("--listen", action="store_true", help="calls come to the socket that systemd passes")
    parser.add_argument("--archive-fd", type=int, help="the backup, open for reading")
    parser.add_argument("--memory-limit", type=int, help="memory that this machine has to give, bytes")
    parser.add_argument(
        "--memory-room", type=MemoryRoom.parse, help="what this machine could give at most, and why"
    )
    options = parser.parse_args(arguments)
    if options.engine:
        sys.stdout.write(f"{best_engine().name}\n")
        return
    if not options.listen and options.calls_fd is None:
        parser.error("--calls-fd or --listen is needed")
    try:
        listener = inherited_listener() if options.listen else None
    except UsageError as error:
        parser.error(str(error))
    threading.stack_size(_STACK_SIZE)
    engine = best_engine()
    _restrict_process()
    room: MemoryRoom = options.memory_room or memory_room()
    available = options.memory_limit or room.available
    memory = max(min(LEAST_MEMORY, available), available - _RESERVE)
    advice = _advice_in_qube(memory) if options.memory_room is None else room.advice
    if listener is not None:
        accept = ListeningCalls(listener).accept
    else:
        # Before it says that it is ready. The unit has a filter of its own: there, the program that fetches
        # the archive is still to be started.
        forbid_the_rest()
        accept = PassedCalls(socket.socket(fileno=options.calls_fd)).accept
    asyncio.run(_serve(accept, engine, options.archive_fd, memory, advice))


async def _serve(
    accept: Accept, engine: KdfEngine, archive_fd: int | None, memory: int, advice: Callable[[int], str]
) -> None:
    jobs = len(os.sched_getaffinity(0))
    status = 1
    try:
        await Daemon(accept, engine, memory=memory, jobs=jobs, archive_fd=archive_fd, advice=advice).serve()
        status = 0
    except Exception as error:  # noqa: BLE001 - its last line is what the link tells of the reason
        sys.stderr.write(f"{as_restore_error(error).reason}\n")
    # A derivation takes seconds and cannot be interrupted, a read from a pipe perhaps never ends, and an
    # orderly end of the interpreter would wait for both. Nobody is interested in them any more.
    sys.stderr.flush()
    os._exit(status)


def _advice_in_qube(memory: int) -> Callable[[int], str]:
    """Where --memory is the memory of the whole qube, of which the worker may use `memory` bytes."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # The kernel keeps some of what the qube has for itself, and it is not in the total.
    return lambda need: (
        f"Give the worker's qube at least {-(-(need + total - memory) * 17 // 16 >> 20)} MiB: --memory, or"
        " worker.memory in the configuration."
    )


def _restrict_process() -> None:
    """No core dump, which would hold the passphrase; no file, because nothing is ever staged."""
    forbid_core_dumps()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


if __name__ == "__main__":
    main()
