"""Messages as JSON, and copies of them with one thing changed."""

import copy
from collections.abc import Iterator
from typing import Any

from qubes_restore_svc.wire.models import Model

Json = dict[str, Any]
Path = tuple[str | int, ...]


def places(value: object, path: Path = ()) -> Iterator[Path]:
    """Where in a message something stands: every key and every index."""
    members: Any = ()
    if isinstance(value, dict):
        members = value.items()
    elif isinstance(value, list):
        members = enumerate(value)
    for key, inner in members:
        yield (*path, key)
        yield from places(inner, (*path, key))


def names_in_json(model: type[Model]) -> set[str]:
    """What the fields of a model are called in JSON."""
    return {field.serialization_alias or name for name, field in model.model_fields.items()}


def at(message: Json, path: Path) -> Any:
    value: Any = message
    for key in path:
        value = value[key]
    return value


def changed(message: Json, path: Path, value: object) -> Json:
    """A copy of `message` with `value` at `path`."""
    result = copy.deepcopy(message)
    at(result, path[:-1])[path[-1]] = value
    return result


def dotted(path: Path) -> str:
    return ".".join(map(str, path))
