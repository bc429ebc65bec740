"""The worker's qube: there for one restore, and gone after it."""

import asyncio
import os
import re
import secrets
from pathlib import Path
from typing import Any

import pytest

from qubes_restore_svc.errors import HostFailed, UsageError, WorkerMissing
from qubes_restore_svc.kdf.engine import KdfParameters
from qubes_restore_svc.qubes import qrexec
from qubes_restore_svc.qubes.system import NotEnoughMemory
from qubes_restore_svc.qubes.tags import WORKER_TAG
from qubes_restore_svc.qubes.worker_vm import (
    LEAST_MIB,
    MIB_A_PROCESSOR,
    WorkerVm,
    choose_template,
    clear_worker_left,
    worker_properties,
)
from tests.qubes.fake_qubes import PATIENCE_S, STORAGE, TEMPLATE, FakeQube, FakeQubes, Gate, Traces


@pytest.fixture
def system(tmp_path: Path) -> FakeQubes:
    return FakeQubes(tmp_path)


@pytest.fixture
async def traces(system: FakeQubes) -> Traces:
    return Traces(system)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers that the next names will have, instead of random ones."""
    numbers: list[int] = []
    monkeypatch.setattr(secrets, "randbelow", lambda limit: numbers.pop(0))
    return numbers


def _worker(system: FakeQubes) -> WorkerVm:
    return WorkerVm(system, TEMPLATE, 4096, 3)


async def test_it_is_created_as_configured_and_started(system: FakeQubes, traces: Traces) -> None:
    async with _worker(system) as worker:
        assert re.fullmatch("disp-restore-[0-9]{4}", worker.name)
        qube = system.there[worker.name]
        assert (qube.klass, qube.template, qube.tags) == ("DispVM", TEMPLATE, {WORKER_TAG})
        assert qube.properties == worker_properties(4096, 3)
        assert qube.running
    assert traces.left() == []


@pytest.mark.parametrize(
    ("vcpus", "total", "free", "memory"),
    [
        (2, None, 1 << 20, 5120),  # what two processors can use
        (8, 1 << 17, 1 << 20, 17408),
        (8, 16384, 1 << 20, 8192),  # half of the computer
        (8, 16384, 8191, 5461),
        (8, 16384, 3000, 2426),
        (1, 4096, 900, 606),
        (1, 4096, 420, 404),
        (1, 4096, 400, 400),
        (1, 512, 1 << 20, 400),
    ],
)
async def test_it_takes_as_much_memory_as_is_of_use_and_the_system_gives(
    system: FakeQubes, traces: Traces, vcpus: int, total: int | None, free: int, memory: int
) -> None:
    system.total_memory, system.free_memory = total, free
    async with WorkerVm(system, TEMPLATE, "auto", vcpus) as worker:
        (name,) = system.workers  # and none of the others that were tried
        assert system.there[name].properties == worker_properties(memory, vcpus)
        assert worker.size == f"the worker has {memory} MiB of memory and {vcpus} processors"
    assert traces.left() == []


async def test_it_takes_no_more_than_its_caller_may_have(system: FakeQubes) -> None:
    system.total_memory = 65536
    async with WorkerVm(system, TEMPLATE, "auto", "auto", (1000, 1)) as worker:
        assert system.there[worker.name].properties == worker_properties(1000, 1)


@pytest.mark.parametrize(("cores", "vcpus"), [(1, 1), (4, 4), (8, 8), (32, 8)])
async def test_it_gets_as_many_processors_as_dom0_has(
    system: FakeQubes, monkeypatch: pytest.MonkeyPatch, cores: int, vcpus: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    async with WorkerVm(system, TEMPLATE, 600, "auto") as worker:
        assert system.there[worker.name].properties == worker_properties(600, vcpus)


def test_what_a_processor_can_use_is_what_its_lanes_take() -> None:
    native = pytest.importorskip("qubes_restore_svc.kdf.native", reason="the C extension was not built")
    kdf = native.NativeEngine()
    cost = KdfParameters(19, 8, 1)
    for lanes in (kdf.lanes_for_few * kdf.memory(cost, 1), kdf.lanes * kdf.memory(cost, 2)):
        assert lanes <= (MIB_A_PROCESSOR << 20) * 1.05


async def test_what_the_tag_grants_ends_before_the_qube_does(system: FakeQubes) -> None:
    async with _worker(system) as worker:
        name = worker.name
    assert system.events == [
        f"create {name}",
        f"start {name}",
        f"discard_tag {name} {WORKER_TAG}",
        f"destroy {name}",
    ]
    assert worker.name == ""


async def test_a_name_that_is_taken_is_left_alone(
    system: FakeQubes, names: list[int], traces: Traces
) -> None:
    names += [7, 7, 42]
    system.there["disp-restore-0007"] = FakeQube()
    async with _worker(system) as worker:
        assert worker.name == "disp-restore-0042"
    assert "disp-restore-0007" in system.there
    names += [7] * 100
    with pytest.raises(HostFailed, match="no free name"):
        await _worker(system).__aenter__()


# --- Failure -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exists", "create", "start"])
async def test_a_step_that_fails_leaves_nothing(system: FakeQubes, traces: Traces, method: str) -> None:
    system.faults[method] = HostFailed("the reason")
    with pytest.raises(HostFailed, match="the reason"):
        await _worker(system).__aenter__()
    assert traces.left() == []


async def test_a_creation_that_fails_half_way_leaves_nothing(
    system: FakeQubes, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = system.create

    def half(*arguments: str, **settings: Any) -> None:
        create(*arguments, **settings)
        raise HostFailed("the reason")

    monkeypatch.setattr(system, "create", half)
    with pytest.raises(HostFailed, match="could not be created: the reason"):
        await _worker(system).__aenter__()
    assert traces.left() == []


async def test_a_qube_that_somebody_else_makes_under_the_same_name_is_not_touched(
    system: FakeQubes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def theirs(name: str, *_: str, **__: object) -> None:
        system.there[name] = FakeQube()
        raise HostFailed(f"there is a qube {name}")

    monkeypatch.setattr(system, "create", theirs)
    with pytest.raises(HostFailed, match="there is a qube"):
        await _worker(system).__aenter__()
    assert len(system.workers) == 1


async def test_too_little_memory_is_told_with_the_options_that_help(
    system: FakeQubes, traces: Traces
) -> None:
    system.free_memory = 4095
    with pytest.raises(HostFailed, match=r"could not be started: Not enough memory.*4096 MiB.*--memory auto"):
        await _worker(system).__aenter__()
    system.free_memory = LEAST_MIB - 1
    with pytest.raises(HostFailed, match=r"Not enough memory.*Not even 400 MiB are free"):
        await WorkerVm(system, TEMPLATE, "auto", 1).__aenter__()
    assert traces.left() == []
    system.faults["start"] = HostFailed("something else")
    with pytest.raises(HostFailed, match=f"could not be started: something else.*--dispvm={TEMPLATE}"):
        await _worker(system).__aenter__()


async def test_a_qube_that_the_system_removes_after_a_failed_start_is_not_missed(
    system: FakeQubes, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(name: str) -> None:
        system.vanish(name)
        raise HostFailed("the reason")

    monkeypatch.setattr(system, "start", start)
    with pytest.raises(HostFailed, match="the reason") as caught:
        await _worker(system).__aenter__()
    assert "Left behind" not in str(caught.value)
    assert traces.left() == []


@pytest.mark.parametrize("method", ["exists", "create", "start"])
async def test_a_cancel_at_any_step_leaves_nothing(system: FakeQubes, traces: Traces, method: str) -> None:
    gate = system.gates[method] = Gate()
    task = asyncio.create_task(_worker(system).__aenter__())
    await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
    task.cancel()
    asyncio.get_running_loop().call_later(0.01, gate.opened.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert traces.left() == []


@pytest.mark.parametrize("method", ["discard_tag", "destroy"])
async def test_a_cancel_between_two_tries_leaves_nothing(
    system: FakeQubes, traces: Traces, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def start(name: str) -> None:  # and the qube stays
        raise NotEnoughMemory("Not enough memory")

    monkeypatch.setattr(system, "start", start)
    gate = system.gates[method] = Gate()
    task = asyncio.create_task(WorkerVm(system, TEMPLATE, "auto", 2).__aenter__())
    await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
    task.cancel()
    asyncio.get_running_loop().call_later(0.01, gate.opened.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert traces.left() == []


async def test_a_cancel_does_not_wait_until_the_qube_has_started(
    system: FakeQubes, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed while it starts, which is what ends the start."""
    gate = system.gates["start"] = Gate()
    destroy = system.destroy

    def kill(name: str) -> None:
        destroy(name)
        gate.opened.set()

    monkeypatch.setattr(system, "destroy", kill)
    task = asyncio.create_task(_worker(system).__aenter__())
    await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.shield(task), PATIENCE_S)
    assert traces.left() == []


# --- Leaving -------------------------------------------------------------------------------------


async def test_a_qube_that_has_gone_by_itself_is_not_missed(system: FakeQubes, traces: Traces) -> None:
    async with _worker(system) as worker:
        system.vanish(worker.name)
    assert traces.left() == []


async def test_a_tag_that_stays_does_not_keep_the_qube(system: FakeQubes, traces: Traces) -> None:
    async with _worker(system):
        system.faults["discard_tag"] = HostFailed("no")
    assert traces.left() == []


async def test_a_qube_that_stays_is_named(system: FakeQubes) -> None:
    with pytest.raises(HostFailed, match=r"Left behind.*the qube disp-restore-[0-9]{4} \(no\)\."):
        async with _worker(system):
            system.faults["destroy"] = HostFailed("no")


async def test_a_system_that_does_not_answer_is_not_waited_for_without_end(
    system: FakeQubes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qrexec, "UNDO_TIMEOUT_S", 0.02)
    gate = Gate()
    with pytest.raises(HostFailed, match=r"the qube disp-restore-[0-9]{4} \(no answer for 0 seconds\)"):
        async with _worker(system):
            system.gates["destroy"] = gate
    gate.opened.set()


# --- The template --------------------------------------------------------------------------------


async def test_the_template_is_the_one_named_or_the_systems_own(system: FakeQubes) -> None:
    system.there["other-dvm"] = FakeQube(disposable_template=True)
    assert await choose_template(system, None) == TEMPLATE
    assert await choose_template(system, "other-dvm") == "other-dvm"


@pytest.mark.parametrize("reported", [None, {"restore.Session", "qubes.VMShell"}])
async def test_a_template_that_reports_the_service_or_nothing_will_do(
    system: FakeQubes, reported: set[str] | None
) -> None:
    system.there[TEMPLATE].reported = reported
    assert await choose_template(system, None) == TEMPLATE


async def test_a_template_without_the_worker_is_told_with_what_to_install_where(system: FakeQubes) -> None:
    system.there[TEMPLATE].reported = {"qubes.VMShell"}
    with pytest.raises(WorkerMissing) as caught:
        await choose_template(system, None)
    assert "fedora-42" in caught.value.reason and TEMPLATE in caught.value.reason
    assert "qubes-restore-svc-vm in fedora-42: sudo dnf install qubes-restore-svc-vm" in caught.value.advice
    assert "sudo apt install qubes-restore-svc-vm" in caught.value.advice


async def test_a_template_without_a_template_is_where_to_install(system: FakeQubes) -> None:
    system.there["alone"] = FakeQube(disposable_template=True, reported=set())
    with pytest.raises(WorkerMissing, match="the template alone"):
        await choose_template(system, "alone")


@pytest.mark.parametrize(
    ("template", "reason"), [("none-such", "there is no qube none-such"), (STORAGE, "no disposables")]
)
async def test_what_is_no_disposable_template_is_refused(
    system: FakeQubes, template: str, reason: str
) -> None:
    with pytest.raises(UsageError, match=f"{reason}.*--mgmt-template"):
        await choose_template(system, template)


async def test_a_system_without_a_management_template_is_told_how_to_name_one(system: FakeQubes) -> None:
    system.management = None
    with pytest.raises(UsageError, match="--mgmt-template"):
        await choose_template(system, None)


# --- What a killed restore has left --------------------------------------------------------------


async def test_leftovers_that_stay_are_an_error(system: FakeQubes) -> None:
    system.there["disp-restore-1234"] = FakeQube("DispVM", tags={WORKER_TAG})
    system.faults["destroy"] = HostFailed("no")
    with pytest.raises(HostFailed, match="no"):
        await clear_worker_left(system)
