"""The control group of a worker: made by a real systemd, and done without where none makes it."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qubes_restore_svc.local import memory
from tests.local.probes import descendants, needs_bubblewrap
from tests.support.fixtures import REPOSITORY
from tests.support.systemd import started_systemd

#: Runs beside a systemd: a worker that is granted 64 MiB, with a reserve of 64 MiB, takes shared memory.
BESIDE_SYSTEMD = '''
import asyncio, json
from pathlib import Path
from qubes_restore_svc.local import memory
from qubes_restore_svc.local.sandbox_link import LocalLink
from qubes_restore_svc.system_memory import group_limit
from tests.local.probes import UNFILTERED, inside, opened, worker_process

TAKE = """
shared = mmap.mmap(-1, 256 << 20)
for _ in range(256):
    shared.write(bytes(1 << 20))
result = "taken"
"""

async def main():
    memory._MEMORY_RESERVE = 64 << 20
    told = []
    log = lambda level, text: told.append(text)
    async with (
        opened() as archive,
        LocalLink(archive, command=UNFILTERED, memory_limit=64 << 20, log=log) as link,
    ):
        worker = worker_process()
        answer = {
            "told": told,
            "limit": group_limit(int(worker.name)),
            "bound": (64 << 20) + memory.memory_reserve(),
            "group": (worker / "cgroup").read_text(),
        }
        work = asyncio.ensure_future(inside(link, TAKE))
        answer["end"] = await link.wait_gone()
        await asyncio.wait([work])
        work.exception()
    print(json.dumps(answer))

asyncio.run(main())
'''

#: Where Debian and Fedora have the units of the message bus, through which a service manager is asked.
BUS = Path("/usr/lib/systemd/system")


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[int]:
    """A systemd that can be asked, by its process id outside."""
    for name in ("dbus.socket", "dbus.service"):
        if not (BUS / name).exists():
            pytest.skip(f"there is no {name} here, without which a systemd cannot be asked")
        shutil.copy(BUS / name, tmp_path)
        changes = tmp_path / f"{name}.d" / "test.conf"
        changes.parent.mkdir()
        changes.write_text("[Unit]\nDefaultDependencies=no\n")
    with started_systemd(tmp_path, "dbus.socket", "/run/dbus/system_bus_socket") as (process, _):
        yield process


@needs_bubblewrap
def test_a_systemd_gives_the_worker_a_group_that_counts_all_its_memory(systemd: int) -> None:
    enter = ["nsenter", f"--target={systemd}", "--mount", "--pid", "--ipc", "--net", "--cgroup"]
    done = subprocess.run(
        [*enter, sys.executable, "-c", BESIDE_SYSTEMD],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert "/qubes-restore-worker-" in answer["group"]
    assert answer["limit"] == answer["bound"]
    assert answer["told"] == ["the worker has a control group of its own, which limits its memory"]
    assert answer["end"] == "the worker was killed (SIGKILL), perhaps for want of memory"


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program that asks the service manager, to be written by the test."""
    program = tmp_path / "busctl"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(memory, "_can_be_grouped", lambda: True)
    return program


@pytest.mark.parametrize(
    "deed",
    ["exit 1", "exec sleep 3600", "exit 0", "kill -9 $$"],
    ids=["refuses", "hangs", "does nothing", "dies"],
)
async def test_a_manager_that_makes_no_group_costs_a_moment_and_nothing_else(
    deed: str, manager: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_MANAGER_TIMEOUT_S", 0.2)
    manager.write_text(f"#!/bin/sh\n{deed}\n")
    manager.chmod(0o755)
    began = time.monotonic()
    assert not await memory.limit_group(os.getpid(), 1 << 40)
    assert time.monotonic() - began < 30
    assert descendants() == []


async def test_a_program_that_cannot_be_run_is_no_manager(manager: Path) -> None:
    manager.write_text("not a program")
    manager.chmod(0o755)
    assert not await memory.limit_group(os.getpid(), 1 << 40)


async def test_a_cancel_does_not_wait_for_the_manager(
    manager: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_MANAGER_TIMEOUT_S", 60)
    manager.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked; exec sleep 3600\n")
    manager.chmod(0o755)
    work = asyncio.ensure_future(memory.limit_group(os.getpid(), 1 << 40))
    while not (tmp_path / "asked").exists():
        await asyncio.sleep(0.01)
    work.cancel()
    began = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert time.monotonic() - began < 30
    assert descendants() == []


@pytest.mark.parametrize(
    ("first", "limit", "grouped"),
    [("systemd", None, True), ("bash", None, False), ("systemd", 1 << 30, False)],
)
def test_only_the_manager_of_our_processes_is_asked_and_no_limit_is_escaped(
    first: str, limit: int | None, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: f"{first}\n")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(memory, "group_limit", lambda process: limit)
    assert memory._can_be_grouped() is grouped
