"""Machines with places for backups, and `qubes-restore-watch` as a process."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from tests.support.fixtures import REPOSITORY
from tests.system.support import offsets, passphrase_file, small_backup


@dataclass
class Machine:
    """A machine, in a directory: its settings, a directory of backups, its reports in `reports`."""

    name: str
    folder: Path

    def __post_init__(self) -> None:
        for directory in (self.settings, self.backups):
            directory.mkdir(parents=True)
            directory.chmod(0o755)
        passphrase_file(self.folder)
        self.place("nas", f"directory = '{self.backups}'")

    @property
    def settings(self) -> Path:
        return self.folder / "settings"

    @property
    def backups(self) -> Path:
        return self.folder / "backups"

    @property
    def reports(self) -> Path:
        return self.folder / "reports"

    def place(self, name: str, text: str) -> None:
        """The settings of a place."""
        path = self.settings / f"{name}.toml"
        path.write_text(f"passphrase_file = '{self.folder / 'passphrase'}'\n{text}\n")
        path.chmod(0o644)

    def back_up(self, days_ago: float = 0, name: str = "qubes-2026") -> Path:
        """A backup that was finished an hour after it was begun, `days_ago`."""
        begun = datetime.now() - timedelta(days=days_ago, hours=2)
        path = self.backups / name
        replace(small_backup(), backup_id=f"{begun:%Y%m%dT%H%M%S}-1234").write(path)
        ended = begun.timestamp() + 3600
        os.utime(path, (ended, ended))
        return path

    def watch(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the command on this machine."""
        places = ("--configuration", self.settings, "--state", self.reports)
        return watch(*words, *places)


def watch(*words: str | Path, input: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(
        [sys.executable, "-m", "qubes_restore_svc.watch", *map(str, words)],
        input=input, capture_output=True, text=True, cwd=REPOSITORY, timeout=60,
    )  # fmt: skip


def four_machines(folder: Path) -> dict[str, Machine]:
    """A flipped bit in the backup of one, an old backup, none, and one where all is good."""
    machines = {name: Machine(name, folder / name) for name in ("desk", "laptop", "office", "server")}
    first, end = offsets(small_backup())["vm10/private.img.001.enc"]
    _flip_a_bit(machines["desk"].back_up(), (first + end) // 2)
    machines["laptop"].back_up(days_ago=30)
    machines["server"].back_up()
    machines["server"].back_up(days_ago=9, name="qubes-2025")
    return machines


def states_in(table: str) -> dict[str, str]:
    """The state of each machine, in a table of `collect`."""
    rows = [[cell.strip() for cell in line.split("  ") if cell] for line in table.splitlines()]
    return {row[0]: row[2] for row in rows[1:]}


def _flip_a_bit(backup: Path, at: int) -> None:
    """Change one bit, and nothing else: not the time either."""
    before = backup.stat()
    data = bytearray(backup.read_bytes())
    data[at] ^= 1
    backup.write_bytes(data)
    os.utime(backup, (before.st_atime, before.st_mtime))
