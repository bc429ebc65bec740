"""/etc/qubes-restore-svc/config.yaml: how restores are done on this machine, and what they may bring back.

Strategy: a strict frozen model is the whole reference: type, range, unit, default and meaning of every key
are in it; docs/configuration.md and the sample file are made from it. `config_file` reads a file, and tells
the mistakes in it.
"""

import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qubes_restore_svc.broker.allowlist import DEFAULT, Bus, SettingsPolicy, check_choosable, check_entry
from qubes_restore_svc.owners import read_private_text
from qubes_restore_svc.qubes.config_file import for_people, parse, shown
from qubes_restore_svc.wire.names import MAX_STALL_TIMEOUT, DigestKind, QubeName, is_qube_name
from qubes_restore_svc.wire.restore_call import AUTO, Auto

CONFIG_PATH = Path("/etc/qubes-restore-svc/config.yaml")


def _or_empty(value: object) -> object:
    """A section whose keys are all comments is null."""
    return {} if value is None else value


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    _all_comments = model_validator(mode="before")(_or_empty)


def _absolute(value: object) -> object:
    if not isinstance(value, str):
        return value  # for the check of its type
    path = Path(value)
    if not path.is_absolute() or ".." in path.parts or not value.isprintable():
        raise ValueError(f"expected an absolute path without .., found {value!r}")
    return path


_Path = Annotated[Path, BeforeValidator(_absolute)]
_PropertyEntry = Annotated[str, AfterValidator(partial(check_entry, "property"))]
_FeatureEntry = Annotated[str, AfterValidator(partial(check_entry, "feature"))]
_TagEntry = Annotated[str, AfterValidator(partial(check_entry, "tag"))]
_Choosable = Annotated[str, AfterValidator(check_choosable)]
_PoolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=64)]

#: A caller without a section of its own has the rights of this one.
ANY_CALLER = "default"
_CALLER_EXPECTED = f"the name of a qube, or {ANY_CALLER}"


def _caller(name: str) -> str:
    if name == "dom0":
        raise ValueError("dom0 needs no grant, and none narrows what it may do")
    if name != ANY_CALLER and not is_qube_name(name):
        raise ValueError(f"expected {_CALLER_EXPECTED}")
    return name


def _pattern(alphabet: str, what: str) -> AfterValidator:
    allowed = re.compile(f"[*?{alphabet}]{{1,255}}")

    def check(entry: str) -> str:
        if not allowed.fullmatch(entry):
            raise ValueError(f"expected the name of {what}, or a pattern with * or ?")
        return entry

    return AfterValidator(check)


_Caller = Annotated[str, AfterValidator(_caller)]
_QubePattern = Annotated[str, _pattern("a-zA-Z0-9_.-", "a qube")]
_PoolPattern = Annotated[str, _pattern("a-zA-Z0-9_.-", "a storage pool")]
_SettingPattern = Annotated[str, _pattern("a-zA-Z0-9_.:-", "a setting")]
_ServicePattern = Annotated[str, _pattern("a-zA-Z0-9_.+-", "a service")]


# pydantic's own `Field` gives Any, too: a class body assigns it to fields of every type.


def _key(default: object, expected: str, meaning: str) -> Any:
    return Field(default=default, description=meaning, json_schema_extra=for_people(expected))


def _number(default: int | None, low: int, high: int, meaning: str, unit: str = "") -> Any:
    expected = f"{low} to {high}{unit and ' ' + unit}" + (", or null" if default is None else "")
    hints = for_people(expected, unit)
    return Field(default=default, ge=low, le=high, description=meaning, json_schema_extra=hints)


def _number_or_auto(low: int, high: int, unit: str = "") -> BeforeValidator:
    def check(value: object) -> object:
        if isinstance(value, bool) or not (isinstance(value, int) or value == AUTO):
            raise ValueError(f"expected {_size_expected(low, high, unit)}, found {shown(value)}")
        if isinstance(value, int) and not low <= value <= high:
            than = f"less than {low}" if value < low else f"more than {high}"
            raise ValueError(f"{value} is {than}{unit and f' ({unit})'}")
        return value

    return BeforeValidator(check)


def _size_expected(low: int, high: int, unit: str) -> str:
    return f"{low} to {high}{unit and ' ' + unit}, or {AUTO}"


def _size(low: int, high: int, meaning: str, unit: str = "") -> Any:
    hints = for_people(_size_expected(low, high, unit), unit)
    return Field(default=AUTO, description=meaning, json_schema_extra=hints)


#: Of a worker: MiB, and processors.
_MEMORY = (256, 1 << 20)
_VCPUS = (1, 128)
#: The most that a caller without such a grant may ask for, if the worker's size is not a number.
UNGRANTED_MEMORY, UNGRANTED_VCPUS = 4000, 2

_SWITCH = "true or false"
_LIST = "a list of names and patterns"
_PATH_OR_NULL = "an absolute path, or null"


class WorkerConfig(_Section):
    """The disposable qube that reads the backup and is thrown away afterwards."""

    template: QubeName | None = _key(
        None,
        "the name of a qube, or null",
        "Disposable template of the worker. null: the system's `management_dispvm`.",
    )
    memory: Annotated[int | Auto, _number_or_auto(*_MEMORY, "MiB")] = _size(
        *_MEMORY,
        "Memory of the worker. To derive a key takes 512 MiB to 2 GiB; with more memory, more are derived at"
        " once. auto: as much as its processors can use, at most half of the computer's; where less is free,"
        " what there is. A number has to be free when a restore starts.",
        "MiB",
    )
    vcpus: Annotated[int | Auto, _number_or_auto(*_VCPUS)] = _size(
        *_VCPUS,
        "Processors of the worker: each derives several keys at once, as far as the memory goes. auto: as"
        " many as dom0 has, at most 8.",
    )
    start_timeout: int = _number(
        120, 1, 3600, "How long the worker may take to answer once its qube runs.", "s"
    )


class RestoreConfig(_Section):
    """What a backup may bring back beside its volumes."""

    properties: tuple[_PropertyEntry, ...] = _key((DEFAULT,), _LIST, "Properties of qubes that come back.")
    features: tuple[_FeatureEntry, ...] = _key((DEFAULT,), _LIST, "Features of qubes that come back.")
    tags: tuple[_TagEntry, ...] = _key(
        (DEFAULT,), _LIST, "Tags of qubes that come back. Mind what your policy lets a qube do that has them."
    )
    autostart: bool = _key(False, _SWITCH, "Whether a qube that started with the system does so again.")
    kernel: bool = _key(
        False, _SWITCH, "Whether a qube gets the one of dom0's kernels again that was chosen for it."
    )
    kernelopts: bool = _key(
        False, _SWITCH, "Whether kernel command lines come back, and boot modes, which are parts of them."
    )
    devices: tuple[Bus, ...] = _key(
        (),
        "a list of block, mic, pci, usb and webcam",
        "Classes of devices that are assigned again. The same port may be another device on this machine.",
    )
    choosable: tuple[_Choosable, ...] = _key(
        (),
        "a list such as property:autostart, feature:my-*, tag:my-tag, device:pci",
        "Settings that stay behind by the keys above, and that a person may let come back for one restore"
        " (`--allow`, or in the dialog).",
    )
    pool: _PoolName | None = _key(
        None,
        "the name of a storage pool, or null",
        "Storage pool of restored qubes. null: the system's default.",
    )

    def policy(self) -> SettingsPolicy:
        """The allow-list that these keys describe."""
        return SettingsPolicy(**self.model_dump(exclude={"pool"}))


class LimitsConfig(_Section):
    """How much one restore may create, and how long it may wait, whatever the backup says."""

    qubes: int | None = _number(
        None, 1, 4096, "Most qubes in one restore. null: as many as a backup can hold."
    )
    volume_size: int | None = _number(
        None, 1, 1 << 20, "Largest volume. null: as large as the backup says.", "GiB"
    )
    total_size: int | None = _number(
        None, 1, 1 << 20, "Largest sum of all volumes of a restore. null: as large as the backup says.", "GiB"
    )
    stall_timeout: int | None = _number(
        None,
        1,
        MAX_STALL_TIMEOUT,
        "How long a backup may bring no data, while nothing else is to be done than waiting for it. In dom0,"
        " `--stall-timeout` goes before; for a qube that asks dom0, the shorter of the two holds. null: as"
        " long as it takes.",
        "s",
    )

    @property
    def of_sizes(self) -> bool:
        """Is there any limit on the sizes of volumes?"""
        return self.volume_size is not None or self.total_size is not None


class ReportConfig(_Section):
    """The report of every restore, a JSON file each."""

    directory: _Path | None = _key(
        Path("/var/log/qubes-restore-svc"),
        _PATH_OR_NULL,
        "Where reports are kept, each for its owner and the directory's group (mode 0640), at most 8 MiB."
        " null: nowhere.",
    )
    keep: int = _number(100, 1, 100_000, "How many are kept; older ones are deleted.")
    digest: DigestKind = _key(
        "fsverity",
        "fsverity or sha256",
        "Which digest of each volume is told. fsverity: the one of `fsverity digest FILE`, for which holes"
        " cost nothing. sha256: the one of `sha256sum FILE`, which goes over every zero.",
    )


class LogConfig(_Section):
    """What is shown during a restore, for later."""

    file: _Path | None = _key(
        None,
        _PATH_OR_NULL,
        "The file that the log is appended to; a new one has the mode 0640. null: none.",
    )


class CommandConfig(_Section):
    """What becomes of `qvm-backup-restore` in dom0 when it is called without `--mgmt-vm`."""

    mgmt_vm: Literal["always", "ask", "when-asked"] = _key(
        "when-asked",
        "always, ask or when-asked",
        "Whether a throw-away qube reads the backup all the same. always: it does. ask: the person is asked;"
        " without a terminal, the command is refused. when-asked: only `--mgmt-vm` makes it so; otherwise"
        " the stock command reads the backup in dom0, after a line that says so (`-q`: without it).",
    )


class GrantConfig(_Section):
    """What a qube that dom0's policy lets call `restore.Start`, `.Verify` or `.List` may do with it."""

    verify_only: bool = _key(False, _SWITCH, "Whether it may list and verify backups, but restore none.")
    storage: tuple[_QubePattern, ...] = _key(
        (),
        _LIST,
        "Qubes that its backups may lie in, beside itself. It can run commands in each of them: a location"
        " that names no file is a command that writes the backup.",
    )
    services: tuple[_ServicePattern, ...] = _key(
        (),
        _LIST,
        "Services, `NAME` or `NAME+ARGUMENT`, that may bring its backups. dom0 calls them, in these qubes or"
        " in itself.",
    )
    dom0_directories: tuple[_Path, ...] = _key(
        (), "a list of absolute paths", "Directories of dom0; its backups may be files below them."
    )
    pools: tuple[_PoolPattern, ...] = _key(
        (), _LIST, "Storage pools that it may choose for what it restores, beside `restore.pool`."
    )
    templates: tuple[_QubePattern, ...] = _key(
        (), _LIST, "Disposable templates that it may choose for the worker, beside `worker.template`."
    )
    choosable: tuple[_SettingPattern, ...] = _key(
        (), _LIST, "Those of `restore.choosable` that it may choose (`property:autostart`, `feature:*`)."
    )
    max_memory: int | None = _number(
        None,
        *_MEMORY,
        "Most memory that the worker has for it, asked for or taken by auto. null: no more than"
        f" `worker.memory`, or {UNGRANTED_MEMORY} if that is auto.",
        "MiB",
    )
    max_vcpus: int | None = _number(
        None,
        *_VCPUS,
        "Most processors that the worker has for it. null: no more than `worker.vcpus`, or"
        f" {UNGRANTED_VCPUS} if that is auto.",
    )


class Config(_Section):
    """The whole file. Any section and any key may be missing."""

    worker: WorkerConfig = WorkerConfig()
    restore: RestoreConfig = RestoreConfig()
    limits: LimitsConfig = LimitsConfig()
    report: ReportConfig = ReportConfig()
    log: LogConfig = LogConfig()
    command: CommandConfig = CommandConfig()
    grants: Annotated[dict[_Caller, GrantConfig], BeforeValidator(_or_empty)] = Field(
        default={ANY_CALLER: GrantConfig()},
        json_schema_extra=for_people(f"names, each with keys below it: {_CALLER_EXPECTED}"),
    )

    def grant(self, caller: str) -> GrantConfig:
        """What the qube `caller` may do: its own section decides, or else the section for all others."""
        return self.grants.get(caller) or self.grants.get(ANY_CALLER) or GrantConfig()


def load_config(path: Path = CONFIG_PATH) -> Config:
    """The configuration in the file; the defaults if there is none. Raises BadConfiguration."""
    text = read_private_text(path)
    return Config() if text is None else parse_config(text, path)


def parse_config(text: str, path: Path = CONFIG_PATH) -> Config:
    """The configuration in a text. Errors name `path` as its file. Raises BadConfiguration."""
    return parse(Config, text, path)
