"""backup-header: one grammar, one supported version, and what the passphrases are made of."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.archive.header import (
    MAX_BACKUP_ID_SIZE,
    MAX_HEADER_SIZE,
    BackupHeader,
    header_passphrase,
    member_passphrase,
    open_header,
    parse_header,
    peek_version,
    recognise_old_format,
)
from qubes_restore_svc.errors import BadHeader, NotABackup, RestoreError, UnsupportedFormat, UsageError
from tests.support.fixtures import expectation, shared_fixture

GOOD = {
    "version": "4",
    "encrypted": "True",
    "compressed": "True",
    "compression-filter": "gzip",
    "hmac-algorithm": "scrypt",
    "backup-id": "20260101T010203-1234",
}


def text(**changes: str | None) -> bytes:
    """The good header with some values changed or, with None, left out."""
    fields: dict[str, str | None] = {
        **GOOD,
        **{key.replace("_", "-"): value for key, value in changes.items()},
    }
    return "".join(f"{key}={value}\n" for key, value in fields.items() if value is not None).encode()


# --- A good header ----------------------------------------------------------------------------


def test_the_stock_header_is_read() -> None:
    assert parse_header(text()) == BackupHeader(
        version=4,
        encrypted=True,
        compressed=True,
        compression_filter="gzip",
        hmac_algorithm="scrypt",
        backup_id="20260101T010203-1234",
    )


def test_a_backup_that_is_not_compressed_goes_through_no_filter() -> None:
    header = parse_header(text(compressed="False", compression_filter="zstd"))
    assert (header.compressed, header.compression_filter, header.effective_filter) == (False, "zstd", "none")
    assert parse_header(text(compression_filter="zstd")).effective_filter == "zstd"


def test_gzip_is_the_filter_of_a_header_that_names_none() -> None:
    assert parse_header(text(compression_filter=None)).effective_filter == "gzip"


def test_unknown_keys_are_ignored() -> None:
    assert parse_header(text() + b"colour=blue\ncrypto-algorithm=aes-256-cbc\nempty=\n") == parse_header(
        text()
    )


def test_the_order_of_the_lines_does_not_matter() -> None:
    lines = text().splitlines(keepends=True)
    assert parse_header(b"".join(reversed(lines))) == parse_header(text())


# --- What is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["version", "encrypted", "compressed", "hmac_algorithm", "backup_id"])
def test_a_header_without_a_required_key_is_refused(key: str) -> None:
    with pytest.raises(BadHeader, match=f"does not say {key.replace('_', '-')}"):
        parse_header(text(**{key: None}))


@pytest.mark.parametrize("line", [b"version=4\n", b"backup-id=other\n", b"compressed=True\n"])
def test_a_key_that_stands_twice_is_refused(line: bytes) -> None:
    with pytest.raises(BadHeader, match="twice"):
        parse_header(text() + line)


def test_an_unknown_key_that_stands_twice_is_refused() -> None:
    with pytest.raises(BadHeader, match="twice"):
        parse_header(text() + b"colour=blue\ncolour=blue\n")


@pytest.mark.parametrize(
    "line",
    [b"\n", b"x\n", b"=x\n", b"x=y=z\n", b"x =y\n", b"x= y\n", b"x=y \n", b" x=y\n", b"x=y\r\n", b"x=a_b\n",
    b"x=a.b\n",
     b"x=\0\n", b"x=\x1b[2J\n", b"x=a\x0bb=c\n", b"x=a\x85\n", "x=\u00e9\n".encode(), "x=\u0661\n".encode(),
     b"x=y", b"\xff\n"],
)  # fmt: skip
def test_a_malformed_line_is_refused(line: bytes) -> None:
    for parse in (parse_header, peek_version):
        with pytest.raises(BadHeader) as caught:
            parse(text() + line)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", ["true", "1", "yes", "", "TRUE", "True-"])
def test_a_truth_value_is_spelled_in_one_way(value: str) -> None:
    with pytest.raises(BadHeader, match="for compressed"):
        parse_header(text(compressed=value))


def test_a_format_4_that_is_not_encrypted_is_refused() -> None:
    with pytest.raises(BadHeader, match="not encrypted"):
        parse_header(text(encrypted="False"))


def test_another_hmac_algorithm_is_refused() -> None:
    with pytest.raises(BadHeader, match="'SHA512'"):
        parse_header(text(hmac_algorithm="SHA512"))


@pytest.mark.parametrize("backup_id", ["", "-rf", "x" * (MAX_BACKUP_ID_SIZE + 1)])
def test_an_impossible_backup_id_is_refused(backup_id: str) -> None:
    with pytest.raises(BadHeader, match="backup-id"):
        parse_header(text(backup_id=backup_id))


def test_a_header_is_bounded() -> None:
    fits = text() + b"x=" + b"y" * (MAX_HEADER_SIZE - len(text()) - 3) + b"\n"
    assert parse_header(fits).version == 4
    for parse in (parse_header, peek_version):
        with pytest.raises(BadHeader, match="more than 4096 bytes"):
            parse(fits + b"z=\n")


def test_an_empty_header_is_refused() -> None:
    with pytest.raises(BadHeader, match="empty"):
        parse_header(b"")


def test_a_header_that_differs_from_its_authenticated_copy_is_refused() -> None:
    assert open_header(text(), text()) == parse_header(text())
    with pytest.raises(BadHeader, match="differs"):
        open_header(text(compressed="False"), text())
    with pytest.raises(BadHeader, match="differs"):
        open_header(text() + b"x=y\n", text())


# --- Format 3 ---------------------------------------------------------------------------------


def old_text(**changes: str | None) -> bytes:
    """A header of format 3 with some values changed or, with None, left out."""
    old: dict[str, str | None] = {
        "version": "3",
        "hmac_algorithm": "SHA512",
        "crypto_algorithm": "aes-256-cbc",
        "backup_id": None,
    }
    return text(**(old | changes))


def test_a_header_of_format_3_is_read() -> None:
    assert parse_header(old_text()) == BackupHeader(
        version=3,
        encrypted=True,
        compressed=True,
        compression_filter="gzip",
        hmac_algorithm="SHA512",
        backup_id="",
        crypto_algorithm="aes-256-cbc",
    )


def test_a_backup_of_format_3_may_be_authenticated_only() -> None:
    header = parse_header(old_text(encrypted="False", crypto_algorithm=None))
    assert (header.encrypted, header.crypto_algorithm) == (False, "")


@pytest.mark.parametrize("key", ["hmac_algorithm", "crypto_algorithm", "encrypted", "compressed"])
def test_a_header_of_format_3_says_all_that_is_needed(key: str) -> None:
    with pytest.raises(BadHeader, match=key.replace("_", "-")):
        parse_header(old_text(**{key: None}))


# --- Versions ---------------------------------------------------------------------------------


def test_the_version_of_an_unauthenticated_header_is_seen() -> None:
    assert peek_version(text()) == 4
    assert peek_version(b"version=4\n") == 4
    assert peek_version(b"version=3\n") == 3


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("1", "format 1, which Qubes R1 wrote"),
        ("2", "format 2, which early versions of Qubes R2 wrote"),
        ("5", "format 5, which is newer than this program"),
        ("1000", "newer"),
    ],
)
def test_another_version_is_named_with_its_writer(version: str, reason: str) -> None:
    for parse in (parse_header, peek_version):
        with pytest.raises(UnsupportedFormat, match=reason):
            parse(text(version=version))


@pytest.mark.parametrize("version", ["", "0", "04", "-4", "four", "4" * 300])
def test_an_impossible_version_is_refused(version: str) -> None:
    for parse in (parse_header, peek_version):
        with pytest.raises(BadHeader, match="version"):
            parse(text(version=version))


@pytest.mark.parametrize(
    ("first", "expected", "reason"),
    [
        ("qubes.xml.000", UnsupportedFormat, "format 2"),
        ("qubes.xml.000.hmac", UnsupportedFormat, "format 2"),
        ("appvms/work/private.img.000", UnsupportedFormat, "format 2"),
        ("qubes.xml", UnsupportedFormat, "format 1"),
        ("qubes.xml.000.enc", BadHeader, "begins with 'qubes.xml.000.enc'"),
        ("vm10/private.img.1000.enc", BadHeader, "missing"),
        ("backup-header.hmac", BadHeader, "missing"),
        ("holiday.jpg", NotABackup, "'holiday.jpg'"),
        ("disk.0001", NotABackup, "backup-header"),
    ],
)
def test_an_archive_without_a_header_is_recognised_by_its_first_member(
    first: str, expected: type[RestoreError], reason: str
) -> None:
    with pytest.raises(expected, match=reason):
        recognise_old_format(first)


# --- Passphrases ------------------------------------------------------------------------------


def test_the_passphrase_of_a_member_binds_backup_and_name() -> None:
    assert header_passphrase("grün!") == b"backup-header!gr\xc3\xbcn!"
    assert (
        member_passphrase("id-1", "vm10/private.img.000", "grün!")
        == b"id-1!vm10/private.img.000!gr\xc3\xbcn!"
    )


def test_a_passphrase_without_an_encoding_is_an_error_that_does_not_show_it() -> None:
    for make in (header_passphrase, lambda passphrase: member_passphrase("id", "m", passphrase)):
        with pytest.raises(UsageError) as caught:
            make("secret\udc80")
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


# --- Anything at all ---------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused_in_an_orderly_way(garbage: bytes, after_a_header: bool) -> None:
    for parse in (parse_header, peek_version):
        try:
            parse((text() if after_a_header else b"") + garbage)
        except RestoreError as error:
            assert str(error).isprintable()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_first_member_gets_an_answer(name: str) -> None:
    with pytest.raises(RestoreError) as caught:
        recognise_old_format(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["gzip", "bzip2", "xz", "zstd", "pigz"])
def test_the_header_of_a_recorded_backup_is_read(name: str) -> None:
    path = shared_fixture(f"{name}.qbackup")
    recorded = path.read_bytes()[1536:2048].rstrip(b"\0")
    header = parse_header(recorded)
    assert header.backup_id == expectation(path).backup_id
    assert header.effective_filter == name
