"""qubes.xml of R2 to R3.2 becomes what the stock restorer makes of it, but for differences listed here.

The stock parser runs in the same process, on documents made up at random; ours reads the same bytes.
"""

import importlib
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest

from qubes_restore_svc.archive.qubes_xml import parse_qubes_xml

#: Values of the attributes of a qube; None leaves one out. The first is the usual one.
VALUES: dict[str, list[str | None]] = {
    "label": ["red", "blue", "black", None],
    "template_qid": ["1", "none", "None"],
    "netvm_qid": ["2", "3", "none", None, "10"],
    "uses_default_netvm": ["True", "False", None],
    "dispvm_netvm_qid": ["2", "3", "none", None],
    "uses_default_dispvm_netvm": ["True", "False", None],
    "memory": ["400", "800", None],
    "maxmem": ["4000", "1000", None],
    "vcpus": ["2", "4", None],
    "kernel": ["4.4.14-11", "None", "none", "", None],
    "uses_default_kernel": ["True", "False", "true", "", None],
    "kernelopts": ["", "nopat", "None", None],
    "uses_default_kernelopts": ["True", "False", None],
    "default_user": ["user", "root", None],
    "debug": ["False", "True", None],
    "autostart": ["False", "True", None],
    "mac": [None, "00:16:3E:5E:6C:05", ""],
    "include_in_backups": ["True", "False", None],
    "qrexec_timeout": ["60", "120", None],
    "internal": ["False", "True", None],
    "services": ["{}", "{'cups': False}", "{u'meminfo-writer': True, 'qubes-update-check': False}", None],
    "pcidevs": ["[]", "['00:14.0']", "[u'00:1a.0', '02:00.0']"],
    "backup_content": ["True", "False", None],
}
TAGS = ["AppVm", "HVm", "NetVm", "ProxyVm", "TemplateVm", "TemplateHVm"]


def document(source: random.Random) -> str:
    usual = 'pcidevs="[]"'
    elements = [
        f'<QubesAdminVm name="dom0" qid="0" template_qid="none" {usual}/>',
        f'<QubesTemplateVm name="fedora-23" qid="1" template_qid="none" {usual}/>',
        f'<QubesNetVm name="netvm" qid="2" template_qid="1" {usual}/>',
        f'<QubesProxyVm name="vpn" qid="3" template_qid="1" {usual}/>',
    ]
    for qid in range(10, 13):
        chosen = {
            name: values[0] if source.random() < 0.4 else source.choice(values)
            for name, values in VALUES.items()
        }
        chosen |= {"name": f"qube{qid}", "qid": str(qid), "backup_path": f"vm{qid}", "backup_size": "4096"}
        tag = source.choice(TAGS)
        if tag == "NetVm":  # that one has no netvm in ours, whatever its attributes say
            chosen |= {"netvm_qid": None, "uses_default_netvm": None}
        attributes = [f"{name}={quoteattr(value)}" for name, value in chosen.items() if value is not None]
        elements.append(f"<Qubes{tag} {' '.join(attributes)}/>")
    source.shuffle(elements)
    default = source.choice(["2", "3", "None"])
    head = f'<QubesVmCollection default_netvm="{default}" default_template="1">'
    return f"{head}{''.join(elements)}</QubesVmCollection>"


@pytest.fixture(scope="module")
def stock(checkout: Callable[[str], Path]) -> Any:
    """The stock parser's class."""
    sources = str(checkout("qubes-core-admin-client"))  # skips where there are none
    # Another test may have loaded the stand-in under this name; it is put back.
    loaded = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "qubesadmin"}
    sys.path.insert(0, sources)
    try:
        return importlib.import_module("qubesadmin.backup.core2").Core2Qubes
    finally:
        del sys.path[0]
        for name in [*sys.modules]:
            if name.split(".")[0] == "qubesadmin":
                del sys.modules[name]
        sys.modules.update(loaded)


NO_SERVICES = {"qrexec", "gui", "internal", "linux-stubdom", "check-updates"}


def expected(vm: Any) -> dict[str, object]:
    """What the stock parser found, in our terms, with the differences that are wanted."""
    properties = {name: "" if value is None else str(value) for name, value in vm.properties.items()}
    netvm = properties.pop("netvm", None)
    if "default_dispvm" in properties:
        properties["default_dispvm"] = ""  # the stock restorer invents a template for another network
    features = {}
    for name, value in vm.features.items():
        known = name.startswith("service.") or name in NO_SERVICES
        features[name if known else f"service.{name}"] = "1" if value else ""
    return {
        "klass": vm.klass,
        "label": vm.label,
        "template": vm.template,
        "netvm": netvm,
        "properties": properties,
        "features": features,
        "devices": sorted(port for _, port in vm.devices.get("pci", {})),
    }


def test_an_old_qubes_xml_becomes_what_the_stock_restorer_makes_of_it(stock: Any, tmp_path: Path) -> None:
    for seed in range(1500):
        text = document(random.Random(seed))
        (tmp_path / "qubes.xml").write_text(text)
        found = {
            qube.info.name: {
                "klass": qube.info.klass,
                "label": qube.info.label,
                "template": qube.info.template,
                "netvm": qube.info.netvm,
                "properties": qube.info.properties,
                "features": qube.info.features,
                "devices": sorted(device.port for device in qube.info.devices),
            }
            for qube in parse_qubes_xml(text.encode(), 3).qubes
        }
        theirs = stock(str(tmp_path / "qubes.xml")).domains
        wanted = {}
        for name, vm in theirs.items():
            if vm.included_in_backup and not name.startswith("disp-"):
                wanted[name] = expected(vm)
        assert found == wanted, text
