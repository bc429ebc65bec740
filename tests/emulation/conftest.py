"""The emulated systems that most tests here run on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import qubesadmin

from tests.emulation.dom0 import Dom0
from tests.emulation.emulated import EmulatedQubes
from tests.emulation.qubesd import Qubesd
from tests.emulation.remote_bench import RemoteBench, open_remote, two_qubes
from tests.emulation.small_system import small_system


@pytest.fixture
def dom0(tmp_path: Path) -> Iterator[Dom0]:
    """dom0 of a typical system; see `EmulatedQubes`."""
    with EmulatedQubes(tmp_path / "system") as qubes:
        yield Dom0(qubes, tmp_path / "dom0-files")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[RemoteBench]:
    """dom0 and a GUI domain that asks it, without a grant."""
    with open_remote(tmp_path) as bench:
        yield bench


@pytest.fixture
def backup(bench: RemoteBench, tmp_path: Path) -> str:
    """The path of a backup of two qubes in the GUI domain."""
    two_qubes().write(tmp_path / "backup")
    return bench.put(tmp_path / "backup")


@pytest.fixture
def qubesd(tmp_path: Path) -> Iterator[Qubesd]:
    """A small system without anything that runs on it."""
    with small_system(tmp_path) as qubesd:
        yield qubesd


@pytest.fixture
def app(qubesd: Qubesd) -> qubesadmin.Qubes:
    return qubesadmin.Qubes()
