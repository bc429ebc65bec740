"""What a backup is made of: its containers, where they lie, and what their keys cost.

Strategy: the worker's own readers walk over the outer archive; the keys are derived once, as many side by
side as memory allows, and kept. So the stages of a restore can be measured one by one, on real data.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qubes_restore_svc.archive import header as header_format
from qubes_restore_svc.archive.container import HEAD_SIZE, ContainerHead, open_container, parse_head
from qubes_restore_svc.archive.members import parse_chunk_name
from qubes_restore_svc.archive.outer_tar import OuterTarReader
from qubes_restore_svc.kdf.engine import KdfEngine, KdfRequest
from qubes_restore_svc.system_memory import memory_room
from qubes_restore_svc.worker.source import ArchiveSource

from .derivations import Job, derive_side_by_side, stride_within
from .processes import cores
from .samples import Sample

#: Share of the memory that is free, which derivations may take here.
_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class Container:
    """`file` is what it is a piece of (`vm10/private.img`); `size` bytes from `offset` in the archive."""

    file: str
    offset: int
    size: int
    head: ContainerHead
    request: KdfRequest


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The containers in archive order: the header's copy, those of qubes.xml, those of the images."""

    filter: str
    containers: Sequence[Container]

    def images(self) -> dict[str, list[Container]]:
        """The pieces of each image."""
        pieces: dict[str, list[Container]] = {}
        for container in self.containers:
            if container.file.endswith(".img"):
                pieces.setdefault(container.file, []).append(container)
        return pieces


def dissect(sample: Sample) -> Anatomy:
    """Walk over the outer archive, without deriving anything."""
    containers = []
    header = None
    with archive_source(sample.backup) as source:
        reader = OuterTarReader()
        while len(block := source.read(reader.wanted)) == reader.wanted:
            member = reader.feed(block)
            if member is None:
                continue
            start = source.position
            content = source.read(min(member.size, HEAD_SIZE + header_format.MAX_HEADER_SIZE))
            source.skip(member.size - len(content))
            reader.skip(member.size)
            passphrase = sample.expected.passphrase
            if header is None:
                header = header_format.parse_header(content)
                continue
            file = member.name
            password = header_format.header_passphrase(passphrase)
            if member.name != header_format.HEADER_HMAC_MEMBER:
                name = parse_chunk_name(member.name)
                file = name.file
                password = header_format.member_passphrase(header.backup_id, name.member, passphrase)
            head = parse_head(content)
            containers.append(Container(file, start, member.size, head, head.request(password)))
    if header is None:
        raise ValueError(f"{sample.backup} is empty")
    return Anatomy(header.effective_filter, containers)


def derive_keys(engine: KdfEngine, containers: Iterable[Container]) -> dict[Container, bytes]:
    """The keys of all containers, on all cores."""
    waiting = sorted(containers, key=lambda container: container.head.parameters.work)
    memory = int(memory_room().available * _SHARE)
    share = memory // (cores() * engine.lanes)
    # Those of like cost side by side, and every core with some of each.
    parts = [waiting[number :: cores()] for number in range(cores())]

    def derive(part: Sequence[Container]) -> Sequence[bytes]:
        jobs = [Job(c.request, stride_within(engine, c.head.parameters, share)) for c in part]
        return derive_side_by_side(engine, jobs, memory).keys if jobs else ()

    with ThreadPoolExecutor(cores()) as pool:
        results = list(pool.map(derive, parts))
    engine.trim()
    return {
        container: key
        for part, keys in zip(parts, results, strict=True)
        for container, key in zip(part, keys, strict=True)
    }


def opened(
    archive: Path, containers: Iterable[Container], keys: Mapping[Container, bytes]
) -> Iterator[memoryview]:
    """The content of containers, verified and decrypted, in pieces."""
    with archive_source(archive) as source:
        for container in containers:
            view = memoryview(bytearray(container.size))
            source.read_at(container.offset, view)
            yield open_container(view, keys[container])


@contextmanager
def archive_source(archive: Path) -> Iterator[ArchiveSource]:
    """The worker's view of the file."""
    fd = os.open(archive, os.O_RDONLY)
    try:
        yield ArchiveSource(fd)
    finally:
        os.close(fd)
