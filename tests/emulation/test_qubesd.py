"""The stand-in for qubesd refuses what the original refuses, and lets a test see and break what it does."""

import threading
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import qubesadmin
from qubesadmin import exc
from qubesadmin.device_protocol import DeviceAssignment
from qubesadmin.firewall import Rule

from tests.emulation.daemon.lifecycle import Machines
from tests.emulation.daemon.state import NEW_TAGS
from tests.emulation.qubesd import Qubesd
from tests.emulation.small_system import small_system

Action = Callable[[qubesadmin.Qubes], object]


def create(klass: str, name: str = "new", label: str = "red", **options: str) -> Action:
    def action(app: qubesadmin.Qubes) -> object:
        return app.add_new_vm(klass, name, label, template=options.get("template"), pool=options.get("pool"))

    return action


def put(vm: str, name: str, value: object) -> Action:
    return lambda app: setattr(app.domains[vm], name, value)


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "expected", "words"),
    [
        (create("AppVM", "work", template="fedora"), exc.QubesValueError, "already exists"),
        (create("AppVM", "1st", template="fedora"), exc.QubesValueError, "cannot start with"),
        (create("AppVM", "a/b", template="fedora"), exc.QubesValueError, "illegal"),
        (create("AppVM", "x" * 32, template="fedora"), exc.QubesValueError, "shorter than 32"),
        (create("AppVM", "default", template="fedora"), exc.QubesValueError, "'none' nor 'default'"),
        (create("AppVM", "hvm-dm", template="fedora"), exc.QubesValueError, "-dm"),
        (create("AppVM", "Domain-0", template="fedora"), exc.QubesValueError, "Domain-0"),
        (create("AppVM", label="pink", template="fedora"), exc.QubesLabelNotFoundError, "Label"),
        (create("AppVM", template="ubuntu"), exc.QubesVMNotFoundError, "ubuntu"),
        (create("AppVM", template="work"), exc.QubesPropertyValueError, "not TemplateVM"),
        (create("AppVM"), exc.QubesDaemonAccessError, "empty response"),
        (create("AppVM", template="fedora", pool="zfs"), exc.QubesException, "Unknown storage pool"),
        (create("AppVM", template="fedora", pool="linux-kernel"), exc.QubesDaemonAccessError, ""),
        (create("TemplateVM", template="fedora"), exc.QubesValueError, "cannot be based"),
        (create("DispVM", template="work"), exc.QubesValueError, "template_for_dispvms"),
        (create("DispVM"), exc.QubesValueError, "not specified"),
        (create("FunnyVM"), exc.QubesDaemonAccessError, "empty response"),
        (put("work", "colour", "red"), exc.QubesNoSuchPropertyError, "colour"),
        (put("work", "memory", "much"), exc.QubesValueError, "int"),
        (put("work", "memory", 0), exc.QubesPropertyValueError, "memory must be positive"),
        (put("work", "maxmem", -1), exc.QubesPropertyValueError, "positive or zero"),
        (put("work", "autostart", "perhaps"), exc.QubesValueError, "boolean"),
        (put("work", "label", "pink"), exc.QubesLabelNotFoundError, "pink"),
        (put("work", "kernel", "9.9"), exc.QubesPropertyValueError, "not installed"),
        (put("work", "virt_mode", "vm"), exc.QubesPropertyValueError, "hvm, pv, pvh"),
        (put("work", "mac", "00:zz"), exc.QubesPropertyAccessError, "mac"),
        (put("work", "default_user", "a:b"), exc.QubesPropertyValueError, "Username"),
        (put("work", "kernelopts", "x" * 513), exc.QubesPropertyValueError, "too long"),
        (put("work", "keyboard_layout", "de"), exc.QubesPropertyValueError, "layout"),
        (put("work", "ip", "10.0.0.300"), exc.QubesValueError, "IPv4Address"),
        (put("work", "debug", "é"), exc.QubesValueError, "Non-ASCII"),
        (put("work", "updateable", True), exc.QubesPropertyValueError, "cannot be set"),
        (put("work", "qid", 7), exc.QubesPropertyAccessError, "qid"),
        (put("work", "template", None), exc.QubesPropertyValueError, "None"),
        (put("work", "template", "net"), exc.QubesPropertyValueError, "not TemplateVM"),
        (put("work", "netvm", "nowhere"), exc.QubesPropertyValueError, "non-existing"),
        (put("work", "netvm", "fedora"), exc.QubesValueError, "does not provide network"),
        (put("net", "netvm", "net"), exc.QubesValueError, "Loops"),
        (lambda app: delattr(app.domains["work"], "template"), exc.QubesValueError, "unset template"),
        (lambda app: setattr(app, "default_template", "work"), exc.QubesPropertyValueError, "TemplateVM"),
        (lambda app: setattr(app, "default_pool", "zfs"), exc.QubesPropertyValueError, "pool"),
        (lambda app: app.domains.__delitem__("fedora"), exc.QubesVMInUseError, "see 'journalctl"),
        (lambda app: app.domains.__delitem__("dom0"), exc.QubesVMInUseError, "dom0"),
        (lambda app: app.domains.__delitem__("nobody"), exc.QubesVMNotFoundError, "nobody"),
        (lambda app: app.domains["work"].tags.add("a.b"), exc.QubesDaemonAccessError, ""),
        (lambda app: app.domains["work"].tags.remove("away"), exc.QubesTagNotFoundError, "away"),
        (lambda app: app.domains["work"].tags.add("created-by-x"), exc.QubesDaemonAccessError, ""),
        (lambda app: app.domains["work"].features["no"], exc.QubesFeatureNotFoundError, "no"),
        (lambda app: app.domains["work"].features.__setitem__("a/b", "1"), exc.QubesValueError, "illegal"),
        (lambda app: app.domains["work"].features.__setitem__("a", "ü"), exc.QubesDaemonAccessError, ""),
        (lambda app: app.domains["work"].features.__setitem__("a", "\n"), exc.QubesValueError, "illegal"),
        (lambda app: app.domains["work"].features.__setitem__("service.", "1"), exc.QubesValueError, ""),
        (lambda app: app.domains["work"].features.__setitem__("preload-dispvm", "1"),
         exc.QubesDaemonAccessError, ""),
        (lambda app: app.domains["work"].kill(), exc.QubesVMNotStartedError, "powered off"),
        (lambda app: app.domains["work"].shutdown(), exc.QubesVMNotStartedError, "powered off"),
        (lambda app: app.domains["dom0"].kill(), exc.QubesVMError, "Dom0"),
        (lambda app: app.domains["work"].volumes["private"].resize(1), exc.StoragePoolException, "shrink"),
        (lambda app: app.domains["work"].volumes["kernel"].resize(1), exc.StoragePoolException, "read-only"),
        (lambda app: app.domains["work"].volumes["root"].clear_data(), exc.QubesDaemonAccessError, ""),
    ],
)  # fmt: skip
def test_it_refuses_as_the_original_does(
    app: qubesadmin.Qubes, action: Action, expected: type[Exception], words: str
) -> None:
    with pytest.raises(expected) as caught:
        action(app)
    assert caught.type is expected
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "action=maybe", "proto=tcp", "action=accept proto=tcp dstports=1-65536", "action=accept dstports=1",
        "action=accept proto=tcp icmptype=1", "action=accept icmptype=8", "action=accept dsthost=A.org",
        "action=accept dst4=1.2.3.4/33", "action=accept comment=$",
        "action=accept colour=red", "action=accept action=drop", "action=accept dst4=1.1.1.1 dsthost=a.org",
        "action=accept expire=soon", "", "action=accept specialtarget=www",
    ],
)  # fmt: skip
def test_a_firewall_rule_that_is_no_good_is_refused_and_the_rules_stay(
    app: qubesadmin.Qubes, line: str
) -> None:
    work = app.domains["work"]
    with pytest.raises(exc.QubesDaemonAccessError):
        work.qubesd_call(None, "admin.vm.firewall.Set", payload=f"action=accept\n{line}\n".encode())
    assert [rule.rule for rule in work.firewall.rules] == ["action=accept"]


def test_firewall_rules_are_kept_in_one_form_and_expired_ones_dropped(app: qubesadmin.Qubes) -> None:
    work = app.domains["work"]
    work.firewall.rules = [
        Rule(None, action="accept", proto="tcp", dsthost="10.0.0.1", dstports=80, comment="the web"),
        Rule(None, action="accept", proto="icmp", icmptype=8, expire=4102444800),
        Rule(None, action="drop", expire=1),
    ]
    work.firewall.load_rules()
    answer = work.qubesd_call(None, "admin.vm.firewall.Get").decode().splitlines()
    assert answer == [
        "action=accept dst4=10.0.0.1/32 proto=tcp dstports=80-80 comment=the web",
        "action=accept expire=4102444800 proto=icmp icmptype=8",
    ]
    assert len(work.firewall.rules) == 2


# --- Lives of qubes ------------------------------------------------------------------------------


def test_a_qube_under_restore_cannot_start(app: qubesadmin.Qubes) -> None:
    app.domains["work"].tags.add("backup-restore-in-progress")
    with pytest.raises(exc.QubesVMError, match="Restore of this domain in progress"):
        app.domains["work"].start()
    assert not app.domains["work"].is_running()


def test_a_running_qube_takes_no_removal_no_import_and_no_other_template(
    app: qubesadmin.Qubes,
) -> None:
    work = app.domains["work"]
    work.start()
    work.start()
    with pytest.raises(exc.QubesVMNotHaltedError):
        del app.domains["work"]
    with pytest.raises(exc.QubesVMNotHaltedError):
        work.volumes["private"].import_data_with_size(BytesIO(b"x"), 1)
    with pytest.raises(exc.QubesVMNotHaltedError):
        work.template = "fedora"
    with pytest.raises(exc.QubesVMNotHaltedError):
        work.maxmem = 1000
    work.kill()
    del app.domains["work"]
    assert "work" not in app.domains


def test_starting_a_qube_starts_its_netvm_first(tmp_path: Path) -> None:
    events: list[str] = []
    machines = Machines(
        lambda name: events.append(f"start {name}"),
        lambda name: events.append(f"stop {name}"),
        lambda name: events.append(f"removed {name}"),
    )
    with small_system(tmp_path, machines) as qubesd:
        work = qubesadmin.Qubes().domains["work"]
        work.netvm = "net"
        work.start()
        assert events == ["start net", "start work"]
        with pytest.raises(exc.QubesVMInUseError, match="work"):
            qubesadmin.Qubes().domains["net"].shutdown()
        work.shutdown(wait=True)
        del qubesadmin.Qubes().domains["work"]
        assert events[2:] == ["stop work", "removed work"]
        assert qubesd.is_running("net")


def test_a_disposable_begins_as_its_template_is(app: qubesadmin.Qubes) -> None:
    dvm = app.domains["dvm"]
    dvm.netvm = "net"
    dvm.memory = 777
    dvm.tags.add("whose")
    dvm.features["service.x"] = True
    dvm.firewall.rules = [Rule(None, action="drop")]
    disposable = app.add_new_vm("DispVM", "disp1", "red", template=dvm)
    assert (disposable.netvm, disposable.memory, disposable.template) == ("net", 777, "dvm")
    assert set(disposable.tags) == {"whose", *NEW_TAGS}
    assert disposable.features["service.x"] == "1"
    assert [rule.rule for rule in disposable.firewall.rules] == ["action=drop"]
    assert not any(volume.save_on_stop for volume in disposable.volumes.values())
    assert disposable.default_dispvm == "dvm"


def test_a_disposable_with_auto_cleanup_is_gone_when_it_was_killed(app: qubesadmin.Qubes) -> None:
    kept = app.add_new_vm("DispVM", "kept", "red", template="dvm")
    gone = app.add_new_vm("DispVM", "gone", "red", template="dvm")
    gone.auto_cleanup = True
    for disposable in (kept, gone):
        disposable.start()
        disposable.kill()
    app.domains.clear_cache()
    assert "kept" in app.domains
    assert "gone" not in app.domains
    assert gone.get_power_state() == "NA"


def test_a_disposable_that_could_not_start_is_gone(qubesd: Qubesd, app: qubesadmin.Qubes) -> None:
    disposable = app.add_new_vm("DispVM", "disp1", "red", template="dvm")
    qubesd.fail("admin.vm.Start+", "QubesMemoryError", "Not enough memory to start domain 'disp1'")
    with pytest.raises(exc.QubesMemoryError, match="disp1"):
        disposable.start()
    app.domains.clear_cache()
    assert "disp1" not in app.domains
    with pytest.raises(exc.QubesVMNotFoundError):
        del app.domains["disp1"]


def test_memory_runs_out_and_comes_back(qubesd: Qubesd, app: qubesadmin.Qubes) -> None:
    qubesd.system.free_memory = 700
    app.domains["work"].memory = 500
    app.domains["work"].start()
    with pytest.raises(exc.QubesMemoryError):
        app.domains["net"].start()
    app.domains["work"].kill()
    app.domains["net"].start()


def test_a_qube_whose_machine_cannot_start_is_halted_afterwards(tmp_path: Path) -> None:
    stopped: list[str] = []

    def fail(name: str) -> None:
        raise OSError(f"no {name}")

    with pytest.raises(OSError, match="no work"), small_system(tmp_path, Machines(fail, stopped.append)):
        with pytest.raises(exc.QubesDaemonAccessError):
            qubesadmin.Qubes().domains["work"].start()
        assert qubesadmin.Qubes().domains["work"].is_halted()
    assert stopped == ["work"]


def test_no_lock_is_held_while_a_machine_starts(tmp_path: Path) -> None:
    seen: list[frozenset[str]] = []

    def ask(name: str) -> None:
        asking = threading.Thread(target=lambda: seen.append(system.tags(name)))
        asking.start()
        asking.join(10)

    with small_system(tmp_path, Machines(ask, ask)) as system:
        work = qubesadmin.Qubes().domains["work"]
        work.start()
        work.kill()
    assert seen == [NEW_TAGS] * 2


def test_what_is_needed_cannot_be_taken_away(app: qubesadmin.Qubes) -> None:
    app.default_dispvm = "dvm"
    app.domains["net"].netvm = None
    app.default_netvm = "net"
    for name in ("dvm", "net"):
        with pytest.raises(exc.QubesVMInUseError):
            del app.domains[name]
    app.add_new_vm("DispVM", "disp", "red", template="dvm")
    with pytest.raises(exc.QubesVMInUseError):
        app.domains["dvm"].template_for_dispvms = False
    with pytest.raises(exc.QubesValueError, match="still used"):
        app.domains["net"].provides_network = False


def test_a_qube_whose_device_is_needed_cannot_be_removed(app: qubesadmin.Qubes) -> None:
    assignment = DeviceAssignment.new(app.domains["net"], "sda", "block", mode="auto-attach")
    app.domains["work"].devices["block"].assign(assignment)
    with pytest.raises(exc.QubesVMInUseError, match="devices"):
        del app.domains["net"]
    app.domains["work"].devices["block"].unassign(assignment)
    del app.domains["net"]


def test_a_required_device_that_is_not_there_keeps_a_qube_from_starting(app: qubesadmin.Qubes) -> None:
    work = app.domains["work"]
    work.devices["pci"].assign(DeviceAssignment.new(app.domains["dom0"], "00_14.0", "pci", mode="required"))
    with pytest.raises(exc.QubesException, match="not available"):
        work.start()
    assert (work.virt_mode, work.maxmem) == ("hvm", 0)
    with pytest.raises(exc.QubesPropertyValueError):
        work.virt_mode = "pvh"


def test_a_default_follows_the_system(app: qubesadmin.Qubes) -> None:
    work = app.domains["work"]
    assert work.netvm is None
    app.domains["net"].netvm = None
    app.default_netvm = "net"
    assert work.netvm == "net"
    assert work.property_is_default("netvm")
    work.netvm = None
    assert work.netvm is None
    assert not work.property_is_default("netvm")
    app.domains["fedora"].memory = 1234
    assert work.memory == 1234


# --- For tests -----------------------------------------------------------------------------------


def test_calls_are_recorded_whatever_comes_of_them(qubesd: Qubesd, app: qubesadmin.Qubes) -> None:
    with pytest.raises(exc.QubesNoSuchPropertyError):
        app.domains["work"].colour = "red"
    app.domains["work"].tags.add("x")
    assert [str(call) for call in qubesd.calls_of("admin.vm.*", "work")] == [
        "admin.vm.property.Set+colour work b'red'",
        "admin.vm.tag.Set+x work b''",
    ]


def test_a_fault_strikes_when_and_as_often_as_it_should(qubesd: Qubesd, app: qubesadmin.Qubes) -> None:
    qubesd.fail("admin.vm.property.Set+mem*", "QubesVMError", "no", dest="work", after=1, times=2)
    outcomes = []
    for _ in range(4):
        try:
            app.domains["work"].memory = 500
            outcomes.append("")
        except exc.QubesVMError as error:
            outcomes.append(str(error))
    assert outcomes == ["", "no", "no", ""]
    qubesd.fail("*Get*", "", times=None)
    for _ in range(3):
        with pytest.raises(exc.QubesPropertyAccessError):
            _ = app.domains["work"].memory
    qubesd.mend()
    assert app.domains["work"].memory == 500


def test_a_mistake_of_the_stand_in_is_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="gone"), small_system(tmp_path) as qubesd:
        app = qubesadmin.Qubes()
        qubesd.system.domains["work"].properties["template"] = "gone"
        with pytest.raises(exc.QubesPropertyAccessError):
            _ = app.domains["work"].memory


def test_many_clients_at_once(qubesd: Qubesd) -> None:
    def work(number: int) -> None:
        app = qubesadmin.Qubes()
        for step in range(20):
            app.domains["work"].tags.add(f"t-{number}-{step}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(qubesd.tags("work")) == 100 + len(NEW_TAGS)
