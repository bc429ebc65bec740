"""Our window does on Qubes Manager's real dialog what it does on the stand-in: the same tests, run on it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.conformance import real_manager
from tests.support.fixtures import REPOSITORY

#: What is about the window and its start.
WINDOW = ("tests/manager/test_window.py", "tests/manager/test_launcher.py")


def test_the_tests_of_the_window_pass_on_the_real_dialog(
    checkout: Callable[[str], Path], tmp_path: Path
) -> None:
    manager, client = checkout("qubes-manager"), checkout("qubes-core-admin-client")
    places = (REPOSITORY, *real_manager.build(manager, client, tmp_path / "built"))
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", real_manager.__name__,
            "-o", f"pythonpath={' '.join(map(str, places))}", *WINDOW,
        ],
        cwd=REPOSITORY,
        env=os.environ | {"QT_QPA_PLATFORM": "offscreen"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout
