"""Foreign text and sizes in messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_restore_svc.archive.types import SHOWN_LIMIT, human_size, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vm10/private.img", "'vm10/private.img'"),
        (b"", "''"),
        (b"a'b\\c", r"'a\'b\\c'"),
        (b"\x1b[2J\0\xff", r"'\x1b[2J\x00\xff'"),
        ("\u202egnp", r"'\xe2\x80\xaegnp'"),
        (memoryview(b"a" * SHOWN_LIMIT), "'" + "a" * SHOWN_LIMIT + "'"),
        (b"a" * (SHOWN_LIMIT + 1), "'" + "a" * SHOWN_LIMIT + "…'"),
        ("a" * 10_000, "'" + "a" * SHOWN_LIMIT + "…'"),
    ],
)
def test_foreign_text_is_escaped_and_cut(text: str | bytes | memoryview, expected: str) -> None:
    assert shown(text) == expected


@given(st.text() | st.binary())
def test_no_foreign_text_reaches_a_terminal_as_it_is(text: str | bytes) -> None:
    result = shown(text).removesuffix("…'")
    assert result.isascii()
    assert result.isprintable()
    assert len(result) <= 4 * SHOWN_LIMIT + 2


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (512 << 20, "512 MiB"),
        (2 << 30, "2 GiB"),
        (1 << 40, "1 TiB"),
        (1 << 100, "1,048,576 YiB"),
    ],
)
def test_a_size_is_given_in_its_largest_unit(size: int, expected: str) -> None:
    assert human_size(size) == expected
