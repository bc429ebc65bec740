"""The guard of a worker: nothing of it is left, whenever its restore, verification or listing is killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qubes_restore_svc.qubes.leftovers import STORAGE_TAG, WORKER_TAG
from qubes_restore_svc.qubes.restore_lock import RestoreLock, try_lock
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.qubes.worker_guard import worker_guard
from tests.emulation.qubesd import Qubesd
from tests.qubes.qubes_bed import DISPOSABLES, NETVM, state_of

REPOSITORY = Path(__file__).resolve().parents[2]

KILLED = """
import sys
from pathlib import Path
from tests.qubes import qubes_bed as bed
from qubes_restore_svc.qubes.holders import write_holder
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.qubes.restore_lock import try_lock
from qubes_restore_svc.qubes.worker_guard import worker_guard
path, step = Path(sys.argv[1]), sys.argv[2]

def stop(here):
    if here == step:
        print("here", flush=True)
        sys.stdin.read()

system = QubesSystem.connect()
lock = try_lock(path)
write_holder(lock, "dom0", "verifying")
with worker_guard(system, lock, path):
    stop("locked")
    if step == "other":
        system.add_tag = lambda *arguments: stop("other")
        system.create("work", "AppVM", "red", template=bed.TEMPLATE, tags=["x"])
    if step == "creating":
        system.add_tag = lambda *arguments: stop("creating")
    system.create_disposable("disp-restore-0001", bed.DISPOSABLES, memory=400, vcpus=1,
                             tags=["restore-svc-worker"])
    stop("created")
    system.start("disp-restore-0001")
    system.add_tag(bed.NETVM, "restore-svc-storage")
    stop("running")
"""


def kill_at(step: str, path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), step],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests/emulation/standin"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        process.kill()


@pytest.mark.parametrize("step", ["locked", "creating", "created", "running"])
def test_a_worker_whose_owner_is_killed_is_removed_with_its_access(
    qubesd: Qubesd, tmp_path: Path, step: str
) -> None:
    before = state_of(tmp_path, qubesd)
    kill_at(step, tmp_path / "worker.lock")
    # Whoever waits for the lock finds nothing left of it.
    lock = RestoreLock(tmp_path / "worker.lock", lambda names: None)
    lock.take()
    lock.release()
    assert state_of(tmp_path, qubesd) == before


def test_what_is_no_worker_is_the_business_of_another_guard(qubesd: Qubesd, tmp_path: Path) -> None:
    kill_at("other", tmp_path / "worker.lock")
    lock = RestoreLock(tmp_path / "worker.lock", lambda names: None)
    lock.take()
    lock.release()
    assert "work" in qubesd.names()


def test_it_goes_without_a_trace_when_nobody_is_killed(
    system: QubesSystem, qubesd: Qubesd, tmp_path: Path
) -> None:
    file = try_lock(tmp_path / "worker.lock")
    assert file is not None
    with worker_guard(system, file, tmp_path / "worker.lock"):
        system.create_disposable("disp-restore-0007", DISPOSABLES, memory=400, vcpus=1, tags=[WORKER_TAG])
        system.add_tag(NETVM, STORAGE_TAG)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, 0)
    os.close(file)
    assert system.exists("disp-restore-0007") and system.tagged(STORAGE_TAG) == [NETVM]
