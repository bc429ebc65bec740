"""A small backup, and its passphrase in a file."""

from pathlib import Path

import pytest

from .support import passphrase_file, small_backup


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    path = tmp_path / "sample.qbackup"
    small_backup().write(path)
    return path


@pytest.fixture
def passphrase(tmp_path: Path) -> Path:
    return passphrase_file(tmp_path)
