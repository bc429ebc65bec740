"""The fs-verity digest of an image that comes as data and holes: what `fsverity digest FILE` prints for it.

Strategy: Linux defines it (Documentation/filesystems/fsverity.rst); here with SHA-256, blocks of 4 KiB and no
salt. The image is cut into blocks, and the hashes of 128 blocks make a block of the level above, up to a
level of one hash. Of each level, only the block that is not full yet is kept. The hash of a whole subtree of
zeros follows from that of the subtree below it, so a hole costs a few steps for each level, however long it
is. At last, a descriptor with the size and the hash at the top is hashed.
"""

import hashlib
import struct

_BLOCK = 4096
_ZERO_BLOCK = bytes(_BLOCK)
_HASH_SIZE = 32

#: Levels of an image of 2**64 bytes, from the hashes of its blocks to the one at the top.
_LEVELS = 9

#: Version 1, SHA-256, log2 of the block size, no salt; the size in bytes; the root hash, and zeros.
_DESCRIPTOR = struct.Struct("<BBBBIQ64s176x")


class FsVerityDigest:
    """The digest of what `update` and `skip` were told, in the order of the image."""

    #: Bytes of a hole that `skip` takes in next to no time.
    longest_hole = 1 << 63

    def __init__(self) -> None:
        self._size = 0
        self._begun = bytearray()  # data of a block that is not whole yet
        # The hashes that do not fill a block yet, those of the blocks of the image first.
        self._levels = [bytearray() for _ in range(_LEVELS)]

    def update(self, data: bytes | memoryview) -> None:
        """`data` follows."""
        self._size += len(data)
        view = memoryview(data)
        if self._begun:
            missing = _BLOCK - len(self._begun)
            self._begun += view[:missing]
            view = view[missing:]
            if len(self._begun) < _BLOCK:
                return
            self._put(0, _hash(self._begun))
            self._begun.clear()
        start, end = 0, len(view) // _BLOCK * _BLOCK
        while start < end:
            stop = min(end, start + self._room(0) * _BLOCK)
            self._put(0, b"".join([_hash(view[at : at + _BLOCK]) for at in range(start, stop, _BLOCK)]))
            start = stop
        self._begun += view[end:]

    def skip(self, size: int) -> None:
        """A hole of `size` bytes follows, which reads as zeros."""
        if self._begun:
            filling = min(size, _BLOCK - len(self._begun))
            self.update(_ZERO_BLOCK[:filling])
            size -= filling
        self._skip(0, size // _BLOCK, _hash(_ZERO_BLOCK))
        self._begun += _ZERO_BLOCK[: size % _BLOCK]
        self._size += size

    def hexdigest(self) -> str:
        """The digest in hexadecimal; nothing may follow."""
        if self._begun:
            self._put(0, _hash(self._begun.ljust(_BLOCK, b"\0")))
        level, hashes = 0, -(-self._size // _BLOCK)
        while hashes > 1:
            if begun := self._levels[level]:
                self._put(level + 1, _hash(begun.ljust(_BLOCK, b"\0")))
            level, hashes = level + 1, -(-hashes * _HASH_SIZE // _BLOCK)
        # An empty image has no hash at the top, and zeros in its place.
        root = bytes(self._levels[level])
        log_block_size = _BLOCK.bit_length() - 1
        return hashlib.sha256(_DESCRIPTOR.pack(1, 1, log_block_size, 0, 0, self._size, root)).hexdigest()

    def _room(self, level: int) -> int:
        """How many hashes the begun block of a level still takes; at least one."""
        return (_BLOCK - len(self._levels[level])) // _HASH_SIZE

    def _put(self, level: int, hashes: bytes) -> None:
        """Add hashes to a level that has room for them. A block that they fill goes to the level above."""
        begun = self._levels[level]
        begun += hashes
        if len(begun) == _BLOCK:
            full = _hash(begun)
            begun.clear()
            self._put(level + 1, full)

    def _skip(self, level: int, count: int, zero: bytes) -> None:
        """Add `count` hashes to a level, each of them `zero`, the one of a subtree of zeros there."""
        filling = min(count, self._room(level))
        self._put(level, zero * filling)
        blocks, rest = divmod(count - filling, _BLOCK // _HASH_SIZE)
        if blocks:
            self._skip(level + 1, blocks, _hash(zero * (_BLOCK // _HASH_SIZE)))
        self._put(level, zero * rest)


def _hash(block: bytes | bytearray | memoryview) -> bytes:
    return hashlib.sha256(block).digest()
