"""Header, compression, chunks and scrypt containers: what lies between the two archives of a backup.

Strategy: one function per layer. Compressors are set to their quickest level; a reader cannot tell.
"""

import bz2
import functools
import hashlib
import hmac
import lzma
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt


def header_text(compression: str, backup_id: str) -> bytes:
    """The text of backup-header; without compression it names the default filter, as Qubes does."""
    compressed = compression != "none"
    return (
        f"version=4\nencrypted=True\ncompressed={compressed}\n"
        f"compression-filter={compression if compressed else 'gzip'}\n"
        f"hmac-algorithm=scrypt\nbackup-id={backup_id}\n"
    ).encode()


def scrypt_container(
    plaintext: bytes, passphrase: bytes, log_n: int = 10, r: int = 8, p: int = 1, salt: bytes | None = None
) -> bytes:
    """`plaintext` in a container of the scrypt program; `salt` is 32 bytes, random if None."""
    salt = os.urandom(32) if salt is None else salt
    keys = _scrypt(passphrase, salt, log_n, r, p)
    head = container_head(log_n, r, p, salt)
    head += hmac.digest(keys[32:], head, "sha256")
    content = Cipher(algorithms.AES(keys[:32]), modes.CTR(bytes(16))).encryptor().update(plaintext)
    tail = hmac.new(keys[32:], head, "sha256")
    tail.update(content)
    return b"".join([head, content, tail.digest()])


def container_head(log_n: int, r: int, p: int, salt: bytes) -> bytes:
    """The first 64 bytes of a container, their checksum right whatever the parameters."""
    head = struct.pack(">6sBBII", b"scrypt", 0, log_n, r, p) + salt
    return head + hashlib.sha256(head).digest()[:16]


@functools.lru_cache(maxsize=4096)
def _scrypt(passphrase: bytes, salt: bytes, log_n: int, r: int, p: int) -> bytes:
    # Salts are derived, so tests that write the same backup again and again pay for it once.
    return Scrypt(salt=salt, length=64, n=1 << log_n, r=r, p=p).derive(passphrase)


# --- Compression and chunks --------------------------------------------------------------------


def compress(filter_name: str, data: Iterable[bytes]) -> Iterator[bytes]:
    """The stream that the program `filter_name` would make of `data`; `none` passes it through."""
    if filter_name == "none":
        yield from data
    elif filter_name == "pbzip2":  # an independent stream for every 900,000 bytes
        for block in chunks(data, 900_000):
            yield bz2.compress(block)
    else:
        compressor = _compressor(filter_name)
        for piece in data:
            if compressed := compressor.compress(piece):
                yield compressed
        yield compressor.flush()


def chunks(data: Iterable[bytes], size: int) -> Iterator[bytes]:
    """`data` cut at every `size` bytes. The last piece is shorter, so it may be empty: Qubes learns
    that the data has ended only by trying to fill one more chunk."""
    held = bytearray()
    for piece in data:
        for start in range(0, len(piece), size):
            held += memoryview(piece)[start : start + size]
            if len(held) >= size:
                yield bytes(memoryview(held)[:size])
                held = held[size:]
    yield bytes(held)


class _Compressor:
    """What the compressors of several libraries have in common."""

    def __init__(self, feed: Callable[[bytes], bytes], finish: Callable[[], bytes]) -> None:
        self.compress, self.flush = feed, finish


def _compressor(filter_name: str) -> _Compressor:
    if filter_name in ("gzip", "pigz"):
        deflate = zlib.compressobj(level=1, wbits=31)
        return _Compressor(deflate.compress, deflate.flush)
    if filter_name == "bzip2":
        bzip2 = bz2.BZ2Compressor()
        return _Compressor(bzip2.compress, bzip2.flush)
    if filter_name in ("xz", "lzma"):
        container = lzma.FORMAT_XZ if filter_name == "xz" else lzma.FORMAT_ALONE
        xz = lzma.LZMACompressor(format=container, preset=0)
        return _Compressor(xz.compress, xz.flush)
    if filter_name in ("zstd", "zstdmt"):
        import zstandard  # kept here: only a backup that uses it needs the library

        zstd = zstandard.ZstdCompressor(level=3, write_checksum=True).compressobj()
        return _Compressor(zstd.compress, zstd.flush)
    raise ValueError(f"no compressor {filter_name!r}")
