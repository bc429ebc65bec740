"""Features and tags: what qubesd and its extensions refuse, and what they do beside."""

import re
import string

from tests.emulation.daemon import properties
from tests.emulation.daemon.errors import AdminError, StumbleError, bad_value, denied, protocol
from tests.emulation.daemon.state import Domain, System

_PROHIBITED = (
    "deferred-netvm-original", "preload-dispvm", "preload-dispvm-completed", "preload-dispvm-in-progress",
)  # fmt: skip
_TAG = frozenset(string.ascii_letters + string.digits + "-_")


def set_feature(domain: Domain, name: str, payload: bytes) -> None:
    """Set a feature to what the client sent."""
    if not payload.isascii():
        raise protocol("Feature value contains non-ASCII characters")
    value = payload.decode("ascii")
    if not re.fullmatch(r"[a-zA-Z0-9_.-]+", name):
        raise bad_value("feature name contains illegal characters")
    if not re.fullmatch(r"[\x20-\x7E]*", value):
        raise bad_value(f"{name} value contains illegal characters")
    check_allowed(name)
    _check_service(name)
    domain.features[name] = value
    # These come after the feature has been set, and leave it set.
    if name.startswith("vm-config."):
        config = name.removeprefix("vm-config.")
        if len(config) > 52:
            raise bad_value("VM config name must not exceed 46 bytes")  # the original's number
        if not config:
            raise bad_value("Empty config name not allowed")
        if not config[0].isalpha():
            raise bad_value("Config name must start with an ASCII letter")
    _check_persist(name, value)
    if name == "service.meminfo-writer":
        if value:
            domain.properties.pop("maxmem", None)
        else:
            domain.properties["maxmem"] = 0
        del domain.features[name]


def _check_service(name: str) -> None:
    prefix, _, service = name.partition(".")
    if prefix != "service" or name == "service":
        return
    if not service:
        raise bad_value("Service name cannot be empty")
    if service in (".", ".."):
        raise bad_value('Service name cannot be "." or ".."')
    if len(service) > 48 and not service.startswith("app-dispvm."):
        raise bad_value("Service name must not exceed 48 bytes")


def _check_persist(name: str, value: str) -> None:
    prefix, _, key = name.partition(".")
    if prefix != "custom-persist" or name == "custom-persist":
        return
    if not key:
        raise bad_value("custom-persist key cannot be empty")
    if len(key) > 54:
        raise bad_value(f"custom-persist key is too long (max 54), ignoring: {key}")
    if value.startswith("/"):
        return
    kind, *rest = value.split(":")
    if len(rest) < 4 or not rest[3].startswith("/"):
        raise bad_value(f"invalid value format: '{value}'")
    if kind not in ("file", "dir"):
        raise bad_value(f"invalid resource type option '{kind}' in value '{value}'")
    try:
        is_mode = 0 <= int(rest[2], 8) <= 0o7777
    except ValueError:
        is_mode = False
    if not is_mode:
        raise bad_value(f"invalid mode option '{rest[2]}' in value '{value}'")


def remove_feature(domain: Domain, name: str) -> None:
    check_allowed(name)
    if name not in domain.features:
        raise missing_feature(domain, name)
    del domain.features[name]


def check_allowed(name: str) -> None:
    if name in _PROHIBITED:
        raise denied("changing this feature is prohibited")


def missing_feature(domain: Domain, name: str) -> AdminError:
    return AdminError("QubesFeatureNotFoundError", f"Feature not set for domain {domain.name}: {name}")


def check_tag(tag: str) -> None:
    if not set(tag) <= _TAG:
        raise denied("disallowed characters")


def add_tag(system: System, domain: Domain, tag: str) -> None:
    """Add a tag; a tag that names a creator brings those that the creator gives to what it creates."""
    if tag in domain.tags:
        return
    domain.tags.add(tag)
    if tag.startswith("created-by-"):
        creator = system.domains.get(tag.removeprefix("created-by-"))
        if creator is None:
            raise StumbleError(f"no such creator: {tag}")
        domain.tags.update(creator.features.get("tag-created-vm-with", "").split())


def follow_reference(system: System, domain: Domain, reference: str) -> None:
    """Give a qube the tag that names its `guivm` or `audiovm`, and take those that name others."""
    if reference in system.table[domain.klass]:
        domain.tags -= {tag for tag in domain.tags if tag.startswith(f"{reference}-")}
        if (name := properties.read(system, domain, reference)) is not None:
            domain.tags.add(f"{reference}-{name}")


def remove_tag(domain: Domain, tag: str) -> None:
    if tag not in domain.tags:
        raise AdminError("QubesTagNotFoundError", f"Tag not set for domain {domain.name}: {tag}")
    domain.tags.remove(tag)
