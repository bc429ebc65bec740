"""Assignments of devices to qubes, as qubesd reads and keeps them."""

import re

from tests.emulation.daemon.errors import AdminError, StumbleError, protocol
from tests.emulation.daemon.state import Domain, System

_PAIR = re.compile(r"\s*([!#-&(-<>-~]+)='((?:[^'\\]|\\'|\\)*)'")
_MODES = ("manual", "ask-to-attach", "auto-attach", "required")


def assign(system: System, domain: Domain, devclass: str, argument: str, payload: bytes) -> None:
    """Assign the device that `argument` names, in the way that the payload says."""
    backend, port, device = _device(system, argument)
    properties = _properties(payload)
    wanted = {"backend_domain": backend, "port_id": port, "devclass": devclass}
    if any(properties.get(key, value) != value for key, value in wanted.items()):
        raise protocol("Got another device than expected")
    device = properties.get("device_id", device)
    mode = properties.get("mode", "manual")
    if mode not in _MODES:
        raise protocol(f"{mode!r} is not a valid AssignmentMode")
    key = (devclass, backend, port, device)
    if key in domain.devices:
        raise AdminError("DeviceAlreadyAssigned", f"device already assigned to {domain.name}")
    if mode == "manual":
        raise StumbleError("Only auto-attachable devices can be assigned.")
    text = payload.decode("ascii")
    domain.devices[key] = (mode, text)


def unassign(system: System, domain: Domain, devclass: str, argument: str) -> None:
    key = (devclass, *_device(system, argument))
    if key not in domain.devices:
        raise AdminError("DeviceNotAssigned", f"device not assigned to {domain.name}")
    del domain.devices[key]


def assigned(domain: Domain, devclass: str) -> str:
    """All assignments of a class, a line each."""
    return "".join(
        f"{backend}+{port}:{device} {text}\n"
        for (kind, backend, port, device), (_mode, text) in sorted(domain.devices.items())
        if kind == devclass
    )


def _device(system: System, argument: str) -> tuple[str, str, str]:
    """Backend, port and device of `BACKEND+PORT+DEVICE`, where `_` is any."""
    backend, plus, identity = argument.partition("+")
    if not plus:
        raise StumbleError("not enough values to unpack")
    port, _, device = identity.replace("+", ":").partition(":")
    if backend != "_" and backend not in system.domains:
        raise StumbleError(f"no such backend: {backend}")
    device = device.replace("_" * 7, "?******")
    return _star(backend), _star(port), _star(device) or "*"


def _properties(payload: bytes) -> dict[str, str]:
    try:
        text = payload.decode("ascii").strip()
    except UnicodeDecodeError:
        raise protocol("not ASCII") from None
    found, end = {}, 0
    while match := _PAIR.match(text, end):
        found[match[1]] = match[2].replace(r"\'", "'")
        end = match.end()
    if end != len(text) or not found:
        raise protocol(f"not key='value': {text[end:]}")
    return found


def _star(text: str) -> str:
    return "*" if text == "_" else text
