"""Packages as a test sees them: built from the work tree, their lists read, their files unpacked.

Strategy: the makefile's own targets build, into a directory of the test; rpm's and dpkg's own tools read.
What differs between the two kinds ends here: a test gets one `Package` for either.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tests.support.fixtures import REPOSITORY

SYSTEM_PYTHON = "/usr/bin/python3"

_TIMEOUT_S = 300
_PROGRAMS = {
    "rpm": ("make", "rpmbuild", "rpm2cpio", "cpio", "cc"),
    "deb": ("make", "dpkg-buildpackage", "dh", "dh_python3", "cc"),
}
_CAN_COMPILE = """
import os, setuptools, sysconfig
os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))
"""

_RPM_FILE = (
    "[%{FILENAMES}\t%{FILEMODES:perms}\t%{FILEUSERNAME}\t%{FILEGROUPNAME}\t%{FILEFLAGS}\t%{FILELINKTOS}\n]"
)
_RPM_CONFIG, _RPM_NOREPLACE = 1 << 0, 1 << 4  # rpmfileAttrs_e
#: A package of files that are there.
_SPEC = """
%global __os_install_post %nil
%global debug_package %nil
Name: {name}
Version: 999
Release: 1
Summary: later
License: as before
AutoReqProv: no
%description
%install
cp -a {tree}/. %buildroot
%files
%defattr(-,root,root)
{files}
"""
_DEB_LINE = re.compile(r"(\S{10}) (\w+)/(\w+) +\d+ \S+ \S+ \.(/.*?)(?: -> (.*))?")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file as it will be installed. `mode` as `ls` writes it; `target` of a symbolic link."""

    mode: str
    owner: str
    group: str
    target: str = ""
    config: bool = False
    noreplace: bool = False

    @property
    def is_directory(self) -> bool:
        return self.mode.startswith("d")


@dataclass(frozen=True, slots=True)
class Package:
    """A package: its file, what it says of itself, and below `root` what it installs."""

    path: Path
    name: str
    version: str
    requires: frozenset[str]
    conflicts: frozenset[str]
    entries: dict[str, Entry]
    root: Path
    site: str  #: where Python packages are, on the installed system

    @property
    def files(self) -> set[str]:
        """All that is installed but directories, byte code and the licence's and the changelog's copies."""
        return {
            name
            for name, entry in self.entries.items()
            if not entry.is_directory
            and not name.endswith(".pyc")
            and PurePosixPath(name).name not in ("LICENSE", "copyright", "changelog.Debian.gz")
        }

    @property
    def modules(self) -> set[str]:
        """The Python files, by their path within `qubes_restore_svc`."""
        prefix = f"{self.site}/qubes_restore_svc/"
        return {name.removeprefix(prefix) for name in self.files if name.startswith(prefix)}


def cannot_build(kind: str) -> str:
    """Why packages of this kind cannot be built here; empty if they can."""
    missing = [program for program in _PROGRAMS[kind] if shutil.which(program) is None]
    if not missing and subprocess.run([SYSTEM_PYTHON, "-c", _CAN_COMPILE], capture_output=True).returncode:
        missing = ["setuptools or the headers of the system's Python"]
    return f"no {', no '.join(missing)} here" if missing else ""


def make(target: str, output: Path, tree: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """`make rpm` or `make deb`, with its packages in `output`.

    The extension is compiled without optimisation, which takes a third of the time.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    compiler = output.with_name(f"{output.name}-cc")
    compiler.write_text('#!/bin/sh\nexec cc "$@" -O0\n')
    compiler.chmod(0o755)
    environment["CC"] = str(compiler)
    return subprocess.run(
        ["make", target, f"{target.upper()}={output}"],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )


def newer(package: Package, directory: Path, added: str) -> Path:
    """A later version of the package, which has `added` at the end of every configuration file."""
    tree = directory / "tree"
    debian = package.path.suffix == ".deb"
    if debian:
        _run("dpkg-deb", "-R", str(package.path), str(tree))
    else:
        shutil.copytree(package.root, tree, symlinks=True)
    for name, entry in package.entries.items():
        if entry.config:
            with (tree / name.lstrip("/")).open("a") as file:
                file.write(added)
    if debian:
        control = tree / "DEBIAN/control"
        control.write_text(re.sub("^Version: .*$", "Version: 999-1", control.read_text(), flags=re.M))
        _run("dpkg-deb", "--root-owner-group", "-b", str(tree), str(directory / "newer.deb"))
        return directory / "newer.deb"
    files = [
        f"%config{'(noreplace)' if entry.noreplace else ''} {name}" if entry.config else name
        for name, entry in package.entries.items()
        if not entry.is_directory
    ]
    spec = directory / "newer.spec"
    spec.write_text(_SPEC.format(name=package.name, tree=tree, files="\n".join(files)))
    _run("rpmbuild", "-bb", "--quiet", "--define", f"_topdir {directory}", str(spec))
    [built] = directory.glob("RPMS/*/*.rpm")
    return built


def read_rpm(path: Path, root: Path) -> Package:
    """The RPM package in the file, unpacked below `root`."""
    entries = {}
    for line in _run("rpm", "-qp", "--qf", _RPM_FILE, str(path)).splitlines():
        name, mode, owner, group, flags, target = line.split("\t")
        config = bool(int(flags) & _RPM_CONFIG)
        entries[name] = Entry(mode, owner, group, target, config, bool(int(flags) & _RPM_NOREPLACE))
    content = subprocess.run(["rpm2cpio", str(path)], check=True, stdout=subprocess.PIPE).stdout
    root.mkdir(parents=True)
    subprocess.run(
        ["cpio", "-idm", "--quiet", "--no-absolute-filenames"], check=True, cwd=root, input=content
    )
    name, version = _run("rpm", "-qp", "--qf", "%{NAME}\n%{VERSION}\n", str(path)).splitlines()
    return Package(
        path,
        name,
        version,
        frozenset(_run("rpm", "-qp", "--requires", str(path)).splitlines()),
        frozenset(_run("rpm", "-qp", "--conflicts", str(path)).splitlines()),
        entries,
        root,
        _site(entries),
    )


def read_deb(path: Path, root: Path) -> Package:
    """The Debian package in the file, unpacked below `root`."""
    control = root.parent / f"{root.name}.control"
    _run("dpkg-deb", "-x", str(path), str(root))
    _run("dpkg-deb", "-e", str(path), str(control))
    kept = control / "conffiles"
    config = set(kept.read_text().split()) if kept.exists() else set()
    entries = {}
    for line in _run("dpkg-deb", "-c", str(path)).splitlines():
        match = _DEB_LINE.fullmatch(line)
        assert match, line
        mode, owner, group, name, target = match.groups()
        # dpkg asks before it replaces a changed one, and keeps it unless told otherwise.
        entries[name.rstrip("/")] = Entry(mode, owner, group, target or "", name in config, name in config)
    fields = {
        field: _run("dpkg-deb", "-f", str(path), field).strip()
        for field in ("Package", "Version", "Depends", "Conflicts")
    }
    return Package(
        path,
        fields["Package"],
        fields["Version"].rpartition("-")[0],
        frozenset(re.split(r",\s*", fields["Depends"])),
        frozenset(re.split(r",\s*", fields["Conflicts"])),
        entries,
        root,
        _site(entries),
    )


def together(packages: Sequence[Package], root: Path) -> Path:
    """Lay the files of these packages into one tree, as on a system; returns where Python finds them."""
    for package in packages:
        shutil.copytree(package.root, root, symlinks=True, dirs_exist_ok=True)
    [site] = {package.site for package in packages}
    return root / site.lstrip("/")


def run_python(*arguments: str, path: Sequence[Path]) -> subprocess.CompletedProcess[str]:
    """Run the Python of the tests, with code from `path` ahead of its own libraries.

    It is told where these are (-S), so that it does not learn of the work tree, which is installed there too.
    """
    libraries = [*path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(map(str, libraries))}
    return subprocess.run(
        [sys.executable, "-S", "-B", *arguments],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )


def _site(entries: dict[str, Entry]) -> str:
    found = {name.partition("/qubes_restore_svc/")[0] for name in entries if "/qubes_restore_svc/" in name}
    assert len(found) == 1, found
    return found.pop()


def _run(*command: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout
