"""Devices in qubes.xml: each form that qubesd has written, and what is left out."""

from xml.etree.ElementTree import Element

import pytest
from defusedxml.ElementTree import fromstring
from hypothesis import given
from hypothesis import strategies as st

from qubes_restore_svc.archive.qubes_xml import MAX_DEVICES, read_devices
from qubes_restore_svc.wire.messages import DeviceInfo


def domain(devices: str, bus: str = "pci") -> Element:
    root: Element = fromstring(f'<domain><devices class="{bus}">{devices}</devices></domain>')
    return root


def read(devices: str, bus: str = "pci") -> tuple[tuple[DeviceInfo, ...], list[str]]:
    warnings: list[str] = []
    return read_devices(domain(devices, bus), warnings.append), warnings


def device(attributes: str = "", options: str = "") -> str:
    return f'<device backend-domain="dom0" id="00_14.0" {attributes}>{options}</device>'


def option(name: str, value: str) -> str:
    return f'<option name="{name}">{value}</option>'


@pytest.mark.parametrize(
    ("written", "required"),
    [
        (device(), True),  # R4.0 to R4.2
        (device('required="yes"'), True),
        (device('required="no"'), False),
        (device('required="False"'), False),
        (device("", option("required", "True")), True),
        (device("", option("required", "False")), False),
        (device('mode="required" identity="*"'), True),  # since R4.3
        (device('mode="auto-attach"'), False),
        # The older word counts, as for qubesd.
        (device('required="no" mode="required"'), False),
    ],
)
def test_each_form_says_whether_the_device_is_required(written: str, required: bool) -> None:
    assert read(written) == (
        (DeviceInfo(bus="pci", backend="dom0", port="00_14.0", required=required),),
        [],
    )


ONE = "0x8086:0x1e31::p0c0330"


@pytest.mark.parametrize(
    ("written", "identity"),
    [
        (device(f'identity="{ONE}"'), ONE),
        (device("", option("identity", ONE)), ONE),
        (device('identity="*"'), None),
        (device(), None),
    ],
)
def test_an_assignment_stays_with_its_one_device(written: str, identity: str | None) -> None:
    assert read(written) == (
        (DeviceInfo(bus="pci", backend="dom0", port="00_14.0", identity=identity, required=True),),
        [],
    )


@pytest.mark.parametrize("identity", ["", "a b", "ü", "x" * 129])
def test_a_device_whose_identity_cannot_be_read_is_left_out(identity: str) -> None:
    found, warnings = read(device(f'identity="{identity}"'))
    assert (found, len(warnings)) == ((), 1)


def test_options_come_along() -> None:
    (found,), warnings = read(device("", option("no-strict-reset", "True") + option("permissive", "")))
    assert found.options == {"no-strict-reset": "True", "permissive": ""}
    assert warnings == []


def test_devices_of_every_bus_and_backend_come_in_order() -> None:
    text = """<domain>
        <devices class="usb"><device backend-domain="sys-usb" id="1-1.2"/></devices>
        <devices class="pci"/>
        <devices class="block">
          <device backend-domain="work" id="sda1"/><device backend-domain="dom0" id="sda1"/>
        </devices>
      </domain>"""
    warnings: list[str] = []
    found = read_devices(fromstring(text), warnings.append)
    assert [(one.bus, one.backend, one.port) for one in found] == [
        ("usb", "sys-usb", "1-1.2"),
        ("block", "work", "sda1"),
        ("block", "dom0", "sda1"),
    ]
    assert warnings == []


@pytest.mark.parametrize(
    "written",
    [
        device('mode="ask-to-attach"'),  # must not come back as one that is attached unasked
        device('mode="manual"'),
        device('mode=""'),
        device('required="perhaps"'),
        device("", option("required", "")),
        device("", option("bad name", "1")),
        device("", option("name", "&#233;")),
        device("", "<option>1</option>"),
        device("", "".join(option(f"o{number}", "") for number in range(17))),
        '<device backend-domain="dom0" id="*" mode="required" identity="0x8086"/>',
        '<device backend-domain="dom0"/>',
        '<device id="00_14.0"/>',
        '<device backend-domain="none" id="00_14.0"/>',
        '<device backend-domain="dom0" id="../../etc"/>',
    ],
)
def test_what_cannot_be_given_back_as_it_was_is_left_out_with_a_warning(written: str) -> None:
    good = '<device backend-domain="dom0" id="00_1b.0"/>'
    found, warnings = read(written + good)
    assert [one.port for one in found] == ["00_1b.0"]
    assert len(warnings) == 1 and warnings[0].endswith("cannot be restored; left out")


def test_a_warning_shows_nothing_that_could_steer_a_terminal() -> None:
    _, (warning,) = read(f'<device backend-domain="&#x202e;{"x" * 500}" id="&#155;"/>')
    assert warning.isprintable() and warning.isascii() is False  # the ellipsis
    assert len(warning) < 250


def test_the_last_assignment_of_a_device_counts_even_if_it_is_refused() -> None:
    (found,), _ = read(device('required="yes"') + device('required="no"'))
    assert found.required is False
    assert read(device('required="yes"') + device('mode="ask-to-attach"'))[0] == ()


def test_no_more_devices_come_than_a_qube_may_have() -> None:
    many = "".join(f'<device backend-domain="dom0" id="p{number}"/>' for number in range(MAX_DEVICES + 3))
    found, warnings = read(many)
    assert len(found) == MAX_DEVICES
    assert len(warnings) == 3


@given(st.text(alphabet="abcAZ09_.:-*/ \u00e9\u202e", max_size=20), st.text(max_size=10))
def test_whatever_a_port_is_called_the_qube_is_never_lost(port: str, bus: str) -> None:
    node = domain(device())
    node[0].set("class", bus)
    node[0][0].set("id", port)
    warnings: list[str] = []
    assert len(read_devices(node, warnings.append)) + len(warnings) == 1
