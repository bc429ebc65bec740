"""What is in the packages: exactly this, with these rights, and for each side nothing of the other's."""

import gzip
from pathlib import Path

import pytest

from qubes_restore_svc import __version__
from qubes_restore_svc.wire import service
from tests.packaging.conftest import Packages
from tests.packaging.packages import Package
from tests.support.fixtures import REPOSITORY
from tests.test_boundaries import LIBRARIES, OURS, UNTRUSTED

CODE = REPOSITORY / "qubes_restore_svc"
FOLDERS = {part for part in OURS if (CODE / part).is_dir()}
SERVICES = (service.SESSION, service.VOLUME, service.ARCHIVE)
LISTENS_AT = "/run/qubes-restore-worker/calls.sock"

#: All that the packages install beside Python code. A key is the end of a package's name.
OTHERS = {
    "common": set[str](),
    "dom0": {
        "/etc/qubes-restore-svc/config.yaml",
        "/etc/qubes/policy.d/31-qubes-restore-svc.policy",
        "/etc/qubes/policy.d/include/qubes-restore-svc",
        "/usr/lib/tmpfiles.d/qubes-restore-svc-dom0.conf",
        "/usr/libexec/qubes-restore-svc/qvm-backup-restore",
        "/usr/share/doc/qubes-restore-svc-dom0/configuration.md",
        "/usr/share/qubes-restore-svc/man/man1/qvm-backup-restore.1.gz",
    },
    "vm": {
        *(f"/etc/qubes-rpc/{name}" for name in SERVICES),
        *(f"/etc/qubes/rpc-config/{name}" for name in SERVICES),
        "/etc/qubes/post-install.d/20-qubes-restore-svc.sh",
        "/usr/lib/systemd/system-preset/75-qubes-restore-worker.preset",
        "/usr/lib/systemd/system/qubes-restore-worker.service",
        "/usr/lib/systemd/system/qubes-restore-worker.socket",
    },
    "": {"/usr/bin/qubes-restore-svc", "/usr/share/man/man1/qubes-restore-svc.1.gz"},
}

PROGRAMS = {
    "/etc/qubes/post-install.d/20-qubes-restore-svc.sh",
    "/usr/bin/qubes-restore-svc",
    "/usr/libexec/qubes-restore-svc/qvm-backup-restore",
}

#: The libraries of the parsers, as the distributions call them.
PARSERS = {f"python3-{name}" for name in LIBRARIES["archive"] - {"pydantic"}}


def code(*folders: str) -> set[str]:
    """The Python files of these folders of the package, from the work tree; "" are those in none."""
    return {
        str(path.relative_to(CODE))
        for folder in folders
        for path in (CODE / folder).glob("*.py")
        if path.relative_to(CODE) != Path("__main__.py")
    }


#: ... and the code.
MODULES = {
    "common": code("", "wire"),
    "dom0": code("broker", "cli", "host", "link"),
    "vm": code("archive", "worker"),
    "": code("", *FOLDERS) | {"__main__.py"},
}


def compiled(package: Package) -> set[str]:
    return {name for name in package.modules if name.endswith(".so")}


def names_in(dependencies: frozenset[str]) -> set[str]:
    return {dependency.split()[0] for dependency in dependencies if dependency}


# --- Which files ---------------------------------------------------------------------------------


def test_these_packages_are_made(rpms: Packages, debs: Packages) -> None:
    assert set(rpms) == {"", "common", "dom0", "vm"}
    assert set(debs) == {"", "common", "vm"}


def test_a_package_installs_exactly_these_files(packages: Packages) -> None:
    for name, package in packages.items():
        assert package.modules - compiled(package) == MODULES[name], name
        assert {file for file in package.files if not file.startswith(package.site)} == OTHERS[name], name
        assert len(compiled(package)) == (name in ("vm", "")), name


def test_every_part_of_the_code_is_on_one_side_of_the_boundary() -> None:
    assert MODULES["vm"] == code(*UNTRUSTED)
    assert MODULES["dom0"] | MODULES["common"] == code("", *(FOLDERS - UNTRUSTED))
    for one, other in (("common", "dom0"), ("common", "vm"), ("dom0", "vm")):
        assert not MODULES[one] & MODULES[other]


def test_what_is_packaged_is_what_was_tested(packages: Packages) -> None:
    for package in packages.values():
        for name in package.modules - compiled(package):
            installed = package.root / package.site.lstrip("/") / "qubes_restore_svc" / name
            assert installed.read_bytes() == (CODE / name).read_bytes()


def test_byte_code_comes_with_an_rpm_so_that_none_is_left_behind(rpms: Packages) -> None:
    for package in rpms.values():
        sources = {
            f"{name.rpartition('/')[0]}/__pycache__/{name.rpartition('/')[2].removesuffix('.py')}"
            for name in package.files
            if name.endswith(".py")
        }
        assert {
            name.partition(".cpython-")[0] for name in package.entries if name.endswith(".pyc")
        } == sources


def test_an_rpm_owns_the_directories_that_nobody_else_has(rpms: Packages) -> None:
    """Otherwise they stay when it is removed."""
    shared = {"/", "/etc", "/etc/qubes", "/etc/qubes-rpc", "/etc/qubes/policy.d",
              "/etc/qubes/policy.d/include", "/etc/qubes/post-install.d", "/etc/qubes/rpc-config", "/usr",
              "/usr/bin", "/usr/lib", "/usr/lib/systemd", "/usr/lib/systemd/system",
              "/usr/lib/systemd/system-preset", "/usr/lib/tmpfiles.d", "/usr/libexec", "/usr/share",
              "/usr/share/doc", "/usr/share/licenses", "/usr/share/man", "/usr/share/man/man1", "/var",
              "/var/log"}  # fmt: skip
    common = {name for name, entry in rpms["common"].entries.items() if entry.is_directory}
    for package in rpms.values():
        owned = {name for name, entry in package.entries.items() if entry.is_directory} | common
        assert not owned & shared
        for name in package.entries:
            for parent in map(str, Path(name).parents):
                assert parent in owned | shared or package.site.startswith(parent), (package.name, parent)


def test_a_debian_package_brings_no_byte_code(debs: Packages) -> None:
    """Debian compiles when it installs, and removes that again."""
    for package in debs.values():
        assert not [name for name in package.entries if "__pycache__" in name]


# --- dom0 gets nothing that could read a backup --------------------------------------------------


def test_what_dom0_installs_holds_no_parser(rpms: Packages) -> None:
    for name in ("common", "dom0"):
        package = rpms[name]
        folders = {module.split("/")[0] for module in package.modules}
        assert folders and not folders & UNTRUSTED
        assert not [file for file in package.entries if file.endswith(".so")]
        needed = names_in(package.requires)
        assert "python3-pydantic" in needed or name == "dom0"
        assert not needed & (PARSERS | {"qubes-restore-svc", "qubes-restore-svc-vm"})


def test_the_packages_with_parsers_cannot_be_installed_beside_dom0s(rpms: Packages) -> None:
    assert names_in(rpms["dom0"].conflicts) == {"qubes-restore-svc-vm"}
    assert names_in(rpms[""].conflicts) == {"qubes-restore-svc-dom0"}


def test_packages_that_hold_the_same_files_exclude_each_other_on_debian(debs: Packages) -> None:
    assert names_in(debs[""].conflicts) == {"qubes-restore-svc-common", "qubes-restore-svc-vm"}
    assert names_in(debs["vm"].conflicts) == names_in(debs["common"].conflicts) == {"qubes-restore-svc"}


# --- What they say of themselves -----------------------------------------------------------------


def test_a_package_has_the_version_of_the_code(packages: Packages) -> None:
    assert {package.version for package in packages.values()} == {__version__}


def test_the_sides_come_with_exactly_their_common_part(rpms: Packages, debs: Packages) -> None:
    assert f"qubes-restore-svc-common = {__version__}-1" in rpms["dom0"].requires & rpms["vm"].requires
    assert f"qubes-restore-svc-common (= {__version__}-1)" in debs["vm"].requires


@pytest.mark.parametrize("name", ["vm", ""])
def test_what_reads_backups_needs_the_libraries_that_the_code_imports(packages: Packages, name: str) -> None:
    assert names_in(packages[name].requires) >= PARSERS


def test_dom0_needs_the_libraries_that_the_code_imports(rpms: Packages) -> None:
    assert names_in(rpms["dom0"].requires) >= {"python3-pyyaml", "python3-tqdm", "qubes-core-admin-client"}
    assert "python3-pydantic >= 2.8" in rpms["common"].requires


def test_the_worker_needs_the_agent(packages: Packages) -> None:
    assert "qubes-core-agent" in names_in(packages["vm"].requires)


# --- Rights and kinds of files -------------------------------------------------------------------


def test_the_policy_belongs_to_the_group_that_edits_policies(rpms: Packages) -> None:
    entries = rpms["dom0"].entries
    policy = entries["/etc/qubes/policy.d/31-qubes-restore-svc.policy"]
    include = entries["/etc/qubes/policy.d/include/qubes-restore-svc"]
    for entry in (policy, include):
        assert (entry.mode, entry.owner, entry.group) == ("-rw-rw-r--", "root", "qubes")
    assert policy.config and not policy.noreplace
    assert include.config and include.noreplace


def test_an_update_keeps_the_administrators_configuration(rpms: Packages) -> None:
    entry = rpms["dom0"].entries["/etc/qubes-restore-svc/config.yaml"]
    assert entry.config and entry.noreplace
    assert (entry.mode, entry.owner, entry.group) == ("-rw-r--r--", "root", "root")
    directory = rpms["dom0"].entries["/etc/qubes-restore-svc"]
    assert (directory.mode, directory.owner) == ("drwxr-xr-x", "root")


def test_reports_are_for_the_group_and_nobody_else(rpms: Packages) -> None:
    entry = rpms["dom0"].entries["/var/log/qubes-restore-svc"]
    assert (entry.mode, entry.owner, entry.group) == ("drwxrws---", "root", "qubes")
    [line] = [
        line
        for line in (REPOSITORY / "tmpfiles" / "qubes-restore-svc-dom0.conf").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert line.split() == ["d", "/var/log/qubes-restore-svc", "2770", "root", "qubes", "-"]


def test_a_service_is_a_link_to_the_workers_socket(packages: Packages) -> None:
    for name in SERVICES:
        entry = packages["vm"].entries[f"/etc/qubes-rpc/{name}"]
        assert (entry.mode[0], entry.target) == ("l", LISTENS_AT)
        config = packages["vm"].entries[f"/etc/qubes/rpc-config/{name}"]
        assert config.config and config.noreplace
    socket = packages["vm"].root / "usr/lib/systemd/system/qubes-restore-worker.socket"
    assert f"ListenStream={LISTENS_AT}" in socket.read_text().splitlines()


def test_all_else_belongs_to_root_who_alone_may_write(packages: Packages) -> None:
    for package in packages.values():
        for name, entry in package.entries.items():
            if name.startswith("/etc/qubes/policy.d/") or name == "/var/log/qubes-restore-svc":
                continue
            assert (entry.owner, entry.group) == ("root", "root"), name
            assert entry.mode[0] == "l" or entry.mode[5] == entry.mode[8] == "-", name
            # Whether a library is marked as executable is a matter of taste, and Debian's is another.
            runs = entry.is_directory or name in PROGRAMS
            assert entry.mode[0] == "l" or name.endswith(".so") or (entry.mode[3] == "x") == runs, name


def test_man_pages_are_compressed_and_keep_out_of_the_stock_commands_way(packages: Packages) -> None:
    pages = {
        path: package.root / path.lstrip("/")
        for package in packages.values()
        for path in package.files
        if "/man1/" in path
    }
    assert "/usr/share/man/man1/qvm-backup-restore.1.gz" not in pages
    for path, file in pages.items():
        assert gzip.decompress(file.read_bytes()) == (REPOSITORY / "man" / Path(path).stem).read_bytes()
