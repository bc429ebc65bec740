"""The link over an emulated Qubes, with the real facade, the stock services and the real worker."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from qubes_restore_svc.broker.client import SessionOptions
from qubes_restore_svc.broker.job import run_job
from qubes_restore_svc.errors import ArchiveUnreadable, RestoreError, WorkerMissing
from qubes_restore_svc.qubes import backup_source
from qubes_restore_svc.qubes.backup_source import Dom0File, Location
from qubes_restore_svc.qubes.qrexec_link import QrexecLink
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.qubes.tags import STORAGE_TAG, WORKER_TAG
from qubes_restore_svc.wire.restore_call import Choice, QubePath, QubeService
from tests.emulation.emulated import EmulatedQubes
from tests.support.backup_writer import PASSPHRASE
from tests.support.bad_medium import PAGE, Medium
from tests.support.damage import sample_backup
from tests.support.restoring import Recorder

TEMPLATE = "fedora-41-xfce"
STORAGE = "sys-usb"


@pytest.fixture
def qubes(tmp_path: Path) -> Iterator[EmulatedQubes]:
    with EmulatedQubes(tmp_path / "system") as qubes:
        qubes.install_worker(TEMPLATE)
        yield qubes


@pytest.fixture
def system(qubes: EmulatedQubes) -> QubesSystem:
    return QubesSystem.connect()


@pytest.fixture
async def backup(qubes: EmulatedQubes, tmp_path: Path) -> AsyncIterator[Path]:
    path = tmp_path / "my backup"
    sample_backup().write(path)
    yield path


def _link(system: QubesSystem, location: Location, tmp_path: Path) -> QrexecLink:
    lock_path = tmp_path / "worker.lock"
    return QrexecLink(system, location, template=None, memory=1500, vcpus=2, lock_path=lock_path)


def _options() -> SessionOptions:
    return SessionOptions(PASSPHRASE, memory=256 << 20, jobs=2)


def _location(kind: str, qubes: EmulatedQubes, backup: Path) -> Location:
    if kind == "dom0":
        return Dom0File(os.open(backup, os.O_RDONLY | os.O_CLOEXEC))
    place = qubes.put_backup(STORAGE, backup)
    if kind == "path":
        return QubePath(STORAGE, str(place))
    if kind == "command":
        return QubePath(STORAGE, f"cat '{place}'")
    # A service of the person's own: a line of paths comes in, a qfile stream goes out.
    stock = qubes.root / STORAGE / "qubes-rpc" / "qubes.Restore"
    _give_service(qubes, "my.Backup", f"(echo '{place}'; exec cat) | '{stock}'")
    return QubeService(STORAGE, "my.Backup+monday")


def _give_service(qubes: EmulatedQubes, name: str, script: str) -> None:
    """Give the storage qube a service, in place of a stock one perhaps."""
    path = qubes.root / STORAGE / "qubes-rpc" / name
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def _worker(qubes: EmulatedQubes) -> str:
    (name,) = (name for name in qubes.qubesd.names() if name.startswith("disp-restore-"))
    return name


@pytest.mark.parametrize("kind", ["dom0", "path", "command", "service"])
async def test_a_backup_verifies_from_every_kind_of_location_and_nothing_is_left(
    qubes: EmulatedQubes, system: QubesSystem, backup: Path, tmp_path: Path, kind: str
) -> None:
    location = _location(kind, qubes, backup)
    before = qubes.snapshot()
    link = _link(system, location, tmp_path)
    report = await run_job(link, None, _options(), Choice(), Recorder())
    assert report.error is None
    assert {volume.outcome for qube in report.qubes for volume in qube.volumes} == {"ok"}
    assert qubes.settled(before) == before
    if isinstance(location, Dom0File):
        os.close(location.fd)


async def test_a_page_of_dom0s_file_that_cannot_be_read_costs_the_qube_that_it_hit(
    qubes: EmulatedQubes, system: QubesSystem, backup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = backup.read_bytes()
    archive += bytes(-len(archive) % (5 * PAGE))  # whole pages, and whole records of tar
    bad = archive.index(b"vm11/private.img.000") // PAGE + 1
    medium = Medium(archive, {bad})
    monkeypatch.setattr(backup_source, "_end_of", lambda fd: medium.end)
    before = qubes.snapshot()
    link = _link(system, Dom0File(medium.fd), tmp_path)
    report = await run_job(link, None, _options(), Choice(), Recorder())
    gap = f"the file could not be read at byte {medium.start + bad * PAGE} (Input/output error)"
    assert [text for text in report.warnings if text.startswith(gap)]
    failed = {qube.name: qube.error.reason for qube in report.qubes if qube.error}
    assert failed.keys() == {"vault"} and gap in failed["vault"]
    assert qubes.settled(before) == before
    medium.close()


async def test_the_tags_are_there_as_long_as_the_link_and_the_worker_is_as_configured(
    qubes: EmulatedQubes, system: QubesSystem, tmp_path: Path
) -> None:
    async with _link(system, QubePath(STORAGE, "/backup"), tmp_path):
        worker = _worker(qubes)
        assert qubes.qubesd.tags(worker) >= {WORKER_TAG}
        assert STORAGE_TAG in qubes.qubesd.tags(STORAGE)
        assert system.klass(worker) == "DispVM" and system.template_of(worker) == "default-mgmt-dvm"
    assert STORAGE_TAG not in qubes.qubesd.tags(STORAGE) and not system.exists(worker)


# --- What is not there ---------------------------------------------------------------------------


async def test_a_template_without_the_package_is_named_before_anything_is_created(
    qubes: EmulatedQubes, system: QubesSystem, tmp_path: Path
) -> None:
    qubes.uninstall_worker(TEMPLATE)
    before = qubes.snapshot()
    with pytest.raises(WorkerMissing, match=f"Install the package qubes-restore-svc-vm in {TEMPLATE}"):
        await _link(system, QubePath(STORAGE, "/backup"), tmp_path).check()
    assert qubes.snapshot() == before


async def test_a_template_that_reports_no_services_is_tried_and_named(
    qubes: EmulatedQubes, system: QubesSystem, tmp_path: Path
) -> None:
    qubes.uninstall_worker(TEMPLATE)
    features = qubes.qubesd.system.domains[TEMPLATE].features
    for name in [name for name in features if name.startswith("supported-rpc.")]:
        del features[name]
    before = qubes.snapshot()
    link = _link(system, QubePath(STORAGE, "/backup"), tmp_path)
    await link.check()
    with pytest.raises(WorkerMissing, match=f"Install the package qubes-restore-svc-vm in {TEMPLATE}"):
        await link.__aenter__()
    assert qubes.settled(before) == before


async def test_an_agent_that_is_too_old_is_named(
    qubes: EmulatedQubes, system: QubesSystem, tmp_path: Path
) -> None:
    (qubes.root / STORAGE / "qubes-rpc" / "qubes.RegisterBackupLocation").unlink()
    before = qubes.snapshot()
    with pytest.raises(ArchiveUnreadable, match="qubes-core-agent in the template of sys-usb"):
        await _link(system, QubePath(STORAGE, "/backup"), tmp_path).__aenter__()
    assert qubes.settled(before) == before


async def test_a_storage_qube_that_is_halted_is_started(
    qubes: EmulatedQubes, system: QubesSystem, tmp_path: Path
) -> None:
    async with _link(system, QubePath("personal", "/backup"), tmp_path) as link:
        assert link.storage is not None and link.storage.qube == "personal"
        assert qubes.qubesd.is_running("personal")


# --- Failure at every step -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "dest"),
    [
        ("admin.vm.List+", "*"),
        ("admin.vm.Start+", "disp-restore-*"),
        (f"admin.vm.tag.Set+{STORAGE_TAG}", "*"),
    ],
)
async def test_a_call_that_qubesd_refuses_leaves_nothing_and_the_next_run_works(
    qubes: EmulatedQubes, system: QubesSystem, tmp_path: Path, call: str, dest: str
) -> None:
    before = qubes.snapshot()
    qubes.qubesd.fail(call, dest=dest, times=1)
    with pytest.raises(RestoreError, match="it was made to fail"):
        await _link(system, QubePath(STORAGE, "/backup"), tmp_path).__aenter__()
    assert qubes.settled(before) == before
    async with _link(system, QubePath(STORAGE, "/backup"), tmp_path):
        pass
    assert qubes.settled(before) == before


# --- The other side ends -------------------------------------------------------------------------


async def test_a_worker_whose_qube_dies_is_told_so(
    qubes: EmulatedQubes, system: QubesSystem, tmp_path: Path
) -> None:
    before = qubes.snapshot()
    async with _link(system, QubePath(STORAGE, "/backup"), tmp_path) as link:
        with await link.call("restore.Session"):
            await asyncio.to_thread(system.destroy, _worker(qubes))
            told = await asyncio.wait_for(link.wait_gone(), 20)
    assert told == "the worker's qube has shut down, perhaps for want of memory"
    assert qubes.settled(before) == before


async def test_a_storage_qube_that_dies_ends_the_access(
    qubes: EmulatedQubes, system: QubesSystem, tmp_path: Path
) -> None:
    async with _link(system, QubePath(STORAGE, "/backup"), tmp_path) as link:
        assert await link.archive_fault() is None
        await asyncio.to_thread(system._qube(STORAGE).kill)
        async with asyncio.timeout(20):
            while (fault := await link.archive_fault()) is None:
                await asyncio.sleep(0.01)
        assert "qubes.RegisterBackupLocation in sys-usb ended" in fault.reason


async def test_a_storage_service_that_does_not_exist_is_told(
    qubes: EmulatedQubes, system: QubesSystem, tmp_path: Path
) -> None:
    link = _link(system, QubeService(STORAGE, "my.Backup"), tmp_path)
    report = await run_job(link, None, _options(), Choice(), Recorder())
    assert report.error is not None
    assert "my.Backup in sys-usb ended with exit code 127 (there is no such service)" in report.error.reason
