"""Which settings come back: names, values, patterns, and what no list can allow."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qubes_restore_svc.broker.allowlist import (
    DEFAULT,
    MAX_LEFT_OUT,
    AllowedSettings,
    SettingsPolicy,
    check_entry,
)
from qubes_restore_svc.broker.settings_table import TABLES, Kind, Rule, Standing, rule_for
from qubes_restore_svc.wire.messages import DeviceInfo, ManifestQube, VolumeInfo
from qubes_restore_svc.wire.names import VmClass

KINDS: tuple[Kind, ...] = ("property", "feature", "tag")
EVERYTHING = SettingsPolicy(properties=["*"], features=["*"], tags=["*"])


def qube(
    klass: VmClass = "AppVM",
    properties: dict[str, str] | None = None,
    features: dict[str, str] | None = None,
    tags: tuple[str, ...] = (),
    devices: tuple[DeviceInfo, ...] = (),
) -> ManifestQube:
    return ManifestQube(
        key="vm1",
        name="work",
        klass=klass,
        label="red",
        properties=properties or {},
        features=features or {},
        tags=tags,
        devices=devices,
    )


def properties(given: dict[str, str], policy: SettingsPolicy | None = None) -> AllowedSettings:
    return (policy or SettingsPolicy()).let_through(qube(properties=given))


def features(given: dict[str, str], policy: SettingsPolicy | None = None) -> AllowedSettings:
    return (policy or SettingsPolicy()).let_through(qube(features=given))


def tags(*given: str, policy: SettingsPolicy | None = None, klass: VmClass = "AppVM") -> AllowedSettings:
    return (policy or SettingsPolicy()).let_through(qube(klass, tags=given))


# --- What comes back by default ------------------------------------------------------------------


def test_what_a_qube_needs_to_run_comes_back() -> None:
    given = {
        "memory": "400",
        "maxmem": "0",
        "vcpus": "4",
        "virt_mode": "hvm",
        "kernel": "",
        "default_user": "user",
        "keyboard_layout": "de++",
        "qrexec_timeout": "300",
        "shutdown_timeout": "60",
        "provides_network": "True",
        "template_for_dispvms": "True",
        "include_in_backups": "False",
        "devices_denied": "u03****p0c0330",
        "mac": "00:16:3e:5e:6c:05",
    }
    assert properties(given) == AllowedSettings(properties=given)


def test_what_a_template_says_of_itself_comes_back() -> None:
    given = {
        "qrexec": "1",
        "gui": "1",
        "gui-emulated": "",
        "vmexec": "1",
        "os": "Linux",
        "os-distribution": "fedora",
        "os-eol": "2026-11-19",
        "qubes-agent-version": "4.3",
        "supported-rpc.qubes.Filecopy": "1",
        "supported-service.crond": "1",
        "menu-items": "firefox.desktop org.gnome.Terminal.desktop",
        "whonix-ws": "1",
    }
    chosen = SettingsPolicy().let_through(qube("TemplateVM", features=given))
    assert chosen == AllowedSettings(features=given)


def test_what_only_restricts_or_is_for_the_qube_comes_back() -> None:
    given = {
        "prohibit-start": "compromised, for forensics",
        "service.crond": "1",
        "service.cups": "",
        "vm-config.mode": "a b",
        "custom-persist.home": "/home/user/work",
        "custom-persist.tool": "dir:user:user:0755:/opt/tool",
        "app-dispvm.mozilla-thunderbird.desktop": "1",
        "net.fake-ip": "192.168.1.2",
        "x-notes": "whatever I like",
        "audio-model": "ich6",
        "timezone": "localtime",
    }
    assert features(given) == AllowedSettings(features=given)


@pytest.mark.parametrize(
    "name",
    ["autostart", "kernelopts", "debug", "guivm", "audiovm", "management_dispvm", "stubdom_mem", "ip", "ip6",
     "bootmode", "appvm_default_bootmode", "auto_cleanup", "something_new"],
)  # fmt: skip
def test_a_property_that_reaches_further_is_left_out_and_told(name: str) -> None:
    assert properties({name: "True"}) == AllowedSettings(left_out=(f"property {name}",))


@pytest.mark.parametrize(
    "name",
    ["tag-created-vm-with", "set-created-guivm", "input-dom0-proxy", "qemu-extra-args",
     "gui-allow-fullscreen", "gui-default-override-redirect", "gui-secure-copy-sequence",
     "internal", "skip-update", "expert-mode",
     "no-default-kernelopts", "pci-e820-host", "service.clocksync", "service.guivm", "service.guivm-vnc",
     "something-new"],
)  # fmt: skip
def test_a_feature_that_reaches_further_is_left_out_and_told(name: str) -> None:
    assert features({name: "1"}) == AllowedSettings(left_out=(f"feature {name}",))


def test_a_kernel_of_dom0s_is_left_out_and_the_qubes_own_comes_back() -> None:
    assert properties({"kernel": "6.6.2-1"}).left_out == ("property kernel",)
    assert properties({"kernel": ""}).properties == {"kernel": ""}


def test_two_tags_come_back() -> None:
    assert tags("anon-vm", "sd-workstation") == AllowedSettings(
        tags=("anon-vm",), left_out=("tag sd-workstation",)
    )
    assert tags("whonix-updatevm", klass="TemplateVM").tags == ("whonix-updatevm",)


def test_a_qube_that_is_no_template_does_not_get_the_way_into_the_network() -> None:
    for policy in (SettingsPolicy(), EVERYTHING, SettingsPolicy(tags=["whonix-updatevm"])):
        for klass in ("AppVM", "StandaloneVM", "DispVM"):
            assert tags("whonix-updatevm", policy=policy, klass=klass) == AllowedSettings(
                left_out=("tag whonix-updatevm",)
            )


def test_a_tag_that_stands_twice_comes_back_once() -> None:
    assert tags("anon-vm", "anon-vm").tags == ("anon-vm",)


def test_nothing_of_dom0_comes_back_and_nothing_is_told() -> None:
    dom0 = ManifestQube(
        key="dom0",
        name="dom0",
        klass="AdminVM",
        label="black",
        volumes=(VolumeInfo(name="home"),),
    ).model_copy(update={"features": {"service.x": "1"}, "tags": ("a",), "properties": {"memory": "1"}})
    assert EVERYTHING.let_through(dom0) == AllowedSettings()


# --- What is not worth telling ---------------------------------------------------------------------


@pytest.mark.parametrize("policy", [SettingsPolicy(), EVERYTHING], ids=["default", "everything"])
def test_what_every_backup_holds_and_what_the_host_decides_is_left_out_silently(
    policy: SettingsPolicy,
) -> None:
    silent = qube(
        properties={
            "name": "other", "label": "red", "template": "debian", "netvm": "sys-vpn",
            "default_dispvm": "dvm", "klass": "AppVM", "uuid": "0", "qid": "7", "dispid": "4",
            "installed_by_rpm": "True", "backup_timestamp": "1", "updateable": "True", "icon": "x",
            "autostart": "False", "debug": "False",
        },
        features={
            "updates-available": "1", "last-updates-check": "2025-01-01", "service.meminfo-writer": "1",
            "deferred-netvm-original": "sys-net", "preload-dispvm": "disp1", "backup-path": "x",
        },
        tags=("guivm-dom0", "audiovm-dom0", "created-by-dom0", "restored-from-backup-2024-01-01"),
    )  # fmt: skip
    assert policy.let_through(silent) == AllowedSettings()


def test_members_of_a_family_are_told_once() -> None:
    given = {f"template-{name}": "x" for name in ("name", "epoch", "version")}
    given |= {"boot-mode.kernelopts.x": "init=/bin/sh", "boot-mode.active": "x", "preload-dispvm-max": "3"}
    assert features(given).left_out == (
        "feature template-*",
        "feature boot-mode.*",
        "feature preload-dispvm-*",
    )


def test_a_flood_of_settings_is_told_shortly() -> None:
    left_out = features({f"f{number}": "1" for number in range(4096)}).left_out
    assert len(left_out) == MAX_LEFT_OUT + 1
    assert left_out[0] == "feature f0"
    assert left_out[-1] == f"{4096 - MAX_LEFT_OUT} more settings"
    assert len(features({f"f{number}": "1" for number in range(MAX_LEFT_OUT)}).left_out) == MAX_LEFT_OUT


# --- Values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory", "0"), ("memory", "-1"), ("memory", "65537"), ("memory", "9" * 5000), ("memory", "4e2"),
        ("memory", ""), ("memory", " 400"), ("vcpus", "65"), ("vcpus", "0"), ("maxmem", "262145"),
        ("virt_mode", "pv"), ("virt_mode", "PV"), ("virt_mode", "hvm "), ("default_user", "-x"),
        ("default_user", "a:b"), ("default_user", "a" * 33), ("mac", "01:16:3e:5e:6c:00"), ("mac", "0:1"),
        ("keyboard_layout", "us"), ("keyboard_layout", "us+a b+"), ("qrexec_timeout", "3601"),
        ("shutdown_timeout", "0"), ("shutdown_timeout", "601"), ("provides_network", "maybe"),
    ],
)  # fmt: skip
def test_a_value_that_a_property_should_not_have_is_left_out(name: str, value: str) -> None:
    rule = rule_for("property", name)
    assert rule.values is not None
    for policy in (SettingsPolicy(), SettingsPolicy(properties=["*"]), SettingsPolicy(properties=[name])):
        expected = AllowedSettings(left_out=(f"property {name} (only {rule.values.text})",))
        assert properties({name: value}, policy) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("menu-items", "../../etc/passwd"), ("menu-items", "a/b.desktop"), ("menu-favorites", "$(reboot)"),
        ("qrexec", "yes; reboot"), ("service.x", "2"), ("qubes-agent-version", "4.2x"), ("os", "<b>"),
        ("custom-persist.x", "relative"), ("custom-persist.x", "file:a:b:9:/x"), ("net.fake-ip", "fe80::1"),
        ("audio-model", "virtio"), ("video-model", "vga'/>"), ("timezone", "UTC"), ("supported-rpc.x", "x"),
        ("gui-videoram-min", "lots"), ("vm-config.x", "x" * 3001),
    ],
)  # fmt: skip
def test_a_value_that_a_feature_should_not_have_is_left_out(name: str, value: str) -> None:
    rule = rule_for("feature", name)
    assert rule.values is not None
    for policy in (SettingsPolicy(), EVERYTHING, SettingsPolicy(features=[name])):
        expected = AllowedSettings(left_out=(f"feature {name} (only {rule.values.text})",))
        assert features({name: value}, policy) == expected


def test_a_value_is_checked_whoever_let_the_setting_in() -> None:
    policy = SettingsPolicy(properties=["guivm"], kernel=True, kernelopts=True, autostart=True)
    given = {"guivm": "sys gui", "kernel": "../x", "kernelopts": "a" * 513, "autostart": "perhaps"}
    assert properties(given, policy).properties == {}
    given = {"guivm": "sys-gui", "kernel": "6.6.2", "kernelopts": "quiet", "autostart": "True"}
    notes = tuple(
        f"property {name} is {value!r}, as the configuration allows" for name, value in given.items()
    )
    assert properties(given, policy) == AllowedSettings(properties=given, notes=notes)
    assert properties({"kernel": "", "autostart": "False"}, policy).notes == ()


def test_what_guards_the_qube_is_not_lost_for_its_value() -> None:
    given = ManifestQube.model_copy(
        qube(properties={"devices_denied": "u03"}), update={"features": {"prohibit-start": "x" * 1025}}
    )
    chosen = SettingsPolicy().let_through(given)
    assert (chosen.properties, chosen.features) == ({"devices_denied": "*******"}, {"prohibit-start": "1"})
    assert chosen.left_out == (
        "property devices_denied (only codes of device interfaces; it is '*******' now)",
        "feature prohibit-start (only the reason; it is '1' now)",
    )


@pytest.mark.parametrize(
    ("family", "longest", "text"),
    [
        ("vm-config.", 62, "of a letter and at most 51 characters after it"),
        ("service.", 56, "of at most 48 characters after the first dot"),
        ("custom-persist.", 69, "of at most 54 characters after the dot"),
    ],
)
def test_a_family_of_features_is_bounded_in_number_and_length(family: str, longest: int, text: str) -> None:
    value = "/x" if family == "custom-persist." else "1"
    chosen = features({f"{family}n{number}": value for number in range(1000)})
    assert len(chosen.features) == 256
    assert chosen.left_out == (f"feature {family}* (only 256 of them)",)
    longest_name = (family + "n" * 255)[:longest]
    assert features({longest_name: value}).features == {longest_name: value}
    chosen = features({longest_name + "n": value})
    assert chosen.features == {} and f"(only names {text})" in chosen.left_out[0]


# --- Settings of older systems -----------------------------------------------------------------------


@pytest.mark.parametrize("maxmem", [{}, {"maxmem": "4000"}])
def test_memory_that_was_not_balanced_is_not_balanced_again(maxmem: dict[str, str]) -> None:
    source = qube(properties=maxmem, features={"service.meminfo-writer": ""})
    chosen = SettingsPolicy().let_through(source)
    assert chosen == AllowedSettings(
        properties={"maxmem": "0"},
        notes=("maxmem is 0: its memory was not balanced (service.meminfo-writer)",),
    )
    source = qube(properties={"maxmem": "0"}, features={"service.meminfo-writer": ""})
    assert SettingsPolicy().let_through(source) == AllowedSettings(properties={"maxmem": "0"})
    source = qube(properties=maxmem, features={"service.meminfo-writer": "1"})
    assert SettingsPolicy().let_through(source) == AllowedSettings(properties=maxmem)


def test_properties_that_had_other_names_in_r4_0_come_back() -> None:
    given = {"hvm": "True", "dispvm_allowed": "True"}
    expected = {"virt_mode": "hvm", "template_for_dispvms": "True"}
    assert properties(given) == AllowedSettings(properties=expected)
    assert properties({"hvm": "False"}).left_out == ("property virt_mode (only hvm or pvh)",)
    assert properties({"hvm": "True", "virt_mode": "pvh"}).properties == {"virt_mode": "pvh"}


# --- Look-alikes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["Service.x", "SERVICE.x", "service", "servicex", "xservice.x", "QREXEC", "qrexec-", "Gui", "os_x",
     "menu-items.", "X-mine"],
)  # fmt: skip
def test_a_feature_that_looks_like_one_that_comes_back_does_not(name: str) -> None:
    assert features({name: "1"}) == AllowedSettings(left_out=(f"feature {name}",))


@pytest.mark.parametrize("name", ["Anon-vm", "ANON-VM", "anon_vm", "anon-vm-", "anon-vmx", "xanon-vm"])
def test_a_tag_that_looks_like_one_that_comes_back_does_not(name: str) -> None:
    assert tags(name).tags == ()


@pytest.mark.parametrize(
    "name", ["service.x\n", "\nservice.x", "service.ｘ", "service.x\0", "service. ", "sеrvice.x"]
)
def test_no_manifest_holds_a_feature_that_is_not_plain(name: str) -> None:
    with pytest.raises(ValidationError):
        qube(features={name: "1"})


@pytest.mark.parametrize(
    "name", ["service.x\n", "\nservice.x", "service.x\nqrexec", "service.a+b", "service.a:b"]
)
def test_a_feature_that_qubesd_would_not_take_is_left_out_whatever_is_listed(name: str) -> None:
    forged = qube().model_copy(update={"features": {name: "1"}})
    for policy in (SettingsPolicy(), EVERYTHING):
        assert policy.let_through(forged).features == {}


def test_a_pattern_does_not_reach_past_a_new_line() -> None:
    forged = qube().model_copy(update={"tags": ("sd-a\n", "sd-a\nguivm-x", "\nsd-a", "sd-a")})
    assert SettingsPolicy(tags=["sd-*"]).let_through(forged).tags == ("sd-a",)
    forged = qube().model_copy(update={"properties": {"mem\n": "1", "memo": "1"}})
    assert SettingsPolicy(properties=["mem?", "mem*"]).let_through(forged).properties == {"memo": "1"}


# --- Lists -------------------------------------------------------------------------------------------


def test_a_list_replaces_the_default_or_adds_to_it() -> None:
    given = {"memory": "400", "something_new": "x"}
    assert properties(given, SettingsPolicy(properties=["something_new"])).properties == {
        "something_new": "x"
    }
    assert properties(given, SettingsPolicy(properties=[DEFAULT, "some*"])).properties == given
    assert properties(given, SettingsPolicy(properties=[])).properties == {}
    assert properties(given, SettingsPolicy(properties=["mem*"])).properties == {"memory": "400"}
    assert tags("anon-vm", "sd-a", policy=SettingsPolicy(tags=["sd-a"])).tags == ("sd-a",)


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("a*", ["a", "ab", "a.b"], ["ba", "A", "Ab"]),
        ("*a", ["a", "ba"], ["ab", "A"]),
        ("a?", ["ab", "a."], ["a", "abc"]),
        ("?", ["a"], ["ab"]),
        ("a.b", ["a.b"], ["axb", "a.bc", "A.b"]),
        ("a*b*c", ["abc", "axbxc", "abcbc"], ["acb", "ab", "abcd"]),
        ("**", ["a", "ab"], []),
        ("a*ab", ["aab", "aXab", "aabab"], ["ab"]),
        ("*a*a*", ["aa", "xaxax"], ["a"]),
    ],
)
def test_a_pattern_matches_whole_names(pattern: str, matches: list[str], others: list[str]) -> None:
    policy = SettingsPolicy(features=[pattern])
    assert set(features(dict.fromkeys(matches + others, "1"), policy).features) == set(matches)


@settings(max_examples=200, deadline=None)
@given(pattern=st.text("ab*?", min_size=1, max_size=8), name=st.text("ab", min_size=1, max_size=8))
def test_a_pattern_means_what_it_says(pattern: str, name: str) -> None:
    expected = re.fullmatch(pattern.replace("*", ".*").replace("?", "."), name) is not None
    assert (name in features({name: "1"}, SettingsPolicy(features=[pattern])).features) == expected


def test_a_pattern_of_many_stars_comes_to_an_end() -> None:
    policy = SettingsPolicy(features=["*a" * 100 + "b"])
    # If all the ways in which it could match were tried, this would not end in a lifetime.
    assert features({"a" * 255: "1"}, policy).features == {}


@pytest.mark.parametrize("standing", [Standing.NAMED, *list(Standing)[3:]])
def test_no_pattern_reaches_what_has_to_be_named(standing: Standing) -> None:
    for kind in KINDS:
        for rule in TABLES[kind]:
            if rule.standing is standing:
                assert chosen(kind, rule.pattern.replace("*", "x"), EVERYTHING, "guess") == ()


def chosen(kind: Kind, name: str, policy: SettingsPolicy, value: str) -> tuple[str, ...]:
    """The settings that come back if a qube has only this one."""
    if kind == "property":
        return tuple(policy.let_through(qube(properties={name: value})).properties)
    if kind == "feature":
        return tuple(policy.let_through(qube(features={name: value})).features)
    return policy.let_through(qube(tags=(name,))).tags


def test_what_is_named_in_full_comes_back() -> None:
    policy = SettingsPolicy(
        properties=["debug", "ip"],
        features=["gui-allow-fullscreen", "service.clocksync", "preload-dispvm-max"],
    )
    assert properties({"debug": "True", "ip": "10.0.0.1"}, policy).left_out == ()
    given = {"gui-allow-fullscreen": "1", "service.clocksync": "1", "preload-dispvm-max": "2"}
    chosen = features(given, policy)
    assert (chosen.features, chosen.left_out) == (given, ())
    assert chosen.notes == tuple(
        f"feature {name} is {value!r}, as the configuration allows" for name, value in given.items()
    )
    assert features({"gui-allow-utf8-titles": "1"}, policy).features == {}


@pytest.mark.parametrize(
    ("switch", "on", "setting"),
    [
        ("autostart", SettingsPolicy(autostart=True), ("property", "autostart", "True")),
        ("kernel", SettingsPolicy(kernel=True), ("property", "kernel", "6.6.2-1.fc37")),
        ("kernelopts", SettingsPolicy(kernelopts=True), ("property", "kernelopts", "nopat iommu=soft")),
        ("kernelopts", SettingsPolicy(kernelopts=True), ("property", "bootmode", "x")),
        ("kernelopts", SettingsPolicy(kernelopts=True), ("property", "appvm_default_bootmode", "x")),
        ("kernelopts", SettingsPolicy(kernelopts=True), ("feature", "boot-mode.kernelopts.x", "quiet")),
        ("kernelopts", SettingsPolicy(kernelopts=True), ("feature", "no-default-kernelopts", "1")),
        ("kernelopts", SettingsPolicy(kernelopts=True), ("feature", "no-nomodeset", "1")),
    ],
)
def test_a_switch_and_no_list_lets_it_back(
    switch: str, on: SettingsPolicy, setting: tuple[Kind, str, str]
) -> None:
    kind, name, value = setting
    assert chosen(kind, name, on, value) == (name,)
    assert chosen(kind, name, SettingsPolicy(), value) == ()
    assert chosen(kind, name, EVERYTHING, value) == ()
    with pytest.raises(ValueError, match=rf"restore\.{switch}"):
        check_entry(kind, name)


# --- What no list may say ------------------------------------------------------------------------

NEVER_TAGS = ["guivm-x", "audiovm-dom0", "created-by-sys-gui", "disp-created-by-x", "backup-restore-mgmt",
              "backup-restore-in-progress", "backup-restore-storage", "restore-svc-worker",
              "restore-svc-storage", "restore-svc-unfinished", "restored-from-backup-x", "relayvm-x",
              "anon-gateway"]  # fmt: skip


@pytest.mark.parametrize("tag", NEVER_TAGS)
def test_a_tag_that_gives_rights_is_never_restored(tag: str) -> None:
    for name in (tag, tag.upper(), tag.capitalize()):
        assert tags(name).tags == ()
        assert tags(name, policy=SettingsPolicy(tags=["*", "*-*", "?*", DEFAULT])).tags == ()


@pytest.mark.parametrize("tag", NEVER_TAGS)
def test_a_list_that_asks_for_it_is_a_mistake_that_names_it(tag: str) -> None:
    for name in (tag, tag.upper()):
        with pytest.raises(ValueError, match=f"{name} is never restored"):
            check_entry("tag", name)
        with pytest.raises(ValueError, match=name):
            SettingsPolicy(tags=["sd-a", name])


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("tag", "guivm-*"), ("tag", "guivm-s?s*"), ("tag", "GUIVM-*"), ("tag", "backup-restore-*"),
        ("tag", "restore-svc-w*"), ("tag", "created-by-*"), ("property", "template"), ("property", "name"),
        ("property", "netvm"), ("feature", "deferred-netvm-original"), ("feature", "backup-path"),
        ("feature", "service.meminfo-writer"),
    ],
)  # fmt: skip
def test_so_is_one_that_asks_for_a_part_of_it(kind: Kind, entry: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(entry)} is never restored"):
        check_entry(kind, entry)


@pytest.mark.parametrize(
    ("kind", "entry"), [("feature", "gui-*"), ("feature", "gui-allow-*"), ("feature", "service.guivm*")]
)
def test_a_pattern_for_what_has_to_be_named_is_a_mistake(kind: Kind, entry: str) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(entry)} stands for must be named"):
        check_entry(kind, entry)


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("tag", ""), ("tag", "a b"), ("tag", "a\n"), ("tag", "a\n*"), ("tag", "a.b"), ("tag", "[a-z]"),
        ("tag", "ä"), ("tag", "!a"), ("tag", "a" * 256), ("feature", "a+b"), ("feature", "a|b"),
        ("feature", "(a)"), ("property", "Memory"), ("property", "a-b"), ("property", "@defaults"),
        ("property", "\\w"),
    ],
)  # fmt: skip
def test_what_is_no_name_and_no_pattern_is_a_mistake(kind: Kind, entry: str) -> None:
    with pytest.raises(ValueError, match=f"expected the name of a {kind}"):
        check_entry(kind, entry)


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("tag", "*"), ("tag", "sd-*"), ("tag", "g*"), ("tag", "anon-*"), ("feature", "template-*"),
        ("feature", "*"), ("feature", "gui*"), ("property", "kernel*"), ("property", "net*"),
        ("property", "guivm"), ("property", DEFAULT), ("feature", "gui-allow-fullscreen"),
    ],
)  # fmt: skip
def test_anything_else_can_be_listed(kind: Kind, entry: str) -> None:
    assert check_entry(kind, entry) == entry


# --- Devices ---------------------------------------------------------------------------------------

CONTROLLER = DeviceInfo(
    bus="pci", backend="dom0", port="00_14.0", required=True, options={"permissive": "True"}
)
DISK = DeviceInfo(bus="block", backend="sys-usb", port="sda1", options={"read-only": "yes"})


def test_no_device_comes_back_by_default_whatever_the_lists_say() -> None:
    for policy in (SettingsPolicy(), EVERYTHING):
        assert policy.let_through(qube(devices=(CONTROLLER, DISK))) == AllowedSettings(
            left_out=("device pci dom0:00_14.0", "device block sys-usb:sda1")
        )


def test_devices_of_a_class_that_is_allowed_come_back_without_what_weakens() -> None:
    chosen = SettingsPolicy(devices=["pci"]).let_through(qube(devices=(CONTROLLER, DISK)))
    (device,) = chosen.devices
    assert device == DeviceInfo(bus="pci", backend="dom0", port="00_14.0", required=True)
    assert chosen.left_out == ("option permissive of device pci dom0:00_14.0", "device block sys-usb:sda1")
    assert SettingsPolicy(devices=["block"]).let_through(qube(devices=(DISK,))).devices == (DISK,)


# --- The tables --------------------------------------------------------------------------------------

ALL_RULES = [(kind, rule) for kind in KINDS for rule in TABLES[kind]]


def test_no_setting_stands_twice_in_the_tables() -> None:
    for kind in KINDS:
        patterns = [rule.pattern for rule in TABLES[kind]]
        assert len(set(patterns)) == len(patterns)


@pytest.mark.parametrize(
    ("kind", "rule"), ALL_RULES, ids=[f"{kind} {rule.pattern}" for kind, rule in ALL_RULES]
)
def test_a_rule_is_well_made(kind: Kind, rule: Rule) -> None:
    assert re.fullmatch(r"[a-zA-Z0-9_.-]+\*?", rule.pattern)
    if kind == "tag":
        assert rule.pattern == rule.pattern.casefold()
        assert rule.standing is Standing.NEVER or not rule.pattern.endswith("*")
    assert re.fullmatch(r"[a-zA-Z0-9].*[^.]", rule.why)
    assert "|" not in rule.why + (rule.values.text if rule.values else "")
    assert rule_for(kind, rule.pattern.replace("*", "zz")) is rule
    if rule.values and rule.free_values:
        assert all(rule.values.allow(value) for value in rule.free_values)


def test_the_longest_pattern_is_the_rule() -> None:
    assert rule_for("feature", "service.guivm-x").standing is Standing.NAMED
    assert rule_for("feature", "service.guix").standing is Standing.RESTORED
    assert rule_for("feature", "gui-videoram-min").standing is Standing.RESTORED
    assert rule_for("tag", "restored-from-backup-x").silent
    assert not rule_for("tag", "guivm-dom0x").silent
