"""The public sources of Qubes that the emulation is compared with: `make conformance QUBES=DIR`."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

#: The environment variable that names the directory with the checkouts.
VARIABLE = "QUBES"


@pytest.fixture(scope="session")
def checkout() -> Callable[[str], Path]:
    """Where the checkout of a repository of Qubes lies; the test is skipped if there is none."""

    def find(name: str) -> Path:
        if not os.environ.get(VARIABLE):
            pytest.skip(f"{VARIABLE} does not name a directory with the sources of Qubes R4.3")
        path = Path(os.environ[VARIABLE]).resolve() / name
        if not path.is_dir():
            pytest.skip(f"{path} is not there")
        return path

    return find
