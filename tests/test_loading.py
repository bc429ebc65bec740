"""Every way into the package says in one line that it cannot be loaded."""

import subprocess
import sys

import pytest

from tests.support.fixtures import REPOSITORY

#: Starts the program that the second argument names by its file or module, without memory for its imports.
_SHORT_OF_MEMORY = """
import runpy, sys
class Short:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pydantic", "PyQt6", "qubesadmin"):
            raise MemoryError
sys.meta_path.insert(0, Short())
sys.argv.pop(0)
run = runpy.run_path if "/" in sys.argv[0] else runpy.run_module
run(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("entry", "program"),
    [
        (f"{REPOSITORY}/bin/qubes-restore-svc", "qubes-restore-svc"),
        (f"{REPOSITORY}/bin/qvm-backup-restore", "qvm-backup-restore"),
        (f"{REPOSITORY}/bin/qubes-restore-manager", "qubes-restore-manager"),
        ("qubes_restore_svc", "qubes-restore-svc"),
        ("qubes_restore_svc.dom0_service", "qubes-restore-svc"),
        ("qubes_restore_svc.dom0_service.child", "qubes-restore-svc"),
        ("qubes_restore_svc.worker", "qubes-restore-worker"),
    ],
)
def test_a_program_that_cannot_be_loaded_says_so_in_one_line(entry: str, program: str) -> None:
    arguments = ["--mgmt-vm"] if program == "qvm-backup-restore" else []
    done = subprocess.run(
        [sys.executable, "-c", _SHORT_OF_MEMORY, entry, *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"{program}: it cannot be loaded: there is no memory left. ")
    assert len(done.stderr.splitlines()) == 1
