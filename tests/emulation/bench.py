"""A switchboard with two qubes, and what tests of the emulated qrexec do with them."""

import socket
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .switchboard import Switchboard
from .trigger import listen_unix

POLICY = """
test.Denied  *  @anyvm  @anyvm  deny
test.Asked   *  @anyvm  @anyvm  ask
test.Dom0    *  @anyvm  dom0    allow
*            *  @anyvm  @anyvm  allow
"""


class FakeSystem:
    """Three qubes; `asleep` starts when it is called, `broken` does not."""

    def __init__(self) -> None:
        self.switchboard: Switchboard | None = None
        self.running = {"work", "vault"}

    def names(self) -> Collection[str]:
        return ["dom0", "work", "vault", "asleep", "broken"]

    def klass(self, name: str) -> str:
        return "AppVM"

    def tags(self, name: str) -> frozenset[str]:
        return frozenset()

    def is_running(self, name: str) -> bool:
        return name in self.running

    def start(self, name: str) -> None:
        if name == "broken":
            raise RuntimeError("no memory")
        assert self.switchboard is not None
        self.switchboard.start_domain(name)


class Bench:
    """A switchboard with `work` and `vault` running, and what tests do with it."""

    def __init__(self, root: Path, switchboard: Switchboard) -> None:
        self.root = root
        self.switchboard = switchboard

    def service(self, domain: str, name: str, script: str) -> None:
        """Give a domain an executable service."""
        path = self.root / domain / "qubes-rpc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def socket_service(self, domain: str, name: str) -> socket.socket:
        """Give a domain a socket service, a symlink as packages install them; returns what listens."""
        place = self.root / domain / "run" / "calls.sock"
        listener = listen_unix(place)
        listener.settimeout(20)
        (self.root / domain / "qubes-rpc" / name).symlink_to(place)
        return listener

    def call_from(
        self,
        caller: str,
        target: str,
        service: str,
        *options: str,
        stdin: int = subprocess.PIPE,
        stdout: int = subprocess.PIPE,
    ) -> subprocess.Popen[bytes]:
        """Start the client program of the calling domain."""
        if caller == "dom0":
            words = ["qrexec-client", "-d", target, *options, f"DEFAULT:QUBESRPC {service} dom0"]
        else:
            words = ["qrexec-client-vm", *options, target, service]
        environment = self.switchboard.environment(caller)
        words[0] = str(self.root / caller / "bin" / words[0])
        return subprocess.Popen(words, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env=environment)

    def result(
        self, caller: str, target: str, service: str, data: bytes = b"", *options: str
    ) -> tuple[int, bytes, bytes]:
        """Make a call to its end: exit code, output, errors."""
        with self.call_from(caller, target, service, *options) as client:
            output, errors = client.communicate(data, timeout=20)
            return client.returncode, output, errors


@contextmanager
def open_bench(folder: Path) -> Iterator[Bench]:
    """A bench below `folder`, which is closed at the end."""
    root = folder / "domains whose paths are longer than the 108 bytes that the address of a socket can have"
    policy = folder / "policy.d"
    policy.mkdir()
    (policy / "50-test.policy").write_text(POLICY)
    system = FakeSystem()
    with Switchboard(root, policy, system) as switchboard:
        system.switchboard = switchboard
        switchboard.start_domain("work")
        switchboard.start_domain("vault")
        yield Bench(root, switchboard)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended, but was not waited for, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(happened: Callable[[], bool]) -> None:
    """Wait for what must happen, or fail after twenty seconds."""
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)
