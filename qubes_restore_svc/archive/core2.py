"""qubes.xml of Qubes R2 to R3.2, put into the form that R4 writes.

Strategy: one element of the old schema becomes one `domain` of the new one, and the reader of the new schema
checks every value of it, as if R4 had written it. So nothing here judges a name, a path or a number; what
cannot be translated is written in a form that the reader refuses with a warning. References are numbers
(qid) in the old file, and names in the new one.

Each attribute is understood as the stock restorer does (qubesadmin/backup/core2.py), with these differences,
which tests/conformance/test_core2.py knows. A service becomes the feature `service.NAME` whatever its name
is, as a qube of R4 looks for it there. A qube whose disposables were to use another network than the default
gets no default disposable template: the stock restorer invents a template `disp-NETVM` for it, and without
that template the system's default would give the disposables more network than they had. A net VM has no
netvm, whatever its attributes say. A number that no qube has is no network. `pci_strictreset` counts: the
stock restorer takes every value of it for true.
"""

import re
from collections.abc import Iterator
from xml.etree.ElementTree import Element, SubElement

from qubes_restore_svc.errors import BadMetadata
from qubes_restore_svc.wire.names import MAX_QUBES

ROOT = "QubesVmCollection"

_CLASSES = {
    "QubesAdminVm": "AdminVM",
    "QubesTemplateVm": "TemplateVM",
    "QubesTemplateHVm": "TemplateVM",
    "QubesNetVm": "AppVM",
    "QubesProxyVm": "AppVM",
    "QubesAppVm": "AppVM",
    "QubesHVm": "AppVM",
}
_HVMS = frozenset({"QubesTemplateHVm", "QubesHVm"})

#: Attributes that are properties of the same name today, with the value that every qube had unless told
#: otherwise.
_PROPERTIES = {
    "include_in_backups": "True",
    "qrexec_timeout": "60",
    "vcpus": "2",
    "memory": "400",
    "maxmem": "4000",
    "default_user": "user",
    "debug": "False",
    "mac": "",
    "autostart": "False",
}

#: Services that are features of another name today.
_SERVICES = {"qubes-update-check": "check-updates"}

# Python wrote these with repr(): {'cups': False, u'meminfo-writer': True}, ['00:14.0'].
_QUOTED = r"""u?(?:'([A-Za-z0-9_.:-]{1,64})'|"([A-Za-z0-9_.:-]{1,64})")"""
_SERVICE = re.compile(rf"\s*{_QUOTED}\s*:\s*(True|False)\s*(?:,|$)")
_DEVICE = re.compile(rf"\s*{_QUOTED}\s*(?:,|$)")

_MAX_LITERAL = 16384  # characters
_MAX_ITEMS = 50_000  # services and devices, of all qubes together


def modernise(untrusted_root: Element) -> Element:
    """The document in the schema of R4, with those qubes of it that are in the backup.

    `untrusted_root` is the element ROOT. Raises BadMetadata if it would become too large: one attribute here
    may be many elements there.
    """
    untrusted_vms = [vm for vm in untrusted_root if vm.get("backup_content", "").strip().lower() == "true"]
    items = sum(vm.get(name, "").count(",") for vm in untrusted_vms for name in ("services", "pcidevs"))
    for number, most, what in (
        (len(untrusted_vms), MAX_QUBES, "qubes"),
        (items, _MAX_ITEMS, "services and devices"),
    ):
        if number > most:
            raise BadMetadata(f"qubes.xml lists {number} {what}; at most {most} are accepted")
    root = Element("qubes", version="4.0")
    domains = SubElement(root, "domains")
    labels = SubElement(root, "labels")
    names = _names(untrusted_root)
    default_netvm = _reference(untrusted_root.get("default_netvm"), names)
    for untrusted_vm in untrusted_vms:
        label = untrusted_vm.get("label", "red")
        SubElement(labels, "label", id=label).text = label
        domains.append(_domain(untrusted_vm, names, default_netvm))
    return root


def _names(untrusted_root: Element) -> dict[str, str]:
    """The names of all qubes by their qid. Two qubes with one qid: nothing tells which of them is meant."""
    names: dict[str, str] = {}
    for untrusted_vm in untrusted_root:
        qid = untrusted_vm.get("qid")
        if qid is None:
            continue
        names[qid] = f"(qid {qid})" if qid in names else untrusted_vm.get("name", "")
    return names


def _reference(untrusted_qid: str | None, names: dict[str, str]) -> str:
    """The name of the qube with this number; "" for none. A number that no qube has becomes a text that is no
    name.
    """
    if untrusted_qid is None or untrusted_qid.lower() == "none":
        return ""
    return names.get(untrusted_qid) or f"(qid {untrusted_qid})"


def _domain(untrusted_vm: Element, names: dict[str, str], default_netvm: str) -> Element:
    tag = str(untrusted_vm.tag)
    template = _reference(untrusted_vm.get("template_qid"), names)
    klass = _CLASSES.get(tag, tag)
    if klass == "AppVM" and not template:
        klass = "StandaloneVM"
    domain = Element("domain", {"class": klass})
    properties = {"name": untrusted_vm.get("name", ""), "label": untrusted_vm.get("label", "red")}
    features = {
        "backup-content": "True",
        "backup-path": untrusted_vm.get("backup_path", ""),
        "backup-size": untrusted_vm.get("backup_size", "0"),
    }
    if klass != "AdminVM":
        if klass == "AppVM":
            properties["template"] = template
        properties |= _network(untrusted_vm, tag, names, default_netvm)
        properties |= _plain_properties(untrusted_vm, tag)
        features |= _features(untrusted_vm, tag, klass)
        _devices(domain, untrusted_vm)
    for kind, values in (("property", properties), ("feature", features)):
        holder = SubElement(domain, "properties" if kind == "property" else "features")
        for name, value in values.items():
            SubElement(holder, kind, name=name).text = value
    return domain


def _network(untrusted_vm: Element, tag: str, names: dict[str, str], default_netvm: str) -> dict[str, str]:
    properties: dict[str, str] = {}
    netvm = default_netvm
    if tag in ("QubesNetVm", "QubesProxyVm"):
        properties["provides_network"] = "True"
    if tag == "QubesNetVm":
        netvm = properties["netvm"] = ""
    elif untrusted_vm.get("uses_default_netvm", "True") != "True":
        netvm = properties["netvm"] = _reference(untrusted_vm.get("netvm_qid"), names)
    dispvm_netvm = netvm
    if untrusted_vm.get("uses_default_dispvm_netvm", "True") != "True":
        dispvm_netvm = _reference(untrusted_vm.get("dispvm_netvm_qid"), names)
    if dispvm_netvm != default_netvm:
        properties["default_dispvm"] = ""
    return properties


def _plain_properties(untrusted_vm: Element, tag: str) -> dict[str, str]:
    properties: dict[str, str] = {}
    for name, usual in _PROPERTIES.items():
        value = untrusted_vm.get(name)
        if value and value != usual:
            properties[name] = value
    for name in ("kernel", "kernelopts"):
        value = untrusted_vm.get(name, "")
        if (untrusted_vm.get(f"uses_default_{name}") or "True").lower() != "true":
            properties[name] = "" if value.lower() == "none" else value
    if tag in _HVMS:
        properties["virt_mode"] = "hvm"
        properties["kernel"] = ""
    return properties


def _features(untrusted_vm: Element, tag: str, klass: str) -> dict[str, str]:
    features: dict[str, str] = {}
    for service, enabled in _services(untrusted_vm.get("services", "")):
        features[_SERVICES.get(service, f"service.{service}")] = "1" if enabled else ""
    if tag in _HVMS:
        features["linux-stubdom"] = ""  # as it had been until R3.2: other hardware makes some systems crash
    if tag == "QubesTemplateVm" or (tag == "QubesAppVm" and klass == "StandaloneVM"):
        features |= {"qrexec": "1", "gui": "1"}  # every PV qube had the agents
    if untrusted_vm.get("internal") == "True":
        features["internal"] = "1"
    return features


def _services(untrusted_literal: str) -> Iterator[tuple[str, bool]]:
    for item in _items(untrusted_literal, "{}", _SERVICE):
        if isinstance(item, str):
            yield item, True
        else:
            yield item[1] or item[2], item[3] == "True"


def _devices(domain: Element, untrusted_vm: Element) -> None:
    holder = SubElement(domain, "devices", {"class": "pci"})
    for item in _items(untrusted_vm.get("pcidevs", ""), "[]", _DEVICE):
        port = item if isinstance(item, str) else (item[1] or item[2]).replace(":", "_")
        device = SubElement(holder, "device", {"backend-domain": "dom0", "id": port, "required": "yes"})
        if untrusted_vm.get("pci_strictreset", "True") == "False":
            SubElement(device, "option", name="no-strict-reset").text = "True"


def _items(untrusted_literal: str, brackets: str, item: re.Pattern[str]) -> Iterator[re.Match[str] | str]:
    """The items of a list or a dictionary that repr() wrote. From the first that is not one, the rest
    comes as text, in brackets, so that no name is made of it.
    """
    text = untrusted_literal.strip()[: _MAX_LITERAL + 1]
    if not text:
        return
    if text[0] != brackets[0] or text[-1] != brackets[1]:
        yield f"({text})"
        return
    text, position = text[1:-1].strip(), 0
    while position < len(text):
        match = item.match(text, position)
        if match is None:
            yield f"({text[position:]})"
            return
        yield match
        position = match.end()
