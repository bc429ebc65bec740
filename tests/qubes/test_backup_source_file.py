"""A file of dom0 is read by another process, to its end or to the error that ends it."""

import asyncio
import errno
import os
import random
from collections.abc import Collection, Iterator
from pathlib import Path
from unittest import mock

import pytest

from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.qubes import backup_source
from qubes_restore_svc.qubes.backup_source import FileReader
from tests.support.bad_medium import PAGE, Medium
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
    monkeypatch.setattr(backup_source, "_CAT", "/nonexistent/cat")
    before = open_descriptors()
    async with FileReader(0) as reader:
        with pytest.raises(HostFailed, match="the backup cannot be read: /nonexistent/cat"):
            await reader.open()
    assert not open_descriptors() - before


# --- Places that cannot be read ----------------------------------------------------------------------

EIO = "the file could not be read (Input/output error)"


def content_of(pages: int) -> bytes:
    return random.Random(1).randbytes(pages * PAGE)


def without(content: bytes, bad: Collection[int]) -> bytes:
    """The content with zeros in the bad pages."""
    pages = (content[start : start + PAGE] for start in range(0, len(content), PAGE))
    return b"".join(bytes(PAGE) if number in bad else page for number, page in enumerate(pages))


@pytest.fixture
def medium(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Medium]:
    pages, bad = request.param
    found = Medium(content_of(pages), bad)
    monkeypatch.setattr(backup_source, "_end_of", lambda fd: found.end)  # this file does not tell it
    yield found
    found.close()


@pytest.mark.parametrize(
    ("medium", "start", "gaps", "where", "size"),
    [
        ((40, {3}), 0, {3}, "", 4096),
        ((40, {0}), 0, {0}, "", 4096),
        ((40, {39}), 0, {39}, "", 4096),
        ((40, {7, 8, 9}), 0, {7, 8, 9}, "", 12288),
        ((40, {2, 20, 33}), 0, {2, 20, 33}, " and in 2 other places", 12288),
        ((40, {5}), 5 * PAGE + 1000, {5}, "", 3096),
    ],
    indirect=["medium"],
)
async def test_a_place_that_cannot_be_read_costs_its_pages_and_nothing_else(
    medium: Medium, start: int, gaps: set[int], where: str, size: int
) -> None:
    os.lseek(medium.fd, start, os.SEEK_CUR)
    async with FileReader(medium.fd) as reader:
        assert await read_all(await reader.open()) == without(content_of(40), gaps)[start:]
        assert await reader.fault(5) == EIO
        first = medium.start + (start or min(gaps) * PAGE)
        assert reader.gaps == (
            f"the file could not be read at byte {first}{where} (Input/output error), and {size} bytes of it"
            " were taken for zeros"
        )
    assert children() == []


@pytest.mark.parametrize("medium", [(800, range(100, 500))], indirect=True)
async def test_steps_grow_with_a_gap_and_cost_little_more_than_it(
    medium: Medium, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_source, "_MAX_STEPS", 200)
    content = content_of(800)
    async with FileReader(medium.fd) as reader:
        given = await read_all(await reader.open())
    assert len(given) == len(content)
    end = next(page for page in range(500, 800) if given[page * PAGE :][:PAGE] != bytes(PAGE))
    assert end - 500 <= 400 // 64
    assert given == without(content, range(100, end))


@pytest.mark.parametrize(
    ("medium", "limits", "pages"),
    [
        ((40, {3, 9, 15, 20}), {"_MAX_STEPS": 3}, 20),
        ((40, range(10, 30)), {"_MAX_GAP": 8 * PAGE}, 18),
    ],
    indirect=["medium"],
)
async def test_a_medium_that_has_gone_ends_the_reading(
    medium: Medium, limits: dict[str, int], pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, limit in limits.items():
        monkeypatch.setattr(backup_source, name, limit)
    async with FileReader(medium.fd) as reader:
        assert len(await read_all(await reader.open())) == pages * PAGE
        assert await reader.fault(5) == EIO


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FileNotFoundError(2, "No such file", "/bin/head"), "[Errno 2] No such file: '/bin/head'"),
        (BlockingIOError(errno.EAGAIN, "x"), "no more processes or threads can be started"),
        (RuntimeError("can't start new thread"), "no more processes or threads can be started"),
    ],
)
@pytest.mark.parametrize("medium", [(40, {5})], indirect=True)
async def test_a_step_that_cannot_be_made_is_told_and_ends_the_reading(
    medium: Medium, error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FileReader(medium.fd) as reader:
        descriptor = await reader.open()
        monkeypatch.setattr(asyncio, "create_subprocess_exec", mock.Mock(side_effect=error))
        assert await read_all(descriptor) == content_of(40)[: 5 * PAGE]
        fault = await reader.fault(5)
    assert fault is not None and told in fault


@pytest.mark.parametrize("medium", [(400, range(1, 400, 2))], indirect=True)
async def test_stepping_over_what_cannot_be_read_can_be_ended_at_any_moment(medium: Medium) -> None:
    for moment_s in (0, 0.001, 0.003, 0.01, 0.02, 0.04):
        before = open_descriptors()
        os.lseek(medium.fd, medium.start, os.SEEK_SET)
        async with FileReader(medium.fd) as reader:
            descriptor = await reader.open()
            await asyncio.sleep(moment_s)
        os.close(descriptor)
        assert children() == []
        assert not open_descriptors() - before
