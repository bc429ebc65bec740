"""Names of members: plain relative paths, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_restore_svc.archive.members import MAX_NAME_SIZE, SHOWN_LIMIT, check_member_name, shown
from qubes_restore_svc.errors import BadArchive


@pytest.mark.parametrize(
    "name",
    [b"", b"/", b"/a", b"a/", b"a//b", b".", b"..", b"a/..", b"../a", b"a/./b", b"a\\b", b"a\x1b[2J",
     b"\xc3\xa9", b"a\x7f", b"a\x1f", b"a\nb", b"a\0b", b"a" * (MAX_NAME_SIZE + 1)],
)  # fmt: skip
def test_a_name_that_is_not_a_plain_relative_path_is_refused(name: bytes) -> None:
    with pytest.raises(BadArchive) as caught:
        check_member_name(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "name", [b"a", b"vm10/private.img.000.enc", b"a b/~!", b"...", b"a/.b", b"a" * MAX_NAME_SIZE]
)
def test_a_plain_relative_path_is_taken_as_it_is(name: bytes) -> None:
    assert check_member_name(name) == name.decode()


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
