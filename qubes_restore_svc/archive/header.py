"""backup-header: what kind of backup this is, and how its members' passphrases are made.

Strategy: one strict grammar for the text, `key=value` lines of letters, digits and dashes. The plain text is
used for one thing only, to say early which format this is; everything else is read after it has been
authenticated. In format 4, an authenticated copy is in the scrypt container, and `open_header` refuses a
backup if the two differ. In format 3, the MAC of the text itself stands behind it.
"""

import re
from dataclasses import dataclass
from typing import Literal, NoReturn

from qubes_restore_svc.archive.members import shown
from qubes_restore_svc.errors import BadHeader, NotABackup, UnsupportedFormat, UsageError

HEADER_MEMBER = "backup-header"
HEADER_HMAC_MEMBER = "backup-header.hmac"

#: Largest header, in bytes. The stock writer's has about 120.
MAX_HEADER_SIZE = 4096

#: The formats that can be restored: 4, written by Qubes R4.0 and later, and 3, by Qubes R2 to R3.2.
FORMATS = (3, 4)

#: Longest backup-id, in bytes. The stock writer's are a time and a number: 20260101T010203-1234.
MAX_BACKUP_ID_SIZE = 128

_LINE = re.compile(r"([A-Za-z0-9-]+)=([A-Za-z0-9-]*)")
_VERSION = re.compile(r"[1-9][0-9]{0,3}")
_WRITERS = {1: "Qubes R1", 2: "early versions of Qubes R2"}

_FORMAT_2_MEMBER = re.compile(r".+\.[0-9]{3}(\.hmac)?")
_FORMAT_4_MEMBER = re.compile(r".+\.[0-9]{3,}\.enc")


@dataclass(frozen=True, slots=True)
class BackupHeader:
    """The authenticated header. `compression_filter` is what the header says, not checked against what is
    known; it means nothing unless `compressed`. `backup_id` is empty in format 3, which has none, and
    `crypto_algorithm` in format 4, which has one only; it means nothing unless `encrypted`."""

    version: Literal[3, 4]
    encrypted: bool
    compressed: bool
    compression_filter: str
    hmac_algorithm: str
    backup_id: str
    crypto_algorithm: str = ""

    @property
    def effective_filter(self) -> str:
        """The filter that the contents went through; `none` if they are not compressed."""
        return self.compression_filter if self.compressed else "none"


def peek_version(untrusted_text: bytes) -> int:
    """The version of a header that is not authenticated yet: one of FORMATS, or UnsupportedFormat is raised
    with who wrote the other one. Raises BadHeader if the text is malformed."""
    version = _version(_fields(untrusted_text))
    if version not in FORMATS:
        _refuse_version(version)
    return version


def open_header(untrusted_text: bytes, text: bytes) -> BackupHeader:
    """The header, if the plain text equals the authenticated one. Raises BadHeader, UnsupportedFormat."""
    if untrusted_text != text:
        raise BadHeader("the readable header differs from its authenticated copy")
    return parse_header(text)


def parse_header(text: bytes) -> BackupHeader:
    """Parse the authenticated text. Raises BadHeader; UnsupportedFormat if the version is none of FORMATS."""
    version = peek_version(text)
    fields = _fields(text)
    encrypted = _boolean(fields, "encrypted")
    hmac_algorithm = _value(fields, "hmac-algorithm")
    crypto_algorithm = backup_id = ""
    if version == 3:
        crypto_algorithm = _value(fields, "crypto-algorithm") if encrypted else ""
    else:
        if not encrypted:
            raise BadHeader("the header says that the backup is not encrypted, which format 4 always is")
        if hmac_algorithm != "scrypt":
            raise BadHeader(
                f"the header names the hmac-algorithm {shown(hmac_algorithm)}; format 4 knows scrypt only"
            )
        backup_id = _value(fields, "backup-id")
        if backup_id.startswith("-") or not 1 <= len(backup_id) <= MAX_BACKUP_ID_SIZE:
            raise BadHeader(f"the header has the impossible backup-id {shown(backup_id)}")
    return BackupHeader(
        version=3 if version == 3 else 4,
        encrypted=encrypted,
        compressed=_boolean(fields, "compressed"),
        compression_filter=fields.get("compression-filter", "gzip"),
        hmac_algorithm=hmac_algorithm,
        backup_id=backup_id,
        crypto_algorithm=crypto_algorithm,
    )


def recognise_old_format(first_member_name: str) -> NoReturn:
    """The first member is not HEADER_MEMBER: say what kind of archive this is.

    Raises UnsupportedFormat for the formats that had no header, BadHeader for a format 4 that has lost its
    beginning, NotABackup for everything else.
    """
    if first_member_name == "qubes.xml":
        _refuse_version(1)
    if _FORMAT_2_MEMBER.fullmatch(first_member_name):
        _refuse_version(2)
    if first_member_name == HEADER_HMAC_MEMBER or _FORMAT_4_MEMBER.fullmatch(first_member_name):
        raise BadHeader(
            f"the backup begins with {shown(first_member_name)}; what stands before it is missing"
        )
    raise NotABackup(
        f"it is an archive that begins with {shown(first_member_name)}, not with {HEADER_MEMBER}"
    )


def header_passphrase(passphrase: str) -> bytes:
    """The passphrase of the header's container."""
    return _join(HEADER_MEMBER, passphrase)


def member_passphrase(backup_id: str, member: str, passphrase: str) -> bytes:
    """What the container of `member` (its name without .enc) is encrypted with; so that a chunk that was
    moved, renamed or taken from another backup does not open."""
    return _join(backup_id, member, passphrase)


def passphrase_bytes(passphrase: str) -> bytes:
    """The passphrase as it is, in UTF-8. Raises UsageError if it has no such form."""
    return _join(passphrase)


def _join(*parts: str) -> bytes:
    try:
        return "!".join(parts).encode("utf-8")
    except UnicodeEncodeError:
        # Without the cause: its text would show the passphrase.
        raise UsageError("the passphrase has characters that UTF-8 does not have") from None


def _fields(untrusted_text: bytes) -> dict[str, str]:
    if len(untrusted_text) > MAX_HEADER_SIZE:
        raise BadHeader(f"the header has more than {MAX_HEADER_SIZE} bytes")
    if not untrusted_text.isascii():
        raise BadHeader("the header has other characters than ASCII")
    if not untrusted_text.endswith(b"\n"):
        raise BadHeader(
            "the header ends in the middle of a line" if untrusted_text else "the header is empty"
        )
    fields: dict[str, str] = {}
    for line in untrusted_text.decode("ascii")[:-1].split("\n"):
        match = _LINE.fullmatch(line)
        if match is None:
            raise BadHeader(f"the header has the malformed line {shown(line)}")
        if match[1] in fields:
            raise BadHeader(f"the header has {shown(match[1])} twice")
        fields[match[1]] = match[2]
    return fields


def _version(fields: dict[str, str]) -> int:
    value = _value(fields, "version")
    if _VERSION.fullmatch(value) is None:
        raise BadHeader(f"the header has the impossible version {shown(value)}")
    return int(value)


def _refuse_version(version: int) -> NoReturn:
    if version in _WRITERS:
        raise UnsupportedFormat(
            f"the backup has format {version}, which {_WRITERS[version]} wrote",
            advice="Qubes R2 to R3.2 can restore it; a backup that is made there can be restored here.",
        )
    raise UnsupportedFormat(f"the backup has format {version}, which is newer than this program")


def _value(fields: dict[str, str], key: str) -> str:
    if key not in fields:
        raise BadHeader(f"the header does not say {key}")
    return fields[key]


def _boolean(fields: dict[str, str], key: str) -> bool:
    value = _value(fields, key)
    if value not in ("True", "False"):
        raise BadHeader(f"the header says {shown(value)} for {key}, where True or False is expected")
    return value == "True"
