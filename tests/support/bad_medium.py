"""A file of which some places cannot be read."""

import ctypes
import mmap
import os
import tempfile
from collections.abc import Collection

PAGE = mmap.PAGESIZE


class Medium:
    """Gives `content`, and in `bad` pages the kernel's own EIO. `fd` is /proc/self/mem, which holds both.

    Bytes are counted from `start`. The page after `content` is one of these: there, reading ends.
    """

    def __init__(self, content: bytes, bad: Collection[int]) -> None:
        self._memory = mmap.mmap(-1, len(content) + PAGE)
        self._memory.write(content)
        self._exported = ctypes.c_char.from_buffer(self._memory)
        self.start = ctypes.addressof(self._exported)
        self.end = self.start + len(content)
        with tempfile.TemporaryFile() as empty:
            for page in (*bad, len(content) // PAGE):
                _map_nothing(self.start + page * PAGE, empty.fileno())
        self.fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        os.lseek(self.fd, self.start, os.SEEK_SET)

    def close(self) -> None:
        os.close(self.fd)
        del self._exported
        self._memory.close()


def _map_nothing(address: int, empty_file: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    size, number = ctypes.c_size_t, ctypes.c_int
    call.argtypes = [ctypes.c_void_p, size, number, number, number, ctypes.c_long]
    fixed = 0x10
    assert call(address, PAGE, mmap.PROT_READ, mmap.MAP_SHARED | fixed, empty_file, 0) == address
