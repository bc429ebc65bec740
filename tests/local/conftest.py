"""What the tests of restores to a directory have in common."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qubes_restore_svc.local.directory import DirectoryQube
from tests.local.sample_qubes import new_qube


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An empty directory to restore to."""
    path = tmp_path / "restored"
    path.mkdir()
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """`tmp_path`, open."""
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def qube(directory: int) -> DirectoryQube:
    """The qube `work`, on its way into `tmp_path`."""
    return DirectoryQube(directory, new_qube())


def failing(number: int) -> Callable[..., None]:
    """Fails with this errno, whatever it is asked."""

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail
