"""Whole restores on an emulated Qubes, with the real command, policy, worker and storage services."""

import json
from itertools import cycle
from pathlib import Path

import pytest

from tests.emulation.dom0 import LOCATIONS, STORAGE, Dom0, LocationKind
from tests.support.backup_writer import PASSPHRASE, BackupWriter, ImagePlan, QubePlan
from tests.support.fixtures import expectation, shared_fixture

#: What a place does to the stream does not depend on what is in it; but format 3 is read twice.
RECORDED: list[tuple[str, LocationKind]] = [
    *zip(("bzip2", "gzip", "none", "pigz", "sparse-map", "xz", "zstd"), cycle(LOCATIONS)),
    *(("format3", kind) for kind in LOCATIONS),
]
IMAGE = ImagePlan(3 << 20, ((4096, b"data" * 5000), ((2 << 20) + 512, b"more" * 100)))
#: What the qubes of the recorded backups were based on is not on the emulated system.
ANYWAY = "--ignore-missing"


def write(path: Path, *qubes: QubePlan) -> Path:
    BackupWriter(list(qubes), log_n=4, chunk_size=1 << 20).write(path)
    return path


def plan(name: str, klass: str = "AppVM", **fields: object) -> QubePlan:
    volumes = {"AppVM": ("private",), "DispVM": ()}.get(klass, ("root", "private"))
    return QubePlan(name, klass, volumes=dict.fromkeys(volumes, IMAGE), **fields)  # type: ignore[arg-type] # fields of QubePlan


@pytest.mark.parametrize(("name", "kind"), RECORDED)
def test_a_recorded_backup_is_restored_bit_for_bit(dom0: Dom0, name: str, kind: LocationKind) -> None:
    backup = shared_fixture(f"{name}.qbackup")
    expected = expectation(backup)
    dom0.restore([*dom0.location(backup, kind), ANYWAY], expected.passphrase)
    assert expected.volumes
    for volume, facts in expected.volumes.items():
        assert dom0.sha256(volume) == (facts.size, facts.sha256)


def test_a_root_that_nothing_promises_is_restored_from_a_storage_qube(dom0: Dom0) -> None:
    backup = shared_fixture("hvm-root.qbackup")
    expected = expectation(backup)
    dom0.restore([*dom0.location(backup, "path"), ANYWAY], expected.passphrase)
    for volume in ("win/root", "win/private"):
        facts = expected.volumes[volume]
        assert dom0.sha256(volume) == (facts.size, facts.sha256)


@pytest.mark.parametrize(
    ("kind", "restored", "words"),
    [
        ("dom0", {"first", "behind"}, "the archive is damaged from byte 675840 to 798720"),
        ("path", {"first"}, "stops reading at damage. Read the file itself, in dom0 or on another machine"),
    ],
)
def test_a_damaged_header_costs_what_it_hit_and_a_service_that_stops_there_is_named(
    dom0: Dom0, kind: LocationKind, restored: set[str], words: str
) -> None:
    backup = shared_fixture("damaged-header.qbackup")
    before = set(dom0.qubes.qubesd.names())
    done = dom0.restore([*dom0.location(backup, kind), ANYWAY], expectation(backup).passphrase, 3)
    assert set(dom0.qubes.qubesd.names()) - before == restored
    assert words in done.stderr and "--compression-filter" not in done.stderr


@pytest.mark.parametrize("kind", LOCATIONS)
def test_only_the_selected_qubes_are_restored(dom0: Dom0, tmp_path: Path, kind: LocationKind) -> None:
    backup = write(tmp_path / "backup", *(plan(name, template=None) for name in ("a", "b", "c", "d")))
    before = set(dom0.qubes.qubesd.names())
    dom0.restore([*dom0.location(backup, kind), ANYWAY, "b", "c", "-x", "c"], PASSPHRASE)
    assert set(dom0.qubes.qubesd.names()) - before == {"b"}
    assert dom0.sha256("b/private") == (IMAGE.size, IMAGE.sha256())


@pytest.mark.parametrize("kind", LOCATIONS)
def test_verifying_creates_nothing_and_leaves_nothing(dom0: Dom0, tmp_path: Path, kind: LocationKind) -> None:
    words = dom0.location(write(tmp_path / "backup", plan("work")), kind)
    before = dom0.qubes.snapshot()
    done = dom0.restore([*words, "--verify-only"], PASSPHRASE)
    assert "1 of 1 qube verified." in done.stderr
    dom0.check_as_before(before)


def test_a_qube_comes_back_with_its_settings_and_without_what_is_not_allowed(
    dom0: Dom0, tmp_path: Path
) -> None:
    qube = plan(
        "work",
        label="blue",
        template="debian-12-xfce",
        netvm="",
        properties={"memory": "800", "vcpus": "2", "autostart": "True", "kernelopts": "init=/bin/sh"},
        features={"menu-items": "firefox.desktop", "tag-created-vm-with": "evil"},
        tags=["guivm-dom0", "backup-restore-mgmt"],
        notes="mine",
    )
    done = dom0.restore(dom0.location(write(tmp_path / "backup", qube), "path"), PASSPHRASE)
    vm = dom0.qubes.app().domains["work"]
    assert (vm.klass, str(vm.label), str(vm.template)) == ("AppVM", "blue", "debian-12-xfce")
    assert vm.netvm is None
    assert (vm.memory, vm.vcpus, vm.autostart) == (800, 2, False)
    assert "init=/bin/sh" not in str(vm.kernelopts)
    assert vm.features["menu-items"] == "firefox.desktop"
    assert "tag-created-vm-with" not in vm.features
    assert {tag for tag in vm.tags if not tag.startswith(("created-by", "guivm", "audiovm"))} == {
        "restored-from-backup-20260101T010203-1234"
    }
    assert vm.get_notes() == "mine"
    for left in ("autostart", "kernelopts", "tag-created-vm-with"):
        assert left in done.stdout + done.stderr


def test_templates_and_netvms_of_the_same_backup_are_used_under_their_new_names(
    dom0: Dom0, tmp_path: Path
) -> None:
    dom0.qubes.add("TemplateVM", "mine", label="black", netvm=None)
    dom0.qubes.add("AppVM", "net", "fedora-41-xfce", provides_network=True, netvm=None)
    backup = write(
        tmp_path / "backup",
        plan("app", template="mine", netvm="net"),
        plan("dvm", template="mine", netvm="net", properties={"template_for_dispvms": "True"}),
        plan("named", "DispVM", template="dvm", netvm="net"),
        plan("net", template="mine", netvm="", properties={"provides_network": "True"}),
        plan("mine", "TemplateVM"),
        plan("user", template="mine", netvm="net", properties={"default_dispvm": "dvm"}),
    )
    done = dom0.restore([*dom0.location(backup, "path"), "--rename-conflicting"], PASSPHRASE)
    assert "mine-1" in done.stdout
    domains = dom0.qubes.app().domains
    assert str(domains["app"].template) == "mine-1" and str(domains["app"].netvm) == "net-1"
    assert str(domains["named"].template) == "dvm"
    assert str(domains["net-1"].template) == "mine-1" and domains["net-1"].provides_network
    assert str(domains["user"].default_dispvm) == "dvm"
    assert dom0.sha256("mine-1/root") == (IMAGE.size, IMAGE.sha256())
    assert not [name for name in dom0.qubes.qubesd.names() if _unfinished(dom0, name)]


def test_a_second_restore_of_a_backup_uses_what_the_first_has_renamed(dom0: Dom0, tmp_path: Path) -> None:
    dom0.qubes.add("TemplateVM", "mine", label="black", netvm=None)
    backup = write(
        tmp_path / "backup",
        plan("mine", "TemplateVM", netvm="sys-net"),
        plan("Work", template="mine", netvm=""),
        plan("work", template="mine", netvm="", properties={"default_dispvm": "default-mgmt-dvm"}),
    )
    words = dom0.location(backup, "path")
    done = dom0.restore([*words, "--rename-conflicting", "mine"], PASSPHRASE)
    assert "a template gets no netvm" in done.stdout
    done = dom0.restore([*words, "work", "Work"], PASSPHRASE)
    assert "template change to 'mine-1', which was restored from this backup before" in done.stdout
    assert "it will have no default_dispvm: 'default-mgmt-dvm' is of this system" in done.stdout
    domains = dom0.qubes.app().domains
    assert {str(domains[name].template) for name in ("work", "Work")} == {"mine-1"}
    assert domains["work"].default_dispvm is None
    assert str(domains["Work"].default_dispvm) == "default-dvm"
    assert domains["mine-1"].netvm is None


@pytest.mark.parametrize(
    ("words", "status", "restored"),
    [
        ([], 1, set()),
        (["--skip-conflicting"], 0, {"new"}),
        (["--rename-conflicting"], 0, {"new", "personal-1"}),
    ],
)
def test_a_name_that_is_taken_is_settled_as_the_person_says(
    dom0: Dom0, tmp_path: Path, words: list[str], status: int, restored: set[str]
) -> None:
    backup = write(tmp_path / "backup", plan("personal", template=None), plan("new", template=None))
    before = dom0.qubes.snapshot()
    done = dom0.restore([*dom0.location(backup, "path"), ANYWAY, *words], PASSPHRASE, status)
    qubes = dom0.qubes.snapshot()["qubes"]
    assert isinstance(qubes, dict) and isinstance(before["qubes"], dict)
    assert set(qubes) - set(before["qubes"]) == restored
    assert qubes["personal"] == before["qubes"]["personal"]
    if status:
        assert "--rename-conflicting" in done.stdout + done.stderr


def test_what_a_person_chooses_is_what_the_qubes_get(dom0: Dom0, tmp_path: Path) -> None:
    config = dom0.folder / "config.yaml"
    config.write_text(config.read_text() + "restore: {choosable: ['property:autostart']}\n")
    backup = write(
        tmp_path / "backup",
        plan("personal", template="gone", netvm="gone", properties={"autostart": "True", "debug": "True"}),
        plan("net", template="gone", properties={"provides_network": "True"}),
        plan("other", template="debian-12-xfce", netvm="net"),
    )
    chosen = "--name personal=mine --name net=net-old --template debian-12-xfce --netvm personal=none"
    words = [*chosen.split(), "--pool", "varlibqubes", "--allow", "property:autostart"]
    done = dom0.restore([*dom0.location(backup, "path"), *words], PASSPHRASE)
    mine, other = (dom0.qubes.app().domains[name] for name in ("mine", "other"))
    assert (str(mine.template), mine.netvm, str(other.netvm)) == ("debian-12-xfce", None, "net-old")
    assert (mine.autostart, mine.debug, mine.volumes["private"].pool) == (True, False, "varlibqubes")
    assert "property debug: mine" in done.stderr and "property autostart" not in done.stderr
    done = dom0.restore([*dom0.location(backup, "path"), "--allow", "property:debug"], PASSPHRASE, 2)
    assert "does not permit letting property:debug come back" in done.stderr


def test_dom0s_home_comes_unopened_and_only_when_it_is_asked_for(dom0: Dom0, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    BackupWriter([plan("work", template=None)], log_n=4, dom0_home=True).write(backup)
    home = dom0.folder / "home"
    dom0.restore([*dom0.location(backup, "path"), ANYWAY], PASSPHRASE)
    assert list(home.iterdir()) == []
    done = dom0.restore([*dom0.location(backup, "dom0"), "--ignore-username-mismatch", "dom0"], PASSPHRASE)
    (folder,) = home.iterdir()
    assert folder.name.startswith("home-restore-")
    (archive,) = folder.iterdir()
    assert archive.read_bytes().startswith(b"dom0-home/user/")
    assert folder.name in done.stdout + done.stderr


def test_the_worker_calls_nothing_but_the_backup_and_nobody_calls_it(dom0: Dom0, tmp_path: Path) -> None:
    dom0.restore(
        dom0.location(write(tmp_path / "backup", plan("work", template="debian-12-xfce")), "path"), PASSPHRASE
    )
    calls = dom0.qubes.switchboard.calls
    of_worker = [call for call in calls if call.source.startswith("disp-restore-")]
    assert {(call.target, call.service, call.decision) for call in of_worker} == {
        (STORAGE, "qubes.RestoreById", "allow")
    }
    to_worker = [call for call in calls if call.target.startswith("disp-restore-")]
    assert {call.source for call in to_worker} == {"dom0"}
    assert not [call for call in calls if call.target == "dom0"]


def test_a_report_of_every_restore_is_kept(dom0: Dom0, tmp_path: Path) -> None:
    dom0.restore(
        [*dom0.location(write(tmp_path / "backup", plan("work")), "dom0"), "--verify-only"], PASSPHRASE
    )
    (report,) = (dom0.folder / "reports").iterdir()
    assert json.loads(report.read_text())["mode"] == "verify"


def _unfinished(dom0: Dom0, name: str) -> bool:
    return bool(dom0.qubes.qubesd.tags(name) & {"backup-restore-in-progress", "restore-svc-unfinished"})
