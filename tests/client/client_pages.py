"""What docs/clients.md lists, made from the models of the call and from their sources.

Strategy: what a field may be comes from the model itself; what it means stands in the source, in a comment
`#:` behind it or in the lines above, and is read from there. Everything between two marks of the page is made
anew.

python -m tests.client.client_pages      writes the page
"""

import ast
import inspect
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Le, MaxLen
from pydantic import BaseModel, SecretStr, StringConstraints
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from qubes_restore_svc.errors import ERROR_KINDS, RestoreError
from qubes_restore_svc.wire import names
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.models import Message, Model

from .client_words import FIELDS, TEXTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "clients.md"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

#: Types of `names` that are told in a table of their own, by their name.
_NAMED = {name: value for name, value in vars(names).items() if get_origin(value) is Annotated}

_COMMENT = re.compile(r"^\s*#: ?(.*)$")
_BEHIND = re.compile(r"#: ?(.*)$")


def page(current: str) -> str:
    """The page with everything between its marks made anew."""
    client, broker = get_args(c.ClientMessage), get_args(c.BrokerAnswer)
    parts = list(parts_of((*client, *broker)))
    used = {name for model in (*client, *broker, *parts) for name in names_in(model)}
    return with_parts(
        current,
        {
            "states": _states(),
            "client messages": "\n".join(map(_section, client)),
            "broker messages": "\n".join(map(_section, broker)),
            "parts": "\n".join(map(_section, parts)),
            "types": types_text(used),
            **{path.stem: _example(path) for path in EXAMPLES},
            "errors": table_text(
                ["kind", "meaning", "what is advised, if nothing better is known"], _error_rows()
            ),
        },
    )


def types_text(used: Iterable[str]) -> str:
    """The table of these types of `names`."""
    return table_text(["type", "JSON", "meaning"], map(type_row, sorted(used)))


def with_parts(current: str, made: Mapping[str, str]) -> str:
    """A page with what stands between its marks made anew. Raises ValueError if one has not one place."""
    for name, content in made.items():
        begin, end = f"<!-- made: {name} -->\n", "<!-- end -->"
        before, mark, rest = current.partition(begin)
        _, end_mark, after = rest.partition(end)
        if not mark or not end_mark or begin in after:
            raise ValueError(f"the page has not one place for {name}")
        current = before + begin + content + end + after
    return current


def _example(path: Path) -> str:
    source = path.read_text()
    return f"[examples/{path.name}](../examples/{path.name}):\n\n```python\n{source}```\n"


# --- States --------------------------------------------------------------------------------------


def _states() -> str:
    rows = []
    client = get_args(c.ClientMessage)
    for phase in c.CallPhase:
        leaving: dict[tuple[str, c.CallPhase], list[str]] = {}
        for (before, kind), after in c.TRANSITIONS.items():
            if before is phase:
                side = "client" if kind in client else "dom0"
                leaving.setdefault((side, after), []).append(f"`{_word(kind)}`")
        for (side, after), words in leaving.items():
            rows.append([phase.value, side, ", ".join(words), after.value])
    return table_text(["while the call is", "may be said by", "", "and then it is"], rows)


# --- Messages ------------------------------------------------------------------------------------


def _section(model: type[Model]) -> str:
    head = f"### `{_word(model)}`" if issubclass(model, Message) else f"### {model.__name__}"
    text = TEXTS.get(model) or _paragraph(model.__doc__ or "")
    if issubclass(model, Message):
        text += f" At most {_bytes(model.max_size)}."
    meanings = meanings_of_fields(model)
    rows = [
        [f"`{name}`", described(hint), _default(field), meanings[name]]
        for name, hint, field in fields_of(model)
        if name != "type"
    ]
    table = (
        table_text(["field", "is", "default", "meaning"], rows) if rows else "No other fields than `type`.\n"
    )
    return f"{head}\n\n{text}\n\n{table}"


def fields_of(model: type[Model]) -> Iterator[tuple[str, object, FieldInfo]]:
    """The fields of a model: what JSON calls each, its type, and the rest."""
    hints = get_type_hints(model, include_extras=True)
    for name, field in model.model_fields.items():
        yield field.serialization_alias or name, hints[name], field


def meanings_of_fields(model: type[Model]) -> dict[str, str]:
    """What each field of a model means, by its name in JSON. Raises ValueError if nothing is said of one."""
    comments = _meanings(model)
    found = {}
    for name, field in model.model_fields.items():
        if name != "type":
            names_of_it = (f"{one.__name__}.{name}" for one in model.__mro__)
            word = next((one for one in names_of_it if one in FIELDS), name)
            found[field.serialization_alias or name] = _meaning(word, comments)
    return found


def described(hint: object) -> str:
    """What JSON a value of this type is."""
    name = _name_of(hint)
    if name is not None:
        return f"[{name}](#types)"
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        base, *rest = arguments
        limits = [limit for item in rest for limit in getattr(item, "metadata", [item])]
        return _with_limits(base, limits)
    if origin is Literal:
        return " or ".join(f"`{_json(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("`null`" if item is type(None) else described(item) for item in arguments)
    if origin is dict:
        return f"an object of {described(arguments[1])} by {described(arguments[0])}"
    if origin is tuple:
        return f"a list of {described(arguments[0])}"
    if isinstance(hint, type) and issubclass(hint, Model):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    simple = {bool: "`true` or `false`", str: "a text", int: "a whole number", SecretStr: "a text"}
    assert isinstance(hint, type) and hint in simple, f"{hint} is not known here"
    return simple[hint]


def _with_limits(base: object, limits: Iterable[object]) -> str:
    text, least, most = described(base), None, None
    for limit in limits:
        if isinstance(limit, MaxLen):
            unit = "" if text.startswith(("a list", "an object")) else " characters"
            text += f", at most {limit.max_length}{unit}"
        elif isinstance(limit, Ge):
            least = limit.ge
        elif isinstance(limit, Le):
            most = limit.le
    if most is None:
        return text
    return f"`{most}`" if str(least) == str(most) else f"{text}, {least} to {most}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    assert value is not PydanticUndefined
    return "all defaults" if isinstance(value, BaseModel) else f"`{_json(value)}`"


def parts_of(found: Iterable[object]) -> Iterator[type[Model]]:
    """The models that these have fields of, in their order, each once."""
    seen: list[type[Model]] = []
    for model in found:
        for inner in _models_in(model):
            if inner not in seen:
                seen.append(inner)
    return iter(seen)


def _models_in(model: object) -> Iterator[type[Model]]:
    for hint in get_type_hints(model, include_extras=True).values():
        for item in _walk(hint):
            if isinstance(item, type) and issubclass(item, Model):
                yield item
                yield from _models_in(item)


def names_in(model: type[Model]) -> Iterator[str]:
    for hint in get_type_hints(model, include_extras=True).values():
        yield from (name for item in _walk(hint) if (name := _name_of(item)) is not None)


def _walk(hint: object) -> Iterator[object]:
    yield hint
    if _name_of(hint) is None:
        for item in get_args(hint):
            yield from _walk(item)


def _name_of(hint: object) -> str | None:
    return next((name for name, value in _NAMED.items() if value == hint), None)


# --- Types and errors ----------------------------------------------------------------------------


def type_row(name: str) -> list[str]:
    base, *limits = get_args(_NAMED[name])
    text = "a whole number" if base is int else "a text"
    if base is datetime:
        text += f", at most 20 characters, `{names.TIMESTAMP}`"
    for limit in limits:
        if isinstance(limit, StringConstraints):
            text += "" if limit.max_length is None else f", at most {limit.max_length} characters"
            text += "" if limit.pattern is None else f", `{_cell(str(limit.pattern))}`"
        elif isinstance(limit, FieldInfo):
            text = _with_limits(base, limit.metadata)
    return [name, text, _meaning(name, _meanings_of(names))]


def _error_rows() -> Iterator[list[str]]:
    for kind, error in sorted(ERROR_KINDS.items()):
        text = "Anything else." if error is RestoreError else _paragraph(error.__doc__ or "")
        yield [f"`{kind}`", text, error.default_advice]


# --- What stands in the sources ------------------------------------------------------------------


def _meaning(name: str, comments: dict[str, str]) -> str:
    """What is said here, or else in the source; everything has a meaning."""
    text = FIELDS.get(name) or comments.get(name.rpartition(".")[2])
    if not text:
        raise ValueError(f"nothing is said of {name}")
    return _cell(text.replace("None:", "`null`:"))


def _meanings(model: type[Model]) -> dict[str, str]:
    """What the comments say of the fields of a model, and of those that it inherits."""
    found: dict[str, str] = {}
    for one in reversed([one for one in model.__mro__ if one.__module__.startswith("qubes_restore_svc.")]):
        module = inspect.getmodule(one)
        assert module is not None
        found |= _meanings_of(module, one.__name__)
    return found


def _meanings_of(module: ModuleType, scope: str | None = None) -> dict[str, str]:
    """What the comments say of the names that are assigned to in a module, or in one of its classes."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    body = ast.parse(source).body
    if scope is not None:
        (found,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == scope)
        body = found.body
    meanings = {}
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not isinstance(target, ast.Name) or node.end_lineno is None:
            continue
        behind = _BEHIND.search(lines[node.end_lineno - 1])
        above: list[str] = []
        line = node.lineno - 2
        while line >= 0 and (match := _COMMENT.match(lines[line])):
            above.insert(0, match[1])
            line -= 1
        meanings[target.id] = behind[1] if behind else " ".join(above)
    return meanings


# --- Words ---------------------------------------------------------------------------------------


def _word(model: type[Model]) -> str:
    return str(model.model_fields["type"].default)


def _paragraph(text: str) -> str:
    return " ".join(text.split())


def _bytes(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _json(value: object) -> str:
    words = {None: "null", True: "true", False: "false", (): "[]", "": '""'}
    for known, word in words.items():
        if value is known or (value == known and type(value) is type(known)):
            return word
    return str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def table_text(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
