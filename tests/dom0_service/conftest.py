"""A system for every test, and one small backup for all of them."""

from pathlib import Path

import pytest

from tests.system.support import small_backup

from .support import Bed


@pytest.fixture(scope="session")
def backup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """work, vault, debian, and dom0's home."""
    path = tmp_path_factory.mktemp("backup") / "sample.qbackup"
    small_backup().write(path)
    return path


@pytest.fixture
def bed(tmp_path: Path, backup: Path) -> Bed:
    tmp_path.chmod(0o755)
    return Bed(tmp_path, backup)
