"""Which of a qube's settings may come back from a backup.

Strategy: allow-lists of patterns for names, and for some settings of values. A setting that is on no list
stays behind, and the report names it. So a backup that was made to attack, or by somebody else, cannot give a
qube rights, devices, a kernel command line, or a place among the qubes that start with the system.
`settings_table.py` tells what each setting can do. The lists come from the person's configuration.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from qubes_restore_svc.broker.settings_table import Kind, Rule, Standing, family_rule_for, rule_for
from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.wire.messages import DeviceInfo, ManifestQube
from qubes_restore_svc.wire.names import shortened

#: The entry of a list that stands for all settings of its kind that come back by default.
DEFAULT = "@default"

#: The classes of devices that can come back.
Bus = Literal["block", "mic", "pci", "usb", "webcam"]
BUSES: tuple[Bus, ...] = get_args(Bus)

#: The report names at most so many settings of one qube; of more, only the number.
MAX_LEFT_OUT = 100


@dataclass(frozen=True, slots=True)
class AllowedSettings:
    """The settings of a qube that are restored; `left_out` names the others (`property kernelopts`).

    `notes`: what the person should know of the restored ones. `could`: the left out ones that the person may
    let come back this time, named as in `SettingName`.
    """

    properties: Mapping[str, str] = field(default_factory=dict)
    features: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    devices: tuple[DeviceInfo, ...] = ()
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    could: tuple[str, ...] = ()


class AllowList(Protocol):
    """Decides which settings of a qube are restored."""

    def check(self, also: Collection[str]) -> None:
        """Raises UsageError if the person may not let these settings come back."""

    def let_through(self, qube: ManifestQube, also: Collection[str] = ()) -> AllowedSettings:
        """The properties, features, tags and devices of `qube` that may come back; `also`: as the person
        chose.

        The references `netvm` and `default_dispvm`, and `template_for_dispvms` and `provides_network`, on
        which other qubes of the restore may depend, are for the plan: it reads them in the manifest.
        """


class SettingsPolicy:
    """The allow-list of a Qubes system, with the person's lists; without arguments, the default one.

    `properties`, `features` and `tags` are entries that `check_entry` accepts; `devices` classes of devices;
    the switches let in what starts with the system, and what chooses the kernel and its command line.
    `choosable` are entries that `check_choosable` accepts: what a person may let in for one restore.
    """

    def __init__(
        self,
        *,
        properties: Iterable[str] = (DEFAULT,),
        features: Iterable[str] = (DEFAULT,),
        tags: Iterable[str] = (DEFAULT,),
        devices: Iterable[str] = (),
        autostart: bool = False,
        kernel: bool = False,
        kernelopts: bool = False,
        choosable: Iterable[str] = (),
    ) -> None:
        self._properties = _List("property", properties)
        self._features = _List("feature", features)
        self._tags = _List("tag", tags)
        self._devices = frozenset(devices)
        switches = {
            Standing.AUTOSTART: autostart,
            Standing.KERNEL: kernel,
            Standing.KERNELOPTS: kernelopts,
        }
        self._on = frozenset(standing for standing, is_on in switches.items() if is_on)
        self._choosable: dict[str, list[str]] = {"property": [], "feature": [], "tag": [], "device": []}
        for entry in choosable:
            kind, _, name = check_choosable(entry).partition(":")
            self._choosable[kind].append(name)
        self._once: dict[Kind, _List] = {
            kind: _List(kind, self._choosable[kind], once=True) for kind in _NAMES
        }

    def check(self, also: Collection[str]) -> None:
        """Raises UsageError if the configuration lets nobody choose one of these settings."""
        for setting in also:
            if not self._may_choose(setting):
                raise UsageError(
                    f"the configuration does not permit letting {setting} come back for one restore",
                    advice="An administrator can permit it: restore.choosable.",
                )

    def _may_choose(self, setting: str) -> bool:
        before, _, name = setting.partition(":")
        kind = _KINDS.get(before)
        if kind is None:
            return name in self._choosable["device"]
        rule = rule_for(kind, name)
        classes = rule.only_on or frozenset({""})
        return any(self._may(self._once[kind], rule, name, "\0", klass) for klass in classes)

    def let_through(self, qube: ManifestQube, also: Collection[str] = ()) -> AllowedSettings:
        """The settings of `qube` that may come back. dom0's never do, and the report does not name them."""
        if qube.klass == "AdminVM":
            return AllowedSettings()
        told = _Told(frozenset(also))
        untrusted_properties, notes = _translated(qube)
        properties = dict(self._chosen(self._properties, untrusted_properties.items(), qube.klass, told))
        features = dict(self._chosen(self._features, qube.features.items(), qube.klass, told))
        tags = dict.fromkeys(qube.tags, "")
        tags = dict(self._chosen(self._tags, tags.items(), qube.klass, told))
        devices = tuple(self._chosen_devices(qube.devices, told))
        notes += [*_asked_for("property", properties), *_asked_for("feature", features)]
        return AllowedSettings(
            properties,
            features,
            tuple(tags),
            devices,
            _shortened(tuple(told.left_out)),
            _shortened(tuple(notes)),
            tuple(told.could)[:MAX_LEFT_OUT],
        )

    def _chosen(
        self,
        allowed: "_List",
        untrusted_settings: Iterable[tuple[str, str]],
        klass: str,
        told: "_Told",
    ) -> Iterator[tuple[str, str]]:
        """Those that may come back. Puts the others into `told`, except those that nobody needs to know."""
        count: Counter[str] = Counter()
        for name, untrusted_value in untrusted_settings:
            rule = rule_for(allowed.kind, name)
            count[rule.pattern] += 1
            setting = f"{allowed.kind}:{name}"
            once = self._may(self._once[allowed.kind], rule, name, untrusted_value, klass)
            if not self._may(allowed, rule, name, untrusted_value, klass) and not (
                once and setting in told.also
            ):
                if not rule.silent and untrusted_value not in rule.silent_values:
                    told.left_out[f"{allowed.kind} {rule.pattern if rule.together else name}"] = None
                    told.could.update({setting: None} if once else {})
            elif rule.names is not None and not rule.names.allow(name):
                shown = shortened(name, _MAX_SHOWN)
                told.left_out[f"{allowed.kind} {shown} (only names {rule.names.text})"] = None
            elif rule.most is not None and count[rule.pattern] > rule.most:
                told.left_out[f"{allowed.kind} {rule.pattern} (only {rule.most} of them)"] = None
            elif rule.values is not None and not rule.values.allow(untrusted_value):
                now = "" if rule.instead is None else f"; it is {rule.instead!r} now"
                told.left_out[f"{allowed.kind} {name} (only {rule.values.text}{now})"] = None
                if rule.instead is not None:
                    yield name, rule.instead
            else:
                yield name, untrusted_value

    def _may(self, allowed: "_List", rule: Rule, name: str, untrusted_value: str, klass: str) -> bool:
        if not _NAMES[allowed.kind].fullmatch(name) or (rule.only_on and klass not in rule.only_on):
            return False
        match rule.standing:
            case Standing.RESTORED:
                return allowed.default or allowed.matches(name)
            case Standing.LISTED:
                return allowed.matches(name)
            case Standing.NAMED:
                return name in allowed.names
            case Standing.NEVER:
                return False
            case _:  # only a list of what can be chosen holds such a name
                is_on = rule.standing in self._on or name in allowed.names
                return is_on or untrusted_value in rule.free_values

    def _chosen_devices(self, devices: Iterable[DeviceInfo], told: "_Told") -> Iterator[DeviceInfo]:
        for device in devices:
            name = f"device {device.bus} {device.backend}:{device.port}"
            once, setting = device.bus in self._choosable["device"], f"device:{device.bus}"
            if device.bus not in self._devices and not (once and setting in told.also):
                told.left_out[name] = None
                told.could.update({setting: None} if once else {})
                continue
            known = _DEVICE_OPTIONS.get(device.bus, frozenset())
            for option in device.options.keys() - known:
                told.left_out[f"option {option} of {name}"] = None
            options = {key: value for key, value in device.options.items() if key in known}
            yield device.model_copy(update={"options": options})


def check_entry(kind: Kind, entry: str) -> str:
    """Check an entry of a list: a name, a pattern in which `*` is any characters and `?` one, or `@default`.

    Raises ValueError, with a clause for the person, if it is nothing of these, can match nothing, or asks for
    something that no list can allow.
    """
    if entry == DEFAULT:
        return entry
    return _checked(kind, entry, once=False)


def check_choosable(entry: str) -> str:
    """The same for what a person may choose: `property:autostart`, `feature:my-*`, `device:pci`."""
    before, _, name = entry.partition(":")
    if before == "device" and name in BUSES:
        return entry
    kind = _KINDS.get(before)
    if kind is None:
        raise ValueError(
            f"expected property:, feature: or tag: and a name, or device: and one of {', '.join(BUSES)}"
        )
    _checked(kind, name, once=True)
    return entry


def _checked(kind: Kind, entry: str, *, once: bool) -> str:
    if not _ENTRIES[kind].fullmatch(entry):
        other = "" if once else f", or {DEFAULT}"
        raise ValueError(f"expected the name of a {kind}, a pattern with * or ?{other}")
    fixed = re.split(r"[*?]", entry, maxsplit=1)[0]
    is_pattern = fixed != entry
    rule = family_rule_for(kind, fixed) if is_pattern else rule_for(kind, entry)
    match rule.standing:
        case Standing.RESTORED | Standing.LISTED:
            return entry
        case Standing.NAMED if not is_pattern:
            return entry
        case Standing.NAMED:
            raise ValueError(f"what {entry} stands for must be named one by one: {rule.why}")
        case Standing.NEVER:
            raise ValueError(f"the {kind} {entry} is never restored: {rule.why}")
        case _ if once and not is_pattern:
            return entry
        case _:
            switch = rule.standing.value.strip("`")
            raise ValueError(f"no list decides about the {kind} {entry}, but {switch} does: {rule.why}")


def with_wildcards(entry: str) -> re.Pattern[str]:
    """For fullmatch: `*` is any characters, `?` one, and nothing else is special.

    Atomic groups keep it from trying a `*` twice: the time is linear, whatever the name is.
    """
    first, *rest = (re.escape(part).replace(r"\?", ".") for part in entry.split("*"))
    if not rest:
        return re.compile(first)
    middle = "".join(f"(?>.*?{part})" for part in rest[:-1])
    return re.compile(f"{first}{middle}.*{rest[-1]}")


@dataclass(frozen=True, slots=True)
class _Told:
    """What one qube's settings come to, beside those that come back; `also`: what the person chose."""

    also: frozenset[str]
    left_out: dict[str, None] = field(default_factory=dict)
    could: dict[str, None] = field(default_factory=dict)


class _List:
    """One list of the configuration, ready to be asked."""

    def __init__(self, kind: Kind, entries: Iterable[str], *, once: bool = False) -> None:
        self.kind: Kind = kind
        self.names = frozenset(entries if once else (check_entry(kind, entry) for entry in entries))
        self.default = DEFAULT in self.names
        patterns = [with_wildcards(entry) for entry in sorted(self.names - {DEFAULT})]
        self.matches: Callable[[str], bool] = lambda name: any(p.fullmatch(name) for p in patterns)


def _asked_for(kind: Kind, settings: Mapping[str, str]) -> Iterator[str]:
    """Notes on settings that come back only because the configuration names them: they may give rights."""
    for name, value in settings.items():
        rule = rule_for(kind, name)
        usual = rule.standing in (Standing.RESTORED, Standing.LISTED) or value in rule.free_values
        if not usual and not rule.silent and value not in rule.silent_values:
            yield f"{kind} {name} is {value[:_MAX_SHOWN]!r}, as the configuration allows"


def _translated(qube: ManifestQube) -> tuple[dict[str, str], list[str]]:
    """The qube's properties, under the names of today (some had others in R4.0); and notes on that."""
    properties, notes = dict(qube.properties), list[str]()
    for old, new, values in _OLD_PROPERTIES:
        value = properties.pop(old, None)
        if value is not None:
            properties.setdefault(new, values.get(value.lower(), value))
    if qube.features.get(_BALANCED) == "" and properties.get("maxmem") != "0":
        properties["maxmem"] = "0"
        notes.append(f"maxmem is 0: its memory was not balanced ({_BALANCED})")
    return properties, notes


#: The feature that older systems had in place of `maxmem` 0.
_BALANCED = "service.meminfo-writer"

_HVM: Mapping[str, str] = {"true": "hvm", "1": "hvm", "false": "pv", "0": "pv"}
#: Properties that qubesd gave other names, and their values: what it does itself with an old qubes.xml.
_OLD_PROPERTIES: tuple[tuple[str, str, Mapping[str, str]], ...] = (
    ("hvm", "virt_mode", _HVM),
    ("dispvm_allowed", "template_for_dispvms", {}),
)

_MAX_SHOWN = 60  #: characters of a name or value in a note

#: Characters that qubesd accepts in a name.
_ALPHABETS: dict[Kind, str] = {"property": "a-z0-9_", "feature": "A-Za-z0-9_.-", "tag": "A-Za-z0-9_-"}
_KINDS: Mapping[str, Kind] = {kind: kind for kind in _ALPHABETS}
_NAMES = {kind: re.compile(f"[{alphabet}]+") for kind, alphabet in _ALPHABETS.items()}
_ENTRIES = {kind: re.compile(f"[*?{alphabet}]{{1,255}}") for kind, alphabet in _ALPHABETS.items()}

#: Options of an assignment that nobody's safety depends on. Others, as `permissive` of pci, stay behind.
_DEVICE_OPTIONS = {"block": frozenset({"read-only", "frontend-dev", "devtype"})}


def _shortened(left_out: tuple[str, ...]) -> tuple[str, ...]:
    more = len(left_out) - MAX_LEFT_OUT
    return left_out if more <= 0 else (*left_out[:MAX_LEFT_OUT], f"{more} more settings")
