"""Programs that a test runs in the worker's place, and a look at processes from outside.

Strategy: the interpreter of probes does what the worker does at its start, then executes the Python text
that each call brings and answers with the JSON of its `result`.
"""

import asyncio
import json
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qubes_restore_svc.local.sandbox import python_command
from qubes_restore_svc.local.sandbox_link import LocalLink
from tests.support.fixtures import REPOSITORY

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

#: Seconds after which what should have happened did not.
PATIENCE_S = 60.0

READY = """
import ctypes, errno, fcntl, json, mmap, os, signal, socket, sys, threading, time
calls = socket.socket(fileno=int(sys.argv[sys.argv.index('--calls-fd') + 1]))
archive = int(sys.argv[sys.argv.index('--archive-fd') + 1])
calls.send(b'ready')
"""

ACCEPT = """
def accept():
    message, descriptors, _, _ = socket.recv_fds(calls, 16, 2)
    if not message:
        os._exit(0)
    connection = socket.socket(fileno=descriptors[0])
    descriptor = b''
    while not descriptor.endswith(b'\\0'):
        descriptor += connection.recv(1)
    return connection, descriptor.decode()
"""

EXECUTE = """
def attempt(action, *arguments):
    try:
        action(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return 'done'
while True:
    connection, descriptor = accept()
    text = b''.join(iter(lambda: connection.recv(65536), b'')).decode()
    names = dict(globals())
    exec(text, names)
    connection.sendall(json.dumps(names['result']).encode())
    connection.close()
    del names
"""


def program(*parts: str) -> list[str]:
    """The command of a worker that consists of these pieces of Python."""
    return [*python_command(), "\n".join(parts)]


#: As the worker: what is imported later may not bring libraries.
FILTERED = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from qubes_restore_svc.worker.system_calls import forbid_the_rest
""" + READY.replace("calls.send", "forbid_the_rest()\ncalls.send")

INTERPRETER = program(FILTERED, ACCEPT, EXECUTE)
#: Without the filter of system calls: what the namespaces and mounts hold by themselves.
UNFILTERED = program(READY, ACCEPT, EXECUTE)
SLEEPER = program(READY, "time.sleep(3600)")


@asynccontextmanager
async def opened(path: Path | str = os.devnull) -> AsyncIterator[int]:
    """A descriptor of the file, for reading."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def inside(link: LocalLink, text: str) -> object:
    """Execute the Python `text` in the worker's place; returns what it has set `result` to."""
    connection = await link.call("restore.Session")

    def converse() -> bytes:
        with connection:
            connection.sendall(text.encode())
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    answer = await asyncio.to_thread(converse)
    assert answer, f"the probe failed: {await asyncio.wait_for(link.wait_gone(), PATIENCE_S)}"
    result: object = json.loads(answer)
    return result


def descendants(of: int | None = None) -> list[int]:
    """Process ids of all processes that descend from `of` (default: this one)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [os.getpid() if of is None else of]
    for ancestor in found:
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found[1:]


def worker_process() -> Path:
    """/proc/PID of the one worker that descends from this process."""
    [found] = [
        Path(f"/proc/{process}")
        for process in descendants()
        if Path(f"/proc/{process}/cmdline").read_bytes().startswith(os.fsencode(sys.executable))
        and b"--calls-fd" in Path(f"/proc/{process}/cmdline").read_bytes()
    ]
    return found


def processes_with(mark: str) -> list[int]:
    """All processes of the machine with `mark` in their command lines, and zombies among our own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
