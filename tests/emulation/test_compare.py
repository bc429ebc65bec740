"""A backup against the qubes that are here, on an emulated Qubes, with the real command and worker."""

import os
import signal
from pathlib import Path

import pytest

from qubes_restore_svc.qubes.comparison import CLONE_PREFIX
from qubes_restore_svc.qubes.locks import read_holder
from qubes_restore_svc.wire.names import backup_time
from tests.emulation.dom0 import Dom0, wait_until
from tests.support.backup_writer import PASSPHRASE, BackupWriter, ImagePlan, QubePlan

IMAGE = ImagePlan(3 << 20, ((4096, b"data" * 5000), ((2 << 20) + 512, b"more" * 100)))
SAME, PARTLY, DIFFERENT = 0, 3, 4
#: An hour before and after `BackupWriter` began its backup, as dom0 tells the time.
BEGUN = backup_time("20260101T010203-1234")
assert BEGUN is not None
BEFORE, AFTER = int(BEGUN) - 3600, int(BEGUN) + 3600


@pytest.fixture
def backup(dom0: Dom0, tmp_path: Path) -> Path:
    """A backup of three qubes; the first two have been restored from it, and not used since."""
    kept = {"AppVM": ("private",), "StandaloneVM": ("root", "private")}
    qubes = [
        QubePlan(name, klass, volumes=dict.fromkeys(kept[klass], IMAGE))
        for name, klass in (("work", "AppVM"), ("alone", "StandaloneVM"), ("gone", "AppVM"))
    ]
    path = tmp_path / "backup"
    BackupWriter(qubes, log_n=4, chunk_size=1 << 20).write(path)
    dom0.restore([str(path), "--ignore-missing", "-x", "gone"], PASSPHRASE)
    for volume in ("work/private", "alone/root", "alone/private"):
        changed_at(dom0, volume, BEFORE)
    return path


def changed_at(dom0: Dom0, volume: str, seconds: int) -> None:
    """Let it seem that the qube was shut down for the last time then, and once a day before."""
    qube, name = volume.split("/")
    kept = dom0.qubes.qubesd.system.domains[qube].volumes[name]
    kept.revisions = [f"{seconds - 86400}-back", f"{seconds}-back"]


def change(dom0: Dom0, volume: str, offset: int, data: bytes) -> None:
    """Write to a volume."""
    path = dom0.qubes.qubesd.volume_path(*volume.split("/"))
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def clones(dom0: Dom0) -> list[str]:
    return [name for name in dom0.qubes.qubesd.names() if name.startswith(CLONE_PREFIX)]


def test_what_was_restored_is_the_same_and_nothing_is_left(dom0: Dom0, backup: Path) -> None:
    before = dom0.qubes.snapshot()
    done = dom0.restore([str(backup), "--compare", "-x", "gone"], PASSPHRASE, SAME)
    assert dom0.outcomes() == {"work": "same", "alone": "same"}
    assert done.stderr.endswith("2 of 2 qubes the same as in the backup. See the warning above.\n")
    dom0.check_as_before(before)


def test_every_kind_of_difference_is_told_with_its_place(dom0: Dom0, backup: Path) -> None:
    change(dom0, "work/private", 5000, b"x")
    change(dom0, "alone/root", 2 << 20, bytes(8192))
    changed_at(dom0, "alone/root", AFTER)
    done = dom0.restore([str(backup), "--compare"], PASSPHRASE, DIFFERENT)
    assert dom0.outcomes() == {"work": "differs", "alone": "newer", "gone": "missing"}
    rows = {tuple(line.split()[:2]): " ".join(line.split()[4:-1]) for line in done.stdout.splitlines()}
    assert rows["work", "private"] == "differs in 4.0 KiB"
    assert rows["alone", "root"] == "newer, differs in 4.0 KiB"
    assert rows["alone", "private"] == "same"
    assert "missing here: gone" in done.stderr
    assert "work/private: 4.0 KiB differ: 4096 bytes at 4096" in done.stderr
    assert "alone/root: written to after the backup; 4.0 KiB differ: 4096 bytes at 2097152" in done.stderr


def test_of_a_qube_that_runs_its_last_state_is_compared_and_that_is_said(dom0: Dom0, backup: Path) -> None:
    dom0.qubes.start_domain("work")
    done = dom0.restore([str(backup), "--compare", "work"], PASSPHRASE, SAME)
    assert "warning: work: it runs: compared is what it was when it was last shut down" in done.stderr
    assert done.stderr.endswith("1 of 1 qube the same as in the backup, 1 with warnings.\n")
    assert not clones(dom0)


def test_the_volumes_of_the_qubes_are_cloned_in_their_pools_and_never_written_to(
    dom0: Dom0, backup: Path
) -> None:
    qubesd = dom0.qubes.qubesd
    qubesd.calls.clear()
    dom0.restore([str(backup), "--compare", "alone"], PASSPHRASE, SAME)
    about_it = {call.method for call in qubesd.calls if call.dest == "alone"}
    assert "admin.vm.volume.CloneFrom" in about_it
    assert all(
        method.rpartition(".")[2]
        in {"List", "Info", "ListSnapshots", "CloneFrom", "CurrentState", "GetAll", "Get"}
        for method in about_it
    )
    (creation,) = qubesd.calls_of("admin.vm.CreateInPool.StandaloneVM+")
    assert creation.payload.endswith(b" label=gray pool:private=vm-pool pool:root=vm-pool")


def test_a_volume_in_a_pool_of_another_kind_is_not_compared_and_the_others_are(
    dom0: Dom0, backup: Path
) -> None:
    system = dom0.qubes.qubesd.system
    system.pools["tank"] = type(system.pools["lvm"])("tank", "zfs", None)
    volume = system.domains["alone"].volumes["root"]
    path = dom0.qubes.qubesd.volume_path("alone", "root")
    volume.pool = "tank"
    dom0.qubes.qubesd.volume_path("alone", "root").parent.mkdir()
    path.rename(dom0.qubes.qubesd.volume_path("alone", "root"))
    done = dom0.restore([str(backup), "--compare", "alone", "work"], PASSPHRASE, PARTLY)
    assert dom0.outcomes() == {"work": "same", "alone": "failed"}
    assert "alone/root: it lies in the storage pool tank, and volumes of the driver zfs cannot" in done.stderr


@pytest.mark.parametrize("killed", ["command", "service"])
def test_a_comparison_that_is_killed_leaves_nothing(dom0: Dom0, backup: Path, killed: str) -> None:
    before = dom0.qubes.snapshot()
    process = dom0.start(["--mgmt-vm", "--memory", "1500", str(backup), "--compare"], PASSPHRASE)
    wait_until(lambda: bool(clones(dom0)), "a clone")
    holder = read_holder(dom0.folder / "restore.lock")
    assert holder is not None and holder.activity == "comparing"
    if killed == "command":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(holder.pid, signal.SIGKILL)
    process.communicate()
    dom0.check_as_before(before)
    dom0.restore([str(backup), "--compare", "-x", "gone"], PASSPHRASE, SAME)


def test_a_comparison_that_is_cancelled_leaves_nothing_and_says_nothing_of_removing(
    dom0: Dom0, backup: Path
) -> None:
    before = dom0.qubes.snapshot()
    process = dom0.start(["--mgmt-vm", "--memory", "1500", str(backup), "--compare"], PASSPHRASE)
    wait_until(lambda: bool(clones(dom0)), "a clone")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "being removed" not in stderr
    dom0.check_as_before(before)
