"""The patterns that names and values must match before anything on this side believes them.

Strategy: every string that crosses the boundary has a type from this file. Identifiers are matched
against the pattern that Qubes itself enforces; free text, which only people read, is stripped of
everything that could steer a terminal or hide in a line. There is no plain `str` in a message.
"""

import re
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)

MAX_QUBES = 4096  #: qubes in one manifest
MAX_NUMBER = (1 << 63) - 1  #: largest size or offset in any message, bytes
MAX_COUNT = 1 << 31  #: largest number of anything that is counted
MAX_STALL_TIMEOUT = 86_400  #: seconds
MAX_PASSPHRASE = 4096  #: characters
MAX_NOTES = 256_000  #: bytes
#: Bytes of a text that qubesd takes: a request is at most 64 KiB there, with its head
#: (qubes/api/__init__.py). If a text is longer, qubesd breaks off the connection.
MAX_REQUEST = 65_000
MAX_TEXT = 1000  #: characters of a line that people read


def _pattern(pattern: str, max_length: int) -> StringConstraints:
    return StringConstraints(strict=True, pattern=pattern, max_length=max_length)


def _not_reserved(name: str) -> str:
    if name in ("none", "default", "Domain-0") or name.endswith("-dm"):
        raise ValueError("a name that Qubes keeps for itself")
    return name


TIMESTAMP = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$"


def _moment(untrusted_value: object) -> object:
    if not isinstance(untrusted_value, str):
        return untrusted_value
    try:
        if re.fullmatch(TIMESTAMP, untrusted_value, re.ASCII):
            return datetime.fromisoformat(untrusted_value)
    except ValueError:  # a month 13; its text quotes what it refuses
        pass
    raise ValueError("no moment in UTC")


def _seconds(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


#: The pattern of a qube's name.
QUBE_NAME = r"[a-zA-Z][a-zA-Z0-9_.-]{0,30}"
#: Name of a qube, as qubesd enforces it (31 characters at most; dots since R4.3).
QubeName = Annotated[str, _pattern(f"^{QUBE_NAME}$", 31), AfterValidator(_not_reserved)]
_QUBE_NAME: TypeAdapter[str] = TypeAdapter(QubeName)
#: A qube's netvm: a name, or "" for none.
NetvmName = Annotated[str, _pattern(f"^({QUBE_NAME})?$", 31), AfterValidator(_not_reserved)]
#: What the archive calls a qube (`vm10`): the first half of the argument of `restore.Volume`.
QubeKey = Annotated[str, _pattern(r"^[a-zA-Z0-9_-]+$", 64)]
#: The user whose home dom0's home is, as its directory in the archive is called.
HomeUser = Annotated[str, _pattern(r"^[A-Za-z0-9_.+@-]+$", 255)]
LabelName = Annotated[str, _pattern(r"^[a-zA-Z0-9_.-]+$", 64)]
PropertyName = Annotated[str, _pattern(r"^[a-z][a-z0-9_]*$", 64)]
FeatureName = Annotated[str, _pattern(r"^[a-zA-Z0-9_.+:-]+$", 255)]
#: Values of properties and features: printable ASCII on one line, as much as qubesd takes in one request.
SettingValue = Annotated[str, _pattern(r"^[\x20-\x7e]*$", MAX_REQUEST)]
TagName = Annotated[str, _pattern(r"^[a-zA-Z0-9_-]+$", 255)]
#: A setting of a qube: `property:autostart`, `feature:…`, `tag:…`; `device:pci` is a class of devices.
SettingName = Annotated[str, _pattern(r"^(property|feature|tag|device):[A-Za-z0-9_.-]+$", 263)]
#: What `qubes.RegisterBackupLocation` answers with: the argument of `qubes.RestoreById`.
LocationId = Annotated[str, _pattern(r"^[A-Za-z0-9]+$", 64)]
#: What qubes.xml calls a class of devices (`pci`), and one of them within its backend (`00_14.0`).
DeviceClass = Annotated[str, _pattern(r"^[a-z][a-z0-9]*$", 16)]
DevicePort = Annotated[str, _pattern(r"^[a-zA-Z0-9_.:-]+$", 128)]
#: Which device it is, whatever port it is in (`0x8086:0x1e31::p0c0330`).
DeviceIdentity = Annotated[str, _pattern(r"^[a-zA-Z0-9:?*_.,+-]+$", 128)]
BackupId = Annotated[str, _pattern(r"^[A-Za-z0-9-]+$", 128)]
FilterName = Annotated[str, _pattern(r"^[a-z0-9-]+$", 32)]
ErrorKind = Annotated[str, _pattern(r"^[a-z-]+$", 64)]
#: A storage pool, as qubesd names them.
PoolName = Annotated[str, _pattern(r"^[A-Za-z0-9_.-]+$", 64)]
#: A moment, in UTC: `2026-11-23T14:05:59Z` (RFC 3339).
Timestamp = Annotated[
    datetime,
    BeforeValidator(_moment),
    PlainSerializer(_seconds, when_used="json"),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
#: What the digest of a volume is: its fs-verity digest, which knows holes for nothing, or plain SHA-256.
DigestKind = Literal["fsverity", "sha256"]
#: A digest of either kind; the one of fs-verity is a SHA-256 as well.
Sha256 = Annotated[str, _pattern(r"^[0-9a-f]{64}$", 64)]
#: A menu entry: the name of a .desktop file.
AppmenuName = Annotated[str, _pattern(r"^[a-zA-Z0-9_.+@ -]+$", 255)]

VmClass = Literal["AdminVM", "AppVM", "TemplateVM", "StandaloneVM", "DispVM"]
#: `home` is dom0's home directory, one opaque archive; the other two are disk images.
VolumeName = Literal["root", "private", "home"]
#: The volumes that a qube of each class keeps when it stops: what a backup of it can hold.
KEPT_VOLUMES: Mapping[str, tuple[VolumeName, ...]] = {
    "AdminVM": ("home",),
    "AppVM": ("private",),
    "TemplateVM": ("root", "private"),
    "StandaloneVM": ("root", "private"),
    "DispVM": (),
}
Outcome = Literal["ok", "failed", "skipped"]

Size = Annotated[int, Field(strict=True, ge=0, le=MAX_NUMBER)]  #: bytes
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT)]
StallTimeout = Annotated[int, Field(strict=True, ge=1, le=MAX_STALL_TIMEOUT)]  #: seconds

#: What libqrexec writes before every line: time, program, process, place in its source (log.c there).
_LOG_MARKS = re.compile(
    r"^([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9:]{8}(\.[0-9]+)? )?"
    r"([A-Za-z0-9_.-]+\[[0-9]+\]: ?)?([\w./-]+\.c:[0-9]+:\w+: ?)?",
    re.ASCII,
)

_FORBIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def backup_time(backup_id: str) -> float | None:
    """When the backup was begun, in seconds since 1970, if its id says so: it begins with the local time of
    the machine then (`qubes/backup.py` of R4.3). It is read in the zone of this machine.

    The id comes from the backup.
    """
    try:
        moment = datetime.strptime(backup_id.partition("-")[0], "%Y%m%dT%H%M%S")
        return moment.astimezone(UTC).timestamp()  # so it is a moment in UTC, too
    except (ValueError, OverflowError):
        return None


def strip_control(untrusted_text: str) -> str:
    """Free text for one line: control, format, private and unassigned characters become `\ufffd`.

    That covers escape sequences, new lines, bidirectional overrides and zero-width characters.
    """
    if untrusted_text.isprintable():  # then it has none of them, and no separator but the space
        return untrusted_text
    return "".join(
        "\ufffd" if unicodedata.category(char) in _FORBIDDEN_CATEGORIES else char for char in untrusted_text
    )


def shortened(text: str, length: int) -> str:
    """`text` for one line that people read, at most `length` characters long; a cut shows as `…`.

    To be looked for in, a text is taken whole: what matters in it may stand behind the cut.
    """
    return strip_control(text if len(text) <= length else f"{text[: length - 1]}\u2026")


def last_words(untrusted_output: bytes, length: int = 300) -> str:
    """The last line of a program's output that says something, for a sentence; without qrexec's log marks.

    What Rust adds below why it ends a program says nothing.
    """
    lines = untrusted_output.decode(errors="replace").splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("note: run with `RUST_BACKTRACE")]
    return shortened(_LOG_MARKS.sub("", lines[-1].strip()), length) if lines else ""


def strip_control_lines(untrusted_text: str) -> str:
    """Free text of several lines: as `strip_control`, but line feeds and tabs stay."""
    return "".join(
        part if part in "\n\t" else strip_control(part) for part in re.split(r"([\n\t])", untrusted_text)
    )


def _text(max_length: int) -> StringConstraints:
    return StringConstraints(strict=True, max_length=max_length)


def _fits_qubesd(notes: str) -> str:
    if len(notes.encode()) > MAX_NOTES:
        raise ValueError(f"more than {MAX_NOTES} bytes")
    return notes


def _one_line(untrusted_text: str) -> str:
    if (
        any(unicodedata.category(char) in ("Cc", "Cs") for char in untrusted_text)
        or not untrusted_text.strip()
    ):
        raise ValueError("empty, or with an invalid character")
    return untrusted_text


#: A path or a command: what the person wrote, on one line; it must not be changed, so it is refused if it
#: holds control characters or what UTF-8 cannot carry. At most as many characters as a path has bytes.
LocationText = Annotated[str, _text(4096), AfterValidator(_one_line)]
#: One line that people read.
FreeText = Annotated[str, _text(MAX_TEXT), AfterValidator(strip_control)]
#: A qube's notes (qubesd allows 256,000 bytes of UTF-8).
Notes = Annotated[str, _text(MAX_NOTES), AfterValidator(strip_control_lines), AfterValidator(_fits_qubesd)]


def is_qube_name(untrusted_text: str) -> bool:
    """Can a qube be called so?"""
    try:
        _QUBE_NAME.validate_python(untrusted_text)
    except ValidationError:
        return False
    return True
