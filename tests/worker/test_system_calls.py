"""The filter of system calls, run as the kernel would run it, on both machines that it is written for."""

import errno
import re
import struct
from pathlib import Path

import pytest

from qubes_restore_svc.worker import system_calls
from qubes_restore_svc.worker.system_calls import system_call_filter

X86, ARM = 0xC000003E, 0xC00000B7
ALLOWED = 0x7FFF0000
KILLED = 0x80000000
PROCESS = 2


def _judge(machine: str, architecture: int, number: int, *arguments: int) -> int | str:
    """The kernel's verdict: ALLOWED, KILLED, or the name of the error."""
    program = system_call_filter(machine, PROCESS)
    assert program is not None
    padded = [*arguments, *([0] * (6 - len(arguments)))]
    data = struct.pack("=iIQ6Q", number, architecture, 0, *padded)
    instructions = list(struct.iter_unpack("=HBBI", program))
    accumulator = position = 0
    while True:
        code, if_true, if_false, constant = instructions[position]
        position += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, constant)[0]
        elif code == 0x06:
            return errno.errorcode[constant & 0xFFFF] if constant >> 16 == 5 else constant
        else:
            met = {
                0x15: accumulator == constant,
                0x45: bool(accumulator & constant),
            }[code]
            position += if_true if met else if_false


@pytest.mark.parametrize(
    ("number", "arguments", "verdict"),
    [
        (0, (), ALLOWED),  # read
        (9, (0, 0, 3, 0x22), ALLOWED),  # mmap, private memory to be written to
        (9, (0, 0, 3, 0x21), "EPERM"),  # shared
        (9, (0, 0, 3, 0x3), "EPERM"),  # MAP_SHARED_VALIDATE
        (9, (0, 0, 5, 0x22), "EPERM"),  # executable
        (10, (0, 0, 3), ALLOWED),  # mprotect
        (10, (0, 0, 4), "EPERM"),
        (59, (), "ENOSYS"),  # execve
        (317, (), "ENOSYS"),  # seccomp
        (234, (PROCESS,), ALLOWED),  # tgkill
        (234, (1,), "EPERM"),
        (302, (0,), ALLOWED),  # prlimit64
        (302, (1,), "EPERM"),
        (202, (), ALLOWED),  # futex
        (2, (0, 0x80000), ALLOWED),  # open, O_RDONLY | O_CLOEXEC
        (2, (0, 0x1), "EROFS"),
        (257, (0, 0, 0x80000), ALLOWED),  # openat
        (257, (0, 0, 0x2), "EROFS"),
        (257, (0, 0, 0x40), "EROFS"),
        (257, (0, 0, 0x200), "EROFS"),
        (56, (0x3D0F00,), ALLOWED),  # clone, of a thread
        (56, (0x11,), "EPERM"),
        (57, (), "ENOSYS"),  # fork
        (41, (1,), "ENOSYS"),  # socket
        (53, (1,), ALLOWED),  # socketpair, AF_UNIX
        (53, (2,), "EPERM"),
        (53, (1 << 32 | 2,), "EPERM"),
        (16, (0, 0x5421), ALLOWED),  # ioctl, FIONBIO
        (16, (0, 0x8912), "EPERM"),
        (16, (0, 1 << 32 | 0x8912), "EPERM"),
        (72, (0, 2), ALLOWED),  # fcntl, F_SETFD
        (72, (0, 1024), "EPERM"),
        (72, (0, 1026), "EPERM"),
        (72, (0, 1030), ALLOWED),
        (91, (), "ENOSYS"),  # fchmod
        (424, (), "ENOSYS"),
        (435, (), "ENOSYS"),
        (0x40000000, (), "ENOSYS"),  # the x32 table
        (-1 & 0xFFFFFFFF, (), "ENOSYS"),
    ],
)
def test_a_system_call_is_judged_on_x86(number: int, arguments: tuple[int, ...], verdict: int | str) -> None:
    assert _judge("x86_64", X86, struct.unpack("=i", struct.pack("=I", number))[0], *arguments) == verdict


@pytest.mark.parametrize(
    ("number", "arguments", "verdict"),
    [
        (63, (), ALLOWED),  # read
        (56, (0, 0, 0), ALLOWED),  # openat
        (56, (0, 0, 0x41), "EROFS"),
        (220, (0x10000,), ALLOWED),  # clone
        (220, (0,), "EPERM"),
        (198, (1,), "ENOSYS"),  # socket
        (222, (0, 0, 3, 0x21), "EPERM"),  # mmap, shared
        (226, (0, 0, 4), "EPERM"),  # mprotect, executable
        (29, (0, 0x8912), "EPERM"),  # ioctl
        (25, (0, 1024), "EPERM"),  # fcntl
        (52, (), "ENOSYS"),  # fchmod
        (57, (), ALLOWED),  # close; fork on x86-64
    ],
)
def test_a_system_call_is_judged_on_arm(number: int, arguments: tuple[int, ...], verdict: int | str) -> None:
    assert _judge("aarch64", ARM, number, *arguments) == verdict


def test_the_system_calls_of_another_architecture_are_deadly() -> None:
    assert _judge("x86_64", 0x40000003, 0) == KILLED
    assert _judge("aarch64", X86, 0) == KILLED


def test_there_is_no_filter_for_a_machine_whose_numbers_are_not_known() -> None:
    assert system_call_filter("riscv64") is None
    assert system_call_filter("") is None


@pytest.mark.parametrize(
    ("header", "column"),
    [("x86_64-linux-gnu/asm/unistd_64.h", 1), ("asm-generic/unistd.h", 2)],
)
def test_the_numbers_are_those_of_the_kernel_headers(header: str, column: int) -> None:
    path = Path("/usr/include", header)
    if not path.exists():
        pytest.skip(f"{path}: the kernel headers are not installed")
    numbers = {
        name: int(number)
        for name, number in re.findall(
            r"^#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text(), re.MULTILINE
        )
    }
    aliases = re.findall(r"^#define __NR_(\w+) __NR3264_(\w+)$", path.read_text(), re.MULTILINE)
    numbers |= {name: numbers[alias] for name, alias in aliases if alias in numbers}
    for row in (*system_calls._ALLOWED, *system_calls._BY_ARGUMENT):
        if row[column] is not None:
            assert row[column] == numbers[str(row[0])], row
        elif column == 1:
            assert str(row[0]) not in numbers, row
