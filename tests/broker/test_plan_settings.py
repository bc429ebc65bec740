"""What of a qube's settings gets into its definition."""

from qubes_restore_svc.broker.interfaces import Definition, HostView
from qubes_restore_svc.broker.plan import make_plan
from qubes_restore_svc.wire.restore_call import Choice
from tests.broker.planning import NET, AllowAll, by_name, manifest, plan_of, qube, system

PCI = {"bus": "pci", "backend": "dom0", "port": "00_14.0", "required": True}
BLOCK = {"bus": "block", "backend": "sys-usb", "port": "sda"}


def test_what_the_allow_list_lets_through_is_defined_and_the_rest_told() -> None:
    source = qube(
        "work",
        label="blue",
        properties={"memory": "400", "kernelopts": "x", "autostart": "True"},
        features={"service.cups": "1"},
        tags=("project",),
    )
    planned = plan_of(source, allow=AllowAll("kernelopts", "autostart"))["work"]
    assert planned.definition == Definition(
        label="blue",
        template="tpl",
        netvm="",
        default_dispvm=None,
        properties={"memory": "400"},
        features={"service.cups": "1"},
        tags=("project",),
    )
    assert planned.left_out == ("property kernelopts", "property autostart")


def test_nothing_comes_back_without_an_allow_list() -> None:
    source = qube("work", properties={"memory": "400"}, features={"f": "1"}, tags=("t",), devices=(PCI,))
    plan = by_name(make_plan(manifest(source), Choice(), system()))
    assert plan["work"].definition == Definition(label="red", template="tpl", netvm="")


def test_what_the_broker_decides_is_no_property_whatever_is_allowed() -> None:
    names = ("name", "klass", "qid", "uuid", "dispid", "label", "template", "netvm", "default_dispvm")
    planned = plan_of(qube("work", properties={**NET, **dict.fromkeys(names, "x")}))["work"]
    assert planned.definition is not None
    assert planned.definition.properties == NET


def test_a_label_that_does_not_exist_here_becomes_red() -> None:
    planned = plan_of(qube("work", label="mauve"))["work"]
    assert planned.definition is not None
    assert planned.definition.label == "red"
    assert planned.notes == ("label change to 'red'",)


def test_a_device_comes_back_only_if_its_backend_is_here() -> None:
    # One that the restore brings too: it need not be finished before its frontend.
    planned = plan_of(qube("work", devices=(PCI, BLOCK)), qube("sys-usb"))["work"]
    assert planned.definition is not None
    assert [device.backend for device in planned.definition.devices] == ["dom0"]
    assert planned.left_out == ("device block sys-usb:sda (its backend is not here)",)
    assert planned.notes == ("device pci dom0:00_14.0 is assigned, as the configuration allows",)


def test_notes_come_in_the_order_of_what_a_person_asks_first() -> None:
    source = qube(
        "plain", template="gone", netvm="gone", label="mauve", properties={"default_dispvm": "gone"}
    )
    planned = plan_of(source, conflicts="rename", missing="default")["plain"]
    assert [note.split("'")[0] for note in planned.notes] == [
        "will be renamed to ",
        "template change to ",
        "netvm change to the system",
        "it will have no default_dispvm: ",
        "label change to ",
    ]


def test_a_place_without_a_system_gets_no_definition() -> None:
    source = qube("work", template="gone", netvm="gone", properties=NET)
    planned = plan_of(source, view=HostView(frozenset()))["work"]
    assert (planned.definition, planned.notes, planned.left_out) == (None, (), ())
    assert planned.name == "work"
