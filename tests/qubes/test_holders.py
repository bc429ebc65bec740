"""The line in a lock file: who holds it, and that nothing else is believed."""

import os
import subprocess
import time
from datetime import datetime
from pathlib import Path
from typing import get_args

import pytest

from qubes_restore_svc.qubes.holders import Activity, Holder, read_holder, write_holder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def write(path: Path, client: str = "sys-gui", activity: Activity = "restoring") -> None:
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    write_holder(file, client, activity)
    os.close(file)


@pytest.mark.parametrize("activity", get_args(Activity))
def test_what_was_written_is_read(path: Path, activity: Activity) -> None:
    path.write_text("what was there before, and longer" * 10)
    before = int(time.time())
    write(path, "nas_1.x-y", activity)
    holder = read_holder(path)
    assert holder is not None
    assert (holder.pid, holder.client, holder.activity) == (os.getpid(), "nas_1.x-y", activity)
    assert before <= holder.since <= time.time()
    assert holder.is_alive()


def test_it_is_told_in_one_line_for_people() -> None:
    since = int(datetime(2026, 11, 23, 14, 5).timestamp())
    holder = Holder(4711, 1, since, "joan", "sys-gui", "restoring")
    assert holder.describe() == (
        "sys-gui has been restoring since 14:05 on 2026-11-23 (process 4711 of joan)"
    )


def test_what_cannot_stand_in_the_line_does_not(path: Path) -> None:
    write(path, "a b\n\x1b[2J")
    holder = read_holder(path)
    assert holder is not None and holder.client == "a-b---2J"


@pytest.mark.parametrize(
    "content",
    [b"", b"1 1 1 root\n", b"1 1 1 root dom0 steal\n", b"1 1 1 root dom0 verify", b"1 1 1 r\x1b dom0 list\n",
     b"9" * 5000, b"x 1 1 root dom0 list\n", b"1 1 1 root dom0 list\nmore"],
)  # fmt: skip
def test_what_is_not_such_a_line_is_nobody(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert read_holder(path) is None


def test_nor_is_a_file_that_is_not_there(path: Path) -> None:
    assert read_holder(path) is None


def test_a_process_that_is_gone_and_another_of_its_number_do_not_hold_it() -> None:
    child = subprocess.Popen(["sleep", "60"])
    child.kill()
    child.wait()
    assert not Holder(child.pid, 1, 1, "u", "dom0", "restoring").is_alive()
    assert not Holder(os.getpid(), 1, 1, "u", "dom0", "restoring").is_alive()
