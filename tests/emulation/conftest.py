"""The emulated system that most tests here run on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.emulation.dom0 import Dom0
from tests.emulation.emulated import EmulatedQubes


@pytest.fixture
def dom0(tmp_path: Path) -> Iterator[Dom0]:
    """dom0 of a typical system; see `EmulatedQubes`."""
    with EmulatedQubes(tmp_path / "system") as qubes:
        yield Dom0(qubes, tmp_path / "dom0-files")
