"""The devices that qubes.xml assigns to a qube.

Strategy: each `<device>` is read by itself into the model of the session protocol. What that does not accept,
or what could only be given back as more than it was, is left out with a warning. qubesd wrote neither of both
at first (the device was required), then `required="no"`, and since R4.3 `mode="auto-attach"`. Since then an
assignment may also be to one device only (`identity`): without it, another one in the port would be attached.
"""

from collections.abc import Callable
from xml.etree.ElementTree import Element

from pydantic import ValidationError

from qubes_restore_svc.archive.members import shown
from qubes_restore_svc.wire.messages import DeviceInfo

MAX_DEVICES = 256  #: of one qube; see ManifestQube

_ANY_DEVICE = "*"
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
#: qubesd's AssignmentMode, as far as an assignment can be made again: is the device required? One that was
#: only attached when the person agreed (`ask-to-attach`) must not come back as one that is attached unasked.
_MODES = {"required": True, "auto-attach": False}


def read_devices(untrusted_domain: Element, warn: Callable[[str], None]) -> tuple[DeviceInfo, ...]:
    """The devices of a domain, each once: as for qubesd, the last assignment counts."""
    devices: dict[tuple[str, str, str], DeviceInfo] = {}
    for untrusted_bus in untrusted_domain.findall("./devices"):
        for untrusted_device in untrusted_bus.findall("./device"):
            port = (
                untrusted_bus.get("class", ""),
                untrusted_device.get("backend-domain", ""),
                untrusted_device.get("id", ""),
            )
            # An earlier one must not come to life because the last one is refused.
            devices.pop(port, None)
            device = _device(port, untrusted_device) if len(devices) < MAX_DEVICES else None
            if device is None:
                warn(f"its device {shown(':'.join(port))} cannot be restored; left out")
            else:
                devices[port] = device
    return tuple(devices.values())


def _device(untrusted_port: tuple[str, str, str], untrusted_device: Element) -> DeviceInfo | None:
    bus, backend, port = untrusted_port
    options = {option.get("name", ""): option.text or "" for option in untrusted_device.findall("./option")}
    required = _required(untrusted_device, options.pop("required", None))
    untrusted_identity = options.pop("identity", None) or untrusted_device.get("identity", _ANY_DEVICE)
    try:
        return DeviceInfo.model_validate(
            {
                "bus": bus,
                "backend": backend,
                "port": port,
                "identity": None if untrusted_identity == _ANY_DEVICE else untrusted_identity,
                "required": required,
                "options": options,
            }
        )
    except ValidationError:
        return None


def _required(untrusted_device: Element, untrusted_option: str | None) -> bool | None:
    """Does the qube not start without it? None if that is not said in a way that is known."""
    untrusted_word = untrusted_device.get("required", untrusted_option)
    if untrusted_word is None:
        return _MODES.get(untrusted_device.get("mode", "required"))
    untrusted_word = untrusted_word.strip().lower()
    if untrusted_word in _TRUE | _FALSE:
        return untrusted_word in _TRUE
    return None
