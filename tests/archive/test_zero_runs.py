"""Blocks of zeros are dropped from extents, and nothing else is."""

from hypothesis import given
from hypothesis import strategies as st

from qubes_restore_svc.archive.inner_tar import Extent
from qubes_restore_svc.archive.zero_runs import BLOCK, without_zeros

#: Pieces of which images are made: zeros and data, whole blocks and parts of them.
_PIECES = st.tuples(st.booleans(), st.sampled_from([1, 511, 512, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK]))


def image_of(extents: list[Extent], size: int) -> bytes:
    image = bytearray(size)
    for extent in extents:
        image[extent.offset : extent.offset + len(extent.data)] = extent.data
    return bytes(image)


@given(
    st.lists(_PIECES, min_size=1, max_size=12), st.sampled_from([0, 1, 512, BLOCK - 1, BLOCK, 7 * BLOCK + 3])
)
def test_the_image_stays_what_it_was_and_no_block_of_zeros_is_left(
    pieces: list[tuple[bool, int]], offset: int
) -> None:
    data = b"".join(bytes(length) if zero else b"x" * length for zero, length in pieces)
    kept = list(without_zeros([Extent(offset, memoryview(data))]))
    assert image_of(kept, offset + len(data)) == bytes(offset) + data
    position = offset
    for extent in kept:
        assert extent.offset >= position
        assert len(extent.data) > 0
        position = extent.offset + len(extent.data)
        first = -extent.offset % BLOCK
        blocks = range(first, len(extent.data) - BLOCK + 1, BLOCK)
        assert all(any(extent.data[block : block + BLOCK]) for block in blocks)


def test_data_without_zeros_is_passed_on_as_it_is_and_uncopied() -> None:
    extent = Extent(5, memoryview(b"data" * BLOCK))
    (kept,) = without_zeros([extent])
    assert (kept.offset, kept.data.obj) == (5, extent.data.obj)
    assert kept.data == extent.data


def test_zeros_that_fill_no_whole_block_stay() -> None:
    data = b"x" + bytes(2 * BLOCK - 2) + b"x"
    (kept,) = without_zeros([Extent(0, memoryview(data))])
    assert kept.data == data


def test_zeros_are_seen_at_the_places_of_the_image_and_not_of_the_extent() -> None:
    data = b"x" * 100 + bytes(BLOCK) + b"y" * 100
    offsets = [extent.offset for extent in without_zeros([Extent(BLOCK - 100, memoryview(data))])]
    assert offsets == [BLOCK - 100, 2 * BLOCK]
    assert [extent.offset for extent in without_zeros([Extent(BLOCK - 99, memoryview(data))])] == [BLOCK - 99]


def test_an_image_of_zeros_has_no_extents() -> None:
    assert list(without_zeros([Extent(0, memoryview(bytes(1 << 20)))])) == []
