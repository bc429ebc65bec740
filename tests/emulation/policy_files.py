"""Reads a folder of qrexec policies into a list of rules.

Strategy: the files in the order of their names, line by line; includes are read where they stand. What is no
valid policy is refused as a whole, as qrexec refuses it: nothing may be called then. The language's rules are
those of qubes-core-qrexec (`qrexec/policy/parser.py`), without `!include-dir` and `!compat-4.0`.
"""

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Action = Literal["allow", "deny", "ask"]

_ACTIONS: dict[str, Action] = {"allow": "allow", "deny": "deny", "ask": "ask"}

#: The parameters that an action takes.
_PARAMETERS: dict[Action, frozenset[str]] = {
    "allow": frozenset({"target", "user", "notify", "autostart"}),
    "ask": frozenset({"target", "default_target", "user", "notify", "autostart"}),
    "deny": frozenset({"notify"}),
}
#: Which tokens may stand where. Names of qubes may stand everywhere.
_EXACT = {
    "source": frozenset({"*", "@adminvm", "@anyvm"}),
    "target": frozenset({"*", "@adminvm", "@anyvm", "@default", "@dispvm"}),
    "redirect": frozenset({"@adminvm", "@dispvm"}),
    "intended": frozenset({"@adminvm", "@default", "@dispvm"}),
}
#: … and which begin how.
_PREFIXES = {
    "source": ("@type:", "@tag:", "@dispvm:@tag:", "@dispvm:"),
    "target": ("@type:", "@tag:", "@dispvm:@tag:", "@dispvm:"),
    "redirect": ("@dispvm:",),
    "intended": ("@dispvm:",),
}

_FILE_CHARACTERS = frozenset(string.digits + string.ascii_lowercase + "_.-")
_CALL_CHARACTERS = frozenset(string.ascii_letters + string.digits + "+-._")


class PolicyError(Exception):
    """The policy is not valid; qrexec then denies every call. Says the file and the line."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One line. `service` and `argument` (with its plus) are None for `*`; `place` is `FILE:LINE`."""

    service: str | None
    argument: str | None
    source: str
    target: str
    action: Action
    parameters: Mapping[str, str]
    place: str


def read_policy(folder: Path) -> list[Rule]:
    """The rules of a policy folder, in their order; raises PolicyError."""
    names = [path.name for path in folder.iterdir() if path.suffix == ".policy" and path.is_file()]
    names = sorted(name for name in names if not name.startswith("."))
    for name in names:
        if not _FILE_CHARACTERS.issuperset(name):
            raise PolicyError(f"invalid filename: {name}")
    return [rule for name in names for rule in _read_file(folder / name, folder)]


def check_token(token: str, role: str) -> None:
    """Raises ValueError unless `token` may be a `source`, a `target` or a `redirect` of a rule, or the target
    that a caller names (`intended`)."""
    if not token:
        raise ValueError(f"invalid empty {role} token")
    if token == "*" or token.startswith("@"):
        values = [token.removeprefix(prefix) for prefix in _PREFIXES[role] if token.startswith(prefix)]
        if token not in _EXACT[role] and not any(value and value[0] != "@" for value in values):
            raise ValueError(f"invalid {role} token: {token!r}")


def _read_file(path: Path, folder: Path) -> Iterator[Rule]:
    for place, line in _lines(path):
        if not line.startswith("!"):
            fields = line.split()
            if len(fields) < 5:
                raise PolicyError(f"{place}: wrong number of fields")
            yield _rule(fields, place)
            continue
        match line.split():
            case ["!include", name]:
                yield from _read_file(_included(name, folder, place), folder)
            case ["!include-service", service, argument, name]:
                yield from _read_service_file(service, argument, _included(name, folder, place), folder)
            case _:
                raise PolicyError(f"{place}: invalid directive (or one that is not known here)")


def _read_service_file(service: str, argument: str, path: Path, folder: Path) -> Iterator[Rule]:
    """The lines of `!include-service`, in the older form: SOURCE TARGET ACTION[,PARAMETER…]."""
    for place, line in _lines(path):
        fields = line.replace("$include:", "!include ").replace("$", "@").replace(",", " ").split()
        if fields[0] == "!include" and len(fields) == 2:
            yield from _read_service_file(service, argument, _included(fields[1], folder, place), folder)
        elif fields[0].startswith("!") or len(fields) < 3:
            raise PolicyError(f"{place}: invalid directive, or wrong number of fields")
        else:
            yield _rule([service, argument, *fields], place)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip() and not line.strip().startswith("#"):
            yield f"{path.name}:{number}", line.strip()


def _included(name: str, folder: Path, place: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_file():
        raise PolicyError(f"{place}: not a file: {path}")
    return path


def _rule(fields: list[str], place: str) -> Rule:
    service, argument, source, target, action, *rest = fields
    try:
        _check_call(service, argument)
        check_token(source, "source")
        check_token(target, "target")
        parameters = _parameters(action, rest)
    except ValueError as error:
        raise PolicyError(f"{place}: {error}") from None
    if target == "@default" and action == "allow" and "target" not in parameters:
        raise PolicyError(f"{place}: allow action for @default rule must specify target= option")
    return Rule(
        None if service == "*" else service,
        None if argument == "*" else argument,
        source,
        target,
        _ACTIONS[action],
        parameters,
        place,
    )


def _check_call(service: str, argument: str) -> None:
    if service != "*" and not (_CALL_CHARACTERS - {"+"}).issuperset(service):
        raise ValueError(f"service {service!r} contains invalid characters")
    if argument == "*":
        return
    if not (argument.startswith("+") and _CALL_CHARACTERS.issuperset(argument)):
        raise ValueError(f"argument {argument!r} does not start with + or contains invalid characters")
    if service == "*":
        raise ValueError("only * argument allowed for * service")


def _parameters(action: str, words: list[str]) -> dict[str, str]:
    if action not in _ACTIONS:
        raise ValueError(f"invalid action: {action}")
    parameters: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key in parameters or key not in _PARAMETERS[_ACTIONS[action]]:
            raise ValueError(f"invalid parameters for action {action}: {word!r}")
        if key in ("notify", "autostart") and value not in ("yes", "no"):
            raise ValueError(f"{key!r} is {value!r}, but can be only 'yes' or 'no'")
        if key in ("target", "default_target"):
            check_token(value, "redirect")
        parameters[key] = value
    return parameters
