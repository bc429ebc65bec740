"""Each kind of packages is built once for all the tests here; without its tools, these tests are skipped."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.packages import Package, cannot_build, make, read_deb, read_rpm

#: The packages of one kind by the end of their name: "common", "dom0", "vm", "" for the one without.
Packages = dict[str, Package]


def _build(kind: str, read: Callable[[Path, Path], Package], folder: Path) -> Packages:
    if reason := cannot_build(kind):
        pytest.skip(reason)
    done = make(kind, folder / "built")
    assert done.returncode == 0, done.stdout + done.stderr
    packages = [read(path, folder / path.stem) for path in sorted((folder / "built").iterdir())]
    return {package.name.removeprefix("qubes-restore-svc").lstrip("-"): package for package in packages}


@pytest.fixture(scope="session")
def rpms(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """The RPM packages."""
    return _build("rpm", read_rpm, tmp_path_factory.mktemp("rpm"))


@pytest.fixture(scope="session")
def debs(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """The Debian packages."""
    return _build("deb", read_deb, tmp_path_factory.mktemp("deb"))


@pytest.fixture(params=["rpm", "deb"])
def packages(request: pytest.FixtureRequest) -> Packages:
    """The packages of each kind in turn."""
    built: Packages = request.getfixturevalue(f"{request.param}s")
    return built
