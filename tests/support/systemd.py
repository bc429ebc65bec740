"""A real systemd, started for a test beside the one that may run here: process 1 of its own namespaces."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_SYSTEMD = Path("/usr/lib/systemd/systemd")
_NAMESPACES = ("--mount", "--pid", "--mount-proc", "--ipc", "--uts", "--net", "--cgroup")
_TIMEOUT_S = 60
#: The topmost control groups that a systemd makes.
_GROUPS = frozenset({"init.scope", "system.slice"})

#: Becomes a systemd with the units of a directory alone, and with a /run of its own.
_BOOT = """
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
[ ! -e /dev/console ] || mount --bind /dev/null /dev/console
mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys
exec env -i container=test PATH=/usr/bin:/usr/sbin SYSTEMD_UNIT_PATH="$1" \
  SYSTEMD_GENERATOR_PATH=/nonexistent SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/nonexistent \
  "$2" --system --unit=boot.target --log-target=null --show-status=no --default-standard-output=null
"""


@contextlib.contextmanager
def started_systemd(units: Path, wanted: str, address: str) -> Iterator[tuple[int, socket.socket]]:
    """A systemd that knows the units in this directory, with its process id outside.

    It starts the socket unit `wanted`, whose socket is at `address`: there the connection is.
    """
    unshare = ["unshare", *_NAMESPACES, "--fork"]
    if os.getuid() != 0 or not _SYSTEMD.exists() or subprocess.run([*unshare, "true"]).returncode:
        pytest.skip("to start a systemd takes root, namespaces and a systemd")
    for target in ("sysinit", "basic", "sockets", "shutdown", "boot"):
        (units / f"{target}.target").write_text("[Unit]\nDefaultDependencies=no\nAllowIsolate=yes\n")
    with (units / "boot.target").open("a") as boot:
        boot.write(f"Requires={wanted}\nAfter={wanted}\n")
    before = set(Path("/sys/fs/cgroup").glob("**/"))
    command = [*unshare, "--kill-child", "sh", "-c", _BOOT, "sh", str(units), str(_SYSTEMD)]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as system,
        socket.socket(socket.AF_UNIX) as connection,
    ):
        try:
            yield _connect(system, connection, address), connection
        finally:
            for process in _children(system):
                os.kill(process, signal.SIGKILL)  # and with it all that it has started
    for group in sorted(set(Path("/sys/fs/cgroup").glob("**/")) - before, reverse=True):
        # Others make groups too, and one that is empty yet is not ours to remove.
        if _GROUPS.isdisjoint(group.parts):
            continue
        with contextlib.suppress(OSError):
            group.rmdir()


def _connect(system: "subprocess.Popen[bytes]", connection: socket.socket, address: str) -> int:
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        with contextlib.suppress(OSError):
            for first in _children(system):
                connection.connect(f"/proc/{first}/root{address}")
                return first
        assert system.poll() is None and time.monotonic() < deadline, "systemd does not start the socket"
        time.sleep(0.02)


def _children(system: "subprocess.Popen[bytes]") -> list[int]:
    found = Path(f"/proc/{system.pid}/task/{system.pid}/children").read_text()
    return [int(child) for child in found.split()]
