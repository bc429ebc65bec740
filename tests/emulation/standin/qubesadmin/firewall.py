"""Firewall rules, and a qube's list of them.

An option that is no good is a `ValueError` here, before qubesd sees it; qubesd is stricter than this in some
points (ports, comments), as in the original, and does not say why it refuses.
"""

import datetime
import socket
import string
import typing
from typing import SupportsInt

if typing.TYPE_CHECKING:
    from qubesadmin.vm import QubesVM


class RuleOption:
    """One element of a rule."""

    def __init__(self, value: object) -> None:
        self._value = str(value)

    @property
    def rule(self) -> str | None:
        """As the Admin API writes it; None: it limits nothing and is left out."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self._value

    def __eq__(self, other: object) -> bool:
        return str(self) == other

    def __hash__(self) -> int:
        return hash(self._value)


class RuleChoice(RuleOption):
    """An element that has one of a few values, which are attributes of its class."""

    _key: typing.ClassVar[str]

    def __init__(self, value: object) -> None:
        super().__init__(value)
        choices = [text for name, text in vars(type(self)).items() if not name.startswith("_")]
        if value not in choices:
            raise ValueError(value)

    @property
    def rule(self) -> str:
        return f"{self._key}={self}"


class Action(RuleChoice):
    _key = "action"
    accept = "accept"
    drop = "drop"


class Proto(RuleChoice):
    _key = "proto"
    tcp = "tcp"
    udp = "udp"
    icmp = "icmp"


class SpecialTarget(RuleChoice):
    _key = "specialtarget"
    dns = "dns"


class DstHost(RuleOption):
    """An IPv4 or IPv6 address or network, or a DNS name."""

    def __init__(self, value: str, prefixlen: int | None = None) -> None:
        host, slash, prefix = value.partition("/")
        if "/" in prefix:
            raise ValueError(f"Too many /: {value}")
        family = _address_family(host)
        if family is None:
            if slash:
                raise ValueError(f"Invalid IP address: {host}")
            if not set(value) <= set(string.ascii_lowercase + string.digits + "-._"):
                raise ValueError("Invalid hostname")
            self.type, self.prefixlen = "dsthost", 0
            super().__init__(value)
            return
        longest = 32 if family == socket.AF_INET else 128
        self.type = "dst4" if family == socket.AF_INET else "dst6"
        self.prefixlen = int(prefix) if slash else longest if prefixlen is None else prefixlen
        if not 0 <= self.prefixlen <= longest:
            raise ValueError(f"netmask for IPv{4 if longest == 32 else 6} must be <= {longest}")
        super().__init__(value if slash else f"{host}/{self.prefixlen}")

    @property
    def rule(self) -> str | None:
        return None if self.prefixlen == 0 and self.type != "dsthost" else f"{self.type}={self}"


class DstPorts(RuleOption):
    """A port, or a range of ports."""

    def __init__(self, value: int | str) -> None:
        numbers = [int(number) for number in str(value).split("-")]
        if len(numbers) > 2:
            raise ValueError(value)
        self.range = [numbers[0], numbers[-1]]
        if any(port < 0 or port > 65536 for port in self.range):
            raise ValueError("Ports out of range")
        if self.range[0] > self.range[1]:
            raise ValueError("Invalid port range")
        super().__init__("-".join(str(port) for port in dict.fromkeys(self.range)))

    @property
    def rule(self) -> str:
        return f"dstports={self.range[0]}-{self.range[1]}"


class IcmpType(RuleOption):
    def __init__(self, value: SupportsInt | str) -> None:
        super().__init__(value)
        if not 0 <= int(value) <= 255:
            raise ValueError("ICMP type out of range")

    @property
    def rule(self) -> str:
        return f"icmptype={self}"


class Expire(RuleOption):
    """The moment, in seconds since the epoch, from which on the rule is gone."""

    def __init__(self, value: SupportsInt | str) -> None:
        super().__init__(value)
        self.datetime = datetime.datetime.fromtimestamp(int(value), datetime.UTC)

    @property
    def rule(self) -> str:
        return f"expire={self}"

    @property
    def expired(self) -> bool:
        return self.datetime < datetime.datetime.now(datetime.UTC)


class Comment(RuleOption):
    @property
    def rule(self) -> str:
        return f"comment={self}"


_CLASSES: dict[str, type[RuleOption]] = {
    "action": Action,
    "proto": Proto,
    "dsthost": DstHost,
    "dstports": DstPorts,
    "icmptype": IcmpType,
    "specialtarget": SpecialTarget,
    "expire": Expire,
    "comment": Comment,
}
_NEEDS_PROTO = {"dstports": ("tcp", "udp"), "icmptype": ("icmp",)}


class Rule:
    """One rule, from its line in the Admin API or from keywords; keywords win."""

    def __init__(self, rule: str | None, **kwargs: object) -> None:
        elements: dict[str, object] = {}
        if rule is not None:
            options, _, comment = rule.partition("comment=")
            elements = {key: value for key, _, value in (o.partition("=") for o in options.split(" ") if o)}
            if comment:
                elements["comment"] = comment
        elements.update(kwargs)
        self._options: dict[str, RuleOption] = {}
        for name in ("action", "proto", "dsthost", "dst4", "dst6", *list(_CLASSES)[3:]):
            if (value := elements.pop(name, None)) is not None:
                self._set("dsthost" if name in ("dst4", "dst6") else name, value)
        if elements:
            raise ValueError(f"Unknown rule elements: {elements!r}")
        if "action" not in self._options:
            raise ValueError("missing action=")

    @property
    def rule(self) -> str:
        """Its line in the Admin API, the comment last."""
        texts = [self._options[name].rule for name in _CLASSES if name in self._options]
        return " ".join(text for text in texts if text is not None)

    @property
    def action(self) -> RuleOption | None:
        return self._options.get("action")

    @property
    def proto(self) -> RuleOption | None:
        return self._options.get("proto")

    @property
    def dsthost(self) -> RuleOption | None:
        return self._options.get("dsthost")

    @property
    def dstports(self) -> RuleOption | None:
        return self._options.get("dstports")

    @property
    def icmptype(self) -> RuleOption | None:
        return self._options.get("icmptype")

    @property
    def specialtarget(self) -> RuleOption | None:
        return self._options.get("specialtarget")

    @property
    def expire(self) -> RuleOption | None:
        return self._options.get("expire")

    @property
    def comment(self) -> RuleOption | None:
        return self._options.get("comment")

    def _set(self, name: str, value: object) -> None:
        protos = _NEEDS_PROTO.get(name)
        if protos and self._options.get("proto") not in protos:
            names = " and ".join(repr(proto) for proto in protos)
            raise ValueError(f"{name} valid only for {names} protocol{'s' * (len(protos) > 1)}")
        kind = _CLASSES[name]
        # The classes check their argument themselves, whatever it is.
        self._options[name] = value if isinstance(value, kind) else kind(value)

    def __eq__(self, other: object) -> bool:
        return self.rule == other.rule if isinstance(other, Rule) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.rule)

    def __repr__(self) -> str:
        return f"Rule({self.rule!r})"


class Firewall:
    """A qube's rules: loaded once, saved on assignment or by `save_rules`."""

    def __init__(self, vm: "QubesVM") -> None:
        self.vm = vm
        self._rules: list[Rule] | None = None

    def load_rules(self) -> None:
        answer = self.vm.qubesd_call(None, "admin.vm.firewall.Get").decode()
        self._rules = [Rule(line) for line in answer.splitlines()]

    @property
    def rules(self) -> list[Rule]:
        if self._rules is None:
            self.load_rules()
        assert self._rules is not None
        return self._rules

    @rules.setter
    def rules(self, value: list[Rule]) -> None:
        self.save_rules(value)
        self._rules = value

    def save_rules(self, rules: list[Rule] | None = None) -> None:
        """Replace the qube's rules. That there are none at all is refused by qubesd."""
        lines = "".join(f"{rule.rule}\n" for rule in (self._rules or [] if rules is None else rules))
        self.vm.qubesd_call(None, "admin.vm.firewall.Set", payload=lines.encode("ascii"))

    @property
    def policy(self) -> Action:
        return Action("drop")


def _address_family(host: str) -> socket.AddressFamily | None:
    for family in (socket.AF_INET6, socket.AF_INET):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return family
    return None
