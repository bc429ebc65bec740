"""Which parts of a file are in memory."""

import mmap
import os
import subprocess
from pathlib import Path

import pytest

from . import page_cache

SIZE = 8 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE - 100))
    return path


def test_a_file_that_was_just_written_is_in_memory_to_its_last_page(file: Path) -> None:
    assert page_cache.resident(file) == SIZE


def test_what_is_read_after_a_drop_is_in_memory_and_the_rest_is_not(file: Path) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", file], capture_output=True, text=True).stdout.strip()
    if kind in ("tmpfs", "ramfs"):
        pytest.skip(f"files of a {kind} are nowhere else than in memory")
    page_cache.drop(file)
    assert page_cache.resident(file) == 0
    with file.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing ahead
        os.pread(opened.fileno(), 100, 5 * mmap.PAGESIZE)
    assert 0 < page_cache.resident(file) < SIZE


def test_nothing_of_an_empty_file_is_in_memory(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert page_cache.resident(tmp_path / "empty") == 0
