"""The engines that administrators run, in an environment of their own; `make engines` installs them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.fixtures import REPOSITORY
from tests.watch.support import Machine, four_machines

ENGINES = REPOSITORY / "build" / "engines" / "bin"

Engine = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Runs a program of the engines, which finds `qubes-restore-watch` on its PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    command = programs / "qubes-restore-watch"
    command.write_text(
        f"#!/bin/sh\nPYTHONPATH='{REPOSITORY}' exec '{sys.executable}' -m qubes_restore_svc.watch \"$@\"\n"
    )
    command.chmod(0o755)

    def run(name: str, *words: str | Path) -> "subprocess.CompletedProcess[str]":
        if not (ENGINES / name).exists():
            pytest.skip(f"{name} is not installed: run make engines, which takes minutes")
        if shutil.which("bwrap") is None:
            pytest.skip("bubblewrap is not installed")
        env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        return subprocess.run(
            [ENGINES / name, *map(str, words)], env=env, capture_output=True, text=True, timeout=300
        )

    return run


@pytest.fixture
def machines(tmp_path: Path) -> dict[str, Machine]:
    return four_machines(tmp_path / "machines")
