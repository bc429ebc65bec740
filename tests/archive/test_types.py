"""Foreign text in messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_restore_svc.archive.types import SHOWN_LIMIT, shown


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
