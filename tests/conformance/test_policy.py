"""The policy evaluator decides as the real parser does, on policies and calls that are made up at random."""

import asyncio
import importlib
import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.emulation.policy import DOM0_UUID, Policy, Qube
from tests.emulation.policy_files import PolicyError
from tests.emulation.stock_policy import STOCK_POLICY

POLICIES = 1500  #: how many are made up
CALLS = 80  #: of each
DVM_UUID, WORK_UUID = (f"{digit}1111111-2222-3333-4444-555555555555" for digit in "12")
QUBES: Mapping[str, Qube] = {
    "dom0": Qube("AdminVM", uuid=DOM0_UUID),
    "work": Qube(tags={"red"}, default_dispvm="dvm", uuid=WORK_UUID),
    "vault": Qube(tags={"blue"}, uuid="31111111-2222-3333-4444-555555555555"),
    "asleep": Qube(tags={"blue"}, running=False, uuid="41111111-2222-3333-4444-555555555555"),
    "dvm": Qube(tags={"red"}, template_for_dispvms=True, uuid=DVM_UUID),
    "no-dvm": Qube(default_dispvm="vault", uuid="51111111-2222-3333-4444-555555555555"),
    "disp1": Qube("DispVM", default_dispvm="dvm", uuid="61111111-2222-3333-4444-555555555555"),
}
DOM0 = ("dom0", "@adminvm", f"uuid:{DOM0_UUID}")
NAMES = (*QUBES, *(f"uuid:{qube.uuid}" for qube in QUBES.values()), "nobody", "uuid:" + "7" * 36, "uuid:x")
CLASSES = ("*", "@anyvm", "@adminvm", "@type:AppVM", "@type:AdminVM", "@type:DispVM", "@tag:red", "@tag:blue")
DISPOSABLES = ("@dispvm:dvm", "@dispvm:vault", "@dispvm:nobody", f"@dispvm:uuid:{DVM_UUID}")
SOURCES = (*NAMES, *CLASSES, *DISPOSABLES, "@dispvm:@tag:red")
TARGETS = (*SOURCES, "@default", "@dispvm", "@dispvm:@tag:blue")
INTENDED = (*NAMES, *DISPOSABLES, "@adminvm", "@default", "@dispvm", "")
#: One of each kind that a rule of the stock system names.
STOCK_QUBES: Mapping[str, Qube] = {
    name: Qube(klass, tags, default_dispvm="dvm", template_for_dispvms=name == "dvm", uuid=f"{number:036}")
    for number, (name, klass, tags) in enumerate(
        (
            ("dom0", "AdminVM", ()),
            ("work", "AppVM", ()),
            ("dvm", "AppVM", ()),
            ("template", "TemplateVM", ()),
            ("sys-net", "AppVM", ()),
            ("sys-whonix", "AppVM", ("anon-gateway",)),
            ("whonix", "TemplateVM", ("whonix-updatevm",)),
            ("anon", "AppVM", ("anon-vm",)),
            ("mgmt", "DispVM", ("backup-restore-mgmt",)),
            ("storage", "AppVM", ("backup-restore-storage",)),
            ("half", "AppVM", ("backup-restore-in-progress",)),
        )
    )
}
#: Lines that make a policy invalid.
MALFORMED = (
    *(("a.Service", "*", token, "vault", "allow") for token in ("@any", "@tag:", "@default", "@dispvm")),
    *(("a.Service", "*", "work", token, "allow") for token in ("@any", "@type:", "@dispvm:@x", "@dispvm:")),
    *(("a.Service", "*", "work", "vault", "allow", f"target={token}") for token in ("", "*", "@tag:x")),
    *(("a.Service", "*", "work", "vault", *action) for action in (
        ("permit",), ("deny", "target=dom0"), ("deny", "user=x"), ("allow", "default_target=dom0"),
        ("allow", "notify=maybe"), ("ask", "autostart=1"), ("allow", "user=a", "user=b"), ("allow", "x"),
        ("Allow",))),
    ("a.Service", "*", "work", "@default", "allow"),
    ("a.Service", "*", "work", "vault"),
    ("a+b", "*", "work", "vault", "allow"),
    ("a/b", "*", "work", "vault", "allow"),
    ("a", "b", "work", "vault", "allow"),
    ("a", "+/", "work", "vault", "allow"),
    ("*", "+b", "work", "vault", "allow"),
    ("!include",), ("!include", "nowhere"), ("!include", "a", "b"), ("!other",),
    ("!include-service", "a", "*"), ("!include-service", "a", "*", "nowhere"),
)  # fmt: skip
SERVICES = ("a.Service", "b.Other", "*")
ARGUMENTS = ("*", "+", "+arg", "+arg+more")
Verdict = tuple[str, str | None, frozenset[str], str | None]
DENIED: Verdict = ("deny", None, frozenset(), None)


@pytest.fixture(scope="module")
def parser(checkout: Callable[[str], Path]) -> Iterator[Any]:
    path = str(checkout("qubes-core-qrexec"))
    sys.path.insert(0, path)
    logging.disable(logging.WARNING)  # it warns of every target that is not there
    yield importlib.import_module("qrexec.policy.parser")
    logging.disable(logging.NOTSET)
    sys.path.remove(path)


def system_info(qubes: Mapping[str, Qube]) -> Any:
    """The same qubes as the real parser is told of them."""
    entries = {
        name: {
            "name": name,
            "type": qube.klass,
            "tags": list(qube.tags),
            "template_for_dispvms": qube.template_for_dispvms,
            "default_dispvm": qube.default_dispvm,
            "power_state": "Running" if qube.running else "Halted",
            "uuid": qube.uuid,
        }
        for name, qube in qubes.items()
    }
    return {"domains": entries | {f"uuid:{entry['uuid']}": entry for entry in entries.values()}}


def real_verdict(
    parser: Any,
    policy: Any,
    source: str,
    target: str,
    service: str,
    argument: str,
    qubes: Mapping[str, Qube],
) -> Verdict:
    """What comes of a call; whatever the real program stumbles over, it denies."""
    try:
        info = system_info(qubes)
        request = parser.Request(service, f"+{argument}", source, target, system_info=info)
        resolution = policy.evaluate(request)
        if isinstance(resolution, parser.AskResolution):
            choices = frozenset(by_name(target, qubes) for target in resolution.targets_for_ask)
            default = resolution.default_target
            return "ask", None, choices, default and by_name(default, qubes)
        words = dict(line.split("=", 1) for line in asyncio.run(resolution.execute()).splitlines())
        return "allow", by_name(words["target"], qubes), frozenset(), None
    except Exception:  # noqa: BLE001 # as the real program does
        return DENIED


def by_name(target: str, qubes: Mapping[str, Qube]) -> str:
    """A target by its name, if there is one: the real parser keeps the spelling."""
    prefix = "@dispvm:" if target.startswith("@dispvm:") else ""
    by_uuid = {f"uuid:{qube.uuid}": name for name, qube in qubes.items()}
    return prefix + by_uuid.get(rest := target.removeprefix(prefix), rest)


def our_verdict(
    policy: Policy, source: str, target: str, service: str, argument: str, qubes: Mapping[str, Qube]
) -> Verdict:
    decision = policy.judge(source, target, service, argument, qubes)
    if decision.action == "deny" or (decision.action == "ask" and not decision.choices):
        return DENIED
    return decision.action, decision.target, decision.choices, decision.preselected


def made_up_rule(chance: random.Random) -> str:
    service = chance.choice(SERVICES)
    argument = "*" if service == "*" else chance.choice(ARGUMENTS)
    action = chance.choice(("allow", "allow", "ask", "ask", "deny"))
    target = chance.choice(TARGETS)
    words = [service, argument, chance.choice(SOURCES), target, action]
    redirects = (*NAMES, *DISPOSABLES, "@adminvm", "@dispvm")
    if action != "deny" and (chance.random() < 0.3 or (action == "allow" and target == "@default")):
        words.append(f"target={chance.choice(redirects)}")
    if action == "ask" and chance.random() < 0.5:
        words.append(f"default_target={chance.choice(redirects)}")
    if action != "deny" and chance.random() < 0.2:
        words.append(f"autostart={chance.choice(('yes', 'no'))}")
    return "  ".join(words)


def write_policy(chance: random.Random, folder: Path) -> None:
    """One to three files, of which some include another."""
    (folder / "include").mkdir(parents=True)
    for number in range(chance.randint(1, 3)):
        lines = [made_up_rule(chance) for _ in range(chance.randint(1, 5))]
        if chance.random() < 0.3:
            (folder / "include" / f"more-{number}").write_text(made_up_rule(chance) + "\n# as a remark\n\n")
            lines.insert(chance.randint(0, len(lines)), f"!include include/more-{number}")
        if chance.random() < 0.2:
            older = made_up_rule(chance).split()[2:]
            (folder / "include" / f"old-{number}").write_text(" ".join(older).replace("@", "$") + "\n")
            lines.append(f"!include-service a.Service {chance.choice(ARGUMENTS)} include/old-{number}")
        (folder / f"{chance.randint(10, 99)}-{number}.policy").write_text("\n".join(lines) + "\n")


def test_the_stock_rules_say_what_the_files_of_the_sources_say(
    parser: Any, checkout: Callable[[str], Path], tmp_path: Path
) -> None:
    files = sorted((checkout("qubes-core-admin") / "qubes-rpc-policy").glob("[0-9]*.policy"))
    for folder in ("real", "ours"):
        (tmp_path / folder).mkdir()
    for file in files:
        (tmp_path / "real" / file.name).symlink_to(file)
        (tmp_path / "ours" / file.name).write_text(STOCK_POLICY[file.name])
    real = parser.FilePolicy(policy_path=tmp_path / "real")
    ours = Policy.load(tmp_path / "ours")
    calls = {(rule.service, (rule.argument or "+")[1:]) for rule in (*real.rules, *ours.rules)}
    assert ("qubes.VMRootShell", "") in calls
    for service, argument in sorted(calls):
        for source in STOCK_QUBES:
            for target in (*STOCK_QUBES, "@adminvm", "@default", "@dispvm", "@dispvm:dvm"):
                call = (source, target, service, argument)
                assert our_verdict(ours, *call, STOCK_QUBES) == real_verdict(parser, real, *call, STOCK_QUBES)


@pytest.mark.parametrize("words", MALFORMED, ids=" ".join)
def test_what_is_no_valid_rule_is_refused_by_both(
    parser: Any, tmp_path: Path, words: tuple[str, ...]
) -> None:
    (tmp_path / "50-x.policy").write_text("a.Service * work vault allow\n" + " ".join(words) + "\n")
    with pytest.raises(PolicyError):
        Policy.load(tmp_path)
    with pytest.raises(importlib.import_module("qrexec.exc").AccessDenied):
        parser.FilePolicy(policy_path=tmp_path)


def test_the_evaluator_decides_as_the_real_parser(parser: Any, tmp_path: Path) -> None:
    chance = random.Random(43)
    different: list[str] = []
    for number in range(POLICIES):
        folder = tmp_path / str(number)
        write_policy(chance, folder)
        real, ours = parser.FilePolicy(policy_path=folder), Policy.load(folder)
        for _ in range(CALLS):
            call = (chance.choice(tuple(QUBES)), chance.choice(INTENDED), chance.choice(SERVICES[:2]))
            argument = chance.choice(ARGUMENTS[1:])[1:]
            expected = real_verdict(parser, real, *call, argument, QUBES)
            if (verdict := our_verdict(ours, *call, argument, QUBES)) != expected:
                different.append(f"{folder}: {call} +{argument}: {verdict}, not {expected}")
    print(f"{POLICIES * CALLS} decisions, {len(different)} of them different")
    assert not different, "\n".join(different[:20])
