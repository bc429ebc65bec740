"""Where the emulated dom0 has what the original finds at fixed places: all below one directory.

The directory is named by `QUBES_EMULATION`, and looked up with every use, because a test that starts another
emulation in the same process has another directory.
"""

import os

#: The environment variable that names the directory of the emulation, in dom0 only.
VARIABLE = "QUBES_EMULATION"
#: … and the one that every domain has.
DOMAIN_VARIABLE = "EMULATED_DOMAIN"


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


def qrexec_client_vm() -> str:
    """For /usr/bin/qrexec-client-vm, which every domain has on its PATH."""
    return "qrexec-client-vm"


def in_dom0() -> bool:
    """Whether this is dom0 (or a test), and not a qube."""
    return VARIABLE in os.environ or DOMAIN_VARIABLE not in os.environ
