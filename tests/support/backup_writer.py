"""A writer of backup format 4, for tests and demonstrations.

Strategy: one function per layer, each usable alone, so that a test can build a hostile variant of
exactly one layer and have everything around it be right:

    image -> inner_tar -> compress -> chunks -> scrypt_container -> RawMember -> outer_member

`BackupWriter` holds what a backup is made of and strings the layers together; `Replacements` puts
other bytes into one layer of one file. Everything streams, at most `jobs` chunks are in memory at a
time, and the output depends on the arguments alone: salts are derived, times are fixed.

Command line: python -m tests.support.backup_writer OUT --qube NAME:MIB:FILL[:CLASS] ...
"""

import argparse
import bz2
import functools
import hashlib
import hmac
import itertools
import json
import lzma
import os
import random
import stat
import struct
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, overload
from xml.sax.saxutils import escape, quoteattr

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

BLOCK = 512  # bytes, of every tar
RECORD = 10240  # bytes; GNU tar pads an archive to a multiple of this
CHUNK_SIZE = 100 << 20  # bytes of compressed data that a Qubes system puts in one chunk
MTIME = 1767229323  # seconds since 1970, on every file: 2026-01-01T01:02:03Z
WRITER_PID = 13945  # stands in the member's name of a pax sparse archive
PASSPHRASE = "correct horse battery staple"
BACKUP_ID = "20260101T010203-1234"
FIRST_QID = 10  # of the first qube in a backup; lower numbers are dom0 and the qubes only referred to
DEFAULT_TEMPLATE = "fedora-41"
LABELS = ("red", "orange", "yellow", "green", "gray", "blue", "purple", "black")
SNAPSHOT_CLASSES = ("AppVM", "DispVM")  # their root is a snapshot of the template's
DOM0_HOME = "dom0-home/user"

#: One log2 N for all scrypt containers of a backup, or one for each: taken in turn, or asked for by
#: the container's number from 0 (backup-header.hmac, then qubes.xml, then the rest).
Costs = int | Sequence[int] | Callable[[int], int]


# --- What a backup is made of ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """A volume's image: `size` in bytes, and what is not zero as (offset, data), rising, disjoint."""

    size: int
    extents: Sequence[tuple[int, bytes]] = ()

    def sha256(self) -> str:
        """SHA-256, in hex, of the whole image, holes as zeros."""
        digest, position, zeros = hashlib.sha256(), 0, bytes(1 << 20)
        for offset, data in itertools.chain(self.extents, [(self.size, b"")]):
            if not position <= offset <= offset + len(data) <= self.size:
                raise ValueError(f"extent of {len(data)} bytes at {offset} in an image of {self.size}")
            for start in range(position, offset, len(zeros)):
                digest.update(zeros[: offset - start])
            digest.update(data)
            position = offset + len(data)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class QubePlan:
    """A domain of qubes.xml and, if `included`, its files.

    `path` is written as backup-path (None: `vm<qid>/`, as Qubes R4 does; older: `appvms/NAME/`).
    `volumes` by volume name, in archive order. `devices` are (class, backend domain, id).
    """

    name: str
    klass: str = "AppVM"
    path: str | None = None
    volumes: Mapping[str, ImagePlan] = field(default_factory=dict)
    label: str = "red"
    template: str | None = DEFAULT_TEMPLATE
    netvm: str | None = None
    properties: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ()
    devices: Sequence[tuple[str, str, str]] = ()
    firewall: str | None = None
    notes: str | None = None
    appmenus: Sequence[str] | None = None
    included: bool = True
    label_by_name: bool = False

    def backup_path(self, position: int) -> str:
        """The text of backup-path for the qube at `position` in its backup."""
        return f"vm{FIRST_QID + position}/" if self.path is None else self.path

    def small_files(self) -> dict[str, bytes]:
        """The files beside the images, by name, in archive order."""
        files: dict[str, bytes] = {}
        if self.appmenus is not None:
            files["whitelisted-appmenus.list"] = "".join(f"{entry}\n" for entry in self.appmenus).encode()
        if self.firewall is not None:
            files["firewall.xml"] = self.firewall.encode()
        if self.notes is not None:
            files["notes.txt"] = self.notes.encode()
        return files if files or self.volumes else {"empty": b""}


def sample_image(size: int, fill: float, seed: int) -> ImagePlan:
    """An image that looks like a volume: `fill` (0 to 1) of it is data, in runs of up to 4 MiB with
    holes between, half of each run incompressible and half text. Made when read, so any size fits."""
    return ImagePlan(size, _SampleExtents(size, fill, seed))


@dataclass(frozen=True, slots=True)
class RawMember:
    """One member of the outer archive.

    `link_target` is for type flags `1` and `2`. `declared_size` stands in the header instead of the
    true size. `pax` adds extended header records to those that tar writes, or replaces them.
    """

    name: str
    data: bytes
    type_flag: bytes = b"0"
    link_target: str = ""
    declared_size: int | None = None
    pax: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of data, as the header says."""
        return len(self.data) if self.declared_size is None else self.declared_size


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
            yield self._inner(DOM0_HOME, _home_tar())

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
        volumes = {
            f"{qube.name}/{volume}": {"size": image.size, "sha256": image.sha256()}
            for qube in self.qubes
            if qube.included
            for volume, image in qube.volumes.items()
        }
        return {"passphrase": self.passphrase, "backup_id": self.backup_id, "volumes": volumes}

    def write(self, target: BinaryIO | Path) -> None:
        """Stream the backup into a file."""
        if isinstance(target, Path):
            with target.open("wb") as file:
                return self.write(file)
        for member in self.members():
            target.writelines(_outer_pieces(member))
        return None

    def to_bytes(self) -> bytes:
        """The whole backup at once, for small ones."""
        return join_members(self.members())

    def _inner(self, name: str, inner: Iterable[bytes]) -> tuple[str, Iterable[bytes]]:
        return name, self.replacements.inner.get(name, inner)


# --- Outer archive -----------------------------------------------------------------------------


def outer_member(member: RawMember) -> bytes:
    """One member as the POSIX tar archive of its own that GNU tar writes for it."""
    return b"".join(_outer_pieces(member))


def join_members(members: Iterable[RawMember]) -> bytes:
    """The outer archive with these members."""
    return b"".join(piece for member in members for piece in _outer_pieces(member))


def qfile_stream(members: Iterable[RawMember]) -> bytes:
    """The same members as the qfile stream that the storage VM's service makes of the archive.

    Every folder comes once, before the first member in it, with the mode bits of that member.
    """
    pieces: list[bytes] = []
    sent: set[str] = set()
    for member in members:
        folders = member.name.split("/")[:-1]
        for depth in range(1, len(folders) + 1):
            folder = "/".join(folders[:depth])
            if folder not in sent:
                sent.add(folder)
                pieces.append(qfile_entry(folder, stat.S_IFDIR | 0o644, 0))
        if member.type_flag == b"2":
            target = member.link_target.encode()
            pieces += [qfile_entry(member.name, stat.S_IFLNK | 0o644, len(target)), target]
        else:
            kind = stat.S_IFDIR if member.type_flag == b"5" else stat.S_IFREG
            pieces += [qfile_entry(member.name, kind | 0o644, member.size), member.data]
    return b"".join([*pieces, bytes(32)])


def qfile_entry(name: str, mode: int, length: int) -> bytes:
    """One header of a qfile stream with the name after it."""
    encoded = name.encode() + b"\0"
    return struct.pack("<IIQIIII", len(encoded), mode, length, MTIME, 0, MTIME, 0) + encoded


def _outer_pieces(member: RawMember) -> list[bytes]:
    stamp = f"{MTIME}.123456789"
    records = {"mtime": stamp, "atime": stamp, "ctime": stamp}
    if len(member.name.encode()) > 100 or not member.name.isascii():
        records["path"] = member.name
    extended = _pax_records(records | dict(member.pax))
    folder, _, file = member.name.rpartition("/")
    pieces = [
        tar_header(f"{folder or '.'}/PaxHeaders/{file}", len(extended), b"x", flavour="posix", owner=False),
        _pad(extended, BLOCK),
        tar_header(
            member.name, member.size, member.type_flag, flavour="posix", link_target=member.link_target
        ),
        member.data,
        bytes(-len(member.data) % BLOCK + 2 * BLOCK),
    ]
    written = sum(len(piece) for piece in pieces)
    return [*pieces, bytes(-written % RECORD)]


# --- Header and container ----------------------------------------------------------------------


def header_text(compression: str, backup_id: str) -> bytes:
    """The text of backup-header; without compression it names the default filter, as Qubes does."""
    compressed = compression != "none"
    return (
        f"version=4\nencrypted=True\ncompressed={compressed}\n"
        f"compression-filter={compression if compressed else 'gzip'}\n"
        f"hmac-algorithm=scrypt\nbackup-id={backup_id}\n"
    ).encode()


def scrypt_container(
    plaintext: bytes, passphrase: bytes, log_n: int = 10, r: int = 8, p: int = 1, salt: bytes | None = None
) -> bytes:
    """`plaintext` in a container of the scrypt program; `salt` is 32 bytes, random if None."""
    salt = os.urandom(32) if salt is None else salt
    keys = _scrypt(passphrase, salt, log_n, r, p)
    head = container_head(log_n, r, p, salt)
    head += hmac.digest(keys[32:], head, "sha256")
    content = Cipher(algorithms.AES(keys[:32]), modes.CTR(bytes(16))).encryptor().update(plaintext)
    tail = hmac.new(keys[32:], head, "sha256")
    tail.update(content)
    return b"".join([head, content, tail.digest()])


def container_head(log_n: int, r: int, p: int, salt: bytes) -> bytes:
    """The first 64 bytes of a container, their checksum right whatever the parameters."""
    head = struct.pack(">6sBBII", b"scrypt", 0, log_n, r, p) + salt
    return head + hashlib.sha256(head).digest()[:16]


@functools.lru_cache(maxsize=4096)
def _scrypt(passphrase: bytes, salt: bytes, log_n: int, r: int, p: int) -> bytes:
    # Salts are derived, so tests that write the same backup again and again pay for it once.
    return Scrypt(salt=salt, length=64, n=1 << log_n, r=r, p=p).derive(passphrase)


# --- Compression and chunks --------------------------------------------------------------------


def compress(filter_name: str, data: Iterable[bytes]) -> Iterator[bytes]:
    """The stream that the program `filter_name` would make of `data`; `none` passes it through."""
    if filter_name == "none":
        yield from data
    elif filter_name == "pbzip2":  # an independent stream for every 900,000 bytes
        for block in chunks(data, 900_000):
            yield bz2.compress(block)
    else:
        compressor = _compressor(filter_name)
        for piece in data:
            if compressed := compressor.compress(piece):
                yield compressed
        yield compressor.flush()


def chunks(data: Iterable[bytes], size: int) -> Iterator[bytes]:
    """`data` cut at every `size` bytes. The last piece is shorter, so it may be empty: Qubes learns
    that the data has ended only by trying to fill one more chunk."""
    held = bytearray()
    for piece in data:
        for start in range(0, len(piece), size):
            held += memoryview(piece)[start : start + size]
            if len(held) >= size:
                yield bytes(memoryview(held)[:size])
                held = held[size:]
    yield bytes(held)


class _Compressor:
    """What the compressors of several libraries have in common."""

    def __init__(self, feed: Callable[[bytes], bytes], finish: Callable[[], bytes]) -> None:
        self.compress, self.flush = feed, finish


def _compressor(filter_name: str) -> _Compressor:
    if filter_name in ("gzip", "pigz"):
        deflate = zlib.compressobj(level=1, wbits=31)
        return _Compressor(deflate.compress, deflate.flush)
    if filter_name == "bzip2":
        bzip2 = bz2.BZ2Compressor()
        return _Compressor(bzip2.compress, bzip2.flush)
    if filter_name in ("xz", "lzma"):
        container = lzma.FORMAT_XZ if filter_name == "xz" else lzma.FORMAT_ALONE
        xz = lzma.LZMACompressor(format=container, preset=0)
        return _Compressor(xz.compress, xz.flush)
    if filter_name in ("zstd", "zstdmt"):
        import zstandard  # kept here: only a backup that uses it needs the library

        zstd = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()
        return _Compressor(zstd.compress, zstd.flush)
    raise ValueError(f"no compressor {filter_name!r}")


# --- Inner archive -----------------------------------------------------------------------------


def inner_tar(name: str, image: ImagePlan, style: str) -> Iterator[bytes]:
    """The inner archive of a volume, in pieces: `style` is `gnu`, `pax` or `none`.

    Like GNU tar, `gnu` writes an image without holes as a plain file.
    """
    image = _block_aligned(image)
    spans = _spans(image)
    pieces = (data for _, data in image.extents)
    if style == "pax":
        return pax_sparse_tar(name, image.size, spans, pieces)
    if style == "gnu" and spans != [(0, image.size)]:
        return gnu_sparse_tar(name, image.size, spans, pieces)
    if style not in ("gnu", "none"):
        raise ValueError(f"no sparse style {style!r}")
    return plain_tar(name, _dense(image), image.size)


def plain_tar(name: str, data: Iterable[bytes], size: int) -> Iterator[bytes]:
    """A GNU tar archive of one regular file."""
    return _archive([tar_header(name, size)], data, RECORD)


def gnu_sparse_tar(
    name: str,
    image_size: int,
    spans: Sequence[tuple[int, int]],
    data: Iterable[bytes],
    *,
    stored_size: int | None = None,
) -> Iterator[bytes]:
    """A GNU tar archive of one file in old GNU sparse format (type `S`), believing its arguments:
    `spans` are (offset, length); `stored_size` is by default the sum of the lengths."""
    if stored_size is None:
        stored_size = sum(length for _, length in spans)
    entries = [tar_number(offset, 12) + tar_number(length, 12) for offset, length in spans]
    patches = {386: b"".join(entries[:4]), 482: bytes([len(entries) > 4]), 483: tar_number(image_size, 12)}
    blocks = [tar_header(name, stored_size, b"S", patches=patches)]
    for start in range(4, len(entries), 21):
        extension = b"".join(entries[start : start + 21]).ljust(504, b"\0")
        blocks.append(_pad(extension + bytes([start + 21 < len(entries)]), BLOCK))
    return _archive(blocks, data, RECORD)


def pax_sparse_tar(
    name: str,
    image_size: int,
    spans: Sequence[tuple[int, int]],
    data: Iterable[bytes],
    *,
    stored_size: int | None = None,
    map_text: bytes | None = None,
) -> Iterator[bytes]:
    """An archive of one file in pax sparse format 1.0 as Qubes' tarwriter makes it, believing its
    arguments; `map_text` replaces the map at the beginning of the data."""
    if map_text is None:
        map_text = "".join(f"{number}\n" for number in [len(spans), *itertools.chain(*spans)]).encode()
    sparse_map = _pad(map_text, BLOCK)
    if stored_size is None:
        stored_size = len(sparse_map) + sum(length for _, length in spans)
    records = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(image_size),
    }
    if stored_size >= 8**11:
        records["size"] = str(stored_size)
    extended = _pax_records(records)
    folder, _, file = name.rpartition("/")
    head = [
        tar_header("././@PaxHeader", len(extended), b"x", flavour="posix", owner=False, mode=0, mtime=0),
        _pad(extended, BLOCK),
        tar_header(
            f"{folder}/GNUSparseFile.{WRITER_PID}/{file}",
            0 if "size" in records else stored_size,
            flavour="posix",
            owner=False,
            mtime=0,
        ),
        sparse_map,
    ]
    return _archive(head, data, BLOCK)


def tar_header(
    name: str,
    size: int,
    type_flag: bytes = b"0",
    *,
    flavour: str = "gnu",
    link_target: str = "",
    owner: bool = True,
    mode: int = 0o644,
    mtime: int = MTIME,
    patches: Mapping[int, bytes] | None = None,
) -> bytes:
    """One 512-byte tar header; `flavour` is `gnu` or `posix`.

    Without `owner` the names of user and group and the device numbers stay empty, as in extended
    headers. `patches` are bytes laid over the header at an offset, before its checksum is made.
    """
    user = b"root" if owner else b""
    device = b"0000000" if owner and flavour == "posix" else b""
    header = bytearray(
        struct.pack(
            "100s8s8s8s12s12s8sc100s8s32s32s8s8s167x",
            name.encode(),
            tar_number(mode, 8),
            b"0000000",
            b"0000000",
            tar_number(size, 12),
            tar_number(mtime, 12),
            b" " * 8,
            type_flag,
            link_target.encode(),
            b"ustar  \0" if flavour == "gnu" else b"ustar\x0000",
            user,
            user,
            device,
            device,
        )
    )
    for offset, patch in (patches or {}).items():
        header[offset : offset + len(patch)] = patch
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def tar_number(value: int, width: int) -> bytes:
    """A number in a tar header: octal where it fits, base-256 otherwise (GNU)."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return (value % (1 << 8 * width) | 1 << (8 * width - 1)).to_bytes(width, "big")


def _archive(head: Iterable[bytes], data: Iterable[bytes], multiple: int) -> Iterator[bytes]:
    written = 0
    for piece in head:
        written += len(piece)
        yield piece
    for piece in data:
        written += len(piece)
        yield piece
    end = -written % BLOCK + 2 * BLOCK
    yield bytes(end + -(written + end) % multiple)


def _pax_records(records: Mapping[str, str]) -> bytes:
    lines = []
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        length = len(body) + 1
        while length != len(body) + len(str(length)):
            length = len(body) + len(str(length))
        lines.append(b"%d%s" % (length, body))
    return b"".join(lines)


def _home_tar() -> Iterator[bytes]:
    text = b"# dom0\n"
    head = [
        tar_header(f"{DOM0_HOME}/", 0, b"5", mode=0o755),
        tar_header(f"{DOM0_HOME}/.bashrc", len(text)),
        _pad(text, BLOCK),
        tar_header(f"{DOM0_HOME}/link", 0, b"2", link_target="/etc/passwd"),
    ]
    return _archive(head, [], RECORD)


def _pad(data: bytes, multiple: int) -> bytes:
    return data + bytes(-len(data) % multiple)


# --- Images ------------------------------------------------------------------------------------


class _SampleExtents(Sequence[tuple[int, bytes]]):
    """The extents of a sample image, each made when it is asked for."""

    def __init__(self, size: int, fill: float, seed: int) -> None:
        if not (size >= 0 and 0 <= fill <= 1):
            raise ValueError(f"no image of {size} bytes with a fill of {fill}")
        run = min(4 << 20, max(1 << 16, size // 8 & ~4095))
        self._places: list[tuple[int, int]] = []
        for offset in range(0, size, run):
            length = min(run, size - offset)
            wanted = length if fill == 1 else min(length, int(length * fill) & ~4095 or 4096)
            if fill > 0:
                self._places.append((offset, wanted))
        self._seed = seed

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> tuple[int, bytes]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[int, bytes]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, bytes] | Sequence[tuple[int, bytes]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        offset, length = self._places[index]
        key = hashlib.sha256(b"%d %d" % (self._seed, offset)).digest()
        half = length // 2
        noise = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(half))
        return offset, noise + _prose(self._seed, length - half, key[0])


def _prose(seed: int, length: int, start: int) -> bytes:
    pool = _words(seed)
    return (pool[start:] + pool * (length // len(pool) + 1))[:length]


@functools.lru_cache(maxsize=16)
def _words(seed: int) -> bytes:
    source = random.Random(seed)
    words = [
        "".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 9))) for _ in range(4000)
    ]
    return " ".join(source.choices(words, k=1 << 15)).encode()


def _spans(image: ImagePlan) -> list[tuple[int, int]]:
    """(offset, length) of every run of data as GNU tar and Qubes' writer list them: the last one
    reaches the end of the image, with no bytes in it where the image ends in a hole."""
    spans: list[tuple[int, int]] = []
    for offset, data in image.extents:
        if spans and sum(spans[-1]) == offset:
            spans[-1] = (spans[-1][0], spans[-1][1] + len(data))
        else:
            spans.append((offset, len(data)))
    if not spans or sum(spans[-1]) != image.size:
        spans.append((image.size, 0))
    return spans


def _block_aligned(image: ImagePlan) -> ImagePlan:
    """The same image with extents of whole blocks, as programs that look at a file block by block
    find them. Only an image given with odd extents, as small tests do, is built anew."""

    def is_aligned(offset: int, data: bytes) -> bool:
        end = offset + len(data)
        return offset % BLOCK == 0 and data != b"" and (end % BLOCK == 0 or end == image.size)

    if all(is_aligned(offset, data) for offset, data in image.extents):
        return image
    blocks: dict[int, bytearray] = {}
    for offset, data in image.extents:
        for position, byte in enumerate(data, offset):
            blocks.setdefault(position // BLOCK, bytearray(BLOCK))[position % BLOCK] = byte
    extents = [(number * BLOCK, bytes(block)) for number, block in sorted(blocks.items())]
    return ImagePlan(image.size, [(offset, data[: image.size - offset]) for offset, data in extents])


def _dense(image: ImagePlan) -> Iterator[bytes]:
    position = 0
    for offset, data in itertools.chain(image.extents, [(image.size, b"")]):
        for start in range(position, offset, 1 << 20):
            yield bytes(min(1 << 20, offset - start))
        yield data
        position = offset + len(data)


# --- qubes.xml ---------------------------------------------------------------------------------


def qubes_xml(
    qubes: Sequence[QubePlan], *, dom0_home: bool = False, default_template: str = DEFAULT_TEMPLATE
) -> bytes:
    """qubes.xml of a system with dom0, these qubes, and the templates and netvms they refer to.

    Characters that XML forbids are written as they are: the result is then malformed on purpose.
    """
    names = {qube.name for qube in qubes}
    templates = {default_template, *(qube.template for qube in qubes)} - names - {None}
    netvms = {qube.netvm for qube in qubes} - names - templates - {None, ""}
    home = {"backup-content": "True", "backup-path": DOM0_HOME, "backup-size": "4096"} if dom0_home else {}
    domains = [_domain("AdminVM", 0, {"label": "label-8"}, home)]
    outside = [("TemplateVM", name) for name in sorted(map(str, templates))]
    outside += [("AppVM", name) for name in sorted(map(str, netvms))]
    for number, (klass, name) in enumerate(outside):
        qid = number + 1 if number + 1 < FIRST_QID else FIRST_QID + len(qubes) + number
        domains.append(_domain(klass, qid, {"name": name, "label": "label-8"}, {"backup-content": "False"}))
    domains += [_qube_domain(qube, position) for position, qube in enumerate(qubes)]
    labels = "".join(
        f'<label id="label-{number}" color="0x000000">{label}</label>'
        for number, label in enumerate(LABELS, 1)
    )
    settings = _named("property", {"default_template": default_template})
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<qubes version="4.0"><labels>{labels}</labels><properties>{settings}</properties>'
        f"<domains>{''.join(domains)}</domains></qubes>\n"
    ).encode()


def _qube_domain(qube: QubePlan, position: int) -> str:
    label = qube.label
    if label in LABELS and not qube.label_by_name:
        label = f"label-{LABELS.index(label) + 1}"
    properties = {"name": qube.name, "label": label}
    if qube.klass in SNAPSHOT_CLASSES and qube.template is not None:
        properties["template"] = qube.template
    if qube.netvm is not None:
        properties["netvm"] = qube.netvm
    features = {"backup-content": str(qube.included)}
    if qube.included:
        disk = sum(len(data) for image in qube.volumes.values() for _, data in image.extents)
        features |= {"backup-path": qube.backup_path(position), "backup-size": str(disk)}
    return _domain(
        qube.klass,
        FIRST_QID + position,
        properties | dict(qube.properties),
        features | dict(qube.features),
        qube.tags,
        qube.devices,
        _volume_config(qube),
    )


def _domain(
    klass: str,
    qid: int,
    properties: Mapping[str, str],
    features: Mapping[str, str],
    tags: Sequence[str] = (),
    devices: Sequence[tuple[str, str, str]] = (),
    volumes: str = "",
) -> str:
    classes = dict.fromkeys(["pci", *(device_class for device_class, _, _ in devices)])
    attached = "".join(
        f"<devices class={quoteattr(device_class)}>"
        + "".join(
            f"<device backend-domain={quoteattr(backend)} id={quoteattr(ident)}/>"
            for other_class, backend, ident in devices
            if other_class == device_class
        )
        + "</devices>"
        for device_class in classes
    )
    own = {"qid": str(qid)} if qid else {}
    return (
        f'<domain id="domain-{qid}" class={quoteattr(klass)}>'
        f"<properties>{_named('property', own | dict(properties))}</properties>"
        f"<features>{_named('feature', features)}</features>{attached}"
        f"<tags>{''.join(f'<tag name={quoteattr(tag)}/>' for tag in tags)}</tags>"
        f"<volume-config>{volumes}</volume-config></domain>"
    )


def _volume_config(qube: QubePlan) -> str:
    lines = [
        f'<volume name={quoteattr(name)} pool="default" revisions_to_keep="1" rw="True" save_on_stop="True"'
        f' size="{image.size}" vid={quoteattr(f"appvms/{qube.name}/{name}")}/>'
        for name, image in qube.volumes.items()
    ]
    if qube.klass in SNAPSHOT_CLASSES and "root" not in qube.volumes:
        lines.append('<volume name="root" pool="default" size="10737418240" snap_on_start="True"/>')
    if qube.klass == "DispVM" and "private" not in qube.volumes:
        lines.append('<volume name="private" pool="default" size="2147483648" snap_on_start="True"/>')
    lines.append('<volume name="volatile" pool="default" rw="True" size="10737418240"/>')
    return "".join(lines)


def _named(element: str, values: Mapping[str, str]) -> str:
    return "".join(
        f"<{element} name={quoteattr(name)}>{escape(value)}</{element}>" for name, value in values.items()
    )


# --- Command line ------------------------------------------------------------------------------


def sample_qube(name: str, size: int, fill: float, klass: str = "AppVM", seed: int = 1) -> QubePlan:
    """A qube of `klass` with the volumes such a qube has, each of `size` bytes with `fill` of data."""
    volumes = {"AppVM": ["private"], "DispVM": []}.get(klass, ["root", "private"])
    images = {volume: sample_image(size, fill, seed * 2 + number) for number, volume in enumerate(volumes)}
    return QubePlan(
        name, klass, volumes=images, template=DEFAULT_TEMPLATE if klass in SNAPSHOT_CLASSES else None
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a backup of sample qubes and, if asked for, a JSON file that says what it holds."""
    parser = argparse.ArgumentParser(prog="backup_writer", description="Write a Qubes backup of sample data.")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--qube", action="append", required=True, metavar="NAME:MIB:FILL[:CLASS]")
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
    qubes = []
    for seed, description in enumerate(options.qube, 1):
        name, mib, fill, klass = (description + ":AppVM").split(":")[:4]
        qubes.append(sample_qube(name, int(float(mib) * (1 << 20)), float(fill), klass, seed))
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
