"""While we restore, the stock restore cannot, and the other way round."""

import subprocess
import sys
from pathlib import Path

import pytest

from qubes_restore_svc.errors import HostFailed, RestoreInProgress
from qubes_restore_svc.qubes.stock_lock import stock_lock

#: What the stock command does with the file.
_STOCK = """
import fcntl, sys
file = open(sys.argv[1], "w")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(7)
print("held", flush=True)
sys.stdin.read()
"""


def stock(path: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _STOCK, str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_stock_command_finds_its_lock_held_while_we_restore(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with stock_lock(path):
        process = stock(path)
        process.communicate()
        assert process.returncode == 7
    process = stock(path)
    process.communicate()
    assert process.returncode == 0


def test_a_stock_restore_that_runs_is_told(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = stock(path)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RestoreInProgress, match="the stock qvm-backup-restore is running"), stock_lock(path):
        pass
    process.communicate()
    with stock_lock(path):
        pass


def test_a_place_where_no_lock_can_be_is_told(tmp_path: Path) -> None:
    with pytest.raises(HostFailed, match="locking"), stock_lock(tmp_path / "missing" / "lock"):
        pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostFailed, match="locking"), stock_lock(tmp_path / "lock"):
        pass
    assert not (tmp_path / "elsewhere").exists()
