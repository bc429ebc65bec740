"""An evaluator of qrexec policies: may this qube call that service there?

Strategy: the first rule that matches decides; where none does, the call is denied. The semantics are those of
qubes-core-qrexec (`qrexec/policy/parser.py`), which the real dom0 runs. Not here: RemoteVMs, and which qubes
an `ask` would offer (`ask` is a decision of its own; nobody is there to answer).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from .policy_files import Action, Rule, check_token, read_policy

DOM0_UUID = "00000000-0000-0000-0000-000000000000"
#: All names of the one admin domain; to a rule they are the same.
DOM0_NAMES = frozenset({"@adminvm", "dom0", f"uuid:{DOM0_UUID}"})


@dataclass(frozen=True, slots=True)
class Qube:
    """What policies look at. `uuid` without its prefix; "" for a qube that nobody calls by it."""

    klass: str = "AppVM"
    tags: Collection[str] = frozenset()
    running: bool = True
    template_for_dispvms: bool = False
    default_dispvm: str | None = None
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """`target`: the qube (or `dom0`, `@dispvm:NAME`) to connect to, if the action is `allow`. `rule`: the one
    that decided; None if none matched, or the call itself was not valid."""

    action: Action
    target: str | None
    rule: Rule | None
    reason: str


class Policy:
    """The rules of a policy folder."""

    def __init__(self, rules: Collection[Rule]) -> None:
        self.rules = tuple(rules)

    @classmethod
    def load(cls, folder: Path) -> "Policy":
        """The policy in `folder`; raises policy_files.PolicyError."""
        return cls(read_policy(folder))

    def judge(
        self, source: str, target: str, service: str, argument: str, qubes: Mapping[str, Qube]
    ) -> Decision:
        """May `source` call `service` with `argument` (no plus before it) on `target`, as it wrote that?"""
        try:
            intended = _intended(target, qubes)
        except ValueError as error:
            return Decision("deny", None, None, str(error))
        for rule in self.rules:
            if (
                rule.service in (None, service)
                and rule.argument in (None, "+" + argument)
                and _matches(rule.source, source, None, qubes)
                and _matches(rule.target, intended, source, qubes)
            ):
                return _decide(rule, source, intended, qubes)
        return Decision("deny", None, None, "no matching rule found")


# --- Deciding --------------------------------------------------------------------------------------


def _intended(target: str, qubes: Mapping[str, Qube]) -> str:
    """The target as rules see it; raises ValueError for one that no caller may name."""
    check_token(target or "@default", "intended")
    if target in ("", "@default"):
        return "@default"
    if target.startswith("@dispvm:"):
        template = _by_name(target.removeprefix("@dispvm:"), qubes)
        if template is None or not qubes[template].template_for_dispvms:
            raise ValueError(f"not a template for dispvm: {target}")
        return "@dispvm:" + template
    if target in ("@adminvm", "@dispvm"):
        return target
    if target in DOM0_NAMES:
        return "dom0"
    return _by_name(target, qubes) or "@default"


def _matches(token: str, other: str, source: str | None, qubes: Mapping[str, Qube]) -> bool:
    """Does the token of a rule match a source, or, where `source` is given, a target that it intends?"""
    if token == "*":
        return True
    if token in DOM0_NAMES:
        return other in DOM0_NAMES
    if token == "@anyvm":
        return other not in DOM0_NAMES
    if token.startswith("@type:"):
        return other in qubes and qubes[other].klass == token.removeprefix("@type:")
    if token.startswith("@tag:"):
        return other in qubes and token.removeprefix("@tag:") in qubes[other].tags
    if token.startswith("@dispvm:"):
        return source is not None and _matches_disposable(token, other, source, qubes)
    if token.startswith("uuid:"):
        return _by_name(token, qubes) == other
    return token == other


def _matches_disposable(token: str, target: str, source: str, qubes: Mapping[str, Qube]) -> bool:
    template = _disposable(target, source, qubes)
    if template is None:
        return False
    wanted = token.removeprefix("@dispvm:")
    if wanted.startswith("@tag:"):
        qube = qubes[template]
        return qube.template_for_dispvms and wanted.removeprefix("@tag:") in qube.tags
    if target == "@dispvm":  # then the real one compares names only, not a rule's uuid
        return wanted == template
    return (_by_name(wanted, qubes) or wanted) == template


def _disposable(target: str, source: str, qubes: Mapping[str, Qube]) -> str | None:
    """The template of the disposable that `source` would get for `target`; None if that is no disposable."""
    if target == "@dispvm":
        return qubes[source].default_dispvm if source in qubes else None
    return target.removeprefix("@dispvm:") if target.startswith("@dispvm:") else None


def _decide(rule: Rule, source: str, intended: str, qubes: Mapping[str, Qube]) -> Decision:
    def denied(reason: str) -> Decision:
        return Decision("deny", None, rule, f"{reason} ({rule.place})")

    if rule.action == "deny":
        return denied("denied by policy")
    if rule.action == "ask":
        return Decision("ask", None, rule, f"nobody can be asked ({rule.place})")
    try:
        target = _intended(rule.parameters.get("target", intended), qubes)
    except ValueError as error:
        return denied(str(error))
    if target == "@default":
        return denied("allowed, but no target is specified by caller or policy")
    if target == "@dispvm":
        template = _disposable("@dispvm", source, qubes)
        if template is None:
            return denied("allowed to @dispvm, but no template for it is set")
        target = "@dispvm:" + template
    if target in DOM0_NAMES:
        target = "dom0"
    elif rule.parameters.get("autostart") == "no" and (target not in qubes or not qubes[target].running):
        return denied("denied because it would require autostart")
    if target == source:
        return denied("loopback qrexec connection not supported")
    return Decision("allow", target, rule, rule.place)


def _by_name(name_or_uuid: str, qubes: Mapping[str, Qube]) -> str | None:
    if not name_or_uuid.startswith("uuid:"):
        return name_or_uuid if name_or_uuid in qubes else None
    uuid = name_or_uuid.removeprefix("uuid:")
    return next((name for name, qube in qubes.items() if qube.uuid and qube.uuid == uuid), None)
