"""Calls over qrexec as processes: watched, reaped, ended."""

import asyncio
import contextlib
import errno
import os
import subprocess
from pathlib import Path

import pytest

from qubes_restore_svc.errors import Cancelled, HostFailed, WorkerLost
from qubes_restore_svc.qubes import qrexec as qrexec_calls
from qubes_restore_svc.qubes.qrexec import QrexecCalls
from tests.qubes.fake_qubes import PATIENCE_S, STORAGE, FakeQubes, Gate, Traces


@pytest.fixture
def system(tmp_path: Path) -> FakeQubes:
    system = FakeQubes(tmp_path)
    system.there[STORAGE].services |= {
        "x.Echo": "exec cat",
        "x.Fail": "exit 3",
        "x.FailWhenTold": "read line; exit 3",
        "x.Well": "exit 0",
        "x.Killed": "kill -9 $$",
        "x.Deaf": "trap '' TERM INT HUP PIPE; while :; do sleep 1000; done",
    }
    return system


async def _end_of(calls: QrexecCalls, service: str) -> str | None:
    connection, call = await calls.converse(STORAGE, service)
    with connection:
        await call.wait(PATIENCE_S)
    return call.fault


async def test_a_conversation_is_a_blocking_socket_that_no_child_inherits(system: FakeQubes) -> None:
    async with QrexecCalls(system) as calls:
        connection, _ = await calls.converse(STORAGE, "x.Echo")
        with connection:
            assert connection.gettimeout() is None and os.get_blocking(connection.fileno())
            assert not os.get_inheritable(connection.fileno())
            other, _ = await calls.converse(STORAGE, "x.Echo")  # must not hold the first one open
            other.sendall(b"two")
            connection.sendall(b"one")
            assert (connection.recv(10), other.recv(10)) == (b"one", b"two")
            other.close()


async def test_the_end_of_the_process_is_the_end_of_the_socket_and_is_told(system: FakeQubes) -> None:
    async with QrexecCalls(system) as calls:
        connection, call = await calls.converse(STORAGE, "x.Fail")
        with connection:
            assert await asyncio.to_thread(connection.recv, 1) == b""
        assert await call.wait(PATIENCE_S) == 3 == call.exit_code
        assert call.fault == "x.Fail in sys-usb ended with exit code 3"
        assert await _end_of(calls, "x.None") == (
            "x.None in sys-usb ended with exit code 127 (there is no such service)"
        )
        assert await _end_of(calls, "x.Killed") == "x.Killed in sys-usb was killed by signal 9 (SIGKILL)"
        assert await _end_of(calls, "x.Well") is None


async def test_the_exit_code_is_known_at_once_even_if_the_loop_has_not_seen_it(system: FakeQubes) -> None:
    async with QrexecCalls(system) as calls:
        connection, call = await calls.converse(STORAGE, "x.FailWhenTold")
        with connection:
            connection.sendall(b"\n")  # from here on this test holds the loop, which cannot reap it
            while connection.recv(1):
                pass
            os.waitid(os.P_PID, system.processes[0].pid, os.WEXITED | os.WNOWAIT)
            assert call.exit_code == 3


async def test_ended_calls_leave_neither_processes_nor_descriptors(system: FakeQubes) -> None:
    async with QrexecCalls(system) as calls:
        traces = Traces(system)
        for _ in range(20):
            await _end_of(calls, "x.Fail")
        assert traces.left() == []
        assert len(calls._calls) == 1


async def test_leaving_ends_those_that_go_on_whatever_they_ignore(system: FakeQubes) -> None:
    traces = Traces(system)
    async with QrexecCalls(system) as calls:
        sockets = [(await calls.converse(STORAGE, "x.Deaf"))[0] for _ in range(3)]
    for connection in sockets:
        assert connection.recv(1) == b""
        connection.close()
    assert traces.left() == []


async def test_a_call_that_was_ended_here_has_no_fault(system: FakeQubes) -> None:
    async with QrexecCalls(system) as calls:
        connection, call = await calls.converse(STORAGE, "x.Deaf")
        with connection:
            assert await call.wait(0.01) is None
            assert await call.end(0.01)
        assert call.exit_code == -9 and call.fault is None


async def test_a_cancel_while_a_call_begins_leaves_nothing_of_it(system: FakeQubes) -> None:
    traces = Traces(system)
    gate = system.gates["run_service"] = Gate()
    async with QrexecCalls(system) as calls:
        task = asyncio.create_task(calls.converse(STORAGE, "x.Deaf"))
        await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
        task.cancel()
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(system.running_processes()) == 1
    assert traces.left() == []


async def test_a_call_that_begins_while_all_are_ended_is_ended_too(system: FakeQubes) -> None:
    traces = Traces(system)
    gate = system.gates["run_service"] = Gate()
    async with QrexecCalls(system) as calls:
        task = asyncio.create_task(calls.converse(STORAGE, "x.Deaf"))
        await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
    gate.opened.set()
    with pytest.raises(HostFailed, match="any more"):
        await task
    assert traces.left() == []


async def test_leaving_is_carried_through_even_if_cancelled(system: FakeQubes) -> None:
    traces = Traces(system)
    inside = asyncio.Event()

    async def work() -> None:
        async with QrexecCalls(system) as calls:
            connection, _ = await calls.converse(STORAGE, "x.Deaf")
            connection.close()
            inside.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            asyncio.get_running_loop().call_soon(task.cancel)

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert traces.left() == []


async def test_a_process_that_cannot_be_watched_is_not_left(
    system: FakeQubes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    traces = Traces(system)
    async with QrexecCalls(system) as calls:
        with pytest.raises(HostFailed, match=r"x\.Deaf cannot be called: Too many open files"):
            await calls.converse(STORAGE, "x.Deaf")
        assert traces.left() == []


async def test_a_failure_of_the_system_is_passed_on(system: FakeQubes) -> None:
    traces = Traces(system)
    system.there[STORAGE].running = False
    async with QrexecCalls(system) as calls:
        with pytest.raises(HostFailed, match="does not run"):
            await calls.converse(STORAGE, "x.Echo")
    assert traces.left() == []


class Immortal:
    """A process that no signal ends (it waits for a disk, say)."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.pid = process.pid

    def poll(self) -> None:
        return None

    def kill(self) -> None:
        pass


async def test_a_process_that_cannot_be_ended_is_named(
    system: FakeQubes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qrexec_calls, "_KILL_TIMEOUT_S", 0.01)
    run = system.run_service
    monkeypatch.setattr(system, "run_service", lambda *a, **k: Immortal(run(*a, **k)))
    traces = Traces(system)
    try:
        with pytest.raises(HostFailed, match=r"Left behind.*the process of x\.Deaf in sys-usb\."):
            async with QrexecCalls(system) as calls:
                (await calls.converse(STORAGE, "x.Deaf"))[0].close()
        with pytest.raises(WorkerLost, match=r"^why\. .*Left behind.*the process of x\.Deaf in sys-usb\."):
            async with QrexecCalls(system) as calls:
                (await calls.converse(STORAGE, "x.Deaf"))[0].close()
                raise WorkerLost("why")
        with pytest.raises(Cancelled, match=r"Left behind.*x\.Deaf"):
            async with QrexecCalls(system) as calls:
                (await calls.converse(STORAGE, "x.Deaf"))[0].close()
                raise asyncio.CancelledError
        with pytest.raises(KeyError) as caught:
            async with QrexecCalls(system) as calls:
                (await calls.converse(STORAGE, "x.Deaf"))[0].close()
                raise KeyError
        assert "x.Deaf" in caught.value.__notes__[0]
    finally:
        for process in system.processes:
            process.kill()
            process.wait()
    assert traces.left() == []
