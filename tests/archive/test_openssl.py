"""What openssl wrote in backups of format 3: MAC lines of all spellings, streams of all ciphers, and their
damage.
"""

import subprocess
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC
from hypothesis import given
from hypothesis import strategies as st

from qubes_restore_svc.archive.openssl import (
    _key_and_iv,
    check_cipher,
    check_digest,
    decrypt,
    open_piece,
    parse_mac,
)
from qubes_restore_svc.errors import AuthenticationFailed, BadContainer, BadHeader

PASSPHRASE = "Zuckerstück & pass"
KEY = PASSPHRASE.encode()
CONTENT = bytes(range(256)) * 5 + b"end"


def openssl(*arguments: str, content: bytes) -> bytes:
    """What the real program writes."""
    return subprocess.run(["openssl", *arguments], input=content, stdout=subprocess.PIPE, check=True).stdout


def encrypted(cipher: str, content: bytes = CONTENT) -> bytes:
    return openssl("enc", "-e", f"-{cipher}", "-md", "MD5", "-pass", f"pass:{PASSPHRASE}", content=content)


def cut(stream: bytes, size: int) -> Iterator[bytes]:
    return (stream[start : start + size] for start in range(0, len(stream), size))


# --- The MAC -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SHA1", "SHA224", "SHA256", "SHA384", "SHA512"])
def test_a_piece_opens_with_the_line_that_openssl_prints(name: str) -> None:
    line = openssl("dgst", f"-{name.lower()}", "-hmac", PASSPHRASE, content=CONTENT)
    digest = check_digest(name)
    mac = parse_mac(line)
    assert mac.digest == digest and mac == parse_mac(line, digest)
    assert open_piece(CONTENT, mac, KEY) == CONTENT


@pytest.mark.parametrize(
    "spelling",
    [
        "SHA512(stdin)= {}\n",
        "SHA2-512(stdin)= {}\n",
        "HMAC-SHA512(stdin)= {}\n",
        "(stdin)= {}\n",
        "{}\n",
        "{}",
    ],
)
@pytest.mark.parametrize("case", [str.lower, str.upper])
def test_every_spelling_of_the_line_is_read(spelling: str, case: object) -> None:
    number = openssl("dgst", "-sha512", "-hmac", PASSPHRASE, content=CONTENT).split()[-1].decode()
    assert callable(case)
    line = spelling.format(case(number)).encode()
    open_piece(CONTENT, parse_mac(line, "sha512"), KEY)


def test_other_content_or_another_passphrase_does_not_open() -> None:
    line = openssl("dgst", "-sha1", "-hmac", PASSPHRASE, content=CONTENT)
    for content, key in ((CONTENT[:-1], KEY), (CONTENT, KEY + b"x")):
        with pytest.raises(AuthenticationFailed):
            open_piece(content, parse_mac(line), key)


NUMBER = b"a" * 128


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"SHA512(stdin)= ",
        b"SHA512(stdin)= " + NUMBER[1:] + b"\n",
        b"SHA512(stdin)= " + NUMBER + b"a\n",
        b"SHA512(stdin)= " + NUMBER + b" \n",
        b"SHA512(stdin)= " + NUMBER + b"\n\n",
        b"SHA512(stdin)= " + NUMBER[:-1] + b"g\n",
        b"SHA512(st\x1bdin)= " + NUMBER + b"\n",
        b"SHA1(stdin)= " + NUMBER[:40] + b"\n",
        NUMBER + b"\0",
        b"\xff" + NUMBER,
    ],
)
def test_a_line_that_openssl_does_not_print_is_refused(line: bytes) -> None:
    with pytest.raises(BadContainer):
        parse_mac(line, "sha512")


@pytest.mark.parametrize("name", ["MD5", "scrypt", "", "SHA3-512", "whirlpool"])
def test_a_digest_that_is_not_known_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadHeader, match="hmac-algorithm"):
        check_digest(name)


# --- The encrypted stream ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [f"aes-{bits}-{mode}" for bits in (128, 192, 256) for mode in ("cbc", "ctr")] + ["AES-256-CBC"]
)
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1283])
def test_what_openssl_encrypted_comes_back(name: str, size: int) -> None:
    stream = encrypted(name, CONTENT[:size])
    for piece_size in (1, 7, 16, 4096):
        assert b"".join(decrypt(cut(stream, piece_size), check_cipher(name), KEY)) == CONTENT[:size]


@pytest.mark.parametrize("kept", [0, 1, 8, 15, 16, 17, 31, 47, 48, 160, 1295])
def test_a_stream_that_lacks_its_end_is_refused(kept: int) -> None:
    with pytest.raises(BadContainer):
        list(decrypt([encrypted("aes-256-cbc")[:kept]], check_cipher("aes-256-cbc"), KEY))


@pytest.mark.parametrize("end", [b"\0", b"\x11", b"\x02", b"\1\3\3", b"\x0f" + b"\x10" * 15])
def test_a_stream_whose_padding_is_not_what_openssl_writes_is_refused(end: bytes) -> None:
    cipher = check_cipher("aes-256-cbc")
    # Encrypted without padding of its own: the last block is `end` behind other bytes.
    key, iv = _key_and_iv(KEY, bytes(8), 32)
    encryptor = Cipher(AES(key), CBC(iv)).encryptor()
    stream = b"Salted__" + bytes(8) + encryptor.update(b"a" * (16 - len(end)) + end)
    with pytest.raises(BadContainer, match="does not end"):
        list(decrypt([stream], cipher, KEY))


def test_a_stream_without_openssls_mark_is_refused() -> None:
    with pytest.raises(BadContainer, match="begin"):
        list(decrypt([b"salted__" + bytes(40)], check_cipher("aes-256-cbc"), KEY))


@pytest.mark.parametrize("name", ["", "none", "des-ede3-cbc", "rc4", "aes-256-ecb", "aes-256-gcm", "bf-cbc"])
def test_a_cipher_that_is_not_offered_is_refused_by_name(name: str) -> None:
    with pytest.raises(BadHeader, match="crypto-algorithm"):
        check_cipher(name)


@given(st.binary(max_size=200), st.integers(1, 50), st.sampled_from(["aes-128-cbc", "aes-256-ctr"]))
def test_whatever_stands_there_is_read_or_refused(stream: bytes, size: int, name: str) -> None:
    try:
        content = b"".join(decrypt(cut(b"Salted__" + stream, size), check_cipher(name), KEY))
    except BadContainer:
        return
    assert len(content) <= len(stream)
