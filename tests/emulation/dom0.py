"""dom0 of an emulated Qubes as a person uses it: the command, a backup in some place, and what came of it."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from tests.emulation.emulated import EmulatedQubes
from tests.emulation.snapshot import Snapshot

LocationKind = Literal["dom0", "path", "command", "service"]
LOCATIONS: tuple[LocationKind, ...] = ("dom0", "path", "command", "service")
STORAGE = "sys-usb"
TEMPLATE = "fedora-41-xfce"
#: Seconds in which whatever must happen happens, however slow the machine is.
PATIENCE_S = 60.0


class Dom0:
    """dom0 of `qubes`, with the worker's package in a template; its own files are in `folder`."""

    def __init__(self, qubes: EmulatedQubes, folder: Path) -> None:
        self.qubes = qubes
        self.folder = folder
        (folder / "home").mkdir(parents=True)
        (folder / "reports").mkdir(mode=0o700)
        (folder / "config.yaml").write_text(f"report:\n  directory: {folder / 'reports'}\n")
        (folder / "config.yaml").chmod(0o644)
        qubes.install_worker(TEMPLATE)

    def location(self, backup: Path, kind: LocationKind) -> list[str]:
        """Put the backup in its place; the words of the command that name it."""
        if kind == "dom0":
            return [str(backup)]
        place = self.qubes.put_backup(STORAGE, backup)
        if kind == "path":
            return ["-d", STORAGE, str(place)]
        if kind == "command":
            return ["-d", STORAGE, f"cat '{place}'"]
        stock = self.qubes.root / STORAGE / "qubes-rpc" / "qubes.Restore"
        service = stock.with_name("my.Backup")
        # One process, so that it ends when the stock one does. A shell with a pipeline would wait for `cat`,
        # which waits for the end of the call, and nobody could see that the stream has ended.
        feed = f"echo '{place}'; exec cat 2>/dev/null"
        service.write_text(f"#!/bin/bash\nexec '{stock}' < <({feed})\n")
        service.chmod(0o755)
        return ["-d", STORAGE, "--location-is-service", "my.Backup+monday"]

    def start(self, words: Sequence[str], passphrase: str | None = None) -> "subprocess.Popen[str]":
        """Start `qvm-backup-restore --mgmt-vm` with these words; `passphrase` comes in a file."""
        given: list[str] = []
        if passphrase is not None:
            (self.folder / "passphrase").write_text(passphrase + "\n")
            given = ["-p", str(self.folder / "passphrase")]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.emulation.restore_driver", str(self.folder), *words, *given],
            env=self.qubes.dom0_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def restore(
        self, words: Sequence[str], passphrase: str, status: int = 0
    ) -> "subprocess.CompletedProcess[str]":
        """Run the command to its end, which must be `status`."""
        report = self.folder / "report.json"
        words = ["--mgmt-vm", "--force-root", "--memory", "1500", "--report", str(report), *words]
        process = self.start(words, passphrase)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == status, f"{process.returncode}\n{stdout}\n{stderr}"
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def outcomes(self) -> dict[str, str]:
        """What the report of the last restore says of the qubes that were wanted."""
        report = json.loads((self.folder / "report.json").read_text())
        return {qube["name"]: qube["outcome"] for qube in report["qubes"] if qube["outcome"] != "left out"}

    def locks(self) -> list[str]:
        """The files of the locks that somebody has."""
        words = Path("/proc/locks").read_text().split()
        held = {word.rpartition(":")[2] for word in words if word.count(":") == 2}  # MAJOR:MINOR:INODE
        found = []
        for path in sorted(self.folder.glob("*.lock")):
            with suppress(FileNotFoundError):
                if str(path.stat().st_ino) in held:
                    found.append(path.name)
        return found

    def check_as_before(self, before: Snapshot, ignored_files: Collection[str] = ()) -> None:
        """Nothing may be left that a second run could meet: the state becomes the one of then, and all locks
        are free."""
        assert self.qubes.settled(before, ignored_files) == before
        wait_until(lambda: not self.locks(), "free locks")

    def sha256(self, volume: str) -> tuple[int, str]:
        """Size and SHA-256 of the volume `QUBE/NAME`."""
        path = self.qubes.qubesd.volume_path(*volume.split("/"))
        with path.open("rb") as file:
            return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def wait_until(happened: Callable[[], bool], what: str, limit_s: float = PATIENCE_S) -> None:
    """Wait for what must happen."""
    deadline = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
