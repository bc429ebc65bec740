"""The ways to the archive, as fixtures."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from .storage import FakeStorage
from .ways import ARCHIVE, WAYS, MakeWay, Way


@pytest.fixture
def make_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWay]:
    with contextlib.ExitStack() as resources:
        yield lambda name, archive: WAYS[name](archive, tmp_path, monkeypatch, resources)


@pytest.fixture
def fetched(make_way: MakeWay) -> tuple[Way, FakeStorage]:
    way = make_way("fetched", ARCHIVE)
    assert way.storage is not None
    return way, way.storage
