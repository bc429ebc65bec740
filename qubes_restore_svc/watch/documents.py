"""What a check of the newest backup in a place found: the document that is kept, and collected."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from qubes_restore_svc.report_file import KeptReport
from qubes_restore_svc.wire.documents import Document
from qubes_restore_svc.wire.models import Model
from qubes_restore_svc.wire.names import BackupId, FreeText, Timestamp

#: Bad: a part of it is damaged or missing. Not verified: something
#: else kept it from being verified.
State = Literal["good", "no backup", "bad", "not verified", "too old"]

#: What a place, and a machine, may be called: they name files.
PlaceName = Annotated[str, StringConstraints(strict=True, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]
MachineName = Annotated[str, StringConstraints(strict=True, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}$")]

#: Days that a backup may be old.
MaxAge = Annotated[int, Field(strict=True, ge=1, le=3650)]


class Findings(Model):
    """What of a check matters to whoever reads many."""

    state: State  #: of what is not good, the first that holds
    reason: FreeText  #: why, or how much is good; a clause
    backup: FreeText | None = None  #: which it was: a file, or where it was looked for; `null`: none
    backup_time: Timestamp | None = None  #: when it was made, by the clock of the machine; `null`: not known
    max_age_days: MaxAge  #: how old it may be
    started: Timestamp  #: when the check began
    finished: Timestamp  #: when it ended


class WatchReport(Findings, Document):
    """What a check of the newest backup in a place found."""

    type: Literal["watch"] = "watch"
    place: PlaceName  #: what its settings are called
    backup_id: BackupId | None = None  #: `null`: the backup did not even open
    verification: KeptReport | None = None  #: the report of the verification; `null`: it did not begin
