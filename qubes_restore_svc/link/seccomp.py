"""The system calls that the sandboxed worker may not make, as a program for the kernel's filter.

Strategy: a list of what a worker never needs, checked by number, in front of what the namespaces
enforce already. It closes what they leave open: through a descriptor that was passed in, a
process of the same user could change the mode and the times of the backup, or ask a socket of the outer
network for the machine's addresses. It also keeps most of the kernel's code out of reach: no files
are opened for writing, no processes started, no sockets but Unix ones made, and no system call newer than
Linux 5.2 is there at all (the C library falls back as on an older kernel).

The numbers are those of the kernel's unistd_64.h (x86-64) and asm-generic/unistd.h (64-bit ARM).
"""

import errno
import platform
import struct
import sys

#: First system call that every architecture has under the same number; from here on none is available.
_FIRST_UNIFORM = 424

#: Refused whatever the arguments: name, number on x86-64, number on 64-bit ARM (None: not there).
_REFUSED: tuple[tuple[str, int | None, int | None], ...] = (
    # file system: nothing is made, changed, locked or mounted
    ("creat", 85, None),
    ("truncate", 76, 45),
    ("ftruncate", 77, 46),
    ("fallocate", 285, 47),
    ("chmod", 90, None),
    ("fchmod", 91, 52),
    ("fchmodat", 268, 53),
    ("chown", 92, None),
    ("lchown", 94, None),
    ("fchown", 93, 55),
    ("fchownat", 260, 54),
    ("utime", 132, None),
    ("utimes", 235, None),
    ("futimesat", 261, None),
    ("utimensat", 280, 88),
    ("setxattr", 188, 5),
    ("lsetxattr", 189, 6),
    ("fsetxattr", 190, 7),
    ("removexattr", 197, 14),
    ("lremovexattr", 198, 15),
    ("fremovexattr", 199, 16),
    ("rename", 82, None),
    ("renameat", 264, 38),
    ("renameat2", 316, 276),
    ("link", 86, None),
    ("linkat", 265, 37),
    ("symlink", 88, None),
    ("symlinkat", 266, 36),
    ("unlink", 87, None),
    ("unlinkat", 263, 35),
    ("mkdir", 83, None),
    ("mkdirat", 258, 34),
    ("rmdir", 84, None),
    ("mknod", 133, None),
    ("mknodat", 259, 33),
    ("flock", 73, 32),
    ("mount", 165, 40),
    ("umount2", 166, 39),
    ("pivot_root", 155, 41),
    ("chroot", 161, 51),
    ("name_to_handle_at", 303, 264),
    ("open_by_handle_at", 304, 265),
    ("fanotify_init", 300, 262),
    ("inotify_init", 253, None),
    ("inotify_init1", 294, 26),
    ("quotactl", 179, 60),
    ("memfd_create", 319, 279),
    ("splice", 275, 76),
    ("vmsplice", 278, 75),
    ("tee", 276, 77),
    # processes: none are started, none are looked into, no namespaces
    ("fork", 57, None),
    ("vfork", 58, None),
    ("execveat", 322, 281),
    ("unshare", 272, 97),
    ("setns", 308, 268),
    ("ptrace", 101, 117),
    ("process_vm_readv", 310, 270),
    ("process_vm_writev", 311, 271),
    ("kcmp", 312, 272),
    ("personality", 135, 92),
    ("migrate_pages", 256, 238),
    ("move_pages", 279, 239),
    # inter-process communication with a life of its own
    ("shmget", 29, 194),
    ("msgget", 68, 186),
    ("semget", 64, 190),
    ("mq_open", 240, 180),
    # the kernel's less travelled parts
    ("add_key", 248, 217),
    ("request_key", 249, 218),
    ("keyctl", 250, 219),
    ("bpf", 321, 280),
    ("perf_event_open", 298, 241),
    ("userfaultfd", 323, 282),
    ("init_module", 175, 105),
    ("finit_module", 313, 273),
    ("delete_module", 176, 106),
    ("kexec_load", 246, 104),
    ("kexec_file_load", 320, 294),
    ("reboot", 169, 142),
    ("swapon", 167, 224),
    ("swapoff", 168, 225),
    ("acct", 163, 89),
    ("syslog", 103, 116),
    ("settimeofday", 164, 170),
    ("clock_settime", 227, 112),
    ("clock_adjtime", 305, 266),
    ("adjtimex", 159, 171),
    ("sethostname", 170, 161),
    ("setdomainname", 171, 162),
    ("vhangup", 153, 58),
    ("lookup_dcookie", 212, 18),
    ("nfsservctl", 180, 42),
    ("uselib", 134, None),
    ("modify_ldt", 154, None),
    ("ioperm", 173, None),
    ("iopl", 172, None),
)

#: open flags that write: O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
_WRITING = 0x1 | 0x2 | 0x40 | 0x200
_CLONE_THREAD = 0x10000
_AF_UNIX = 1
#: F_SETLEASE, F_NOTIFY: they reach the other users of the backup file
_REFUSED_FCNTL = (1024, 1026)
#: TCGETS (isatty), FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, BLKGETSIZE64 (size of a device)
_ALLOWED_IOCTL = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451, 0x80081272)

#: By machine: AUDIT_ARCH, column in the table, and numbers of open, openat, clone, socket, fcntl, ioctl
_MACHINES: dict[str, tuple[int, int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        1,
        {"open": 2, "openat": 257, "clone": 56, "socket": 41, "fcntl": 72, "ioctl": 16},
    ),
    "aarch64": (0xC00000B7, 2, {"openat": 56, "clone": 220, "socket": 198, "fcntl": 25, "ioctl": 29}),
}

# Classic BPF (linux/bpf_common.h) and the filter's verdicts (linux/seccomp.h).
_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NUMBER_OFFSET, _MACHINE_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16

_Instruction = tuple[int, int, int, int]  #: code, jump if true, jump if false, constant


def _refuse(error: int) -> int:
    return 0x00050000 | error


def system_call_filter(machine: str | None = None) -> bytes | None:
    """The filter for `machine` (default: this one) as bubblewrap's `--seccomp` reads it.

    None where the numbers of the system calls are not known: then the namespaces stand alone.
    """
    if machine is None:
        machine = platform.machine() if sys.maxsize > 1 << 32 else ""
    if machine not in _MACHINES:
        return None
    architecture, column, numbers = _MACHINES[machine]
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _MACHINE_OFFSET),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        (_GREATER_EQUAL, 0, 1, _FIRST_UNIFORM),
        (_RETURN, 0, 0, _refuse(errno.ENOSYS)),
    ]
    for row in _REFUSED:
        if isinstance(number := row[column], int):
            program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _refuse(errno.EPERM))]
    for name, number in numbers.items():
        rule = _RULES[name]
        program += [(_EQUAL, 0, len(rule), number), *rule]
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _argument(position: int) -> _Instruction:
    """Load the lower half of an argument; those that are looked at are ints (or their flags lie there)."""
    return (_LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * position)


def _refuse_when(position: int, test: int, constant: int, error: int) -> list[_Instruction]:
    return [_argument(position), (test, 0, 1, constant), (_RETURN, 0, 0, _refuse(error)), _allow()]


def _allow_when(position: int, test: int, *constants: int) -> list[_Instruction]:
    checks = [line for constant in constants for line in ((test, 0, 1, constant), _allow())]
    return [_argument(position), *checks, (_RETURN, 0, 0, _refuse(errno.EPERM))]


def _allow() -> _Instruction:
    return (_RETURN, 0, 0, _ALLOW)


#: What is done with the calls that depend on an argument; each rule ends in a verdict.
_RULES: dict[str, list[_Instruction]] = {
    "open": _refuse_when(1, _ANY_BIT, _WRITING, errno.EROFS),
    "openat": _refuse_when(2, _ANY_BIT, _WRITING, errno.EROFS),
    "clone": _allow_when(0, _ANY_BIT, _CLONE_THREAD),
    "socket": _allow_when(0, _EQUAL, _AF_UNIX),
    "fcntl": [
        _argument(1),
        *[
            line
            for command in _REFUSED_FCNTL
            for line in ((_EQUAL, 0, 1, command), (_RETURN, 0, 0, _refuse(errno.EPERM)))
        ],
        _allow(),
    ],
    "ioctl": _allow_when(1, _EQUAL, *_ALLOWED_IOCTL),
}
