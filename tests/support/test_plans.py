"""Images hash as a whole, and sample images look like volumes."""

import gzip
import hashlib

import pytest

from .plans import ImagePlan, sample_image


def test_an_image_hashes_with_its_holes_as_zeros() -> None:
    image = ImagePlan(20, [(3, b"abc"), (10, b"xyz")])
    assert image.sha256() == hashlib.sha256(b"\0\0\0abc\0\0\0\0xyz" + bytes(7)).hexdigest()
    assert ImagePlan(3 << 20).sha256() == hashlib.sha256(bytes(3 << 20)).hexdigest()


@pytest.mark.parametrize("extents", [[(15, b"xxxxxx")], [(0, b"abc"), (2, b"d")], [(5, b"a"), (1, b"b")]])
def test_an_image_whose_extents_do_not_fit_has_no_hash(extents: list[tuple[int, bytes]]) -> None:
    with pytest.raises(ValueError, match="extent"):
        ImagePlan(20, extents).sha256()


def test_a_sample_image_is_sparse_half_noise_half_text_and_always_the_same() -> None:
    image = sample_image(32 << 20, 0.25, seed=3)
    data = b"".join(piece for _, piece in image.extents)
    assert 0.2 < len(data) / image.size <= 0.25
    assert len(image.extents) == 8
    piece = image.extents[1][1]
    assert piece[len(piece) // 2 :].replace(b" ", b"").isalpha()
    assert len(gzip.compress(piece[: len(piece) // 2])) > len(piece) // 2
    assert image.sha256() == sample_image(32 << 20, 0.25, seed=3).sha256()
    assert image.sha256() != sample_image(32 << 20, 0.25, seed=4).sha256()


@pytest.mark.parametrize(("size", "fill"), [(0, 0.5), (1000, 1), (1 << 20, 0), (1 << 20, 1), (5000, 0.1)])
def test_a_sample_image_of_any_size_and_fill_fits_its_size(size: int, fill: float) -> None:
    image = sample_image(size, fill, seed=1)
    image.sha256()
    filled = sum(len(data) for _, data in image.extents)
    assert filled == size * fill or 0 < fill < 1
