"""How a qube whose volumes are all there gets its settings.

Strategy: one setting after the other, each with its own outcome. What cannot be set becomes a remark, for a
qube without one of its features is worth more than none. The network is the exception: it comes last, and
only over a firewall that stands, so that a setting which fails never makes a qube reach more than it should.
"""

from collections.abc import Callable, Sequence
from typing import ParamSpec

from qubes_restore_svc.broker.host import Definition
from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.wire.messages import FirewallRule, QubeSettings

#: Most remarks on one qube; past that, only their number is told.
MAX_REMARKS = 40

#: The feature that holds the qube's menu entries, separated by spaces.
MENU_FEATURE = "menu-items"

#: Lets nothing through. qubesd takes no empty list of rules; what no rule matches is dropped.
DROP_ALL = ("action=drop",)

#: The parts of a rule as qubesd reads them; the comment, which may hold spaces, has to be the last.
_RULE_KEYS = (
    "action", "proto", "dsthost", "dst4", "dst6", "dstports", "icmptype", "specialtarget", "expire",
    "comment",
)  # fmt: skip

_Arguments = ParamSpec("_Arguments")


def apply_settings(
    system: QubesSystem, name: str, settings: QubeSettings, definition: Definition
) -> tuple[str, ...]:
    """Give the qube `name`, which has no netvm, its settings; brings clauses on what could not be set."""
    return _Settings(system, name).apply(settings, definition)


def rule_text(rule: FirewallRule) -> str:
    """The rule as qubesd reads it. Whether it makes sense is for qubesd to say."""
    values = rule.model_dump(exclude_none=True)
    return " ".join(f"{key}={values[key]}" for key in _RULE_KEYS if key in values)


class _Settings:
    """The settings of one qube while they are applied; `remarks` tells what was not."""

    def __init__(self, system: QubesSystem, name: str) -> None:
        self._system = system
        self._name = name
        self._remarks: list[str] = []

    def apply(self, settings: QubeSettings, definition: Definition) -> tuple[str, ...]:
        system, name = self._system, self._name
        for key, value in definition.properties.items():
            self._attempt(system.set_property, name, key, value)
        for key, value in definition.features.items():
            self._attempt(system.set_feature, name, key, value)
        for tag in definition.tags:
            self._attempt(system.add_tag, name, tag)
        for device in definition.devices:
            self._attempt(system.assign_device, name, device)
        if settings.notes:
            self._attempt(system.set_notes, name, settings.notes)
        if settings.appmenus:
            self._set_menu(settings.appmenus)
        if definition.default_dispvm is not None:
            dispvm = definition.default_dispvm
            if not self._attempt(system.set_default_dispvm, name, dispvm) and dispvm:
                self._attempt(system.set_default_dispvm, name, "")
        is_guarded = self._set_firewall(settings.firewall)
        if definition.netvm != "":
            self._connect(definition.netvm, is_guarded)
        return self._worth_reading()

    def _attempt(
        self,
        action: Callable[_Arguments, None],
        *arguments: _Arguments.args,
        **keywords: _Arguments.kwargs,
    ) -> bool:
        try:
            action(*arguments, **keywords)
        except HostFailed as error:
            self._remarks.append(error.reason)
            return False
        return True

    def _set_menu(self, entries: Sequence[str]) -> None:
        # The feature is a list separated by spaces, so a name that has one cannot stand in it.
        fitting = [entry for entry in entries if " " not in entry]
        if len(fitting) < len(entries):
            lost = len(entries) - len(fitting)
            self._remarks.append(f"{lost} menu entries have names that no menu can hold")
        self._attempt(self._system.set_feature, self._name, MENU_FEATURE, " ".join(fitting))

    def _set_firewall(self, rules: Sequence[FirewallRule] | None) -> bool:
        """Whether the qube may be connected. No rules at all in the backup: the default, accept."""
        if rules is None:
            return True
        try:
            self._system.set_firewall(self._name, [rule_text(rule) for rule in rules] or DROP_ALL)
        except HostFailed as error:
            refused = error.reason
        else:
            return True
        if not self._attempt(self._system.set_firewall, self._name, DROP_ALL):
            return False
        self._remarks.append(
            f"its firewall lets nothing through now, because its rules were not accepted ({refused});"
            " set them with qvm-firewall"
        )
        return True

    def _connect(self, netvm: str | None, is_guarded: bool) -> None:
        if not is_guarded:
            self._remarks.append("it has no netvm, because its firewall could not be set")
        elif not self._attempt(self._system.set_property, self._name, "netvm", netvm):
            self._remarks.append("it has no netvm")

    def _worth_reading(self) -> tuple[str, ...]:
        # The last ones are on the firewall and the netvm, which matter most.
        more = len(self._remarks) - MAX_REMARKS
        if more <= 0:
            return tuple(self._remarks)
        return (*self._remarks[: MAX_REMARKS - 10], f"{more} more settings failed", *self._remarks[-10:])
