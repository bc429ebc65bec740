"""`python -m tests.cli.qvm_driver TARGET …`: the real command, made of other parts than on a Qubes system.

Strategy: the worker is a thread of this process, and the host is the directory TARGET; the words after it are
those of the command. A backup in a qube is a file here. `BROKEN` for the target fails as a worker that
is not installed does.
"""

import os
import sys
from pathlib import Path

from qubes_restore_svc.cli.qvm_arguments import RestoreArguments
from qubes_restore_svc.cli.qvm_parts import Restorer
from qubes_restore_svc.cli.qvm_restore import main
from qubes_restore_svc.errors import WorkerMissing
from qubes_restore_svc.local.directory import DirectoryHost
from qubes_restore_svc.qubes.config import Config, ReportConfig
from qubes_restore_svc.qubes.restore import Dom0Restore
from tests.support.thread_link import ThreadLink

BROKEN = "broken"


class _Link(ThreadLink):
    async def check(self) -> None:
        if sys.argv[1].endswith(BROKEN):
            raise WorkerMissing("the template fedora-41 has no worker", advice="Install it there.")


def assemble(arguments: RestoreArguments, archive_fd: int | None) -> Restorer:
    """A directory and a thread."""
    target = Path(sys.argv[1])
    if archive_fd is None:
        archive_fd = os.open(arguments.location, os.O_RDONLY)
    config = Config(report=ReportConfig(directory=target.parent / "reports"))
    return Dom0Restore(_Link(archive_fd), DirectoryHost(target), config)


if __name__ == "__main__":
    main(sys.argv[2:], assemble)
