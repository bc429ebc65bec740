"""What is in the packages: exactly this, with these rights, and for each side nothing of the other's."""

import gzip
from itertools import combinations
from pathlib import Path

import pytest

from qubes_restore_svc import __version__
from qubes_restore_svc.wire import qrexec_call
from tests.packaging.conftest import Packages
from tests.packaging.packages import Package
from tests.support.fixtures import REPOSITORY
from tests.test_boundaries import LIBRARIES, UNTRUSTED

CODE = REPOSITORY / "qubes_restore_svc"
FOLDERS = {path.parent.name for path in CODE.glob("*/__init__.py")}
SERVICES = (qrexec_call.SESSION, qrexec_call.VOLUME, qrexec_call.ARCHIVE)
DOM0_SERVICES = (qrexec_call.START, qrexec_call.VERIFY, qrexec_call.LIST)
LISTENS_AT = "/run/qubes-restore-worker/calls.sock"

#: What both packages install that have a command which verifies.
WATCH = {
    "/usr/bin/qubes-restore-watch",
    "/usr/share/man/man1/qubes-restore-watch.1.gz",
    "/usr/share/bash-completion/completions/qubes-restore-watch",
    "/usr/share/fish/vendor_completions.d/qubes-restore-watch.fish",
    "/usr/lib/systemd/system/qubes-restore-watch@.service",
    "/usr/lib/systemd/system/qubes-restore-watch@.timer",
    "/usr/lib/systemd/user/qubes-restore-watch@.service",
    "/usr/lib/systemd/user/qubes-restore-watch@.service.d/notify.conf",
    "/usr/lib/systemd/user/qubes-restore-watch@.timer",
    "/usr/lib/systemd/user/qubes-restore-watch-notify@.service",
    "/usr/libexec/qubes-restore-svc/watch-notify",
    *(
        f"/usr/share/qubes-restore-svc/{path.relative_to(REPOSITORY)}"
        for path in (REPOSITORY / "fleet").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    ),
}

#: All that the packages install beside Python code. A key is the end of a package's name.
OTHERS = {
    "common": {"/usr/share/qubes-restore-svc/schema/documents-1.json"},
    "tools": {
        *WATCH,
        "/usr/libexec/qubes-restore-svc/qvm-backup-restore",
        "/usr/share/qubes-restore-svc/completion/_qvm-backup-restore",
        "/usr/share/qubes-restore-svc/completion/qvm-backup-restore.bash",
        "/usr/share/qubes-restore-svc/completion/qvm-backup-restore.fish",
        "/usr/share/qubes-restore-svc/man/man1/qvm-backup-restore.1.gz",
    },
    "manager": {
        "/usr/bin/qubes-restore-manager",
        "/usr/share/applications/qubes-restore-manager.desktop",
        "/usr/share/man/man1/qubes-restore-manager.1.gz",
    },
    "dom0": {
        *(f"/etc/qubes-rpc/{name}" for name in DOM0_SERVICES),
        "/etc/qubes-restore-svc/config.yaml",
        "/etc/qubes/policy.d/31-qubes-restore-svc.policy",
        "/etc/qubes/policy.d/include/qubes-restore-svc",
        "/usr/lib/tmpfiles.d/qubes-restore-svc-dom0.conf",
        "/usr/share/doc/qubes-restore-svc-dom0/administration.md",
        "/usr/share/doc/qubes-restore-svc-dom0/configuration.md",
    },
    "vm": {
        *(f"/etc/qubes-rpc/{name}" for name in SERVICES),
        *(f"/etc/qubes/rpc-config/{name}" for name in SERVICES),
        "/etc/qubes/post-install.d/20-qubes-restore-svc.sh",
        "/usr/lib/systemd/system-preset/75-qubes-restore-worker.preset",
        "/usr/lib/systemd/system/qubes-restore-worker.service",
        "/usr/lib/systemd/system/qubes-restore-worker.socket",
    },
    "": {
        *WATCH,
        "/usr/bin/qubes-restore-svc",
        "/usr/share/bash-completion/completions/qubes-restore-svc",
        "/usr/share/fish/vendor_completions.d/qubes-restore-svc.fish",
        "/usr/share/man/man1/qubes-restore-svc.1.gz",
        "/usr/share/qubes-restore-svc/schema/documents-1.json",
    },
}

#: Commands that zsh completes; its folder is the distribution's.
COMPLETED = {"tools": ["qubes-restore-watch"], "": ["qubes-restore-watch", "qubes-restore-svc"]}

PROGRAMS = {
    *(f"/etc/qubes-rpc/{name}" for name in DOM0_SERVICES),
    "/etc/qubes/post-install.d/20-qubes-restore-svc.sh",
    "/usr/bin/qubes-restore-manager",
    "/usr/bin/qubes-restore-svc",
    "/usr/bin/qubes-restore-watch",
    "/usr/libexec/qubes-restore-svc/qvm-backup-restore",
    "/usr/libexec/qubes-restore-svc/watch-notify",
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
    "common": code("", "client", "wire") | {"py.typed"},
    "tools": code("cli", "watch"),
    "manager": code("manager"),
    "dom0": code("broker", "qubes", "dom0_service"),
    "vm": code("archive", "kdf", "worker"),
    "": code("", *(FOLDERS - {"manager", "qubes", "dom0_service"})) | {"__main__.py", "py.typed"},
}
#: Those that are installed in dom0; a GUI domain has no "dom0".
FOR_DOM0 = ("common", "tools", "manager", "dom0")


def compiled(package: Package) -> set[str]:
    return {name for name in package.modules if name.endswith(".so")}


def names_in(dependencies: frozenset[str]) -> set[str]:
    return {dependency.split()[0] for dependency in dependencies if dependency}


# --- Which files ---------------------------------------------------------------------------------


def test_these_packages_are_made(rpms: Packages, debs: Packages) -> None:
    assert set(rpms) == {"", "common", "tools", "manager", "dom0", "vm"}
    assert set(debs) == {"", "common", "tools", "manager", "vm"}


def test_a_package_installs_exactly_these_files(packages: Packages) -> None:
    for name, package in packages.items():
        assert package.modules - compiled(package) == MODULES[name], name
        files = {file for file in package.files if not file.startswith(package.site)}
        zsh = "vendor-completions" if package.site.endswith("dist-packages") else "site-functions"
        completion = {f"/usr/share/zsh/{zsh}/_{command}" for command in COMPLETED.get(name, ())}
        assert files == OTHERS[name] | completion, name
        assert len(compiled(package)) == (name in ("vm", "")), name


def test_dom0_gets_all_but_the_parsers_and_what_is_for_any_machine() -> None:
    assert MODULES["vm"] == code(*UNTRUSTED)
    assert set().union(*(MODULES[name] for name in FOR_DOM0)) == code(
        "", *(FOLDERS - UNTRUSTED - {"local"})
    ) | {"py.typed"}


def test_no_file_is_in_two_packages(packages: Packages) -> None:
    """But those of the one for any machine, which none of the others is installed beside."""
    for one, other in combinations(sorted(set(packages) - {""}), 2):
        assert not packages[one].files & packages[other].files, (one, other)


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
            if name.startswith(package.site) and name.endswith(".py")
        }
        assert {
            name.partition(".cpython-")[0] for name in package.entries if name.endswith(".pyc")
        } == sources


def test_an_rpm_owns_the_directories_that_nobody_else_has(rpms: Packages) -> None:
    """Otherwise they stay when it is removed."""
    shared = {"/", "/etc", "/etc/qubes", "/etc/qubes-rpc", "/etc/qubes/policy.d",
              "/etc/qubes/policy.d/include", "/etc/qubes/post-install.d", "/etc/qubes/rpc-config", "/usr",
              "/usr/bin", "/usr/lib", "/usr/lib/systemd", "/usr/lib/systemd/system",
              "/usr/lib/systemd/system-preset", "/usr/lib/systemd/user", "/usr/lib/tmpfiles.d",
              "/usr/libexec", "/usr/share",
              "/usr/share/applications", "/usr/share/doc", "/usr/share/licenses", "/usr/share/man",
              "/usr/share/man/man1", "/var", "/var/log",
              # Fedora's package filesystem has the places for completion.
              "/usr/share/bash-completion", "/usr/share/bash-completion/completions", "/usr/share/fish",
              "/usr/share/fish/vendor_completions.d", "/usr/share/zsh",
              "/usr/share/zsh/site-functions"}  # fmt: skip
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
    for name in FOR_DOM0:
        package = rpms[name]
        folders = {module.split("/")[0] for module in package.modules}
        assert folders and not folders & UNTRUSTED
        assert not [file for file in package.entries if file.endswith(".so")]
        assert not names_in(package.requires) & (PARSERS | {"qubes-restore-svc", "qubes-restore-svc-vm"})


def test_the_packages_with_parsers_cannot_be_installed_beside_dom0s(rpms: Packages) -> None:
    assert names_in(rpms["dom0"].conflicts) == {"qubes-restore-svc-vm"}
    assert names_in(rpms[""].conflicts) == {"qubes-restore-svc-dom0"}


def test_packages_that_hold_the_same_files_exclude_each_other_on_debian(debs: Packages) -> None:
    sharing = {name for name, package in debs.items() if name and package.modules & debs[""].modules}
    assert names_in(debs[""].conflicts) == {f"qubes-restore-svc-{name}" for name in sharing}
    for name in sharing:
        assert names_in(debs[name].conflicts) == {"qubes-restore-svc"}


def test_a_gui_domain_can_share_its_template_with_the_worker(packages: Packages) -> None:
    for name in ("common", "tools", "manager"):
        assert not names_in(packages[name].conflicts) & {"qubes-restore-svc-vm", "qubes-restore-svc-dom0"}


# --- What they say of themselves -----------------------------------------------------------------


def test_a_package_has_the_version_of_the_code(packages: Packages) -> None:
    assert {package.version for package in packages.values()} == {__version__}


def test_the_packages_need_each_other_in_exactly_their_version(rpms: Packages, debs: Packages) -> None:
    for name in ("tools", "manager", "vm"):
        assert f"qubes-restore-svc-common = {__version__}-1" in rpms[name].requires
        assert f"qubes-restore-svc-common (= {__version__}-1)" in debs[name].requires
    for name in ("manager", "dom0"):
        assert f"qubes-restore-svc-tools = {__version__}-1" in rpms[name].requires
    assert f"qubes-restore-svc-common = {__version__}-1" in rpms["dom0"].requires
    assert f"qubes-restore-svc-tools (= {__version__}-1)" in debs["manager"].requires


def test_dom0_needs_no_dialog_and_a_gui_domain_no_dom0(packages: Packages) -> None:
    ours = {
        name: {need.removeprefix("qubes-restore-svc-") for need in names_in(package.requires)}
        & {"common", "tools", "manager", "dom0", "vm"}
        for name, package in packages.items()
    }
    wanted = {"": set[str](), "common": set[str](), "tools": {"common"}, "manager": {"common", "tools"},
              "dom0": {"common", "tools"}, "vm": {"common"}}  # fmt: skip
    assert ours == {name: wanted[name] for name in packages}


@pytest.mark.parametrize("name", ["vm", ""])
def test_what_reads_backups_needs_the_libraries_that_the_code_imports(packages: Packages, name: str) -> None:
    assert names_in(packages[name].requires) >= PARSERS


def test_dom0_needs_the_libraries_that_the_code_imports(rpms: Packages) -> None:
    assert names_in(rpms["dom0"].requires) >= {"qubes-core-admin-client", "python3-pyyaml"}


def test_the_common_parts_need_the_libraries_that_the_code_imports(rpms: Packages, debs: Packages) -> None:
    assert "python3-pydantic >= 2.8" in rpms["common"].requires
    assert "python3-pydantic (>= 2.8)" in debs["common"].requires
    assert "python3-tqdm" in names_in(rpms["tools"].requires) & names_in(debs["tools"].requires)


def test_nothing_but_the_dialog_needs_a_graphical_library(packages: Packages) -> None:
    graphical = {"qubes-manager", "python3-pyqt6"}
    for name, package in packages.items():
        assert names_in(package.requires) & graphical == (graphical if name == "manager" else set()), name


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


@pytest.mark.parametrize("name", DOM0_SERVICES)
def test_a_service_of_dom0_runs_its_program_and_passes_nothing_of_the_callers(
    rpms: Packages, name: str
) -> None:
    path = f"/etc/qubes-rpc/{name}"
    assert not rpms["dom0"].entries[path].config  # an update replaces it
    first, *lines = (rpms["dom0"].root / path.lstrip("/")).read_text().splitlines()
    assert first == "#!/bin/sh"
    commands = [line for line in lines if not line.startswith("#")]
    assert commands == [f"exec /usr/bin/python3 -I -m qubes_restore_svc.dom0_service {name}"]


def test_the_services_of_dom0_run_as_whom_qrexec_runs_them(rpms: Packages) -> None:
    """A configuration with `force-user` would be of no use there, and ends calls of dom0 to itself."""
    assert not [name for name in rpms["dom0"].entries if "rpc-config" in name]


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
