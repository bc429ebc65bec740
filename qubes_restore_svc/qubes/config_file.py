"""Reading a configuration: a text, in YAML, into a model.

Strategy: PyYAML's safe loader makes nodes, which know their place; this module makes values of them, and
knows mappings, lists, texts, whole numbers, true, false and null. Everything else that YAML offers (anchors
and aliases, tags, merged and repeated keys, numbers to the base of 60, several documents) is a mistake. The
model checks the values. Every mistake is one sentence with file, line, key and what is expected.

A configuration is a model whose fields are sections, and a section a model whose fields are keys, or names
with such a model each. Beside its description, a key has a text for people in its `json_schema_extra`;
`for_people` makes it.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from qubes_restore_svc.errors import BadConfiguration
from qubes_restore_svc.wire.names import strip_control

#: Deepest nesting that is read; a configuration has four levels.
MAX_DEPTH = 16

#: Most characters of a value or a key that an error shows.
_MAX_SHOWN = 60

_M = TypeVar("_M", bound=BaseModel)

#: The way to a value: keys, and positions in lists counted from 0.
_Place = tuple[str | int, ...]
#: The line of every value and of every key, by the way to it.
_Lines = dict[_Place, int]


class _Mistake(Exception):
    def __init__(self, reason: str, line: int, place: _Place = ()) -> None:
        super().__init__(reason)
        self.line = line
        self.place = place


def parse(model: type[_M], text: str, path: Path) -> _M:
    """The configuration in a text. Errors name `path` as its file. Raises BadConfiguration."""
    lines: _Lines = {}
    try:
        try:
            return model.model_validate(_read_yaml(text, lines))
        except ValidationError as error:
            raise _first_mistake(model, error, lines) from None
    except _Mistake as mistake:
        keys = ".".join(_shortened(part) for part in mistake.place if isinstance(part, str))
        entries = "".join(f", entry {part + 1}" for part in mistake.place if isinstance(part, int))
        where = f"{path}, line {mistake.line}{keys and ', ' + keys}{entries}"
        raise BadConfiguration(f"{where}: {mistake}") from None


# --- The YAML ------------------------------------------------------------------------------------

_QUOTES = 'a text that begins with *, &, ! or @ has to stand in quotes, as "*"'
_TAG = "tag:yaml.org,2002:"
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")


class _Mark(Protocol):
    """A place in the text, whichever of PyYAML's two parsers found it; `line` counts from 0."""

    line: int


def _line(mark: _Mark | None) -> int:
    return 1 if mark is None else mark.line + 1


def _read_yaml(text: str, lines: _Lines) -> object:
    """The one document of a text: dict, tuple, str, int, bool and None. Notes the line of each part."""
    try:
        _check_events(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _Mistake(f"the character U+{error.character:04X} cannot stand in such a file", line) from None
    except yaml.MarkedYAMLError as error:
        raise _Mistake(_clause(error), _line(error.problem_mark or error.context_mark)) from None
    return None if root is None else _value(root, (), lines)


def _check_events(text: str) -> None:
    """Before anything is built: no anchors, which can multiply what is there, no tags, a bounded depth."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = _line(event.start_mark)
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            raise _Mistake(f"anchors and aliases are not read; {_QUOTES}", line)
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            raise _Mistake(f"tags are not read; {_QUOTES}", line)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _Mistake("it is nested too deep", line)


def _clause(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "no reason is known"
    if "'\\t'" in problem:
        return "a tab stands where only spaces may"
    if problem.startswith("but found another document"):
        return "a second document begins (---)"
    if "alias" in (error.context or "") or "'@'" in problem:
        return _QUOTES
    return f"this is not YAML: {problem}"


def _value(node: yaml.Node, place: _Place, lines: _Lines) -> object:
    lines.setdefault(place, _line(node.start_mark))
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, place, lines)
    if isinstance(node, yaml.SequenceNode):
        return tuple(_value(item, (*place, number), lines) for number, item in enumerate(node.value))
    # The kinds that PyYAML tells apart by a plain value's look; a quoted one is always a text.
    text, kind = str(node.value), node.tag.removeprefix(_TAG)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("yes", "true", "on")
    if kind == "int" and _DECIMAL.fullmatch(text):
        return int(text)
    if kind in ("int", "float"):
        raise _Mistake(f"{text[:40]} is not a whole number in plain digits", lines[place], place)
    return text


def _mapping(node: yaml.MappingNode, place: _Place, lines: _Lines) -> dict[str, object]:
    values: dict[str, object] = {}
    for key_node, value_node in node.value:
        line = _line(key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
            raise _Mistake("a key must be a word", line, place)
        key = str(key_node.value)
        if key in values:
            raise _Mistake(f"this key is there already, in line {lines[*place, key]}", line, (*place, key))
        lines[*place, key] = line
        values[key] = _value(value_node, (*place, key), lines)
    return values


# --- The keys ------------------------------------------------------------------------------------


def for_people(expected: str, unit: str = "") -> JsonDict:
    """For a field's `json_schema_extra`: a noun phrase for what may stand there, and its unit."""
    return {"expected": expected, "unit": unit}


def hints(field: FieldInfo) -> tuple[str, str]:
    """The values that a key may have, and their unit; two empty texts for a section."""
    extra = field.json_schema_extra
    return (str(extra["expected"]), str(extra["unit"])) if isinstance(extra, dict) else ("", "")


def keys_of(model: type[BaseModel], way: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key, in order, with the way to it: `SECTION.KEY`, or `SECTION.NAME.KEY` below chosen names."""
    for name, field in model.model_fields.items():
        below, *_ = get_args(field.annotation)[1:] or (field.annotation,)
        if isinstance(below, type) and issubclass(below, BaseModel):
            yield from keys_of(below, f"{way}{name}." + ("" if below is field.annotation else "NAME."))
        else:
            yield way + name, field


def _first_mistake(model: type[BaseModel], error: ValidationError, lines: _Lines) -> _Mistake:
    """The first in the file. One that has no line of its own has that of what is around it."""

    def line(place: _Place) -> int:
        return next((lines[place[:end]] for end in range(len(place), -1, -1) if place[:end] in lines), 1)

    mistakes = error.errors(include_url=False)
    first = min(mistakes, key=lambda mistake: line(mistake["loc"]))
    place = first["loc"]
    if place[-1:] == ("[key]",) and first["type"] == "value_error":  # the key itself is wrong
        place = place[:-1]
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    reason = _reason(model, place, first["type"], first["input"], first.get("ctx", {}))
    return _Mistake(reason + more, line(place), place)


def _reason(
    model: type[BaseModel], place: _Place, error_type: str, value: object, context: Mapping[str, object]
) -> str:
    """What is wrong, from what pydantic says of an error."""
    below: object = model  # what stands at `place`: a model, or a mapping to models, or a key's type
    field = None
    for part in place:
        if isinstance(below, type) and issubclass(below, BaseModel):
            if part not in below.model_fields:
                return _unknown(model, below, str(part))
            field = below.model_fields[str(part)]
            below = field.annotation
        else:
            below = get_args(below)[-1]
    expected, unit = ("", "") if field is None else hints(field)
    of_unit = f" ({unit})" if unit else ""
    match error_type:
        case "value_error":
            return str(context["error"])
        case "greater_than_equal":
            return f"{value} is less than {context['ge']}{of_unit}"
        case "less_than_equal":
            return f"{value} is more than {context['le']}{of_unit}"
        case "literal_error":
            expected = str(context["expected"])
        case _ if below is model:
            return f"expected sections: {', '.join(model.model_fields)}"
        case _ if isinstance(below, type) and issubclass(below, BaseModel):
            whose = "the section's" if len(place) == 1 else "that"
            expected = f"keys, each on a line of its own below {whose} name"
        case _ if isinstance(place[-1], int):
            expected = "a text"
    return f"expected {expected}, found {shown(value)}"


def _unknown(model: type[BaseModel], section: type[BaseModel], key: str) -> str:
    """Says what the key may have meant: one of its section, else one of that name elsewhere, else none."""
    near = difflib.get_close_matches(key, section.model_fields, 1)
    near += [name for name, _ in keys_of(model) if name.rpartition(".")[2] == key]
    what = "section" if section is model else "key"
    if near:
        return f"there is no such {what}; did you mean {near[0]}?"
    return f"there is no such {what}; there are {', '.join(section.model_fields)}"


def shown(value: object) -> str:
    """The value of a key, as messages show it."""
    if isinstance(value, str):
        return repr(_shortened(value))
    if isinstance(value, dict | tuple):
        return "keys" if isinstance(value, dict) else "a list"
    return "nothing" if value is None else _shortened(str(value).lower())


def _shortened(text: str) -> str:
    line = strip_control(text)
    return line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}…"
