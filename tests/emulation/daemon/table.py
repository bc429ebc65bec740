"""Which properties there are: of which type, with which default, and what they refuse."""

import re
import string
from collections.abc import Callable, Mapping

from tests.emulation.daemon import rules
from tests.emulation.daemon.errors import StumbleError, bad_property, bad_value
from tests.emulation.daemon.properties import NoValueError, read
from tests.emulation.daemon.state import KERNELS, Domain, Property, System, Value

Default = Callable[[System, Domain], Value]
Check = Callable[[System, Domain, Value], Value]


# --- Defaults ------------------------------------------------------------------------------------


def _is(value: Value) -> Default:
    return lambda _system, _domain: value


def _of_system(name: str) -> Default:
    def get(system: System, _domain: Domain) -> Value:
        try:
            return read(system, system.holder, name)
        except NoValueError:
            return None

    return get


def _of_template(name: str, otherwise: Default) -> Default:
    def get(system: System, domain: Domain) -> Value:
        template = domain.properties.get("template")
        if isinstance(template, str):
            return read(system, system.domains[template], name)
        return otherwise(system, domain)

    return get


def _maxmem(system: System, domain: Domain) -> Value:
    if domain.has_pci:
        return 0
    memory = read(system, domain, "memory")
    assert isinstance(memory, int)
    cap = memory * 10 if domain.features.get("os") == "Linux" else 4000
    return _of_template("maxmem", _is(min(cap, system.memory // 2)))(system, domain)


def _virt_mode(system: System, domain: Domain) -> Value:
    return "hvm" if domain.has_pci else _of_template("virt_mode", _is("pvh"))(system, domain)


def _ip(system: System, domain: Domain) -> Value:
    networked = read(system, domain, "provides_network") or read(system, domain, "netvm") is not None
    number = domain.properties["dispid" if domain.klass == "DispVM" else "qid"]
    assert isinstance(number, int)
    base = "10.138" if domain.klass == "DispVM" else "10.137"
    return f"{base}.{number >> 8}.{number & 255}" if networked else None


def _icon(system: System, domain: Domain) -> Value:
    kind = {"AdminVM": "adminvm", "TemplateVM": "templatevm", "DispVM": "dispvm"}.get(domain.klass, "appvm")
    return f"{kind}-{read(system, domain, 'label')}"


def _if_connected(text: str) -> Default:
    return lambda system, domain: text if read(system, domain, "netvm") else ""


def _not_auto_cleanup(system: System, domain: Domain) -> Value:
    return not read(system, domain, "auto_cleanup")


def _xid(_system: System, domain: Domain) -> Value:
    qid = domain.properties["qid"]
    return qid if domain.klass == "AdminVM" or not domain.halted else -1


# --- What a property refuses ---------------------------------------------------------------------


def _at_least(least: int, name: str) -> Check:
    def check(_system: System, _domain: Domain, value: Value) -> Value:
        assert isinstance(value, int)
        if value < least:
            raise bad_property(f"{name} must be positive{'' if least else ' or zero'}")
        return value

    return check


def _matching(pattern: str, message: str) -> Check:
    def check(_system: System, _domain: Domain, value: Value) -> Value:
        if not re.fullmatch(pattern, str(value), re.DOTALL):
            raise bad_property(message)
        return value

    return check


def _mac(_system: System, _domain: Domain, value: Value) -> Value:
    if not re.fullmatch(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", str(value).lower()):
        raise StumbleError("Invalid MAC address value")
    return str(value).lower()


def _mode(_system: System, domain: Domain, value: Value) -> Value:
    mode = str(value).lower()
    if mode not in ("hvm", "pv", "pvh"):
        raise bad_property("Invalid virtualization mode, supported values: hvm, pv, pvh")
    if mode == "pvh" and domain.has_pci:
        raise bad_property("pvh mode can't be set if pci devices are assigned")
    return mode


def _kernel(_system: System, domain: Domain, value: Value) -> Value:
    if "/" in str(value) and domain.klass:
        raise bad_property("Kernel name cannot contain '/'")
    if value and value not in KERNELS:
        raise bad_property(f"Kernel {value!r} not installed")
    return value or ""


def _pool(system: System, _domain: Domain, value: Value) -> Value:
    if value not in system.pools:
        raise bad_property("No such storage pool")
    return value


# --- The rows ------------------------------------------------------------------------------------


def _keyboard(_system: System, _domain: Domain, value: Value) -> Value:
    parts = str(value).split("+")
    if len(parts) != 3:
        raise bad_property("invalid number of keyboard layout parameters")
    for part, pattern, what in zip(
        parts, (r"[a-zA-Z]+", r"[a-zA-Z0-9_-]*", r"[a-zA-Z0-9_:,-]*"),
        ("keyboard layout", "layout variant", "layout options"), strict=True,
    ):  # fmt: skip
        if not re.fullmatch(pattern, part):
            raise bad_property(f"Invalid {what} provided")
    return value


_USER = _matching(
    r"[a-zA-Z0-9_+,.-]*",
    f"Username can contain only those characters: {string.ascii_letters}{string.digits}_-+,.",
)


def _denied(_system: System, _domain: Domain, value: Value) -> Value:
    text = str(value)
    if len(text) % 7:
        raise bad_value(f"Invalid length of interfaces={text!r} (is {len(text)}, expected multiple of 7)")
    if not re.fullmatch(r"([bump*][0-9a-f*]{6})*", text):
        raise bad_property(
            "Interface code list should be in the form chhhhhhchhhhhh...,"
            'where c is one of "b", "u", "m", "p", "*" and h is a hexdigit or "*".'
        )
    return value


_TEMPLATE_FOR_DISPVMS = Property(
    "template_for_dispvms", "bool", _is(False), accept=rules.accept_template_for_dispvms
)

_BASE = (
    Property("name", "str", once=True),
    Property("qid", "int", once=True),
    Property("uuid", "uuid", once=True),
    Property("label", "label"),
    Property("klass", "str", lambda _system, domain: domain.klass, fixed=True),
    Property("icon", "str", _icon, fixed=True),
    Property("default_dispvm", "vm", _of_system("default_dispvm"), none=True),
    Property("include_in_backups", "bool", _is(True)),
    Property("devices_denied", "str", _is(""), _denied),
    Property("keyboard_layout", "str", _is("us++"), _keyboard),
)

_QUBE = (
    *_BASE,
    Property("bootmode", "str", _is("default")),
    Property("guivm", "vm", _of_system("default_guivm"), none=True),
    Property("audiovm", "vm", _of_system("default_audiovm"), none=True),
    Property("virt_mode", "str", _virt_mode, _mode),
    Property("installed_by_rpm", "bool", _is(False)),
    Property("memory", "int", _of_template("memory", _is(400)), _at_least(1, "memory")),
    Property("maxmem", "int", _maxmem, _at_least(0, "maxmem"), rules.accept_maxmem),
    Property("stubdom_mem", "int", _is(None), _at_least(1, "stubdom_mem")),
    Property("vcpus", "int", _of_template("vcpus", _is(2)), _at_least(1, "vcpus")),
    Property("kernel", "str", _of_template("kernel", _of_system("default_kernel")), _kernel),
    Property("kernelopts", "str", _of_template("kernelopts", _is("swiotlb=2048")),
             _matching(r".{0,512}", "Kernelopts value too long (512 chars max)")),
    Property("debug", "bool", _is(False)),
    Property("default_user", "str", _of_template("default_user", _is("user")), _USER),
    Property("qrexec_timeout", "int", _of_template("qrexec_timeout", _is(60)),
             _at_least(1, "qrexec_timeout")),
    Property("shutdown_timeout", "int", _of_template("shutdown_timeout", _is(60)),
             _at_least(1, "shutdown_timeout")),
    Property("autostart", "bool", _is(False)),
    Property("backup_timestamp", "int", _is(None)),
    Property("management_dispvm", "vm", _of_template("management_dispvm", _of_system("management_dispvm")),
             none=True),
    Property("updateable", "bool", lambda _system, domain: "template" not in domain.properties, fixed=True),
    Property("mac", "str", _is("00:16:3e:5e:6c:00"), _mac),
    Property("ip", "ip", _ip),
    Property("ip6", "ip6", _is(None)),
    Property("netvm", "vm", _of_system("default_netvm"), rules.check_netvm, rules.accept_netvm, none=True),
    Property("provides_network", "bool", _is(False), rules.check_provides_network),
    Property("xid", "int", _xid, fixed=True),
    Property("stubdom_xid", "int", _is(-1), fixed=True),
    Property("stubdom_uuid", "str", _is(""), fixed=True),
    Property("visible_ip", "str", _ip, fixed=True),
    *(Property(name, "str", _is(""), fixed=True)
      for name in ("gateway6", "start_time", "visible_gateway6", "visible_ip6")),
    Property("dns", "str", _if_connected("10.139.1.1 10.139.1.2"), fixed=True),
    Property("visible_netmask", "str", _if_connected("255.255.255.255"), fixed=True),
    Property("visible_gateway", "str", lambda system, domain: _ip(system, system.domains[str(netvm)])
             if (netvm := read(system, domain, "netvm")) else None, fixed=True),
    Property("gateway", "str", lambda system, domain: _ip(system, domain)
             if read(system, domain, "provides_network") else None, fixed=True),
)  # fmt: skip

_GLOBAL = (
    Property("default_guivm", "vm", _is("dom0"), none=True),
    Property("default_audiovm", "vm", _is("dom0"), none=True),
    Property("default_netvm", "vm", _is(None), rules.check_default_netvm, none=True),
    Property("default_template", "vm", none=True, klass="TemplateVM"),
    Property("updatevm", "vm", _is(None), none=True),
    Property("clockvm", "vm", _is(None), none=True),
    Property("default_kernel", "str", None, _kernel),
    Property("default_dispvm", "vm", _is(None), none=True),
    Property("management_dispvm", "vm", _is(None), none=True),
    Property("default_pool", "str", None, _pool),
    *(Property(f"default_pool_{volume}", "str", _of_system("default_pool"), _pool)
      for volume in ("private", "root", "volatile", "kernel")),
    Property("default_qrexec_timeout", "int", _is(60)),
    Property("default_shutdown_timeout", "int", _is(60)),
    Property("stats_interval", "int", _is(3)),
    Property("check_updates_vm", "bool", _is(True)),
    Property("maxmem", "int", lambda system, _domain: system.memory, fixed=True),
)  # fmt: skip


def _rows(*rows: Property) -> dict[str, Property]:
    """By name; a later row replaces an earlier one."""
    return {row.name: row for row in rows}


TABLE: Mapping[str, Mapping[str, Property]] = {
    "": _rows(*_GLOBAL),
    "AdminVM": _rows(*_BASE, Property("maxmem", "int", _is(4096), fixed=True)),
    "TemplateVM": _rows(
        *_QUBE,
        Property("appvm_default_bootmode", "str", _is("default")),
        Property("netvm", "vm", _is(None), rules.check_netvm, rules.accept_netvm, none=True),
    ),
    "StandaloneVM": _rows(*_QUBE, _TEMPLATE_FOR_DISPVMS),
    "AppVM": _rows(
        *_QUBE,
        _TEMPLATE_FOR_DISPVMS,
        Property("template", "vm", klass="TemplateVM", accept=rules.accept_template),
    ),
    "DispVM": _rows(
        *_QUBE,
        Property("template", "vm", None, rules.check_template_of_disposable, rules.accept_template),
        Property("dispid", "int", once=True),
        Property("auto_cleanup", "bool", _is(False)),
        Property("include_in_backups", "bool", _not_auto_cleanup),
        Property("default_dispvm", "vm", lambda _system, domain: domain.properties["template"],
                 none=True),
        Property("is_preload", "bool", _is(False), fixed=True),
    ),
}  # fmt: skip

#: What a disposable does not take over from its template.
NOT_CLONED = frozenset({"name", "qid", "uuid", "dispid", "template", "label"})
