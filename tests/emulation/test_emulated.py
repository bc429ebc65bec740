"""The emulated Qubes holds together: commands in dom0, calls between domains, snapshots that miss nothing."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
import qubesadmin
import qubesadmin.config
from qubesadmin import exc
from qubesadmin.device_protocol import DeviceAssignment
from qubesadmin.firewall import Rule

from tests.emulation.daemon.state import NEW_TAGS
from tests.emulation.emulated import EmulatedQubes
from tests.emulation.snapshot import content_hash

#: Stands in for the worker: answers every call with what it was told of it, and ends with the domain.
_STUB = """
import socket
listener = socket.socket(fileno=3)
while True:
    call = listener.accept()[0]
    told = b""
    while not told.endswith(b"\\0"):
        told += call.recv(100)
    call.sendall(b"called as " + told[:-1])
    call.close()
"""


@pytest.fixture
def qubes(tmp_path: Path) -> Iterator[EmulatedQubes]:
    with EmulatedQubes(tmp_path, worker=[sys.executable, "-c", _STUB]) as qubes:
        yield qubes


def start_worker(app: qubesadmin.Qubes) -> qubesadmin.vm.QubesVM:
    worker = app.add_new_vm("DispVM", "disp-restore-1", "red", template=app.management_dispvm)
    worker.netvm = None
    worker.auto_cleanup = True
    worker.tags.add("restore-svc-worker")
    worker.start()
    return worker


def dom0(qubes: EmulatedQubes, code: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of Python in dom0."""
    command = [sys.executable, "-c", f"import qubesadmin; app = qubesadmin.Qubes(); {code}"]
    return subprocess.run(command, env=qubes.dom0_environment(), capture_output=True, timeout=30, check=False)


def test_a_typical_system(qubes: EmulatedQubes) -> None:
    app = qubes.app()
    assert {vm.name: vm.klass for vm in app.domains} == {
        "dom0": "AdminVM", "fedora-41-xfce": "TemplateVM", "debian-12-xfce": "TemplateVM",
        "sys-net": "AppVM", "sys-firewall": "AppVM", "sys-usb": "AppVM", "personal": "AppVM",
        "default-dvm": "AppVM", "default-mgmt-dvm": "AppVM",
    }  # fmt: skip
    running = {vm.name for vm in app.domains if vm.is_running()}
    assert running == {"dom0", "sys-net", "sys-firewall", "sys-usb"}
    assert (app.default_template, app.default_netvm) == ("fedora-41-xfce", "sys-firewall")
    assert (app.default_dispvm, app.management_dispvm) == ("default-dvm", "default-mgmt-dvm")
    assert app.domains["personal"].netvm == "sys-firewall"
    assert app.domains["default-mgmt-dvm"].netvm is None


def test_a_command_in_dom0_sees_the_system_and_calls_services(qubes: EmulatedQubes) -> None:
    done = dom0(qubes, "print(sorted(vm.name for vm in app.domains if vm.klass == 'TemplateVM'))")
    assert done.stdout == b"['debian-12-xfce', 'fedora-41-xfce']\n", done.stderr
    qubes.install_worker("fedora-41-xfce")
    start_worker(qubes.app())
    done = dom0(qubes, "print(app.domains['disp-restore-1'].run_service_for_stdio('restore.Session+x'))")
    assert done.stdout == b"(b'called as restore.Session+x dom0', b'')\n", done.stderr


def test_the_worker_is_where_it_was_installed_and_dom0_is_told(qubes: EmulatedQubes) -> None:
    app = qubes.app()
    feature = "supported-rpc.restore.Session"
    assert app.domains["default-mgmt-dvm"].features.check_with_template(feature) is None
    qubes.install_worker("fedora-41-xfce")
    assert app.domains["default-mgmt-dvm"].features.check_with_template(feature) == "1"
    worker = start_worker(app)
    for service in ("restore.Session", "restore.Volume+vm1.private", "restore.Archive+qfile"):
        output, _ = worker.run_service_for_stdio(service)
        assert output.decode() == f"called as {service}{'' if '+' in service else '+'} dom0"
    worker.kill()
    qubes.uninstall_worker("fedora-41-xfce")
    assert app.domains["default-mgmt-dvm"].features.check_with_template(feature) is None
    process = start_worker(app).run_service("restore.Session")
    assert process.communicate() == (b"", b"")
    assert process.returncode == 127


def test_the_policy_of_the_project_is_in_force(qubes: EmulatedQubes) -> None:
    app = qubes.app()
    qubes.install_worker("fedora-41-xfce")
    start_worker(app)

    def code(target: str, service: str) -> int:
        program = qubes.root / "disp-restore-1" / "bin" / "qrexec-client-vm"
        environment = qubes.switchboard.environment("disp-restore-1")
        command = [str(program), target, service]
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False
        ).returncode

    assert code("sys-usb", "qubes.RestoreById+none") == 126
    app.domains["sys-usb"].tags.add("restore-svc-storage")
    assert code("sys-usb", "qubes.RestoreById+none") == 1, "the service runs, and has no such id"
    assert code("sys-usb", "qubes.VMShell") == 126
    assert code("dom0", "qubes.GetDate") == 126
    assert code("personal", "qubes.RestoreById+none") == 126
    assert app.domains["personal"].is_halted()


def test_a_backup_in_a_qube_can_be_registered(qubes: EmulatedQubes, tmp_path: Path) -> None:
    (tmp_path / "backup").write_bytes(b"not much of a backup")
    there = qubes.put_backup("sys-usb", tmp_path / "backup")
    process = qubes.app().domains["sys-usb"].run_service("qubes.RegisterBackupLocation")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{there}\n".encode())
    process.stdin.flush()
    assert process.stdout.readline().strip().isalnum()
    process.communicate()


# --- Snapshots -----------------------------------------------------------------------------------


def create(qubes: EmulatedQubes) -> None:
    qubes.add("AppVM", "half", label="red")


def import_data(qubes: EmulatedQubes) -> None:
    qubes.app().domains["personal"].volumes["private"].import_data_with_size(BytesIO(bytes(99)), 99)


def change_a_byte(qubes: EmulatedQubes) -> None:
    with qubes.qubesd.volume_path("personal", "private").open("r+b") as file:
        file.seek(1 << 30)
        file.write(b"x")


def begin_import(qubes: EmulatedQubes) -> None:
    personal = qubes.app().domains["personal"]
    personal.qubesd_call(None, "internal.vm.volume.ImportBegin", "private", b"5")


def leave_a_volume(qubes: EmulatedQubes) -> None:
    qubes.qubesd.volume_path("personal", "private").with_name("vm-gone-private").touch()


def leave_a_file(qubes: EmulatedQubes) -> None:
    (qubes.root / "dom0" / "home" / "staged").write_bytes(b"plaintext")


def assign(qubes: EmulatedQubes) -> None:
    app = qubes.app()
    disk = DeviceAssignment.new(app.domains["sys-usb"], "sda", "block", mode="auto-attach")
    app.domains["personal"].devices["block"].assign(disk)


Change = Callable[[EmulatedQubes], object]


@pytest.mark.parametrize(
    "change",
    [
        create, import_data, change_a_byte, begin_import,  leave_a_file, leave_a_volume, assign,
        lambda qubes: qubes.app().domains["sys-usb"].tags.add("restore-svc-storage"),
        lambda qubes: qubes.app().domains["personal"].features.__setitem__("x", "1"),
        lambda qubes: setattr(qubes.app().domains["personal"], "memory", 400),
        lambda qubes: setattr(qubes.app(), "default_dispvm", "default-mgmt-dvm"),
        lambda qubes: setattr(qubes.app().domains["personal"].firewall, "rules", [Rule("action=drop")]),
        lambda qubes: qubes.app().domains["personal"].set_notes("x"),
        lambda qubes: qubes.app().domains["personal"].start(),
        lambda qubes: qubes.app().domains.__delitem__("personal"),
    ],
)  # fmt: skip
def test_a_snapshot_misses_nothing(qubes: EmulatedQubes, change: Change) -> None:
    before = qubes.snapshot()
    assert qubes.snapshot() == before
    change(qubes)
    assert qubes.snapshot() != before


def test_a_snapshot_sees_the_processes_of_every_domain(qubes: EmulatedQubes) -> None:
    before = qubes.snapshot()
    for environment in (qubes.switchboard.environment("sys-usb"), qubes.dom0_environment()):
        with subprocess.Popen(["sleep", "60"], env=environment) as process:
            now = qubes.snapshot()
            process.kill()
        assert now["processes"] == ["sleep 60"]
        assert qubes.snapshot() == before


def test_after_a_worker_was_killed_everything_is_as_before(qubes: EmulatedQubes) -> None:
    qubes.install_worker("fedora-41-xfce")
    before = qubes.snapshot()
    worker = start_worker(qubes.app())
    worker.run_service_for_stdio("restore.Session")
    assert qubes.snapshot() != before
    worker.kill()
    assert qubes.settled(before) == before


def test_after_a_command_was_killed_its_import_settles(qubes: EmulatedQubes) -> None:
    before = qubes.snapshot()
    code = "volume.import_data_with_size(sys.stdin.buffer, 9 << 20)"
    volume = "qubesadmin.Qubes().domains['personal'].volumes['private']"
    command = [sys.executable, "-c", f"import qubesadmin, sys; volume = {volume}; {code}"]
    with subprocess.Popen(command, env=qubes.dom0_environment(), stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(bytes(1 << 20))
        process.stdin.flush()
        deadline = time.monotonic() + 20
        while not qubes.qubesd.calls_of("internal.vm.volume.ImportBegin*"):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    assert qubes.settled(before) == before


def test_files_that_may_be_left_can_be_left_out(qubes: EmulatedQubes) -> None:
    before = qubes.snapshot(["dom0/home/*.log"])
    (qubes.root / "dom0" / "home" / "restore.log").write_text("done")
    assert qubes.snapshot(["dom0/home/*.log"]) == before
    assert qubes.snapshot() != before
    assert qubes.settled(before, limit_s=0.1) != before


def test_the_hash_does_not_depend_on_where_the_holes_are(tmp_path: Path) -> None:
    data = bytes(300_000) + b"data" + bytes(500_000)
    (tmp_path / "full").write_bytes(data)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(len(data))
        file.seek(300_000)
        file.write(b"data")
    assert content_hash(tmp_path / "full") == content_hash(tmp_path / "sparse")
    (tmp_path / "longer").write_bytes(data + b"\0")
    assert content_hash(tmp_path / "longer") != content_hash(tmp_path / "full")


def test_two_systems_one_after_the_other_know_nothing_of_each_other(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with EmulatedQubes(tmp_path / name) as qubes:
            qubes.app().domains["personal"].tags.add(name)
            assert set(qubes.app().domains["personal"].tags) == {*NEW_TAGS, name}
    assert qubesadmin.config.VARIABLE not in os.environ
    with pytest.raises(exc.QubesDaemonCommunicationError):
        qubesadmin.Qubes().domains.keys()
