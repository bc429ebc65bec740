"""Which qubes in a directory an earlier restore has finished, and which only look like that."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from qubes_restore_svc.broker.interfaces import RestoredQube
from qubes_restore_svc.local.directory import DirectoryHost
from qubes_restore_svc.wire.report import VolumeReport
from tests.local.sample_qubes import new_qube, settings

BACKUP_ID = "20260101T010203-1234"
VOLUME = VolumeReport(name="private", outcome="ok", size=10, fsverity="f" * 64)


def finish(target: Path, name: str = "work", volumes: tuple[VolumeReport, ...] = (VOLUME,)) -> None:
    host = DirectoryHost(target)
    with host.lock():
        qube = host.begin(new_qube(name))
        qube.create_volume("private", 10).finish(10)
        qube.commit(settings(), None, volumes)


def restored(target: Path, backup_id: str = BACKUP_ID) -> list[str]:
    host = DirectoryHost(target)
    with host.lock():
        return [qube.name for qube in host.restored_from(backup_id)]


def test_a_finished_qube_is_told_with_its_name_in_the_backup_and_its_digests(tmp_path: Path) -> None:
    finish(tmp_path, "work-1")
    host = DirectoryHost(tmp_path)
    with host.lock():
        assert host.restored_from(BACKUP_ID) == (
            RestoredQube("work-1", "work", (VOLUME,), has_firewall=True),
        )


def test_a_qube_of_another_backup_does_not_count(tmp_path: Path) -> None:
    finish(tmp_path)
    assert restored(tmp_path) == ["work"]
    assert restored(tmp_path, "20260101T010203-1235") == []


def test_a_directory_of_another_user_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(tmp_path)
    owner = (tmp_path / "work").stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: owner + 1)
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        """Root's files are another user's here."""
        status = list(real(descriptor))
        status[stat.ST_UID] += 2 if status[stat.ST_UID] == owner else 0
        return os.stat_result(status)

    monkeypatch.setattr("os.fstat", fstat)
    assert restored(tmp_path) == []


def test_a_volume_without_a_digest_proves_nothing(tmp_path: Path) -> None:
    finish(tmp_path, volumes=())
    assert restored(tmp_path) == []


def _rewritten(**fields: object) -> Callable[[Path], object]:
    def change(qube: Path) -> None:
        record = json.loads((qube / "qube.json").read_text())
        (qube / "qube.json").write_text(json.dumps(record | fields))

    return change


def _linked(qube: Path) -> None:
    (qube / "private.img").rename(qube.parent / "elsewhere")
    (qube / "private.img").symlink_to("../elsewhere")


def _record_linked(qube: Path) -> None:
    (qube / "qube.json").rename(qube.parent / "elsewhere")
    (qube / "qube.json").symlink_to("../elsewhere")


def _record_made_a_directory(qube: Path) -> None:
    (qube / "qube.json").unlink()
    (qube / "qube.json").mkdir()


def _renamed(qube: Path) -> None:
    qube.rename(qube.parent / "other")


CHANGES: dict[str, Callable[[Path], object]] = {
    "no image": lambda qube: (qube / "private.img").unlink(),
    "a shorter image": lambda qube: (qube / "private.img").write_bytes(bytes(9)),
    "a longer image": lambda qube: (qube / "private.img").write_bytes(bytes(11)),
    "an image that is a link": _linked,
    "no record": lambda qube: (qube / "qube.json").unlink(),
    "a record that is a link": _record_linked,
    "a record that is a directory": _record_made_a_directory,
    "half a record": lambda qube: (qube / "qube.json").write_bytes((qube / "qube.json").read_bytes()[:400]),
    "an empty record": lambda qube: (qube / "qube.json").write_bytes(b""),
    "a record of a later schema": _rewritten(schema_version=2),
    "a record with a field that is not known": _rewritten(colour="red"),
    "a record that was taken back": _rewritten(complete=False),
    "another name": _renamed,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_not_as_it_was_finished_does_not_count(
    change: Callable[[Path], object], tmp_path: Path
) -> None:
    target = tmp_path / "restored"
    finish(target)
    change(target / "work")
    assert restored(target) == []


def test_what_others_put_there_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("work")
    finish(tmp_path)
    assert restored(tmp_path) == ["work"]


def test_a_qube_that_is_taken_back_counts_no_more_and_keeps_all_else(tmp_path: Path) -> None:
    finish(tmp_path)
    before = json.loads((tmp_path / "work/qube.json").read_text())
    # What a run left that was killed in the same step.
    (tmp_path / "work/.qube.json.new").write_text("half of it")
    host = DirectoryHost(tmp_path)
    with host.lock():
        assert not host.take_back("work", BACKUP_ID, from_before=True)
    assert restored(tmp_path) == []
    assert json.loads((tmp_path / "work/qube.json").read_text()) == before | {"complete": False}
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["private.img", "qube.json"]


def test_a_qube_of_another_backup_is_not_taken_back(tmp_path: Path) -> None:
    finish(tmp_path)
    host = DirectoryHost(tmp_path)
    with host.lock():
        host.take_back("work", "another", from_before=True)
    assert restored(tmp_path) == ["work"]
