"""The facade over `qubesadmin`: plain values, errors that say what failed, nothing left after a failure."""

import io
import os
from pathlib import Path

import pytest
import qubesadmin
import qubesadmin.exc

from qubes_restore_svc.broker.interfaces import HostQube
from qubes_restore_svc.errors import HostFailed, NoSpace, QubeExists, RestoreError
from qubes_restore_svc.qubes import system as qubes
from qubes_restore_svc.qubes.system import QubeInUse, QubesSystem, said_by
from qubes_restore_svc.qubes.worker_vm import worker_properties
from qubes_restore_svc.wire.messages import DeviceInfo
from qubes_restore_svc.wire.names import MAX_REQUEST
from tests.emulation.daemon.state import NEW_TAGS
from tests.emulation.qubesd import Qubesd
from tests.qubes.qubes_bed import DISPOSABLES, NETVM, TEMPLATE, state_of

WORKER = "disp-restore-0001"


def domain(qubesd: Qubesd, name: str):  # type: ignore[no-untyped-def] # a dataclass of the stand-in
    return qubesd.system.domains[name]


def create_worker(system: QubesSystem) -> None:
    tags, properties = ["restore-svc-worker", "b"], worker_properties(1500, 3)
    system.create(WORKER, "DispVM", "red", template=DISPOSABLES, tags=tags, properties=properties)


# --- Looking -------------------------------------------------------------------------------------


def test_a_machine_without_qubesd_is_no_dom0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUBES_EMULATION", str(tmp_path))
    with pytest.raises(HostFailed, match="asking qubesd failed: Failed to connect"):
        QubesSystem.connect()


def test_a_vm_is_no_dom0(qubesd: Qubesd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qubesadmin.Qubes, "qubesd_connection_type", "qrexec")
    with pytest.raises(HostFailed, match="not the dom0"):
        QubesSystem.connect()


def test_the_system_is_told_in_plain_values(system: QubesSystem) -> None:
    assert {qube.name: qube for qube in system.qubes()} == {
        "dom0": HostQube("dom0", "AdminVM"),
        TEMPLATE: HostQube(TEMPLATE, "TemplateVM"),
        NETVM: HostQube(NETVM, "AppVM", provides_network=True),
        DISPOSABLES: HostQube(DISPOSABLES, "AppVM", template_for_dispvms=True),
    }
    assert (system.default("default_template"), system.default("default_dispvm")) == (TEMPLATE, DISPOSABLES)
    assert system.default("management_dispvm") == DISPOSABLES
    assert {"red", "blue"} <= system.labels()
    assert system.template_of(NETVM) == TEMPLATE
    assert system.template_of(TEMPLATE) is None
    assert [system.is_disposable_template(name) for name in (DISPOSABLES, NETVM, TEMPLATE, "no")] == [
        True, False, False, None,
    ]  # fmt: skip
    assert system.saved_volumes(NETVM) == {"private"}
    assert system.saved_volumes(TEMPLATE) == {"root", "private"}
    assert system.exists(NETVM) and not system.exists("no")
    for value in (system.default("default_template"), system.template_of(NETVM), *system.labels()):
        assert type(value) is str
    assert type(system.is_disposable_template(NETVM)) is bool


def test_defaults_that_are_not_set_are_none(system: QubesSystem, qubesd: Qubesd) -> None:
    qubesadmin.Qubes().management_dispvm = None
    assert system.default("management_dispvm") is None


def test_what_others_do_to_the_system_is_seen_at_once(system: QubesSystem) -> None:
    assert not system.exists("new")
    other = qubesadmin.Qubes()
    other.add_new_vm("AppVM", "new", "red", TEMPLATE)
    assert system.exists("new")
    assert system.klass("new") == "AppVM"
    del other.domains["new"]
    other.add_new_vm("StandaloneVM", "new", "red")
    assert system.klass("new") == "StandaloneVM"
    del other.domains["new"]
    with pytest.raises(HostFailed, match="no such qube") as caught:
        system.is_running("new")
    assert caught.value.qube == "new"


def test_what_was_restored_is_known_by_its_tags(system: QubesSystem) -> None:
    tags = qubesadmin.Qubes().domains[TEMPLATE].tags
    for tag in ("restored-from-backup-b", "restored-from-backup-at-noon", "mine"):
        tags.add(tag)
    found = {qube.name: qube.restored_tags for qube in system.qubes()}
    assert found.pop(TEMPLATE) == {"restored-from-backup-b", "restored-from-backup-at-noon"}
    assert set(found.values()) == {frozenset()}


def test_a_service_is_reported_by_the_template_or_not_at_all(system: QubesSystem) -> None:
    service = "restore.Session"
    assert system.reports_service(DISPOSABLES, service) is None
    system.set_feature(TEMPLATE, "supported-rpc.qubes.VMShell", "1")
    assert system.reports_service(DISPOSABLES, service) is False
    system.set_feature(TEMPLATE, f"supported-rpc.{service}", "1")
    assert system.reports_service(DISPOSABLES, service) is True
    system.set_feature(TEMPLATE, f"supported-rpc.{service}", "")
    assert system.reports_service(DISPOSABLES, service) is False
    system.set_feature(DISPOSABLES, f"supported-rpc.{service}", "1")
    assert system.reports_service(DISPOSABLES, service) is True


def test_free_space_is_that_of_the_pool(system: QubesSystem, qubesd: Qubesd) -> None:
    qubesd.limit_pool("vm-pool", 1000)
    assert system.free_space() == 1000
    assert (system.free_space("lvm") or 0) > 1 << 30
    assert system.free_space("linux-kernel") is None
    with pytest.raises(HostFailed, match="no storage pool 'nowhere'"):
        system.free_space("nowhere")


def test_a_qube_that_is_removed_while_all_are_asked_is_left_out(
    system: QubesSystem, qubesd: Qubesd, monkeypatch: pytest.MonkeyPatch
) -> None:
    respond = qubesd.respond

    def removing(request: bytes) -> bytes:
        if b"admin.vm.tag.List" in request:
            qubesd.system.domains.pop(DISPOSABLES, None)
        return respond(request)

    monkeypatch.setattr(qubesd, "respond", removing)
    assert set(system.tags()) == {"dom0", TEMPLATE, NETVM}


# --- Creating and removing -----------------------------------------------------------------------


def test_a_disposable_has_no_network_fixed_memory_and_goes_when_it_is_killed(
    system: QubesSystem, qubesd: Qubesd
) -> None:
    create_worker(system)
    made = domain(qubesd, WORKER)
    assert made.klass == "DispVM"
    assert made.tags >= {"restore-svc-worker", "b"}
    wanted = {"netvm": None, "maxmem": 0, "memory": 1500, "vcpus": 3, "auto_cleanup": True, "label": "red"}
    assert {key: made.properties[key] for key in wanted} == wanted
    system.start(WORKER)
    assert system.is_running(WORKER)
    system.destroy(WORKER)
    assert not system.exists(WORKER)
    system.destroy(WORKER)


def test_a_disposable_that_was_never_started_is_destroyed_too(system: QubesSystem) -> None:
    create_worker(system)
    system.destroy(WORKER)
    assert not system.exists(WORKER)


def test_the_worker_has_its_tag_before_anything_else(system: QubesSystem, qubesd: Qubesd) -> None:
    create_worker(system)
    changes = [call for call in qubesd.calls_of("admin.vm.*", WORKER) if ".Set" in call.method]
    assert changes[0].name == "admin.vm.tag.Set+restore-svc-worker"


CREATION_STEPS = ["admin.vm.Create.*", "admin.vm.tag.Set+*", *(
    f"admin.vm.property.Set+{name}" for name in ("netvm", "maxmem", "memory", "vcpus", "auto_cleanup")
)]  # fmt: skip


@pytest.mark.parametrize("error", ["QubesException", "QubesDaemonAccessError", "", "AssertionError", "Odd"])
@pytest.mark.parametrize("step", CREATION_STEPS)
def test_a_creation_that_fails_leaves_nothing(
    system: QubesSystem, qubesd: Qubesd, tmp_path: Path, step: str, error: str
) -> None:
    before = state_of(tmp_path, qubesd)
    qubesd.fail(step, error)
    with pytest.raises(HostFailed) as caught:
        create_worker(system)
    assert caught.value.qube == WORKER
    assert state_of(tmp_path, qubesd) == before


def test_a_creation_whose_answer_is_lost_leaves_nothing(
    system: QubesSystem, qubesd: Qubesd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(tmp_path, qubesd)
    respond = qubesd.respond

    def losing(request: bytes) -> bytes:
        answer = respond(request)
        return b"" if b".Create." in request else answer

    monkeypatch.setattr(qubesd, "respond", losing)
    with pytest.raises(HostFailed, match="creating the qube failed"):
        create_worker(system)
    assert state_of(tmp_path, qubesd) == before


def test_a_creation_that_cannot_be_undone_says_so(system: QubesSystem, qubesd: Qubesd) -> None:
    qubesd.fail("admin.vm.tag.Set+*", message="no tags today.")
    qubesd.fail("admin.vm.Remove+", message="not now")
    with pytest.raises(HostFailed) as caught:
        create_worker(system)
    assert "no tags today; what was created of it is still there" in caught.value.reason
    assert f"qvm-remove {WORKER}" in caught.value.advice


def test_a_name_that_is_taken_is_refused_and_its_owner_untouched(
    system: QubesSystem, qubesd: Qubesd, tmp_path: Path
) -> None:
    before = state_of(tmp_path, qubesd)
    with pytest.raises(QubeExists):
        system.create(NETVM, "AppVM", "red", template=TEMPLATE, tags=["x"])
    assert state_of(tmp_path, qubesd) == before


def test_a_name_that_is_taken_in_the_last_moment_is_refused_and_its_owner_untouched(
    system: QubesSystem, qubesd: Qubesd, tmp_path: Path
) -> None:
    class Quicker:
        def creating(self, name: str) -> None:
            qubesadmin.Qubes().add_new_vm("AppVM", name, "green", TEMPLATE)

        def created(self, name: str) -> None:
            settled.append(name)

    settled: list[str] = []
    with pytest.raises(QubeExists), system.watched_by(Quicker()):
        system.create("mine", "AppVM", "red", template=TEMPLATE, tags=["x"])
    assert domain(qubesd, "mine").properties["label"] == "green"
    assert "x" not in domain(qubesd, "mine").tags
    assert settled == ["mine"]  # whoever clears up must not take it for ours


def test_a_qube_is_announced_from_before_it_exists_until_it_has_its_tags(
    system: QubesSystem, qubesd: Qubesd
) -> None:
    told: list[object] = []

    class Watcher:
        def creating(self, name: str) -> None:
            told.append((name, name in qubesd.system.domains))

        def created(self, name: str) -> None:
            told.append((name, sorted(qubesd.system.domains[name].tags - NEW_TAGS)))

    with system.watched_by(Watcher()), system.watched_by(Watcher()):
        system.create("mine", "AppVM", "red", template=TEMPLATE, tags=["x"])
    system.create("other", "AppVM", "red", template=TEMPLATE, tags=["x"])
    assert told == [("mine", False)] * 2 + [("mine", ["x"])] * 2


def test_a_qube_in_use_is_not_removed_and_the_error_tells_why(system: QubesSystem) -> None:
    with pytest.raises(QubeInUse, match="in use") as caught:
        system.remove(NETVM)
    assert caught.value.qube == NETVM
    assert system.exists(NETVM)


def test_a_running_qube_is_never_removed(system: QubesSystem, qubesd: Qubesd) -> None:
    system.create("mine", "AppVM", "red", template=TEMPLATE)
    system.start("mine")
    with pytest.raises(HostFailed, match="it is running"):
        system.remove("mine")
    assert not qubesd.calls_of("admin.vm.Remove+*")


def test_a_qube_that_is_gone_is_removed_already(system: QubesSystem) -> None:
    system.remove("no")
    system.discard_tag("no", "x")


def test_destroying_tries_again_while_the_qube_is_busy(
    system: QubesSystem, qubesd: Qubesd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qubes, "_PAUSE_S", 0.001)
    create_worker(system)
    system.start(WORKER)
    qubesd.fail("admin.vm.Kill+", "QubesVMError", times=3)
    qubesd.fail("admin.vm.List+", "", times=1, after=5)
    system.destroy(WORKER)
    assert not system.exists(WORKER)


def test_destroying_ends_even_if_the_qube_does_not(
    system: QubesSystem, qubesd: Qubesd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qubes, "_PAUSE_S", 0.001)
    monkeypatch.setattr(qubes, "DESTROY_TIMEOUT_S", 0.05)
    create_worker(system)
    system.start(WORKER)
    qubesd.fail("admin.vm.Kill+", "QubesVMError", "it clings to life", times=None)
    with pytest.raises(HostFailed, match="killing the qube failed: it clings to life"):
        system.destroy(WORKER)


# --- Setting -------------------------------------------------------------------------------------


def test_properties_are_set_as_text_and_set_back(system: QubesSystem, qubesd: Qubesd) -> None:
    system.set_property(NETVM, "memory", "700")
    system.set_property(DISPOSABLES, "netvm", "")
    assert domain(qubesd, NETVM).properties["memory"] == 700
    assert domain(qubesd, DISPOSABLES).properties["netvm"] is None
    system.set_property(DISPOSABLES, "netvm", None)
    assert "netvm" not in domain(qubesd, DISPOSABLES).properties


@pytest.mark.parametrize(
    "key",
    [
        "name",
        "klass",
        "tags",
        "features",
        "volumes",
        "app",
        "firewall",
        "_volumes",
        "start",
        "no_such",
        "x\n",
    ],
)
def test_what_is_no_property_that_can_be_set_is_refused(
    system: QubesSystem, qubesd: Qubesd, tmp_path: Path, key: str
) -> None:
    before = state_of(tmp_path, qubesd)
    with pytest.raises(HostFailed, match="no such property"):
        system.set_property(NETVM, key, "other")
    assert state_of(tmp_path, qubesd) == before
    assert system.saved_volumes(NETVM) == {"private"}


def test_a_tag_that_qubesd_keeps_for_itself_is_as_good_as_set_if_it_is_there(
    system: QubesSystem, qubesd: Qubesd
) -> None:
    qubesd.fail("admin.vm.tag.Set+created-by-*", "", times=2)
    system.add_tag(NETVM, "created-by-dom0")
    with pytest.raises(HostFailed, match="setting tag created-by-work failed"):
        system.add_tag(NETVM, "created-by-work")


def test_a_tag_that_is_not_there_is_discarded_already(system: QubesSystem) -> None:
    system.discard_tag(NETVM, "never-had-it")


def test_tags_are_found(system: QubesSystem) -> None:
    system.add_tag(NETVM, "mine")
    assert system.tagged("mine") == [NETVM]
    system.discard_tag(NETVM, "mine")
    assert system.tagged("mine") == []


def test_firewall_rules_are_set_word_for_word(system: QubesSystem, qubesd: Qubesd) -> None:
    system.set_firewall(NETVM, ["action=accept dst4=0.0.0.0/0 proto=tcp dstports=443-443", "action=drop"])
    payload = qubesd.calls_of("admin.vm.firewall.Set+", NETVM)[0].payload
    assert payload == b"action=accept dst4=0.0.0.0/0 proto=tcp dstports=443-443\naction=drop\n"


def test_a_device_is_assigned_for_all_starts(system: QubesSystem, qubesd: Qubesd) -> None:
    device = DeviceInfo(bus="block", backend="dom0", port="sda1", options={"read_only": "yes"})
    system.assign_device(NETVM, device)
    [(key, (mode, text))] = domain(qubesd, NETVM).devices.items()
    assert (key[:3], mode) == (("block", "dom0", "sda1"), "auto-attach")
    assert "read-only" in text or "read_only" in text
    one = device.model_copy(update={"identity": "0x1:0x2::p0c0330"})
    system.assign_device(NETVM, one)
    assert {key[3] for key in domain(qubesd, NETVM).devices} == {"*", "0x1:0x2::p0c0330"}
    with pytest.raises(HostFailed, match="no such qube"):
        system.assign_device(NETVM, device.model_copy(update={"backend": "gone"}))


def test_notes_longer_than_qubesd_takes_are_cut_and_that_is_said(system: QubesSystem, qubesd: Qubesd) -> None:
    with pytest.raises(
        HostFailed, match=r"its notes end after 64998 bytes.*the whole text stays in the backup"
    ):
        system.set_notes(NETVM, "\u20ac" * 30_000)
    assert domain(qubesd, NETVM).notes == "\u20ac" * (MAX_REQUEST // 3)


def test_more_firewall_rules_than_qubesd_takes_are_refused_by_their_size(system: QubesSystem) -> None:
    with pytest.raises(HostFailed, match="7000 firewall rules of 91000 bytes, and Qubes takes 65000"):
        system.set_firewall(NETVM, ["action=drop "] * 7000)


def test_notes_and_features(system: QubesSystem, qubesd: Qubesd) -> None:
    system.set_notes(NETVM, "naïve\nnotes")
    system.set_feature(NETVM, "service.x", "")
    assert domain(qubesd, NETVM).notes == "naïve\nnotes"
    assert domain(qubesd, NETVM).features["service.x"] == ""


# --- Data ----------------------------------------------------------------------------------------


def test_a_volume_is_replaced_by_what_comes(system: QubesSystem, qubesd: Qubesd) -> None:
    system.import_volume(NETVM, "private", io.BytesIO(b"x" * 5000), 5000)
    assert qubesd.volume_path(NETVM, "private").read_bytes() == b"x" * 5000


@pytest.mark.parametrize("size", [4999, 5001])
def test_a_volume_of_another_size_is_refused_and_stays(
    system: QubesSystem, qubesd: Qubesd, tmp_path: Path, size: int
) -> None:
    before = state_of(tmp_path, qubesd)
    with pytest.raises(
        HostFailed, match=r"importing the volume failed: Data import failed: .* data"
    ) as caught:
        system.import_volume(NETVM, "private", io.BytesIO(b"x" * 5000), size)
    assert (caught.value.qube, caught.value.volume) == (NETVM, "private")
    assert not isinstance(caught.value, NoSpace)
    assert state_of(tmp_path, qubesd) == before


def test_a_pool_that_is_full_is_told_as_that(system: QubesSystem, qubesd: Qubesd) -> None:
    qubesd.limit_pool("vm-pool", 1 << 20)
    with pytest.raises(NoSpace, match=r"error copying data \(1 MiB are free .* may need 2"):
        system.import_volume(NETVM, "private", io.BytesIO(b"x" * (2 << 20)), 2 << 20)


@pytest.mark.parametrize(
    "message",
    [
        "No space left on device",
        "Insufficient free space: 5 extents needed",
        "Not enough free disk space",
        f"CompletedProcess(args=['cp', '{'x' * 400}'], stderr=b'cp: No space left on device')",
    ],
)
def test_what_qubesd_says_of_a_full_disk_is_understood(
    system: QubesSystem, qubesd: Qubesd, message: str
) -> None:
    qubesd.fail("admin.vm.Create.*", "StoragePoolException", message)
    with pytest.raises(NoSpace):
        system.create("mine", "AppVM", "red", template=TEMPLATE)


def test_a_long_error_of_qubesd_is_shown_with_its_end() -> None:
    shown = said_by(RuntimeError(f"CompletedProcess(args=['cp', '{'x' * 4000}']: Read-only file system"))
    assert shown.startswith("CompletedProcess(args=") and shown.endswith("Read-only file system")
    assert len(shown) <= 303


# --- Errors --------------------------------------------------------------------------------------


def test_an_error_says_what_was_being_done_with_what_and_why(system: QubesSystem, qubesd: Qubesd) -> None:
    qubesd.fail("admin.vm.Start+", "QubesMemoryError", "Not enough memory\nto start\x1b[2J.")
    with pytest.raises(RestoreError) as caught:
        system.start(NETVM)
    assert caught.value.reason == "starting the qube failed: Not enough memory to start\ufffd[2J"
    assert caught.value.qube == NETVM


def test_an_error_that_qubesd_does_not_explain_points_to_its_journal(
    system: QubesSystem, qubesd: Qubesd
) -> None:
    qubesd.fail("admin.vm.Start+", "")
    with pytest.raises(HostFailed, match="empty response") as caught:
        system.start(NETVM)
    assert "journalctl" in caught.value.advice


# --- Calls ---------------------------------------------------------------------------------------


def client(directory: Path, script: str) -> None:
    program = directory / "qrexec-client"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_a_service_is_called_with_the_callers_descriptors(
    system: QubesSystem, qubesd: Qubesd, tmp_path: Path
) -> None:
    client(tmp_path, 'echo "$@"; cat; echo lost >&2; exit 3')
    system.start(NETVM)
    ours, theirs = os.pipe()
    question, answer = os.pipe()
    os.write(answer, b"asked")
    os.close(answer)
    process = system.run_service(NETVM, "restore.Session+ready", stdin=question, stdout=theirs)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process.poll() == 3
    process.kill()
    os.close(theirs)
    os.close(question)
    with open(ours, "rb") as told:
        assert told.read() == f"-d {NETVM} DEFAULT:QUBESRPC restore.Session+ready dom0\nasked".encode()


def test_a_qube_that_does_not_run_is_not_started_by_a_call(system: QubesSystem) -> None:
    with pytest.raises(HostFailed, match=r"calling restore.Session failed: .*not running"):
        system.run_service(NETVM, "restore.Session", stdin=0, stdout=1)


def test_a_call_has_a_session_of_its_own(system: QubesSystem, qubesd: Qubesd, tmp_path: Path) -> None:
    client(tmp_path, "exec sleep 600")
    system.start(NETVM)
    with open(os.devnull, "r+b") as nowhere:
        process = system.run_service(NETVM, "x", stdin=nowhere.fileno(), stdout=nowhere.fileno())
    assert process.pid > 1
    assert os.getsid(process.pid) == process.pid  # Ctrl-C in our terminal does not reach it
    assert process.poll() is None
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process.poll() == -9


def test_a_program_for_calls_that_is_missing_is_an_error(system: QubesSystem) -> None:
    system.start(NETVM)
    with pytest.raises(HostFailed, match="calling x failed"):
        system.run_service(NETVM, "x", stdin=0, stdout=1)
