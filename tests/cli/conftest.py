"""A small backup, dom0, and a qube that asks it."""

from pathlib import Path

import pytest

from tests.system.support import small_backup

from .domains import Domain


@pytest.fixture(scope="session")
def backup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backup") / "sample.qbackup"
    small_backup().write(path)
    return path


@pytest.fixture
def dom0(tmp_path: Path, backup: Path) -> Domain:
    return Domain("tests.cli.qvm_driver", tmp_path / "dom0", backup)


@pytest.fixture
def qube(tmp_path: Path, backup: Path) -> Domain:
    return Domain("tests.cli.remote_driver", tmp_path / "qube", backup)
