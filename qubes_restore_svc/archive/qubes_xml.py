"""qubes.xml: which qubes the backup holds, where in the archive they lie, and how they were set up.

Strategy: the document becomes a tree under limits that bound memory, time and depth. Only those of its
domains count whose feature `backup-content` is true. Each of them is read by itself into the models of the
session protocol: a single setting that no Qubes system writes is left out with a warning, a qube whose
identity (name, class, place in the archive) is in doubt is refused, and only a file that is malformed as a
whole is an error. A choice in doubt falls to the side that is safe: no network, no disposables, all devices
denied, and of two qubes that claim one place in the archive, neither.

The schema is that of qubesd (R4.0 and later): its PropertyHolder, Features, Tags and Volume.config.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element

from pydantic import TypeAdapter, ValidationError

from qubes_restore_svc.archive import core2
from qubes_restore_svc.archive.members import shown
from qubes_restore_svc.archive.xml_tree import parse_xml
from qubes_restore_svc.errors import BadMetadata, ProtocolViolation
from qubes_restore_svc.wire.messages import (
    DeviceInfo,
    ErrorInfo,
    Manifest,
    ManifestQube,
    RefusedQube,
    VolumeInfo,
    encode_message,
)
from qubes_restore_svc.wire.names import (
    KEPT_VOLUMES,
    MAX_NUMBER,
    MAX_QUBES,
    FeatureName,
    LabelName,
    NetvmName,
    PropertyName,
    QubeKey,
    QubeName,
    SettingValue,
    TagName,
    strip_control,
)

MAX_QUBES_XML = 8 << 20  #: bytes; a system of 250 qubes has less than 1 MiB
MAX_PATH = 255  #: characters of a qube's directory in the archive
MAX_WARNINGS = 200  #: more than these are counted, not told


@dataclass(frozen=True, slots=True)
class BackupQube:
    """A qube that the backup holds. `path` is its directory in the archive: `vm10`, `appvms/work`,
    for dom0 `dom0-home/user`; relative, without a final slash, no other qube's path is inside it.
    """

    info: ManifestQube
    path: str


@dataclass(frozen=True, slots=True)
class BackupContent:
    """The content of the backup according to qubes.xml, in its order; `warnings` are sentences without a
    stop.

    `refused_paths` are the directories of the refused ones, as far as they are known.
    """

    qubes: tuple[BackupQube, ...]
    refused: tuple[RefusedQube, ...]
    warnings: tuple[str, ...]
    refused_paths: tuple[str, ...] = ()


def parse_qubes_xml(untrusted_xml: bytes, backup_format: int = 4) -> BackupContent:
    """Read qubes.xml of a backup of this format. The result fits into one `Manifest`: no key and no name
    stands twice in it.

    Raises BadMetadata if the file as a whole is malformed or out of bounds.
    """
    root = parse_xml(untrusted_xml, "qubes.xml", MAX_QUBES_XML)
    if backup_format < 4:
        if root.tag != core2.ROOT:
            raise BadMetadata("qubes.xml does not have the form of Qubes R3.2 and earlier, as format 3 has")
        root = core2.modernise(root)
    elif root.tag == core2.ROOT:
        raise BadMetadata("qubes.xml has the form of Qubes R3.2 and earlier, which no format 4 backup has")
    if root.tag != "qubes" or root.find("domains") is None:
        raise BadMetadata("qubes.xml does not hold a list of qubes")
    untrusted_domains = root.findall("./domains/domain")
    if len(untrusted_domains) > MAX_QUBES:
        raise BadMetadata(f"qubes.xml lists {len(untrusted_domains)} qubes; at most {MAX_QUBES} are accepted")
    entries = [entry for domain in untrusted_domains if (entry := _entry(domain)) is not None]
    reader = _Reader(_labels(root))
    for entry, rival in zip(entries, _rivals(entries), strict=True):
        reader.read(entry, rival)
    _check_size(reader)
    return BackupContent(
        tuple(reader.qubes), tuple(reader.refused), tuple(reader.warnings()), tuple(reader.refused_paths)
    )


# --- The tree --------------------------------------------------------------------------------------


def _labels(root: Element) -> dict[str, str]:
    """Label names by what a property may call them: their id (`label-4`), or the name itself."""
    names = [(label.get("id", ""), label.text or "") for label in root.findall("./labels/label")]
    return {name: name for _, name in names} | dict(names)


def _texts(nodes: Iterable[Element]) -> Iterator[tuple[str, str]]:
    """Name and value of each property or feature. No text is the empty value; `ref` stands for text."""
    for node in nodes:
        yield node.get("name", ""), node.get("ref") or node.text or ""


# --- Places in the archive ---------------------------------------------------------------------------

_PATH = re.compile(r"[A-Za-z0-9_.+@-]+(?:/[A-Za-z0-9_.+@-]+)*")
_DOM0_DIRECTORY = "dom0-home"


@dataclass(frozen=True, slots=True)
class _Entry:
    """A domain in the backup, with the facts that decide whether it can be listed at all."""

    untrusted_domain: Element
    klass: str
    untrusted_name: str
    untrusted_properties: dict[str, str]
    untrusted_features: dict[str, str]

    @property
    def shown(self) -> str:
        """The name for an error."""
        return _shown(self.untrusted_name) or "(without a name)"

    def path(self) -> str:
        """Its directory in the archive. Raises BadMetadata if that is not one that it can have."""
        path = self.untrusted_features.get("backup-path", "").removesuffix("/")
        if not path:
            raise BadMetadata("qubes.xml does not say where in the backup it is")
        parts = path.split("/")
        if len(path) > MAX_PATH or not _PATH.fullmatch(path) or {".", ".."} & set(parts):
            raise BadMetadata("its place in the backup is not a plain relative path")
        is_dom0 = self.klass == "AdminVM"
        if (parts[0] == _DOM0_DIRECTORY) != is_dom0 or (is_dom0 and len(parts) != 2):
            raise BadMetadata(
                f"its place in the backup is not where a qube of the class {_shown(self.klass)} lies"
            )
        return path


def _entry(untrusted_domain: Element) -> _Entry | None:
    untrusted_features = dict(_texts(untrusted_domain.findall("./features/feature")))
    if untrusted_features.get("backup-content", "").strip().lower() in _FALSE:
        return None
    untrusted_properties = dict(_texts(untrusted_domain.findall("./properties/property")))
    klass = untrusted_domain.get("class", "")
    untrusted_name = "dom0" if klass == "AdminVM" else untrusted_properties.get("name", "")
    return _Entry(untrusted_domain, klass, untrusted_name, untrusted_properties, untrusted_features)


def _rivals(entries: list[_Entry]) -> list[_Entry | None]:
    """For each entry one other whose place is the same, inside its own or around it.

    The files there belong to one of them, and nothing says to which one. A claim counts even if the qube that
    makes it is refused for another reason.
    """
    claims: list[tuple[str, int]] = []
    for position, entry in enumerate(entries):
        with suppress(BadMetadata):
            claims.append((entry.path() + "/", position))
    rivals: list[_Entry | None] = [None] * len(entries)
    # Sorted, a directory comes right before all that is inside it.
    outer: tuple[str, int] | None = None
    for claim in sorted(claims):
        if outer is None or not claim[0].startswith(outer[0]):
            outer = claim
            continue
        rivals[claim[1]] = entries[outer[1]]
        if rivals[outer[1]] is None:
            rivals[outer[1]] = entries[claim[1]]
    return rivals


# --- The qubes -------------------------------------------------------------------------------------

_Warn = Callable[[str], None]

_TEMPLATE_BASED = frozenset({"AppVM", "DispVM"})

_IDENTITY = frozenset({"name", "label", "template", "netvm", "qid", "uuid"})
_BACKUP_FEATURES = frozenset({"backup-content", "backup-path", "backup-size"})
_FALSE = frozenset({"", "0", "false", "no", "off", "none"})

#: What stands in for a label that cannot be read: the least trusted one.
_UNKNOWN_LABEL = "red"

#: What stands in for a setting that cannot be read, if the qube would be more open without it.
_IF_UNREADABLE = {
    "default_dispvm": "",
    "devices_denied": "*******",
    "prohibit-start": "the reason cannot be read",
}

#: Most settings of one qube; see `ManifestQube`.
_MAX_PROPERTIES = 512
_MAX_FEATURES = 4096
_MAX_TAGS = 1024

_NUMBER = re.compile(r"[0-9]{1,19}")

_QUBE_NAME: TypeAdapter[str] = TypeAdapter(QubeName)
_QUBE_KEY: TypeAdapter[str] = TypeAdapter(QubeKey)
_LABEL_NAME: TypeAdapter[str] = TypeAdapter(LabelName)
_NETVM_NAME: TypeAdapter[str] = TypeAdapter(NetvmName)
_PROPERTY_NAME: TypeAdapter[str] = TypeAdapter(PropertyName)
_FEATURE_NAME: TypeAdapter[str] = TypeAdapter(FeatureName)
_TAG_NAME: TypeAdapter[str] = TypeAdapter(TagName)
_SETTING_VALUE: TypeAdapter[str] = TypeAdapter(SettingValue)


@dataclass
class _Reader:
    """Reads domains one after the other; knows what those before have taken."""

    labels: dict[str, str]
    qubes: list[BackupQube] = field(default_factory=list)
    refused: list[RefusedQube] = field(default_factory=list)
    refused_paths: list[str] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)
    _keys: set[str] = field(default_factory=set)
    _warnings: list[str] = field(default_factory=list)
    _untold: int = 0

    def read(self, entry: _Entry, rival: _Entry | None) -> None:
        """List or refuse the qube; `rival` is another that claims its place in the archive."""
        try:
            self.qubes.append(self._qube(entry, rival))
        except BadMetadata as error:
            self.refused.append(RefusedQube(name=entry.shown, error=ErrorInfo.of(error)))
            with suppress(BadMetadata):
                self.refused_paths.append(entry.path())

    def warnings(self) -> Iterator[str]:
        yield from self._warnings
        if self._untold:
            yield f"{self._untold} more settings in qubes.xml are not as Qubes writes them"

    def _qube(self, entry: _Entry, rival: _Entry | None) -> BackupQube:
        klass, untrusted_domain = entry.klass, entry.untrusted_domain
        if klass not in KEPT_VOLUMES:
            raise BadMetadata(f"it is of the class '{_shown(klass)}', which cannot be restored")
        path = entry.path()
        if rival is not None:
            raise BadMetadata(f"its place in the backup overlaps that of another qube, '{rival.shown}'")
        name = self._checked_name(entry.untrusted_name, klass)

        def warn(text: str) -> None:
            self._warn(f"{name}: {text}")

        fields: dict[str, object] = {
            "key": self._key(path, klass),
            "name": name,
            "klass": klass,
            "label": self._label(entry.untrusted_properties.get("label", ""), klass, warn),
            "template": _template(entry.untrusted_properties.get("template", ""), klass, warn),
            "netvm": _netvm(entry.untrusted_properties.get("netvm"), warn),
            "home_user": path.rpartition("/")[2] if klass == "AdminVM" else None,
            "backup_size": _size(entry.untrusted_features.get("backup-size"), "backup-size", warn) or 0,
            "volumes": _volumes(untrusted_domain, klass, warn),
            "properties": _settings(_PROPERTIES, untrusted_domain, warn),
            "features": _settings(_FEATURES, untrusted_domain, warn),
            "tags": _tags(untrusted_domain, warn),
            "devices": read_devices(untrusted_domain, warn),
        }
        try:
            info = ManifestQube.model_validate(fields)
        except ValidationError as error:
            where = ", ".join(sorted({str(part["loc"][0]) for part in error.errors() if part["loc"]}))
            raise BadMetadata(f"its settings are out of bounds ({where or 'together'})") from None
        self._names.add(name)
        self._keys.add(info.key)
        return BackupQube(info, path)

    def _checked_name(self, untrusted_name: str, klass: str) -> str:
        if not untrusted_name:
            raise BadMetadata("it has no name")
        if not _matches(_QUBE_NAME, untrusted_name):
            raise BadMetadata("its name is not one that a qube can have")
        name = untrusted_name
        if klass != "AdminVM" and name == "dom0":
            raise BadMetadata("its name is dom0's")
        if name in self._names:
            raise BadMetadata("another qube in the backup has the same name")
        return name

    def _label(self, untrusted_label: str, klass: str, warn: _Warn) -> str:
        label = self.labels.get(untrusted_label, "")
        if _matches(_LABEL_NAME, label):
            return label
        if klass == "AdminVM":  # dom0's label is built in, and not in every file
            return "black"
        warn(f"its label cannot be read; it is '{_UNKNOWN_LABEL}' now")
        return _UNKNOWN_LABEL

    def _key(self, path: str, klass: str) -> str:
        """The last part of the path, so that a person knows it again; made up where that will not do."""
        key = "dom0" if klass == "AdminVM" else path.rpartition("/")[2]
        if _matches(_QUBE_KEY, key) and key not in self._keys and (key != "dom0" or klass == "AdminVM"):
            return key
        number = len(self.qubes) + 1
        while f"qube{number}" in self._keys:
            number += 1
        return f"qube{number}"

    def _warn(self, text: str) -> None:
        if len(self._warnings) < MAX_WARNINGS:
            self._warnings.append(text)
        else:
            self._untold += 1


# --- The settings of a qube --------------------------------------------------------------------------


def _template(untrusted_template: str, klass: str, warn: _Warn) -> str | None:
    if not untrusted_template:
        return None
    if klass not in _TEMPLATE_BASED or not _matches(_QUBE_NAME, untrusted_template):
        warn("its template is not one that it can have; left out")
        return None
    return untrusted_template


def _netvm(untrusted_netvm: str | None, warn: _Warn) -> str | None:
    """None (the default) only if the file says nothing about it; what is in doubt gets no network."""
    if untrusted_netvm is None:
        return None
    if untrusted_netvm.lower() == "none":
        return ""
    if not _matches(_NETVM_NAME, untrusted_netvm):
        warn("its netvm is not the name of a qube; it will have no network")
        return ""
    return untrusted_netvm


def _size(untrusted_size: str | None, what: str, warn: _Warn) -> int | None:
    if untrusted_size is None:
        return None
    if not _NUMBER.fullmatch(untrusted_size) or (size := int(untrusted_size)) > MAX_NUMBER:
        warn(f"{what} is not a size in bytes; left out")
        return None
    return size


def _volumes(untrusted_domain: Element, klass: str, warn: _Warn) -> tuple[VolumeInfo, ...]:
    """The volumes that a complete backup of the qube has: those that keep their content when it stops."""
    usual = KEPT_VOLUMES[klass]
    if klass == "AdminVM" or untrusted_domain.find("volume-config") is None:
        return tuple(VolumeInfo.model_validate({"name": name}) for name in usual)
    volumes: dict[str, VolumeInfo] = {}  # as for qubesd, the last of a name counts
    for volume in untrusted_domain.findall("./volume-config/volume"):
        if volume.get("save_on_stop", "").strip().lower() in _FALSE:
            continue
        name = volume.get("name", "")
        if name not in ("root", "private"):
            warn(f"it has a volume '{_shown(name)}', which cannot be restored")
            continue
        size = _size(volume.get("size"), f"the size of its volume {name}", warn)
        volumes[name] = VolumeInfo.model_validate({"name": name, "size": size})
    for name in usual:
        if name not in volumes:
            warn(f"its list of volumes leaves out {name}, which comes back if the backup holds it")
    return tuple(volumes.values())


@dataclass(frozen=True, slots=True)
class _Kind:
    """Properties or features: where they stand, and those of `elsewhere` are no settings."""

    noun: str
    place: str
    name_type: TypeAdapter[str]
    elsewhere: frozenset[str]
    most: int


_PROPERTIES = _Kind("property", "./properties/property", _PROPERTY_NAME, _IDENTITY, _MAX_PROPERTIES)
_FEATURES = _Kind("feature", "./features/feature", _FEATURE_NAME, _BACKUP_FEATURES, _MAX_FEATURES)


def _settings(kind: _Kind, untrusted_domain: Element, warn: _Warn) -> dict[str, str]:
    """Properties or features. As for qubesd, the last of a name counts."""
    settings: dict[str, str] = {}
    room = kind.most - len(_IF_UNREADABLE)
    for name, value in _texts(untrusted_domain.findall(kind.place)):
        if name in kind.elsewhere:
            continue
        # An earlier value of that name must not come to life because the last one is refused.
        settings.pop(name, None)
        if len(settings) < room and _matches(kind.name_type, name) and _matches(_SETTING_VALUE, value):
            settings[name] = value
        elif name in _IF_UNREADABLE:
            settings[name] = _IF_UNREADABLE[name]
            warn(f"the {kind.noun} '{name}' cannot be read; it is '{settings[name]}' now")
        else:
            warn(f"the {kind.noun} '{_shown(name)}' cannot be restored; left out")
    return settings


def _tags(untrusted_domain: Element, warn: _Warn) -> tuple[str, ...]:
    tags: dict[str, None] = {}
    for node in untrusted_domain.findall("./tags/tag"):
        tag = node.get("name", "")
        if _matches(_TAG_NAME, tag) and len(tags) < _MAX_TAGS:
            tags[tag] = None
        else:
            warn(f"the tag '{_shown(tag)}' cannot be restored; left out")
    return tuple(tags)


# --- Small things ------------------------------------------------------------------------------------


def _matches(adapter: TypeAdapter[str], untrusted_text: str) -> bool:
    try:
        adapter.validate_python(untrusted_text)
    except ValidationError:
        return False
    return True


def _shown(untrusted_text: str) -> str:
    """For an error or a warning: short, and with nothing in it that could steer a terminal."""
    return strip_control(untrusted_text[:80]) + ("…" if len(untrusted_text) > 80 else "")


def _check_size(reader: _Reader) -> None:
    # With the longest backup id and filter name that a header can have, so that the real one fits too.
    try:
        encode_message(
            Manifest(
                backup_id="x" * 128,
                format=4,
                compression_filter="x" * 32,
                qubes=tuple(qube.info for qube in reader.qubes),
                refused=tuple(reader.refused),
            )
        )
    except ProtocolViolation:
        limit = Manifest.max_size >> 20
        raise BadMetadata(f"qubes.xml describes more than the {limit} MiB that are accepted") from None


# --- The devices that are assigned to a qube ------------------------------------------------------

MAX_DEVICES = 256  #: of one qube; see ManifestQube

_ANY_DEVICE = "*"
_REQUIRED = frozenset({"1", "true", "yes", "on"})
_NOT_REQUIRED = frozenset({"0", "false", "no", "off"})
#: qubesd's AssignmentMode, as far as an assignment can be made again: is the device required? One that was
#: only attached when the person agreed (`ask-to-attach`) must not come back as one that is attached unasked.
_MODES = {"required": True, "auto-attach": False}


def read_devices(untrusted_domain: Element, warn: Callable[[str], None]) -> tuple[DeviceInfo, ...]:
    """The devices of a domain, each once: as for qubesd, the last assignment counts.

    What the model of the protocol does not accept, or what could only be given back as more than it was, is
    left out with a warning. qubesd wrote neither `required` nor `mode` at first (the device was required),
    then `required="no"`, and since R4.3 `mode="auto-attach"`. Since then an assignment may also be to one
    device only (`identity`): without it, another one in the port would be attached.
    """
    devices: dict[tuple[str, str, str], DeviceInfo] = {}
    for untrusted_bus in untrusted_domain.findall("./devices"):
        for untrusted_device in untrusted_bus.findall("./device"):
            port = (
                untrusted_bus.get("class", ""),
                untrusted_device.get("backend-domain", ""),
                untrusted_device.get("id", ""),
            )
            # An earlier one must not come to life because the last one is refused.
            devices.pop(port, None)
            device = _device(port, untrusted_device) if len(devices) < MAX_DEVICES else None
            if device is None:
                warn(f"its device {shown(':'.join(port))} cannot be restored; left out")
            else:
                devices[port] = device
    return tuple(devices.values())


def _device(untrusted_port: tuple[str, str, str], untrusted_device: Element) -> DeviceInfo | None:
    bus, backend, port = untrusted_port
    options = {option.get("name", ""): option.text or "" for option in untrusted_device.findall("./option")}
    required = _required(untrusted_device, options.pop("required", None))
    untrusted_identity = options.pop("identity", None) or untrusted_device.get("identity", _ANY_DEVICE)
    try:
        return DeviceInfo.model_validate(
            {
                "bus": bus,
                "backend": backend,
                "port": port,
                "identity": None if untrusted_identity == _ANY_DEVICE else untrusted_identity,
                "required": required,
                "options": options,
            }
        )
    except ValidationError:
        return None


def _required(untrusted_device: Element, untrusted_option: str | None) -> bool | None:
    """Does the qube not start without it? None if that is not said in a way that is known."""
    untrusted_word = untrusted_device.get("required", untrusted_option)
    if untrusted_word is None:
        return _MODES.get(untrusted_device.get("mode", "required"))
    untrusted_word = untrusted_word.strip().lower()
    if untrusted_word in _REQUIRED | _NOT_REQUIRED:
        return untrusted_word in _REQUIRED
    return None
