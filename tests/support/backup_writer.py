"""A writer of backup format 4, for tests and demonstrations.

Strategy: one function per layer, each usable alone, so that a test can build a hostile variant of
exactly one layer and have everything around it be right:

    image -> inner_tar -> compress -> chunks -> scrypt_container -> RawMember -> outer_member

`BackupWriter` holds what a backup is made of and strings the layers together; `Replacements` puts
other bytes into one layer of one file. Everything streams, at most `jobs` chunks are in memory at a
time, and the output depends on the arguments alone: salts are derived, times are fixed. The layers
are in files of their own: plans, qubes_xml_writer, inner_archives, containers, outer_archive.

Command line: python -m tests.support.backup_writer OUT --qube NAME:MIB:FILL[:CLASS] ...
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from .containers import chunks, compress, header_text, scrypt_container
from .inner_archives import home_tar, inner_tar, plain_tar
from .outer_archive import RawMember, join_members, outer_member, outer_pieces, qfile_stream
from .plans import DOM0_HOME, ImagePlan, QubePlan, expectation_of, image_of_file, sample_image, sample_qube
from .qubes_xml_writer import qubes_xml

#: With what most tests need of the layers.
__all__ = [
    "BACKUP_ID",
    "PASSPHRASE",
    "BackupWriter",
    "Costs",
    "ImagePlan",
    "QubePlan",
    "RawMember",
    "Replacements",
    "join_members",
    "main",
    "outer_member",
    "qfile_stream",
    "sample_image",
    "sample_qube",
    "scrypt_container",
]

CHUNK_SIZE = 100 << 20  # bytes of compressed data that a Qubes system puts in one chunk
PASSPHRASE = "correct horse battery staple"
BACKUP_ID = "20260101T010203-1234"

#: One log2 N for all scrypt containers of a backup, or one for each: taken in turn, or asked for by
#: the container's number from 0 (backup-header.hmac, then qubes.xml, then the rest).
Costs = int | Sequence[int] | Callable[[int], int]


@dataclass(frozen=True, slots=True)
class Replacements:
    """Bytes that take the place of what the writer would make, everything around them being right.

    `header`: text of backup-header. `header_copy`: text inside backup-header.hmac (None: the same).
    `qubes_xml`: content of qubes.xml. By file (`qubes.xml`, `vm10/private.img`): `inner`, the inner
    archive before compression, and `compressed`, the stream after it. None or absent: not replaced.
    """

    header: bytes | None = None
    header_copy: bytes | None = None
    qubes_xml: bytes | None = None
    inner: Mapping[str, Iterable[bytes]] = field(default_factory=dict)
    compressed: Mapping[str, Iterable[bytes]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BackupWriter:
    """All that one backup is made of. Sizes in bytes; `jobs` is the number of threads for scrypt.

    `compression` is a filter of the header or `none`; `sparse` is `gnu` (GNU tar --sparse), `pax`
    (Qubes' writer for block devices) or `none` (holes written out).
    """

    qubes: Sequence[QubePlan]
    passphrase: str = PASSPHRASE
    backup_id: str = BACKUP_ID
    compression: str = "gzip"
    chunk_size: int = CHUNK_SIZE
    log_n: Costs = 10
    r: int = 8
    p: int = 1
    sparse: str = "gnu"
    dom0_home: bool = False
    jobs: int = 2
    replacements: Replacements = field(default_factory=Replacements)

    def members(self) -> Iterator[RawMember]:
        """The members of the outer archive, in order."""
        header = self.replacements.header
        if header is None:
            header = header_text(self.compression, self.backup_id)
        yield RawMember("backup-header", header)
        copy = self.replacements.header_copy
        passphrase = f"backup-header!{self.passphrase}".encode()
        numbers = itertools.count()
        yield RawMember(
            "backup-header.hmac", self.container(header if copy is None else copy, passphrase, next(numbers))
        )
        waiting: deque[tuple[str, Future[bytes]]] = deque()
        with ThreadPoolExecutor(self.jobs) as pool:
            for name, inner in self.files():
                for number, chunk in enumerate(chunks(self.compressed(name, inner), self.chunk_size)):
                    member = f"{name}.{number:03d}"
                    passphrase = f"{self.backup_id}!{member}!{self.passphrase}".encode()
                    task = pool.submit(self.container, chunk, passphrase, next(numbers))
                    waiting.append((f"{member}.enc", task))
                    while len(waiting) >= self.jobs:
                        done, task = waiting.popleft()
                        yield RawMember(done, task.result())
            yield from (RawMember(done, task.result()) for done, task in waiting)

    def files(self) -> Iterator[tuple[str, Iterable[bytes]]]:
        """Every file of the backup with its inner archive, not compressed, in order."""
        content = self.replacements.qubes_xml
        if content is None:
            content = qubes_xml(self.qubes, dom0_home=self.dom0_home)
        yield self._inner("qubes.xml", plain_tar("qubes.xml", [content], len(content)))
        for position, qube in enumerate(self.qubes):
            if not qube.included:
                continue
            folder = qube.backup_path(position).rstrip("/")
            for volume, image in qube.volumes.items():
                name = f"{folder}/{volume}.img"
                yield self._inner(name, inner_tar(name, image, self.sparse))
            for file, data in qube.small_files().items():
                name = f"{folder}/{file}"
                yield self._inner(name, plain_tar(name, [data], len(data)))
        if self.dom0_home:
            yield self._inner(DOM0_HOME, home_tar())

    def compressed(self, name: str, inner: Iterable[bytes]) -> Iterable[bytes]:
        """The compressed stream of the file `name`."""
        replaced = self.replacements.compressed.get(name)
        return compress(self.compression, inner) if replaced is None else replaced

    def container(self, plaintext: bytes, passphrase: bytes, number: int) -> bytes:
        """The scrypt container that stands at `number` in this backup, with a salt of its own."""
        log_n = self.log_n
        if callable(log_n):
            log_n = log_n(number)
        elif not isinstance(log_n, int):
            log_n = log_n[number % len(log_n)]
        salt = hashlib.sha256(b"salt" + passphrase).digest()
        return scrypt_container(plaintext, passphrase, log_n, self.r, self.p, salt)

    def expectation(self) -> dict[str, object]:
        """What a restore must give, for JSON: passphrase, backup_id and each volume's size and SHA-256."""
        return expectation_of(self.qubes, self.passphrase, self.backup_id)

    def write(self, target: BinaryIO | Path) -> None:
        """Stream the backup into a file."""
        if isinstance(target, Path):
            with target.open("wb") as file:
                return self.write(file)
        for member in self.members():
            target.writelines(outer_pieces(member))
        return None

    def to_bytes(self) -> bytes:
        """The whole backup at once, for small ones."""
        return join_members(self.members())

    def _inner(self, name: str, inner: Iterable[bytes]) -> tuple[str, Iterable[bytes]]:
        return name, self.replacements.inner.get(name, inner)


# --- Command line ------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a backup of sample qubes and, if asked for, a JSON file that says what it holds."""
    parser = argparse.ArgumentParser(prog="backup_writer", description="Write a Qubes backup of sample data.")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--qube", action="append", required=True, metavar="NAME:MIB:FILL[:CLASS]")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="NAME/VOLUME=FILE",
        help="back up this file as a volume of a qube, instead of sample data",
    )
    parser.add_argument("--passphrase", default=PASSPHRASE, help="of the sample, no secret")
    parser.add_argument("--backup-id", default=BACKUP_ID)
    parser.add_argument("--compress", default="gzip", metavar="FILTER", help="a compression filter, or none")
    parser.add_argument("--chunk-mib", type=float, default=CHUNK_SIZE / (1 << 20))
    parser.add_argument("--log-n", default="10", help="log2 of scrypt's N; several, by commas, take turns")
    parser.add_argument("--sparse", default="gnu", choices=["gnu", "pax", "none"])
    parser.add_argument("--dom0-home", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="chunks encrypted at a time")
    parser.add_argument("--expect", type=Path, metavar="OUT.json", help="say here what the backup holds")
    options = parser.parse_args(arguments)
    pairs = (pair.partition("=") for pair in options.image)
    images = {volume: image_of_file(Path(file)) for volume, _, file in pairs}
    qubes = []
    for seed, description in enumerate(options.qube, 1):
        name, mib, fill, klass = (description + ":AppVM").split(":")[:4]
        qube = sample_qube(name, int(float(mib) * (1 << 20)), float(fill), klass, seed)
        given = {volume: images.pop(f"{name}/{volume}", image) for volume, image in qube.volumes.items()}
        qubes.append(replace(qube, volumes=given))
    if images:
        parser.error(f"there is no volume {', '.join(images)}")
    writer = BackupWriter(
        qubes,
        passphrase=options.passphrase,
        backup_id=options.backup_id,
        compression=options.compress,
        chunk_size=int(options.chunk_mib * (1 << 20)),
        log_n=[int(cost) for cost in options.log_n.split(",")],
        sparse=options.sparse,
        dom0_home=options.dom0_home,
        jobs=options.jobs,
    )
    writer.write(options.out)
    if options.expect is not None:
        options.expect.write_text(json.dumps(writer.expectation(), indent=1) + "\n", encoding="utf-8")
    volumes = sum(len(qube.volumes) for qube in qubes)
    print(f"{options.out}: {options.out.stat().st_size >> 10} KiB, {volumes} volumes", file=sys.stderr)


if __name__ == "__main__":
    main()
