"""Whatever fails in a restore on an emulated Qubes: the state afterwards is the one before, but for what the
report calls restored, and a second run works at once."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qubes_restore_svc.qubes.locks import read_holder
from tests.emulation.daemon.errors import AdminError
from tests.emulation.dom0 import LOCATIONS, STORAGE, TEMPLATE, Dom0, LocationKind
from tests.emulation.snapshot import Snapshot
from tests.emulation.test_restore import IMAGE, plan, write
from tests.support.backup_writer import PASSPHRASE

DEBIAN = "debian-12-xfce"


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    """Two qubes that need nothing but what is there."""
    return write(tmp_path / "backup", plan("first", template=DEBIAN), plan("second", template=DEBIAN))


@dataclass(frozen=True)
class Failure:
    """Something that goes wrong: `cause` makes it, `words` is said of it, `restored` is there then.

    `again`: a second run is made. After each of the others the state is the one before, as the second run is.
    """

    name: str
    cause: Callable[[Dom0], None]
    words: str
    restored: frozenset[str] = frozenset()
    kind: LocationKind = "path"
    status: int = 1
    again: bool = False

    def __str__(self) -> str:
        return self.name


def admin(
    method: str, dest: str = "*", *, after: int = 0, message: str = "no such luck"
) -> Callable[[Dom0], None]:
    """The Admin API refuses a call."""
    return lambda dom0: dom0.qubes.qubesd.fail(method, message=message, dest=dest, after=after)


def service(name: str, script: str | None) -> Callable[[Dom0], None]:
    """A service of the qube that holds the backup is another one, or is missing."""

    def cause(dom0: Dom0) -> None:
        path = dom0.qubes.root / STORAGE / "qubes-rpc" / name
        path.rename(path.with_name(f"saved.{name}"))
        if script is not None:
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)

    return cause


def no_worker(dom0: Dom0) -> None:
    dom0.qubes.uninstall_worker(TEMPLATE)


def full_pool(dom0: Dom0) -> None:
    dom0.qubes.qubesd.limit_pool("vm-pool", 4096)


ONE = frozenset({"first"})
FAILURES = [
    Failure("no worker in the template", no_worker, f"qubes-restore-svc-vm in {TEMPLATE}"),
    Failure("the worker's qube cannot be created", admin("admin.vm.Create.DispVM*"), "no such luck"),
    Failure("it does not start", admin("admin.vm.Start*", "disp-restore-*"), "no such luck", again=True),
    Failure("a property of it is refused", admin("admin.vm.property.Set*", "disp-restore-*"), "no such luck"),
    Failure("it cannot be tagged", admin("admin.vm.tag.Set*", "disp-restore-*"), "no such luck"),
    Failure("the backup's qube cannot be tagged", admin("admin.vm.tag.Set*", STORAGE), "no such luck"),
    Failure("no registration", service("qubes.RegisterBackupLocation", None), "qubes.RegisterBackupLocation"),
    Failure(
        "a registration of another kind", service("qubes.RegisterBackupLocation", "echo '../x'; cat"), STORAGE
    ),
    Failure("a registration that ends at once", service("qubes.RegisterBackupLocation", "exit 1"), STORAGE),
    Failure("no service for the backup", service("qubes.RestoreById", None), "qubes.RestoreById"),
    Failure("a service that fails", service("qubes.RestoreById", "exit 3"), STORAGE, again=True),
    Failure(
        "a service that sends something else",
        service("qubes.RestoreById", "echo no qfile at all, but text"),
        "ends without its end mark",
    ),
    Failure(
        "the first qube is refused",
        admin("admin.vm.Create.AppVM*", after=0),
        "no such luck",
        frozenset({"second"}),
        status=3,
    ),
    Failure(
        "the second qube is refused", admin("admin.vm.Create.AppVM*", after=1), "no such luck", ONE, status=3
    ),
    Failure(
        "an import is refused",
        admin("internal.vm.volume.ImportBegin*", "second"),
        "no such luck",
        ONE,
        status=3,
        again=True,
    ),
    Failure(
        "the second qube cannot be tagged",
        admin("admin.vm.tag.Set*", "second"),
        "no such luck",
        ONE,
        status=3,
    ),
    Failure("the pool is full", full_pool, "Free some space", again=True),
]


def new_qubes(dom0: Dom0, before: Snapshot) -> set[str]:
    there = before["qubes"]
    assert isinstance(there, dict)
    return set(dom0.qubes.qubesd.names()) - set(there)


def remove(dom0: Dom0, names: set[str]) -> None:
    app = dom0.qubes.app()
    for name in names:
        del app.domains[name]


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_after_a_failure_only_what_was_restored_is_there_and_a_second_run_works(
    dom0: Dom0, backup: Path, failure: Failure
) -> None:
    words = dom0.location(backup, failure.kind)
    services = dom0.qubes.root / STORAGE / "qubes-rpc"
    before = dom0.qubes.snapshot()
    failure.cause(dom0)
    done = dom0.restore(words, PASSPHRASE, failure.status)
    assert failure.words in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    _mend(dom0, services)
    restored = new_qubes(dom0, before)
    assert restored == failure.restored
    for name in restored:
        assert dom0.sha256(f"{name}/private") == (IMAGE.size, IMAGE.sha256())
        assert dom0.outcomes()[name] == "restored"
    remove(dom0, restored)
    dom0.check_as_before(before)
    if failure.again:
        dom0.restore(words, PASSPHRASE)
        assert new_qubes(dom0, before) == {"first", "second"}


@pytest.mark.parametrize("kind", LOCATIONS)
def test_a_backup_that_is_cut_off_gives_what_was_before_the_cut(
    dom0: Dom0, backup: Path, kind: LocationKind
) -> None:
    cut = backup.with_name("cut")
    whole = backup.read_bytes()
    cut.write_bytes(whole[: whole.rindex(b"scrypt\0") + 200])  # in the last chunk
    words = dom0.location(cut, kind)
    before = dom0.qubes.snapshot()
    dom0.restore(words, PASSPHRASE, 3)
    assert new_qubes(dom0, before) == {"first"}
    remove(dom0, {"first"})
    dom0.check_as_before(before)


@pytest.mark.parametrize("kind", LOCATIONS)
def test_a_wrong_passphrase_changes_nothing(dom0: Dom0, backup: Path, kind: LocationKind) -> None:
    words = dom0.location(backup, kind)
    before = dom0.qubes.snapshot()
    done = dom0.restore(words, "wrong", 1)
    assert "does not open with this passphrase" in done.stderr
    dom0.check_as_before(before)


def test_a_storage_qube_that_drips_is_named_and_leaves_nothing(dom0: Dom0, backup: Path) -> None:
    place = dom0.qubes.put_backup(STORAGE, backup)
    dripping = f"head -c {backup.stat().st_size // 2} {place}; while printf x; do sleep 0.1; done"
    words = ["-d", STORAGE, dripping, "--stall-timeout", "1"]
    before = dom0.qubes.snapshot()
    done = dom0.restore(words, PASSPHRASE, 1)
    assert f"no data from {STORAGE} for 1 s" in done.stderr
    dom0.check_as_before(before)


def test_a_command_that_fails_half_way_is_no_success(dom0: Dom0, backup: Path) -> None:
    place = dom0.qubes.put_backup(STORAGE, backup)
    words = ["-d", STORAGE, f"sh -c 'head -c {backup.stat().st_size // 2} {place}; exit 7'"]
    before = dom0.qubes.snapshot()
    done = dom0.restore(words, PASSPHRASE, 1)
    assert "0 of 2 qubes restored" in done.stderr
    dom0.check_as_before(before)


# --- Killed, cancelled, left alone ---------------------------------------------------------------


#: A sign in the Admin API's calls that the command has come so far.
MOMENTS = {
    "the worker's qube is made": ("admin.vm.Create.DispVM*", "*"),
    "it starts": ("admin.vm.Start*", "disp-restore-*"),
    "the backup's qube is tagged": ("admin.vm.tag.Set*", STORAGE),
    "the first qube is made": ("admin.vm.Create.AppVM*", "*"),
    "the first volume is written": ("internal.vm.volume.ImportBegin*", "first"),
    "the second qube is tagged": ("admin.vm.tag.Set*", "second"),
    "the second volume is written": ("internal.vm.volume.ImportBegin*", "second"),
}


#: What clears up depends on the moment after a SIGKILL and after a signal that is caught; all that are caught
#: are caught alike.
ENDS = [
    *((moment, number) for number in (signal.SIGKILL, signal.SIGINT) for moment in MOMENTS),
    *(("the first volume is written", number) for number in (signal.SIGTERM, signal.SIGHUP)),
    ("it starts", signal.SIGTERM),
]


@pytest.mark.parametrize(("moment", "number"), ENDS, ids=lambda value: getattr(value, "name", value))
def test_a_command_that_is_ended_leaves_nothing_and_a_second_run_works(
    dom0: Dom0, backup: Path, moment: str, number: signal.Signals
) -> None:
    words = dom0.location(backup, "path")
    before = dom0.qubes.snapshot()
    process = _started(dom0, words, *MOMENTS[moment])
    if number is signal.SIGKILL:
        _kill(dom0, process)
    else:
        process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stdout + stderr
    if number is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
    finished = _whole_qubes(dom0, before)
    remove(dom0, finished)
    dom0.check_as_before(before)
    if number is signal.SIGKILL:
        dom0.restore(words, PASSPHRASE)
        assert new_qubes(dom0, before) == {"first", "second"}


@pytest.mark.parametrize("moment", [*MOMENTS][:3])
def test_a_verification_that_is_killed_leaves_nothing_and_a_second_one_works(
    dom0: Dom0, backup: Path, moment: str
) -> None:
    words = ["--verify-only", *dom0.location(backup, "path")]
    before = dom0.qubes.snapshot()
    process = _started(dom0, words, *MOMENTS[moment])
    _kill(dom0, process)
    process.communicate(timeout=60)
    dom0.restore(words, PASSPHRASE)
    dom0.check_as_before(before)


@pytest.mark.parametrize("words", [[], ["--verify-only"]])
def test_what_is_killed_is_cleared_up_although_nothing_else_is_started(
    dom0: Dom0, backup: Path, words: list[str]
) -> None:
    words = [*words, *dom0.location(backup, "path")]
    before = dom0.qubes.snapshot()
    process = _started(dom0, words, "admin.vm.tag.Set*", STORAGE)
    _kill(dom0, process)
    process.communicate(timeout=60)
    dom0.check_as_before(before)


def test_a_worker_whose_qube_dies_costs_what_was_not_restored(dom0: Dom0, backup: Path) -> None:
    words = dom0.location(backup, "path")
    before = dom0.qubes.snapshot()
    process = dom0.start(["--mgmt-vm", "--memory", "1500", *words], PASSPHRASE)
    while not dom0.qubes.qubesd.calls_of("internal.vm.volume.ImportBegin*", "second"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    for name in new_qubes(dom0, before):
        if name.startswith("disp-restore-"):
            dom0.qubes.switchboard.stop_domain(name)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (0, 3), stderr
    left = new_qubes(dom0, before)
    assert left == ({"first"} if process.returncode else {"first", "second"})
    remove(dom0, left)
    dom0.check_as_before(before)


def test_a_worker_takes_what_memory_the_system_has(dom0: Dom0, backup: Path) -> None:
    words = ["-v", "--memory", "auto", *dom0.location(backup, "path")]
    before = dom0.qubes.snapshot()
    dom0.qubes.qubesd.system.free_memory = 399
    stderr = dom0.restore(words, PASSPHRASE, 1).stderr
    assert "Not enough memory to start domain 'disp-restore-" in stderr
    assert "Not even 400 MiB are free. Shut some qubes down." in stderr
    dom0.check_as_before(before)
    dom0.qubes.qubesd.system.free_memory = 1000
    stderr = dom0.restore(words, PASSPHRASE).stderr
    assert re.search("the worker has [0-9]{3} MiB of memory and [1-8] processors", stderr)
    assert dom0.outcomes() == {"first": "restored", "second": "restored"}
    remove(dom0, {"first", "second"})
    dom0.check_as_before(before)


def test_a_service_that_is_killed_is_told_of_and_its_guard_clears_up(dom0: Dom0, backup: Path) -> None:
    words = dom0.location(backup, "path")
    before = dom0.qubes.snapshot()
    process = _started(dom0, words, *MOMENTS["the second volume is written"])
    holder = read_holder(dom0.folder / "restore.lock")
    assert holder is not None and holder.pid != process.pid
    os.kill(holder.pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "qvm-backup-restore: dom0's restore service was killed by signal 9 (SIGKILL)" in stderr
    assert _whole_qubes(dom0, before) == {"first"}
    remove(dom0, {"first"})
    assert dom0.qubes.settled(before) == before
    dom0.restore(words, PASSPHRASE)


def test_a_second_restore_at_the_same_time_is_told_of_the_first(dom0: Dom0, backup: Path) -> None:
    words = dom0.location(backup, "path")
    first = dom0.start(["--mgmt-vm", "--memory", "1500", *words], PASSPHRASE)
    while not dom0.qubes.qubesd.calls_of("admin.vm.Create.DispVM*", "*"):
        assert first.poll() is None, first.communicate()
        time.sleep(0.005)
    holder = read_holder(dom0.folder / "worker.lock")
    assert holder is not None and holder.client == "dom0" and holder.pid != first.pid
    os.kill(holder.pid, signal.SIGSTOP)
    try:
        done = dom0.restore(words, PASSPHRASE, 1)
    finally:
        os.kill(holder.pid, signal.SIGCONT)
    assert "dom0 has been restoring since" in done.stderr
    assert f"(process {holder.pid} of " in done.stderr
    assert first.wait(60) == 0
    first.communicate()


def _mend(dom0: Dom0, services: Path) -> None:
    """Take the failure away."""
    dom0.qubes.qubesd.mend()
    dom0.qubes.qubesd.limit_pool("vm-pool", None)
    dom0.qubes.install_worker(TEMPLATE)
    for saved in services.glob("saved.*"):
        saved.rename(services / saved.name.removeprefix("saved."))


def _started(dom0: Dom0, words: list[str], method: str, dest: str) -> "subprocess.Popen[str]":
    """The command, under way: it has made this call to the Admin API."""
    process = dom0.start(["--mgmt-vm", "--memory", "1500", *words], PASSPHRASE)
    while not dom0.qubes.qubesd.calls_of(method, dest):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process


def _kill(dom0: Dom0, process: "subprocess.Popen[str]") -> None:
    """Kill the service that restores for the command, and the command: what clears up is the guards."""
    holder = read_holder(dom0.folder / "worker.lock")
    assert holder is not None and holder.pid != process.pid
    os.kill(holder.pid, signal.SIGKILL)
    process.kill()


def _whole_qubes(dom0: Dom0, before: Snapshot) -> set[str]:
    """The qubes that were restored completely, once nothing else is there: a command that is killed leaves it
    to its guard to clear up."""
    deadline = time.monotonic() + 30
    while (new := new_qubes(dom0, before)) != (whole := {name for name in new if _is_whole(dom0, name)}):
        assert time.monotonic() < deadline, f"left: {new - whole}"
        time.sleep(0.02)
    return whole


def _is_whole(dom0: Dom0, name: str) -> bool:
    try:
        finished = not dom0.qubes.qubesd.tags(name) & {"backup-restore-in-progress", "restore-svc-worker"}
        return finished and dom0.sha256(f"{name}/private") == (IMAGE.size, IMAGE.sha256())
    except (AdminError, FileNotFoundError):  # it is being removed
        return False
