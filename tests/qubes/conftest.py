"""The emulated Qubes system, for the tests that ask for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qubes_restore_svc.qubes.host import QubesHost
from qubes_restore_svc.qubes.system import QubesSystem
from tests.emulation.qubesd import Qubesd
from tests.qubes.qubes_bed import emulation, new_host


@pytest.fixture
def qubesd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Qubesd]:
    """The state of the system, and the place to put faults in."""
    with emulation(tmp_path, monkeypatch) as running:
        yield running


@pytest.fixture
def system(qubesd: Qubesd) -> QubesSystem:
    """The facade over it."""
    return QubesSystem.connect()


@pytest.fixture
def host(tmp_path: Path, system: QubesSystem) -> QubesHost:
    """The host over the facade."""
    return new_host(tmp_path, system)
