"""The stand-in for `qubesadmin` behaves, seen by its caller, as the original does."""

import os
import socket
import subprocess
from io import BytesIO
from pathlib import Path

import pytest
import qubesadmin
import qubesadmin.config
from qubesadmin import exc
from qubesadmin.device_protocol import AssignmentMode, DeviceAssignment, ProtocolError
from qubesadmin.firewall import Action, Rule

from tests.emulation.daemon.state import NEW_TAGS
from tests.emulation.qubesd import Qubesd

# --- Exceptions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "parents"),
    [
        (exc.QubesVMNotFoundError, (exc.QubesException, KeyError)),
        (exc.QubesNoSuchPropertyError, (exc.QubesException, AttributeError)),
        (exc.QubesPropertyAccessError, (exc.QubesDaemonAccessError, AttributeError)),
        (exc.QubesDaemonAccessError, (exc.QubesDaemonCommunicationError,)),
        (exc.QubesPropertyValueError, (exc.QubesValueError, ValueError)),
        (exc.QubesLabelNotFoundError, (exc.QubesException, KeyError)),
        (exc.QubesVMNotRunningError, (exc.QubesVMNotStartedError, exc.QubesVMError)),
        (exc.QubesMemoryError, (exc.QubesVMError, MemoryError)),
        (exc.StoragePoolException, (exc.QubesException,)),
        (exc.ProtocolError, (AssertionError,)),
    ],
)
def test_the_exceptions_are_related_as_in_the_original(
    kind: type[Exception], parents: tuple[type[Exception], ...]
) -> None:
    assert all(issubclass(kind, parent) for parent in parents)


def test_what_qubesd_forbids_is_an_empty_answer(app: qubesadmin.Qubes) -> None:
    with pytest.raises(exc.QubesDaemonAccessError, match="empty response"):
        app.domains["work"].qubesd_call(None, "admin.vm.volume.Info", "nonsense")


def test_a_message_with_a_percent_sign_breaks_the_exception(qubesd: Qubesd, app: qubesadmin.Qubes) -> None:
    qubesd.fail("admin.vm.tag.Set*", "QubesException", "pool is 100% full")
    with pytest.raises((ValueError, TypeError)):
        app.domains["work"].tags.add("x")


def test_an_exception_that_the_client_does_not_know_is_a_qubes_exception(
    qubesd: Qubesd, app: qubesadmin.Qubes
) -> None:
    for kind in ("QubesNewKindOfError", "Surprise"):
        qubesd.fail("admin.vm.tag.Set*", kind, "words")
        with pytest.raises(exc.QubesException, match="words") as caught:
            app.domains["work"].tags.add("x")
        assert caught.type is exc.QubesException
    qubesd.fail("admin.vm.tag.Set*", "OverflowError", "words")
    with pytest.raises(OverflowError):
        app.domains["work"].tags.add("x")


def test_without_qubesd_every_call_is_a_communication_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(qubesadmin.config.VARIABLE, str(tmp_path))
    with pytest.raises(exc.QubesDaemonCommunicationError, match="Failed to connect"):
        list(qubesadmin.Qubes().domains)
    with pytest.raises(exc.QubesDaemonCommunicationError, match="not found"):
        qubesadmin.Qubes().qubesd_call("work", "admin.vm.volume.Import", "private", None, BytesIO())


@pytest.mark.parametrize("size", [70_000, 300_000])
def test_a_request_longer_than_64_kib_is_cut_off(app: qubesadmin.Qubes, size: int) -> None:
    """Notes may be 256,000 bytes long, says qubesd; its own connection does not let them through."""
    with pytest.raises((exc.QubesDaemonAccessError, OSError)):
        app.domains["work"].set_notes("x" * size)
    app.domains["work"].set_notes("x" * 65_000)
    assert len(app.domains["work"].get_notes()) == 65_000


# --- Qubes and their properties ------------------------------------------------------------------


def test_values_have_the_types_of_their_properties(app: qubesadmin.Qubes) -> None:
    work = app.domains["work"]
    work.netvm = app.domains["net"]
    assert work.memory == 400
    assert work.autostart is False
    assert work.template == app.domains["fedora"]
    assert work.netvm == "net"
    assert str(work.label) == "blue"
    assert work.default_dispvm is None
    assert isinstance(app.default_pool, str)
    with pytest.raises(AttributeError):
        _ = work.stubdom_mem
    with pytest.raises(AttributeError):
        _ = app.domains["fedora"].template


def test_a_property_goes_back_to_its_default(app: qubesadmin.Qubes) -> None:
    work = app.domains["work"]
    work.vcpus = 7
    del work.vcpus
    assert (work.vcpus, work.property_is_default("vcpus"), work.property_get_default("vcpus")) == (2, True, 2)
    work.vcpus = 7
    setattr(work, "vcpus", qubesadmin.DEFAULT)  # noqa: B010 - no int, which is what the type says
    assert work.property_is_default("vcpus")
    assert "vcpus" in work.property_list()


def test_a_private_attribute_is_none_of_qubesd(qubesd: Qubesd, app: qubesadmin.Qubes) -> None:
    work = app.domains["work"]
    calls = len(qubesd.calls)
    with pytest.raises(AttributeError):
        _ = work._nothing
    with pytest.raises(AttributeError):
        setattr(work, "klass", "TemplateVM")  # noqa: B010 - it cannot be assigned, says the type
    assert len(qubesd.calls) == calls


def test_the_list_of_qubes_is_fetched_once_and_again_after_it_was_cleared(app: qubesadmin.Qubes) -> None:
    other = qubesadmin.Qubes()
    assert [vm.name for vm in app.domains] == ["dom0", "dvm", "fedora", "net", "work"]
    other.add_new_vm("AppVM", "late", "red", template="fedora")
    assert "late" not in app.domains
    with pytest.raises(KeyError):
        _ = app.domains["late"]
    assert app.domains.get("late") is None
    app.domains.clear_cache()
    assert app.domains["late"].klass == "AppVM"
    del other.domains["late"]
    assert "late" in app.domains
    app.domains.clear_cache()
    assert "late" not in app.domains


def test_qubes_are_equal_by_name(app: qubesadmin.Qubes) -> None:
    work = app.domains["work"]
    assert work == "work"
    assert work == qubesadmin.Qubes().domains["work"]
    assert work in {work}
    assert work in app.domains
    assert sorted([work, app.domains["net"]]) == [app.domains["net"], work]
    assert list(app.domains["fedora"].appvms) == ["dvm", "net", "work"]


def test_a_qube_that_has_gone_is_known_by_its_errors(app: qubesadmin.Qubes) -> None:
    work = app.domains["work"]
    del app.domains["work"]
    assert not work.is_running()
    with pytest.raises(exc.QubesPropertyAccessError):
        _ = work.memory
    with pytest.raises(exc.QubesVMNotFoundError):
        work.tags.add("x")
    with pytest.raises(exc.QubesVMNotFoundError):
        work.start()


def test_a_name_with_a_space_does_not_reach_qubesd(qubesd: Qubesd, app: qubesadmin.Qubes) -> None:
    with pytest.raises(ValueError, match="space"):
        app.add_new_vm("AppVM", "a label=red", "red")
    with pytest.raises(ValueError, match="only one"):
        app.add_new_vm("AppVM", "a", "red", pool="lvm", pools={"private": "lvm"})
    assert qubesd.calls == []


def test_tags_and_features(app: qubesadmin.Qubes) -> None:
    work = app.domains["work"]
    work.tags.update(["b", "a"])
    work.tags.discard("never-there")
    assert list(work.tags) == sorted({"a", "b"} | NEW_TAGS)
    assert "a" in work.tags
    work.features["on"] = True
    work.features["off"] = False
    work.features["number"] = 0
    assert dict(work.features.items()) == {"on": "1", "off": "", "number": "0"}
    app.domains["fedora"].features["supported-rpc.x"] = True
    assert work.features.check_with_template("supported-rpc.x") == "1"
    assert work.features.check_with_template("supported-rpc.y") is None
    assert work.features.get("supported-rpc.x", "no") == "no"
    del work.features["on"]
    with pytest.raises(KeyError):
        _ = work.features["on"]


def test_labels_and_pools(app: qubesadmin.Qubes) -> None:
    assert set(app.labels) == {"red", "orange", "yellow", "green", "gray", "blue", "purple", "black"}
    assert (app.labels["red"].index, app.labels["red"].color) == (1, "0xcc0000")
    assert app.get_label(8).name == "black"
    with pytest.raises(exc.QubesLabelNotFoundError):
        app.get_label("pink")
    size = app.pools["vm-pool"].size
    assert size is not None and size > 1 << 30
    assert app.pools["vm-pool"].usage == 0
    assert app.pools["linux-kernel"].size is None
    with pytest.raises(KeyError):
        _ = app.pools["zfs"]


def test_notes_are_sanitised(app: qubesadmin.Qubes) -> None:
    app.domains["work"].set_notes("naïve\n\tnotes\x1b[0m\u202e")
    assert app.domains["work"].get_notes() == "naïve\n\tnotes_[0m_"


def test_an_import_that_is_refused_still_takes_the_stream(app: qubesadmin.Qubes) -> None:
    stream = BytesIO(b"x" * 1_000_000)
    app.domains["work"].start()
    with pytest.raises(exc.QubesVMNotHaltedError):
        app.domains["work"].volumes["private"].import_data_with_size(stream, 1_000_000)
    assert stream.closed


# --- Firewall and devices ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "elements",
    [
        {}, {"action": "perhaps"}, {"action": "drop", "proto": "sctp"}, {"action": "drop", "dstports": 1},
        {"action": "drop", "proto": "icmp", "dstports": 1}, {"action": "drop", "icmptype": 1},
        {"action": "drop", "proto": "icmp", "icmptype": 256}, {"action": "drop", "dsthost": "1.2.3.4/33"},
        {"action": "drop", "dsthost": "::1/129"}, {"action": "drop", "dsthost": "Example.org"},
        {"action": "drop", "dsthost": "a/b/c"}, {"action": "drop", "dsthost": "name/8"},
        {"action": "drop", "proto": "tcp", "dstports": "5-4"}, {"action": "drop", "specialtarget": "web"},
        {"action": "drop", "proto": "tcp", "dstports": "1-2-3"}, {"action": "drop", "colour": "red"},
        {"action": "drop", "proto": "tcp", "dstports": "-1"}, {"action": "drop", "expire": "soon"},
    ],
)  # fmt: skip
def test_a_rule_that_makes_no_sense_cannot_be_made(elements: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Rule(None, **elements)


def test_a_rule_is_written_as_the_original_writes_it() -> None:
    rule = Rule(
        None, comment="a b", dstports="80-443", proto="tcp", dsthost="::1", action=Action.accept, expire=5
    )
    assert rule.rule == "action=accept proto=tcp dst6=::1/128 dstports=80-443 expire=5 comment=a b"
    assert Rule(rule.rule) == rule
    assert Rule(None, action="accept", dsthost="0.0.0.0/0").rule == "action=accept"
    assert Rule(None, action="drop", specialtarget="dns").rule == "action=drop specialtarget=dns"
    assert (
        Rule("action=drop dsthost=example.org", action="accept").rule == "action=accept dsthost=example.org"
    )


def test_devices_are_assigned_and_listed(app: qubesadmin.Qubes) -> None:
    work, dom0 = app.domains["work"], app.domains["dom0"]
    disk = DeviceAssignment.new(
        dom0, "sda", "block", "a:b:?******", mode=AssignmentMode.AUTO, options={"read-only": "it's"}
    )
    work.devices["block"].assign(disk)
    work.devices["pci"].assign(DeviceAssignment.new(dom0, "00_14.0", "pci", mode="required"))
    found = [a for devclass in work.devices for a in work.devices[devclass].get_assigned_devices()]
    assert [(a.devclass, a.port_id, a.device_id, a.mode.value, a.options) for a in found] == [
        ("block", "sda", "a:b:?******", "auto-attach", {"read-only": "it's"}),
        ("pci", "00_14.0", "*", "required", {}),
    ]
    with pytest.raises(exc.DeviceAlreadyAssigned):
        work.devices["block"].assign(disk)
    for assignment in found:
        work.devices[assignment.devclass].unassign(assignment)
    with pytest.raises(exc.DeviceNotAssigned):
        work.devices["block"].unassign(disk)


def test_devices_that_cannot_be_assigned_that_way_are_refused(app: qubesadmin.Qubes) -> None:
    work, dom0 = app.domains["work"], app.domains["dom0"]
    for devclass, mode in (("pci", "auto-attach"), ("usb", "required"), ("video", "auto-attach")):
        with pytest.raises(exc.QubesValueError):
            work.devices[devclass].assign(DeviceAssignment.new(dom0, "1", devclass, mode=mode))
    with pytest.raises(exc.QubesValueError, match="other domain"):
        work.devices["usb"].assign(
            DeviceAssignment.new(dom0, "1", "usb", frontend_domain=dom0, mode="auto-attach")
        )
    with pytest.raises(exc.QubesDaemonAccessError):
        work.devices["usb"].assign(DeviceAssignment.new(dom0, "1", "usb"))
    nobody = app.domains.get_blind("nobody")
    with pytest.raises(exc.QubesDaemonAccessError):
        work.devices["usb"].assign(DeviceAssignment.new(nobody, "1", "usb", mode="auto-attach"))
    with pytest.raises(ProtocolError):
        DeviceAssignment.new(dom0, "1", "usb", options={"a": "ü"}).serialize()


# --- Calls of services ---------------------------------------------------------------------------


@pytest.fixture
def client(qubesd: Qubesd) -> None:
    """A `qrexec-client` that shows how it was called, and then its input."""
    program = qubesd.directory / "qrexec-client"
    program.write_text('#!/bin/sh\nfor word; do echo "[$word]"; done\ncat\nexit 3\n')
    program.chmod(0o755)


@pytest.mark.usefixtures("client")
def test_a_call_starts_the_qube_and_the_client_with_pipes(app: qubesadmin.Qubes) -> None:
    work = app.domains["work"]
    process = work.run_service("qubes.Some", user="root", connect_timeout=9, prefix_data=b"first")
    output, errors = process.communicate(b"input")
    words = ["-d", "work", "-p", "first", "-w", "9", "root:QUBESRPC qubes.Some+ dom0"]
    assert output.decode() == "".join(f"[{word}]\n" for word in words) + "input"
    assert errors == b""
    assert process.returncode == 3
    assert work.is_running()


@pytest.mark.usefixtures("client")
def test_a_call_can_be_given_one_socket_for_both_directions(app: qubesadmin.Qubes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = app.domains["work"].run_service(
            "a.B+c", stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL
        )
        theirs.close()
        ours.sendall(b"through")
        ours.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: ours.recv(4096), b""))
    assert received.endswith(b"[DEFAULT:QUBESRPC a.B+c dom0]\nthrough")
    assert process.wait() == 3
    assert (process.stdin, process.stdout, process.stderr) == (None, None, None)


@pytest.mark.usefixtures("client")
def test_a_call_that_may_not_start_the_qube_is_refused_when_it_is_halted(app: qubesadmin.Qubes) -> None:
    with pytest.raises(exc.QubesVMNotRunningError):
        app.domains["work"].run_service("a.B", autostart=False)
    assert app.domains["work"].is_halted()


@pytest.mark.usefixtures("client")
def test_a_failed_start_is_the_answer_to_a_call(qubesd: Qubesd, app: qubesadmin.Qubes) -> None:
    qubesd.fail("admin.vm.Start+", "QubesMemoryError", "no memory")
    with pytest.raises(exc.QubesMemoryError):
        app.domains["work"].run_service("a.B")


@pytest.mark.usefixtures("client")
def test_a_call_for_its_output_raises_if_it_fails(app: qubesadmin.Qubes) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        app.domains["work"].run_service_for_stdio("a.B", input=b"x")
    assert caught.value.returncode == 3
    assert caught.value.output.endswith(b"x")


def test_the_stand_in_is_what_these_tests_import() -> None:
    assert Path(qubesadmin.__file__).is_relative_to(Path(__file__).parent / "standin")
    assert os.environ.get(qubesadmin.config.VARIABLE) is None
