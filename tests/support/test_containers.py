"""The real programs open the writer's containers and compressed streams."""

import subprocess
from pathlib import Path

import pytest

from qubes_restore_svc.archive.filters import FILTERS

from .containers import chunks, compress, scrypt_container
from .plans import sample_image
from .reading_back import program

PACKING = [name for name in FILTERS if name != "none"]


def test_the_scrypt_program_opens_a_container(tmp_path: Path) -> None:
    scrypt = program("scrypt")
    (tmp_path / "container").write_bytes(scrypt_container(b"some text" * 1000, b"pass phrase", 10, 8, 2))
    command = [scrypt, "dec", "-P", str(tmp_path / "container")]
    result = subprocess.run(command, input=b"pass phrase\n", capture_output=True, check=True)
    assert result.stdout == b"some text" * 1000


def test_a_container_is_128_bytes_longer_than_its_content_and_salted() -> None:
    assert len(scrypt_container(b"12345", b"p", 4)) == 133
    assert scrypt_container(b"12345", b"p", 4) != scrypt_container(b"12345", b"p", 4)


@pytest.mark.parametrize("filter_name", PACKING)
def test_the_real_program_decompresses_a_stream(filter_name: str) -> None:
    data = [sample_image(1 << 21, 0.9, 1).extents[0][1]] * 5
    stream = b"".join(compress(filter_name, data))
    result = subprocess.run([program(filter_name), "-dc"], input=stream, capture_output=True, check=True)
    assert result.stdout == b"".join(data)


def test_chunks_are_cut_at_the_size_and_the_last_one_is_shorter() -> None:
    assert list(chunks([b"abc", b"", b"defgh"], 3)) == [b"abc", b"def", b"gh"]
    assert list(chunks([b"abcdef"], 3)) == [b"abc", b"def", b""]
    assert list(chunks([], 3)) == [b""]
