"""What each stage of a restore costs on one core, measured over a whole backup.

Strategy: the worker's own readers in one thread, each stage on the bill of one name; every image is hashed
and must be what went into the backup. What crosses the boundary is sent, received and written by the
worker's and the broker's own code, with as many bytes as the backup has, or a gibibyte that stands for them.
The sum of all, divided by the cores, is the CPU-bound limit: no restore in this way can be faster.
"""

import hashlib
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qubes_restore_svc.archive.container import open_container
from qubes_restore_svc.archive.filters import decompress
from qubes_restore_svc.archive.inner_tar import Extent, read_image, without_zeros
from qubes_restore_svc.broker.image_directory import ImageFile
from qubes_restore_svc.broker.receiver import receive_volume
from qubes_restore_svc.kdf.engine import KdfParameters, best_engine
from qubes_restore_svc.wire.volume import MAX_IMAGE_SIZE, MAX_RECORD, encode_end, encode_header, encode_record
from qubes_restore_svc.worker.memory import OWN_MEMORY
from qubes_restore_svc.worker.output import FsVerityDigest, VolumeStream

from .anatomy import Anatomy, Container, archive_source, derive_keys, dissect
from .derivations import DerivationCosts, Load, share_out
from .meter import Meter
from .samples import MIB, Sample

#: The stages after the derivations, in order, and what they do.
STAGES = {
    "read": "containers from the page cache",
    "open": "HMAC-SHA-256 over them, then decryption",
    "inflate": "decompression",
    "tar": "inner tar, zero runs",
    "digest": "fs-verity digests of the images",
    "send": "the worker's side of the boundary",
    "receive": "the broker's side",
    "write": "files and fsync, in the broker",
}
#: Those that one thread of the worker does one after the other.
ONE_THREAD = ("inflate", "tar", "send")
#: Those that a verify does not need.
ONLY_RESTORE = ("send", "receive", "write")

#: Most bytes that are sent to measure the boundary.
_MOST_SENT = 1 << 30


@dataclass(frozen=True, slots=True)
class Amounts:
    """Bytes of the archive, of the data in its images, of the images with holes; records that carry the
    data over the boundary, and bytes of them all with their framing; bytes of the largest container."""

    archive: int
    data: int
    images: int
    records: int
    crossing: int
    largest: int


@dataclass(frozen=True, slots=True)
class StageCosts:
    """CPU seconds by stage over the whole backup, and how many containers it has of each cost."""

    seconds: Mapping[str, float]
    amounts: Amounts
    mix: Mapping[KdfParameters, int]
    derivations: DerivationCosts

    def derivation_s(self, memory: int, cores: int, count: int | None = None) -> float:
        """CPU seconds of all derivations under a budget of `memory` bytes; `count`: of so many, mixed as
        these are, with chunks as large."""
        here = sum(self.mix.values())
        total = sum(
            number * self.derivations.cost(parameters, self.load(parameters, memory, cores, count)).cpu_s
            for parameters, number in self.mix.items()
        )
        return total * (count or here) / here

    def load(self, parameters: KdfParameters, memory: int, cores: int, count: int | None = None) -> Load:
        """How the worker runs one of those derivations."""
        return share_out(
            self.derivations.engine,
            parameters,
            count=count or sum(self.mix.values()),
            room=max(1, memory - OWN_MEMORY - self.amounts.largest),
            cores=cores,
        )

    def limit_s(self, memory: int, cores: int, *, verify_only: bool = False) -> float:
        """The CPU-bound limit in seconds: all stages, divided by the cores."""
        others = [cost for stage, cost in self.seconds.items() if not (verify_only and stage in ONLY_RESTORE)]
        return (self.derivation_s(memory, cores) + sum(others)) / cores


def measure_stages(sample: Sample, directory: Path) -> StageCosts:
    """Take a backup apart, stage by stage; files go to `directory`, and are removed."""
    engine = best_engine()
    anatomy = dissect(sample)
    keys = derive_keys(engine, anatomy.containers)
    meter = Meter()
    data = images = records = crossing = 0
    expected = list(sample.expected.volumes.items())
    for (file, containers), (name, volume) in zip(anatomy.images().items(), expected, strict=True):
        unpacked = _Unpacking(meter, sample.backup, anatomy, file, containers, keys)
        if unpacked.sha256 != volume.sha256:
            raise SystemExit(f"{name}: other content than what went into {sample.backup}")
        data += unpacked.data
        images += volume.size
        records += unpacked.records
        crossing += len(encode_header(0)) + len(encode_end(0))
    crossing += data + records * len(encode_record(0, 0))
    seconds = {**meter.seconds, **_boundary(data, directory)}
    return StageCosts(
        seconds={stage: seconds.get(stage, 0.0) for stage in STAGES},
        amounts=Amounts(
            archive=sample.size,
            data=data,
            images=images,
            records=records,
            crossing=crossing,
            largest=max(container.size for container in anatomy.containers),
        ),
        mix=Counter(container.head.parameters for container in anatomy.containers),
        derivations=DerivationCosts(engine),
    )


class _Unpacking:
    """One image: its SHA-256, the bytes of its data, and the records that carry them."""

    def __init__(
        self,
        meter: Meter,
        backup: Path,
        anatomy: Anatomy,
        file: str,
        containers: list[Container],
        keys: Mapping[Container, bytes],
    ) -> None:
        self._meter = meter
        self.data = self.records = 0
        pieces = self._pieces(backup, containers, keys)
        blocks = meter.through("inflate", decompress(anatomy.filter, pieces))
        with meter.stage("tar"):
            image = read_image(blocks, file, MAX_IMAGE_SIZE)
        self.sha256 = self._hash(meter.through("tar", without_zeros(image.extents)), image.size)

    def _pieces(
        self, backup: Path, containers: list[Container], keys: Mapping[Container, bytes]
    ) -> Iterator[memoryview]:
        buffer = bytearray(max(container.size for container in containers))
        with archive_source(backup) as source:
            for container in containers:
                view = memoryview(buffer)[: container.size]
                with self._meter.stage("read"):
                    source.read_at(container.offset, view)
                with self._meter.stage("open"):
                    content = open_container(view, keys[container])
                yield content

    def _hash(self, extents: Iterator[Extent], size: int) -> str:
        """Measure the digest that a restore makes, and give the SHA-256, which is known of every backup."""
        digest, known, position = FsVerityDigest(), hashlib.sha256(), 0
        zeros = memoryview(bytes(MIB))

        def know(hole: int, data: memoryview = zeros[:0]) -> None:
            for start in range(0, hole, MIB):
                known.update(zeros[: hole - start])
            known.update(data)

        for extent in extents:
            know(extent.offset - position, extent.data)
            with self._meter.stage("digest"):
                digest.skip(extent.offset - position)
                digest.update(extent.data)
            position = extent.offset + len(extent.data)
            self.data += len(extent.data)
            self.records += -(-len(extent.data) // MAX_RECORD)
        know(size - position)
        with self._meter.stage("digest"):
            digest.skip(size - position)
            digest.hexdigest()
        return known.hexdigest()


class _Receiver(threading.Thread):
    """The broker's side: receives a volume into a file, and counts what each of both costs."""

    def __init__(self, connection: socket.socket, directory: Path, size: int) -> None:
        super().__init__(daemon=True)
        self._connection, self._directory, self._size = connection, directory, size
        self.received_s = self.written_s = 0.0
        self.data_bytes = -1

    def run(self) -> None:
        start = time.thread_time()
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._file = ImageFile(folder, "sample", "private", self._size)
            self.data_bytes = receive_volume(self._connection, self, self._size)
            before = time.thread_time()
            self._file.finish(self._size)
            self.written_s += time.thread_time() - before
        finally:
            os.close(folder)
        self.received_s = time.thread_time() - start - self.written_s

    def write(self, offset: int, data: memoryview) -> None:
        """Pass on what was received."""
        start = time.thread_time()
        self._file.write(offset, data)
        self.written_s += time.thread_time() - start


def _boundary(data: int, directory: Path) -> dict[str, float]:
    """CPU seconds of what it takes to get `data` bytes from the worker into a file."""
    size = min(data, _MOST_SENT)
    content = memoryview(os.urandom(MAX_RECORD))
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory(dir=directory) as folder, ours:
        receiver = _Receiver(ours, Path(folder), size)
        receiver.start()
        start = time.thread_time()
        stream = VolumeStream(theirs, size)
        stream.begin()
        for offset in range(0, size, MAX_RECORD):
            stream.write(offset, content[: size - offset])
        stream.finish(size)
        stream.close()
        sent_s = time.thread_time() - start
        receiver.join()
    if receiver.data_bytes != size:
        raise SystemExit("what was sent over the boundary did not arrive")
    factor = data / size if size else 0.0
    return {
        "send": sent_s * factor,
        "receive": receiver.received_s * factor,
        "write": receiver.written_s * factor,
    }
