"""The keys of a configuration, as people are told of them: in its reference, and when one is wrong.

Strategy: both are taken from the models, so they cannot say different things. A configuration is a model
whose fields are sections, and a section a model whose fields are keys; what people are told of a key beyond
its description stands in its `json_schema_extra`, as `for_people` makes it.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from qubes_restore_svc.broker.yaml_positions import Document, Place
from qubes_restore_svc.wire.names import strip_control

#: Most characters of a value or a key that an error shows.
_MAX_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Key:
    """One key: `expected` is what may stand there, as a noun phrase; `default` is YAML."""

    name: str
    meaning: str
    expected: str
    default: str


def for_people(expected: str, unit: str = "") -> JsonDict:
    """For a field's `json_schema_extra`: a noun phrase for what may stand there, and its unit."""
    return {"expected": expected, "unit": unit}


def sections_of(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The sections of a configuration by their names, in order."""
    return {
        name: field.annotation
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def keys_of(model: type[BaseModel]) -> Iterator[Key]:
    """Every key of a configuration, in order; its name is `SECTION.KEY`."""
    for name, section in sections_of(model).items():
        for key, field in section.model_fields.items():
            yield Key(f"{name}.{key}", field.description or "", _hints(field)[0], _as_yaml(field.default))


def first_mistake(
    model: type[BaseModel], error: ValidationError, document: Document
) -> tuple[int, Place, str]:
    """The first mistake in the file: its line, the way to it, and a clause that says what is wrong."""
    mistakes = error.errors(include_url=False)
    first = min(mistakes, key=lambda item: document.line(item["loc"]))
    place = first["loc"]
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
        case _ if field is None:
            expected = "keys, each on a line of its own below the section's name"
        case _ if isinstance(place[-1], int):
            expected = "a text"
    return f"expected {expected}, found {_shown(value)}"


def _unknown(model: type[BaseModel], place: Place) -> str:
    """Says what the key may have meant: one of its section, else one of that name elsewhere, else none."""
    sections = sections_of(model)
    key = str(place[-1])
    siblings = list(sections) if len(place) == 1 else list(sections[str(place[0])].model_fields)
    near = difflib.get_close_matches(key, siblings, 1)
    elsewhere = [f"{name}.{key}" for name, section in sections.items() if key in section.model_fields]
    what = "section" if len(place) == 1 else "key"
    if near or elsewhere:
        return f"there is no such {what}; did you mean {(near or elsewhere)[0]}?"
    return f"there is no such {what}; there are {', '.join(siblings)}"


def _field(model: type[BaseModel], place: Place) -> FieldInfo | None:
    """The key that a mistake is in, if it is in one that exists."""
    if len(place) < 2:
        return None
    section = sections_of(model).get(str(place[0]))
    return None if section is None else section.model_fields.get(str(place[1]))


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
