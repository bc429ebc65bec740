"""The program in dom0 that takes a volume's new data: its standard input, not qubesd's socket.

Called as `admin.vm.volume.Import` or `admin.vm.volume.ImportWithSize`, with the volume's name; with a size,
that is the first line of the input. It asks qubesd where to write, writes, counts, and tells qubesd how it
went; qubesd's answer to that is its output. It is a process of its own, so it outlives the one that called
it.
"""

import os
import socket
import sys

_BLOCK = 128 * 1024


def call(method: str, argument: str, payload: bytes) -> bytes:
    """One call of the internal API."""
    place = os.open(os.path.join(os.environ["QUBES_EMULATION"], "qubesd.sock"), os.O_PATH)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"/proc/self/fd/{place}")
        os.close(place)
        target = os.environ["QREXEC_REQUESTED_TARGET"]
        connection.sendall(f"{method}+{argument} dom0 name {target}\0".encode() + payload)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def read_block(size: int) -> bytes:
    """As many bytes, fewer only at the end of the input."""
    parts = []
    while size:
        part = os.read(0, size)
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_line() -> bytes:
    """The first line, which is the size; byte by byte, because what follows is the data."""
    line = b""
    while len(line) < 21 and not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            break
        line += byte
    return line.removesuffix(b"\n")


def room_for(path: str) -> int:
    """How many bytes of data the pool can still take."""
    try:
        with open(f"{path}.room") as file:
            return int(file.read())
    except FileNotFoundError:
        return sys.maxsize


def write(path: str, size: int) -> str:
    """Write the input to `path`, leaving out blocks of zeros; brings what went wrong, or nothing."""
    copied, room = 0, room_for(path)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        while copied < size:
            block = read_block(min(_BLOCK, size - copied))
            if not block:
                return f"not enough data (copied {copied} bytes, expected {size} bytes)"
            if block.strip(b"\0"):
                room -= len(block)
                if room < 0:
                    return "error copying data"
                os.pwrite(descriptor, block, copied)
            copied += len(block)
    except OSError:
        return "error copying data"
    finally:
        os.close(descriptor)
    return f"too much data (expected {size} bytes)" if os.read(0, 1) else ""


def main() -> int:
    method, volume = os.path.basename(sys.argv[1]), sys.argv[2]
    size = read_line() if method == "admin.vm.volume.ImportWithSize" else b""
    answer = call("internal.vm.volume.ImportBegin", volume, size)
    if not answer.startswith(b"0\0"):
        os.write(1, answer)
        return 1
    image_size, path = answer[2:].decode().split(" ", 1)
    error = write(path, int(image_size))
    status = f"fail\n{error}" if error else "ok"
    os.write(1, call("internal.vm.volume.ImportEnd", volume, status.encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
