"""The code runs from what the packages install, each side without the other's."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from qubes_restore_svc import __version__
from qubes_restore_svc.wire import qrexec_call
from tests.packaging.conftest import Packages
from tests.packaging.packages import SYSTEM_PYTHON, Package, cannot_build, run_python, together
from tests.support.fixtures import REPOSITORY

#: What stands in for the library that dom0 has.
STANDIN = REPOSITORY / "tests" / "emulation" / "standin"

_IMPORT_ALL = """
import importlib, json, sys
loaded, missing = [], []
for name in sys.argv[1:]:
    try:
        loaded.append(importlib.import_module(name).__file__)
    except ModuleNotFoundError as error:
        missing.append(error.name)
print(json.dumps([loaded, missing]))
"""


def import_all(names: list[str], site: Path) -> tuple[list[str], list[str]]:
    """The files of the modules that could be imported, and the names of those that are not there."""
    done = run_python("-c", _IMPORT_ALL, *names, path=[site, STANDIN])
    assert done.returncode == 0, done.stderr
    loaded, missing = json.loads(done.stdout)
    return loaded, missing


def dotted(modules: set[str]) -> list[str]:
    names = [
        f"qubes_restore_svc.{name.removesuffix('.py').replace('/', '.')}"
        for name in sorted(modules)
        if name.endswith(".py")
    ]
    return [name for name in names if not name.endswith(("__init__", "__main__"))]


def imported_from(packages: Sequence[Package], root: Path) -> list[str]:
    """Import all the code of these packages, from these alone; the libraries that were missing."""
    site = together(packages, root)
    names = dotted(set[str]().union(*(package.modules for package in packages)))
    loaded, missing = import_all(names, site)
    assert len(loaded) + len(missing) == len(names)
    assert all(Path(file).is_relative_to(site) for file in loaded)
    untrusted = ["qubes_restore_svc.archive", "qubes_restore_svc.worker"]
    assert import_all(untrusted, site) == ([], untrusted)
    return missing


def test_dom0_imports_all_of_its_code_and_has_no_other(rpms: Packages, tmp_path: Path) -> None:
    assert imported_from([rpms["common"], rpms["tools"], rpms["dom0"]], tmp_path) == []


def test_a_program_needs_the_common_part_only_to_be_a_client(packages: Packages, tmp_path: Path) -> None:
    assert imported_from([packages["common"]], tmp_path) == []


def test_a_gui_domain_imports_all_of_its_code(packages: Packages, tmp_path: Path) -> None:
    assert imported_from([packages["common"], packages["tools"]], tmp_path) == []


def test_the_dialog_needs_nothing_else_of_ours(packages: Packages, tmp_path: Path) -> None:
    missing = imported_from([packages["common"], packages["tools"], packages["manager"]], tmp_path)
    assert set(missing) <= {"PyQt6", "qubesmanager"}  # which its package needs; they may not be here


def test_the_command_runs_without_dom0s_package_and_without_qubesadmin(
    packages: Packages, tmp_path: Path
) -> None:
    site = together([packages["common"], packages["tools"]], tmp_path)
    command = tmp_path / "usr/libexec/qubes-restore-svc/qvm-backup-restore"
    assert command.read_text().splitlines()[0] == "#!/usr/bin/python3 -I"
    done = run_python(str(command), "--mgmt-vm", "--version", path=[site])
    assert (done.returncode, done.stderr) == (0, "")
    assert __version__ in done.stdout


def test_the_dialogs_command_runs_without_dom0s_package(packages: Packages, tmp_path: Path) -> None:
    site = together([packages["common"], packages["tools"], packages["manager"]], tmp_path)
    done = run_python(str(tmp_path / "usr/bin/qubes-restore-manager"), "--version", path=[site, STANDIN])
    assert (done.returncode, done.stderr) == (0, "")
    assert __version__ in done.stdout


@pytest.mark.parametrize("name", [qrexec_call.START, qrexec_call.VERIFY, qrexec_call.LIST])
def test_a_service_that_is_not_called_by_qrexec_does_nothing(
    rpms: Packages, tmp_path: Path, name: str
) -> None:
    site = together([rpms["common"], rpms["tools"], rpms["dom0"]], tmp_path)
    done = run_python("-m", "qubes_restore_svc.dom0_service", name, path=[site, STANDIN])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr and "Traceback" not in done.stderr


def test_the_dialog_is_in_the_menu_as_a_program_that_is_there(packages: Packages) -> None:
    package = packages["manager"]
    lines = (package.root / "usr/share/applications/qubes-restore-manager.desktop").read_text().splitlines()
    [program] = [line.partition("=")[2].split()[0] for line in lines if line.startswith("Exec=")]
    [found] = [name for name in package.files if name.endswith(f"bin/{Path(program).name}")]
    assert program in (found, Path(found).name)
    assert (package.root / found.lstrip("/")).read_text().splitlines()[0] == "#!/usr/bin/python3 -I"


def test_the_worker_runs_with_its_extension(packages: Packages, tmp_path: Path) -> None:
    if not _same_python():
        pytest.skip("the system has another Python than the tests, and extensions are for one")
    site = together([packages["common"], packages["vm"]], tmp_path)
    done = run_python("-m", "qubes_restore_svc.worker", "--engine", path=[site])
    assert done.stdout.startswith("native ("), done.stderr
    trusted = ["qubes_restore_svc.broker", "qubes_restore_svc.qubes", "qubes_restore_svc.local"]
    assert import_all(trusted, site) == ([], trusted)


def test_the_command_for_any_machine_runs_and_starts_its_worker(packages: Packages, tmp_path: Path) -> None:
    if not _same_python():
        pytest.skip("the system has another Python than the tests, and extensions are for one")
    site = together([packages[""]], tmp_path)
    command = tmp_path / "usr/bin/qubes-restore-svc"
    assert command.read_text().splitlines()[0] == "#!/usr/bin/python3 -I"
    done = run_python(str(command), "--version", path=[site])
    assert (done.returncode, done.stderr) == (0, "")
    assert __version__ in done.stdout and "native (" in done.stdout


def _same_python() -> bool:
    show = "import sys; print(sys.implementation.cache_tag)"
    done = subprocess.run([SYSTEM_PYTHON, "-c", show], capture_output=True, text=True)
    return done.stdout.strip() == sys.implementation.cache_tag


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What packages are made of, to be damaged."""
    ignored = shutil.ignore_patterns(".*", "build", "tests", "__pycache__", "*.so", "*.egg-info")
    return Path(shutil.copytree(REPOSITORY, tmp_path / "tree", ignore=ignored))


def run_tool(tree: Path, *command: str) -> int:
    return subprocess.run(command, cwd=tree, capture_output=True, timeout=120).returncode


@pytest.mark.parametrize(
    "missing",
    [
        "rpc-policy/include/qubes-restore-svc",
        "rpc-policy/rpc-config/restore.Volume",
        "systemd/qubes-restore-worker.service",
        "man/qvm-backup-restore.1",
        "etc/config.yaml",
        "bin/qvm-backup-restore",
        "bin/qubes-restore-manager",
        "desktop/qubes-restore-manager.desktop",
        "docs/administration.md",
        "qubes-rpc/restore.Start",
        "qubes_restore_svc/py.typed",
    ],
)
def test_a_missing_file_ends_the_build(tree: Path, tmp_path: Path, missing: str) -> None:
    parts = ("common", "broker", "tools", "manager", "dom0", "vm")

    def stage(root: str) -> int:
        return run_tool(tree, "tools/stage-files", str(tmp_path / root), "/site", *parts)

    assert stage("whole") == 0
    (tree / missing).unlink()
    assert stage("damaged") != 0


def test_an_extension_that_does_not_load_ends_the_build(tree: Path) -> None:
    if reason := cannot_build("rpm"):
        pytest.skip(reason)
    for source in (tree / "qubes_restore_svc/kdf/_scrypt").glob("*.c"):
        if not source.name.startswith("python_"):  # what is left compiles, and calls what is not there
            source.unlink()
    assert run_tool(tree, "tools/build-extension", SYSTEM_PYTHON) != 0


def test_a_package_is_not_made_without_its_extension(tree: Path, tmp_path: Path) -> None:
    (tree / "build/ext/qubes_restore_svc/kdf").mkdir(parents=True)
    assert run_tool(tree, "tools/stage-files", str(tmp_path / "root"), "/site", "worker") != 0
