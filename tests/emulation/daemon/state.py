"""What a Qubes system consists of, as plain values: qubes, labels, pools, global properties.

References to qubes are their names; a name never changes here. What has not been set is not in `properties`,
and its default is worked out when somebody asks.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from tests.emulation.daemon.errors import AdminError, bad_value, not_found

Value = str | int | bool | None

KLASSES = ("TemplateVM", "AppVM", "StandaloneVM", "DispVM")
DEVICE_CLASSES = ("block", "mic", "pci", "usb")
KERNELS = ("6.12.59-1.fc41", "pvgrub2-pvh")
#: The tags of every new qube that dom0 creates, while dom0 has the screen and the sound.
NEW_TAGS = frozenset({"audiovm-dom0", "created-by-dom0", "guivm-dom0"})
IN_PROGRESS = "backup-restore-in-progress"


@dataclass
class Volume:
    """A volume of a qube. Only what is kept when the qube stops has a file."""

    name: str
    pool: str
    vid: str
    size: int
    rw: bool
    save_on_stop: bool
    snap_on_start: bool
    source: str = ""
    importing: bool = False
    revisions: list[str] = field(default_factory=list)


@dataclass
class Pool:
    """A storage pool; `size` None is a driver that tells neither size nor usage."""

    name: str
    driver: str
    size: int | None


@dataclass(repr=False)
class Domain:
    """A qube, or dom0."""

    name: str
    klass: str
    properties: dict[str, Value]
    tags: set[str] = field(default_factory=set)
    features: dict[str, str] = field(default_factory=dict)
    firewall: list[str] = field(default_factory=lambda: ["action=accept"])
    notes: str = ""
    volumes: dict[str, Volume] = field(default_factory=dict)
    #: (class, backend, port, device id): (mode, all that was sent with it)
    devices: dict[tuple[str, str, str, str], tuple[str, str]] = field(default_factory=dict)
    power_state: str = "Halted"

    def __repr__(self) -> str:
        return f"<{self.klass} at 0x7f0123456789 name={self.name!r} and all other properties>"

    @property
    def halted(self) -> bool:
        return self.power_state == "Halted"

    @property
    def has_pci(self) -> bool:
        return any(key[0] == "pci" for key in self.devices)


@dataclass(frozen=True, slots=True)
class Property:
    """What there is to know of a property, whoever has it.

    `check` brings the value as it is kept, `accept` says no when the system as it is forbids the change from
    one value to another. `none`: the reference may be to no qube; `klass`: only to a qube of this class.
    """

    name: str
    kind: str
    default: "Callable[[System, Domain], Value] | None" = None
    check: "Callable[[System, Domain, Value], Value]" = lambda _system, _domain, value: value
    accept: "Callable[[System, Domain, Value, Value], None]" = lambda _system, _domain, _old, _new: None
    none: bool = False
    klass: str = ""
    fixed: bool = False
    once: bool = False

    @property
    def api_type(self) -> str:
        return self.kind if self.kind in ("vm", "int", "bool", "label") else "str"


@dataclass
class System:
    """All of it. `free_memory` in MiB is what starting qubes can still take; None: enough.

    `table` has the properties of each class of qubes, and under "" those of the system.
    """

    table: Mapping[str, Mapping[str, Property]]
    domains: dict[str, Domain] = field(default_factory=dict)
    properties: dict[str, Value] = field(default_factory=dict)
    labels: dict[str, tuple[int, str]] = field(default_factory=dict)
    pools: dict[str, Pool] = field(default_factory=dict)
    memory: int = 16384
    free_memory: int | None = None
    pending_clones: dict[str, Volume] = field(default_factory=dict)

    @property
    def holder(self) -> Domain:
        """The system's own properties, held like those of a qube."""
        return Domain("Qubes", "", self.properties)

    def domain(self, name: str) -> Domain:
        """The qube of that name, or `uuid:…`; says no as the Admin API does if that is wrong or free."""
        if name.startswith("uuid:"):
            if not re.fullmatch(r"uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", name):
                raise AdminError("QubesVMInvalidUUIDError", f"VM UUID is not valid: {name[5:]!r}")
            for domain in self.domains.values():
                if domain.properties["uuid"] == name[5:]:
                    return domain
            raise not_found(name[5:])
        validate_name(name)
        if name not in self.domains:
            raise not_found(name)
        return self.domains[name]

    def chain(self, domain: Domain) -> Iterator[Domain]:
        """The qube, its template, and that one's."""
        while True:
            yield domain
            template = domain.properties.get("template")
            if not isinstance(template, str):
                return
            domain = self.domains[template]


def validate_name(name: str) -> None:
    """Whether a qube can have this name at all."""
    if len(name) > 31:
        raise bad_value("VM name must be shorter than 32 characters")
    if re.match(r"\A[0-9_.-]", name):
        raise bad_value("VM name cannot start with hyphen, underscore, dot or numbers")
    if not re.match(r"\A[a-zA-Z][a-zA-Z0-9_.-]*\Z", name):
        raise bad_value("VM name contains illegal characters")
    if name == "Domain-0":
        raise bad_value("VM name cannot be 'Domain-0'")
    if name in ("none", "default"):
        raise bad_value("VM name cannot be 'none' nor 'default'")
    if name.endswith("-dm"):
        raise bad_value("VM name cannot end with -dm")
