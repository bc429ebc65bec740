"""An evaluator of qrexec policies: may this qube call that service there?

Strategy: the first rule that matches decides; where none does, the call is denied. The semantics are those of
qubes-core-qrexec (`qrexec/policy/parser.py`), which the real dom0 runs. `ask` is a decision of its own: it
comes with what a person could choose from, and `answer` says what comes of a choice. Not here: RemoteVMs, and
that an `ask` offers no qube with the feature `internal`.
"""

from collections.abc import Collection, Iterator, Mapping
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
    that decided; None if none matched, or the call itself was not valid. If the action is `ask`: `choices`
    are the targets to choose from (with none, nobody is asked); `preselected` is one of them, or None."""

    action: Action
    target: str | None
    rule: Rule | None
    reason: str
    choices: frozenset[str] = frozenset()
    preselected: str | None = None


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
        rules = self._rules_for(source, service, argument, qubes)
        for rule in rules:
            if _matches(rule.target, intended, source, qubes):
                if rule.action == "ask":
                    return _ask(rule, rules, source, qubes)
                return _decide(rule, source, intended, qubes)
        return Decision("deny", None, None, "no matching rule found")

    def _rules_for(
        self, source: str, service: str, argument: str, qubes: Mapping[str, Qube]
    ) -> tuple[Rule, ...]:
        """The rules that could match, whatever the target."""
        return tuple(
            rule
            for rule in self.rules
            if rule.service in (None, service)
            and rule.argument in (None, "+" + argument)
            and _matches(rule.source, source, None, qubes)
        )


def answer(question: Decision, chosen: str | None) -> Decision:
    """What comes of an `ask` if a person chooses this target; None stands for no."""
    place = question.rule.place if question.rule else ""
    if chosen is None:
        return Decision("deny", None, question.rule, f"denied by the user ({place})")
    if chosen not in question.choices:
        return Decision("deny", None, question.rule, f"not a valid choice: {chosen} ({place})")
    return Decision("allow", chosen, question.rule, place)


def requested_target(target: str, qubes: Mapping[str, Qube]) -> tuple[str, str]:
    """What a service of dom0 is told of the target that its caller named: ("name", "dom0") or ("keyword",
    "adminvm"); a qube that is not there is the keyword `default`. Raises ValueError as `judge` would deny."""
    known = _intended(target, qubes)
    return ("keyword", known[1:]) if known.startswith("@") else ("name", known)


# --- Deciding --------------------------------------------------------------------------------------


def _intended(target: str, qubes: Mapping[str, Qube]) -> str:
    """The target as rules see it, in its own spelling; raises ValueError for one that no caller may name."""
    check_token(target or "@default", "intended")
    if target in ("", "@default"):
        return "@default"
    if target.startswith("@dispvm:"):
        template = _by_name(target.removeprefix("@dispvm:"), qubes)
        if template is None or not qubes[template].template_for_dispvms:
            raise ValueError(f"not a template for dispvm: {target}")
        return target
    known = target == "@dispvm" or target in DOM0_NAMES or _by_name(target, qubes)
    return target if known else "@default"


def _matches(token: str, other: str, source: str | None, qubes: Mapping[str, Qube]) -> bool:
    """Does the token of a rule match a source, or, where `source` is given, a target that it intends?"""
    if token == "*":
        return True
    if token in DOM0_NAMES:
        return other in DOM0_NAMES
    if token == "@anyvm":
        return other not in DOM0_NAMES
    if token.startswith(("@type:", "@tag:")):
        name = _by_name(other, qubes)
        kind, _, value = token.partition(":")
        return name is not None and value in ((qubes[name].klass,) if kind == "@type" else qubes[name].tags)
    if token.startswith("@dispvm:"):
        return source is not None and _matches_disposable(token, other, source, qubes)
    return _same(token, other, qubes)


def _same(token: str, other: str, qubes: Mapping[str, Qube]) -> bool:
    """Do two spellings name the same? Of a name and a uuid, the qube that has both decides."""
    if token.startswith("uuid:") == other.startswith("uuid:"):
        return token == other
    name = _by_name(token, qubes)
    return name is not None and name == _by_name(other, qubes)


def _matches_disposable(token: str, target: str, source: str, qubes: Mapping[str, Qube]) -> bool:
    template = _disposable(target, source, qubes)
    if template is None:
        return False
    wanted = token.removeprefix("@dispvm:")
    if wanted.startswith("@tag:"):
        qube = qubes[_by_name(template, qubes) or template]
        return qube.template_for_dispvms and wanted.removeprefix("@tag:") in qube.tags
    if target == "@dispvm":  # then the real one compares names only, not a rule's uuid
        return wanted == template
    return _same(wanted, template, qubes)


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
    if target == "@adminvm":
        target = "dom0"
    if rule.parameters.get("autostart") == "no" and not _runs(target, qubes):
        return denied("denied because it would require autostart")
    if target == source:  # the original compares them as they are spelled
        return denied("loopback qrexec connection not supported")
    return Decision("allow", _resolved(target, qubes), rule, rule.place)


def _runs(target: str, qubes: Mapping[str, Qube]) -> bool:
    name = _by_name(target, qubes)
    return target in DOM0_NAMES or (name is not None and qubes[name].running)


def _resolved(target: str, qubes: Mapping[str, Qube]) -> str:
    """By its name, whatever it was spelled like."""
    if target in DOM0_NAMES:
        return "dom0"
    prefix = "@dispvm:" if target.startswith("@dispvm:") else ""
    name = target.removeprefix(prefix)
    return prefix + (_by_name(name, qubes) or name)


# --- Asking ----------------------------------------------------------------------------------------


def _ask(rule: Rule, rules: Collection[Rule], source: str, qubes: Mapping[str, Qube]) -> Decision:
    """The question that a rule asks; `rules` are all that could match, whatever the target."""
    redirect, default = rule.parameters.get("target"), rule.parameters.get("default_target")
    if redirect is not None:
        choices = {"dom0" if redirect in DOM0_NAMES else redirect}
    else:
        try:
            choices = _offered(rules, source, qubes)
        except LookupError as error:
            return Decision("deny", None, rule, f"{error} ({rule.place})")
    if rule.parameters.get("autostart") == "no":
        choices = {target for target in choices if _runs(target, qubes)}
    if default == "@dispvm":
        template = _disposable("@dispvm", source, qubes)
        default = template and f"@dispvm:{template}"
    elif default in DOM0_NAMES:
        default = "dom0"
    preselected = _resolved(default, qubes) if default is not None and default in choices else None
    offered = frozenset(_resolved(target, qubes) for target in choices)
    return Decision("ask", None, rule, f"to be asked ({rule.place})", offered, preselected)


def _offered(rules: Collection[Rule], source: str, qubes: Mapping[str, Qube]) -> set[str]:
    """Every target that the rules leave, the last rule first, so that an earlier one has the last word."""
    offered: set[str] = set()
    for rule in reversed([*rules]):
        expansion = set(_expand(rule.parameters.get("target", rule.target), qubes))
        offered = offered - expansion if rule.action == "deny" else offered | expansion
    if "@dispvm" in offered and (template := _disposable("@dispvm", source, qubes)):
        offered.add(f"@dispvm:{template}")
    if "@adminvm" in offered:
        offered.add("dom0")
    return offered - {"@dispvm", "@adminvm", source}


def _expand(token: str, qubes: Mapping[str, Qube]) -> Iterator[str]:
    """All targets that the token of a rule stands for."""
    if token in ("*", "@anyvm"):
        yield from (name for name in qubes if token == "*" or name not in DOM0_NAMES)
        yield from (f"@dispvm:{name}" for name, qube in qubes.items() if qube.template_for_dispvms)
        yield "@dispvm"
    elif token in ("@adminvm", "@dispvm"):
        yield token
    elif token.startswith(("@type:", "@tag:")):
        yield from (name for name in qubes if _matches(token, name, None, qubes))
    elif token.startswith("@dispvm:"):
        wanted = token.removeprefix("@dispvm:")
        if not wanted.startswith("@tag:") and _by_name(wanted, qubes) is None:
            raise LookupError(f"the original stumbles over {token}, which is not there")
        templates = (f"@dispvm:{name}" for name, qube in qubes.items() if qube.template_for_dispvms)
        yield from (target for target in templates if _matches_disposable(token, target, "", qubes))
    elif name := _by_name(token, qubes):
        yield name


def _by_name(name_or_uuid: str, qubes: Mapping[str, Qube]) -> str | None:
    if not name_or_uuid.startswith("uuid:"):
        return name_or_uuid if name_or_uuid in qubes else None
    uuid = name_or_uuid.removeprefix("uuid:")
    return next((name for name, qube in qubes.items() if qube.uuid and qube.uuid == uuid), None)
