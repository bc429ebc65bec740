"""Creating, starting, stopping and removing qubes.

Strategy: the state is changed under one lock, which is never held while the machine of a qube is started or
stopped: that machine's processes may ask for the state themselves. One more lock a qube keeps its starts and
stops apart.
"""

import threading
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from tests.emulation.daemon import features, properties, rules
from tests.emulation.daemon.errors import (
    AdminError,
    bad_property,
    bad_value,
    denied,
    not_found,
    not_started,
    protocol,
)
from tests.emulation.daemon.state import IN_PROGRESS, KLASSES, Domain, System, validate_name
from tests.emulation.daemon.table import NOT_CLONED
from tests.emulation.daemon.volumes import Volumes

Hook = Callable[[str], None]


def _nothing(_name: str) -> None:
    pass


@dataclass
class Machines:
    """What runs the qubes: told by name when one starts, stops, or has been removed."""

    start: Hook = _nothing
    stop: Hook = _nothing
    removed: Hook = _nothing


class Lifecycle:
    """The lives of the qubes of a system."""

    def __init__(self, system: System, volumes: Volumes, machines: Machines, start_check: Hook) -> None:
        self._system = system
        self._volumes = volumes
        self._machines = machines
        self._start_check = start_check
        self._lock = threading.RLock()
        self._locks: dict[str, threading.RLock] = defaultdict(threading.RLock)

    @property
    def lock(self) -> threading.RLock:
        """Held while the state is looked at or changed."""
        return self._lock

    def create(self, klass: str, argument: str, payload: bytes, in_pool: bool) -> None:
        """A new qube, as the payload describes it."""
        system = self._system
        if klass not in KLASSES:
            raise protocol(f"no such VM class: {klass!r}")
        if argument and "template" not in system.table[klass]:
            raise bad_value(f"{klass} cannot be based on template")
        if argument and argument not in system.domains:
            raise not_found(argument)
        options, pool, pools = _creation_options(system, payload, in_pool)
        name, label = options["name"], options["label"]
        if name in system.domains:
            raise bad_value(f"VM {name} already exists")
        used = {vm.properties["qid"] for vm in system.domains.values()}
        qid = next(number for number in range(10000) if number not in used)
        domain = Domain(
            name, klass, {"name": name, "qid": qid, "label": label, "uuid": str(uuid.UUID(int=qid))}
        )
        if "template" in system.table[klass]:
            self._set_template(domain, argument)
        self._volumes.create(domain, pool, pools)
        system.domains[name] = domain
        if klass == "DispVM":
            self._take_over(domain)
        features.add_tag(system, domain, "created-by-dom0")
        for reference in ("guivm", "audiovm"):
            features.follow_reference(system, domain, reference)

    def start(self, name: str) -> None:
        """Start a qube and wait until it runs; nothing happens if it does already."""
        with self._locks[name]:
            with self._lock:
                domain = self._system.domain(name)
                if domain.klass == "AdminVM":
                    raise AdminError("QubesVMNotHaltedError", "Cannot start Dom0 fake domain!")
                if not domain.halted:
                    return
            try:
                self._start_check(name)
                self._start_halted(domain)
            except BaseException:
                if not domain.halted:
                    self._stop(domain)
                if domain.klass == "DispVM":
                    self._discard(domain)
                raise

    def kill(self, name: str) -> None:
        """Stop a qube at once. A disposable with `auto_cleanup` is gone afterwards."""
        with self._locks[name]:
            with self._lock:
                domain = self._system.domain(name)
                if domain.klass == "AdminVM":
                    raise AdminError("QubesVMError", "Cannot kill Dom0 fake domain!")
                if domain.halted:
                    raise not_started(name)
            self._stop(domain)
            if domain.klass == "DispVM" and domain.properties.get("auto_cleanup"):
                self._discard(domain)

    def shutdown(self, name: str, force: bool) -> None:
        with self._lock:
            if not self._system.domain(name).halted and not force:
                users = [vm.name for vm in rules.connected_to(self._system, name) if not vm.halted]
                if users:
                    message = f"There are other VMs connected to this VM: {', '.join(users)}"
                    raise AdminError("QubesVMInUseError", message)
        self.kill(name)

    def remove(self, name: str) -> None:
        """Remove a qube that is halted and that nobody needs."""
        with self._locks[name]:
            with self._lock:
                domain = self._system.domain(name)
                if domain.klass == "AdminVM":
                    raise AdminError("QubesVMInUseError", "'dom0' cannot be removed")
                rules.check_removal(self._system, domain)
                if properties.read(self._system, domain, "installed_by_rpm"):
                    raise AdminError("QubesVMInUseError", f"VM installed by package manager: {name}")
            self._discard(domain)

    def _set_template(self, domain: Domain, argument: str) -> None:
        system = self._system
        default = "default_dispvm" if domain.klass == "DispVM" else "default_template"
        template = argument or properties.read(system, system.holder, default)
        if template is None:
            raise bad_value("Template for the qube not specified, nor default template set.")
        klass = system.domains[str(template)].klass
        if domain.klass == "AppVM" and klass != "TemplateVM":
            raise bad_property(
                f"wrong VM class: domains[{system.domains[str(template)]!r}] is of type {klass}"
                " and not TemplateVM"
            )
        if domain.klass == "DispVM" and not rules.is_disposable_template(system, str(template)):
            raise bad_value(
                f"template for disposable ({template}) needs to be an AppVM with template_for_dispvms=True"
            )
        domain.properties["template"] = template

    def _take_over(self, domain: Domain) -> None:
        """A disposable begins as its template is: set properties, features, tags, firewall rules."""
        system = self._system
        template = system.domains[str(domain.properties["template"])]
        for name, value in template.properties.items():
            if name in system.table["DispVM"] and name not in NOT_CLONED:
                domain.properties[name] = value
        domain.properties["dispid"] = domain.properties["qid"]
        domain.features.update(
            {key: text for key, text in template.features.items() if not key.startswith("preload-dispvm")}
        )
        domain.tags.update(template.tags)
        domain.firewall = list(template.firewall)

    def _start_halted(self, domain: Domain) -> None:
        with self._lock:
            system = self._system
            if reason := domain.features.get("prohibit-start"):
                raise AdminError("QubesException", f"Qube start is prohibited. Rationale: {reason}")
            if IN_PROGRESS in domain.tags:
                raise AdminError("QubesVMError", "Restore of this domain in progress, cannot start")
            if any(mode == "required" for mode, _ in domain.devices.values()):
                raise AdminError("QubesException", "Device not available")
            if domain.klass == "DispVM":
                rules.check_template_of_disposable(system, domain, domain.properties["template"])
            netvm = properties.read(system, domain, "netvm")
        if isinstance(netvm, str):
            self.start(netvm)
        with self._lock:
            if system.free_memory is not None:
                if self._memory(domain) > system.free_memory:
                    raise AdminError("QubesMemoryError", f"Not enough memory to start domain {domain.name!r}")
                system.free_memory -= self._memory(domain)
            domain.power_state = "Transient"
        self._machines.start(domain.name)
        with self._lock:
            domain.power_state = "Running"

    def _stop(self, domain: Domain) -> None:
        with self._lock:
            domain.power_state = "Dying"
        self._machines.stop(domain.name)
        with self._lock:
            domain.power_state = "Halted"
            if self._system.free_memory is not None:
                self._system.free_memory += self._memory(domain)

    def _discard(self, domain: Domain) -> None:
        with self._lock:
            self._volumes.remove(domain)
            self._system.domains.pop(domain.name, None)
        self._machines.removed(domain.name)

    def _memory(self, domain: Domain) -> int:
        """MiB that a start asks qmemman for: Xen needs something beside what the qube sees
        (qubes/vm/qubesvm.py:request_mem)."""
        memory, vcpus = (properties.read(self._system, domain, name) for name in ("memory", "vcpus"))
        assert isinstance(memory, int) and isinstance(vcpus, int)
        maxmem = properties.read(self._system, domain, "maxmem") or memory
        assert isinstance(maxmem, int)
        return memory + 4 + vcpus * 3 // 2 + maxmem * 8192 // (1 << 20)


def _creation_options(
    system: System, payload: bytes, in_pool: bool
) -> tuple[dict[str, str], str | None, dict[str, str]]:
    """Name and label, the pool for all volumes, pools for single ones."""
    options: dict[str, str] = {}
    pools: dict[str, str] = {}
    try:
        words = payload.decode("ascii").split(" ")
    except UnicodeDecodeError:
        raise protocol("Parameters contains non-ASCII characters") from None
    for word in words:
        key, equals, value = word.partition("=")
        volume = key.removeprefix("pool:")
        if not equals or key in options or volume in pools:
            raise protocol("Options must be unique, and have a value")
        if key == "name":
            validate_name(value)
        elif key == "label":
            _check_label(system, value)
        elif not in_pool or (key != "pool" and volume not in ("root", "private", "volatile", "kernel")):
            raise protocol("Options does not match: name, label, pool, pool:")
        elif value not in system.pools:
            raise AdminError("QubesException", f"Unknown storage pool {value}")
        if key.startswith("pool:"):
            pools[volume] = value
        else:
            options[key] = value
    if not {"name", "label"} <= options.keys():
        raise protocol("Creation requested without key: name, label")
    if "pool" in options and pools:
        raise protocol("Conflicting options specified: 'pool=', 'pool:volume='")
    return options, options.get("pool"), pools


def _check_label(system: System, label: str) -> None:
    if label.isdigit() or not all(character.isalnum() or character in "-_." for character in label):
        raise denied("Label must be a name")
    if label not in system.labels:
        raise AdminError("QubesLabelNotFoundError", f"Label does not exist: {label}")
