"""Every setting of a qube that is known here, and whether a backup may bring it back.

Strategy: one table a kind of setting, one line a setting with its reason; what decides (`allowlist.py`) and
what explains (docs/configuration.md) are both made from it. A pattern is a name, or a prefix and `*`; where
several match a name, the literal one counts, else the longest.

The names are qubesd's: the definitions of its properties, the features that it, its tools and its templates
look up, and the tags in the policies that come with Qubes OS and with Whonix.
"""

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qubes_restore_svc.wire.names import QUBE_NAME

Kind = Literal["property", "feature", "tag"]


class Standing(enum.Enum):
    """When a setting comes back. The configuration's lists cannot change the last four."""

    RESTORED = "by default"
    LISTED = "if listed"  # by its name, or a pattern
    NAMED = "if named in full"  # patterns do not reach it
    AUTOSTART = "`restore.autostart`"
    KERNEL = "`restore.kernel`"
    KERNELOPTS = "`restore.kernelopts`"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Values:
    """The values that a setting may come back with: a clause for people, and the test."""

    text: str
    allow: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """What holds for the settings that match `pattern`; `why` is a clause or a few.

    `values`: those that it may have, whether table or configuration allows it; `instead`: what it gets for
    another one, where without any the qube would be less guarded. `most`: how many that match the pattern a
    qube may have; `names`: those of them that the system takes. (It keeps some that it refuses, and the qube
    cannot start then.) `free_values` come back even if its switch is off. `silent_values`: those which, left
    out, are not worth telling; `silent`: none is. `together`: what is left out is told once, by the pattern.
    `only_on`: the classes of qubes that may have it.
    """

    pattern: str
    standing: Standing
    why: str
    values: Values | None = None
    instead: str | None = None
    most: int | None = None
    names: Values | None = None
    free_values: tuple[str, ...] = ()
    silent_values: tuple[str, ...] = ()
    silent: bool = False
    together: bool = False
    only_on: frozenset[str] | None = None


def rule_for(kind: Kind, name: str) -> Rule:
    """The rule of a setting; one that says `LISTED` for a name that no line knows.

    A tag that is never restored is recognised in upper and in lower case.
    """
    rule = _LITERAL[kind].get(name)
    if rule is None and kind == "tag":
        rule = _LITERAL[kind].get(name.casefold())
        if rule is not None and rule.standing is not Standing.NEVER:
            rule = None
    return family_rule_for(kind, name) if rule is None else rule


def family_rule_for(kind: Kind, prefix: str) -> Rule:
    """The rule for whatever begins with `prefix`, where the tables have one for all of that."""
    # The tags with a prefix in the table never come back, whatever the case of their letters.
    key = prefix.casefold() if kind == "tag" else prefix
    return next((rule for start, rule in _PREFIXES[kind] if key.startswith(start)), UNKNOWN)


def _shape(pattern: str, text: str) -> Values:
    compiled = re.compile(pattern)
    return Values(text, lambda value: compiled.fullmatch(value) is not None)


def _number(low: int, high: int, unit: str = "") -> Values:
    digits = re.compile(r"[0-9]{1,9}")
    text = f"{low} to {high}{unit and ' ' + unit}"
    return Values(text, lambda value: bool(digits.fullmatch(value)) and low <= int(value) <= high)


_BOOLEAN = _shape(r"(?i:true|false|yes|no|on|off|1|0)", "true or false")
#: qubesd keeps a feature that is on as `1` and one that is off as the empty value.
_FLAG = _shape(r"(?i:1?|0|true|false)", "1 or empty")
_NAME = _shape(f"{QUBE_NAME}|", "a qube, or none")
_ADDRESS = _shape(r"[0-9]{1,3}(\.[0-9]{1,3}){3}", "an IPv4 address")
_ENTRIES = _shape(r"[A-Za-z0-9_.+@: -]*", "names of menu entries, without /")

_RESTORED, _LISTED, _NAMED, _NEVER = Standing.RESTORED, Standing.LISTED, Standing.NAMED, Standing.NEVER
_TEMPLATE = frozenset({"TemplateVM"})

#: For what the tables do not know.
UNKNOWN = Rule("*", _LISTED, "this program does not know it")


def _host_decides(why: str, *names: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, _NEVER, why, silent=True) for name in names)


_IN_PLAN = "it is decided for this system when the restore is planned"
_COMPUTED = "the system computes it"
_KEPT_BY_SYSTEM = "the system keeps it up to date itself"
_VISIBLE = "it tells one qube from another for the netvm and its firewall; two with the same would collide"
_KERNEL_LINE = "it changes the kernel's command line"

PROPERTIES: tuple[Rule, ...] = (
    Rule("memory", _RESTORED, "what the qube needs to run", _number(10, 1 << 16, "MiB")),
    Rule("maxmem", _RESTORED, "0 switches balancing off", _number(0, 1 << 18, "MiB")),
    Rule("vcpus", _RESTORED, "what the qube needs to run", _number(1, 64)),
    Rule("virt_mode", _RESTORED, "pv is not among them: of Xen's modes it exposes the most of Xen",
         _shape(r"(?i:hvm|pvh)", "hvm or pvh")),
    Rule("default_user", _RESTORED, "an account inside of the qube",
         _shape(r"[A-Za-z0-9_][A-Za-z0-9_+,.-]{0,31}", "a user's name")),
    Rule("keyboard_layout", _RESTORED, "told to the qube only",
         _shape(r"[A-Za-z]{1,16}\+[A-Za-z0-9_-]{0,64}\+[A-Za-z0-9_:,-]{0,128}", "LAYOUT+VARIANT+OPTIONS")),
    Rule("qrexec_timeout", _RESTORED, "a slow system needs it to start", _number(1, 3600, "s")),
    Rule("shutdown_timeout", _RESTORED, "a slow system needs it to stop, and the machine waits for it",
         _number(1, 600, "s")),
    Rule("provides_network", _RESTORED,
         "other qubes use it only once they are told to, and those of the same backup may need it", _BOOLEAN),
    Rule("template_for_dispvms", _RESTORED,
         "as with provides_network; what starts in it is asked for by name", _BOOLEAN),
    Rule("include_in_backups", _RESTORED, "it only preselects", _BOOLEAN),
    Rule("devices_denied", _RESTORED, "it only forbids",
         _shape(r"(?:[bump*][0-9a-f*]{6}){0,256}", "codes of device interfaces"), instead="*******"),
    Rule("mac", _RESTORED, "all qubes share one unless they are given another; only the netvm sees it",
         _shape(r"(?i:[0-9a-f][02468ace](:[0-9a-f]{2}){5})", "a MAC address of one device")),
    Rule("autostart", Standing.AUTOSTART, "foreign code would run as soon as the machine is switched on",
         _BOOLEAN, silent_values=("False", "false", "0", "no", "off", "")),
    Rule("kernel", Standing.KERNEL,
         "it can choose an old kernel of dom0's; the empty value, the kernel on the qube's own disk, comes"
         " back by default, for without it such a qube does not start",
         _shape(r"[A-Za-z0-9_+.-]{0,64}", "a kernel's name, without /"), free_values=("",)),
    Rule("kernelopts", Standing.KERNELOPTS,
         "it can switch off what protects a qube's system, that of its template included",
         _shape(r"[\x20-\x7e]{0,512}", "at most 512 characters")),
    Rule("bootmode", Standing.KERNELOPTS, _KERNEL_LINE, silent_values=("default",)),
    Rule("appvm_default_bootmode", Standing.KERNELOPTS, _KERNEL_LINE, silent_values=("default",)),
    Rule("debug", _NAMED, "it opens consoles and writes logs in dom0", _BOOLEAN,
         silent_values=("False", "false", "0", "no", "off", "")),
    Rule("guivm", _NAMED, "it chooses who shows the windows and gets the keys, and gets rights with them",
         _NAME),
    Rule("audiovm", _NAMED, "it chooses who has sound and microphone, and gets rights with them", _NAME),
    Rule("management_dispvm", _NAMED, "it chooses who may run commands in the qube as root", _NAME),
    Rule("stubdom_mem", _NAMED, "memory of the device model, which runs outside of the qube",
         _number(1, 1 << 12, "MiB")),
    Rule("ip", _NAMED, _VISIBLE, _ADDRESS),
    Rule("ip6", _NAMED, _VISIBLE, _shape(r"[0-9A-Fa-f:.]{2,45}", "an IPv6 address")),
    Rule("auto_cleanup", _NAMED, "what was restored would delete itself at its first shutdown", _BOOLEAN,
         silent_values=("False", "false", "0", "no", "off", "")),
    Rule("default_dispvm", _NAMED,
         "it opens disposables of any template of this system to the qube, with their home and network; the"
         " system's default, none, and a qube of the same backup come back without it",
         _NAME, silent=True),
    *_host_decides(_IN_PLAN, "name", "label", "klass", "template", "netvm"),
    *_host_decides(_COMPUTED, "uuid", "qid", "xid", "dispid", "icon", "start_time", "stubdom_uuid",
                   "stubdom_xid", "updateable", "is_preload", "gateway", "gateway6", "dns", "visible_ip",
                   "visible_ip6", "visible_gateway", "visible_gateway6", "visible_netmask"),
    *_host_decides("it tells of the system that the backup was made on", "installed_by_rpm",
                   "backup_timestamp"),
)  # fmt: skip

_ANNOUNCED = "a template says it of itself, with qubes.FeaturesRequest, and could as well here"
_INSIDE = "passed on to the qube, which may do with it what it likes"
_APPEARANCE = "it concerns the qube's menu entries"
_GUI = "it weakens what the GUI daemon guards against: full-screen and borderless windows, faked titles, keys"

FEATURES: tuple[Rule, ...] = (
    *(Rule(name, _RESTORED, _ANNOUNCED, _FLAG)
      for name in ("qrexec", "gui", "gui-emulated", "vmexec", "qubes-firewall", "anon-timezone")),
    Rule("os", _RESTORED, _ANNOUNCED, _shape(r"[A-Za-z0-9 ._-]{0,64}", "a word or two")),
    Rule("os-*", _RESTORED, _ANNOUNCED, _shape(r"[A-Za-z0-9 ._-]{0,64}", "a word or two")),
    Rule("qubes-agent-version", _RESTORED, _ANNOUNCED, _shape(r"[0-9]{1,4}\.[0-9]{1,4}", "MAJOR.MINOR")),
    *(Rule(name, _RESTORED, _ANNOUNCED, _FLAG, together=True)
      for name in ("supported-service.*", "supported-feature.*", "supported-rpc.*")),
    *(Rule(name, _RESTORED, "a template says it of itself; the Whonix extension sees to the rest",
           _FLAG, only_on=_TEMPLATE)
      for name in ("whonix-ws", "whonix-gw")),
    Rule("service.*", _RESTORED, _INSIDE, _FLAG, most=256,
         names=_shape(r"service\.(?!\.{1,2}$).{1,48}", "of at most 48 characters after the first dot")),
    Rule("service.app-dispvm.*", _RESTORED, _INSIDE, _FLAG, most=256),
    Rule("service.guivm*", _NAMED, "it makes the qube a GUI domain, which shows others' windows", _FLAG),
    Rule("service.clocksync", _NAMED, "the system sets it on the qube that it takes the time from", _FLAG),
    *_host_decides("switched off, it means that memory is not balanced: maxmem 0", "service.meminfo-writer"),
    Rule("vm-config.*", _RESTORED, f"{_INSIDE}; a longer one would keep it from starting",
         _shape(r"[\x20-\x7e]{0,3000}", "at most 3000 characters"), most=256,
         names=_shape(r"vm-config\.[A-Za-z].{0,51}", "of a letter and at most 51 characters after it")),
    Rule("custom-persist.*", _RESTORED, _INSIDE,
         _shape(r"((file|dir):[^:/]*:[^:/]*:0?[0-7]{1,4}:)?/[\x20-\x7e]{0,1024}",
                "a path, or TYPE:OWNER:GROUP:MODE:PATH"), most=256,
         names=_shape(r"custom-persist\..{1,54}", "of at most 54 characters after the dot")),
    Rule("app-dispvm.*", _RESTORED, "the qube opens files and links in a disposable", _FLAG),
    Rule("x-*", _RESTORED, "reserved for your own use; Qubes OS does not look at it"),
    *(Rule(name, _RESTORED, _APPEARANCE, _ENTRIES)
      for name in ("menu-items", "default-menu-items", "netvm-menu-items", "menu-favorites")),
    *(Rule(name, _RESTORED, _APPEARANCE, _FLAG)
      for name in ("appmenus-dispvm", "appmenus-legacy", "servicevm")),
    Rule("prohibit-start", _RESTORED, "it only forbids: what must not start there must not start here either",
         _shape(r"[\x20-\x7e]{0,1024}", "the reason"), instead="1"),
    *(Rule(name, _RESTORED, "only seen by the qube, from which it hides the real one", _ADDRESS)
      for name in ("net.fake-ip", "net.fake-gateway", "net.fake-netmask")),
    Rule("ipv6", _RESTORED, "for the qube's own networks", _FLAG),
    *(Rule(name, _RESTORED, "what the qube's system needs to start and to be used", _FLAG)
      for name in ("uefi", "memory-hotplug", "stubdom-qrexec", "rpc-clipboard", "no-monitor-layout",
                   "apparmor", "selinux", "audio")),
    Rule("audio-model", _RESTORED, "a sound card of the device model; the microphone is attached separately",
         _shape(r"ich6|sb16|ac97|es1370|", "ich6, sb16, ac97 or es1370")),
    Rule("video-model", _RESTORED, "a video card of the device model", _shape(r"[a-z]{0,16}", "a word")),
    Rule("timezone", _RESTORED, "the qube's clock",
         _shape(r"localtime|-?[0-9]{1,6}|", "localtime or seconds")),
    *(Rule(name, Standing.KERNELOPTS, _KERNEL_LINE, together=name.endswith("*"))
      for name in ("boot-mode.*", "no-default-kernelopts", "no-nomodeset")),
    Rule("gui-*", _NAMED, _GUI),
    Rule("gui-videoram-*", _RESTORED, "memory for the qube's own screen", _number(0, 1 << 20)),
    Rule("qemu-extra-args", _NAMED, "arguments of the device model, which runs outside of the qube"),
    Rule("linux-stubdom", _NAMED, "switched off, an outdated device model is used", _FLAG,
         silent_values=("1", "True")),
    Rule("input-dom0-proxy", _NAMED, "it forwards dom0's keyboard and mouse to the qube", _FLAG),
    *(Rule(name, _NAMED, "it gives tags, and with them rights over qubes, to whatever the qube creates")
      for name in ("tag-created-vm-with", "set-created-guivm")),
    Rule("preload-dispvm-*", _NAMED, "it starts disposables without being asked", together=True),
    Rule("pci-*", _NAMED, "it concerns devices, which do not come back either"),
    Rule("expert-mode", _NAMED, "it offers a debug console"),
    Rule("suspend-s0ix", _NAMED, "it concerns the whole machine"),
    Rule("internal", _LISTED, "it hides the qube from menus and lists", silent_values=("",)),
    Rule("skip-update", _LISTED, "it hides that the qube is out of date", silent_values=("",)),
    Rule("check-updates", _LISTED, "it hides that the qube is out of date"),
    Rule("template-*", _LISTED, "it claims where a template came from, and nothing here can check that",
         together=True),
    Rule("whonix-default-*", _LISTED, "it names qubes that others get as netvm and disposable template"),
    Rule("guivm-windows-prefix", _LISTED, "it changes the titles of windows"),
    Rule("restore-svc-*", _NEVER, "a restore that goes on knows by it what is finished, and sets its own",
         silent=True),
    *_host_decides(_KEPT_BY_SYSTEM, "updates-available", "last-update", "last-updates-check",
                   "preload-dispvm", "preload-dispvm-completed", "preload-dispvm-in-progress",
                   "deferred-netvm-original", "backup-content", "backup-path", "backup-size"),
)  # fmt: skip

_SET_BY_SYSTEM = "the system sets it itself where it belongs"

TAGS: tuple[Rule, ...] = (
    Rule("anon-vm", _RESTORED,
         "the policy of Qubes OS keeps the machine's time from such a qube; all that it may do in return is"
         " to tell the state of its clock to a Whonix gateway"),
    Rule("whonix-updatevm", _RESTORED,
         "a template that has it is updated through Tor, never beside it; any other qube would get a way into"
         " the network by it, so templates only", only_on=_TEMPLATE),
    Rule("anon-gateway", _NEVER, f"it may give commands to Whonix workstations; {_SET_BY_SYSTEM}"),
    Rule("guivm-*", _NEVER, f"a GUI domain's rights over the qube go by it; {_SET_BY_SYSTEM}"),
    Rule("audiovm-*", _NEVER, f"an audio domain's rights over the qube go by it; {_SET_BY_SYSTEM}"),
    Rule("relayvm-*", _NEVER, f"calls to other machines are let through by it; {_SET_BY_SYSTEM}"),
    Rule("created-by-*", _NEVER, f"an admin domain's rights over the qube go by it; {_SET_BY_SYSTEM}"),
    Rule("disp-created-by-*", _NEVER, f"rights over a disposable go by it; {_SET_BY_SYSTEM}"),
    Rule("backup-restore-*", _NEVER, "rights of the stock restore go by it"),
    Rule("restore-svc-*", _NEVER, "rights during a restore go by it"),
    Rule("restored-from-backup-*", _NEVER, "it says where a qube came from, and every restore sets its own",
         silent=True),
    *(Rule(f"{prefix}-dom0", _NEVER, _SET_BY_SYSTEM, silent=True)
      for prefix in ("guivm", "audiovm", "created-by", "disp-created-by")),
)  # fmt: skip

TABLES: dict[Kind, tuple[Rule, ...]] = {"property": PROPERTIES, "feature": FEATURES, "tag": TAGS}

_LITERAL: dict[Kind, dict[str, Rule]] = {
    kind: {rule.pattern: rule for rule in table if not rule.pattern.endswith("*")}
    for kind, table in TABLES.items()
}
_PREFIXES: dict[Kind, tuple[tuple[str, Rule], ...]] = {
    kind: tuple(
        (rule.pattern.removesuffix("*"), rule)
        for rule in sorted(table, key=lambda rule: -len(rule.pattern))
        if rule.pattern.endswith("*")
    )
    for kind, table in TABLES.items()
}
