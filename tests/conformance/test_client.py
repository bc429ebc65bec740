"""The stand-in for `qubesadmin` does as the real library: bytes that it sends, values, errors, signatures.

Both run the same script; what they did is compared. What the stand-in has must be there in the original, with
the same parameters; the original has more.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.emulation.emulated import STANDIN

SCRIPT = Path(__file__).parent / "client_script.py"
#: How the options of a call of a service are declared; they are compared by being used.
DECLARED_OTHERWISE = ("app.QubesBase.run_service", "app.QubesLocal.run_service", "app.ServiceOptions")


def run(library: Path, directory: Path) -> Any:
    directory.mkdir()
    done = subprocess.run(
        [sys.executable, SCRIPT, directory],
        env={"PYTHONPATH": str(library), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.replace(str(directory), "DIRECTORY"))


@pytest.fixture(scope="module")
def both(
    checkout: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What came of it with the real library and with the stand-in."""
    real = checkout("qubes-core-admin-client")
    folder = tmp_path_factory.mktemp("client")
    return run(real, folder / "real"), run(STANDIN, folder / "ours")


def test_the_stand_in_sends_and_answers_as_the_real_library(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    real, ours = (side["calls"] for side in both)
    different = [
        f"{name}\n  real {real[name]}\n  ours {ours.get(name)}"
        for name in real
        if real[name] != ours.get(name)
    ]
    print(f"{len(real)} calls, {len(different)} of them different")
    assert not different, "\n".join(different)


def test_what_the_stand_in_has_is_there_in_the_original_with_the_same_parameters(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    real, ours = (side["signatures"] for side in both)
    different = [
        f"{name}\n  real {real.get(name)}\n  ours {parameters}"
        for name, parameters in ours.items()
        if not name.startswith(DECLARED_OTHERWISE) and real.get(name) != parameters
    ]
    print(f"{len(ours)} signatures, {len(different)} of them different")
    assert not different, "\n".join(different)
