"""Each kind of packages is built once for all the tests here; without its tools, these tests are skipped.

Once for all the processes that run tests at a time: the first that needs it builds, the others wait for it.
"""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.packages import Package, cannot_build, make, read_deb, read_rpm

#: The packages of one kind by the end of their name: "common", "dom0", "vm", "" for the one without.
Packages = dict[str, Package]


def _built(kind: str, read: Callable[[Path, Path], Package], factory: pytest.TempPathFactory) -> Packages:
    if reason := cannot_build(kind):
        pytest.skip(reason)
    own = factory.getbasetemp()
    built = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / f"built-{kind}"
    with built.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            done = make(kind, built.with_suffix(".made"))
            assert done.returncode == 0, done.stdout + done.stderr
            built.with_suffix(".made").rename(built)
    folder = factory.mktemp(kind)
    packages = [read(path, folder / path.stem) for path in sorted(built.iterdir())]
    return {package.name.removeprefix("qubes-restore-svc").lstrip("-"): package for package in packages}


@pytest.fixture(scope="session")
def rpms(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """The RPM packages."""
    return _built("rpm", read_rpm, tmp_path_factory)


@pytest.fixture(scope="session")
def debs(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """The Debian packages."""
    return _built("deb", read_deb, tmp_path_factory)


@pytest.fixture(params=["rpm", "deb"])
def packages(request: pytest.FixtureRequest) -> Packages:
    """The packages of each kind in turn."""
    built: Packages = request.getfixturevalue(f"{request.param}s")
    return built
