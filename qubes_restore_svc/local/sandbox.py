"""The sandbox around a local worker: bubblewrap's command line, and why there may be none.

Strategy: nothing is hidden, little is shown. Every namespace is new; the root is an empty, read-only tmpfs
in which only the files of the worker's Python appear; nothing can be written anywhere. There is no /proc:
through /proc/self/fd a process of the same user could open the backup again, for writing; and so a
container that forbids new /proc mounts can run the sandbox too. Descriptors that are passed in stay usable
across the namespaces: the worker forbids itself most system calls before it is ready, and with them what
could be done with those (`worker/system_calls.py`).
"""

import errno
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from qubes_restore_svc.errors import RestoreError, SandboxUnavailable, exhausted
from qubes_restore_svc.local.interpreter import needed_paths, same_layout
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
        advice=f"Ask whoever administers it to allow them for bubblewrap. {_WITHOUT}",
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
