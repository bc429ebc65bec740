"""Opens what the writer wrote, with code that is not the writer's and not the project's.

Strategy: hashlib's scrypt, tarfile and the standard decompressors; `program` finds the real ones.
"""

import bz2
import gzip
import hashlib
import hmac
import io
import lzma
import shutil
import struct
import tarfile
from collections.abc import Callable

import pytest
import zstandard
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from .backup_writer import BackupWriter


def program(name: str) -> str:
    """The path of a real program; skips the calling test where it is missing."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def opened(container: bytes, passphrase: str) -> bytes:
    """The content of a scrypt container whose three checks are right."""
    magic, version, log_n, r, p, salt = struct.unpack(">6sBBII32s", container[:48])
    assert (magic, version) == (b"scrypt", 0)
    assert container[48:64] == hashlib.sha256(container[:48]).digest()[:16]
    keys = hashlib.scrypt(
        passphrase.encode(), salt=salt, n=1 << log_n, r=r, p=p, maxmem=256 << (log_n + 3), dklen=64
    )
    assert container[64:96] == hmac.digest(keys[32:], container[:64], "sha256")
    assert container[-32:] == hmac.digest(keys[32:], container[:-32], "sha256")
    return Cipher(algorithms.AES(keys[:32]), modes.CTR(bytes(16))).decryptor().update(container[96:-32])


def decompressed(filter_name: str, data: bytes) -> bytes:
    """The content of a compressed stream."""
    openers: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.decompress,
        "pigz": gzip.decompress,
        "bzip2": bz2.decompress,
        "pbzip2": bz2.decompress,
        "xz": lzma.decompress,
        "lzma": lzma.decompress,
        "zstd": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
        "zstdmt": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
        "none": lambda data: data,
    }
    return openers[filter_name](data)


def file_of(writer: BackupWriter, name: str) -> bytes:
    """The inner archive of one file, put together from the members."""
    stream = b""
    for member in writer.members():
        if member.name.startswith(name + "."):
            plain_name = member.name.removesuffix(".enc")
            stream += opened(member.data, f"{writer.backup_id}!{plain_name}!{writer.passphrase}")
    return decompressed(writer.compression, stream)


def content_of(archive: bytes, name: str) -> bytes:
    """The one member of an inner archive, which must be called `name`."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        (member,) = tar.getmembers()
        assert member.name == name
        file = tar.extractfile(member)
        assert file is not None
        return file.read()


def read(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    """The data of a regular file in an archive."""
    file = tar.extractfile(info)
    assert file is not None
    return file.read()


def without_stamp(archive: bytes) -> bytes:
    """The archive without the time of its first header, and the checksum, which depends on it."""
    return archive[:136] + bytes(20) + archive[156:]
