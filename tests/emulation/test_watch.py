"""`qubes-restore-watch` in dom0: the newest backup in a qube is verified by a disposable."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.emulation.dom0 import STORAGE, Dom0
from tests.support.backup_writer import PASSPHRASE
from tests.system.support import passphrase_file, small_backup


def checked_place(dom0: Dom0, name: str, settings: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, report and words of a check."""
    folder = dom0.folder / "watch"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    secret = passphrase_file(folder, PASSPHRASE)
    place = folder / f"{name}.toml"
    options = 'options = ["--memory", "1500", "--force-root"]'
    place.write_text(f"passphrase_file = '{secret}'\n{options}\n{settings}\n")
    place.chmod(0o644)
    words = ["verify", name, "--configuration", str(folder), "--state", str(dom0.folder / "watched")]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.emulation.watch_driver", str(dom0.folder), *words],
        env=dom0.qubes.dom0_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    report = json.loads((dom0.folder / "watched" / f"{name}.json").read_text())
    return ended.returncode, report, ended.stderr


def written(path: Path, days_ago: int) -> None:
    """A backup of today, in a file that was written `days_ago`."""
    begun = datetime.now().strftime("%Y%m%dT%H%M%S")
    replace(small_backup(), backup_id=f"{begun}-{days_ago}").write(path)
    at = time.time() - days_ago * 86_400
    os.utime(path, (at, at))


def test_the_newest_backup_in_a_directory_of_a_qube(dom0: Dom0) -> None:
    folder = dom0.qubes.root / STORAGE / "home" / "it's here"
    folder.mkdir()
    for days in (2, 1, 3, 0):  # the last one is still being written
        written(folder / f"qubes-{days} days", days)
    written(folder / "other", 1)
    before = dom0.qubes.snapshot()
    status, report, said = checked_place(dom0, "usb", f'directory = "{folder}"\nqube = "{STORAGE}"')
    assert (status, report["state"]) == (0, "good"), said
    assert report["backup_id"].endswith("-1") and report["backup"] == f"{STORAGE}: {folder}/qubes-*"
    assert {qube["outcome"] for qube in report["verification"]["qubes"]} == {"verified"}
    dom0.check_as_before(before)
