"""Whole restores: recorded backups come out bit by bit, broken ones end in an error and leave nothing."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qubes_restore_svc.archive.filters import FILTERS
from qubes_restore_svc.errors import ExitStatus
from qubes_restore_svc.local.sandbox_link import LocalLink
from qubes_restore_svc.wire.report import Report
from qubes_restore_svc.wire.restore_call import Choice

from .support.backup_writer import BackupWriter, ImagePlan, QubePlan, RawMember, Replacements, join_members
from .support.compare import differences, fsverity, sha256
from .support.damage import DAMAGES, Damage, cut_off, flip_bit, sample_backup
from .support.fixtures import expectation, shared_fixture
from .support.plans import sample_qube
from .support.qubes_xml_writer import qubes_xml
from .support.restoring import Recorder, kinds, restore

RECORDED = ["bzip2", "gzip", "none", "pigz", "sparse-map", "xz", "zstd"]
RECORDED_3 = ["format3", "format3-sha1-plain"]


def written(writer: BackupWriter, directory: Path) -> Path:
    """The backup of `writer` as a file, its JSON beside it."""
    backup = directory / "sample.qbackup"
    writer.write(backup)
    backup.with_suffix(".json").write_text(json.dumps(writer.expectation()))
    return backup


def listing(directory: Path) -> list[str]:
    """Everything below a directory, hidden or not."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


# --- What must come out -----------------------------------------------------------------------------


def check_hashes(report: Report, backup: Path) -> None:
    """The report has the recorded size and hash of every volume, and no other volume."""
    found = {
        f"{qube.name}/{volume.name}": (volume.size, volume.sha256)
        for qube in report.qubes
        for volume in qube.volumes
        if volume.name != "home"
    }
    expected = expectation(backup).volumes
    assert report.status == ExitStatus.COMPLETE, report
    assert found == {place: (volume.size, volume.sha256) for place, volume in expected.items()}


@pytest.mark.parametrize("name", ["real-cost", *RECORDED, *RECORDED_3])
def test_a_recorded_backup_is_restored_bit_by_bit_through_the_sandbox(name: str, tmp_path: Path) -> None:
    backup = shared_fixture(f"{name}.qbackup")
    # The derivations of `real-cost` take 2 GiB and a second each.
    report = restore(backup, tmp_path / "out", make_link=LocalLink, memory=3 << 30, digest="sha256")
    check_hashes(report, backup)
    assert not differences(backup.with_name(backup.name + ".json"), tmp_path / "out")
    if name not in RECORDED_3:
        assert report.backup_id == expectation(backup).backup_id


@pytest.mark.parametrize("name", RECORDED + RECORDED_3)
def test_a_recorded_backup_verifies_with_the_recorded_hashes(name: str) -> None:
    backup = shared_fixture(f"{name}.qbackup")
    check_hashes(restore(backup, None, digest="sha256"), backup)


@pytest.mark.parametrize("sparse", ["gnu", "pax", "none"])
@pytest.mark.parametrize("compression", FILTERS)
def test_every_filter_and_sparse_format_is_restored_bit_by_bit(
    compression: str, sparse: str, tmp_path: Path
) -> None:
    backup = written(sample_backup(compression, sparse), tmp_path)
    report = restore(backup, tmp_path / "out")
    assert report.status == ExitStatus.COMPLETE, report
    assert not differences(backup.with_suffix(".json"), tmp_path / "out")


@pytest.mark.parametrize("sparse", ["gnu", "pax"])
def test_holes_of_tebibytes_cost_nothing_to_verify_nor_to_extract(sparse: str, tmp_path: Path) -> None:
    size = 4 << 40
    image = ImagePlan(size, [(512, b"x" * 512), (1 << 40, bytes(range(256)) * 64), (size - 512, b"y" * 512)])
    backup = tmp_path / "sample.qbackup"
    BackupWriter([QubePlan("work", volumes={"private": image})], sparse=sparse).write(backup)
    began = time.process_time()
    for target in (None, tmp_path / "out"):
        (work,) = restore(backup, target).qubes
        assert [(one.size, one.fsverity) for one in work.volumes] == [(image.size, image.fsverity())]
    restored = tmp_path / "out/work/private.img"
    assert fsverity(restored) == image.fsverity()
    assert restored.stat().st_blocks * 512 < 1 << 20
    assert time.process_time() - began < 10  # SHA-256 of 4 TiB takes half an hour


def test_settings_arrive_with_the_qube(tmp_path: Path) -> None:
    restore(written(sample_backup(), tmp_path), tmp_path / "out")
    settings = json.loads((tmp_path / "out/work/qube.json").read_text())
    assert settings["notes"] == "Keep the spare key in the blue box.\n"
    assert settings["appmenus"] == ["firefox.desktop"]
    assert settings["firewall"] == []
    assert "project-a" in settings["tags"]


def test_settings_that_are_not_understood_are_lost_and_the_firewall_stays_shut(tmp_path: Path) -> None:
    firewall = (
        '<firewall version="2"><rules><rule><properties>'
        '<property name="action">perhaps</property></properties></rule></rules></firewall>'
    )
    qube = replace(
        sample_qube("work", 1 << 16, 0.5), firewall=firewall, appmenus=["../../bin/sh"], notes="mine\n"
    )
    observer = Recorder()
    report = restore(written(BackupWriter([qube]), tmp_path), tmp_path / "out", observer=observer)
    assert report.status == ExitStatus.COMPLETE
    settings = json.loads((tmp_path / "out/work/qube.json").read_text())
    assert (settings["firewall"], settings["appmenus"], settings["notes"]) == ([], None, "mine\n")
    (warnings,) = [qube.warnings for qube in report.qubes]
    assert any("firewall" in line and "lets nothing through" in line for line in warnings)
    assert any("whitelisted-appmenus.list" in line for line in warnings)
    assert len(observer.lines) == 2


def test_dom0s_home_is_extracted_only_when_it_is_named_and_stays_closed(tmp_path: Path) -> None:
    backup = written(BackupWriter([sample_qube("work", 1 << 16, 0.5)], dom0_home=True), tmp_path)
    assert restore(backup, tmp_path / "all").status == ExitStatus.COMPLETE
    assert not (tmp_path / "all/dom0").exists()
    report = restore(backup, tmp_path / "named", choice=Choice(names=("dom0",)))
    assert report.status == ExitStatus.COMPLETE
    home = tmp_path / "named/dom0/home.tar"
    (volume,) = report.qubes[[qube.name for qube in report.qubes].index("dom0")].volumes
    assert (home.stat().st_size, fsverity(home)) == (volume.size, volume.fsverity)


@pytest.mark.parametrize("behind", ["vm10/private.img.000.enc", "vm10/private.img.003.enc", "the last one"])
def test_a_member_that_is_no_chunk_is_named_and_costs_nothing(behind: str, tmp_path: Path) -> None:
    members = list(sample_backup().members())
    places = [place for place, member in enumerate(members) if member.name == behind] or [len(members) - 1]
    members.insert(places[0] + 1, RawMember("backup-header", b"again"))
    backup = tmp_path / "backup"
    backup.write_bytes(join_members(members))
    report = restore(backup, tmp_path / "out")
    assert report.status == ExitStatus.COMPLETE
    assert any("'backup-header'" in line for line in report.warnings)


def test_a_selected_qube_is_restored_and_the_others_are_not(tmp_path: Path) -> None:
    backup = written(sample_backup(), tmp_path)
    report = restore(backup, tmp_path / "out", choice=Choice(names=("vault",)))
    assert report.status == ExitStatus.COMPLETE
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["vault"]


def test_a_second_restore_refuses_what_is_there_and_changes_nothing(tmp_path: Path) -> None:
    backup = written(sample_backup(), tmp_path)
    restore(backup, tmp_path / "out", choice=Choice(names=("vault",)))
    before = sha256(tmp_path / "out/vault/private.img")
    (tmp_path / "out/vault/private.img").touch()
    report = restore(backup, tmp_path / "out")
    assert report.status == ExitStatus.PARTLY
    assert "qube-exists" in kinds(report)
    assert sha256(tmp_path / "out/vault/private.img") == before


# --- What must not --------------------------------------------------------------------------------


def check_outcome(damage: Damage, backup: Path, target: Path | None) -> None:
    """Restore or verify a broken backup, and hold the result against what the damage says."""
    report = restore(backup, target, passphrase=damage.passphrase or "correct horse battery staple")
    if damage.scope == "nothing":
        assert report.warnings
    else:
        assert kinds(report) & damage.kinds, (kinds(report), report)
    succeeded = {qube.name for qube in report.qubes if qube.succeeded}
    if damage.scope == "backup":
        assert report.status == ExitStatus.NOTHING
        assert not succeeded
    else:
        assert report.status == (ExitStatus.COMPLETE if damage.scope == "nothing" else ExitStatus.PARTLY)
        victims = {sample_backup().qubes[victim].name for victim in damage.victims}
        victims = set() if damage.scope == "nothing" else victims
        assert succeeded == {qube.name for qube in sample_backup().qubes} - victims
    for qube in report.qubes:
        assert qube.succeeded or qube.error or any(volume.error for volume in qube.volumes)
    if target is not None:
        found = {path.name for path in target.iterdir()} if target.exists() else set()
        assert found == succeeded
        for name in succeeded:
            plan = next(qube for qube in sample_backup().qubes if qube.name == name)
            for volume, image in plan.volumes.items():
                assert sha256(target / name / f"{volume}.img") == image.sha256()


@pytest.fixture(scope="module", params=sorted(DAMAGES))
def broken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Damage, Path]:
    """Every damage, and a backup that has it."""
    damage = DAMAGES[request.param]
    backup = tmp_path_factory.mktemp("broken") / "broken.qbackup"
    backup.write_bytes(damage.apply(sample_backup()))
    return damage, backup


def test_a_broken_backup_restores_only_what_is_whole(broken: tuple[Damage, Path], tmp_path: Path) -> None:
    check_outcome(*broken, tmp_path / "out")


def test_a_broken_backup_does_not_verify(broken: tuple[Damage, Path]) -> None:
    check_outcome(*broken, None)


def test_a_qube_does_not_come_back_with_the_volumes_of_another(tmp_path: Path) -> None:
    # Every chunk of `vault` is authentic; only qubes.xml says that they are those of `work`.
    writer = sample_backup()
    work, vault, *others = writer.qubes
    lie = qubes_xml([replace(work, path="vm11/"), vault, *others])
    backup = written(replace(writer, replacements=Replacements(qubes_xml=lie)), tmp_path)
    report = restore(backup, tmp_path / "out")
    assert report.status == ExitStatus.PARTLY
    assert {path.name for path in (tmp_path / "out").iterdir()} == {qube.name for qube in others}
    reasons = {qube.name: qube.error.reason for qube in report.qubes if qube.error is not None}
    assert "'vault'" in reasons["work"] and "'work'" in reasons["vault"]


@pytest.fixture(scope="module")
def whole() -> bytes:
    """A backup of two small qubes."""
    return BackupWriter(
        [sample_qube("work", 1 << 15, 0.5), sample_qube("vault", 1 << 15, 0.5, seed=2)],
        chunk_size=1 << 13,
    ).to_bytes()


def survivors(
    archive: bytes, tmp_path: Path, check: Callable[[int, set[str]], None] | None = None
) -> tuple[int, set[str]]:
    """Restore an archive; the status, and the names of the qubes that came, each compared bit by bit."""
    backup = tmp_path / "changed.qbackup"
    backup.write_bytes(archive)
    report = restore(backup, tmp_path / "out")
    plans = {"work": sample_qube("work", 1 << 15, 0.5), "vault": sample_qube("vault", 1 << 15, 0.5, seed=2)}
    found = {path.name for path in (tmp_path / "out").iterdir()} if (tmp_path / "out").exists() else set()
    for name in found:
        assert sha256(tmp_path / "out" / name / "private.img") == plans[name].volumes["private"].sha256()
    assert (report.status == ExitStatus.COMPLETE) == (found == set(plans))
    assert report.status == ExitStatus.COMPLETE or kinds(report)
    return report.status, found


def test_a_backup_cut_off_anywhere_gives_whole_qubes_or_none(whole: bytes, tmp_path: Path) -> None:
    end_of_data = len(whole.rstrip(b"\0"))
    for number, size in enumerate(range(0, len(whole), 1999)):
        directory = tmp_path / str(number)
        directory.mkdir()
        status, _ = survivors(cut_off(whole, size), directory)
        # Past the last chunk there are only zeros that mean nothing.
        assert status != ExitStatus.COMPLETE or size >= end_of_data, size


def test_a_bit_flipped_anywhere_never_changes_what_is_restored(whole: bytes, tmp_path: Path) -> None:
    for number, bit in enumerate(range(3, len(whole) * 8, 16001)):
        directory = tmp_path / str(number)
        directory.mkdir()
        survivors(flip_bit(whole, bit), directory)
