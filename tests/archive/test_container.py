"""The scrypt container: opened only with its keys, decrypted only once verified, bounded before it costs
anything."""

import hashlib
import hmac
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.archive.container import (
    HEAD_SIZE,
    OVERHEAD,
    ContainerHead,
    keys_match,
    open_container,
    open_small,
    parse_head,
)
from qubes_restore_svc.archive.header import header_passphrase
from qubes_restore_svc.archive.outer_tar import OuterTarReader
from qubes_restore_svc.errors import AuthenticationFailed, BadContainer, ExcessiveCost, RestoreError
from qubes_restore_svc.kdf.engine import MAX_WORK, KdfParameters, OpensslEngine
from tests.support.fixtures import expectation, shared_fixture

KEYS = bytes(range(64))
SALT = bytes(range(32, 64))


def head(
    magic: bytes = b"scrypt", version: int = 0, log_n: int = 10, r: int = 8, p: int = 1, keys: bytes = KEYS
) -> bytes:
    raw = magic + struct.pack(">BBII", version, log_n, r, p) + SALT
    raw += hashlib.sha256(raw).digest()[:16]
    return raw + hmac.digest(keys[32:], raw, "sha256")


def container(content: bytes, keys: bytes = KEYS) -> bytes:
    body = head(keys=keys) + Cipher(AES256(keys[:32]), CTR(bytes(16))).encryptor().update(content)
    return body + hmac.digest(keys[32:], body, "sha256")


def derive(parsed: ContainerHead, passphrase: bytes) -> bytes:
    return OpensslEngine().derive([parsed.request(passphrase)])[0]


# --- The head ---------------------------------------------------------------------------------


def test_the_head_gives_parameters_and_salt() -> None:
    parsed = parse_head(head(log_n=20, r=8, p=3))
    assert parsed == ContainerHead(KdfParameters(20, 8, 3), SALT, head(log_n=20, r=8, p=3))


def test_only_the_head_of_a_longer_buffer_is_read() -> None:
    assert parse_head(memoryview(bytearray(container(b"x" * 100)))).raw == head()


@pytest.mark.parametrize("size", [0, 1, 48, HEAD_SIZE - 1])
def test_a_head_that_is_too_short_is_refused(size: int) -> None:
    with pytest.raises(BadContainer, match="too few"):
        parse_head(head()[:size])


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (head(magic=b"Scrypt"), "does not begin like"),
        (b"Salted__" + bytes(88), "does not begin like"),
        (head(version=1), "version 1"),
        (head(log_n=0), "N = 2\\^0"),
        (head(log_n=64), "N = 2\\^64"),
        (head(log_n=255), "N = 2\\^255"),
        (head(r=0), "r = 0"),
        (head(p=0), "p = 0"),
        (head(r=1 << 15, p=1 << 15), "impossible"),
        (head(r=0xFFFFFFFF, p=0xFFFFFFFF), "impossible"),
        (head(log_n=16, r=1), "impossible"),
    ],
)
def test_a_malformed_head_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(BadContainer, match=reason):
        parse_head(raw)


def test_a_changed_bit_before_the_mac_of_the_head_is_noticed() -> None:
    for position in range(64):
        changed = bytearray(head())
        changed[position] ^= 1
        with pytest.raises(BadContainer):
            parse_head(changed)


@pytest.mark.parametrize(("log_n", "memory"), [(25, "32.0 GiB"), (30, "1.0 TiB")])
def test_an_excessive_cost_is_refused_with_what_it_asks_for(log_n: int, memory: str) -> None:
    with pytest.raises(ExcessiveCost, match=f"takes {memory} of memory"):
        parse_head(head(log_n=log_n))
    assert parse_head(head(log_n=log_n), ignore_cost_limit=True).parameters.log_n == log_n


def test_a_cost_in_time_alone_is_refused_too() -> None:
    with pytest.raises(ExcessiveCost, match="p = 1000000"):
        parse_head(head(log_n=10, r=8, p=1_000_000))


# --- Keys -------------------------------------------------------------------------------------


def test_the_right_keys_match_and_others_do_not() -> None:
    assert keys_match(parse_head(head()), KEYS)
    assert not keys_match(parse_head(head()), KEYS[:63] + b"\0")
    changed = bytearray(head())
    changed[95] ^= 1
    assert not keys_match(parse_head(changed), KEYS)


def test_keys_have_64_bytes() -> None:
    with pytest.raises(ValueError, match="64 bytes"):
        keys_match(parse_head(head()), KEYS[:63])
    with pytest.raises(ValueError, match="64 bytes"):
        open_small(container(b""), KEYS + b"\0")


# --- The content ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1000])
def test_the_content_is_decrypted_where_it_lies(size: int) -> None:
    content = bytes(number % 251 for number in range(size))
    buffer = bytearray(container(content))
    opened = open_container(buffer, KEYS)
    assert opened == content
    assert opened.readonly
    assert buffer[HEAD_SIZE : HEAD_SIZE + size] == content
    assert open_small(container(content), KEYS) == content


def test_the_counter_passes_a_byte_boundary_like_the_cipher_s() -> None:
    content = bytes(16 * 300)
    assert open_small(container(content), KEYS) == content


def test_nothing_can_be_decrypted_before_the_mac_was_checked() -> None:
    forged = bytearray(container(b"attack at dawn"))
    forged[HEAD_SIZE] ^= 1
    before = bytes(forged)
    for attempt in (open_container, open_small):
        with pytest.raises(AuthenticationFailed):
            attempt(forged, KEYS)
        assert forged == before


def test_every_changed_bit_is_noticed() -> None:
    good = container(b"content")
    for position in range(len(good)):
        changed = bytearray(good)
        changed[position] ^= 0x80
        with pytest.raises(AuthenticationFailed):
            open_small(changed, KEYS)


def test_a_container_that_was_cut_or_lengthened_is_noticed() -> None:
    good = container(b"content")
    for size in range(len(good)):
        expected = BadContainer if size < OVERHEAD else AuthenticationFailed
        with pytest.raises(expected):
            open_small(good[:size], KEYS)
    with pytest.raises(AuthenticationFailed):
        open_small(good + b"\0", KEYS)


def test_other_keys_do_not_open_it() -> None:
    with pytest.raises(AuthenticationFailed):
        open_small(container(b"content"), bytes(64))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_refused_in_an_orderly_way(garbage: bytes, with_magic: bool) -> None:
    candidate = b"scrypt\0" + garbage if with_magic else garbage
    for attempt in (parse_head, lambda data: open_small(data, KEYS)):
        with pytest.raises(RestoreError) as caught:
            attempt(candidate)
        assert str(caught.value).isprintable()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 255),
    st.integers(0, 0xFFFFFFFF) | st.integers(0, 32),
    st.integers(0, 0xFFFFFFFF) | st.integers(0, 32),
)
def test_whatever_is_accepted_can_be_afforded(log_n: int, r: int, p: int) -> None:
    try:
        parsed = parse_head(head(log_n=log_n, r=r, p=p))
    except (BadContainer, ExcessiveCost):
        return
    assert parsed.parameters.memory <= 25 << 30
    assert parsed.parameters.work <= MAX_WORK


# --- The real program, and its files ---------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 70_000])
def test_it_opens_what_the_scrypt_program_wrote(tmp_path: Path, size: int) -> None:
    program = shutil.which("scrypt")
    if program is None:
        pytest.skip("the scrypt program is not installed")
    content = bytes(number * 7 % 256 for number in range(size))
    (tmp_path / "plain").write_bytes(content)
    cost = ["--logN", "10", "-r", "8", "-p", "2"]
    subprocess.run(
        [program, "enc", *cost, "-P", tmp_path / "plain", tmp_path / "enc"], input=b"pass\n", check=True
    )
    written = (tmp_path / "enc").read_bytes()
    assert len(written) == len(content) + OVERHEAD
    parsed = parse_head(written)
    assert parsed.parameters == KdfParameters(10, 8, 2)
    keys = derive(parsed, b"pass")
    assert keys_match(parsed, keys)
    assert not keys_match(parsed, derive(parsed, b"Pass"))
    assert open_small(written, keys) == content


def test_the_scrypt_program_opens_what_these_tests_build(tmp_path: Path) -> None:
    program = shutil.which("scrypt")
    if program is None:
        pytest.skip("the scrypt program is not installed")
    keys = derive(parse_head(head()), b"pass")
    (tmp_path / "enc").write_bytes(container(b"content" * 100, keys))
    done = subprocess.run(
        [program, "dec", "-P", tmp_path / "enc"], input=b"pass\n", check=True, capture_output=True
    )
    assert done.stdout == b"content" * 100


def test_a_recorded_header_opens_with_its_passphrase_only() -> None:
    path = shared_fixture("gzip.qbackup")
    members: dict[str, bytes] = {}
    position, reader, backup = 0, OuterTarReader(), path.read_bytes()
    while len(members) < 2:
        size = reader.wanted
        member = reader.feed(backup[position : position + size])
        position += size
        if member is not None:
            members[member.name] = backup[position : position + member.size]
            reader.skip(member.size)
            position += member.size
    parsed = parse_head(members["backup-header.hmac"])
    keys = derive(parsed, header_passphrase(expectation(path).passphrase))
    assert keys_match(parsed, keys)
    assert open_small(members["backup-header.hmac"], keys) == members["backup-header"]
    assert not keys_match(parsed, derive(parsed, header_passphrase("wrong")))
