"""Names of members: plain relative paths, and nothing else."""

import pytest

from qubes_restore_svc.archive.members import MAX_NAME_SIZE, check_member_name
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
