"""A storage VM for tests: what `qubes.RestoreById` of a stock VM does with a backup, and what can go wrong.

Strategy: `tar2qfile` follows the stock program of that name block by block, with its filters and its early
end. Around it `main` plays `qrexec-client-vm`: it writes down how it was called, and behaves as the file
`behaviour` in its folder says. Standard library only, so that it starts at once.
"""

import json
import os
import re
import signal
import stat
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
HEADER = struct.Struct("<IIQIIII")
ANSWER = struct.Struct("<IIQI")
END = bytes(HEADER.size)


def tar2qfile(archive: BinaryIO, filters: Sequence[str], write: Callable[[bytes], object]) -> int:
    """Write what the stock program writes, up to the end mark; returns the CRC-32 of it all.

    EOFError where it gives up: the archive ends inside a member.
    """
    crc, matched, sent = 0, set[str](), set[str]()

    def put(data: bytes) -> None:
        nonlocal crc
        crc = zlib.crc32(data, crc)
        write(data)

    while len(block := archive.read(BLOCK)) == BLOCK:
        if not any(block):
            continue
        if block[257:262] != b"ustar" or _number(block[148:156]) != sum(block[:148] + b" " * 8 + block[156:]):
            break  # it reads to the end of the file, but looks at nothing more, and calls that a success
        size = _number(block[124:136])
        if block[156:157] not in (b"0", b"\0"):
            archive.read(_padded(size))
            continue
        name = block[:100].split(b"\0")[0].decode()
        match = next((one for one in filters if name.startswith(one)), None)
        if filters and match is None:
            if len(matched) == len(filters):
                break
            archive.seek(_padded(size), os.SEEK_CUR)
            continue
        if match is not None:
            matched.add(match)
        time = _number(block[136:148])
        mode = _number(block[100:108]) & 0xFFF
        folders = name.split("/")[:-1]
        for depth in range(1, len(folders) + 1):
            folder = "/".join(folders[:depth])
            if folder not in sent:
                sent.add(folder)
                put(_entry(folder, mode | stat.S_IFDIR, 0, time))
        put(_entry(name, mode | stat.S_IFREG, size, time))
        left = size
        while left:
            piece = archive.read(min(left, 1 << 16))
            if not piece:
                raise EOFError
            put(piece)
            left -= len(piece)
        if len(archive.read(_padded(size) - size)) < _padded(size) - size:
            raise EOFError
    put(END)
    return crc


def _entry(name: str, mode: int, size: int, time: int) -> bytes:
    text = name.encode() + b"\0"
    return HEADER.pack(len(text), mode, size, time, 0, time, 0) + text


def _number(field: bytes) -> int:
    """Octal digits, up to whatever is none."""
    digits = re.match(rb"[0-7]*", field.lstrip(b" "))
    return int(digits[0] or b"0", 8) if digits else 0


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


# --- qrexec-client-vm ----------------------------------------------------------------------------


class Enough(Exception):
    """As many bytes have been written as the behaviour lets through."""


def main(folder: Path, arguments: list[str]) -> int:
    """Be called as `qrexec-client-vm`; returns the exit code."""
    behaviour, _, parameter = (folder / "behaviour").read_text().partition(" ")
    record: dict[str, object] = {"arguments": arguments, "pid": os.getpid(), "paths": None, "answer": None}

    def note(**facts: object) -> None:
        # Into a pipe: a worker may write no file, and neither may what it starts.
        record.update(facts)
        with (folder / "notes").open("wb", buffering=0) as notes:
            notes.write(json.dumps(record).encode() + b"\n")

    note()
    if behaviour == "refused":
        print("Request refused", file=sys.stderr)
        return 126
    if behaviour == "fails":
        sys.stderr.buffer.write(b"Starting\n\x1b[31mInvalid location ID\xff\n\n")
        return int(parameter)
    if behaviour == "silent":
        threading.Event().wait()
    if behaviour == "deaf":
        os.close(0)
        os.close(1)
        signal.pause()
    paths = sys.stdin.buffer.readline().decode().split()
    note(paths=paths)
    left = int(parameter) if behaviour in ("stalls", "dies", "cut") else sys.maxsize

    def write(data: bytes) -> None:
        nonlocal left
        os.write(1, data[:left]) if len(data) <= 1 << 16 else sys.exit("too much at once")
        left -= len(data)
        if left <= 0:
            raise Enough

    try:
        with (folder / "archive").open("rb") as archive:
            crc = tar2qfile(archive, paths, write if behaviour != "no-end" else _without_end(write))
    except EOFError:
        return 1
    except BrokenPipeError:
        return 1
    except Enough:
        if behaviour == "stalls":
            note(stalled=True)
            signal.pause()
        if behaviour == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return 1
    if behaviour == "no-end":
        return 0
    if behaviour == "surplus":
        os.write(1, b"more")
    if behaviour == "lingers":
        signal.pause()
    answer = sys.stdin.buffer.read()
    note(answer="right" if answer == ANSWER.pack(0, 0, crc, 0) else answer.hex())
    if behaviour == "late-surplus":
        os.write(1, b"m")
    return int(parameter) if behaviour == "ends" else 0


def _without_end(write: Callable[[bytes], object]) -> Callable[[bytes], object]:
    return lambda data: None if data == END else write(data)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
