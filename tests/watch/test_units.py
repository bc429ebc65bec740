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


def told(folder: Path, show: str, status: int) -> list[str]:
    """The words for `notify-send`, if `show` is this script and the check ended with this status."""
    programs = {
        "qubes-restore-watch": f'[ "$*" = "show usb" ] || exit 9; echo TABLE; {show}',
        "notify-send": f'for word; do printf "%s\\n" "$word"; done > "{folder}/told"',
    }
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:/usr/bin:/bin", "MONITOR_EXIT_STATUS": str(status)}
    done = subprocess.run([UNITS / "watch-notify", "usb"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return (folder / "told").read_text().splitlines()


def test_the_notification_says_what_the_last_check_found(tmp_path: Path) -> None:
    *options, title, why, more = told(tmp_path, 'echo "here, usb: bad: why" >&2; false', 1)
    assert "--urgency=critical" in options
    assert (title, why) == ("The backup in usb is not known to be good", "here, usb: bad: why")
    assert more == "More: journalctl --user --unit qubes-restore-watch@usb"


def test_no_reason_is_markup_in_a_notification(tmp_path: Path) -> None:
    *_, why, _ = told(tmp_path, "echo '<a href=\"x\">y</a> 2>&1' >&2; false", 1)
    assert why == '&lt;a href="x"&gt;y&lt;/a&gt; 2&gt;&amp;1'


def test_a_check_that_failed_beside_a_good_report_is_told_as_that(tmp_path: Path) -> None:
    *_, title, why, _ = told(tmp_path, 'echo "1 of 1 good." >&2', 3)
    assert title == "The check of the backup in usb did not end well"
    assert "with status 3" in why and "1 of 1 good" not in why
