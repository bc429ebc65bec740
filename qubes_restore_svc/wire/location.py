"""Where a backup lies that is in a qube, as a person names it: checked before anybody is asked for it."""

import re
import unicodedata
from dataclasses import dataclass

from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.wire.names import QUBE_NAME

#: Longest location, bytes; a path has 4096 at the most, and this is written without waiting for a reader.
MAX_LOCATION = 16 << 10

_SERVICE = re.compile(r"[A-Za-z0-9_.-]+(\+[A-Za-z0-9_.+-]*)?")
_MAX_SERVICE = 200


@dataclass(frozen=True, slots=True)
class QubePath:
    """A file in a qube, or a command to be run there: if it names no file, the qube takes it for a command.

    Raises UsageError for what cannot be either. Line ends in it are dropped, as the stock program does.
    """

    qube: str
    text: str

    def __post_init__(self) -> None:
        _check_qube(self.qube)
        text = self._one_line()
        if not text.strip():
            raise UsageError("the location of the backup is empty")
        if any(unicodedata.category(char) == "Cc" for char in text):
            raise UsageError("the location of the backup contains a control character")
        try:
            size = len(self.line)
        except UnicodeEncodeError:
            raise UsageError("the location of the backup is not a text that UTF-8 can carry") from None
        if size > MAX_LOCATION:
            raise UsageError(f"the location of the backup is longer than {MAX_LOCATION} bytes")

    @property
    def line(self) -> bytes:
        """What is registered. What is not UTF-8 goes there byte for byte, as it came from the shell."""
        return self._one_line().encode("utf-8", "surrogateescape") + b"\n"

    def _one_line(self) -> str:
        return self.text.replace("\r", "").replace("\n", "")


@dataclass(frozen=True, slots=True)
class QubeService:
    """A service `NAME` or `NAME+ARG` of a qube that takes a line of paths and answers with a qfile stream."""

    qube: str
    service: str

    def __post_init__(self) -> None:
        _check_qube(self.qube)
        if not _SERVICE.fullmatch(self.service) or len(self.service) > _MAX_SERVICE:
            raise UsageError(
                "the location of the backup is not the name of a qrexec service",
                advice="Give NAME or NAME+ARGUMENT: letters, digits and -_.+; with --location-is-service.",
            )


def _check_qube(qube: str) -> None:
    if qube == "dom0":
        raise UsageError("dom0 is not a qube that a backup is fetched from", advice="Leave out -d.")
    if not re.fullmatch(QUBE_NAME, qube):
        raise UsageError("the name of the qube that holds the backup is not the name of a qube")
