"""A Qubes system in a dictionary, whose services are shell scripts: real processes, real descriptors.

Strategy: it notes what was asked of it, in order; any method can be made to fail or to wait. It is as strict
as the real one where the link could go wrong: no call to a qube that does not run, no second qube of a name.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from qubes_restore_svc.errors import HostFailed, RestoreError
from qubes_restore_svc.qubes.system import NotEnoughMemory, QubesSystem
from qubes_restore_svc.qubes.tags import STORAGE_TAG, WORKER_TAG

TEMPLATE = "restore-dvm"
STORAGE = "sys-usb"
PATIENCE_S = 60

#: What a worker does, by service: it is ready, and repeats what it gets.
WORKER = {
    "restore.Session+ready": "printf ready",
    "restore.Session": "exec cat",
    "restore.Volume": 'printf "%s" "$0"; exec cat',
    "restore.Archive": "exec cat > {directory}/archive",
}
#: Registration as the stock service does it, but for its file of ids.
REGISTER = """
read -r location
printf '%s\\n' "$location" > {directory}/location
echo aB3dE6
exec >&-
cat > /dev/null
echo closed >> {directory}/registrations
"""


class Gate:
    """Holds a method up: `reached` when it has begun, it goes on when `opened` is set."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()


class Process(subprocess.Popen[bytes]):
    """As qrexec-client: what it runs ends with it."""

    def kill(self) -> None:
        if self.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)


@dataclass
class FakeQube:
    klass: str = "AppVM"
    template: str | None = None
    disposable_template: bool = False
    running: bool = False
    tags: set[str] = field(default_factory=set)
    services: dict[str, str] = field(default_factory=dict)
    reported: set[str] | None = None
    properties: dict[str, str] = field(default_factory=dict)


class FakeQubes(QubesSystem):
    """The system; scripts write what they got into `directory`."""

    def __init__(self, directory: Path) -> None:
        super().__init__(None)
        self.directory = directory
        self.events: list[str] = []
        self.faults: dict[str, RestoreError] = {}
        self.gates: dict[str, Gate] = {}
        self.processes: list[Process] = []
        self.by_qube: dict[str, list[Process]] = {}
        self.total_memory: int | None = None  # MiB
        self.free_memory = 1 << 30
        self.worker = dict(WORKER)
        self.management: str | None = TEMPLATE
        self.there = {
            "fedora-42": FakeQube(),
            TEMPLATE: FakeQube(template="fedora-42", disposable_template=True),
            STORAGE: FakeQube(running=True, services={"qubes.RegisterBackupLocation": REGISTER}),
        }

    @property
    def workers(self) -> list[str]:
        return [name for name in self.there if name.startswith("disp-restore-")]

    def running_processes(self) -> list[int]:
        return [process.pid for process in self.processes if process.poll() is None]

    # --- What the link asks ----------------------------------------------------------------------

    def default(self, key: str) -> str | None:
        self._enter(key)
        assert key == "management_dispvm"
        return self.management

    def template_of(self, name: str) -> str | None:
        self._enter("template_of")
        return self.there[name].template

    def reports_service(self, name: str, service: str) -> bool | None:
        self._enter("reports_service")
        reported = self.there[name].reported
        return None if reported is None else service in reported

    def is_disposable_template(self, name: str) -> bool | None:
        self._enter("is_disposable_template")
        return self.there[name].disposable_template if name in self.there else None

    def exists(self, name: str) -> bool:
        self._enter("exists")
        return name in self.there

    def klass(self, name: str) -> str:
        self._enter("klass")
        return self.there[name].klass

    def create(
        self,
        name: str,
        klass: str,
        label: str,
        *,
        template: str | None = None,
        pool: str | None = None,
        pools: Mapping[str, str] = MappingProxyType({}),
        tags: Sequence[str] = (),
        properties: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._enter("create", name)
        if name in self.there:
            raise HostFailed(f"a qube {name} is there already")
        self.there[name] = FakeQube(
            klass, template, tags=set(tags), services=self.worker, properties=dict(properties)
        )

    def memory(self) -> int | None:
        return self.total_memory

    def start(self, name: str) -> None:
        self._enter("start", name)
        if name not in self.there:
            raise HostFailed(f"{name} was killed")
        if int(self.there[name].properties.get("memory", 0)) > self.free_memory:
            self.vanish(name)  # as qubesd does with a disposable that does not start
            raise NotEnoughMemory(f"Not enough memory to start domain {name!r}")
        self.there[name].running = True

    def destroy(self, name: str) -> None:
        self._enter("destroy", name)
        if name not in self.there:
            raise HostFailed(f"there is no qube {name}")
        self.vanish(name)

    def add_tag(self, name: str, tag: str) -> None:
        self._enter("add_tag", f"{name} {tag}")
        self.there[name].tags.add(tag)

    def discard_tag(self, name: str, tag: str) -> None:
        self._enter("discard_tag", f"{name} {tag}")
        self.there[name].tags.discard(tag)

    def tags(self) -> Mapping[str, frozenset[str]]:
        self._enter("tags")
        return {name: frozenset(qube.tags) for name, qube in self.there.items()}

    def run_service(self, name: str, service: str, *, stdin: int, stdout: int) -> Process:
        self._enter("run_service", f"{service} in {name}", key=f"run_service {service}")
        qube = self.there[name]
        if not qube.running:
            raise HostFailed(f"the qube {name} does not run")
        script = qube.services.get(service, qube.services.get(service.split("+")[0]))
        command = "exit 127" if script is None else script.format(directory=self.directory)
        process = Process(
            ["/bin/sh", "-c", command, service], stdin=stdin, stdout=stdout, start_new_session=True
        )
        self.processes.append(process)
        self.by_qube.setdefault(name, []).append(process)
        return process

    # --- What tests do to it ---------------------------------------------------------------------

    def vanish(self, name: str) -> None:
        """The qube is gone, and with it its ends of all calls."""
        del self.there[name]
        for process in self.by_qube.get(name, []):
            process.kill()

    def _enter(self, method: str, subject: str = "", key: str | None = None) -> None:
        if subject:
            self.events.append(f"{method} {subject}")
        for name in (method, key):
            gate = self.gates.get(name or "")
            if gate is not None:
                gate.reached.set()
                assert gate.opened.wait(PATIENCE_S)
            fault = self.faults.get(name or "")
            if fault is not None:
                raise fault


class Traces:
    """What there is now, to be compared with afterwards: after a restore nothing may be left."""

    def __init__(self, system: FakeQubes) -> None:
        self._system = system
        self._qubes = set(system.there)
        self._descriptors = descriptors()

    def left(self) -> list[str]:
        """All that is there now and was not at first."""
        system = self._system
        found = [f"qube {name}" for name in set(system.there) - self._qubes]
        for name, qube in system.there.items():
            found += [f"tag {tag} of {name}" for tag in qube.tags & {WORKER_TAG, STORAGE_TAG}]
        found += [f"process {process.args!r}" for process in system.processes if process.returncode is None]
        found += [f"descriptor {number}" for number in descriptors() - self._descriptors]
        found += [f"file {path.name}" for path in system.directory.glob("*.lock")]
        return found


def descriptors() -> set[str]:
    """The numbers of all descriptors of this process, but for the one that lists them."""
    return {number for number in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{number}")}
