"""A sample of several chunks a volume, small enough for a test."""

import json
from pathlib import Path

from tests.support.backup_writer import BackupWriter, sample_qube

from .samples import MIB, Sample, existing


def write_small(directory: Path, log_n: int = 4) -> Sample:
    """Three qubes, one of them with two volumes; chunks of 300,000 bytes."""
    backup = directory / "small.qbackup"
    qubes = [
        sample_qube("work", 3 * MIB, 0.5, seed=1),
        sample_qube("debian", 1 * MIB, 0.4, "TemplateVM", seed=2),
        sample_qube("tiny", 1 * MIB, 0.1, seed=3),
    ]
    writer = BackupWriter(qubes, log_n=log_n, chunk_size=300_000)
    writer.write(backup)
    backup.with_name(backup.name + ".json").write_text(json.dumps(writer.expectation()))
    return existing(backup)
