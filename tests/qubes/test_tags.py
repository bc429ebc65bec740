"""The tags of a restore, and what is known by them: what a restore that was killed has left."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import qubesadmin

from qubes_restore_svc.qubes import tags as tags_
from qubes_restore_svc.qubes.host import QubesHost
from qubes_restore_svc.qubes.locks import WORKER, GuardedLock
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.qubes.tags import (
    IN_PROGRESS_TAG,
    STORAGE_TAG,
    UNFINISHED_TAG,
    WORKER_TAG,
    clear_untagged,
    clear_worker,
)
from qubes_restore_svc.qubes.worker_vm import clear_up_after_kill
from qubes_restore_svc.waiting import when_cleared
from tests.emulation.daemon.state import NEW_TAGS
from tests.emulation.qubesd import Qubesd
from tests.qubes.qubes_bed import NETVM, TEMPLATE, new_disposable, state_of, stopped_program

SOON_S = 60.0


def leave_unfinished(name: str, template: str = TEMPLATE, klass: str = "AppVM") -> None:
    """What a restore that was killed together with its guard leaves."""
    qube = qubesadmin.Qubes().add_new_vm(klass, name, "red", template if klass == "AppVM" else None)
    qube.tags.add(IN_PROGRESS_TAG)
    qube.tags.add(UNFINISHED_TAG)


# --- Unfinished qubes ----------------------------------------------------------------------------


def test_unfinished_qubes_are_removed_whatever_order_they_need(
    host: QubesHost, qubesd: Qubesd, tmp_path: Path
) -> None:
    before = state_of(tmp_path, qubesd)
    leave_unfinished("a-base", klass="TemplateVM")
    leave_unfinished("b", template="a-base")
    leave_unfinished("c")
    with host.lock() as remarks:
        assert sorted(remark.split(" was removed: ")[0] for remark in remarks) == ["a-base", "b", "c"]
        assert state_of(tmp_path, qubesd).keys() - before.keys() == {str(tmp_path / "restore.lock")}
    assert state_of(tmp_path, qubesd) == before


def test_an_unfinished_qube_is_not_removed_while_a_volume_is_being_imported(
    host: QubesHost, qubesd: Qubesd, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_unfinished("work")
    waited: list[bool] = []
    monkeypatch.setattr(tags_, "wait_for_imports", lambda: waited.append("work" in qubesd.system.domains))
    with host.lock():
        assert waited == [True]
        assert "work" not in qubesd.system.domains


@pytest.mark.parametrize("tags", [[IN_PROGRESS_TAG], [], ["restored-from-backup-x"]])
def test_what_is_not_ours_stays(host: QubesHost, qubesd: Qubesd, tmp_path: Path, tags: list[str]) -> None:
    other = qubesadmin.Qubes().add_new_vm("AppVM", "other", "red", TEMPLATE)
    other.tags.update(tags)
    before = state_of(tmp_path, qubesd)
    with host.lock() as remarks:
        assert remarks == ()
    assert state_of(tmp_path, qubesd) == before


def test_a_finished_qube_loses_the_tag_that_was_left_on_it(host: QubesHost, qubesd: Qubesd) -> None:
    other = qubesadmin.Qubes().add_new_vm("AppVM", "other", "red", TEMPLATE)
    other.tags.add(UNFINISHED_TAG)
    other.tags.add("restored-from-backup-x")
    with host.lock() as remarks:
        assert "the tag restore-svc-unfinished" in remarks[0]
    assert qubesd.system.domains["other"].tags == {*NEW_TAGS, "restored-from-backup-x"}


def test_an_unfinished_qube_that_others_use_is_told_and_left(host: QubesHost, qubesd: Qubesd) -> None:
    leave_unfinished("base", klass="TemplateVM")
    qubesadmin.Qubes().add_new_vm("AppVM", "mine", "red", "base")
    with host.lock() as remarks:
        assert remarks == ("base, left by an interrupted restore, is used by other qubes",)
    assert {"base", "mine"} <= set(qubesd.names())


def test_a_verification_that_runs_keeps_its_worker(
    host: QubesHost, system: QubesSystem, qubesd: Qubesd
) -> None:
    new_disposable(system, "disp-restore-0007", WORKER_TAG)
    system.start("disp-restore-0007")
    system.add_tag(NETVM, STORAGE_TAG)
    with host.lock():
        assert system.is_running("disp-restore-0007")
    assert system.is_running("disp-restore-0007")
    assert system.tagged(STORAGE_TAG) == [NETVM]


def test_an_unfinished_qube_that_the_stock_restore_released_is_told_and_left(
    host: QubesHost, qubesd: Qubesd
) -> None:
    """Which takes the tag that keeps a qube from starting from all of them (clear_old_tags)."""
    leave_unfinished("half")
    qubesadmin.Qubes().domains["half"].tags.discard(IN_PROGRESS_TAG)
    for _ in range(2):
        with host.lock() as [remark]:
            assert "half was left by an interrupted restore, incomplete" in remark
        assert UNFINISHED_TAG in qubesd.system.domains["half"].tags
    del qubesadmin.Qubes().domains["half"]
    with host.lock() as remarks:
        assert remarks == ()


def test_a_worker_is_known_by_its_tag_its_name_and_its_class(system: QubesSystem, qubesd: Qubesd) -> None:
    new_disposable(system, "disp-restore-0007", WORKER_TAG)
    system.start("disp-restore-0007")
    # A tag on the template, by mistake, is inherited by all disposables of it.
    new_disposable(system, "disp4711", WORKER_TAG)
    system.create("disp-restore-0008", "AppVM", "red", template=TEMPLATE, tags=[WORKER_TAG])
    new_disposable(system, "disp-restore-0009", "other")
    system.add_tag(NETVM, STORAGE_TAG)
    found = clear_worker(system)
    assert not system.exists("disp-restore-0007")
    for name in ("disp4711", "disp-restore-0008", "disp-restore-0009"):
        assert system.exists(name)
    assert system.tagged(WORKER_TAG) == system.tagged(STORAGE_TAG) == []
    assert len(found.cleared) == 4 and not found.kept


def test_what_was_asked_for_is_removed_when_it_appears(
    system: QubesSystem, qubesd: Qubesd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tags_, "_PAUSE_S", 0.001)
    looked = threading.Event()
    exists = QubesSystem.exists

    def looking(self: QubesSystem, name: str) -> bool:
        looked.set()
        return exists(self, name)

    monkeypatch.setattr(QubesSystem, "exists", looking)

    def create() -> None:
        assert looked.wait(SOON_S)
        qubesadmin.Qubes().add_new_vm("AppVM", "late", "red", TEMPLATE)

    creator = threading.Thread(target=create)
    creator.start()
    assert "late" in clear_untagged(system, ["late"]).cleared[0]
    creator.join()
    assert "late" not in qubesd.names()


def test_what_was_asked_for_and_never_comes_is_not_waited_for_long(
    system: QubesSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tags_, "APPEAR_TIMEOUT_S", 0.01)
    assert clear_untagged(system, ["never"]).cleared == []


def test_imports_that_still_run_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; print('up', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, "/etc/qubes-rpc/admin.vm.volume.ImportWithSize", "private"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        monkeypatch.setattr(tags_, "IMPORTS_END_TIMEOUT_S", 0.01)
        tags_.wait_for_imports()  # not for ever
        assert process.poll() is None
        monkeypatch.setattr(tags_, "IMPORTS_END_TIMEOUT_S", SOON_S)
        monkeypatch.setattr(time, "sleep", lambda _seconds: (process.stdin.close(), process.wait()))
        tags_.wait_for_imports()
        assert process.poll() == 0


# --- A worker whose restore, verification or listing is killed -----------------------------------

KILLED = """
from qubes_restore_svc.qubes.locks import WORKER, GuardedLock
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.qubes.worker_vm import clear_up_after_kill

system = QubesSystem.connect()
with GuardedLock(WORKER, place, clear_up_after_kill, "dom0", "verifying") as lock, system.watched_by(lock):
    stop("locked")
    if step == "other":
        system.add_tag = lambda *arguments: stop("other")
        system.create("work", "AppVM", "red", template=bed.TEMPLATE, tags=["x"])
    if step == "creating":
        system.add_tag = lambda *arguments: stop("creating")
    bed.new_disposable(system, "disp-restore-0001", "restore-svc-worker")
    stop("created")
    system.start("disp-restore-0001")
    system.add_tag(bed.NETVM, "restore-svc-storage")
    stop("running")
"""


def wait_for_guard(path: Path) -> None:
    """As whoever waits for the lock."""
    lock = GuardedLock(WORKER, path, lambda names: None)
    asyncio.run(when_cleared(lock.take))
    lock.release()


@pytest.mark.parametrize("step", ["locked", "creating", "created", "running"])
def test_a_worker_whose_owner_is_killed_is_removed_with_its_access(
    qubesd: Qubesd, tmp_path: Path, step: str
) -> None:
    before = state_of(tmp_path, qubesd)
    with stopped_program(KILLED, tmp_path / "worker.lock", step):
        pass
    # Whoever waits for the lock finds nothing left of it.
    wait_for_guard(tmp_path / "worker.lock")
    assert state_of(tmp_path, qubesd) == before


def test_what_is_no_worker_is_the_business_of_another_guard(qubesd: Qubesd, tmp_path: Path) -> None:
    with stopped_program(KILLED, tmp_path / "worker.lock", "other"):
        pass
    wait_for_guard(tmp_path / "worker.lock")
    assert "work" in qubesd.names()


def test_the_guard_of_a_worker_goes_without_a_trace_when_nobody_is_killed(
    system: QubesSystem, qubesd: Qubesd, tmp_path: Path
) -> None:
    with GuardedLock(WORKER, tmp_path / "worker.lock", clear_up_after_kill) as lock, system.watched_by(lock):
        new_disposable(system, "disp-restore-0007", WORKER_TAG)
        system.add_tag(NETVM, STORAGE_TAG)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, 0)
    assert system.exists("disp-restore-0007") and system.tagged(STORAGE_TAG) == [NETVM]
