"""The system calls that a local worker may make once it is ready, as a program for the kernel's filter.

Strategy: a list of what an honest worker makes, checked by number, and by argument where a call can do more;
everything else fails. The worker forbids itself the rest when all its modules are loaded and before it says
that it is ready, so before it has seen a byte from outside. After that it starts no program, makes no socket
but a pair, opens nothing for writing, and takes no memory that is executable or shared (no limit of the
process counts shared memory). The filter also closes what the namespaces leave open: through a descriptor
that was passed in, a process of the same user could change the mode and the times of the backup, or ask a
socket of the outer network for the machine's addresses.

A call that is not on the list fails as on a kernel that does not have it (ENOSYS), and kills nobody: another
version of the C library or of Python may try one that is newer than this list, and goes another way then.

The numbers are those of the kernel's unistd_64.h (x86-64) and asm-generic/unistd.h (64-bit ARM).
"""

import ctypes
import errno
import os
import platform
import struct
import sys

#: Allowed whatever the arguments: name, number on x86-64, number on 64-bit ARM (None: not there).
_ALLOWED: tuple[tuple[str, int | None, int | None], ...] = (
    # memory
    ("munmap", 11, 215),
    ("mremap", 25, 216),
    ("madvise", 28, 233),
    ("brk", 12, 214),
    # threads, signals and the end
    ("exit", 60, 93),
    ("exit_group", 231, 94),
    ("futex", 202, 98),
    ("set_robust_list", 273, 99),
    ("rseq", 334, 293),
    ("membarrier", 324, 283),
    ("gettid", 186, 178),
    ("sched_yield", 24, 124),
    ("sched_getaffinity", 204, 123),
    ("getcpu", 309, 168),
    ("setpriority", 141, 140),
    ("rt_sigaction", 13, 134),
    ("rt_sigprocmask", 14, 135),
    ("rt_sigreturn", 15, 139),
    ("sigaltstack", 131, 132),
    ("restart_syscall", 219, 128),
    # what the process and the machine are
    ("getpid", 39, 172),
    ("getppid", 110, 173),
    ("getuid", 102, 174),
    ("geteuid", 107, 175),
    ("getgid", 104, 176),
    ("getegid", 108, 177),
    ("getrlimit", 97, 163),
    ("getrusage", 98, 165),
    ("getcwd", 79, 17),
    ("sysinfo", 99, 179),
    ("uname", 63, 160),
    ("getrandom", 318, 278),
    # time
    ("clock_gettime", 228, 113),
    ("clock_getres", 229, 114),
    ("clock_nanosleep", 230, 115),
    ("nanosleep", 35, 101),
    ("gettimeofday", 96, 169),
    ("time", 201, None),
    # descriptors
    ("read", 0, 63),
    ("readv", 19, 65),
    ("pread64", 17, 67),
    ("preadv", 295, 69),
    ("preadv2", 327, 286),
    ("write", 1, 64),
    ("writev", 20, 66),
    ("lseek", 8, 62),
    ("fadvise64", 221, 223),
    ("close", 3, 57),
    ("dup", 32, 23),
    ("pipe2", 293, 59),
    ("fstat", 5, 80),
    ("poll", 7, None),
    ("ppoll", 271, 73),
    ("select", 23, None),
    ("pselect6", 270, 72),
    ("epoll_create1", 291, 20),
    ("epoll_ctl", 233, 21),
    ("epoll_wait", 232, None),
    ("epoll_pwait", 281, 22),
    # the files of Python, to look for modules that are imported late
    ("stat", 4, None),
    ("lstat", 6, None),
    ("newfstatat", 262, 79),
    ("statx", 332, 291),
    ("getdents64", 217, 61),
    ("readlink", 89, None),
    ("readlinkat", 267, 78),
    # the sockets that were passed in, and pairs of one's own
    ("sendto", 44, 206),
    ("sendmsg", 46, 211),
    ("recvfrom", 45, 207),
    ("recvmsg", 47, 212),
    ("shutdown", 48, 210),
    ("getsockname", 51, 204),
    ("getpeername", 52, 205),
    ("getsockopt", 55, 209),
    ("setsockopt", 54, 208),
)

#: Allowed as `_rules` says of their arguments.
_BY_ARGUMENT: tuple[tuple[str, int | None, int | None], ...] = (
    ("mmap", 9, 222),
    ("mprotect", 10, 226),
    ("clone", 56, 220),
    ("tgkill", 234, 131),
    ("prlimit64", 302, 261),
    ("open", 2, None),
    ("openat", 257, 56),
    ("socketpair", 53, 199),
    ("fcntl", 72, 25),
    ("ioctl", 16, 29),
)

#: open flags that write: O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
_WRITING = 0x1 | 0x2 | 0x40 | 0x200
_MAP_SHARED, _PROT_EXEC = 0x1, 0x4
_CLONE_THREAD = 0x10000
_AF_UNIX = 1
#: F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
_FCNTL = (1, 2, 3, 4, 1030)
#: TCGETS (isatty), FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, BLKGETSIZE64 (size of a device)
_IOCTL = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451, 0x80081272)

#: AUDIT_ARCH of a machine, its column in the tables, and the number of seccomp(2) itself.
_MACHINES = {"x86_64": (0xC000003E, 1, 317), "aarch64": (0xC00000B7, 2, 277)}
#: What is said to seccomp(2) and to prctl(2).
_SET_MODE_FILTER, _FOR_ALL_THREADS, _PR_SET_NO_NEW_PRIVS = 1, 1, 38

# Classic BPF (linux/bpf_common.h) and the filter's verdicts (linux/seccomp.h).
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NUMBER_OFFSET, _MACHINE_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16

_Instruction = tuple[int, int, int, int]  #: code, jump if true, jump if false, constant


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def forbid_the_rest() -> None:
    """Forbid all threads of this process, for good, what is not on the list. Raises OSError.

    Where the numbers of the system calls are not known, or the kernel has no such filter, nothing is done:
    then the namespaces stand alone.
    """
    program = system_call_filter()
    if program is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    description = _Program(len(program) // 8, program)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    number = ctypes.c_long(_MACHINES[platform.machine()][2])
    flags = ctypes.c_ulong(_FOR_ALL_THREADS)
    if libc.syscall(number, ctypes.c_ulong(_SET_MODE_FILTER), flags, ctypes.byref(description)):
        error = ctypes.get_errno()
        if error not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(error, f"the system calls cannot be filtered: {os.strerror(error)}")


def system_call_filter(machine: str | None = None, process: int | None = None) -> bytes | None:
    """The filter for `machine` and `process` (default: these), None where the numbers are not known."""
    if machine is None:
        machine = platform.machine() if sys.maxsize > 1 << 32 else ""
    if machine not in _MACHINES:
        return None
    architecture, column, _ = _MACHINES[machine]
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _MACHINE_OFFSET),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
    ]
    for row in _ALLOWED:
        if isinstance(number := row[column], int):
            program += [(_EQUAL, 0, 1, number), _allow()]
    rules = _rules(os.getpid() if process is None else process)
    for row in _BY_ARGUMENT:
        if isinstance(number := row[column], int):
            rule = rules[row[0]]
            program += [(_EQUAL, 0, len(rule), number), *rule]
    program.append(_refuse(errno.ENOSYS))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _rules(process: int) -> dict[str, list[_Instruction]]:
    """What is done with the calls that depend on an argument; each rule ends in a verdict."""
    return {
        "mmap": [
            *_refuse_when(2, _ANY_BIT, _PROT_EXEC, errno.EPERM),
            *_refuse_when(3, _ANY_BIT, _MAP_SHARED, errno.EPERM),
            _allow(),
        ],
        "mprotect": [*_refuse_when(2, _ANY_BIT, _PROT_EXEC, errno.EPERM), _allow()],
        "clone": _allow_when(0, _ANY_BIT, _CLONE_THREAD),
        # abort() signals its own thread.
        "tgkill": _allow_when(0, _EQUAL, process),
        "prlimit64": _allow_when(0, _EQUAL, 0),
        "open": [*_refuse_when(1, _ANY_BIT, _WRITING, errno.EROFS), _allow()],
        "openat": [*_refuse_when(2, _ANY_BIT, _WRITING, errno.EROFS), _allow()],
        "socketpair": _allow_when(0, _EQUAL, _AF_UNIX),
        "fcntl": _allow_when(1, _EQUAL, *_FCNTL),
        "ioctl": _allow_when(1, _EQUAL, *_IOCTL),
    }


def _refuse_when(position: int, test: int, constant: int, error: int) -> list[_Instruction]:
    return [_argument(position), (test, 0, 1, constant), _refuse(error)]


def _allow_when(position: int, test: int, *constants: int) -> list[_Instruction]:
    checks = [line for constant in constants for line in ((test, 0, 1, constant), _allow())]
    return [_argument(position), *checks, _refuse(errno.EPERM)]


def _argument(position: int) -> _Instruction:
    """Load the lower half of an argument; those that are looked at are ints (or their flags lie there)."""
    return (_LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * position)


def _allow() -> _Instruction:
    return (_RETURN, 0, 0, _ALLOW)


def _refuse(error: int) -> _Instruction:
    return (_RETURN, 0, 0, 0x00050000 | error)
