"""The keys of a configuration, as people are told of them: in its reference, and when one is wrong.

Strategy: both are taken from the models, so they cannot say different things. A configuration is a model
whose fields are sections, and a section a model whose fields are keys, or names with such a model each;
what people are told of a key beyond its description stands in its `json_schema_extra`, as `for_people` makes
it, and so does what the names of a mapping may be.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from qubes_restore_svc.qubes.yaml_positions import Document, Place
from qubes_restore_svc.wire.names import strip_control

#: What pydantic appends to the way to a key that is wrong itself.
_KEY_ITSELF = "[key]"

#: Most characters of a value or a key that an error shows.
_MAX_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Key:
    """One key: `expected` is what may stand there, as a noun phrase; `default` is YAML.

    `name` is the way to it, with dots; where a name stands that people choose, it has `NAME`.
    """

    name: str
    meaning: str
    expected: str
    default: str


def for_people(expected: str, unit: str = "") -> JsonDict:
    """For a field's `json_schema_extra`: a noun phrase for what may stand there, and its unit."""
    return {"expected": expected, "unit": unit}


def sections_of(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The sections of a configuration by their names, in order; of one with names in it, what each has."""
    found = {}
    for name, field in model.model_fields.items():
        annotation = field.annotation
        of_each = get_args(annotation)[1] if get_origin(annotation) is dict else annotation
        if isinstance(of_each, type) and issubclass(of_each, BaseModel):
            found[name] = of_each
    return found


def has_names(model: type[BaseModel], section: str) -> bool:
    """Do names stand in that section, each with keys of its own below it?"""
    field = model.model_fields.get(section)
    return field is not None and get_origin(field.annotation) is dict


def keys_of(model: type[BaseModel]) -> Iterator[Key]:
    """Every key of a configuration, in order; its name is `SECTION.KEY`, or `SECTION.NAME.KEY`."""
    for name, section in sections_of(model).items():
        way = f"{name}.NAME" if has_names(model, name) else name
        for key, field in section.model_fields.items():
            yield Key(f"{way}.{key}", field.description or "", _hints(field)[0], _as_yaml(field.default))


def first_mistake(
    model: type[BaseModel], error: ValidationError, document: Document
) -> tuple[int, Place, str]:
    """The first mistake in the file: its line, the way to it, and a clause that says what is wrong."""
    mistakes = error.errors(include_url=False)
    first = min(mistakes, key=lambda item: document.line(item["loc"]))
    place = first["loc"]
    if place[-1] == _KEY_ITSELF and first["type"] == "value_error":
        place = place[:-1]
    reason = _reason(model, place, first["type"], first["input"], first.get("ctx", {}))
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return document.line(place), place, reason + more


def place_text(place: Place) -> str:
    """`restore.tags, entry 2`, for people; empty for the whole file."""
    keys = ".".join(_shortened(part) for part in place if isinstance(part, str))
    return keys + "".join(f", entry {part + 1}" for part in place if isinstance(part, int))


# --- What is wrong -------------------------------------------------------------------------------


def _reason(
    model: type[BaseModel], place: Place, error_type: str, value: object, context: Mapping[str, object]
) -> str:
    """What is wrong, from what pydantic says of an error."""
    field = _field(model, place)
    expected, unit = ("", "") if field is None else _hints(field)
    of_unit = f" ({unit})" if unit else ""
    match error_type:
        case "extra_forbidden":
            return _unknown(model, place)
        case "value_error":
            return str(context["error"])
        case "greater_than_equal":
            return f"{value} is less than {context['ge']}{of_unit}"
        case "less_than_equal":
            return f"{value} is more than {context['le']}{of_unit}"
        case "literal_error":
            expected = str(context["expected"])
        case _ if field is None and len(place) == 1 and has_names(model, str(place[0])):
            names = model.model_fields[str(place[0])]
            expected = f"names, each with keys below it: {_hints(names)[0].replace('`', '')}"
        case _ if field is None:
            whose = "the section's" if len(place) == 1 else "that"
            expected = f"keys, each on a line of its own below {whose} name"
        case _ if isinstance(place[-1], int):
            expected = "a text"
    return f"expected {expected}, found {_shown(value)}"


def _unknown(model: type[BaseModel], place: Place) -> str:
    """Says what the key may have meant: one of its section, else one of that name elsewhere, else none."""
    sections = sections_of(model)
    key = str(place[-1])
    siblings = list(sections) if len(place) == 1 else list(sections[str(place[0])].model_fields)
    near = difflib.get_close_matches(key, siblings, 1)
    elsewhere = [found.name for found in keys_of(model) if found.name.rpartition(".")[2] == key]
    what = "section" if len(place) == 1 else "key"
    if near or elsewhere:
        return f"there is no such {what}; did you mean {(near or elsewhere)[0]}?"
    return f"there is no such {what}; there are {', '.join(siblings)}"


def _field(model: type[BaseModel], place: Place) -> FieldInfo | None:
    """The key that a mistake is in, if it is in one that exists."""
    depth = 2 if has_names(model, str(place[0])) else 1
    if len(place) <= depth:
        return None
    section = sections_of(model).get(str(place[0]))
    return None if section is None else section.model_fields.get(str(place[depth]))


def _hints(field: FieldInfo) -> tuple[str, str]:
    extra = field.json_schema_extra
    assert isinstance(extra, dict), "every key is described"
    return str(extra["expected"]), str(extra["unit"])


def _shown(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case str():
            return repr(_shortened(value))
        case dict():
            return "keys"
        case tuple():
            return "a list"
        case _:
            return _shortened(str(value))


def _shortened(text: str) -> str:
    shown = strip_control(text)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"


def _as_yaml(default: object) -> str:
    match default:
        case None:
            return "null"
        case bool():
            return "true" if default else "false"
        case tuple():
            return "[" + ", ".join(f'"{entry}"' for entry in default) + "]"
        case Path() | int() | str():
            return str(default)
    raise AssertionError(f"a default that is not known to be YAML: {default!r}")
