"""Firewall rules as qubesd reads and keeps them. Over one that is no good it stumbles, unexplained."""

import ipaddress
import string
import time

from tests.emulation.daemon.errors import StumbleError

_SAFE = frozenset(string.ascii_letters + string.digits + ":;,./-_[]")
_NAME = frozenset(string.ascii_lowercase + string.digits + "-._")
#: In the order in which they are written; the comment is the last.
_ORDER = ("action", "expire", "dsthost", "proto", "specialtarget", "dstports", "icmptype", "comment")


def parse_rules(payload: bytes) -> list[str]:
    """The rules of a request, each in its one form."""
    return [_rule(line) for line in payload.decode("ascii").splitlines()]


def current(rules: list[str]) -> list[str]:
    """Those that have not expired."""
    return [rule for rule in rules if not _expired(rule)]


def _rule(line: str) -> str:
    options, _, comment = line.partition("comment=")
    found: dict[str, str] = {}
    for option in options.strip().split(" "):
        key, equals, value = option.partition("=")
        name = "dsthost" if key in ("dst4", "dst6", "dstname") else key
        if not equals or name in found or not set(value) <= _SAFE:
            raise StumbleError(f"bad option {option!r}")
        found[name] = _option(name, value)
    if comment:
        if not set(comment) <= _SAFE | {" "}:
            raise StumbleError("strange characters comment")
        found["comment"] = f"comment={comment}"
    if "action" not in found:
        raise StumbleError("property 'action' is required")
    if "dstports" in found and found.get("proto") not in ("proto=tcp", "proto=udp"):
        raise StumbleError("dstports valid only for 'tcp' and 'udp' protocols")
    if "icmptype" in found and found.get("proto") != "proto=icmp":
        raise StumbleError("icmptype valid only for 'icmp' protocol")
    return " ".join(found[name] for name in _ORDER if name in found)


def _option(name: str, value: str) -> str:
    match name:
        case "action" if value in ("accept", "drop"):
            return f"action={value}"
        case "proto" if value in ("tcp", "udp", "icmp"):
            return f"proto={value}"
        case "specialtarget" if value == "dns":
            return "specialtarget=dns"
        case "expire" if value.isdigit():
            return f"expire={value}"
        case "icmptype" if value.isdigit() and int(value) <= 255:
            return f"icmptype={int(value)}"
        case "dstports":
            return _ports(value)
        case "dsthost":
            return _host(value)
    raise StumbleError(f"bad option {name}={value!r}")


def _ports(value: str) -> str:
    numbers = value.split("-")
    if len(numbers) > 2 or not all(number.isdigit() for number in numbers):
        raise StumbleError("bad ports")
    first, last = int(numbers[0]), int(numbers[-1])
    if not first <= last < 65536:
        raise StumbleError("Ports out of range")
    return f"dstports={first}-{last}"


def _host(value: str) -> str:
    host, slash, prefix = value.partition("/")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if slash or not set(value) <= _NAME:
            raise StumbleError("Invalid hostname") from None
        return f"dsthost={value}"
    if slash and not (prefix.isdigit() and int(prefix) <= address.max_prefixlen):
        raise StumbleError("bad prefix length")
    return f"dst{address.version}={host}/{prefix if slash else address.max_prefixlen}"


def _expired(rule: str) -> bool:
    return any(
        option.startswith("expire=") and int(option.removeprefix("expire=")) < time.time()
        for option in rule.partition("comment=")[0].split()
    )
