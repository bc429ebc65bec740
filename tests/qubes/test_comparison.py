"""The volumes of a system against those of a backup: clones are read, and nothing is left of them."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import qubesadmin

from qubes_restore_svc.broker.interfaces import Comparison
from qubes_restore_svc.errors import HostFailed, RestoreInProgress
from qubes_restore_svc.qubes.comparison import CLONE_PREFIX, ComparedQube, ComparedSystem
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.qubes.tags import UNFINISHED, WORKER_TAG
from qubes_restore_svc.wire.names import backup_time
from tests.emulation.daemon.errors import AdminError
from tests.emulation.qubesd import Qubesd
from tests.qubes.qubes_bed import (
    EXTENTS,
    IMAGE_SIZE,
    TEMPLATE,
    compared_system,
    image,
    new_disposable,
    new_host,
    new_qube,
    settings,
    state_of,
    stopped_program,
)

BACKED_UP = backup_time(new_qube().backup_id)
assert BACKED_UP is not None
BEFORE, AFTER = int(BACKED_UP) - 60, int(BACKED_UP) + 60


@pytest.fixture
def host(tmp_path: Path, system: QubesSystem) -> ComparedSystem:
    """The host of a comparison, over the facade."""
    return compared_system(tmp_path, system)


@pytest.fixture
def work(qubesd: Qubesd) -> Path:
    """The file of `work/private`, which is what the backup has; the qube has not been used since."""
    qubesadmin.Qubes().add_new_vm("AppVM", "work", "blue", TEMPLATE, pool="lvm")
    path = qubesd.volume_path("work", "private")
    path.write_bytes(image())
    last_used(qubesd, BEFORE)
    return path


def last_used(qubesd: Qubesd, *times: int) -> None:
    """The qube was shut down at these times."""
    revisions = [f"{when}-back" for when in times]
    qubesd.system.domains["work"].volumes["private"].revisions = revisions


def compared(
    qube: ComparedQube, extents: Sequence[tuple[int, bytes]] = EXTENTS, volume: str = "private"
) -> Comparison:
    sink = qube.create_volume(volume, IMAGE_SIZE)  # type: ignore[arg-type] # one of the names
    for offset, data in extents:
        sink.write(offset, memoryview(data))
    found = sink.finish(IMAGE_SIZE)
    assert found is not None
    return found


def begun(host: ComparedSystem, name: str = "work") -> ComparedQube:
    qube = host.begin(new_qube(name))
    assert isinstance(qube, ComparedQube)
    return qube


def clones(qubesd: Qubesd) -> list[str]:
    return [name for name in qubesd.names() if name.startswith(CLONE_PREFIX)]


def test_all_but_dom0_and_the_worker_can_be_compared(host: ComparedSystem, system: QubesSystem) -> None:
    new_disposable(system, "disp-restore-0001", WORKER_TAG)
    new_disposable(system, "disp1234")
    view = host.view()
    assert view.names == {*system.tags()} - {"dom0", "disp-restore-0001"}
    assert {TEMPLATE, "disp1234"} <= view.names
    assert view.remarks == () and host.free_space() is None


def test_a_policy_that_cannot_be_read_is_no_matter_of_a_comparison(
    system: QubesSystem, tmp_path: Path
) -> None:
    (tmp_path / "policy.d").mkdir()
    (tmp_path / "policy.d" / "50-x.policy").write_bytes(b"\xff")
    policy = [tmp_path / "policy.d"]
    assert compared_system(tmp_path, system, policy).view().remarks == ()
    assert new_host(tmp_path, system, policy=policy).view().remarks != ()


def test_a_volume_is_compared_and_nothing_is_left(
    host: ComparedSystem, qubesd: Qubesd, work: Path, tmp_path: Path
) -> None:
    before = state_of(tmp_path, qubesd)
    for place, outcome in ((None, "same"), (4096, "differs")):
        with host.lock() as remarks:
            assert remarks == ()
            qube = begun(host)
            extents = EXTENTS if place is None else (*EXTENTS[:1], (place + 1000, b"x"), *EXTENTS[1:])
            found = compared(qube, extents)
            assert qube.commit(settings(), None) == []
            assert not clones(qubesd), "one qube after the other"
        assert found.outcome == outcome
    assert found.difference is not None
    assert [(one.offset, one.length) for one in found.difference.places] == [(4096, 4096)]
    assert state_of(tmp_path, qubesd) == before


def test_what_is_open_is_a_clone_and_is_closed_before_it_is_removed(
    host: ComparedSystem, system: QubesSystem, qubesd: Qubesd, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> list[str]:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        paths = [os.readlink(link) for link in links if os.path.lexists(link)]
        return [path for path in paths if "/volumes/" in path]

    remove, seen = system.remove, []

    def watched(name: str) -> None:
        seen.append(opened())
        remove(name)

    monkeypatch.setattr(system, "remove", watched)
    with host.lock():
        qube = begun(host)
        sink = qube.create_volume("private", IMAGE_SIZE)
        sink.write(0, memoryview(b"begin"))
        [clone] = clones(qubesd)
        assert opened() == [str(qubesd.volume_path(clone, "private"))]
        qube.rollback()
        assert seen == [[]]


def test_a_clone_that_is_being_read_is_removed_at_the_end_of_the_step(
    host: ComparedSystem, qubesd: Qubesd, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reading, go_on = os.pread, threading.Event(), threading.Event()

    def pread(file: int, size: int, offset: int) -> bytes:
        reading.set()
        assert go_on.wait(20)
        return read(file, size, offset)

    with host.lock():
        qube = begun(host)
        sink = qube.create_volume("private", IMAGE_SIZE)
        monkeypatch.setattr(os, "pread", pread)
        writing = threading.Thread(target=sink.write, args=(0, memoryview(b"begin")))
        removing = threading.Thread(target=qube.rollback)
        writing.start()
        assert reading.wait(20)
        qubesd.calls.clear()
        removing.start()
        removing.join(0.2)
        assert not qubesd.calls_of("admin.vm.Remove*")
        go_on.set()
        for thread in (writing, removing):
            thread.join(20)
        assert not clones(qubesd)


def test_the_clones_lie_in_the_pools_of_the_volumes_in_a_qube_that_cannot_be_used(
    host: ComparedSystem, qubesd: Qubesd, work: Path
) -> None:
    with host.lock():
        begun(host)
        [clone] = clones(qubesd)
        domain = qubesd.system.domains[clone]
        assert domain.tags >= {*UNFINISHED}
        assert domain.properties["netvm"] is None
        assert domain.volumes["private"].pool == "lvm"
        with pytest.raises(AdminError, match="in progress, cannot start"):
            qubesd.start(clone)


@pytest.mark.parametrize(
    ("times", "outcome"),
    [((BEFORE,), "differs"), ((AFTER,), "newer"), ((AFTER, BEFORE), "newer"), ((), "differs")],
    ids=["before", "after", "the-last-of-two", "unknown"],
)
def test_a_volume_that_was_written_to_after_the_backup_is_newer(
    host: ComparedSystem, qubesd: Qubesd, work: Path, times: tuple[int, ...], outcome: str
) -> None:
    last_used(qubesd, *times)
    with host.lock():
        assert compared(begun(host)).outcome == "same"
        assert compared(begun(host), EXTENTS[:1]).outcome == outcome


def test_without_a_time_in_its_id_nothing_is_newer_than_a_backup(
    host: ComparedSystem, qubesd: Qubesd, work: Path
) -> None:
    last_used(qubesd, AFTER)
    with host.lock():
        qube = host.begin(replace(new_qube(), backup_id="mine"))
        assert isinstance(qube, ComparedQube)
        assert compared(qube, EXTENTS[:1]).outcome == "differs"


def test_files_with_reflinks_are_read_where_a_halted_qube_has_them(
    host: ComparedSystem, qubesd: Qubesd
) -> None:
    qubesadmin.Qubes().add_new_vm("AppVM", "work", "blue", TEMPLATE, pool="varlibqubes")
    path = qubesd.volume_path("work", "private")
    path.write_bytes(image())
    path.with_name("vm-work-private-dirty.img").write_bytes(b"what a running qube writes to")
    for when, outcome in ((BEFORE, "differs"), (AFTER, "newer")):
        os.utime(path, (when, when))
        with host.lock():
            assert compared(begun(host)).outcome == "same"
            assert compared(begun(host), EXTENTS[:1]).outcome == outcome


def test_what_cannot_be_compared_as_a_whole_is_said_of_the_qube(
    host: ComparedSystem, qubesd: Qubesd, work: Path
) -> None:
    qubesadmin.Qubes().add_new_vm("StandaloneVM", "alone", "blue")
    qubesd.volume_path("alone", "private").write_bytes(image())
    qubesd.system.domains["alone"].volumes["private"].size = IMAGE_SIZE
    qubesd.start("alone")
    with host.lock():
        qube = begun(host, "alone")
        assert compared(qube).outcome == "same"
        assert qube.commit(settings(), None) == [
            "it runs: compared is what it was when it was last shut down",
            "its volume root is here, and not in the backup",
        ]
        assert compared(begun(host), volume="root").outcome == "missing"


@pytest.mark.parametrize("driver", ["zfs", "callback", "file"])
def test_a_pool_that_nobody_has_tried_is_refused_before_anything_is_cloned(
    host: ComparedSystem, qubesd: Qubesd, work: Path, driver: str
) -> None:
    qubesd.system.pools["lvm"].driver = driver
    with host.lock():
        found = compared(begun(host))
    assert found.outcome == "failed" and found.error is not None
    assert found.error.reason == (
        f"it lies in the storage pool lvm, and volumes of the driver {driver} cannot be compared"
    )
    assert not qubesd.calls_of("admin.vm.volume.Clone*")


def refused(method: str) -> Callable[[Qubesd, pytest.MonkeyPatch], None]:
    return lambda qubesd, _: qubesd.fail(method, message="no such luck")


def unreadable(_qubesd: Qubesd, patch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def denied(path: str, flags: int, *args: int, **kwargs: int) -> int:
        if CLONE_PREFIX in str(path):
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *args, **kwargs)

    patch.setattr(os, "open", denied)


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (refused("admin.vm.volume.CloneFrom*"), "cloning the volume failed: no such luck"),
        (refused("admin.vm.volume.CloneTo*"), "cloning the volume failed: no such luck"),
        (refused("admin.vm.volume.ListSnapshots*"), "asking for its revisions failed: no such luck"),
        (unreadable, "failed: Permission denied"),
    ],
    ids=["clone-from", "clone-to", "revisions", "open"],
)
def test_what_fails_with_a_volume_is_its_finding_and_the_next_one_is_compared(
    host: ComparedSystem,
    qubesd: Qubesd,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    cause: Callable[[Qubesd, pytest.MonkeyPatch], None],
    words: str,
) -> None:
    with host.lock():
        with pytest.MonkeyPatch.context() as patch:
            cause(qubesd, patch)
            found = compared(begun(host))
        assert found.outcome == "failed" and found.error is not None and words in found.error.reason
        assert compared(begun(host)).outcome == "same"
    assert not clones(qubesd)


def test_a_qube_for_the_clones_that_is_not_created_leaves_nothing(
    host: ComparedSystem, qubesd: Qubesd, work: Path, tmp_path: Path
) -> None:
    before = state_of(tmp_path, qubesd)
    qubesd.fail("admin.vm.property.Set+netvm", message="no such luck")
    with host.lock():
        with pytest.raises(HostFailed, match=r"making the qube restore-compare-.*no such luck"):
            begun(host)
        assert not clones(qubesd)
    assert state_of(tmp_path, qubesd) == before


def test_clones_that_cannot_be_removed_are_tried_again_and_then_told(
    host: ComparedSystem, qubesd: Qubesd, work: Path
) -> None:
    qubesd.fail("admin.vm.Remove+", message="not now", times=1)
    with host.lock():
        qube = begun(host)
        assert qube.commit(settings(), None)[:1] == ["its volume private is here, and not in the backup"]
        assert clones(qubesd)
    assert not clones(qubesd)
    qubesd.fail("admin.vm.Remove+", message="not at all", times=None)
    with pytest.raises(HostFailed, match=f"{CLONE_PREFIX}.*not at all"), host.lock():
        begun(host).commit(settings(), None)
    qubesd.mend()
    with host.lock() as remarks:
        [remark] = remarks
        assert CLONE_PREFIX in remark and "was removed" in remark
    assert not clones(qubesd)


KILLED = """
host = bed.compared_system(place)
system = host._system
with host.lock():
    if step == "creating":
        system.add_tag = lambda *arguments: stop("creating")
    qube = host.begin(bed.new_qube())
    sink = qube.create_volume("private", 1 << 20)
    sink.write(0, memoryview(b"x"))
    stop("comparing")
"""


@pytest.mark.parametrize("step", ["creating", "comparing"])
def test_a_comparison_that_is_killed_leaves_nothing(
    host: ComparedSystem, qubesd: Qubesd, work: Path, tmp_path: Path, step: str
) -> None:
    before = state_of(tmp_path, qubesd)
    with stopped_program(KILLED, tmp_path, step) as process:
        assert clones(qubesd)
        os.killpg(process.pid, signal.SIGKILL)
    while True:
        try:
            with host.lock() as remarks:
                assert remarks == ()
            break
        except RestoreInProgress as error:
            assert error.ends_soon
        time.sleep(0.01)
    assert state_of(tmp_path, qubesd) == before
