"""What every program of ours does first, before it is told a passphrase or opens a file."""

import os
import resource


def open_standard_streams() -> None:
    """Started without one of them, the first file that is opened would get its number, and its output."""
    for standard in (0, 1, 2):
        try:
            os.fstat(standard)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def forbid_core_dumps() -> None:
    """A core dump would hold the passphrase. 1: 0 lets the kernel pipe it to a collector (core(5))."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except (OSError, ValueError):  # it is lower already
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
