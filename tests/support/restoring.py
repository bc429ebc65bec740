"""Whole restores for tests: a backup's bytes in, a report and the directory out."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qubes_restore_svc.broker.client import SessionOptions
from qubes_restore_svc.broker.interfaces import Link
from qubes_restore_svc.broker.job import run_job
from qubes_restore_svc.local.directory import DirectoryHost
from qubes_restore_svc.wire.names import DigestKind
from qubes_restore_svc.wire.report import Observer, QubeReport, Report
from qubes_restore_svc.wire.restore_call import Choice

from .backup_writer import PASSPHRASE
from .thread_link import ThreadLink


@dataclass
class Recorder(Observer):
    """An observer that keeps what it is told."""

    lines: list[str] = field(default_factory=list)
    qubes: list[QubeReport] = field(default_factory=list)

    def log(self, level: str, text: str) -> None:
        """Kept as one line."""
        self.lines.append(f"{level}: {text}")

    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        """Not kept."""

    def qube_finished(self, report: QubeReport) -> None:
        """Kept."""
        self.qubes.append(report)


def restore(
    backup: Path,
    target: Path | None,
    *,
    passphrase: str = PASSPHRASE,
    choice: Choice | None = None,
    make_link: Callable[[int], Link] = ThreadLink,
    memory: int | None = None,
    observer: Recorder | None = None,
    ignore_size_limit: bool = False,
    digest: DigestKind = "fsverity",
) -> Report:
    """Restore `backup` to the directory `target`, or verify it if that is None."""
    options = SessionOptions(passphrase, memory=memory, ignore_size_limit=ignore_size_limit, digest=digest)
    fd = os.open(backup, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return asyncio.run(
            run_job(
                make_link(fd),
                None if target is None else DirectoryHost(target),
                options,
                choice or Choice(),
                observer or Recorder(),
            )
        )
    finally:
        os.close(fd)


def kinds(report: Report) -> set[str]:
    """The kinds of all errors in a report."""
    errors = [report.error]
    for qube in report.qubes:
        errors += [qube.error, *(volume.error for volume in qube.volumes)]
    return {error.kind for error in errors if error is not None}
