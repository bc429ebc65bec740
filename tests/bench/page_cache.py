"""Which parts of a file are in memory: what has been read of it since it was dropped from there.

Strategy: mincore(2) on a mapping, which reads nothing. What the kernel read ahead of anybody's wish counts
too, so it is what the disk had to deliver.
"""

import ctypes
import mmap
import os
from pathlib import Path

_PROT_READ, _MAP_SHARED = 1, 1
_FAILED = ctypes.c_void_p(-1).value


def drop(path: Path) -> None:
    """Write the file out, and let go of what is in memory of it. What others have mapped stays."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(path: Path) -> int:
    """Bytes of the file that are in memory, in whole pages. Raises OSError."""
    size = path.stat().st_size
    if not size:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
    ]  # fmt: skip
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    with path.open("rb") as file:
        address = libc.mmap(None, size, _PROT_READ, _MAP_SHARED, file.fileno(), 0)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), f"{path} cannot be mapped")
        try:
            if libc.mincore(address, size, pages):
                raise OSError(ctypes.get_errno(), f"nothing is known of the pages of {path}")
        finally:
            libc.munmap(address, size)
    return sum(page & 1 for page in pages.raw) * mmap.PAGESIZE
