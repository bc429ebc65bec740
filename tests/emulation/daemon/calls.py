"""A call of the Admin API: what its method needs, and who answers it.

Strategy: a method is a function of the call; the decorator says whether it has an argument and a payload
(None: it may) and whether it is dom0's, a qube's, or anybody's. `answer` checks that first, in the original's
order and with its errors.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tests.emulation.daemon.errors import denied, protocol
from tests.emulation.daemon.lifecycle import Lifecycle
from tests.emulation.daemon.state import Domain, System, Volume
from tests.emulation.daemon.volumes import Volumes


@dataclass(frozen=True, slots=True)
class Parts:
    """What the methods work on."""

    system: System
    volumes: Volumes
    lifecycle: Lifecycle


@dataclass(frozen=True, slots=True)
class Call:
    """One call: the method, the qube it is for, its argument and its payload."""

    parts: Parts
    method: str
    dest: Domain
    arg: str
    payload: bytes

    @property
    def system(self) -> System:
        return self.parts.system

    @property
    def volume(self) -> Volume:
        """The volume that the argument names."""
        if self.arg not in self.dest.volumes:
            raise denied(f"Argument not in '{self.dest.name} volumes'")
        return self.dest.volumes[self.arg]

    @property
    def holder(self) -> Domain:
        """Whose properties it is about."""
        return self.system.holder if self.method.startswith("admin.property.") else self.dest


Answer = str | None
Handler = Callable[[Call], Answer]


@dataclass(frozen=True, slots=True)
class Method:
    handler: Handler
    arg: bool | None
    payload: bool | None
    dom0: bool | None
    locked: bool


METHODS: dict[str, Method] = {}


def answer(parts: Parts, method: str, dest: Domain, arg: str, payload: bytes) -> Answer:
    """Do what is asked; raises what is to be said instead."""
    if method not in METHODS:
        raise protocol(f"no such method: {method!r}")
    rule = METHODS[method]
    for wanted, given, what in ((rule.payload, payload, "payload"), (rule.arg, arg, "argument")):
        if wanted is True and not given:
            raise protocol(f"expected {what}")
        if wanted is False and given:
            raise protocol(f"unexpected {what}")
    if rule.dom0 is not None and rule.dom0 != (dest.klass == "AdminVM"):
        raise protocol("expected another destination")
    call = Call(parts, method, dest, arg, payload)
    if not rule.locked:
        return rule.handler(call)
    with parts.lifecycle.lock:
        return rule.handler(call)


def method(
    *names: str,
    arg: bool | None = False,
    payload: bool | None = False,
    dom0: bool | None = None,
    locked: bool = True,
) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        METHODS.update({name: Method(handler, arg, payload, dom0, locked) for name in names})
        return handler

    return register


def lines(names: object) -> str:
    assert isinstance(names, list | tuple)
    return "".join(f"{name}\n" for name in names)
