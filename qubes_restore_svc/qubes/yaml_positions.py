"""YAML as far as a configuration needs it, with the line of every value.

Strategy: PyYAML's safe loader makes nodes, which know their place; what makes values of them is here, and
knows mappings, lists, texts, whole numbers, true, false and null. What YAML offers beyond that (anchors and
aliases, tags, merged and repeated keys, numbers to the base of 60, several documents) is a mistake.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import yaml

#: The way to a value: keys, and positions in lists counted from 0.
Place = tuple[str | int, ...]

#: Deepest nesting that is read; a configuration has four levels.
MAX_DEPTH = 16


class YamlMistake(Exception):
    """The text cannot be read: a clause that says why, the line (from 1), the way there as far as known."""

    def __init__(self, reason: str, line: int, place: Place = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line
        self.place = place


@dataclass(frozen=True, slots=True)
class Document:
    """A value made of dict, tuple, str, int, bool and None, and the line of each of its parts."""

    value: object
    lines: Mapping[Place, int]

    def line(self, place: Place) -> int:
        """The line of a value, or of the innermost one around it that the text has."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)


def read_yaml(text: str) -> Document:
    """Read one document; an empty one is None. Raises YamlMistake."""
    _check_characters(text)
    try:
        _check_events(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise YamlMistake(_clause(error), _line(error.problem_mark or error.context_mark)) from None
    lines: dict[Place, int] = {}
    return Document(None if root is None else _value(root, (), lines), lines)


_QUOTES = 'a text that begins with *, &, ! or @ has to stand in quotes, as "*"'


def _check_characters(text: str) -> None:
    """PyYAML would say at which character, and not in which line."""
    found = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if found:
        line = text.count("\n", 0, found.start()) + 1
        raise YamlMistake(f"the character U+{ord(found.group()):04X} cannot stand in such a file", line)


def _check_events(text: str) -> None:
    """Before anything is built: no anchors, which can multiply what is there, no tags, a bounded depth."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            raise YamlMistake(f"anchors and aliases are not read; {_QUOTES}", _line(event.start_mark))
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            raise YamlMistake(f"tags are not read; {_QUOTES}", _line(event.start_mark))
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise YamlMistake("it is nested too deep", _line(event.start_mark))


def _clause(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "no reason is known"
    if "'\\t'" in problem:
        return "a tab stands where only spaces may"
    if problem.startswith("but found another document"):
        return "a second document begins (---)"
    if "alias" in (error.context or "") or "'@'" in problem:
        return _QUOTES
    return f"this is not YAML: {problem}"


class _Mark(Protocol):
    """A place in the text, whichever of PyYAML's two parsers found it; `line` counts from 0."""

    line: int


def _line(mark: _Mark | None) -> int:
    return 1 if mark is None else mark.line + 1


_TAG = "tag:yaml.org,2002:"
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")


def _value(node: yaml.Node, place: Place, lines: dict[Place, int]) -> object:
    lines.setdefault(place, _line(node.start_mark))
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, place, lines)
    if isinstance(node, yaml.SequenceNode):
        return tuple(_value(item, (*place, number), lines) for number, item in enumerate(node.value))
    return _scalar(str(node.value), node, place)


def _mapping(node: yaml.MappingNode, place: Place, lines: dict[Place, int]) -> dict[str, object]:
    values: dict[str, object] = {}
    for key_node, value_node in node.value:
        line = _line(key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
            raise YamlMistake("a key must be a word", line, place)
        key = str(key_node.value)
        if key in values:
            raise YamlMistake(f"this key is there already, in line {lines[*place, key]}", line, (*place, key))
        lines[*place, key] = line
        values[key] = _value(value_node, (*place, key), lines)
    return values


def _scalar(text: str, node: yaml.Node, place: Place) -> object:
    """The kinds that PyYAML tells apart by a plain value's look; a quoted one is always a text."""
    kind = node.tag.removeprefix(_TAG)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("yes", "true", "on")
    if kind == "int" and _DECIMAL.fullmatch(text):
        return int(text)
    if kind in ("int", "float"):
        raise YamlMistake(f"{text[:40]} is not a whole number in plain digits", _line(node.start_mark), place)
    return text
