"""A scratch system that packages can be installed on: a directory with a shell, a few tools and a database.

Strategy: rpm and dpkg do what they do on a real one, scriptlets included, in a chroot. Of the programs that
scriptlets and hooks call, those that would act on a machine are replaced by one that notes its arguments.
Whoever is not root becomes it in a namespace, which has one user only; owners are not looked at here.
"""

import functools
import os
import shutil
import subprocess
from pathlib import Path

from tests.packaging.packages import Package

_TOOLS = (
    "sh",
    "cat",
    "find",
    "grep",
    "ln",
    "mkdir",
    "readlink",
    "rm",
    "rmdir",
    "sed",
    "touch",
    "true",
    "xargs",
)
_TIMEOUT_S = 60
_RECORDER = '#!/bin/sh\necho "${0##*/} $*" >> /calls\n'
_DATABASES = ("var/lib/rpm", "var/lib/dpkg", "calls")


class ScratchSystem:
    """The system in `root`, which is made here. `recorded`: programs that only note how they are called."""

    def __init__(self, root: Path, recorded: tuple[str, ...] = ()) -> None:
        self.root = root
        for folder in ("usr/bin", "usr/lib", "usr/lib64", "usr/sbin", "etc", "dev", "var/log", "var/tmp"):
            (root / folder).mkdir(parents=True)
        for name in ("bin", "lib", "lib64", "sbin"):
            (root / name).symlink_to(f"usr/{name}")
        (root / "dev/null").touch()
        for tool in _TOOLS:
            self._take(tool)
        for name in recorded:
            (root / "usr/bin" / name).write_text(_RECORDER)
            (root / "usr/bin" / name).chmod(0o755)
        for folder in ("info", "updates", "triggers"):
            (root / "var/lib/dpkg" / folder).mkdir(parents=True)
        (root / "var/lib/dpkg/status").touch()

    def install(self, *packages: Package) -> str:
        """Install these packages, without those that they need; returns what was said."""
        return self._manage("--install", "--install", packages)

    def reinstall(self, *packages: Package) -> str:
        """Put the packages in the place of themselves, as an upgrade does."""
        return self._manage("--reinstall", "--install", packages)

    def upgrade(self, package: Path) -> str:
        """Put the package in the file in the place of the version before."""
        if package.suffix == ".rpm":
            return self._rpm("--upgrade", str(package))
        return self._dpkg("--install", str(package))

    def remove(self, *packages: Package) -> str:
        """Remove them."""
        if packages[0].path.suffix == ".rpm":
            return self._rpm("--erase", *(package.name for package in packages))
        return self._dpkg("--remove", *(package.name for package in packages))

    def purge(self, *packages: Package) -> str:
        """Remove Debian packages with their configuration."""
        return self._dpkg("--purge", *(package.name for package in packages))

    def run(self, *command: str) -> str:
        """Run a program of the scratch system on it."""
        return self._run("chroot", str(self.root), *command)

    def calls(self) -> list[str]:
        """How the recorded programs were called since the last time this was asked."""
        try:
            return (self.root / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []
        finally:
            (self.root / "calls").unlink(missing_ok=True)

    def files(self) -> set[str]:
        """All that is there, but the package managers' databases."""
        found = {str(path.relative_to(self.root)) for path in self.root.rglob("*")}
        return {name for name in found if not name.startswith(_DATABASES)}

    def _manage(self, rpm_action: str, dpkg_action: str, packages: tuple[Package, ...]) -> str:
        files = [str(package.path) for package in packages]
        if packages[0].path.suffix == ".rpm":
            return self._rpm(rpm_action, *files)
        return self._dpkg(dpkg_action, *files)

    def _rpm(self, *arguments: str) -> str:
        return self._run("rpm", f"--root={self.root}", "--dbpath=/var/lib/rpm", "--nodeps", *arguments)

    def _dpkg(self, *arguments: str) -> str:
        return self._run(
            "dpkg",
            f"--root={self.root}",
            "--force-depends",
            "--force-bad-path",
            "--force-confold",
            *arguments,
        )

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            [*as_root(), *command],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
        )
        assert done.returncode == 0, (command, done.stdout)
        return done.stdout

    def _take(self, tool: str) -> None:
        program = shutil.which(tool, path="/usr/bin:/bin")
        assert program, tool
        listed = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
        libraries = [word for word in listed.split() if word.startswith("/")]
        for path in (program, *libraries):
            target = self.root / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copy(os.path.realpath(path), target)


@functools.cache
def as_root() -> tuple[str, ...]:
    """What makes a command run as root, if it is not already."""
    return () if os.geteuid() == 0 else ("unshare", "--user", "--map-root-user")


@functools.cache
def cannot_become_root() -> bool:
    """Is there no way to be root here, not even in a namespace?"""
    return subprocess.run([*as_root(), "chroot", "/", "/bin/true"], capture_output=True).returncode != 0
