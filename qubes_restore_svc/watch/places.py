"""The places whose newest backup is verified: one file of settings each, `NAME.toml`.

Strategy: Python's own reader of TOML makes plain values, and one model checks them. A file that others can
write is refused, because it may name a command.
"""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from qubes_restore_svc.errors import BadConfiguration, UsageError
from qubes_restore_svc.owners import read_private_text
from qubes_restore_svc.watch.documents import MaxAge, PlaceName
from qubes_restore_svc.wire.names import LocationText, QubeName, strip_control

_NAME: TypeAdapter[str] = TypeAdapter(PlaceName)


class Place(BaseModel):
    """Where backups are, and what is asked of the newest. Of file, directory and command there is one."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", hide_input_in_errors=True)

    file: LocationText | None = None
    directory: LocationText | None = None  #: the newest file in it that fits `pattern`
    command: LocationText | None = None  #: for a shell; it writes the newest backup to its standard output
    qube: QubeName | None = None  #: where file, directory or command are, if not here
    pattern: LocationText = "qubes-*"
    settle_minutes: Annotated[int, Field(ge=0, le=10_080)] = 10  #: a file that changed since is not complete
    max_age_days: MaxAge = 8
    passphrase_file: LocationText | None = None
    metrics_directory: LocationText | None = None
    options: list[str] = []  #: more options of the command that verifies

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(one is not None for one in (self.file, self.directory, self.command)) != 1:
            raise ValueError("it must have one of the keys file, directory, command")
        if self.options and not self.options[0].startswith("-"):
            raise ValueError("the options name no qube: the first begins with -, and -x leaves a qube out")
        return self


def read_place(configuration: Path, name: str) -> Place:
    """The place of this name, from its file in the directory `configuration`. Raises UsageError.

    BadConfiguration, which is one, if the name is right and the settings are not.
    """
    try:
        _NAME.validate_python(name)
    except ValidationError:
        raise UsageError(f"{strip_control(name)!r} cannot be the name of a place", advice="") from None
    path = configuration / f"{name}.toml"
    text = read_private_text(path, "which programs run")
    if text is None:
        raise BadConfiguration(f"there is no place {name}: {path} is missing", advice="Write it first.")
    try:
        return Place.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise BadConfiguration(f"{path} is not TOML: {error}") from None
    except RecursionError:
        raise BadConfiguration(f"{path} has too many brackets within each other") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        message = "there is no such key" if first["type"] == "extra_forbidden" else message
        raise BadConfiguration(f"{path}{key and ', ' + strip_control(key)}: {message}") from None


def names_of_places(configuration: Path) -> list[str]:
    """All places that have settings here."""
    return sorted(path.stem for path in configuration.glob("*.toml"))


def default_configuration() -> Path:
    """Where the settings are: of the system for root, of the own account for everybody else."""
    return _directory("/etc", "XDG_CONFIG_HOME", ".config")


def default_state() -> Path:
    """Where the reports are kept, in the same way."""
    return _directory("/var/lib", "XDG_STATE_HOME", ".local/state")


def _directory(of_the_system: str, variable: str, of_the_account: str) -> Path:
    if os.geteuid() == 0:
        base = Path(of_the_system)
    else:
        base = Path(os.environ.get(variable) or Path.home() / of_the_account)
    return base / "qubes-restore-svc" / "watch"
