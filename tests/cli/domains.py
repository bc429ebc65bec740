"""Where `qvm-backup-restore --mgmt-vm` runs as a process: dom0, and a qube that asks dom0."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.backup_writer import PASSPHRASE
from tests.support.fixtures import REPOSITORY

from .terminal import Seen, on_terminal

WIDTH = 80
TYPED = f"{PASSPHRASE}\n"
QUESTION = "Do you want to proceed? [y/N] "


@dataclass
class Domain:
    """Where the command runs, for the backup at `backup`. What it restores is in `folder` then."""

    module: str
    folder: Path
    backup: Path

    def __post_init__(self) -> None:
        (self.folder / "reports").mkdir(parents=True)
        self.configure()

    def configure(self, more: str = "") -> None:
        """How dom0 is set up for it."""
        config = self.folder / "config.yaml"
        config.write_text(f"report: {{directory: {self.folder / 'reports'}}}\n{more}")
        config.chmod(0o644)

    @property
    def qubes(self) -> list[str]:
        """What has been restored."""
        target = self.folder / "restored"
        return sorted(os.listdir(target)) if target.exists() else []

    @property
    def report(self) -> dict[str, object]:
        """What was written, but for times, which a message tells to the second, and for the keys that were
        derived before the plan was agreed on, which are more or fewer."""
        return without_times(self.folder / "report.json")

    def words(self, *options: str | Path) -> list[str]:
        """The driver with its arguments."""
        words = (self.folder, "--mgmt-vm", "--report", self.folder / "report.json", *options)
        return [sys.executable, "-m", self.module, *map(str, words)]

    def piped(
        self, *options: str | Path, input: str = "", cwd: Path = REPOSITORY
    ) -> subprocess.CompletedProcess[str]:
        """What a script gets. Without a terminal of its own, nobody can be asked."""
        return subprocess.run(
            self.words(*options),
            input=input,
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            start_new_session=True,
            timeout=60,
            check=False,
        )

    def restored(self, *options: str | Path, input: str = "") -> subprocess.CompletedProcess[str]:
        """The same, from the backup."""
        return self.piped(self.backup, *options, input=input)

    def seen(
        self,
        *options: str | Path,
        types: str | Sequence[str] = TYPED,
        answers: str | Sequence[str] = "",
        width: int = WIDTH,
    ) -> Seen:
        """What a person sees who restores from the backup."""
        words = self.words(self.backup, *options)[3:]
        return on_terminal(*words, types=types, answers=answers, width=width, module=self.module)


def without_times(path: Path) -> dict[str, object]:
    """A report in a file."""
    content: dict[str, object] = json.loads(path.read_text())
    assert content.pop("started") and content.pop("finished")
    del content["derivations"]
    return content
