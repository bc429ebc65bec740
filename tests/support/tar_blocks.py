"""What tar archives are made of: headers, numbers, pax records, padding.

Strategy: a header says what it is told to say, true or not; only its checksum is always right.
The outer archive is of the POSIX kind, the inner ones are GNU tar's own kind.
"""

import struct
from collections.abc import Mapping

BLOCK = 512  # bytes, of every tar
RECORD = 10240  # bytes; GNU tar pads an archive to a multiple of this
MTIME = 1767229323  # seconds since 1970, on every file: 2026-01-01T01:02:03Z


def tar_header(
    name: str,
    size: int,
    type_flag: bytes = b"0",
    *,
    flavour: str = "gnu",
    link_target: str = "",
    owner: bool = True,
    mode: int = 0o644,
    mtime: int = MTIME,
    patches: Mapping[int, bytes] | None = None,
) -> bytes:
    """One 512-byte tar header; `flavour` is `gnu` or `posix`.

    Without `owner` the names of user and group and the device numbers stay empty, as in extended
    headers. `patches` are bytes laid over the header at an offset, before its checksum is made.
    """
    user = b"root" if owner else b""
    device = b"0000000" if owner and flavour == "posix" else b""
    header = bytearray(
        struct.pack(
            "100s8s8s8s12s12s8sc100s8s32s32s8s8s167x",
            name.encode(),
            tar_number(mode, 8),
            b"0000000",
            b"0000000",
            tar_number(size, 12),
            tar_number(mtime, 12),
            b" " * 8,
            type_flag,
            link_target.encode(),
            b"ustar  \0" if flavour == "gnu" else b"ustar\x0000",
            user,
            user,
            device,
            device,
        )
    )
    for offset, patch in (patches or {}).items():
        header[offset : offset + len(patch)] = patch
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def tar_number(value: int, width: int) -> bytes:
    """A number in a tar header: octal where it fits, base-256 otherwise (GNU)."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return (value % (1 << 8 * width) | 1 << (8 * width - 1)).to_bytes(width, "big")


def pax_records(records: Mapping[str, str]) -> bytes:
    """The data of a pax extended header."""
    lines = []
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        length = len(body) + 1
        while length != len(body) + len(str(length)):
            length = len(body) + len(str(length))
        lines.append(b"%d%s" % (length, body))
    return b"".join(lines)


def padded(data: bytes, multiple: int) -> bytes:
    """`data` with zeros after it up to a multiple of `multiple` bytes."""
    return data + bytes(-len(data) % multiple)
