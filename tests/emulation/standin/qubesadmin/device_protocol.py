"""Devices by their port, and their assignments to qubes."""

import string
import typing
from collections.abc import Callable, Mapping
from enum import Enum

if typing.TYPE_CHECKING:
    from qubesadmin.app import VMCollection
    from qubesadmin.vm import QubesVM

_KEY = frozenset(string.digits + string.ascii_letters + r"!#$%&()*+,-./:;<>?@[\]^_{|}~")
_VALUE = _KEY | frozenset(string.punctuation + " ")
_UNKNOWN_INTERFACE = "?******"


class ProtocolError(AssertionError):
    """A device or an assignment that cannot be written down as the Admin API wants it."""


class Port:
    """Where a device is: a qube, a place in it, a class of devices."""

    def __init__(self, backend_domain: "QubesVM | None", port_id: str | None, devclass: str | None) -> None:
        self.backend_domain = backend_domain
        self.port_id = port_id if port_id is not None else "*"
        self.devclass = devclass or "peripheral"

    @property
    def backend_name(self) -> str:
        return self.backend_domain.name if self.backend_domain is not None else "*"

    def __repr__(self) -> str:
        return f"{self.backend_name}+{self.port_id}"

    def __str__(self) -> str:
        return f"{self.backend_name}:{self.port_id}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Port) and (self.devclass, repr(self)) == (other.devclass, repr(other))

    def __hash__(self) -> int:
        return hash((self.devclass, repr(self)))


class VirtualDevice:
    """A device in a port; `device_id` None: whichever is there."""

    def __init__(self, port: Port, device_id: str | None = None) -> None:
        self.port = port
        self.device_id = device_id if device_id is not None else "*"

    @property
    def backend_domain(self) -> "QubesVM | None":
        return self.port.backend_domain

    @property
    def backend_name(self) -> str:
        return self.port.backend_name

    @property
    def port_id(self) -> str:
        return self.port.port_id

    @property
    def devclass(self) -> str:
        return self.port.devclass

    @property
    def repr_for_qarg(self) -> str:
        """As an argument of the Admin API: `BACKEND+PORT+ID`, with `_` for what an argument cannot hold."""
        unknown = "_" * len(_UNKNOWN_INTERFACE)
        return repr(self).replace(":", "+").replace(_UNKNOWN_INTERFACE, unknown).replace("*", "_")

    @classmethod
    def from_qarg(
        cls,
        representation: str,
        devclass: str | None,
        domains: "VMCollection",
        blind: bool = False,
        backend: "QubesVM | None" = None,
    ) -> "VirtualDevice":
        if backend is not None:
            raise NotImplementedError
        get: Callable[[str], QubesVM] = domains.get_blind if blind else domains.__getitem__
        backend_name, _, identity = representation.partition("+")
        port_id, _, device_id = identity.replace("+", ":").partition(":")
        device_id = device_id.replace("_" * len(_UNKNOWN_INTERFACE), _UNKNOWN_INTERFACE)
        port = Port(None if backend_name in "_*" else get(backend_name), _star(port_id), devclass)
        return cls(port, _star(device_id) or None)

    def serialize(self) -> bytes:
        return b" ".join(
            (
                _packed("device_id", self.device_id),
                _packed("port_id", self.port_id),
                _packed("devclass", self.devclass),
                _packed("backend_domain", self.backend_name),
            )
        )

    def __repr__(self) -> str:
        return f"{self.port!r}:{self.device_id}"

    def __str__(self) -> str:
        return f"{self.port}:{self.device_id}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VirtualDevice) and (self.port, self.device_id) == (
            other.port,
            other.device_id,
        )

    def __hash__(self) -> int:
        return hash((self.port, self.device_id))


class AssignmentMode(Enum):
    MANUAL = "manual"
    ASK = "ask-to-attach"
    AUTO = "auto-attach"
    REQUIRED = "required"


class DeviceAssignment:
    """That a device belongs to a qube, how, and with which options."""

    def __init__(
        self,
        device: VirtualDevice,
        frontend_domain: "QubesVM | None" = None,
        options: Mapping[str, object] | None = None,
        mode: str | AssignmentMode = AssignmentMode.MANUAL,
    ) -> None:
        self.virtual_device = device
        self.frontend_domain = frontend_domain
        self.options = dict(options or {})
        self.mode = AssignmentMode(mode)

    @classmethod
    def new(
        cls,
        backend_domain: "QubesVM | None",
        port_id: str,
        devclass: str,
        device_id: str | None = None,
        *,
        frontend_domain: "QubesVM | None" = None,
        options: Mapping[str, object] | None = None,
        mode: str | AssignmentMode = AssignmentMode.MANUAL,
    ) -> "DeviceAssignment":
        device = VirtualDevice(Port(backend_domain, port_id, devclass), device_id)
        return cls(device, frontend_domain, options, mode)

    @property
    def backend_domain(self) -> "QubesVM | None":
        return self.virtual_device.backend_domain

    @property
    def backend_name(self) -> str:
        return self.virtual_device.backend_name

    @property
    def port_id(self) -> str:
        return self.virtual_device.port_id

    @property
    def devclass(self) -> str:
        return self.virtual_device.devclass

    @property
    def device_id(self) -> str:
        return self.virtual_device.device_id

    @property
    def required(self) -> bool:
        """Whether the qube cannot start without it."""
        return self.mode is AssignmentMode.REQUIRED

    @property
    def attach_automatically(self) -> bool:
        return self.mode is not AssignmentMode.MANUAL

    @property
    def repr_for_qarg(self) -> str:
        return self.virtual_device.repr_for_qarg

    def serialize(self) -> bytes:
        parts = [self.virtual_device.serialize(), _packed("mode", self.mode.value)]
        if self.frontend_domain is not None:
            parts.append(_packed("frontend_domain", self.frontend_domain.name))
        parts += [_packed(f"_{key}", value) for key, value in self.options.items()]
        return b" ".join(parts)

    @classmethod
    def deserialize(cls, serialization: bytes, expected_device: VirtualDevice) -> "DeviceAssignment":
        properties: dict[str, str] = {}
        rest = serialization.decode("ascii").strip()
        while rest:
            key, _, rest = rest.partition("='")
            value, _, rest = rest.replace(r"\'", "\0").partition("'")
            properties[key] = value.replace("\0", "'")
            rest = rest.replace("\0", r"\'").lstrip()
        device = VirtualDevice(expected_device.port, properties.get("device_id", expected_device.device_id))
        options = {key[1:]: value for key, value in properties.items() if key.startswith("_")}
        return cls(device, None, options, properties["mode"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeviceAssignment) and self.virtual_device == other.virtual_device

    def __hash__(self) -> int:
        return hash(self.virtual_device)


def _packed(key: str, value: object) -> bytes:
    text = str(value).replace("'", r"\'")
    for what, characters, allowed in (("name", key, _KEY), ("value", text, _VALUE)):
        if wrong := set(characters) - allowed:
            raise ProtocolError(f"Invalid chars in property {what}: {wrong!r}")
    return f"{key}='{text}'".encode("ascii")


def _star(text: str) -> str:
    return "*" if text == "_" else text
