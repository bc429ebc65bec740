"""An emulated qrexec between domains that are directories and processes of this machine.

Strategy: each domain has a socket to the switchboard, so who calls is known without being told. A thread per
call reads the request, judges it by the policy folder as it is at that moment (calls from dom0 are not
judged), starts the target if it is halted, and is then the agent that runs the service there. To stop a
domain freezes its processes, breaks its calls, and kills: what the other side sees is a peer that vanished,
and nobody in the domain sees anything.
"""

import re
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self, runtime_checkable

from .domain import Domain, write_program
from .policy import DOM0_NAMES, DOM0_UUID, Decision, Policy, Qube, answer, requested_target
from .policy_files import PolicyError
from .process_io import fail
from .services import Call, run_service, socket_activated
from .trigger import PROBLEM, REQUEST_REFUSED, Kind, Refused, accept, listen_unix, read_request, refuse

#: What a caller may name; everything else becomes an underscore (qrexec-daemon, sanitize_name).
_NOT_IN_SERVICE = re.compile(r"[^A-Za-z0-9_.+-]")
_NOT_IN_TARGET = re.compile(r"[^A-Za-z0-9_.@:-]")

_DOM0_COMMAND = re.compile(r"[^:]+:(?:nogui:)?QUBESRPC ([^ +]+)(?:\+([^ ]*))? ([^ ]+)")


class System(Protocol):
    """The state of the emulated Qubes: which domains there are, and what policies see of them."""

    def names(self) -> Collection[str]: ...

    def klass(self, name: str) -> str: ...

    def tags(self, name: str) -> frozenset[str]: ...

    def is_running(self, name: str) -> bool: ...

    def start(self, name: str) -> None:
        """qrexec starts a halted target. Whatever is raised, the call is refused then."""
        ...


@runtime_checkable
class Disposables(Protocol):
    """What a System may tell, too, so that rules about disposables can match."""

    def template_for_dispvms(self, name: str) -> bool: ...

    def default_dispvm(self, name: str) -> str | None: ...


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call, in the caller's words. `decision` is "dom0" for calls from dom0, which nobody judges."""

    source: str
    target: str
    service: str
    argument: str
    decision: Literal["allow", "deny", "ask", "dom0"]


@dataclass(frozen=True, slots=True)
class Question:
    """A call that a person has to allow: `target` is what the caller named, `choices` are where it could go,
    of which one may be preselected."""

    source: str
    target: str
    service: str
    argument: str
    choices: frozenset[str]
    preselected: str | None


def say_yes(question: Question) -> str | None:
    """Answer as who presses Enter: the target that is preselected, or the only one there is."""
    only = next(iter(question.choices)) if len(question.choices) == 1 else None
    return question.preselected or only


def say_no(question: Question) -> str | None:
    """Answer as who presses Escape, or is not there."""
    return None


class Switchboard:
    """qrexec for the domains in `root`, with the policy in the folder `policy`. `calls`: what was called.

    `person` answers what a policy asks: with the target, or None to refuse. It is called in the call's own
    thread, which waits for it; nobody is there at first.
    """

    def __init__(self, root: Path, policy: Path, system: System) -> None:
        self.calls: list[CallRecord] = []
        self.person: Callable[[Question], str | None] = say_no
        self._root = root
        self._policy = policy
        self._system = system
        self._domains: dict[str, Domain] = {}
        self._listeners: dict[str, socket.socket] = {}
        self._channels: dict[socket.socket, set[str]] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        self.start_domain("dom0")
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name in (*self._domains,):
            self.stop_domain(name)
        for thread in self._threads:
            thread.join()

    def start_domain(self, name: str) -> None:
        """From now on services of the domain can be called, and its programs can call."""
        with self._lock:
            if name in self._domains:
                return
            domain = Domain(self._root / name)
            listener = listen_unix(domain.socket)
            if name == "dom0":
                module, option = (
                    "tests.emulation.programs.qrexec_client",
                    f"--socket-dir={domain.socket.parent}",
                )
                write_program(domain.bin / "qrexec-client", module, option)
            else:
                module, option = (
                    "tests.emulation.programs.qrexec_client_vm",
                    f"--agent-socket={domain.socket}",
                )
                write_program(domain.bin / "qrexec-client-vm", module, option)
            self._domains[name] = domain
            self._listeners[name] = listener
            self._run(f"calls from {name}", lambda: self._accept_calls(name, listener))

    def stop_domain(self, name: str) -> None:
        """Break the domain's calls, those from it and those to it, and kill all that runs in it."""
        with self._lock:
            domain = self._domains.pop(name, None)
            listener = self._listeners.pop(name, None)
            broken = [channel for channel, domains in self._channels.items() if name in domains]
        if domain is None or listener is None:
            return
        domain.freeze()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        domain.socket.unlink(missing_ok=True)
        for channel in broken:
            with suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)
        domain.stop()

    def environment(self, name: str) -> dict[str, str]:
        """The environment of a started domain's programs."""
        return self._domains[name].environment()

    def processes(self) -> set[int]:
        """All processes that run in the domains now."""
        with self._lock:
            domains = [*self._domains.values()]
        return {pid for domain in domains for pid in domain.processes()}

    def socket_activated(
        self,
        name: str,
        socket_path: Path,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Let a started domain have a socket-activated daemon; see `services.socket_activated`."""
        socket_activated(self._domains[name], socket_path, command, environment)

    def _accept_calls(self, caller: str, listener: socket.socket) -> None:
        with listener, suppress(OSError):  # until it is shut down
            while True:
                channel, _ = listener.accept()
                self._run(f"call from {caller}", partial(self._serve, caller, channel))

    def _serve(self, caller: str, channel: socket.socket) -> None:
        with self._broken_with(channel, caller), suppress(OSError):
            asked = read_request(channel) if caller in self._domains else None
            if asked is None:
                return
            try:
                target, call = self._route(caller, *asked)
                domain = self._target(channel, target)
            except Refused as refused:
                refuse(channel, refused.code)
                return
            accept(channel)  # which fails if the caller was stopped, perhaps while somebody was asked
            try:
                run_service(domain, call, channel)
            except Refused as refused:
                fail(channel, refused.code)

    def _route(self, caller: str, kind: Kind, target: str, command: str) -> tuple[str, Call]:
        """Who is to be connected, and with what; raises Refused."""
        if caller == "dom0" and kind is Kind.FROM_DOM0:
            match = _DOM0_COMMAND.fullmatch(command)
            if match is None or target in DOM0_NAMES:
                raise Refused(PROBLEM)
            call = Call(match[1], match[2], match[3])
            self.calls.append(CallRecord("dom0", target, call.service, call.argument or "", "dom0"))
            return target, call
        name, _, argument = _NOT_IN_SERVICE.sub("_", command).partition("+")
        if caller == "dom0" or kind is not Kind.FROM_VM or not name:
            raise Refused(REQUEST_REFUSED)
        requested = _NOT_IN_TARGET.sub("_", target)[:63]
        qubes = self._qubes()
        decision = self._judge(caller, requested, name, argument, qubes)
        self.calls.append(CallRecord(caller, requested, name, argument, decision.action))
        if decision.choices:
            choices, preselected = decision.choices, decision.preselected
            question = Question(caller, requested, name, argument, choices, preselected)
            decision = answer(decision, self.person(question))
        if decision.target is None:
            raise Refused(REQUEST_REFUSED)
        to_dom0 = requested_target(requested, qubes) if decision.target == "dom0" else None
        return decision.target, Call(name, argument, caller, to_dom0)

    def _judge(
        self, source: str, target: str, service: str, argument: str, qubes: Mapping[str, Qube]
    ) -> Decision:
        try:
            policy = Policy.load(self._policy)
        except PolicyError as error:
            return Decision("deny", None, None, str(error))
        return policy.judge(source, target, service, argument, qubes)

    def _qubes(self) -> dict[str, Qube]:
        qubes = {"dom0": Qube("AdminVM", uuid=DOM0_UUID)}
        for name in {*self._system.names()} - {"dom0"}:
            with suppress(KeyError):  # it was removed meanwhile
                qubes[name] = self._qube(name)
        return qubes

    def _qube(self, name: str) -> Qube:
        system = self._system
        qube = Qube(system.klass(name), system.tags(name), system.is_running(name))
        if isinstance(system, Disposables):
            template, default = system.template_for_dispvms(name), system.default_dispvm(name)
            qube = replace(qube, template_for_dispvms=template, default_dispvm=default)
        return qube

    def _target(self, channel: socket.socket, name: str) -> Domain:
        """The running domain that is called, started if qrexec would; raises Refused."""
        from_vm = "dom0" not in self._channels[channel]
        if from_vm and name not in self._domains and not name.startswith("@dispvm"):
            try:
                self._system.start(name)
            except Exception as error:  # whatever keeps it from starting
                raise Refused(REQUEST_REFUSED) from error
        with self._lock:
            if name not in self._domains:
                raise Refused(REQUEST_REFUSED if from_vm else PROBLEM)
            self._channels[channel].add(name)
            return self._domains[name]

    @contextmanager
    def _broken_with(self, channel: socket.socket, caller: str) -> Iterator[None]:
        """The channel is open for this block, and breaks when a domain of the call is stopped."""
        with channel:
            with self._lock:
                self._channels[channel] = {caller}
            try:
                yield
            finally:
                with self._lock:
                    del self._channels[channel]

    def _run(self, name: str, function: Callable[[], None]) -> None:
        thread = threading.Thread(target=function, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()
