"""The target's disk is full: what does not fit is rolled back, what fits is kept, and the room is free again.

Strategy: a small tmpfs. Who may not mount one gets a mount namespace of their own, held by a process that
sleeps; the command is run in there with nsenter, and the files are seen through /proc.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.backup_writer import BackupWriter, sample_qube
from tests.support.compare import sha256

from .support import Outcome, passphrase_file, running

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

SIZE = 3 << 20  #: bytes that the disk holds


@dataclass
class Disk:
    """A full file system in waiting. `path` is its name for the command, `seen` for the test."""

    path: Path
    seen: Path
    prefix: list[str]

    def used(self) -> int:
        """Bytes that are taken."""
        facts = os.statvfs(self.seen)
        return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(path)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield Disk(path, path, [])
        finally:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
        return
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("a small file system can be mounted neither as root nor with unshare and nsenter")
    script = '"$@" && echo mounted && exec sleep 600'
    holder = subprocess.Popen(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *mount],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline() != b"mounted\n":
            reason = holder.stderr.read().decode().strip()
            pytest.skip(f"neither root nor user namespaces can mount here: {reason}")
        prefix = ["nsenter", "-t", str(holder.pid), "--user", "--mount", "--preserve-credentials"]
        yield Disk(path, Path(f"/proc/{holder.pid}/root{path}"), prefix)
    finally:
        holder.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            holder.communicate(timeout=30)


def extract(disk: Disk, backup: Path, tmp_path: Path, *options: str) -> Outcome:
    arguments = ("extract", backup, "--to", disk.path / "restored", "-p", passphrase_file(tmp_path))
    with running(*arguments, *options, prefix=disk.prefix, report=tmp_path / "report.json") as run:
        return run.outcome()


def test_a_qube_that_does_not_fit_is_rolled_back_and_the_others_are_kept(disk: Disk, tmp_path: Path) -> None:
    backup = tmp_path / "sample.qbackup"
    writer = BackupWriter(
        [
            sample_qube("first", 1 << 20, 0.6, seed=1),
            sample_qube("large", 8 << 20, 0.6, seed=2),
            sample_qube("last", 1 << 20, 0.6, seed=3),
        ],
        chunk_size=1 << 18,
        log_n=10,
    )
    writer.write(backup)
    outcome = extract(disk, backup, tmp_path)
    assert outcome.status == 3, outcome.errors
    assert "first: restored\n" in outcome.errors and "last: restored\n" in outcome.errors
    assert "large: failed: " in outcome.errors and "iB are left on" in outcome.errors
    assert "Free some space" in outcome.errors
    # Said before anything was written, too.
    assert "MiB are free" in outcome.errors
    restored = disk.seen / "restored"
    assert {path.name for path in restored.iterdir()} == {"first", "last"}
    for volume, facts in _expected(writer).items():
        if not volume.startswith("large"):
            assert sha256(restored / f"{volume}.img") == facts
    used = disk.used()
    shutil.rmtree(restored / "first")
    shutil.rmtree(restored / "last")
    assert used - disk.used() > (1 << 20)
    assert disk.used() < 64 << 10, "what was rolled back still takes room"


def test_when_there_is_room_again_only_what_did_not_fit_is_done(disk: Disk, tmp_path: Path) -> None:
    backup = tmp_path / "sample.qbackup"
    writer = BackupWriter(
        [sample_qube(name, 1 << 20, 0.6, seed=seed) for seed, name in enumerate(("first", "second"))],
        chunk_size=1 << 18,
        log_n=10,
    )
    writer.write(backup)
    ballast = disk.seen / "ballast"
    ballast.write_bytes(bytes(1900 << 10))
    outcome = extract(disk, backup, tmp_path)
    assert outcome.status == 3, outcome.errors
    assert "first: restored\n" in outcome.errors and "second: failed: " in outcome.errors
    ballast.unlink()
    outcome = extract(disk, backup, tmp_path, "--skip-existing")
    assert outcome.status == 0, outcome.errors
    assert "first: already restored\n" in outcome.errors and "second: restored\n" in outcome.errors
    chunks = sum(member.name.startswith("vm11/") for member in writer.members())
    assert outcome.report is not None and outcome.report["derivations"] == 2 + chunks
    for volume, facts in _expected(writer).items():
        assert sha256(disk.seen / "restored" / f"{volume}.img") == facts


def test_nothing_fits(disk: Disk, tmp_path: Path) -> None:
    backup = tmp_path / "sample.qbackup"
    BackupWriter([sample_qube("large", 8 << 20, 0.6, seed=2)], chunk_size=1 << 18, log_n=10).write(backup)
    outcome = extract(disk, backup, tmp_path, "-q")
    assert outcome.status == 1
    assert "iB are left on" in outcome.errors
    assert not (disk.seen / "restored").exists()
    assert disk.used() < 16 << 10


def _expected(writer: BackupWriter) -> dict[str, str]:
    volumes = writer.expectation()["volumes"]
    assert isinstance(volumes, dict)
    return {name: facts["sha256"] for name, facts in volumes.items()}
