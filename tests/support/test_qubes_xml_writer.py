"""qubes.xml says what the plans say, and may be malformed on purpose."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from .plans import sample_qube
from .qubes_xml_writer import qubes_xml

WORK = sample_qube("work", 1 << 19, 0.5)
TEMPLATE = sample_qube("custom", 1 << 17, 0.5, "TemplateVM", seed=2)


def test_qubes_xml_lists_dom0_the_qubes_and_all_they_refer_to() -> None:
    devices = [("pci", "dom0", "00_1")]
    qube = replace(WORK, netvm="sys-firewall", tags=["t"], features={"f": "<&>"}, devices=devices)
    root = ElementTree.fromstring(qubes_xml([qube, replace(TEMPLATE, included=False)], dom0_home=True))
    domains = {domain.findtext("properties/property[@name='name']"): domain for domain in root.iter("domain")}
    assert {name: domain.get("class") for name, domain in domains.items()} == {
        None: "AdminVM",
        "fedora-41": "TemplateVM",
        "sys-firewall": "AppVM",
        "work": "AppVM",
        "custom": "TemplateVM",
    }
    work = domains["work"]
    features = {feature.get("name"): feature.text for feature in work.iter("feature")}
    assert features["backup-content"] == "True"
    assert features["backup-path"] == "vm10/"
    assert features["f"] == "<&>"
    label = work.findtext("properties/property[@name='label']")
    assert root.findtext(f"labels/label[@id='{label}']") == "red"
    assert work.findtext("properties/property[@name='netvm']") == "sys-firewall"
    volumes = {volume.get("name"): volume for volume in work.iter("volume")}
    assert [name for name, volume in volumes.items() if volume.get("save_on_stop")] == ["private"]
    assert volumes["private"].get("size") == str(1 << 19)
    device = work.find("devices[@class='pci']/device")
    assert device is not None
    assert (device.get("backend-domain"), device.get("id")) == ("dom0", "00_1")
    listed = [
        name
        for name, domain in domains.items()
        if domain.findtext("features/feature[@name='backup-content']") != "True"
    ]
    assert listed == ["fedora-41", "sys-firewall", "custom"]
    assert len({domain.get("id") for domain in domains.values()}) == 5


def test_a_qubes_xml_may_be_made_malformed_by_a_name() -> None:
    with pytest.raises(ElementTree.ParseError):
        ElementTree.fromstring(qubes_xml([replace(WORK, name="a\x1bb")]))


def test_a_label_is_written_as_its_id_or_as_its_name() -> None:
    assert b'name="label">label-6<' in qubes_xml([replace(WORK, label="blue")])
    assert b'name="label">blue<' in qubes_xml([replace(WORK, label="blue", label_by_name=True)])
