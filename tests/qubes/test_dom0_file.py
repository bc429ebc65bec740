"""A file of dom0 is read by another process, to its end or to the error that ends it."""

import asyncio
import os
from pathlib import Path

import pytest

from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.qubes import dom0_file
from qubes_restore_svc.qubes.dom0_file import FileReader
from tests.support.descriptors import open_descriptors


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


async def read_all(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return await asyncio.to_thread(file.read)


async def test_the_file_arrives_from_where_its_descriptor_stands(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    (tmp_path / "backup").write_bytes(b"before" + content)
    with (tmp_path / "backup").open("rb") as file:
        os.lseek(file.fileno(), 6, os.SEEK_SET)
        async with FileReader(file.fileno()) as reader:
            assert await read_all(await reader.open()) == content
            assert await reader.fault(5) is None
    assert children() == []


async def test_a_file_that_cannot_be_read_further_is_told(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)  # reading a directory fails at once
    try:
        async with FileReader(fd) as reader:
            assert await read_all(await reader.open()) == b""
            assert await reader.fault(5) == "the file could not be read (Is a directory)"
    finally:
        os.close(fd)


async def test_reading_that_nobody_wants_any_more_is_ended() -> None:
    with open("/dev/zero", "rb") as zeros:
        async with FileReader(zeros.fileno()) as reader:
            descriptor = await reader.open()
            assert len(children()) == 1
            assert await reader.fault(0.01) is None
        assert children() == []
        os.close(descriptor)


async def test_nothing_begun_is_nothing_to_end() -> None:
    async with FileReader(0) as reader:
        assert await reader.fault(5) is None


async def test_a_system_without_the_program_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dom0_file, "_PROGRAM", "/nonexistent/cat")
    before = open_descriptors()
    async with FileReader(0) as reader:
        with pytest.raises(HostFailed, match="the backup cannot be read: /nonexistent/cat"):
            await reader.open()
    assert not open_descriptors() - before
