"""The writer's inner archives are what GNU tar and Qubes write, and what they read."""

import gzip
import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from .fixtures import expectation, shared_fixture
from .inner_archives import inner_tar
from .plans import ImagePlan, sample_image
from .reading_back import content_of, opened, program, read, without_stamp

STYLES = ["gnu", "pax", "none"]
#: Runs at both ends, neighbours, a gap of one block, and more runs than a header and one extension hold.
RUNS = ImagePlan(
    1 << 20,
    [(0, b"a" * 512), (512, b"b" * 512), (1536, b"c" * 512)]
    + [(number * 8192, b"%04d" % number * 256) for number in range(1, 60)]
    + [((1 << 20) - 512, b"z" * 512)],
)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "image",
    [
        RUNS,
        sample_image(1 << 20, 0.5, 1),
        sample_image(1 << 20, 1, 1),
        ImagePlan(1 << 20),
        ImagePlan(0),
        ImagePlan(10000, [(3, b"odd"), (700, b"extents"), (9999, b"!")]),
    ],
    ids=["runs", "sample", "full", "hole", "nothing", "odd"],
)
def test_gnu_tar_and_tarfile_extract_the_image(image: ImagePlan, style: str, tmp_path: Path) -> None:
    archive = b"".join(inner_tar("vm10/private.img", image, style))
    if style != "pax" or image.size:  # tarfile does not know that a map of nothing is a map
        assert hashlib.sha256(content_of(archive, "vm10/private.img")).hexdigest() == image.sha256()
    subprocess.run([program("tar"), "-x", "-C", str(tmp_path)], input=archive, check=True)
    assert hashlib.sha256((tmp_path / "vm10/private.img").read_bytes()).hexdigest() == image.sha256()


@pytest.mark.parametrize("count", [0, 2, 3, 4, 23, 24, 25, 45, 46])
def test_a_sparse_map_of_any_length_fills_its_headers_exactly(count: int) -> None:
    image = ImagePlan(1 << 20, [(number * 8192, b"%04d" % number * 128) for number in range(count)])
    archive = b"".join(inner_tar("vm10/private.img", image, "gnu"))
    assert hashlib.sha256(content_of(archive, "vm10/private.img")).hexdigest() == image.sha256()
    spans, extensions = count + 1, max(0, -(-(count + 1 - 4) // 21))  # the hole at the end has an entry
    assert spans <= 4 + 21 * extensions
    assert len(archive) == -(-(512 + 512 * extensions + 512 * count + 1024) // 10240) * 10240


def test_a_full_image_is_a_plain_file_and_one_with_holes_a_sparse_file() -> None:
    full, holes = sample_image(1 << 16, 1, 1), RUNS
    assert next(inner_tar("vm10/private.img", full, "gnu"))[156:157] == b"0"
    header, first, second, third, *_ = inner_tar("vm10/private.img", holes, "gnu")
    assert (header[156:157], header[482], first[504], second[504], third[504]) == (b"S", 1, 1, 1, 0)


@pytest.mark.parametrize("style", ["gnu", "pax"])
def test_an_image_past_8_gib_keeps_its_size_and_places(style: str, tmp_path: Path) -> None:
    image = ImagePlan(20 << 30, [(4096, b"low" * 512), ((19 << 30) + 512, b"high" * 512)])
    archive = b"".join(inner_tar("vm10/root.img", image, style))
    subprocess.run([program("tar"), "-x", "-C", str(tmp_path)], input=archive, check=True)
    with (tmp_path / "vm10/root.img").open("rb") as file:
        assert file.seek(0, io.SEEK_END) == 20 << 30
        file.seek((19 << 30) + 512)
        assert file.read(2052) == b"high" * 512 + bytes(4)


@pytest.mark.parametrize("style", STYLES)
def test_an_inner_archive_ends_as_its_writer_ends_it(style: str) -> None:
    archive = b"".join(inner_tar("vm10/private.img", RUNS, style))
    assert archive.endswith(bytes(1024))
    assert len(archive) % (512 if style == "pax" else 10240) == 0


def test_an_inner_archive_has_the_bytes_of_a_recorded_one() -> None:
    for backup, qube, file, style in [
        ("sparse-map.qbackup", "work", "vm10/private.img", "pax"),
        ("gzip.qbackup", "vault", "vm11/private.img", "gnu"),
    ]:
        recorded = file_of_recorded(backup, file)
        size = expectation(shared_fixture(backup)).volumes[f"{qube}/private"].size
        content = content_of(recorded, file)
        blocks = [(start, content[start : start + 512]) for start in range(0, size, 512)]
        image = ImagePlan(size, [(start, block) for start, block in blocks if any(block)])
        assert without_stamp(b"".join(inner_tar(file, image, style))) == without_stamp(recorded)


def file_of_recorded(backup: str, file: str) -> bytes:
    """The inner archive of a file in a recorded backup."""
    path = shared_fixture(backup)
    facts = expectation(path)
    stream = b""
    with tarfile.open(path, ignore_zeros=True) as tar:
        for info in tar:
            if info.name.startswith(file + "."):
                passphrase = f"{facts.backup_id}!{info.name.removesuffix('.enc')}!{facts.passphrase}"
                stream += opened(read(tar, info), passphrase)
    return gzip.decompress(stream)
