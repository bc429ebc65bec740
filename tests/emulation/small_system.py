"""A small Qubes system without qrexec, for tests of the stand-ins themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import qubesadmin.config

from tests.emulation.daemon import properties
from tests.emulation.daemon.lifecycle import Machines
from tests.emulation.qubesd import Qubesd


@contextmanager
def small_system(directory: Path, machines: Machines | None = None) -> Iterator[Qubesd]:
    """A template `fedora`, `net` for the network, `dvm` for disposables, and `work`; all halted."""
    with Qubesd(directory / "dom0", machines) as qubesd, pytest.MonkeyPatch.context() as patch:
        patch.setenv(qubesadmin.config.VARIABLE, str(qubesd.directory))
        create = qubesd.lifecycle.create
        create("TemplateVM", "", b"name=fedora label=black", False)
        create("AppVM", "fedora", b"name=net label=red", False)
        create("AppVM", "fedora", b"name=dvm label=red", False)
        create("AppVM", "fedora", b"name=work label=blue pool=lvm", True)
        for name, flag in (("net", "provides_network"), ("dvm", "template_for_dispvms")):
            properties.write(qubesd.system, qubesd.system.domain(name), flag, b"True")
        yield qubesd
