"""One qube on its way into a Qubes system: complete in the end, or gone without a trace."""

import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pytest
import qubesadmin
import qubesadmin.exc
from pydantic import ValidationError

from qubes_restore_svc.broker.allowlist import AllowedSettings, SettingsPolicy
from qubes_restore_svc.broker.interfaces import Definition, QubeTransaction, restored_tag
from qubes_restore_svc.broker.settings_table import Kind
from qubes_restore_svc.errors import HostFailed, NoSpace, QubeExists
from qubes_restore_svc.qubes import qube as qubes_qube
from qubes_restore_svc.qubes.host import QubesHost
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.qubes.tags import IN_PROGRESS_TAG, UNFINISHED_TAG
from qubes_restore_svc.wire.messages import DeviceInfo, FirewallRule, ManifestQube, QubeSettings
from tests.emulation.daemon.state import NEW_TAGS
from tests.emulation.qubesd import Qubesd
from tests.qubes.qubes_bed import (
    DISPOSABLES,
    EXTENTS,
    IMAGE_SIZE,
    NETVM,
    TEMPLATE,
    definition,
    image,
    new_host,
    new_qube,
    settings,
    state_of,
)

TAGS = {IN_PROGRESS_TAG, UNFINISHED_TAG}


def write_volume(qube: QubeTransaction) -> None:
    sink = qube.create_volume("private", IMAGE_SIZE)
    for offset, data in EXTENTS:
        sink.write(offset, memoryview(data))
    sink.finish(IMAGE_SIZE)


def restore(
    host: QubesHost, wanted: Definition | None = None, given: QubeSettings | None = None
) -> tuple[str, ...]:
    """A whole qube, as a broker does it; brings the remarks."""
    wanted = wanted or definition()
    qube = host.begin(new_qube(wanted=wanted))
    try:
        write_volume(qube)
        return tuple(qube.commit(given or settings(), wanted))
    except HostFailed:
        qube.rollback()
        raise


# --- A whole qube --------------------------------------------------------------------------------


def test_a_restored_qube_is_an_ordinary_one_with_the_volume_of_its_backup(
    host: QubesHost, qubesd: Qubesd
) -> None:
    with host.lock():
        assert restore(host) == ()
    made = qubesd.system.domains["work"]
    assert (made.klass, made.properties["label"], made.properties["template"]) == ("AppVM", "blue", TEMPLATE)
    assert made.tags == {*NEW_TAGS, "restored-from-backup-20260101T010203-1234"}
    assert "netvm" not in made.properties  # the system's default
    assert made.firewall == ["action=accept"]
    assert qubesd.volume_path("work", "private").read_bytes() == image()
    qubesd.start("work")


def test_until_it_is_complete_a_qube_cannot_start_and_has_no_network(host: QubesHost, qubesd: Qubesd) -> None:
    with host.lock():
        qube = host.begin(new_qube())
        made = qubesd.system.domains["work"]
        assert made.tags >= TAGS
        assert made.properties["netvm"] is None
        with pytest.raises(qubesadmin.exc.QubesVMError, match="in progress"):
            qubesadmin.Qubes().domains["work"].start()
        write_volume(qube)
        assert made.tags >= TAGS
        qube.commit(settings(), definition())
        assert not made.tags & TAGS


def test_tags_come_before_anything_else_and_go_after_everything_else(host: QubesHost, qubesd: Qubesd) -> None:
    with host.lock():
        restore(host, wanted=definition(netvm=NETVM, features={"a": "1"}))
    changes = [
        call.name
        for call in qubesd.calls_of("admin.vm.*", "work")
        if ".Set" in call.name or "Rem" in call.name
    ]
    assert changes[:2] == [f"admin.vm.tag.Set+{tag}" for tag in (IN_PROGRESS_TAG, UNFINISHED_TAG)]
    assert changes[-2:] == [f"admin.vm.tag.Remove+{tag}" for tag in (IN_PROGRESS_TAG, UNFINISHED_TAG)]


def test_settings_are_applied(host: QubesHost, qubesd: Qubesd) -> None:
    wanted = definition(
        netvm=NETVM,
        default_dispvm="",
        properties={"memory": "600", "vcpus": "4", "autostart": "False"},
        features={"service.cups": "", "gui": "1"},
        tags=("audio",),
        devices=(DeviceInfo(bus="block", backend="dom0", port="sdb"),),
    )
    given = settings(
        firewall=(
            FirewallRule(action="accept", proto="tcp", dsthost="example.org", dstports="443"),
            FirewallRule(action="drop", comment="the rest"),
        ),
        notes="naïve\nnotes",
        appmenus=("firefox.desktop", "with space.desktop", "org.gnome.Nautilus.desktop"),
    )
    with host.lock():
        remarks = restore(host, wanted, given)
    made = qubesd.system.domains["work"]
    assert remarks == ("1 menu entries have names that no menu can hold",)
    assert (made.properties["memory"], made.properties["vcpus"], made.properties["netvm"]) == (600, 4, NETVM)
    assert made.properties["default_dispvm"] is None
    assert made.features["service.cups"] == "" and made.features["gui"] == "1"
    assert made.features["menu-items"] == "firefox.desktop org.gnome.Nautilus.desktop"
    assert "audio" in made.tags
    assert made.notes == "naïve\nnotes"
    assert [key[:3] for key in made.devices] == [("block", "dom0", "sdb")]
    assert len(made.firewall) == 2
    assert "example.org" in made.firewall[0] and made.firewall[1].endswith("comment=the rest")


#: Kind, name and value of settings around the limits of qubesd and its extensions.
BORDERS: tuple[tuple[Kind, str, str], ...] = (
    ("tag", "Mine_1-x", ""),
    ("tag", "t" * 255, ""),
    ("tag", "a.b", ""),
    ("tag", "m\xfc", ""),
    ("tag", "a b", ""),
    ("feature", "A.b_c-9", "all of it: ~!@#$%^&*()[]{}<>|\\\"'`"),
    ("feature", "f" * 255, "1"),
    ("feature", "long", "v" * 65_000),
    ("feature", "empty", ""),
    ("feature", "blank", " v "),
    *(("feature", f"a{char}b", "1") for char in "+:@ /\xe4"),
    *(("feature", f"x-{ord(char)}", f"a{char}b") for char in "\t\n\x7f\xe4"),
    *(("feature", f"service.{name}", "1") for name in ("s" * 48, "s" * 49, ".", "..", "...", "-s")),
    ("feature", "service.app-dispvm." + "a" * 100, "1"),
    *(("feature", f"vm-config.{name}", "v") for name in ("c" * 52, "c" * 53, "1c", "-c", "C.c")),
    *(("feature", f"custom-persist.{name}", "/p") for name in ("p" * 54, "p" * 55, ".")),
    *(
        ("feature", f"custom-persist.m{mode}", f"dir:a:b:{mode}:/p")
        for mode in ("0", "7777", "07777", "10000", "17777", "8")
    ),
    *(
        ("feature", f"custom-persist.{name}", value)
        for name, value in {
            "good": "file:a:b:644:/p", "link": "link:a:b:644:/p", "bare": "p", "relative": "file:a:b:644:p"
        }.items()
    ),
)  # fmt: skip


def is_taken(kind: Kind, name: str, value: str) -> bool:
    """Does qubesd take this setting of the qube `asked`?"""
    asked = qubesadmin.Qubes().domains["asked"]
    try:
        if kind == "tag":
            asked.tags.add(name)
        else:
            asked.features[name] = value
    except (qubesadmin.exc.QubesException, UnicodeEncodeError):
        return False
    return True


def chosen(kind: Kind, name: str, value: str) -> AllowedSettings:
    """What the worker and the allow-list let through of it."""
    setting: dict[str, object] = {"tags": [name]} if kind == "tag" else {"features": {name: value}}
    source = {"key": "vm1", "name": "work", "klass": "AppVM", "label": "red", **setting}
    try:
        qube = ManifestQube.model_validate_json(json.dumps(source))
    except ValidationError:
        return AllowedSettings()
    return SettingsPolicy(features=["*"], tags=["*"]).let_through(qube)


def test_settings_that_qubesd_takes_come_back_and_those_it_refuses_harm_no_qube(
    host: QubesHost, qubesd: Qubesd
) -> None:
    qubesadmin.Qubes().add_new_vm("AppVM", "asked", "red")
    taken = {setting for setting in BORDERS if is_taken(*setting)}
    features, tags = dict[str, str](), list[str]()
    for setting in BORDERS:
        allowed = chosen(*setting)
        features.update(allowed.features)
        tags.extend(allowed.tags)
    with host.lock():
        assert restore(host, wanted=definition(features=features, tags=tuple(tags))) == ()
    made = qubesd.system.domains["work"]
    come = {
        (kind, name, value)
        for kind, name, value in BORDERS
        if (name in made.tags if kind == "tag" else made.features.get(name) == value)
    }
    assert come == taken
    assert 15 < len(taken) < len(BORDERS) - 15


def test_a_netvm_that_is_none_stays_none(host: QubesHost, qubesd: Qubesd) -> None:
    with host.lock():
        restore(host, wanted=definition(netvm=""))
    assert qubesd.system.domains["work"].properties["netvm"] is None


def test_volumes_go_to_the_pool_that_was_named(tmp_path: Path, system: QubesSystem, qubesd: Qubesd) -> None:
    host = new_host(tmp_path, system, pool="lvm")
    with host.lock():
        restore(host)
    assert qubesd.system.domains["work"].volumes["private"].pool == "lvm"


def test_what_others_depend_on_is_there_early(host: QubesHost, qubesd: Qubesd) -> None:
    wanted = definition(properties={"template_for_dispvms": "True", "provides_network": "True"})
    with host.lock():
        base = host.begin(new_qube("base", wanted=wanted))
        on_it = definition(template="base")
        host.begin(new_qube("disp", klass="DispVM", wanted=on_it))
        other = host.begin(new_qube("other"))
        qubesadmin.Qubes().domains["other"].netvm = "base"
        qubesadmin.Qubes().domains["other"].netvm = None
        other.rollback()
        base.rollback()


@pytest.mark.parametrize("backup_id", ["2026-01-01", "a/b c\n", "x" * 200])
def test_the_tag_of_the_backup_is_always_a_tag(backup_id: str, system: QubesSystem) -> None:
    tag = restored_tag(backup_id)
    system.add_tag(NETVM, tag)
    assert tag.startswith("restored-from-backup-") and len(tag) <= 128
    assert tag in system.tags()[NETVM]


# --- What cannot be set --------------------------------------------------------------------------


def test_each_setting_that_cannot_be_set_is_a_remark_and_no_failure(host: QubesHost, qubesd: Qubesd) -> None:
    wanted = definition(
        default_dispvm="gone",
        properties={"kernel": "1.2.3", "no_such": "1", "memory": "500"},
        features={"bad+name": "1"},
        tags=("created-by-me",),
        devices=(DeviceInfo(bus="usb", backend="gone", port="2-1"),),
    )
    qubesd.fail("admin.vm.notes.Set+", "QubesNotesError", "no room for notes")
    qubesd.fail("admin.vm.feature.Set+menu-items")
    qubesd.fail("admin.vm.tag.Set+created-by-me", "", times=None)
    qubesd.fail("admin.vm.tag.Set+restored-from*", times=None)
    with host.lock():
        remarks = restore(host, wanted, settings(notes="x", appmenus=("a.desktop",)))
    told = "\n".join(remarks)
    for what in ("kernel", "no_such", "bad+name", "tag created-by-me", "notes failed: no room", "menu-items",
                 "no such qube", "default_dispvm", "restored-from-backup"):  # fmt: skip
        assert what in told
    assert len(remarks) == 9
    made = qubesd.system.domains["work"]
    assert made.properties["memory"] == 500
    assert made.properties["default_dispvm"] is None  # not the system's default
    assert not made.tags & TAGS


def test_remarks_stay_readable_however_much_fails(host: QubesHost) -> None:
    wanted = definition(features={f"bad+{number}": "1" for number in range(500)}, netvm="gone")
    with host.lock():
        remarks = restore(host, wanted=wanted)
    assert len(remarks) <= 41
    assert any("more settings failed" in remark for remark in remarks)
    assert remarks[-1] == "it has no netvm"


BAD_RULES = [
    FirewallRule(action="accept", proto="tcp", dstports="70000"),
    FirewallRule(action="accept", proto="tcp", dstports="2-1"),
    FirewallRule(action="accept", dstports="80"),
    FirewallRule(action="accept", proto="icmp", icmptype="256"),
    FirewallRule(action="accept", icmptype="1"),
    FirewallRule(action="accept", dst4="1.2.3.4", dsthost="example.org"),
    FirewallRule(action="accept", dst4="1.2.3.4", dst6="::1"),
    FirewallRule(action="accept", dst4="999.2.3.4/32"),
    FirewallRule(action="accept", dst6="::1/129"),
    FirewallRule(action="accept", dsthost="EXAMPLE.org"),
]


@pytest.mark.parametrize("rule", BAD_RULES)
def test_a_rule_that_qubesd_refuses_closes_the_whole_firewall(
    host: QubesHost, qubesd: Qubesd, rule: FirewallRule
) -> None:
    rules = (FirewallRule(action="accept", dsthost="example.org"), rule, FirewallRule(action="accept"))
    with host.lock():
        [remark] = restore(host, definition(netvm=NETVM), settings(firewall=rules))
    assert "its firewall lets nothing through" in remark and "qvm-firewall" in remark
    made = qubesd.system.domains["work"]
    assert made.firewall == ["action=drop"]
    assert made.properties["netvm"] == NETVM


def test_more_rules_than_qubesd_takes_close_the_firewall(host: QubesHost, qubesd: Qubesd) -> None:
    rules = tuple(FirewallRule(action="accept", comment="x" * 200) for _ in range(400))
    with host.lock():
        assert "lets nothing through" in restore(host, given=settings(firewall=rules))[0]
    assert qubesd.system.domains["work"].firewall == ["action=drop"]


def test_a_firewall_without_rules_lets_nothing_through(host: QubesHost, qubesd: Qubesd) -> None:
    with host.lock():
        assert restore(host, given=settings(firewall=())) == ()
    assert qubesd.system.domains["work"].firewall == ["action=drop"]


def test_a_rule_for_all_of_ipv4_does_not_become_one_for_ipv6(host: QubesHost, qubesd: Qubesd) -> None:
    with host.lock():
        restore(host, given=settings(firewall=(FirewallRule(action="accept", dst4="0.0.0.0/0"),)))
    [rule] = qubesd.system.domains["work"].firewall
    assert "0.0.0.0/0" in rule


def test_without_a_firewall_there_is_no_network(host: QubesHost, qubesd: Qubesd) -> None:
    qubesd.fail("admin.vm.firewall.Set+", times=None)
    given = settings(firewall=(FirewallRule(action="drop"),))
    with host.lock():
        remarks = restore(host, definition(netvm=NETVM), given)
    assert remarks[-1] == "it has no netvm, because its firewall could not be set"
    assert qubesd.system.domains["work"].properties["netvm"] is None


@pytest.mark.parametrize("netvm", [None, "gone", "fedora-42"])
def test_a_netvm_that_cannot_be_set_leaves_the_qube_without(
    host: QubesHost, qubesd: Qubesd, netvm: str | None
) -> None:
    qubesd.fail("admin.vm.property.Reset+netvm", dest="work")
    with host.lock():
        remarks = restore(host, wanted=definition(netvm=netvm))
    assert "netvm failed" in remarks[0] and remarks[-1] == "it has no netvm"
    assert qubesd.system.domains["work"].properties["netvm"] is None


# --- Refusals ------------------------------------------------------------------------------------


def test_a_volume_that_the_qube_does_not_keep_is_refused(host: QubesHost) -> None:
    with host.lock():
        qube = host.begin(new_qube())
        for volume in ("root", "home"):
            with pytest.raises(HostFailed, match="class AppVM keeps none here") as caught:
                qube.create_volume(volume, 10)
            assert (caught.value.qube, caught.value.volume) == ("work", volume)
        qube.create_volume("private", 10)
        with pytest.raises(HostFailed, match="written already"):
            qube.create_volume("private", 10)


@pytest.mark.parametrize("klass", ["TemplateVM", "StandaloneVM"])
def test_a_qube_with_a_root_of_its_own_gets_both_volumes(host: QubesHost, qubesd: Qubesd, klass: str) -> None:
    wanted = definition(template=None)
    with host.lock():
        qube = host.begin(new_qube(klass=klass, wanted=wanted))
        for volume in ("root", "private"):
            sink = qube.create_volume(volume, 100)
            sink.write(0, memoryview(volume.encode()))
            sink.finish(100)
        assert qube.commit(settings(), wanted) == ()
    for volume in ("root", "private"):
        assert qubesd.volume_path("work", volume).read_bytes() == volume.encode().ljust(100, b"\0")


def test_a_qube_is_not_committed_before_its_volumes_are_complete(host: QubesHost, qubesd: Qubesd) -> None:
    with host.lock():
        qube = host.begin(new_qube())
        qube.create_volume("private", 10).write(0, memoryview(b"x" * 10))
        with pytest.raises(HostFailed, match="not complete"):
            qube.commit(settings(), definition())
        assert qubesd.system.domains["work"].tags >= TAGS


@pytest.mark.parametrize(("key", "wanted"), [("vm11", definition()), ("vm10", None)])
def test_settings_of_another_qube_are_refused(host: QubesHost, key: str, wanted: Definition | None) -> None:
    with host.lock():
        qube = host.begin(new_qube())
        with pytest.raises(HostFailed, match="not those of this qube"):
            qube.commit(settings(key), wanted)


def test_after_the_end_nothing_more_happens(host: QubesHost, qubesd: Qubesd, tmp_path: Path) -> None:
    with host.lock():
        qube = host.begin(new_qube())
        qube.commit(settings(), definition())
        after = state_of(tmp_path, qubesd)
        qube.rollback()
        for action in (
            lambda: qube.commit(settings(), definition()),
            lambda: qube.create_volume("private", 10),
            lambda: qube.change_template(TEMPLATE),
        ):
            with pytest.raises(HostFailed, match="committed or rolled back"):
                action()
        assert state_of(tmp_path, qubesd) == after


def test_a_qube_that_cannot_be_begun_is_gone_at_once(host: QubesHost, qubesd: Qubesd, tmp_path: Path) -> None:
    with host.lock():
        before = state_of(tmp_path, qubesd)
        qubesd.fail("admin.vm.property.Set+netvm", message="no")
        with pytest.raises(HostFailed, match="setting property netvm failed: no"):
            host.begin(new_qube())
        assert state_of(tmp_path, qubesd) == before
        qubesd.fail("admin.vm.property.Set+netvm", message="no")
        qubesd.fail("admin.vm.Remove+", message="not now")
        with pytest.raises(HostFailed, match="still there, because removing the qube failed: not now"):
            host.begin(new_qube())
    assert "work" not in qubesd.system.domains


def test_what_got_no_tag_and_could_not_be_removed_is_removed_at_the_end(
    host: QubesHost, qubesd: Qubesd, tmp_path: Path
) -> None:
    before = state_of(tmp_path, qubesd)
    with host.lock():
        qubesd.fail("admin.vm.tag.Set+*", message="no")
        qubesd.fail("admin.vm.Remove+", message="not now")
        with pytest.raises(HostFailed, match="not now"):
            host.begin(new_qube())
        assert qubesd.system.domains["work"].tags == NEW_TAGS
    assert state_of(tmp_path, qubesd) == before


def test_a_name_that_is_taken_by_now_is_refused(host: QubesHost, qubesd: Qubesd, tmp_path: Path) -> None:
    with host.lock():
        before = state_of(tmp_path, qubesd)
        with pytest.raises(QubeExists):
            host.begin(new_qube(NETVM))
        assert state_of(tmp_path, qubesd) == before


# --- Rolling back --------------------------------------------------------------------------------


def test_a_qube_that_is_rolled_back_leaves_nothing(host: QubesHost, qubesd: Qubesd, tmp_path: Path) -> None:
    before = state_of(tmp_path, qubesd)
    with host.lock():
        qube = host.begin(new_qube())
        sink = qube.create_volume("private", IMAGE_SIZE)
        sink.write(0, memoryview(b"x" * 100_000))
        qube.rollback()
        with pytest.raises(HostFailed):
            sink.write(200_000, memoryview(b"x"))
        qube.rollback()
        restore(host)
        qubesadmin.Qubes().domains["work"].tags.add("mine")
    del qubesadmin.Qubes().domains["work"]
    assert state_of(tmp_path, qubesd) == before


def test_a_full_pool_is_no_space_and_leaves_nothing(host: QubesHost, qubesd: Qubesd, tmp_path: Path) -> None:
    qubesd.limit_pool("vm-pool", 100_000)
    before = state_of(tmp_path, qubesd)
    with host.lock(), pytest.raises(NoSpace) as caught:
        restore(host)
    assert (caught.value.qube, caught.value.volume) == ("work", "private")
    assert state_of(tmp_path, qubesd) == before


def test_a_rollback_gets_through_while_a_write_waits(
    host: QubesHost, qubesd: Qubesd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_read = threading.Event()

    def slowly(_self: QubesSystem, _qube: str, _volume: str, stream: BinaryIO, _size: int) -> None:
        may_read.wait(30)
        stream.read()

    monkeypatch.setattr(QubesSystem, "import_volume", slowly)
    before = state_of(tmp_path, qubesd)
    with host.lock():
        qube = host.begin(new_qube())
        sink = qube.create_volume("private", 1 << 40)
        failed = threading.Event()

        def write() -> None:
            with pytest.raises(HostFailed):
                sink.write((1 << 40) - 10, memoryview(b"x"))
            failed.set()

        writer = threading.Thread(target=write)
        writer.start()
        rollback = threading.Thread(target=qube.rollback)
        rollback.start()
        assert failed.wait(30)
        may_read.set()
        rollback.join(30)
        writer.join(30)
        assert not rollback.is_alive()
    assert state_of(tmp_path, qubesd) == before


def test_an_import_that_hangs_does_not_hold_up_the_rollback_and_is_told(
    host: QubesHost, qubesd: Qubesd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    monkeypatch.setattr(qubes_qube, "IMPORT_END_TIMEOUT_S", 0.05)
    monkeypatch.setattr(QubesSystem, "import_volume", lambda *_arguments: may_end.wait(30))
    before = state_of(tmp_path, qubesd)
    with host.lock():
        qube = host.begin(new_qube())
        qube.create_volume("private", 100).write(0, memoryview(b"x"))
        with pytest.raises(HostFailed, match="the import of private does not end"):
            qube.rollback()
    assert state_of(tmp_path, qubesd) == before
    may_end.set()


def test_a_qube_that_cannot_be_removed_is_told_and_removed_at_the_end(
    host: QubesHost, qubesd: Qubesd, tmp_path: Path
) -> None:
    before = state_of(tmp_path, qubesd)
    with host.lock():
        qube = host.begin(new_qube())
        qubesd.fail("admin.vm.Remove+", message="the disk says no")
        with pytest.raises(HostFailed, match="removing the qube failed: the disk says no") as caught:
            qube.rollback()
        assert "qvm-remove work" in caught.value.advice
        assert qubesd.system.domains["work"].tags >= TAGS
    assert state_of(tmp_path, qubesd) == before


def test_a_template_is_rolled_back_before_what_is_based_on_it(
    host: QubesHost, qubesd: Qubesd, tmp_path: Path
) -> None:
    before = state_of(tmp_path, qubesd)
    with host.lock():
        template = host.begin(new_qube("base", klass="TemplateVM", wanted=definition(template=None)))
        based = host.begin(new_qube(wanted=definition(template="base")))
        template.rollback()
        assert "base" in qubesd.system.domains
        based.rollback()
        assert "base" not in qubesd.system.domains
        template.rollback()
    assert state_of(tmp_path, qubesd) == before


def test_a_template_that_fails_goes_when_those_based_on_it_have_another(
    host: QubesHost, qubesd: Qubesd
) -> None:
    with host.lock():
        template = host.begin(new_qube("base", klass="TemplateVM", wanted=definition(template=None)))
        based = host.begin(new_qube(wanted=definition(template="base")))
        write_volume(based)
        template.rollback()
        based.change_template(TEMPLATE)
        assert "base" not in qubesd.system.domains
        based.commit(settings(), definition())
    assert qubesd.system.domains["work"].properties["template"] == TEMPLATE
    assert qubesd.volume_path("work", "private").read_bytes() == image()


def test_a_template_that_cannot_be_changed_is_an_error(host: QubesHost) -> None:
    with host.lock():
        qube = host.begin(new_qube())
        with pytest.raises(HostFailed, match="setting property template failed"):
            qube.change_template("gone")


# --- Every call fails once -----------------------------------------------------------------------

EVERYTHING = definition(
    netvm=NETVM,
    default_dispvm=DISPOSABLES,
    properties={"memory": "500", "provides_network": "True"},
    features={"gui": "1"},
    tags=("audio",),
    devices=(DeviceInfo(bus="block", backend="dom0", port="sdb"),),
)
FILES = settings(firewall=(FirewallRule(action="drop"),), notes="n", appmenus=("a.desktop",))


def restore_everything(host: QubesHost) -> None:
    with host.lock():
        restore(host, EVERYTHING, FILES)


def calls_of_a_restore(host: QubesHost, qubesd: Qubesd) -> int:
    before = len(qubesd.calls)
    restore_everything(host)
    del qubesadmin.Qubes().domains["work"]
    return len(qubesd.calls) - before


def test_whichever_call_fails_the_qube_is_there_completely_or_not_at_all(
    host: QubesHost, qubesd: Qubesd, tmp_path: Path
) -> None:
    before = state_of(tmp_path, qubesd)
    outcomes = set()
    for number in range(calls_of_a_restore(host, qubesd)):
        qubesd.fail("*", ("QubesException", "", "QubesVMInUseError")[number % 3], after=number)
        with suppress(HostFailed):
            restore_everything(host)
        qubesd.mend()
        made = qubesd.system.domains.get("work")
        outcomes.add(made is None)
        if made is not None:
            assert IN_PROGRESS_TAG not in made.tags
            assert qubesd.volume_path("work", "private").read_bytes() == image()
            with host.lock():
                pass
            assert UNFINISHED_TAG not in made.tags
            del qubesadmin.Qubes().domains["work"]
        assert state_of(tmp_path, qubesd) == before, f"call {number}"
    assert outcomes == {True, False}


def test_whenever_qubesd_goes_away_the_next_restore_clears_up(
    host: QubesHost, qubesd: Qubesd, tmp_path: Path
) -> None:
    before = state_of(tmp_path, qubesd)
    for number in range(0, calls_of_a_restore(host, qubesd), 2):
        qubesd.fail("*", "", after=number, times=None)
        told = ""
        try:
            restore_everything(host)
        except HostFailed as error:
            told = str(error)
        qubesd.mend()
        with host.lock():
            pass
        made = qubesd.system.domains.get("work")
        if made is not None:
            assert UNFINISHED_TAG not in made.tags
            if IN_PROGRESS_TAG in made.tags or "restored-from-backup-20260101T010203-1234" not in made.tags:
                # It did not even get our tag, so nobody can know later whose it is; but it was told.
                assert "qvm-remove work" in told
            del qubesadmin.Qubes().domains["work"]
        assert state_of(tmp_path, qubesd) == before, f"call {number}"


def test_a_restore_leaves_a_part_of_the_pool_free(
    host: QubesHost, qubesd: Qubesd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QubesSystem, "volume_room", lambda *_: (11 << 20, 200 << 20))
    with host.lock():
        sink = host.begin(new_qube()).create_volume("private", 1 << 30)
        with pytest.raises(
            NoSpace, match=r"11\.0 MiB are left in the storage pool, of which 10\.0 MiB stay free"
        ) as caught:
            sink.write(0, memoryview(bytes(2 << 20)))
        assert (caught.value.qube, caught.value.volume) == ("work", "private")
