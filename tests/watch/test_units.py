"""The units: systemd understands them, and a person is told on the desktop what `show` says."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.fixtures import REPOSITORY

UNITS = REPOSITORY / "systemd"
OURS = "qubes-restore-watch@.service", "qubes-restore-watch@.timer", "qubes-restore-watch-notify@.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("manager", ["--system", "--user"])
def test_systemd_understands_the_units(manager: str, tmp_path: Path) -> None:
    for name in OURS:  # with programs that are there
        text = (UNITS / name).read_text()
        for program in ("/usr/bin/qubes-restore-watch", "/usr/libexec/qubes-restore-svc/watch-notify"):
            text = text.replace(program, "/bin/true")
        (tmp_path / name).write_text(text)
    (tmp_path / f"{OURS[0]}.d").mkdir()
    shutil.copy(UNITS / "watch-notify.conf", tmp_path / f"{OURS[0]}.d" / "notify.conf")
    done = subprocess.run(
        ["systemd-analyze", manager, "verify", "--man=no", *(tmp_path / name for name in OURS)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_the_notification_says_what_the_last_check_found(tmp_path: Path) -> None:
    programs = {
        "qubes-restore-watch": '[ "$*" = "show usb" ] && echo TABLE && echo "here, usb: bad: why" >&2; false',
        "notify-send": f'for word; do printf "%s\\n" "$word"; done > "{tmp_path}/told"',
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([UNITS / "watch-notify", "usb"], env=path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    *options, title, why, more = (tmp_path / "told").read_text().splitlines()
    assert "--urgency=critical" in options
    assert (title, why) == ("The backup in usb is not known to be good", "here, usb: bad: why")
    assert more == "More: journalctl --user --unit qubes-restore-watch@usb"
