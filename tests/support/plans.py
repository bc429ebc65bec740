"""Plans: what a backup of the tests is made of, before anything of it is written.

Strategy: a plan is a value that says all there is to say about a volume or a qube, small enough to
stand in a test. A sample image is the exception in size only: its data is made when it is read, from
its seed, so that a volume of any size fits.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from qubes_restore_svc.worker.output import FsVerityDigest

FIRST_QID = 10  # of the first qube in a backup; lower numbers are dom0 and the qubes only referred to
DEFAULT_TEMPLATE = "fedora-41"
LABELS = ("red", "orange", "yellow", "green", "gray", "blue", "purple", "black")
SNAPSHOT_CLASSES = ("AppVM", "DispVM")  # their root is a snapshot of the template's
DOM0_HOME = "dom0-home/user"
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """A volume's image: `size` in bytes, and what is not zero as (offset, data), rising, disjoint."""

    size: int
    extents: Sequence[tuple[int, bytes]] = ()

    def sha256(self) -> str:
        """SHA-256, in hex, of the whole image, holes as zeros."""
        digest, zeros = hashlib.sha256(), bytes(1 << 20)
        for hole, data in self._runs():
            for start in range(0, hole, len(zeros)):
                digest.update(zeros[: hole - start])
            digest.update(data)
        return digest.hexdigest()

    def fsverity(self) -> str:
        """Its fs-verity digest."""
        digest = FsVerityDigest()
        for hole, data in self._runs():
            digest.skip(hole)
            digest.update(data)
        return digest.hexdigest()

    def _runs(self) -> Iterator[tuple[int, bytes]]:
        """Bytes of a hole, and the data behind it."""
        position = 0
        for offset, data in itertools.chain(self.extents, [(self.size, b"")]):
            if not position <= offset <= offset + len(data) <= self.size:
                raise ValueError(f"extent of {len(data)} bytes at {offset} in an image of {self.size}")
            yield offset - position, data
            position = offset + len(data)


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


def image_of_file(path: Path) -> ImagePlan:
    """The image that a file is, with its holes."""
    extents = []
    with path.open("rb") as file:
        for start, end in data_of(file.fileno()):
            file.seek(start)
            extents += [(at, file.read(min(_PIECE, end - at))) for at in range(start, end, _PIECE)]
    return ImagePlan(path.stat().st_size, extents)


def data_of(fd: int) -> Iterator[tuple[int, int]]:
    """Where the file has data: from, to."""
    end = 0
    with contextlib.suppress(OSError):  # there is no more
        while True:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, end


def sample_qube(name: str, size: int, fill: float, klass: str = "AppVM", seed: int = 1) -> QubePlan:
    """A qube of `klass` with the volumes such a qube has, each of `size` bytes with `fill` of data."""
    volumes = {"AppVM": ["private"], "DispVM": []}.get(klass, ["root", "private"])
    images = {volume: sample_image(size, fill, seed * 2 + number) for number, volume in enumerate(volumes)}
    return QubePlan(
        name, klass, volumes=images, template=DEFAULT_TEMPLATE if klass in SNAPSHOT_CLASSES else None
    )


def expectation_of(qubes: Iterable[QubePlan], passphrase: str, backup_id: str) -> dict[str, object]:
    """What a restore of these qubes must give, for JSON: with each volume's size and SHA-256."""
    volumes = {
        f"{qube.name}/{volume}": {"size": image.size, "sha256": image.sha256()}
        for qube in qubes
        if qube.included
        for volume, image in qube.volumes.items()
    }
    return {"passphrase": passphrase, "backup_id": backup_id, "volumes": volumes}


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
