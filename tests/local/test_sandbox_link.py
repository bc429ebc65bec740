"""The life of a local worker: started, called, ended, and nothing left of it whatever happens."""

import asyncio
import contextlib
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import pytest

from qubes_restore_svc.errors import BudgetTooSmall, RestoreError, SandboxUnavailable, UsageError, WorkerLost
from qubes_restore_svc.local import memory
from qubes_restore_svc.local import worker_process as process
from qubes_restore_svc.local.sandbox_link import LocalLink
from qubes_restore_svc.system_memory import MemoryRoom
from tests.local.probes import (
    ACCEPT,
    INTERPRETER,
    PATIENCE_S,
    READY,
    SLEEPER,
    UNFILTERED,
    descendants,
    inside,
    needs_bubblewrap,
    opened,
    processes_with,
    program,
)

MEMORY = 512 << 20

#: Both ways of running a worker.
both_ways = pytest.mark.parametrize(
    "sandbox", [pytest.param(True, marks=needs_bubblewrap, id="sandbox"), pytest.param(False, id="plain")]
)

#: Does not leave when the broker is gone, nor for any signal that can be ignored.
STUBBORN = """
for number in range(1, 32):
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_IGN)
time.sleep(3600)
"""


@pytest.fixture
async def archive_fd(tmp_path: Path) -> AsyncIterator[int]:
    path = tmp_path / "backup"
    path.write_bytes(b"the backup")
    async with opened(path) as descriptor:
        yield descriptor


@pytest.fixture
def mark() -> str:
    """A word by which all processes of one test are found, wherever they run."""
    return f"mark-{secrets.token_hex(8)}"


def _descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def _wait_until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


# --- Calls ------------------------------------------------------------------------------------------


@both_ways
async def test_a_call_arrives_as_qrexec_would_bring_it(archive_fd: int, sandbox: bool) -> None:
    async with LocalLink(archive_fd, sandbox=sandbox, command=INTERPRETER, memory_limit=MEMORY) as link:
        connection = await link.call("restore.Volume", "vm10.private")
        with connection:
            assert connection.gettimeout() is None and os.get_blocking(connection.fileno())
            await asyncio.to_thread(connection.sendall, b"result = descriptor")
            connection.shutdown(socket.SHUT_WR)
            answer = await asyncio.to_thread(connection.recv, 1000)
        assert answer == b'"restore.Volume+vm10.private dom0\\u0000"'


@both_ways
async def test_the_worker_gets_archive_and_memory_limit_as_options(archive_fd: int, sandbox: bool) -> None:
    async with LocalLink(archive_fd, sandbox=sandbox, command=INTERPRETER, memory_limit=MEMORY) as link:
        text = "result = [os.read(archive, 100).decode(), sys.argv[1:]]"
        found = await inside(link, text)
    assert isinstance(found, list)
    content, options = found
    assert content == "the backup"
    assert options[0::2] == ["--memory-room", "--calls-fd", "--archive-fd", "--memory-limit"]
    assert MemoryRoom.parse(options[1]).available > MEMORY
    assert options[7] == str(MEMORY)


@pytest.mark.parametrize(
    ("room", "granted", "reason", "advice"),
    [
        (MemoryRoom(90 << 20), None, "takes 144 MiB at least.*of this computer's memory 90 MiB", "End other"),
        (MemoryRoom(70 << 20, 90 << 20, "/a"), None, "takes 144 MiB at least.*320.*90 MiB, of.*70", "Raise"),
        (
            MemoryRoom(70 << 20, 90 << 20, "/a"),
            80 << 20,
            "--memory 80 .*group /a.*90 MiB, of which 70",
            "Or give less",
        ),
        (MemoryRoom(90 << 20), 100 << 20, "cannot be started", ""),
        (MemoryRoom(144 << 20), None, "cannot be started", ""),
        (MemoryRoom(70 << 20, 90 << 20, "/a"), 70 << 20, "cannot be started", ""),
    ],
)
async def test_memory_that_is_not_there_is_told_before_anything_starts(
    room: MemoryRoom,
    granted: int | None,
    reason: str,
    advice: str,
    archive_fd: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel would only kill the worker. And more can be granted only where there is some."""
    monkeypatch.setattr(memory, "memory_room", lambda: room)
    link = LocalLink(archive_fd, sandbox=False, command=["/nonexistent"], memory_limit=granted)
    with pytest.raises(BudgetTooSmall if advice else WorkerLost, match=reason) as caught:
        await link.__aenter__()
    assert advice in caught.value.advice and "--memory" not in caught.value.advice


async def test_without_a_sandbox_environment_and_terminal_are_still_not_passed_on(archive_fd: int) -> None:
    async with LocalLink(archive_fd, sandbox=False, command=UNFILTERED, memory_limit=MEMORY) as link:
        text = "result = [sorted(os.environ), os.getsid(0) == os.getpid(), os.getcwd()]"
        assert await inside(link, text) == [["LC_CTYPE"], True, "/"]


@both_ways
async def test_a_call_to_a_worker_that_is_gone_is_an_error(archive_fd: int, sandbox: bool) -> None:
    command = program(READY, "os._exit(0)")
    async with LocalLink(archive_fd, sandbox=sandbox, command=command) as link:
        await asyncio.wait_for(link.wait_gone(), PATIENCE_S)
        with pytest.raises(WorkerLost, match="cannot be called"):
            await link.call("restore.Session")
    with pytest.raises(WorkerLost, match="not running"):
        await link.call("restore.Session")


async def test_calls_that_the_worker_does_not_take_never_block_the_caller(archive_fd: int) -> None:
    connections: list[socket.socket] = []
    async with LocalLink(archive_fd, sandbox=False, command=SLEEPER) as link:
        with pytest.raises(WorkerLost, match="takes no calls"):
            while len(connections) < 5000:
                connections.append(await link.call("restore.Session"))
    for connection in connections:
        connection.close()


async def test_a_call_that_was_under_way_ends_with_the_worker(archive_fd: int) -> None:
    async with LocalLink(archive_fd, sandbox=False, command=SLEEPER) as link:
        connection = await link.call("restore.Session")
    with connection, contextlib.suppress(ConnectionResetError):
        assert connection.recv(1) == b""


async def test_a_link_that_was_not_entered_cannot_be_called(archive_fd: int) -> None:
    link = LocalLink(archive_fd)
    with pytest.raises(WorkerLost):
        await link.call("restore.Session")
    with pytest.raises(WorkerLost):
        await link.wait_gone()


# --- What is said of its end ------------------------------------------------------------------------


@both_ways
async def test_the_end_of_a_worker_is_told_with_its_last_words(archive_fd: int, sandbox: bool) -> None:
    command = program(READY, r"sys.stderr.write('first\nlast \x1b[2J\u202ewords\n\n')", "sys.exit(7)")
    async with LocalLink(archive_fd, sandbox=sandbox, command=command) as link:
        text = await asyncio.wait_for(link.wait_gone(), PATIENCE_S)
    assert text == "the worker ended with status 7: last \ufffd[2J\ufffdwords"
    assert await link.wait_gone() == text


@both_ways
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "the worker was killed (SIGKILL), perhaps for want of memory"),
        (signal.SIGSEGV, "the worker was killed (SIGSEGV)"),
    ],
)
async def test_the_signal_that_killed_a_worker_is_told(
    archive_fd: int, sandbox: bool, number: int, words: str
) -> None:
    # A fault, and not kill(): the first processes of a process namespace are protected from those.
    deed = f"os.kill(os.getpid(), {int(number)})"
    async with LocalLink(archive_fd, sandbox=sandbox, command=program(READY, deed)) as link:
        assert await asyncio.wait_for(link.wait_gone(), PATIENCE_S) == words


@both_ways
async def test_a_worker_that_floods_standard_error_neither_blocks_nor_fills_memory(
    archive_fd: int, sandbox: bool
) -> None:
    flood = "sys.stderr.write('x' * (8 << 20)); sys.stderr.flush(); os._exit(0)"
    async with LocalLink(archive_fd, sandbox=sandbox, command=program(READY, flood)) as link:
        text = await asyncio.wait_for(link.wait_gone(), PATIENCE_S)
        assert len(text) < 400
        assert link._worker is not None and link._worker._stderr is not None
        assert len(link._worker._stderr.content) == 4096


# --- Starts that fail -------------------------------------------------------------------------------


@both_ways
async def test_a_worker_that_ends_before_it_is_ready_is_an_error_with_its_words(
    archive_fd: int, sandbox: bool
) -> None:
    command = program("raise SystemExit('no such module')")
    before = _descriptors()
    with pytest.raises(WorkerLost, match="status 1: no such module, before it was ready"):
        async with LocalLink(archive_fd, sandbox=sandbox, command=command):
            pass
    assert descendants() == [] and _descriptors() == before


@both_ways
@pytest.mark.parametrize(
    ("deed", "words"), [("time.sleep(3600)", "not ready after"), ("calls.send(b'hello')", "does not keep to")]
)
async def test_a_worker_that_does_not_get_ready_is_ended(
    archive_fd: int, sandbox: bool, deed: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "START_TIMEOUT_S", 0.5)
    command = program(READY.replace("calls.send(b'ready')", deed), "time.sleep(3600)")
    with pytest.raises(WorkerLost, match=words):
        async with LocalLink(archive_fd, sandbox=sandbox, command=command):
            pass
    assert descendants() == []


@both_ways
async def test_a_program_that_does_not_exist_is_an_error(archive_fd: int, sandbox: bool) -> None:
    expected = SandboxUnavailable if sandbox else WorkerLost
    with pytest.raises(expected, match="No such file"):
        async with LocalLink(archive_fd, sandbox=sandbox, command=["/nonexistent"]):
            pass
    assert descendants() == []


def _install_bubblewrap(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = directory / "bwrap"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)


async def test_a_bubblewrap_that_fails_is_an_error_with_its_own_words(
    archive_fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install_bubblewrap(
        tmp_path, "echo 'bwrap: setting up uid map: Permission denied' >&2; exit 1", monkeypatch
    )
    with pytest.raises(SandboxUnavailable, match="setting up uid map: Permission denied") as caught:
        async with LocalLink(archive_fd, command=SLEEPER):
            pass
    assert "--no-sandbox" in caught.value.advice
    assert descendants() == []


async def test_a_bubblewrap_that_is_killed_leaves_no_child_and_nobody_waits_for_it(
    archive_fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = f"time.sleep({3600 + os.getpid()})"  # other tests, that run beside this one, sleep as well
    _install_bubblewrap(tmp_path, f"{sys.executable} -c 'import time; {ours}' & kill -9 $$", monkeypatch)
    with pytest.raises(SandboxUnavailable):
        async with asyncio.timeout(PATIENCE_S):
            async with LocalLink(archive_fd, command=SLEEPER):
                pass
    assert descendants() == []
    async with asyncio.timeout(PATIENCE_S):
        while processes_with(ours):  # it was killed; the kernel takes a moment
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("free", "elsewhere", "processors", "granted"),
    [
        (64 << 10, 0, 2, 4 << 10),
        (3 << 10, 0, 2, 1584),
        (1 << 10, 0, 2, 512),
        (64 << 10, 0, 16, 16 << 10),
        (3 << 10, 1584, 2, 744),
        (3 << 10, 3 << 10, 2, 496),
        (200, 0, 2, 200),
    ],
)
def test_a_worker_gets_no_more_memory_than_is_of_use_and_leaves_others_some(
    free: int, elsewhere: int, processors: int, granted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    assert memory._default_memory(MemoryRoom(free << 20), elsewhere << 20) == granted << 20


@needs_bubblewrap
async def test_workers_that_start_at_once_do_not_get_the_same_memory(
    archive_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = lambda: [Path(f"/proc/{process}") for process in descendants()]  # noqa: E731 - others come and go
    monkeypatch.setattr(memory, "every_process", ours)
    monkeypatch.setattr(memory, "memory_room", lambda: MemoryRoom(4 << 30))
    async with contextlib.AsyncExitStack() as started:
        links = [LocalLink(archive_fd, command=INTERPRETER) for _ in range(3)]
        await asyncio.gather(*(started.enter_async_context(link) for link in links))
        text = "result = int(sys.argv[sys.argv.index('--memory-limit') + 1])"
        granted = sorted([cast(int, await inside(link, text)) for link in links], reverse=True)
    # What a worker has taken by then is not counted twice.
    assert [round(size / (160 << 20)) for size in granted] == [16, 5, 3]


async def test_a_start_does_not_wait_for_ever_for_another(
    archive_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_TURN_S", 0.1)
    with open(sys.executable, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        async with LocalLink(archive_fd, sandbox=False, command=INTERPRETER):
            pass


@needs_bubblewrap
async def test_a_bubblewrap_that_cannot_disable_user_namespaces_is_used_without(
    archive_fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
for option; do
  [ "$option" = --disable-userns ] && echo "bwrap: words that nobody foresaw" >&2 && exit 1
done
PATH=/usr/bin:/bin exec bwrap "$@"
"""
    _install_bubblewrap(tmp_path, script, monkeypatch)
    async with LocalLink(archive_fd, command=INTERPRETER, memory_limit=MEMORY) as link:
        assert await inside(link, "result = os.getpid()") == 2


@pytest.mark.parametrize("kind", ["writable", "directory", "socket", "terminal"])
async def test_what_a_worker_must_not_have_is_refused_as_archive(tmp_path: Path, kind: str) -> None:
    if kind == "socket":
        descriptor = socket.socket().detach()
    elif kind == "terminal":
        master, slave = os.openpty()
        descriptor = os.open(os.ttyname(slave), os.O_RDONLY | os.O_NOCTTY)
        os.close(slave)
    elif kind == "directory":
        descriptor = os.open(tmp_path, os.O_RDONLY)
    else:
        descriptor = os.open(tmp_path / "backup", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(UsageError, match="for reading only"):
            async with LocalLink(descriptor, command=SLEEPER):
                pass
    finally:
        os.close(descriptor)
        if kind == "terminal":
            os.close(master)


# --- Ends -------------------------------------------------------------------------------------------


@both_ways
async def test_leaving_ends_the_most_stubborn_worker_at_once(
    archive_fd: int, sandbox: bool, mark: str
) -> None:
    before = _descriptors()
    async with LocalLink(
        archive_fd, sandbox=sandbox, command=program(READY, STUBBORN, f"# {mark}"), memory_limit=MEMORY
    ) as link:
        assert processes_with(mark)
        started = time.monotonic()
    assert time.monotonic() - started < PATIENCE_S / 10
    assert processes_with(mark) == [] and descendants() == []
    assert _descriptors() == before
    assert await link.wait_gone() == "the worker was ended"


@needs_bubblewrap
async def test_processes_that_a_worker_started_and_left_end_with_it(archive_fd: int, mark: str) -> None:
    fork = "os.fork(); os.fork(); os.setsid() if os.getpid() != 2 else None"
    command = program(READY.replace("calls.send", f"{fork}\ncalls.send"), STUBBORN, f"# {mark}")
    async with LocalLink(archive_fd, command=command):
        assert _wait_until(lambda: len(processes_with(mark)) >= 4)
    assert processes_with(mark) == []


@needs_bubblewrap
async def test_processes_that_outlive_the_worker_end_with_the_link(archive_fd: int, mark: str) -> None:
    # Its memory takes the kernel a while to free.
    leave = "if os.fork():\n    os._exit(0)\nballast = bytearray(400 << 20)"
    async with LocalLink(archive_fd, command=program(READY, leave, STUBBORN, f"# {mark}")) as link:
        await asyncio.wait_for(link.wait_gone(), PATIENCE_S)
    assert processes_with(mark) == []


@both_ways
async def test_an_exception_inside_ends_the_worker(archive_fd: int, sandbox: bool, mark: str) -> None:
    with pytest.raises(RuntimeError, match="something else"):
        async with LocalLink(archive_fd, sandbox=sandbox, command=program(READY, STUBBORN, f"# {mark}")):
            raise RuntimeError("something else")
    assert processes_with(mark) == []


@both_ways
async def test_a_cancellation_at_any_moment_leaves_nothing(archive_fd: int, sandbox: bool, mark: str) -> None:
    before = _descriptors()

    async def use() -> None:
        async with LocalLink(archive_fd, sandbox=sandbox, command=program(READY, STUBBORN, f"# {mark}")):
            await asyncio.sleep(3600)

    for attempt in range(24):
        using = asyncio.create_task(use())
        await asyncio.sleep(attempt * 0.005)
        using.cancel()
        await asyncio.sleep(0.001 * (attempt % 3))
        using.cancel()
        with pytest.raises(asyncio.CancelledError):
            await using
        assert processes_with(mark) == [] and descendants() == []
        assert _descriptors() == before


BROKER = """
import asyncio, os, sys
from qubes_restore_svc.local.sandbox_link import LocalLink
async def main():
    async with LocalLink(0, sandbox=sys.argv[1] == 'sandbox', command=sys.argv[2:], memory_limit=1 << 29):
        print('ready', flush=True)
        await asyncio.sleep(3600)
asyncio.run(main())
"""


def _start_broker(mode: str, command: list[str], archive: Path) -> "subprocess.Popen[bytes]":
    root = Path(process.__file__).parents[2]
    with archive.open("rb") as stream:
        return subprocess.Popen(
            [sys.executable, "-c", BROKER, mode, *command],
            stdin=stream,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(root)},
        )


@pytest.mark.parametrize(
    ("mode", "deed"),
    [
        pytest.param("sandbox", STUBBORN, marks=needs_bubblewrap),
        pytest.param("plain", f"{ACCEPT}\naccept()"),
    ],
)
def test_nothing_is_left_when_the_broker_is_killed(mode: str, deed: str, tmp_path: Path, mark: str) -> None:
    (tmp_path / "backup").write_bytes(b"x")
    with _start_broker(mode, program(READY, deed, f"# {mark}"), tmp_path / "backup") as broker:
        assert broker.stdout is not None
        assert broker.stdout.readline() == b"ready\n"
        assert len(processes_with(mark)) > 1
        broker.kill()
        broker.wait()
        assert _wait_until(lambda: processes_with(mark) == [])


@needs_bubblewrap
@pytest.mark.parametrize("moment", ["before bubblewrap acts", "before the worker is ready"])
def test_nothing_is_left_when_the_broker_is_killed_during_the_start(
    moment: str, tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "backup").write_bytes(b"x")
    command = program(READY, ACCEPT, "accept()", f"# {mark}")
    if moment == "before bubblewrap acts":
        _install_bubblewrap(tmp_path, 'sleep 0.2; PATH=/usr/bin:/bin exec bwrap "$@"', monkeypatch)
        begun = 2  # the broker and what it has started
    else:
        command[-1] = f"import time; time.sleep(0.5)\n{command[-1]}"
        begun = 4  # … the first process in the sandbox, and the worker
    with _start_broker("sandbox", command, tmp_path / "backup") as broker:
        assert _wait_until(lambda: len(processes_with(mark)) >= begun)
        broker.kill()
        broker.wait()
        assert _wait_until(lambda: processes_with(mark) == [])


async def test_errors_of_the_link_are_errors_that_a_person_can_read(
    archive_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RestoreError) as caught:
        async with LocalLink(archive_fd):
            pass
    assert caught.value.kind == "sandbox-unavailable"
