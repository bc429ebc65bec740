"""What a comparison takes from the storage drivers of the real qubesd: where a clone lies, what it holds, and
when the volume was last changed."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qubes_restore_svc.qubes.system import QubesSystem
from tests.conformance.real_storage import STOPPED

PROGRAM = Path(__file__).parent / "real_storage.py"


@pytest.fixture(scope="module")
def real(
    checkout: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the drivers did."""
    for module in ("docutils", "jinja2", "lxml"):
        pytest.importorskip(module, reason=f"the real qubesd needs {module}: pip install '.[conformance]'")
    sources = [checkout("qubes-core-admin"), checkout("qubes-core-qrexec"), Path(__file__).parents[2]]
    done = subprocess.run(
        [sys.executable, PROGRAM, sources[0], tmp_path_factory.mktemp("storage")],
        env={"PYTHONPATH": ":".join(map(str, sources)), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


class _Domains(dict[str, object]):
    def clear_cache(self) -> None:
        pass


def system(driver: str, path: str, revisions: Sequence[str] = ()) -> QubesSystem:
    """A system with one qube `work`, of whose volume qubesd tells this."""
    volume = SimpleNamespace(revisions=list(revisions))
    qube = SimpleNamespace(volumes={"private": volume})
    return QubesSystem(
        SimpleNamespace(
            domains=_Domains(work=qube),
            pools={"pool": SimpleNamespace(driver=driver)},
            qubesd_call=lambda *_: f"pool=pool\nvid=x\npath={path}\n".encode(),
        )
    )


def test_a_clone_of_files_holds_what_the_qube_was_when_it_was_shut_down(
    real: dict[str, dict[str, Any]],
) -> None:
    paths = real["reflink"]["paths"]
    clone = system("file-reflink", paths["clone"]).volume_file("work", "private")
    assert clone.read_bytes().strip(b"\0") == b"stopped"
    source = system("file-reflink", paths["source"])
    assert source.volume_file("work", "private").read_bytes().strip(b"\0") == b"stopped"
    assert Path(paths["source"]).read_bytes().strip(b"\0") == b"running"
    assert source.volume_changed("work", "private") == STOPPED


def test_a_clone_in_lvm_holds_what_the_qube_was_when_it_was_shut_down(
    real: dict[str, dict[str, Any]],
) -> None:
    found = real["lvm"]
    assert (found["current"], found["content"]) == ("vg/vm-clone-private", "stopped")
    here = system("lvm_thin", found["path"], found["revisions"])
    assert here.volume_file("work", "private") == Path("/dev/mapper/vg-vm--clone--private")
    assert here.volume_changed("work", "private") == STOPPED
