"""What `openssl dgst -hmac` and `openssl enc` wrote, in backups of format 3 (Qubes R2 to R3.2).

Strategy: a piece of the backup is stored with a second member behind it, the line that `openssl dgst`
printed over the piece. `open_piece` is the only way to the content of a piece, and checks that line. The
pieces of one file are together one stream of `openssl enc`; `decrypt` reads it as a
generator, so nothing of it is there before the pieces that it needs are verified.

The MAC is an HMAC whose key is the passphrase itself. It binds neither the name of a piece nor its place.

Formats: openssl-dgst(1), openssl-enc(1); EVP_BytesToKey(3) with MD5 and one round.
"""

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC, CTR

from qubes_restore_svc.archive.members import Buffer, shown
from qubes_restore_svc.errors import AuthenticationFailed, BadContainer, BadHeader

#: Longest content of a member that holds a MAC, in bytes. The stock restorer takes as much.
MAX_MAC_LINE = 4096

#: The digests that a backup may be authenticated with, by the size of their MAC in bytes. Each size stands
#: for one.
_DIGESTS = {20: "sha1", 28: "sha224", 32: "sha256", 48: "sha384", 64: "sha512"}

# `SHA512(stdin)= HEX`, `SHA2-512(stdin)= HEX`, `HMAC-SHA512(stdin)= HEX`, `(stdin)= HEX`: what stands before
# the number depends on the version of openssl.
_LINE = re.compile(rb"(?:[\x20-\x7e]* )?([0-9A-Fa-f]{2,256})\r?\n?")

_BLOCK = 16  # bytes, of AES
_SALTED = b"Salted__"
_SALT_SIZE = 8


@dataclass(frozen=True, slots=True)
class StreamCipher:
    """A cipher that a header may name: AES with a key of `key_size` bytes, `padded` in CBC mode or not in
    CTR mode.
    """

    key_size: int
    padded: bool


_CIPHERS = {
    f"aes-{bits}-{mode}": StreamCipher(bits // 8, padded=mode == "cbc")
    for bits in (128, 192, 256)
    for mode in ("cbc", "ctr")
} | {f"aes{bits}": StreamCipher(bits // 8, padded=True) for bits in (128, 192, 256)}


def check_digest(untrusted_name: str) -> str:
    """The digest that a header names (`SHA512`, `sha-1`), as `parse_mac` takes it. Raises BadHeader."""
    name = untrusted_name.lower().replace("-", "")
    if name not in _DIGESTS.values():
        known = ", ".join(known.upper() for known in _DIGESTS.values())
        raise BadHeader(
            f"the header names the hmac-algorithm {shown(untrusted_name)}; known are {known}",
            advice="Restore this backup with the version of Qubes that wrote it.",
        )
    return name


def check_cipher(untrusted_name: str) -> StreamCipher:
    """The cipher that a header names (`aes-256-cbc`). Raises BadHeader for one that is not offered here."""
    cipher = _CIPHERS.get(untrusted_name.lower())
    if cipher is None:
        raise BadHeader(
            f"the header names the crypto-algorithm {shown(untrusted_name)}; known are AES with 128, 192 or"
            " 256 bits, in the modes cbc and ctr",
            advice="Restore this backup with the version of Qubes that wrote it.",
        )
    return cipher


@dataclass(frozen=True, slots=True)
class PieceMac:
    """The MAC of a piece as it stands behind it, not checked: `value`, made with `digest`."""

    digest: str
    value: bytes


def parse_mac(untrusted_line: Buffer, digest: str | None = None) -> PieceMac:
    """The MAC in a line that `openssl dgst` printed: one of `digest`, or the one that has its length. The
    latter is for the header's own MAC, because the header names the digest of all others.

    Raises BadContainer.
    """
    match = _LINE.fullmatch(untrusted_line)
    found = None if match is None or len(match[1]) % 2 else _DIGESTS.get(len(match[1]) // 2)
    if match is None or found is None or found != (digest or found):
        raise BadContainer(f"what stands behind it is not its MAC{f' in {digest.upper()}' if digest else ''}")
    return PieceMac(found, bytes.fromhex(match[1].decode("ascii")))


def open_piece(untrusted_piece: Buffer, mac: PieceMac, passphrase: bytes) -> memoryview:
    """The content of a piece as it was stored: a view of the caller's buffer, once its MAC has been checked.

    Raises AuthenticationFailed if the MAC is that of other content.
    """
    expected = hmac.new(passphrase, untrusted_piece, mac.digest).digest()
    if not hmac.compare_digest(expected, mac.value):
        raise AuthenticationFailed("its content is not what was written (wrong MAC)")
    return memoryview(untrusted_piece).toreadonly()


def decrypt(pieces: Iterable[Buffer], cipher: StreamCipher, passphrase: bytes) -> Iterator[bytes]:
    """The plaintext of one `openssl enc` stream, whose bytes come in `pieces`, cut anywhere.

    Raises BadContainer if the stream does not begin like one, or does not end with a last block: pieces of
    it are missing then, or stand elsewhere.
    """
    collected = bytearray()
    decryptor: CipherContext | None = None
    for piece in pieces:
        collected += piece
        if decryptor is None:
            if len(collected) < len(_SALTED) + _SALT_SIZE:
                continue
            decryptor = _decryptor(bytes(collected[: len(_SALTED) + _SALT_SIZE]), cipher, passphrase)
            del collected[: len(_SALTED) + _SALT_SIZE]
        # The last block stays behind: if nothing follows it, it is the one with the padding.
        ready = len(collected) if not cipher.padded else max(0, (len(collected) - 1) // _BLOCK * _BLOCK)
        if ready:
            yield decryptor.update(memoryview(collected)[:ready])
            collected = collected[ready:]
    if decryptor is None:
        raise BadContainer("the encrypted stream ends before its beginning is complete")
    if cipher.padded:
        yield _without_padding(decryptor.update(bytes(collected)), len(collected))


def _decryptor(untrusted_head: bytes, cipher: StreamCipher, passphrase: bytes) -> CipherContext:
    if not untrusted_head.startswith(_SALTED):
        raise BadContainer("the encrypted stream does not begin like one of openssl's")
    key, iv = _key_and_iv(passphrase, untrusted_head[len(_SALTED) :], cipher.key_size)
    mode: Callable[[bytes], CBC | CTR] = CBC if cipher.padded else CTR
    return Cipher(AES(key), mode(iv)).decryptor()


def _key_and_iv(passphrase: bytes, salt: bytes, key_size: int) -> tuple[bytes, bytes]:
    """EVP_BytesToKey with MD5 and one round."""
    material, block = b"", b""
    while len(material) < key_size + _BLOCK:
        block = hashlib.md5(block + passphrase + salt, usedforsecurity=False).digest()
        material += block
    return material[:key_size], material[key_size : key_size + _BLOCK]


def _without_padding(last_block: bytes, size: int) -> bytes:
    """The last block without its padding (PKCS #7): N bytes of the value N."""
    count = last_block[-1] if size == _BLOCK and last_block else 0
    if not 1 <= count <= _BLOCK or last_block[-count:] != bytes([count]) * count:
        raise BadContainer("the encrypted stream does not end where its last piece ends")
    return last_block[:-count]
