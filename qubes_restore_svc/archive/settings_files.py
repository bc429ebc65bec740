"""The small files in a qube's directory that a restore reads: firewall.xml, notes.txt, the menu list.

Strategy: each file is read whole (MAX_SETTINGS_FILE bounds it), checked to its last element, and
becomes values of the session protocol, or it is an error. In a firewall a rule that is not understood
to the last letter is an error too: a condition lost from an accepting rule, or a dropping rule lost
from the list, would bring the qube back more open than it was. An error says which rule and
which of its fields, never what stood there.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from xml.etree.ElementTree import Element

from pydantic import TypeAdapter, ValidationError

from qubes_restore_svc.archive.xml_tree import parse_xml
from qubes_restore_svc.errors import BadMetadata
from qubes_restore_svc.wire.messages import FirewallRule
from qubes_restore_svc.wire.names import MAX_NOTES, AppmenuName, Notes

MAX_SETTINGS_FILE = 1 << 20  #: bytes
MAX_RULES = 4096
MAX_APPMENUS = 4096
MAX_COMMENT = 255  #: characters of a rule's comment; what is longer is cut, as no packet depends on it


def parse_firewall(untrusted_xml: bytes) -> tuple[FirewallRule, ...]:
    """The rules of firewall.xml, in order; values as the file spells them. Version 2 is that of R4.0 and
    later, version 1 that of R3.2 and earlier.

    A packet that no rule matches is dropped. So without any rule, everything is dropped. `dsthost` holds
    addresses and networks too. Raises BadMetadata for everything that qubesd would not have
    written or could not load.
    """
    root = parse_xml(untrusted_xml, "firewall.xml", MAX_SETTINGS_FILE)
    if root.tag in _ROOTS_1 and root.get("version", "1") == "1":
        return _version_1(root)
    if root.tag != "firewall" or root.get("version") != "2":
        raise BadMetadata("firewall.xml is not a list of rules of version 2")
    if root.keys() != ["version"]:
        raise BadMetadata("firewall.xml has attributes that no firewall of version 2 has")
    lists = _children(root, "rules", "the list")
    if len(lists) != 1:
        raise BadMetadata(f"firewall.xml holds {len(lists)} lists of rules instead of one")
    rules = _children(lists[0], "rule", "the list")
    if len(rules) > MAX_RULES:
        raise BadMetadata(f"firewall.xml holds {len(rules)} rules; at most {MAX_RULES} are accepted")
    return tuple(_rule(rule, f"rule {number}") for number, rule in enumerate(rules, 1))


def parse_notes(untrusted: bytes) -> str:
    """The text of notes.txt, at most MAX_NOTES bytes in UTF-8; lines end in line feeds.

    Bytes that are not UTF-8, and characters that could steer a terminal, become U+FFFD. Raises
    BadMetadata if the text is too long, as qubesd would not take it.
    """
    _check_size(untrusted, "notes.txt")
    text = untrusted.decode("utf-8-sig", "replace").replace("\r\n", "\n").replace("\r", "\n")
    try:
        return _NOTES.validate_python(text)
    except ValidationError:
        raise BadMetadata(f"notes.txt has more than {MAX_NOTES} bytes of text") from None


def parse_appmenus(untrusted: bytes) -> tuple[str, ...]:
    """The menu entries of whitelisted-appmenus.list: one on a line, empty lines left out.

    Raises BadMetadata if a line is not the name of a .desktop file, or if there are too many.
    """
    _check_size(untrusted, "the menu list")
    entries: list[str] = []
    for number, untrusted_line in enumerate(untrusted.split(b"\n"), 1):
        try:
            entry = untrusted_line.decode("ascii").strip()
            if entry:
                entries.append(_APPMENU_NAME.validate_python(entry))
        except (UnicodeDecodeError, ValidationError):
            raise BadMetadata(f"line {number} of the menu list is not the name of a menu entry") from None
        if len(entries) > MAX_APPMENUS:
            raise BadMetadata(f"the menu list has more than {MAX_APPMENUS} entries")
    return tuple(entries)


_NOTES: TypeAdapter[str] = TypeAdapter(Notes)
_APPMENU_NAME: TypeAdapter[str] = TypeAdapter(AppmenuName)


def _check_size(untrusted: bytes, what: str) -> None:
    if len(untrusted) > MAX_SETTINGS_FILE:
        raise BadMetadata(f"{what} has {len(untrusted)} bytes; at most {MAX_SETTINGS_FILE} are accepted")


# --- Firewall rules ----------------------------------------------------------------------------------


def _rule(element: Element, where: str) -> FirewallRule:
    holders = _children(element, "properties", where)
    if len(holders) != 1:
        raise BadMetadata(f"{where} in firewall.xml holds {len(holders)} sets of properties instead of one")
    fields: dict[str, str] = {}
    for name, value in _properties(holders[0], where):
        if name in fields:
            raise BadMetadata(f"{where} in firewall.xml says {name} twice")
        fields[name] = value
    return _checked(fields, where)


def _checked(fields: dict[str, str], where: str) -> FirewallRule:
    """The rule, if qubesd would accept it. Raises BadMetadata."""
    for name, value in fields.items():
        if not _FIELDS[name](value):
            raise BadMetadata(f"{where} in firewall.xml has a value of {name} that Qubes does not know")
    _check_together(fields, where)
    if "comment" in fields:
        fields["comment"] = fields["comment"][:MAX_COMMENT]
    try:
        return FirewallRule.model_validate(fields)
    except ValidationError as error:
        name = next((str(part["loc"][0]) for part in error.errors() if part["loc"]), "what it says")
        raise BadMetadata(f"{where} in firewall.xml has a value of {name} that is not accepted") from None


def _properties(holder: Element, where: str) -> Iterator[tuple[str, str]]:
    for element in _children(holder, "property", where):
        name = element.get("name", "")
        if name not in _FIELDS:
            raise BadMetadata(f"{where} in firewall.xml has a property that no rule has")
        # A comment inside the text is an element too: what qubesd would read only half is not taken.
        if len(element) or not element.text:
            raise BadMetadata(f"{where} in firewall.xml does not have plain text for {name}")
        yield name, element.text


def _check_together(fields: dict[str, str], where: str) -> None:
    """What qubesd demands of the fields of one rule together."""
    if "action" not in fields:
        raise BadMetadata(f"{where} in firewall.xml has no action")
    if "dstports" in fields and fields.get("proto") not in ("tcp", "udp"):
        raise BadMetadata(f"{where} in firewall.xml has dstports, but proto is neither tcp nor udp")
    if "icmptype" in fields and fields.get("proto") != "icmp":
        raise BadMetadata(f"{where} in firewall.xml has icmptype, but proto is not icmp")
    if len({"dsthost", "dst4", "dst6"} & fields.keys()) > 1:
        raise BadMetadata(f"{where} in firewall.xml has more than one of dsthost, dst4 and dst6")


def _children(element: Element, tag: str, where: str) -> list[Element]:
    """The children of `element`, if all are `tag` with only a name and only white space between them."""
    children = list(element)
    texts = [element.text, *(child.tail for child in children)]
    if any(child.tag != tag for child in children) or any(text and text.strip() for text in texts):
        raise BadMetadata(f"{where} in firewall.xml holds something else than {tag} elements")
    attributes = ["name"] if tag == "property" else []
    if any(child.keys() != attributes for child in children):
        raise BadMetadata(f"{where} in firewall.xml has a {tag} with other attributes than Qubes writes")
    return children


# --- Version 1 -----------------------------------------------------------------------------------------

_ROOTS_1 = frozenset({"QubesFirewallRules", "QubesFirwallRules", "firewall"})
_ROOT_1 = frozenset({"version", "policy", "dns", "icmp", "yumProxy"})
_RULE_1 = frozenset({"address", "netmask", "proto", "port", "toport", "expire"})


def _version_1(root: Element) -> tuple[FirewallRule, ...]:
    """Rules that all do the opposite of the policy, with DNS and ICMP before them, and the policy behind.

    The old word for what updates may reach (`yumProxy`) has no rule today: a template reaches its updates
    through qrexec.
    """
    policy = root.get("policy")
    if policy not in ("allow", "deny") or set(root.keys()) - _ROOT_1:
        raise BadMetadata("firewall.xml does not have the policy of a firewall of version 1")
    rules = list(root)
    if any(rule.tag != "rule" or len(rule) or set(rule.keys()) - _RULE_1 for rule in rules):
        raise BadMetadata("firewall.xml holds something else than rules of version 1")
    if len(rules) > MAX_RULES - 3:
        raise BadMetadata(f"firewall.xml holds {len(rules)} rules; at most {MAX_RULES - 3} are accepted")
    action, opposite = ("accept", "drop") if policy == "allow" else ("drop", "accept")
    fields: list[dict[str, str]] = [
        {"action": _action_1(root, "dns", policy), "specialtarget": "dns"},
        {"action": _action_1(root, "icmp", policy), "proto": "icmp"},
    ]
    fields += [{"action": opposite} | _rule_1(rule, f"rule {number}") for number, rule in enumerate(rules, 1)]
    fields.append({"action": action})
    return tuple(_checked(rule, f"rule {number - 2}") for number, rule in enumerate(fields, 1))


def _action_1(root: Element, key: str, policy: str) -> str:
    word = root.get(key, policy)
    if word not in ("allow", "deny"):
        raise BadMetadata(f"firewall.xml has a value of {key} that Qubes does not know")
    return "accept" if word == "allow" else "drop"


def _rule_1(rule: Element, where: str) -> dict[str, str]:
    """The fields of a rule in the words of version 2, its action apart."""
    fields: dict[str, str] = {}
    address, port, proto = rule.get("address"), rule.get("port"), rule.get("proto")
    if address:
        netmask = rule.get("netmask", "32")
        if not _PREFIX.fullmatch(netmask):
            raise BadMetadata(f"{where} in firewall.xml has a value of netmask that Qubes does not know")
        # A host name has no mask: the old Qubes wrote 32 behind it.
        fields["dsthost"] = f"{address}/{netmask}" if _is_network(address, (4,)) else address
    if port:
        fields["dstports"] = f"{port}-{rule.get('toport') or port}"
        proto = proto or "tcp"
    if proto and proto != "any":
        fields["proto"] = proto
    if expire := rule.get("expire"):
        fields["expire"] = expire
    return fields


# --- The value sets of qubesd's firewall module --------------------------------------------------------

_HOST_NAME = re.compile(r"[a-z0-9._-]{1,255}")
_PREFIX = re.compile(r"[0-9]{1,3}")
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_ICMP_TYPE = re.compile(r"[0-9]{1,3}")
_EXPIRE = re.compile(r"[0-9]{1,12}")
_COMMENT = re.compile(r"[A-Za-z0-9:;,./_\[\] -]*")
#: Seconds since 1970 on the last day of the year 9999: qubesd knows no later time.
_MAX_EXPIRE = 253_402_214_400


def _is_network(untrusted_value: str, versions: tuple[int, ...]) -> bool:
    """An address, alone or with the length of a prefix; the bits behind the prefix may be set."""
    address, slash, prefix = untrusted_value.partition("/")
    # Not a dotted mask, and not the zone that Python allows in an IPv6 address.
    if (slash and not _PREFIX.fullmatch(prefix)) or "%" in address:
        return False
    try:
        return ipaddress.ip_interface(untrusted_value).version in versions
    except ValueError:
        return False


def _is_host(untrusted_value: str) -> bool:
    return _is_network(untrusted_value, (4, 6)) or bool(_HOST_NAME.fullmatch(untrusted_value))


def _is_ports(untrusted_value: str) -> bool:
    match = _PORTS.fullmatch(untrusted_value)
    if match is None:
        return False
    first, last = int(match[1]), int(match[2] or match[1])
    return first <= last <= 65535


_FIELDS: dict[str, Callable[[str], bool]] = {
    "action": lambda value: value in ("accept", "drop"),
    "proto": lambda value: value in ("tcp", "udp", "icmp"),
    "dsthost": _is_host,
    "dst4": lambda value: _is_network(value, (4,)),
    "dst6": lambda value: _is_network(value, (6,)),
    "dstports": _is_ports,
    "icmptype": lambda value: bool(_ICMP_TYPE.fullmatch(value)) and int(value) <= 255,
    "specialtarget": lambda value: value == "dns",
    "expire": lambda value: bool(_EXPIRE.fullmatch(value)) and int(value) <= _MAX_EXPIRE,
    "comment": lambda value: bool(_COMMENT.fullmatch(value)),
}
