"""Where the emulated dom0 has what the original finds at fixed places: all below one directory.

The directory is named by `QUBES_EMULATION`, and looked up with every use, because a test that starts another
emulation in the same process has another directory.
"""

import os

#: The environment variable that names the directory of the emulation.
VARIABLE = "QUBES_EMULATION"


def _place(name: str) -> str:
    return os.path.join(os.environ.get(VARIABLE, "/nonexistent"), name)


def qubesd_socket() -> str:
    """For /var/run/qubesd.sock."""
    return _place("qubesd.sock")


def services_directory() -> str:
    """For dom0's /etc/qubes-rpc, where the import of a volume is a program."""
    return _place("rpc")


def qrexec_client() -> str:
    """For /usr/lib/qubes/qrexec-client."""
    return _place("qrexec-client")
