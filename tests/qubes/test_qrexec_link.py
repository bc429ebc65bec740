"""The life of a worker behind qrexec: made, called, given the archive, ended; and nothing is left of it."""

import asyncio
import os
import re
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from qubes_restore_svc.broker.interfaces import Link
from qubes_restore_svc.errors import (
    ArchiveUnreadable,
    HostFailed,
    ProtocolViolation,
    RestoreError,
    RestoreInProgress,
    UsageError,
    WorkerLost,
    WorkerMissing,
)
from qubes_restore_svc.qubes import backup_source as storage_module
from qubes_restore_svc.qubes.backup_source import Dom0File, Location
from qubes_restore_svc.qubes.locks import WORKER, GuardedLock
from qubes_restore_svc.qubes.qrexec_link import QrexecLink
from qubes_restore_svc.qubes.tags import STORAGE_TAG, WORKER_TAG
from qubes_restore_svc.qubes.worker_vm import worker_properties
from qubes_restore_svc.wire.messages import Storage
from qubes_restore_svc.wire.restore_call import QubePath, QubeService
from tests.qubes.fake_qubes import PATIENCE_S, STORAGE, TEMPLATE, FakeQube, FakeQubes, Gate, Traces
from tests.qubes.qubes_bed import GONE

PATH = QubePath(STORAGE, "/backup")
SERVICE = QubeService(STORAGE, "my.Backup+monday")

#: What every entering of a link to a file in a qube asks of the system, in order.
STEPS = [
    "is_disposable_template", "reports_service", "exists", "tags", "start", "create",
    "run_service restore.Session+ready", "run_service qubes.RegisterBackupLocation", "add_tag",
]  # fmt: skip


@pytest.fixture
def system(tmp_path: Path) -> FakeQubes:
    return FakeQubes(tmp_path)


@pytest.fixture
async def traces(system: FakeQubes) -> Traces:
    return Traces(system)


@pytest.fixture
async def archive(tmp_path: Path) -> AsyncIterator[Dom0File]:
    path = tmp_path / "backup"
    path.write_bytes(b"the backup")
    descriptor = os.open(path, os.O_RDONLY)
    yield Dom0File(descriptor)
    os.close(descriptor)


def _link(
    system: FakeQubes,
    location: Location = PATH,
    template: str | None = None,
    ready_timeout_s: float = PATIENCE_S,
) -> QrexecLink:
    return QrexecLink(
        system,
        location,
        template=template,
        memory=4096,
        vcpus=3,
        ready_timeout_s=ready_timeout_s,
        lock_path=system.directory / "w.lock",
    )


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


async def _received(connection: socket.socket) -> bytes:
    """All that comes until the end."""
    received = b""
    with connection:
        while piece := await asyncio.to_thread(connection.recv, 1000):
            received += piece
    return received


async def _fault(link: Link) -> str:
    """The reason that the side that brings the archive has for its early end; it comes with what to do."""
    fault = await link.archive_fault()
    assert fault is not None and fault.advice
    return fault.reason


# --- A cancel ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question", ["management_dispvm", "is_disposable_template", "reports_service", "exists", "start"]
)
async def test_a_cancel_does_not_wait_for_what_leaves_nothing_to_undo(
    system: FakeQubes, traces: Traces, question: str
) -> None:
    """A system that is slow to answer a question, or to start the qube that holds the backup."""
    gate = system.gates[question] = Gate()
    entering = asyncio.create_task(_link(system).__aenter__())
    await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(entering, PATIENCE_S)
    assert not gate.opened.is_set()
    gate.opened.set()
    assert traces.left() == []


async def test_a_cancel_does_not_wait_for_a_guard_that_removes_a_worker(
    system: FakeQubes, traces: Traces
) -> None:
    lock = system.directory / "w.lock"
    with GuardedLock(WORKER, lock, lambda names: None):
        lock.write_text(GONE)
        entering = asyncio.create_task(_link(system).__aenter__())
        assert not (await asyncio.wait([entering], timeout=0.05))[0]
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(entering, PATIENCE_S)
    assert traces.left() == []


# --- Entering and leaving ------------------------------------------------------------------------


async def test_entering_takes_everything_in_order_and_leaving_gives_it_back(
    system: FakeQubes, traces: Traces
) -> None:
    link: Link = _link(system)
    async with link:
        (worker,) = system.workers
        qube = system.there[worker]
        assert (qube.klass, qube.template, qube.tags) == ("DispVM", TEMPLATE, {WORKER_TAG})
        assert qube.properties == worker_properties(4096, 3)
        assert link.storage == Storage(qube=STORAGE, location_id="aB3dE6")
        assert system.there[STORAGE].tags == {STORAGE_TAG}
    assert system.events == [
        f"start {STORAGE}",
        f"create {worker}",
        f"start {worker}",
        f"run_service restore.Session+ready in {worker}",
        f"run_service qubes.RegisterBackupLocation in {STORAGE}",
        f"add_tag {STORAGE} {STORAGE_TAG}",
        f"discard_tag {STORAGE} {STORAGE_TAG}",
        f"discard_tag {worker} {WORKER_TAG}",
        f"destroy {worker}",
    ]
    assert traces.left() == []


@pytest.mark.parametrize("location", [SERVICE, Dom0File(0)])
async def test_only_a_backup_that_the_worker_fetches_is_registered(
    system: FakeQubes, traces: Traces, location: Location
) -> None:
    async with _link(system, location) as link:
        assert link.storage is None
        assert system.there[STORAGE].tags == set()
    assert not any("Register" in event for event in system.events)
    assert traces.left() == []


async def test_the_backups_qube_is_started_and_stays_up(system: FakeQubes) -> None:
    system.there[STORAGE].running = False
    async with _link(system):
        pass
    assert system.there[STORAGE].running


async def test_the_template_can_be_chosen(system: FakeQubes) -> None:
    system.there["other-dvm"] = FakeQube(disposable_template=True)
    async with _link(system, template="other-dvm"):
        assert system.there[system.workers[0]].template == "other-dvm"


async def test_there_is_one_worker_at_a_time(system: FakeQubes, traces: Traces) -> None:
    async with _link(system):
        with pytest.raises(RestoreInProgress):
            await _link(system).__aenter__()
        assert len(system.workers) == 1 and system.there[STORAGE].tags == {STORAGE_TAG}
    assert traces.left() == []


async def test_what_a_killed_restore_has_left_goes_first(system: FakeQubes, traces: Traces) -> None:
    system.there["disp-restore-0001"] = FakeQube("DispVM", tags={WORKER_TAG})
    system.there["elsewhere"] = FakeQube(tags={STORAGE_TAG})
    async with _link(system):
        assert "disp-restore-0001" not in system.there
        assert system.tagged(STORAGE_TAG) == [STORAGE]
    del system.there["elsewhere"]
    assert traces.left() == []


# --- Before a passphrase is asked for ------------------------------------------------------------


async def test_the_check_creates_nothing(system: FakeQubes, traces: Traces) -> None:
    assert await _link(system).check() == TEMPLATE
    assert system.events == [] and traces.left() == []


@pytest.mark.parametrize("location", [QubePath("gone", "/x"), QubeService("gone", "x")])
async def test_a_backup_in_a_qube_that_does_not_exist_is_known_before(
    system: FakeQubes, location: Location
) -> None:
    with pytest.raises(UsageError, match="there is no qube gone"):
        await _link(system, location).check()


async def test_a_missing_worker_is_known_before_if_the_template_reports_its_services(
    system: FakeQubes, traces: Traces
) -> None:
    system.there[TEMPLATE].reported = {"qubes.VMShell"}
    with pytest.raises(WorkerMissing):
        await _link(system).check()
    with pytest.raises(WorkerMissing):
        await _link(system).__aenter__()
    assert system.events == [] and traces.left() == []


# --- Is the worker there? ------------------------------------------------------------------------


async def test_a_missing_worker_is_known_before_the_backup_is_touched(
    system: FakeQubes, traces: Traces
) -> None:
    del system.worker["restore.Session+ready"], system.worker["restore.Session"]
    with pytest.raises(WorkerMissing, match="Install the package qubes-restore-svc-vm in fedora-42"):
        await _link(system).__aenter__()
    assert not any("Register" in event for event in system.events)
    assert traces.left() == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 0", r"did not say that it is ready\. "),
        ("printf read", r"did not say that it is ready\. "),
        ("printf READY", r"did not say that it is ready\. "),
        ("exit 125", r"restore\.Session\+ready in disp-restore-.*125 \(the call could not be made\)"),
        ("exit 1", "exit code 1"),
        ("exec cat", "not ready after 0 seconds"),
    ],
)
async def test_a_worker_that_does_not_say_that_it_is_ready_is_lost(
    system: FakeQubes, traces: Traces, script: str, reason: str
) -> None:
    timeout_s = 0.1 if "cat" in script else PATIENCE_S
    system.worker["restore.Session+ready"] = script
    with pytest.raises(WorkerLost, match=reason):
        await _link(system, ready_timeout_s=timeout_s).__aenter__()
    assert traces.left() == []


async def test_a_worker_that_goes_on_talking_is_ready_all_the_same(system: FakeQubes, traces: Traces) -> None:
    system.worker["restore.Session+ready"] = "while :; do printf ready; done"
    async with _link(system):
        pass
    assert traces.left() == []


# --- Failure at every step -----------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_fails_leaves_nothing_and_the_next_run_works(
    system: FakeQubes, traces: Traces, step: str
) -> None:
    system.faults[step] = HostFailed("the reason")
    with pytest.raises(RestoreError, match="the reason") as caught:
        await _link(system).__aenter__()
    assert "Left behind" not in str(caught.value)
    assert traces.left() == []
    system.faults.clear()
    async with _link(system):
        pass
    assert traces.left() == []


@pytest.mark.parametrize("step", STEPS)
async def test_a_cancel_at_a_step_leaves_nothing_and_the_next_run_works(
    system: FakeQubes, traces: Traces, step: str
) -> None:
    gate = system.gates[step] = Gate()
    task = asyncio.create_task(_link(system).__aenter__())
    await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
    task.cancel()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert traces.left() == []
    async with _link(system):
        pass
    assert traces.left() == []


@pytest.mark.parametrize("error", [WorkerLost("the reason"), KeyError("x"), asyncio.CancelledError()])
async def test_whatever_ends_the_work_everything_is_given_back(
    system: FakeQubes, traces: Traces, error: BaseException
) -> None:
    with pytest.raises(type(error)):
        async with _link(system) as link:
            connection = await link.call("restore.Session")
            raise error
    assert connection.recv(1) == b""
    connection.close()
    assert traces.left() == []


@pytest.mark.parametrize("step", ["discard_tag", "destroy"])
async def test_leaving_is_carried_through_even_if_cancelled(
    system: FakeQubes, traces: Traces, step: str
) -> None:
    gate = Gate()

    async def work() -> None:
        async with _link(system):
            system.gates[step] = gate

    task = asyncio.create_task(work())
    await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert traces.left() == []


async def test_all_that_cannot_be_given_back_is_named_and_the_rest_is(
    system: FakeQubes, traces: Traces
) -> None:
    with pytest.raises(WorkerLost) as caught:
        async with _link(system):
            system.faults |= {"discard_tag": HostFailed("no"), "destroy": HostFailed("not this either")}
            raise WorkerLost("the reason")
    assert caught.value.reason == "the reason"
    assert "the tag restore-svc-storage of the qube sys-usb (no)" in caught.value.advice
    assert "(not this either)" in caught.value.advice
    assert all(what.startswith(("qube disp-restore-", "tag ")) for what in traces.left())
    system.faults.clear()
    async with _link(system):
        pass
    assert traces.left() == []


# --- Calls ---------------------------------------------------------------------------------------


async def test_a_call_is_a_blocking_socket_to_the_service(system: FakeQubes, traces: Traces) -> None:
    async with _link(system) as link:
        connection = await link.call("restore.Volume", "vm10.private")
        assert connection.gettimeout() is None and os.get_blocking(connection.fileno())
        assert not os.get_inheritable(connection.fileno())
        connection.sendall(b" and back")
        connection.shutdown(socket.SHUT_WR)
        assert await _received(connection) == b"restore.Volume+vm10.private and back"
    assert traces.left() == []


@pytest.mark.parametrize("argument", ["a b", "a;b", "a\0", "x" * 300, "ä", "../x", "a\n"])
async def test_what_qrexec_would_not_call_is_not_tried(system: FakeQubes, argument: str) -> None:
    async with _link(system) as link:
        before = len(system.processes)
        with pytest.raises(ProtocolViolation):
            await link.call("restore.Volume", argument)
        assert len(system.processes) == before


async def test_a_link_that_was_not_entered_or_was_left_cannot_be_called(system: FakeQubes) -> None:
    link = _link(system)
    for _ in range(2):
        for call in (link.call("restore.Session"), link.provide_archive()):
            with pytest.raises(WorkerLost, match="not running"):
                await call
        async with _link(system) as link:
            pass


async def test_a_call_to_a_worker_that_is_gone_is_an_error(system: FakeQubes, traces: Traces) -> None:
    async with _link(system) as link:
        system.there[system.workers[0]].running = False
        with pytest.raises(WorkerLost, match=r"cannot be called: .*does not run"):
            await link.call("restore.Volume", "vm1.root")
    assert traces.left() == []


# --- The archive ---------------------------------------------------------------------------------


async def test_a_file_of_dom0_is_the_input_of_one_call(
    system: FakeQubes, archive: Dom0File, traces: Traces
) -> None:
    async with _link(system, archive) as link:
        await link.provide_archive()
        await _until(lambda: not system.running_processes())
        assert (system.directory / "archive").read_bytes() == b"the backup"
        await link.provide_archive()
        assert [event for event in system.events if "Archive" in event] == [
            f"run_service restore.Archive in {system.workers[0]}"
        ]
        assert await link.archive_fault() is None
    assert traces.left() == []


async def test_a_path_is_for_the_worker_to_fetch(system: FakeQubes) -> None:
    async with _link(system) as link:
        before = system.events[:]
        await link.provide_archive()
        assert system.events == before and await link.archive_fault() is None


async def test_a_service_and_the_worker_are_joined_for_every_pass(system: FakeQubes, traces: Traces) -> None:
    system.there[STORAGE].services["my.Backup"] = (
        'read -r paths; echo "$0 of $paths"; read -r sum; echo "$sum" >> {directory}/sums'
    )
    system.worker["restore.Archive+qfile"] = (
        "echo vm1/ dom0-home/; read -r data; echo $data >> {directory}/data; echo checked"
    )
    async with _link(system, SERVICE) as link:
        for passes in (1, 2):
            await link.provide_archive()
            await _until(lambda: not system.running_processes())
            assert await link.archive_fault() is None
            data = "my.Backup+monday of vm1/ dom0-home/\n"
            assert (system.directory / "data").read_text() == data * passes
            assert (system.directory / "sums").read_text() == "checked\n" * passes
    assert traces.left() == []


async def test_the_end_of_one_side_is_the_end_of_the_other(system: FakeQubes, traces: Traces) -> None:
    """Nobody else may hold an end of their pipes."""
    system.there[STORAGE].services["my.Backup"] = "exec cat > /dev/null"
    system.worker["restore.Archive+qfile"] = "exit 0"
    async with _link(system, SERVICE) as link:
        await link.provide_archive()
        await _until(lambda: not system.running_processes())
        system.there[STORAGE].services["my.Backup"] = "exit 0"
        system.worker["restore.Archive+qfile"] = "exec cat > /dev/null"
        await link.provide_archive()
        await _until(lambda: not system.running_processes())


async def test_a_pass_that_goes_on_is_ended_before_the_next(
    system: FakeQubes, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "_PASS_PATIENCE_S", 0.05)
    system.there[STORAGE].services["my.Backup"] = "while :; do sleep 1000; done"
    system.worker["restore.Archive+qfile"] = "while :; do sleep 1000; done"
    async with _link(system, SERVICE) as link:
        await link.provide_archive()
        first = set(system.running_processes())
        await link.provide_archive()
        assert len(first) == 2 and len(system.running_processes()) == 2
        assert not first & set(system.running_processes())
        assert await link.archive_fault() is None
    assert traces.left() == []


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        (None, r"my.Backup+monday in sys-usb ended with exit code 127 (there is no such service)"),
        ("exit 126", r"my.Backup+monday in sys-usb ended with exit code 126 (the call was refused)"),
        ("exit 5", r"my.Backup+monday in sys-usb ended with exit code 5"),
    ],
)
async def test_a_storage_service_that_fails_is_told(
    system: FakeQubes, script: str | None, fault: str
) -> None:
    if script is not None:
        system.there[STORAGE].services["my.Backup"] = script
    system.worker["restore.Archive+qfile"] = "exec cat > /dev/null"
    async with _link(system, SERVICE) as link:
        await link.provide_archive()
        assert (await _fault(link)) == fault


async def test_a_storage_service_whose_reader_stops_early_has_not_failed(system: FakeQubes) -> None:
    system.there[STORAGE].services["my.Backup"] = "exit 141"
    system.worker["restore.Archive+qfile"] = "exit 0"
    async with _link(system, SERVICE) as link:
        await link.provide_archive()
        await _until(lambda: not system.running_processes())
        assert await link.archive_fault() is None


async def test_a_worker_that_takes_no_archive_is_told(system: FakeQubes, archive: Dom0File) -> None:
    del system.worker["restore.Archive"]
    async with _link(system, archive) as link:
        await link.provide_archive()
        assert "restore.Archive in disp-restore-" in await _fault(link)


async def test_a_registration_that_its_qube_ends_is_told(system: FakeQubes) -> None:
    system.there[STORAGE].services["qubes.RegisterBackupLocation"] = "read -r x; echo abc; exit 3"
    async with _link(system) as link:
        await _until(lambda: not system.running_processes())
        assert await _fault(link) == "qubes.RegisterBackupLocation in sys-usb ended with exit code 3"


async def test_a_service_in_a_qube_that_stopped_meanwhile_is_an_error(
    system: FakeQubes, traces: Traces
) -> None:
    with pytest.raises(ArchiveUnreadable, match=r"my\.Backup\+monday in sys-usb cannot be called"):
        async with _link(system, SERVICE) as link:
            system.there[STORAGE].running = False
            await link.provide_archive()
    assert traces.left() == []


@pytest.mark.parametrize("location", [SERVICE, Dom0File(0)])
async def test_an_archive_for_a_worker_that_is_gone_is_an_error(
    system: FakeQubes, traces: Traces, location: Location
) -> None:
    system.there[STORAGE].services["my.Backup"] = "exec cat"
    with pytest.raises(WorkerLost, match="cannot be called"):
        async with _link(system, location) as link:
            system.there[system.workers[0]].running = False
            await link.provide_archive()
    assert traces.left() == []


# --- The worker's end ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 0", "the worker ended the session"),
        ("exit 255", "the worker's qube has shut down, perhaps for want of memory"),
        ("exit 1", "restore.Session in disp-restore-.* ended with exit code 1"),
        ("kill -9 $$", "restore.Session in disp-restore-.* was killed by signal 9 .SIGKILL."),
    ],
)
async def test_the_end_of_the_session_is_told_with_its_cause(
    system: FakeQubes, script: str, reason: str
) -> None:
    system.worker["restore.Session"] = script
    async with _link(system) as link:
        with await link.call("restore.Session"):
            told = await asyncio.wait_for(link.wait_gone(), PATIENCE_S)
    assert re.fullmatch(reason, told)


async def test_the_end_of_the_qube_is_told(system: FakeQubes, traces: Traces) -> None:
    async with _link(system) as link:
        with await link.call("restore.Session"):
            system.vanish(system.workers[0])
            told = await asyncio.wait_for(link.wait_gone(), PATIENCE_S)
    assert told == "the worker's qube has shut down, perhaps for want of memory"
    assert traces.left() == []


async def test_a_worker_that_was_ended_here_is_told_so(system: FakeQubes) -> None:
    async with _link(system) as link:
        connection = await link.call("restore.Session")
        waiting = asyncio.create_task(link.wait_gone())
        await asyncio.sleep(0)
    connection.close()
    assert await waiting == "the worker was ended"


async def test_as_long_as_the_session_lasts_the_worker_is_not_gone(system: FakeQubes) -> None:
    async with _link(system) as link:
        with pytest.raises(WorkerLost):
            await link.wait_gone()
        with await link.call("restore.Session"):
            (await link.call("restore.Volume", "vm1.root")).close()
            await _until(lambda: len(system.running_processes()) == 2)  # with the registration
            waiting = asyncio.create_task(link.wait_gone())
            assert not (await asyncio.wait([waiting], timeout=0.05))[0]
            waiting.cancel()
