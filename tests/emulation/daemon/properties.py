"""Properties of qubes and of the system: reading, setting, resetting.

Strategy: reading, setting and resetting follow the original step by step: does it exist, can the value be
read as its type, does the property accept it, does the rest of the system. What there is stands in
`table.py`.
"""

import ipaddress
import string
import uuid

from tests.emulation.daemon.errors import AdminError, StumbleError, bad_property, bad_value
from tests.emulation.daemon.state import Domain, Property, System, Value, validate_name


class NoValueError(StumbleError):
    """A property that is not set and has no default."""


def read(system: System, domain: Domain, name: str) -> Value:
    """The value that a property has; `NoValueError` if it has none."""
    row = find(system, domain, name)
    if name in domain.properties:
        return domain.properties[name]
    return default(system, domain, row)


def default(system: System, domain: Domain, row: Property) -> Value:
    if row.default is None:
        raise NoValueError(row.name)
    return row.default(system, domain)


def write(system: System, domain: Domain, name: str, payload: bytes) -> None:
    """Set a property to what the client sent."""
    row = find(system, domain, name)
    value = _parsed(row, payload)
    if row.fixed:
        raise bad_property(f"property {name!r} on {domain.klass} instance cannot be set")
    if row.once:
        raise StumbleError(f"{name} is write-once and already set")
    if row.kind == "vm":
        value = _reference(system, domain, row, str(value))
    elif row.kind == "label":
        value = _label(system, str(value))
    value = row.check(system, domain, value)
    try:
        old = read(system, domain, name)
    except NoValueError:
        old = None
    row.accept(system, domain, old, value)
    domain.properties[name] = value


def reset(system: System, domain: Domain, name: str) -> None:
    """Give a property its default again."""
    row = find(system, domain, name)
    if row.once:
        raise StumbleError(f"{name} is write-once and already set")
    if name == "template":
        instead = system.properties.get("default_template") if domain.klass == "AppVM" else None
        hint = f". You can set it to the current default ({instead}) instead" if instead else ""
        raise bad_value(f"Cannot unset template{hint}")
    if name in domain.properties:
        new = None
        if row.default is not None:
            new = row.default(system, domain)
        if name in ("netvm", "template_for_dispvms"):
            row.check(system, domain, new)
            row.accept(system, domain, domain.properties[name], new)
        del domain.properties[name]


def find(system: System, domain: Domain, name: str) -> Property:
    rows = system.table[domain.klass]
    if name not in rows:
        raise AdminError("QubesNoSuchPropertyError", f"Invalid property {name!r} of {domain.name}")
    return rows[name]


def _parsed(row: Property, payload: bytes) -> Value:
    """The first look at what was sent: can it be such a value at all?"""
    try:
        text = payload.decode("ascii")
    except UnicodeDecodeError:
        raise bad_value("" if row.kind == "vm" else "Non-ASCII bytes in property value") from None
    if row.kind == "vm":
        if text:
            validate_name(text)
        return text
    if row.kind == "bool":
        if text.lower() in ("0", "no", "false", "off"):
            return False
        if text.lower() in ("1", "yes", "true", "on"):
            return True
        raise bad_value(f"Invalid literal for boolean property: {text!r}")
    try:
        if row.kind == "int":
            return int(text)
        if row.kind == "uuid":
            return str(uuid.UUID(text))
        if row.kind in ("ip", "ip6"):
            return str((ipaddress.IPv4Address if row.kind == "ip" else ipaddress.IPv6Address)(text))
    except ValueError:
        kind = {"ip": "IPv4Address", "ip6": "IPv6Address", "uuid": "UUID"}.get(row.kind, row.kind)
        raise bad_value(f"Failed to parse property value as {kind}") from None
    if not set(text) <= set(string.printable):
        raise bad_value("Invalid characters in property value")
    return text


def _label(system: System, text: str) -> str:
    """The label of that name, or that number."""
    for name, (index, _color) in system.labels.items():
        if text in (name, str(index)):
            return name
    raise AdminError("QubesLabelNotFoundError", f"Label does not exist: {text}")


def _reference(system: System, domain: Domain, row: Property, name: str) -> Value:
    if not name:
        if row.none:
            return None
        raise bad_property(f"Invalid value None for property {row.name!r} of {domain!r}")
    if name not in system.domains:
        raise bad_property(f"Can't set {row.name} to non-existing qube {name}")
    klass = system.domains[name].klass
    if row.klass and klass != row.klass:
        raise bad_property(f"wrong VM class: domains[{name!r}] is of type {klass} and not {row.klass}")
    return name
