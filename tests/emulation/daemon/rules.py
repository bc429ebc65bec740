"""What one qube may be to another: template, netvm, disposable template; and who is still needed.

Every function says no by an `AdminError`, as the original's setters and event handlers do. `check_…` also run
while a property is reset, where the new value is its default.
"""

from collections.abc import Iterator

from tests.emulation.daemon import properties
from tests.emulation.daemon.errors import AdminError, StumbleError, bad_property, bad_value, not_halted
from tests.emulation.daemon.state import Domain, System, Value


def check_template_of_disposable(system: System, _domain: Domain, value: Value) -> Value:
    if not is_disposable_template(system, str(value)):
        raise bad_property("template for disposable must have template_for_dispvms=True")
    return value


def accept_template(system: System, domain: Domain, old: Value, new: Value) -> None:
    if not domain.halted:
        raise AdminError("QubesVMNotHaltedError", "Cannot change template while qube is running")
    running = [vm.name for vm in based_on(system, domain.name) if not vm.halted]
    if new != old and running:
        raise AdminError("QubesVMInUseError", "Cannot change template while there are disposables running")


def accept_template_for_dispvms(system: System, domain: Domain, old: Value, new: Value) -> None:
    if new or not old:
        return
    if any(based_on(system, domain.name)):
        # The original makes a tuple of its text.
        message = (
            "Cannot change template_for_dispvms to False while there are some disposables based on this"
            " disposable template",
        )
        raise AdminError("QubesVMInUseError", str(message))


def check_netvm(system: System, domain: Domain, value: Value) -> Value:
    if value is None:
        return None
    name = str(value)
    if "provides_network" not in system.table[system.domains[name].klass]:
        raise StumbleError(f"{name} has no property provides_network")
    if not properties.read(system, system.domains[name], "provides_network"):
        raise bad_value(f"The {name} qube does not provide network")
    seen = set()
    upstream: Value = name
    while isinstance(upstream, str) and upstream not in seen:
        if upstream == domain.name:
            raise bad_value("Loops in network are unsupported")
        seen.add(upstream)
        upstream = properties.read(system, system.domains[upstream], "netvm")
    return value


def check_default_netvm(system: System, _domain: Domain, value: Value) -> Value:
    if value is not None and system.domains[str(value)].klass == "AdminVM":
        raise StumbleError("dom0 is no netvm")
    for vm in system.domains.values():
        if value is not None and "netvm" in system.table[vm.klass] and "netvm" not in vm.properties:
            behind = {vm.name}
            while more := {other.name for name in behind for other in connected_to(system, name)} - behind:
                behind |= more
            if value in behind:
                raise bad_property(f"Network loop on {vm.name!r}")
    return value


def accept_netvm(system: System, domain: Domain, _old: Value, new: Value) -> None:
    if isinstance(new, str) and not domain.halted and system.domains[new].halted:
        raise AdminError("QubesVMNotStartedError", f"Cannot dynamically attach to stopped qube {new}")


def check_provides_network(system: System, domain: Domain, value: Value) -> Value:
    if not value and any(connected_to(system, domain.name)):
        raise bad_value("The qube is still used by other qubes, change theirs 'netvm' first")
    return value


def accept_maxmem(_system: System, domain: Domain, old: Value, new: Value) -> None:
    if new != old and not domain.halted:
        raise not_halted(domain.name)


def based_on(system: System, name: str) -> Iterator[Domain]:
    return (vm for vm in system.domains.values() if vm.properties.get("template") == name)


def connected_to(system: System, name: str) -> Iterator[Domain]:
    for vm in system.domains.values():
        if vm.klass != "AdminVM" and properties.read(system, vm, "netvm") == name:
            yield vm


def needed_by(system: System, name: str) -> Iterator[tuple[str, str]]:
    """Who refers to a qube, and by which property: set ones of qubes, all of the system's."""
    for vm in system.domains.values():
        if vm.name != name:
            for key, value in vm.properties.items():
                if properties.find(system, vm, key).kind == "vm" and value == name:
                    yield vm.name, key
    for key, row in system.table[""].items():
        if row.kind == "vm":
            try:
                value = properties.read(system, system.holder, key)
            except properties.NoValueError:
                continue
            if value == name:
                yield "@GLOBAL", key


def check_removal(system: System, domain: Domain) -> None:
    """Whether a qube can go."""
    if not domain.halted:
        raise not_halted(domain.name)
    if any(needed_by(system, domain.name)):
        message = f"Domain is in use: {domain.name!r};  see 'journalctl -u qubesd -e' in dom0 for details"
        raise AdminError("QubesVMInUseError", message)
    for other in system.domains.values():
        if other.name != domain.name and any(key[1] == domain.name for key in other.devices):
            raise AdminError("QubesVMInUseError", "VM has devices assigned to other VMs")


def is_disposable_template(system: System, name: str) -> bool:
    domain = system.domains[name]
    if "template_for_dispvms" not in system.table[domain.klass]:
        return False
    return bool(properties.read(system, domain, "template_for_dispvms"))
