"""qubes.xml of R2 to R3.2: what each attribute becomes, and that nothing is dropped without a word."""

import tracemalloc

import pytest

from qubes_restore_svc.archive.qubes_xml import BackupContent, BackupQube, parse_qubes_xml
from qubes_restore_svc.errors import BadMetadata

BEGINNING = """<QubesVmCollection default_netvm="2" default_template="1" clockvm="2" updatevm="2">
<QubesTemplateVm name="fedora-23" qid="1" label="black" template_qid="none"/>
<QubesNetVm name="netvm" qid="2" label="red" template_qid="1"/>
<QubesProxyVm name="vpn" qid="3" label="green" template_qid="1" netvm_qid="2" uses_default_netvm="False"/>
"""


def parse(*elements: str) -> BackupContent:
    return parse_qubes_xml((BEGINNING + "".join(elements) + "</QubesVmCollection>").encode(), 3)


def element(attributes: str = "", tag: str = "QubesAppVm", template: str = "1") -> str:
    """A qube in the backup; what `attributes` says comes first."""
    usual = {
        "name": "work",
        "qid": "10",
        "label": "blue",
        "template_qid": template,
        "backup_content": "True",
        "backup_path": "appvms/work",
        "backup_size": "4096",
        "uses_default_netvm": "True",
        "netvm_qid": "2",
    }
    rest = " ".join(f'{name}="{value}"' for name, value in usual.items() if f"{name}=" not in attributes)
    return f"<{tag} {attributes} {rest}/>"


def qube(attributes: str = "", tag: str = "QubesAppVm", template: str = "1") -> BackupQube:
    content = parse(element(attributes, tag, template))
    assert not content.refused
    return content.qubes[0]


@pytest.mark.parametrize(
    ("tag", "template", "klass", "volumes"),
    [
        ("QubesAppVm", "1", "AppVM", ["private"]),
        ("QubesAppVm", "none", "StandaloneVM", ["root", "private"]),
        ("QubesHVm", "None", "StandaloneVM", ["root", "private"]),
        ("QubesHVm", "1", "AppVM", ["private"]),
        ("QubesNetVm", "1", "AppVM", ["private"]),
        ("QubesProxyVm", "1", "AppVM", ["private"]),
        ("QubesTemplateVm", "none", "TemplateVM", ["root", "private"]),
        ("QubesTemplateHVm", "none", "TemplateVM", ["root", "private"]),
    ],
)
def test_the_element_and_its_template_decide_on_the_class(
    tag: str, template: str, klass: str, volumes: list[str]
) -> None:
    info = qube(tag=tag, template=template).info
    assert (info.klass, [volume.name for volume in info.volumes]) == (klass, volumes)
    assert info.template == ("fedora-23" if klass == "AppVM" else None)


def test_name_label_place_and_size_are_read_and_plain_values_left_out() -> None:
    found = qube('memory="400" maxmem="4000" vcpus="2" autostart="False" debug="False" mac=""')
    assert (found.path, found.info.name, found.info.label) == ("appvms/work", "work", "blue")
    assert found.info.backup_size == 4096
    assert found.info.properties == found.info.features == {}


def test_qubes_that_are_not_in_the_backup_are_not_listed() -> None:
    content = parse(element('backup_content="False"'), element('qid="11" name="a" backup_path="b"'))
    assert [found.info.name for found in content.qubes] == ["a"]


@pytest.mark.parametrize(
    ("attributes", "netvm"),
    [
        ("", None),
        ('uses_default_netvm="False" netvm_qid="none"', ""),
        ('uses_default_netvm="False" netvm_qid="3"', "vpn"),
        ('uses_default_netvm="False" netvm_qid="77"', ""),
        ('uses_default_netvm="no" netvm_qid="3"', "vpn"),
    ],
)
def test_the_netvm_is_found_by_its_number_and_none_if_in_doubt(attributes: str, netvm: str | None) -> None:
    assert qube(attributes).info.netvm == netvm


def test_two_qubes_with_one_number_are_no_netvm_of_anybody() -> None:
    twin = '<QubesProxyVm name="twin" qid="3" label="red" template_qid="1"/>'
    content = parse(twin, element('uses_default_netvm="False" netvm_qid="3"'))
    assert content.qubes[0].info.netvm == ""
    assert any("netvm" in warning for warning in content.warnings)


@pytest.mark.parametrize(
    ("attributes", "dispvm"),
    [
        ("", None),
        ('uses_default_dispvm_netvm="True"', None),
        ('uses_default_dispvm_netvm="False" dispvm_netvm_qid="2"', None),
        ('uses_default_dispvm_netvm="False" dispvm_netvm_qid="none"', ""),
        ('uses_default_dispvm_netvm="False" dispvm_netvm_qid="3"', ""),
        ('uses_default_netvm="False" netvm_qid="none"', ""),
        ('uses_default_netvm="False" netvm_qid="3"', ""),
    ],
)
def test_disposables_of_another_network_lose_their_template_not_their_isolation(
    attributes: str, dispvm: str | None
) -> None:
    assert qube(attributes).info.properties.get("default_dispvm") == dispvm


def test_a_net_vm_provides_network_and_has_none() -> None:
    info = qube(tag="QubesNetVm").info
    assert (info.netvm, info.properties["provides_network"]) == ("", "True")
    assert qube(tag="QubesProxyVm").info.properties["provides_network"] == "True"


@pytest.mark.parametrize(
    ("attributes", "properties"),
    [
        ('memory="800" maxmem="0" vcpus="4"', {"memory": "800", "maxmem": "0", "vcpus": "4"}),
        ('autostart="True" debug="True" mac="00:16:3E:00:00:01"', None),
        ('kernel="4.4" uses_default_kernel="True"', {}),
        ('kernel="4.4" uses_default_kernel="False"', {"kernel": "4.4"}),
        ('kernel="None" uses_default_kernel="False"', {"kernel": ""}),
        ('kernelopts="nopat" uses_default_kernelopts="False"', {"kernelopts": "nopat"}),
    ],
)
def test_what_a_person_had_changed_is_a_property(attributes: str, properties: dict[str, str] | None) -> None:
    wanted = properties
    if wanted is None:
        wanted = {"autostart": "True", "debug": "True", "mac": "00:16:3E:00:00:01"}
    assert qube(attributes).info.properties == wanted


def test_an_hvm_keeps_its_hardware() -> None:
    info = qube('kernel="4.4" uses_default_kernel="False"', tag="QubesHVm", template="none").info
    assert info.properties == {"virt_mode": "hvm", "kernel": ""}
    assert info.features == {"linux-stubdom": ""}


@pytest.mark.parametrize(("tag", "agents"), [("QubesTemplateVm", True), ("QubesTemplateHVm", False)])
def test_a_pv_template_has_the_agents(tag: str, agents: bool) -> None:
    assert ("qrexec" in qube(tag=tag, template="none").info.features) == agents


def test_services_are_features() -> None:
    services = "{'cups': False, u'meminfo-writer': True, &quot;qubes-update-check&quot;: False, 'ntpd': True}"
    assert qube(f'services="{services}" internal="True"').info.features == {
        "service.cups": "",
        "service.meminfo-writer": "1",
        "check-updates": "",
        "service.ntpd": "1",
        "internal": "1",
    }


@pytest.mark.parametrize(
    "services", ["{'a': 1}", "['a']", "{'a': True", "{'a b': True}", "{'a': True} + 1", "__import__('os')"]
)
def test_services_that_are_not_understood_are_told(services: str) -> None:
    content = parse(element(f'services="{services}"'))
    assert content.qubes[0].info.features == {}
    assert any("cannot be restored" in warning for warning in content.warnings)


def test_devices_are_assigned_as_they_were() -> None:
    found = qube("""pcidevs="['00:14.0', '02:00.1']" pci_strictreset="False\"""").info.devices
    assert [(device.bus, device.backend, device.port) for device in found] == [
        ("pci", "dom0", "00_14.0"),
        ("pci", "dom0", "02_00.1"),
    ]
    assert all(device.required and device.options == {"no-strict-reset": "True"} for device in found)


def test_a_device_that_is_not_understood_is_told() -> None:
    content = parse(element("""pcidevs="[('00:14.0',)]\""""))
    assert not content.qubes[0].info.devices
    assert any("device" in warning for warning in content.warnings)


def test_dom0s_home_is_listed() -> None:
    home = '<QubesAdminVm name="dom0" qid="0" label="black" template_qid="none" backup_content="True"'
    info = parse(home + ' backup_path="dom0-home/user" backup_size="1"/>').qubes[0].info
    assert (info.klass, info.name, info.home_user) == ("AdminVM", "dom0", "user")


def test_a_disposable_is_refused_by_its_class() -> None:
    content = parse(element(tag="QubesDisposableVm"))
    assert "QubesDisposableVm" in content.refused[0].error.reason


@pytest.mark.parametrize("backup_format", [3, 4])
def test_each_format_has_its_own_form_of_qubes_xml(backup_format: int) -> None:
    other = b"<qubes><domains/></qubes>" if backup_format == 3 else b"<QubesVmCollection/>"
    with pytest.raises(BadMetadata, match=f"format {backup_format}"):
        parse_qubes_xml(other, backup_format)


@pytest.mark.parametrize(
    ("elements", "what"),
    [
        ('<QubesAppVm backup_content="True"/>' * 60_000, "qubes"),
        (element(f'pcidevs="[{"&#39;00:14.0&#39;&#44;" * 1000}]"') * 60, "services and devices"),
    ],
    ids=["qubes", "devices"],
)
def test_what_would_become_too_large_is_refused_before_it_does(elements: str, what: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BadMetadata, match=f"lists [0-9]+ {what}; at most"):
            parse(elements)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "attributes", ['uses_default_kernel="False"', 'kernel="None" uses_default_kernel="False"']
)
def test_a_kernel_of_its_own_that_is_not_named_is_none(attributes: str) -> None:
    assert qube(attributes).info.properties == {"kernel": ""}
