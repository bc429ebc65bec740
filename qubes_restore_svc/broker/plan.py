"""What is to be restored, under which name, and what is not, and why.

Strategy: a pure function from the manifest, the person's selection and the names that are taken to one
decision a qube. Nothing is created here, and nothing that is not in the plan will be.
"""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qubes_restore_svc.broker.ledger import believed_error
from qubes_restore_svc.errors import QubeExists, RestoreError, UsageError
from qubes_restore_svc.wire.messages import Manifest, ManifestQube

#: Most names that an error lists.
_MAX_LISTED = 50


class Decision(enum.Enum):
    """What happens to a qube of the backup."""

    TAKE = "take"
    LEAVE_OUT = "leave out"  # the person did not want it
    REFUSE = "refuse"  # it was wanted, and cannot be


@dataclass(frozen=True, slots=True)
class PlannedQube:
    """One qube of the backup. `name` is the broker's choice; `remark` says why, or what to know."""

    source: ManifestQube
    name: str
    decision: Decision
    remark: str = ""
    error: RestoreError | None = None


@dataclass(frozen=True, slots=True)
class UnlistedQube:
    """A qube that the worker could not list; it was wanted, because everything was."""

    name: str
    error: RestoreError


@dataclass(frozen=True, slots=True)
class Plan:
    """All qubes of the backup, in its order."""

    backup_id: str
    qubes: tuple[PlannedQube, ...]
    unlisted: tuple[UnlistedQube, ...] = ()

    @property
    def taken(self) -> tuple[PlannedQube, ...]:
        """Those that will be restored or verified."""
        return tuple(qube for qube in self.qubes if qube.decision is Decision.TAKE)


def make_plan(
    manifest: Manifest,
    *,
    names: Sequence[str] = (),
    exclude: Sequence[str] = (),
    existing: Iterable[str] | None = None,
) -> Plan:
    """Decide for every qube. No `names`: all of them. `existing`: names that are taken; None to only verify.

    dom0's home is verified like everything else, but restored only when it is named. Raises UsageError for
    names that the backup does not hold.
    """
    known = {qube.name for qube in manifest.qubes} | {qube.name for qube in manifest.refused}
    unknown = [name for name in (*names, *exclude) if name not in known]
    if unknown:
        raise UsageError(
            f"the backup holds no qube named {', '.join(repr(name) for name in unknown)}",
            advice=f"It holds: {_listed(sorted(known))}.",
        )
    taken_names = None if existing is None else {name.casefold() for name in existing}

    def decide(qube: ManifestQube) -> PlannedQube:
        if qube.name in exclude:
            return PlannedQube(qube, qube.name, Decision.LEAVE_OUT, "excluded")
        if names and qube.name not in names:
            return PlannedQube(qube, qube.name, Decision.LEAVE_OUT, "not selected")
        if taken_names is not None and qube.klass == "AdminVM" and not names:
            return PlannedQube(qube, qube.name, Decision.LEAVE_OUT, "its home comes only if you name it")
        if taken_names is not None and qube.name.casefold() in taken_names:
            error = QubeExists("a qube of this name is there already", qube=qube.name)
            return PlannedQube(qube, qube.name, Decision.REFUSE, "exists already", error)
        return PlannedQube(qube, qube.name, Decision.TAKE)

    unlisted = tuple(
        UnlistedQube(qube.name, believed_error(qube.error))
        for qube in manifest.refused
        if qube.name not in exclude and (not names or qube.name in names)
    )
    return Plan(manifest.backup_id, tuple(decide(qube) for qube in manifest.qubes), unlisted)


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return (", ".join(names[:_MAX_LISTED]) or "none at all") + more
