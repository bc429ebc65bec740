"""A small Qubes system for the tests of the host: a template, a netvm, a disposable template."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import qubesadmin

from qubes_restore_svc.broker.interfaces import Definition, NewQube
from qubes_restore_svc.qubes.comparison import ComparedSystem
from qubes_restore_svc.qubes.host import POLICY, QubesHost
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.qubes.worker_vm import worker_properties
from qubes_restore_svc.wire.messages import ManifestQube, QubeSettings, VolumeInfo
from tests.emulation.qubesd import Qubesd

REPOSITORY = Path(__file__).parents[2]

#: Who has written himself into a lock file, and is gone.
HOLDER = {
    "pid": 1, "started": 1, "since": "2026-11-23T14:05:00Z", "user": "joan", "client": "sys-gui",
    "activity": "restoring",
}  # fmt: skip
GONE = json.dumps(HOLDER)

TEMPLATE, NETVM, DISPOSABLES = "fedora-42", "sys-firewall", "default-dvm"

#: An image with data at its beginning, a hole, and data right to its end.
IMAGE_SIZE = 3 << 20
EXTENTS = ((0, b"begin" * 1000), (2_000_000, b"\x01" * 300_000), (IMAGE_SIZE - 5, b"theend"[:5]))


@contextmanager
def emulation(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Qubesd]:
    """The system, for `qubesadmin` in this process and those that it starts."""
    monkeypatch.setenv("QUBES_EMULATION", str(directory))
    with Qubesd(directory) as qubesd:
        app = qubesadmin.Qubes()
        app.add_new_vm("TemplateVM", TEMPLATE, "black")
        app.default_template = TEMPLATE
        netvm = app.add_new_vm("AppVM", NETVM, "green", TEMPLATE)
        netvm.provides_network = True
        netvm.netvm = None
        app.default_netvm = NETVM
        disposables = app.add_new_vm("AppVM", DISPOSABLES, "red", TEMPLATE)
        disposables.template_for_dispvms = True
        app.default_dispvm = DISPOSABLES
        app.management_dispvm = DISPOSABLES
        yield qubesd


def new_host(
    directory: Path,
    system: QubesSystem | None = None,
    pool: str | None = None,
    client: str = "dom0",
    policy: Sequence[Path] = POLICY,
) -> QubesHost:
    """A host whose locks and home are below `directory`."""
    home = directory / "home"
    home.mkdir(exist_ok=True)
    (directory / "stock.lock").touch()  # it stays where it is, whoever holds it
    return QubesHost(
        system or QubesSystem.connect(),
        pool=pool,
        home=home,
        lock_path=directory / "restore.lock",
        stock_lock_path=directory / "stock.lock",
        client=client,
        policy=policy,
    )


def compared_system(
    directory: Path, system: QubesSystem | None = None, policy: Sequence[Path] = POLICY
) -> ComparedSystem:
    """A host that compares, with the locks of `new_host`."""
    new_host(directory, system)
    return ComparedSystem(
        system or QubesSystem.connect(),
        home=directory / "home",
        lock_path=directory / "restore.lock",
        stock_lock_path=directory / "stock.lock",
        policy=policy,
    )


def new_disposable(system: QubesSystem, name: str, *tags: str) -> None:
    """A disposable, not started; with the tag of a worker it is one, if its name is that of a worker, too."""
    system.create(
        name, "DispVM", "red", template=DISPOSABLES, tags=tags, properties=worker_properties(400, 1)
    )


#: Before a script of `stopped_program`: where it calls `stop` with the step that was asked for, it waits.
STOPPING = """
import sys
from pathlib import Path
from tests.qubes import qubes_bed as bed
place, step = Path(sys.argv[1]), sys.argv[2]

def stop(here):
    if here == step:
        print("here", flush=True)
        sys.stdin.read()
"""


@contextmanager
def stopped_program(script: str, place: Path, step: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A program on the emulated system that has stopped at this step; it and its session are killed."""
    with subprocess.Popen(
        [sys.executable, "-c", STOPPING + script, str(place), step],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests/emulation/standin"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        # Its guard has a session of its own, as soon as it runs; before that, it would be killed as well.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not any(os.getsid(int(child)) == int(child) for child in children.read_text().split()):
            time.sleep(0.005)
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def state_of(directory: Path, qubesd: Qubesd) -> Mapping[str, object]:
    """All there is: qubes with all their settings, the content of volumes, of the home, and the locks."""
    with qubesd.lifecycle.lock:
        state: dict[str, object] = {
            name: dataclasses.asdict(domain) for name, domain in qubesd.system.domains.items()
        }
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.parent != qubesd.directory / "rpc":
            state[str(path)] = content_of(path)
        elif path.is_dir() and path.is_relative_to(directory / "home"):
            state[str(path)] = os.stat(path).st_mode
    return state


def content_of(path: Path) -> tuple[int, str]:
    """A file's size, and a hash over its data and where that is; holes cost nothing."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        end = 0
        with suppress(OSError):  # there is no more data
            while True:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                data = os.pread(file.fileno(), end - start, start)
                if data.strip(b"\0"):
                    found.update(b"%d:" % start + data)
    return size, found.hexdigest()


def definition(**changes: object) -> Definition:
    """An ordinary AppVM's."""
    return dataclasses.replace(Definition("blue", template=TEMPLATE), **changes)  # type: ignore[arg-type]


def new_qube(
    name: str = "work", klass: str = "AppVM", wanted: Definition | None = None, key: str = "vm10"
) -> NewQube:
    """A qube of that name here; in its backup it is `work`."""
    source = ManifestQube.model_validate(
        {
            "key": key,
            "name": "dom0" if klass == "AdminVM" else "work",
            "klass": klass,
            "label": "blue",
            "volumes": (VolumeInfo(name="home" if klass == "AdminVM" else "private"),),
        }
    )
    chosen = definition(template=None if klass in ("TemplateVM", "StandaloneVM") else TEMPLATE)
    return NewQube(name, source, "20260101T010203-1234", definition=wanted or chosen)


def settings(key: str = "vm10", **given: object) -> QubeSettings:
    """The settings files of `new_qube`."""
    return QubeSettings.model_validate({"key": key, **given})


def image() -> bytes:
    """What `EXTENTS` are, holes as zeros."""
    content = bytearray(IMAGE_SIZE)
    for offset, data in EXTENTS:
        content[offset : offset + len(data)] = data
    return bytes(content)
