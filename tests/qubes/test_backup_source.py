"""Where the backup lies, and how a worker gets access to it and loses it again."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qubes_restore_svc.errors import ArchiveUnreadable, HostFailed
from qubes_restore_svc.qubes import backup_source as storage_module
from qubes_restore_svc.qubes.backup_source import (
    REGISTER_SERVICE,
    PathSource,
    start_storage,
)
from qubes_restore_svc.qubes.qrexec import QrexecCalls
from qubes_restore_svc.qubes.tags import STORAGE_TAG
from qubes_restore_svc.wire.messages import Storage
from qubes_restore_svc.wire.restore_call import QubePath
from tests.qubes.fake_qubes import PATIENCE_S, STORAGE, FakeQubes, Gate, Traces

PATH = QubePath(STORAGE, "/media/usb/my backup")


@pytest.fixture
def system(tmp_path: Path) -> FakeQubes:
    return FakeQubes(tmp_path)


@pytest.fixture
async def calls(system: FakeQubes) -> AsyncIterator[QrexecCalls]:
    async with QrexecCalls(system) as calls:
        yield calls


def _answer(system: FakeQubes, script: str) -> None:
    system.there[STORAGE].services[REGISTER_SERVICE] = script


async def _fault(source: PathSource) -> str:
    while (fault := await source.fault()) is None:
        await asyncio.sleep(0.005)
    return fault.reason


# --- Access --------------------------------------------------------------------------------------


async def test_access_is_a_registration_that_stays_open_and_a_tag(
    system: FakeQubes, calls: QrexecCalls
) -> None:
    traces = Traces(system)
    async with PathSource(system, calls, PATH) as access:
        assert access.storage == Storage(qube=STORAGE, location_id="aB3dE6")
        assert await access.fault() is None
        assert system.there[STORAGE].tags == {STORAGE_TAG}
        assert (system.directory / "location").read_bytes() == PATH.line
        assert len(system.running_processes()) == 1
        assert not (system.directory / "registrations").exists()
    assert (system.directory / "registrations").read_text() == "closed\n"
    assert traces.left() == []


async def test_the_tag_comes_last_and_goes_first(
    system: FakeQubes, calls: QrexecCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    discard_tag, registered = system.discard_tag, []

    def watched(name: str, tag: str) -> None:
        registered.append(len(system.running_processes()))
        discard_tag(name, tag)

    monkeypatch.setattr(system, "discard_tag", watched)
    async with PathSource(system, calls, PATH):
        pass
    assert registered == [1]
    assert system.events == [
        f"run_service {REGISTER_SERVICE} in {STORAGE}",
        f"add_tag {STORAGE} {STORAGE_TAG}",
        f"discard_tag {STORAGE} {STORAGE_TAG}",
    ]


@pytest.mark.parametrize("answer", ["a", "aB3dE6 ", "x" * 64, "abc\\nmore"])
async def test_an_id_is_letters_and_digits(system: FakeQubes, calls: QrexecCalls, answer: str) -> None:
    _answer(system, f"read -r x; printf '{answer}\\n'; cat > /dev/null")
    async with PathSource(system, calls, PATH) as access:
        assert access.storage is not None
        assert access.storage.location_id == answer.split("\\n")[0].strip()


def _answering(answer: str) -> str:
    return f"read -r x; printf '{answer}'; exec >&-; exit 0"


NO_ID = ["\\n", "../../x\\n", "a b\\n", "abc", "x" * 65 + "\\n", "x" * 100000, "\\303\\244\\n", "a\\0b\\n"]


@pytest.mark.parametrize(
    ("script", "why", "timeouts"),
    [
        *((_answering(answer), r"did not register .*its answer is not an id", {}) for answer in NO_ID),
        ("trap '' PIPE; while :; do echo /; done", "not an id", {"_CLOSE_PATIENCE_S": 0.05}),
        ("exit 127", r"qubes\.RegisterBackupLocation\. .*qubes-core-agent", {}),
        ("exit 1", "ended with exit code 1", {}),
        ("exit 126", "refused", {}),
        ("exit 0", "no answer", {}),
        ("exec cat > /dev/null", "no answer for 0 seconds", {"REGISTER_TIMEOUT_S": 0.05}),
    ],
)
async def test_a_storage_that_does_not_register_the_location_is_told_and_left(
    system: FakeQubes,
    calls: QrexecCalls,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    why: str,
    timeouts: dict[str, float],
) -> None:
    for name, seconds in timeouts.items():
        monkeypatch.setattr(storage_module, name, seconds)
    _answer(system, script)
    traces = Traces(system)
    with pytest.raises(ArchiveUnreadable, match=why):
        await PathSource(system, calls, PATH).__aenter__()
    assert traces.left() == []


async def test_a_cancel_while_waiting_for_the_answer_leaves_nothing(system: FakeQubes) -> None:
    _answer(system, "echo x > {directory}/begun; exec cat > /dev/null")
    traces = Traces(system)
    async with QrexecCalls(system) as calls:  # it owns a call whose beginning is cancelled
        task = asyncio.create_task(PathSource(system, calls, PATH).__aenter__())
        while not (system.directory / "begun").exists():
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert traces.left() == []


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_tag_that_cannot_be_set_leaves_no_registration(
    system: FakeQubes, calls: QrexecCalls, cancelled: bool
) -> None:
    traces = Traces(system)
    task = asyncio.create_task(PathSource(system, calls, PATH).__aenter__())
    if cancelled:
        gate = system.gates["add_tag"] = Gate()
        await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
        task.cancel()
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        system.faults["add_tag"] = HostFailed("no")
        with pytest.raises(HostFailed, match="no"):
            await task
    assert (system.directory / "registrations").read_text() == "closed\n"
    assert traces.left() == []


async def test_a_registration_that_its_qube_ends_is_a_fault(system: FakeQubes, calls: QrexecCalls) -> None:
    _answer(system, "read -r x; echo abc; kill -9 $$")
    async with PathSource(system, calls, PATH) as access:
        assert await _fault(access) == f"{REGISTER_SERVICE} in sys-usb was killed by signal 9 (SIGKILL)"
    assert await access.fault() is None
    _answer(system, "read -r x; echo abc")
    async with PathSource(system, calls, PATH) as access:
        assert "has ended, and with it the access to the backup" in await _fault(access)


async def test_a_registration_that_does_not_end_with_its_input_is_ended(
    system: FakeQubes, calls: QrexecCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "_CLOSE_PATIENCE_S", 0.05)
    _answer(system, "read -r x; echo abc; while :; do sleep 1000; done")
    traces = Traces(system)
    async with PathSource(system, calls, PATH):
        pass
    assert traces.left() == []


async def test_a_tag_that_stays_is_named_and_the_registration_is_closed_all_the_same(
    system: FakeQubes, calls: QrexecCalls
) -> None:
    what = r"Left behind.*the tag restore-svc-storage of the qube sys-usb \(qubesd is gone\)\."
    with pytest.raises(HostFailed, match=f"not everything could be cleared up. {what}"):
        async with PathSource(system, calls, PATH):
            system.faults["discard_tag"] = HostFailed("qubesd is gone")
    assert (system.directory / "registrations").read_text() == "closed\n"


async def test_a_qube_that_does_not_run_is_said(system: FakeQubes, calls: QrexecCalls) -> None:
    system.there[STORAGE].running = False
    with pytest.raises(ArchiveUnreadable, match=r"sys-usb did not register .*does not run"):
        await PathSource(system, calls, PATH).__aenter__()


async def test_the_qube_of_the_backup_is_started(system: FakeQubes) -> None:
    system.there[STORAGE].running = False
    await start_storage(system, STORAGE)
    assert system.there[STORAGE].running
    system.faults["start"] = HostFailed("the disk is full")
    with pytest.raises(ArchiveUnreadable, match=r"could not be started: the disk is full.*qvm-start sys-usb"):
        await start_storage(system, STORAGE)
