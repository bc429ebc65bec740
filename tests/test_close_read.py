"""Closing what was only read from: an error that comes then changes nothing, wherever it comes."""

import errno
import fcntl
import os
import re
import socket
import sys
from pathlib import Path
from types import FrameType

import pytest

from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.local.directory import DirectoryHost
from qubes_restore_svc.local.sandbox_link import LocalLink
from tests.local.probes import INTERPRETER, needs_bubblewrap
from tests.local.sample_qubes import restore

PACKAGE = Path(__file__).resolve().parents[1] / "qubes_restore_svc"
#: Where a descriptor is closed that was written to, and how often.
WRITTEN = {
    "cli/terminal.py": 1,
    "hardening.py": 1,
    "broker/image_directory.py": 1,
    "local/directory.py": 1,
    "broker/filesystem.py": 1,
    "qubes/volume.py": 1,
}


def _is_ours(frame: FrameType) -> bool:
    return Path(frame.f_code.co_filename).is_relative_to(PACKAGE)


@pytest.fixture
def closing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the package closes a socket, or what is open for reading only, it is closed, and EIO comes."""
    close, close_socket = os.close, socket.socket.close

    def failing_close(fd: int) -> None:
        only_read = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        close(fd)
        if only_read and _is_ours(sys._getframe(1)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def failing_close_of_socket(self: socket.socket) -> None:
        close_socket(self)
        if _is_ours(sys._getframe(1)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", failing_close)
    monkeypatch.setattr(socket.socket, "close", failing_close_of_socket)


def test_what_closing_says_of_what_was_only_read_changes_nothing() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    close_read(reader)
    close_read(reader)  # EBADF stands for the EIO of a network file system


@pytest.mark.usefixtures("closing_fails")
def test_what_closing_a_socket_says_changes_nothing() -> None:
    ours, theirs = socket.socketpair()
    close_read(ours)
    close_read(theirs)
    assert (ours.fileno(), theirs.fileno()) == (-1, -1)


@pytest.mark.usefixtures("closing_fails")
def test_a_restore_to_a_directory_succeeds_though_closing_what_was_read_fails(tmp_path: Path) -> None:
    host = DirectoryHost(tmp_path / "new")
    with host.lock():
        restore(host, "work")
    assert os.listdir(tmp_path / "new") == ["work"]


@needs_bubblewrap
@pytest.mark.usefixtures("closing_fails")
async def test_a_worker_is_started_and_ended_though_every_such_close_fails(tmp_path: Path) -> None:
    path = tmp_path / "backup"
    path.write_bytes(b"the backup")
    with path.open("rb") as archive:
        link = LocalLink(archive.fileno(), sandbox=True, command=INTERPRETER, memory_limit=512 << 20)
        async with link:
            await link.call("restore.Volume", "vm10.private")
        assert await link.wait_gone() == "the worker was ended"


def test_only_what_was_written_to_is_closed_so_that_an_error_counts() -> None:
    found: dict[str, int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if calls := re.findall(r"\bos\.close[(,)]", path.read_text()):
            found[str(path.relative_to(PACKAGE))] = len(calls)
    assert found == WRITTEN
