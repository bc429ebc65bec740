"""The sandbox around a local worker: bubblewrap's command line, the worker's own, and the errors if there can
be no sandbox.

Strategy: nothing is hidden, little is shown. Every namespace is new; the root is an empty, read-only tmpfs in
which only the files of the worker's Python appear; nothing can be written anywhere. There is no /proc:
through /proc/self/fd a process of the same user could open the backup again, for writing; and so a container
that forbids new /proc mounts can run the sandbox too. Descriptors that are passed in stay usable across the
namespaces: so the worker forbids itself most system calls before it is ready, and can do little with such a
descriptor (`worker/system_calls.py`).

The worker finds its modules where this process found them: the same interpreter, in isolated mode, with the
same module path, so that every way of installing works (system packages, a virtual environment, the user's
site directory, an editable install). The sandbox shows only the places that hold the interpreter, libraries
and this package, under the same names as outside. A directory that happens to contain one of them, such as a
home directory, is otherwise empty.

Only the worker knows which engine derives the keys, and the broker's side imports nothing of it. So the
worker is asked, in a process of its own. That process has no archive and no input, so it needs no sandbox.
"""

import asyncio
import errno
import os
import platform
import sys
import sysconfig
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import qubes_restore_svc
from qubes_restore_svc.errors import RestoreError, SandboxUnavailable, exhausted
from qubes_restore_svc.wire.names import strip_control

#: The user and the group that the worker sees itself as; outside it is still the one who started it.
NOBODY = 65534

_ISOLATION = (
    *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net"),
    "--unshare-cgroup-try",
    *("--uid", str(NOBODY), "--gid", str(NOBODY), "--cap-drop", "ALL"),
    *("--hostname", "restore-worker", "--new-session", "--die-with-parent"),
)
_DEVICES = ("/dev/null", "/dev/urandom")

_WITHOUT = (
    "With --no-sandbox it works without; a malicious backup that takes over the worker then has"
    " your files and your network."
)
#: Commands that install bubblewrap, by ID or ID_LIKE of os-release(5), the more special first.
_INSTALL = {
    "qubes": "sudo qubes-dom0-update bubblewrap",
    "debian": "sudo apt install bubblewrap",
    "ubuntu": "sudo apt install bubblewrap",
    "fedora": "sudo dnf install bubblewrap",
    "rhel": "sudo dnf install bubblewrap",
    "arch": "sudo pacman -S bubblewrap",
    "suse": "sudo zypper install bubblewrap",
    "alpine": "sudo apk add bubblewrap",
}
#: Kernel settings that forbid user namespaces, and the value with which they do.
_SETTINGS = {
    "kernel.apparmor_restrict_unprivileged_userns": "1",
    "kernel.unprivileged_userns_clone": "0",
    "user.max_user_namespaces": "0",
}


def find_bubblewrap() -> str:
    """Path of the program; raises SandboxUnavailable with the command that installs it."""
    program = find_program("bwrap")
    if program is None:
        raise SandboxUnavailable(
            "bubblewrap, which isolates the worker, is not installed",
            advice=f"Install it ({_install_command()}) and try again. {_WITHOUT}",
        )
    return program


def find_program(name: str) -> str | None:
    """Path of a program; nothing that the current directory brings is one."""
    for directory in os.get_exec_path():
        program = os.path.join(directory, name)
        if os.path.isabs(program) and os.path.isfile(program) and os.access(program, os.X_OK):
            return program
    return None


def sandbox_command(
    bubblewrap: str,
    command: Sequence[str],
    *,
    status_fd: int,
    disable_userns: bool,
) -> list[str]:
    """The command line that runs `command` in the sandbox.

    bubblewrap tells on `status_fd` (JSON lines) the process that everything inside ends with, and the exit
    code if the command was started at all. Versions before 0.8 do not know `disable_userns`. All other open
    descriptors reach the command.
    """
    return [
        bubblewrap,
        *_ISOLATION,
        *(("--disable-userns",) if disable_userns else ()),
        *("--json-status-fd", str(status_fd)),
        *same_layout(needed_paths()),
        *(option for device in _DEVICES for option in ("--dev-bind", device, device, "--remount-ro", device)),
        *("--remount-ro", "/", "--chdir", "/", "--"),
        *command,
    ]


def sandbox_failed(words: str) -> RestoreError:
    """The error for a bubblewrap that could not do it and said `words` on standard error."""
    for number in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        if os.strerror(number) in words and (found := exhausted(OSError(number, ""))) is not None:
            return found
    lines = [strip_control(line).removeprefix("bwrap: ") for line in words.splitlines() if line.strip()]
    reason = (
        f"bubblewrap cannot isolate the worker here: {lines[-1][:300].rstrip('. ')}"
        if lines
        else ("bubblewrap cannot isolate the worker here, and does not say why")
    )
    setting = _forbidding_setting()
    if setting is None:
        return SandboxUnavailable(reason, advice=_WITHOUT)
    return SandboxUnavailable(
        f"{reason} (this system sets {setting}, which forbids user namespaces)",
        advice=f"Ask its administrator to allow them for bubblewrap. {_WITHOUT}",
    )


def _install_command() -> str:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    names = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    for name in names:
        if name in _INSTALL:
            return _INSTALL[name]
    return "its package is called bubblewrap"


def _forbidding_setting(settings: Path = Path("/proc/sys")) -> str | None:
    for name, value in _SETTINGS.items():
        try:
            found = settings.joinpath(*name.split(".")).read_text().strip()
        except OSError:
            continue
        if found == value:
            return f"{name} = {value}"
    return None


#: Runs the worker's main module with the module path that comes as the first argument.
_BOOT = (
    "import runpy, sys;"
    " sys.path[:] = sys.argv.pop(1).split(':');"
    " runpy.run_module('qubes_restore_svc.worker', run_name='__main__', alter_sys=True)"
)

_LIBRARY_DIRECTORIES = ("lib", "lib32", "lib64")
#: Where everything lies, libraries too, under names that nobody lists (Nix, Guix).
_STORES = ("/nix/store", "/gnu/store")
_MAX_LINKS = 40

_ENGINE_TIMEOUT_S = 20
_MAX_ENGINE = 100  #: bytes of its name


def worker_command() -> list[str]:
    """The command that runs `qubes_restore_svc.worker`; its options are to be appended."""
    return [*python_command(), _BOOT, os.pathsep.join(_module_path())]


async def worker_engine() -> str | None:
    """Name and version of the engine, printable and on one line; None if the worker does not say."""
    command = [*worker_command(), "--engine"]
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)
    except OSError:
        return None
    try:
        async with asyncio.timeout(_ENGINE_TIMEOUT_S):
            answer, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return None
    name = answer[:_MAX_ENGINE].decode("ascii", "replace").strip()
    return name if process.returncode == 0 and name.isascii() and name.isprintable() and name else None


def python_command() -> list[str]:
    """This interpreter, isolated from environment, user and current directory; it writes no byte code."""
    return [sys.executable, "-I", "-B", "-c"]


def needed_paths() -> list[str]:
    """Files and directories without which the worker's Python cannot run; some may not exist."""
    prefixes = dict.fromkeys((sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix))
    stores = [store for store in _STORES if os.path.realpath(sys.executable).startswith(f"{store}/")]
    return [
        *(f"/{name}" for name in _LIBRARY_DIRECTORIES),
        *(f"/usr/{name}" for name in _LIBRARY_DIRECTORIES),
        "/etc/ld.so.cache",
        *stores,
        *(f"{prefix}/{name}" for prefix in prefixes for name in (*_LIBRARY_DIRECTORIES, "pyvenv.cfg")),
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")),
        sys.executable,
        *(entry for entry in sys.path if _holds_packages(entry)),
        *qubes_restore_svc.__path__,
        # Other than the above where an editable install consists of links to the single files.
        os.path.dirname(os.path.realpath(qubes_restore_svc.__file__)),
    ]


def same_layout(paths: Iterable[str]) -> list[str]:
    """bubblewrap's options that show `paths`, read-only, under the names that they have outside.

    Each symbolic link on the way is made again and each real place is bound, once. What
    does not exist is left out. The root itself is never bound.
    """
    places: set[str] = set()
    links: dict[str, str] = {}
    for path in paths:
        place, passed = _resolve(path)
        links.update(passed)
        if place not in (None, "/"):
            places.add(str(place))
    options: list[str] = []
    for place in sorted(places):
        if not _is_below(place, places):
            options += ["--ro-bind", place, place]
    for link, target in sorted(links.items()):
        if not _is_below(link, places):
            options += ["--symlink", target, link]
    return options


def _module_path() -> list[str]:
    """Where this process finds modules. The place of this package comes before installed copies."""
    entries = [entry for entry in sys.path if os.path.isabs(entry) and os.pathsep not in entry]
    parents = [str(Path(place).parent) for place in qubes_restore_svc.__path__]
    first_site = next((i for i, entry in enumerate(entries) if _holds_packages(entry)), len(entries))
    missing = [parent for parent in parents if parent not in entries]
    return entries[:first_site] + missing + entries[first_site:]


def _holds_packages(entry: str) -> bool:
    return os.path.isabs(entry) and os.path.basename(entry) in ("site-packages", "dist-packages")


def _resolve(path: str) -> tuple[str | None, dict[str, str]]:
    """The real place of `path` (None: nothing there) and the links passed on the way, with their targets."""
    passed: dict[str, str] = {}
    here = "/"
    ahead = _parts(path)
    hops = 0
    while ahead:
        part = ahead.pop(0)
        following = os.path.dirname(here) if part == ".." else os.path.join(here, part)
        if os.path.islink(following):
            hops += 1
            if hops > _MAX_LINKS:
                return None, {}
            target = os.readlink(following)
            passed[following] = target
            ahead = [*_parts(target), *ahead]
            here = "/" if os.path.isabs(target) else here
        elif os.path.exists(following):
            here = following
        else:
            return None, {}
    return here, passed


def _parts(path: str) -> list[str]:
    return [part for part in PurePosixPath(path).parts if part != "/"]


def _is_below(path: str, places: Iterable[str]) -> bool:
    return any(path != place and PurePosixPath(path).is_relative_to(place) for place in places)
