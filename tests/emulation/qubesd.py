"""A stand-in for qubesd: the state of a Qubes system, and the Admin API to it on a Unix socket.

Strategy: the parts are in `daemon/`; here is the server, one thread a connection, and what a test holds in
its hands: the calls that were made, faults that are put in, the files of volumes. Whoever connects is dom0.
Its protocol is the original's, so the original's client could be used as well.
"""

import fnmatch
import shlex
import socketserver
import sys
import threading
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tests.emulation.daemon import import_program, methods, more_methods, properties
from tests.emulation.daemon.calls import Parts, answer
from tests.emulation.daemon.errors import AdminError, StumbleError
from tests.emulation.daemon.lifecycle import Lifecycle, Machines
from tests.emulation.daemon.state import Domain, Pool, System, Value
from tests.emulation.daemon.table import TABLE
from tests.emulation.daemon.volumes import GIB, Volumes
from tests.emulation.policy import DOM0_UUID
from tests.emulation.trigger import listen_unix

#: Importing them puts their methods into the table that `answer` looks in.
_METHODS = (methods, more_methods)
#: More than that in one request, and the original hangs up.
_REQUEST_LIMIT = 65536
_RECEIVE = 256 * 1024
_COLORS = {
    "red": "0xcc0000", "orange": "0xf57900", "yellow": "0xedd400", "green": "0x73d216",
    "gray": "0x555555", "blue": "0x3465a4", "purple": "0x75507b", "black": "0x000000",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdminCall:
    """A call of the Admin API that was made, whatever came of it."""

    method: str
    arg: str
    dest: str
    payload: bytes

    @property
    def name(self) -> str:
        """As a policy would write it: `METHOD+ARG`."""
        return f"{self.method}+{self.arg}"

    def __str__(self) -> str:
        return f"{self.name} {self.dest} {self.payload!r}"


@dataclass(slots=True)
class _Fault:
    pattern: str
    dest: str
    error: str
    message: str
    after: int
    times: int | None


@dataclass(slots=True)
class _Faults:
    faults: list[_Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self, name: str, dest: str) -> None:
        with self.lock:
            for fault in self.faults:
                if not (fnmatch.fnmatchcase(name, fault.pattern) and fnmatch.fnmatchcase(dest, fault.dest)):
                    continue
                if fault.after:
                    fault.after -= 1
                elif fault.times is None or fault.times > 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    if fault.error:
                        raise AdminError(fault.error, fault.message)
                    raise StumbleError(fault.message)


class Qubesd(AbstractContextManager["Qubesd"]):
    """A Qubes system with nothing but dom0, labels and pools, served in `directory` while the `with` lasts.

    `calls` are all calls of the Admin API, in order. Not thread-safe to be looked at while a client is at
    work.
    """

    def __init__(self, directory: Path, machines: Machines | None = None) -> None:
        self.directory = directory
        self.calls: list[AdminCall] = []
        self.system = System(TABLE)
        self._faults = _Faults()
        self._bugs: list[BaseException] = []
        self.volumes = Volumes(directory / "volumes", self.system)
        self.lifecycle = Lifecycle(
            self.system, self.volumes, machines or Machines(), lambda name: self._faults.check(_START, name)
        )
        self._parts = Parts(self.system, self.volumes, self.lifecycle)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        _furnish(self.system)

    def __enter__(self) -> "Qubesd":
        programs = self.directory / "rpc"
        programs.mkdir(parents=True)
        for name in ("admin.vm.volume.Import", "admin.vm.volume.ImportWithSize"):
            command = shlex.join([sys.executable, "-I", "-S", str(import_program.__file__)])
            (programs / name).write_text(f'#!/bin/sh\nexec {command} "$0" "$@"\n')
            (programs / name).chmod(0o755)
        self._server = _Server(self.directory / "qubesd.sock", self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="qubesd")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None and self._thread is not None
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        if self._bugs and error is None:
            raise self._bugs[0]

    # What the switchboard needs.

    def names(self) -> Collection[str]:
        with self.lifecycle.lock:
            return list(self.system.domains)

    def klass(self, name: str) -> str:
        return self._domain(name).klass

    def tags(self, name: str) -> frozenset[str]:
        with self.lifecycle.lock:
            return frozenset(self._domain(name).tags)

    def is_running(self, name: str) -> bool:
        return not self._domain(name).halted

    def template_for_dispvms(self, name: str) -> bool:
        with self.lifecycle.lock:
            return bool(self._property(name, "template_for_dispvms"))

    def default_dispvm(self, name: str) -> str | None:
        with self.lifecycle.lock:
            value = self._property(name, "default_dispvm")
            return None if value is None else str(value)

    def start(self, name: str) -> None:
        """Start a qube if it is halted; raises `AdminError` if it cannot."""
        self.lifecycle.start(name)

    # What a test needs.

    def fail(
        self,
        pattern: str,
        error: str = "QubesException",
        message: str = "it was made to fail",
        *,
        dest: str = "*",
        after: int = 0,
        times: int | None = 1,
    ) -> None:
        """Let calls fail whose `METHOD+ARG` and target match the patterns (as in a shell).

        `error` is the exception's name on the client's side, "" for an answer that is empty. The first
        `after` matching calls pass, then `times` fail (None: all). A start that fails has not begun.
        """
        self._faults.faults.append(_Fault(pattern, dest, error, message, after, times))

    def mend(self) -> None:
        """From now on nothing is made to fail any more."""
        self._faults.faults.clear()

    def limit_pool(self, pool: str, room: int | None) -> None:
        """From now on `pool` can take `room` more bytes of data; None: what it could in the beginning."""
        with self.lifecycle.lock:
            usage = self.volumes.pool_usage(pool)
            self.system.pools[pool].size = 100 * GIB if room is None else usage + room

    def volume_path(self, vm: str, volume: str) -> Path:
        """The file of a volume that is kept; it is replaced by every import."""
        return self.volumes.path(self._domain(vm).volumes[volume])

    def calls_of(self, pattern: str, dest: str = "*") -> list[AdminCall]:
        """The calls whose `METHOD+ARG` and target match the patterns, in order."""
        return [
            call
            for call in self.calls
            if fnmatch.fnmatchcase(call.name, pattern) and fnmatch.fnmatchcase(call.dest, dest)
        ]

    def respond(self, request: bytes) -> bytes:
        """The answer to one request; empty: the connection ends without one."""
        try:
            header, payload = request.split(b"\0", 1)
            method_and_arg, _source, kind, dest = header.decode("ascii").split(" ", 3)
            if kind != "name":
                raise ValueError(kind)
        except ValueError:
            return b""
        method, _, arg = method_and_arg.partition("+")
        call = AdminCall(method, arg, dest, payload)
        self.calls.append(call)
        try:
            if method != "admin.vm.Start":
                self._faults.check(call.name, dest)
            domain = self._domain(dest)
            return b"0\0" + (answer(self._parts, method, domain, arg, payload) or "").encode()
        except AdminError as error:
            return b"\0".join((b"2", error.kind.encode(), b"", str(error).encode(), b""))
        except StumbleError:
            return b""
        except Exception as error:
            self._bugs.append(error)
            raise

    def _property(self, name: str, key: str) -> Value:
        domain = self._domain(name)
        return properties.read(self.system, domain, key) if key in TABLE[domain.klass] else None

    def _domain(self, name: str) -> Domain:
        with self.lifecycle.lock:
            return self.system.domain(name)


_START = "admin.vm.Start+"


class _Server(socketserver.ThreadingUnixStreamServer):
    def __init__(self, path: Path, qubesd: Qubesd) -> None:
        self.qubesd = qubesd
        super().__init__(str(path), _Connection, bind_and_activate=False)
        self.socket.close()
        self.socket = listen_unix(path)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is none of ours; what is ours has been kept already."""


class _Connection(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        untrusted_request = b""
        while part := self.request.recv(_RECEIVE):
            untrusted_request += part
            if len(untrusted_request) > _REQUEST_LIMIT:
                return
        self.request.sendall(self.server.qubesd.respond(untrusted_request))


def _furnish(system: System) -> None:
    """What every system has."""
    system.labels = {name: (index, color) for index, (name, color) in enumerate(_COLORS.items(), 1)}
    system.pools = {
        "vm-pool": Pool("vm-pool", "lvm_thin", 100 * GIB),
        "lvm": Pool("lvm", "lvm_thin", 100 * GIB),
        "varlibqubes": Pool("varlibqubes", "file-reflink", 100 * GIB),
        "linux-kernel": Pool("linux-kernel", "linux-kernel", None),
    }
    system.properties.update(
        {"default_pool": "vm-pool", "default_pool_kernel": "linux-kernel", "default_kernel": "6.12.59-1.fc41"}
    )
    dom0 = Domain("dom0", "AdminVM", {"name": "dom0", "qid": 0, "uuid": DOM0_UUID, "label": "black"})
    dom0.power_state = "Running"
    system.domains["dom0"] = dom0
