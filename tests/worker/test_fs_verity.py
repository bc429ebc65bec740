"""The fs-verity digest: as the specification says it, as fsverity-utils makes it, and holes for nothing."""

import hashlib
import shutil
import subprocess
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.worker.output import FsVerityDigest

BLOCK, FULL = 4096, 128 * 4096

#: What `fsverity digest` of fsverity-utils 1.5 printed for files with the bytes of `sample`.
RECORDED = {
    0: "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95",
    1: "993ff7150557faac170763521afb1154ec109172fed042d1078c6bccd05cb577",
    BLOCK - 1: "f3f0d6ded954a7fa18dd0bd7e9502edf1bd2001e7c58e10c832b5b01d0379aa1",
    BLOCK: "6630e7d70777b256012d7184bc87bcb6ab305ee51cf7215dc05ce90f3aaba854",
    BLOCK + 1: "bd8eca316bdd426886cfdfdf5373c04ac948d4b396eebd0e6ea23bc542a0a431",
    FULL: "3d172f50eb4303c058899258d142ceeec08c72651c26b4d72472e45a7527ab34",
    FULL + 1: "7ea477b33e6977053ee4e532390ae2b24d0218573b950753d162806bbe0be3db",
    128 * FULL + 1: "19e9a3141b385ea38c59e2f499339a94bbeb7e1b3d6894c171d803c193248f43",
}


def sample(size: int) -> bytes:
    """Bytes that are nowhere the same for long."""
    pattern = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(1021))
    return (pattern * (size // len(pattern) + 1))[:size]


def plain_digest(image: bytes) -> str:
    """By the letter of the specification, with everything in memory."""
    blocks = [image[start : start + BLOCK].ljust(BLOCK, b"\0") for start in range(0, len(image), BLOCK)]
    while len(blocks) > 1:
        hashes = b"".join(hashlib.sha256(block).digest() for block in blocks)
        blocks = [hashes[start : start + BLOCK].ljust(BLOCK, b"\0") for start in range(0, len(hashes), BLOCK)]
    root = hashlib.sha256(blocks[0]).digest() if blocks else bytes(32)
    descriptor = bytes([1, 1, 12, 0, 0, 0, 0, 0]) + len(image).to_bytes(8, "little") + root
    return hashlib.sha256(descriptor.ljust(256, b"\0")).hexdigest()


def digest_of(image: bytes) -> str:
    digest = FsVerityDigest()
    digest.update(image)
    return digest.hexdigest()


@pytest.mark.parametrize("size", RECORDED)
def test_it_is_what_fsverity_utils_print(size: int) -> None:
    assert digest_of(sample(size)) == RECORDED[size]


@pytest.mark.skipif(shutil.which("fsverity") is None, reason="fsverity-utils are not installed")
@pytest.mark.parametrize("size", [127 * BLOCK, 129 * BLOCK, 128 * FULL])
def test_it_is_what_fsverity_utils_of_this_machine_print(size: int, tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(sample(size))
    printed = subprocess.run(["fsverity", "digest", file], check=True, capture_output=True, text=True).stdout
    assert printed == f"sha256:{digest_of(sample(size))} {file}\n"


RUNS = st.lists(
    st.tuples(
        st.booleans(),
        st.sampled_from([1, BLOCK, 127 * BLOCK, FULL]).flatmap(
            lambda size: st.integers(max(1, size - 2), size + 2)
        ),
    ),
    max_size=6,
)


@settings(max_examples=30)
@given(RUNS)
def test_it_is_the_same_however_the_image_is_cut_and_where_its_holes_are(
    runs: list[tuple[bool, int]],
) -> None:
    digest, image = FsVerityDigest(), b""
    for is_hole, size in runs:
        data = bytes(size) if is_hole else sample(size)
        if is_hole:
            digest.skip(size)
        else:
            digest.update(memoryview(data))
        image += data
    assert digest.hexdigest() == plain_digest(image)


@pytest.mark.parametrize("size", [0, 1, BLOCK, FULL - 1, FULL, FULL + 1, 8 * FULL + 5])
def test_a_hole_is_as_good_as_its_zeros(size: int) -> None:
    digest = FsVerityDigest()
    digest.skip(size)
    assert digest.hexdigest() == plain_digest(bytes(size))


def test_16_tebibytes_of_holes_take_next_to_no_steps_and_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = 0

    def counted(block: bytes) -> bytes:
        nonlocal hashed
        hashed += 1
        return hashlib.sha256(block).digest()

    monkeypatch.setattr("qubes_restore_svc.worker.output._hash", counted)
    digest = FsVerityDigest()
    tracemalloc.start()
    for _ in range(16):
        digest.skip((1 << 40) - 5000)
        digest.update(b"x" * 5000)
    digest.hexdigest()
    assert tracemalloc.get_traced_memory()[1] < 1 << 18
    tracemalloc.stop()
    assert hashed < 16 * 40
