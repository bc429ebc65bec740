"""What is to be restored, under which name and how set up, and what is not, and why.

Strategy: a pure function from the manifest, the person's choice and the host as it is to one decision a
qube, in three passes: what the person wants, names (see `conflicts`), and, on a Qubes system, what a qube
needs of others (see `references`). What one pass does not take, the next does not look at. Nothing is
created here, and nothing that is not in the plan will be.
"""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from qubes_restore_svc.broker.allowlist import AllowList, AllowNothing
from qubes_restore_svc.broker.conflicts import MAX_NUMBERED, NamesInUse
from qubes_restore_svc.broker.host import Definition, HostView, QubesView, restored_tag
from qubes_restore_svc.broker.ledger import believed_error
from qubes_restore_svc.broker.references import Candidate, Missing, SetUp, set_up
from qubes_restore_svc.errors import MissingDependency, QubeExists, RestoreError, UsageError
from qubes_restore_svc.wire.messages import Manifest, ManifestQube

#: Most names that an error lists.
_MAX_LISTED = 50


class Decision(enum.Enum):
    """What happens to a qube of the backup."""

    TAKE = "take"
    LEAVE_OUT = "leave out"  # the person did not want it
    REFUSE = "refuse"  # it was wanted, and cannot be


class Problem(enum.Enum):
    """Why a qube is not taken."""

    EXCLUDED = "excluded"
    NOT_SELECTED = "not selected"
    ALREADY_EXISTS = "exists already"
    MISSING_TEMPLATE = "no template"
    MISSING_NETVM = "no netvm"
    USERNAME_MISMATCH = "another user's home"
    HOME_NOT_ASKED_FOR = "its home comes only if you name it"


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the person selected, and how what does not fit is to be settled.

    No `names`: all qubes. `conflicts`: what to do about a name that is taken; `missing`: about a template
    or netvm that is neither here nor restored (`default`: take the system's instead). `dom0_home`: restore
    dom0's home, even if it is not named; `allow`: which settings may come back.
    """

    names: Sequence[str] = ()
    exclude: Sequence[str] = ()
    conflicts: Literal["refuse", "skip", "rename"] = "refuse"
    missing: Literal["refuse", "skip", "default"] = "refuse"
    dom0_home: bool = False
    ignore_username_mismatch: bool = False
    allow: AllowList = field(default_factory=AllowNothing)


@dataclass(frozen=True, slots=True)
class PlannedQube:
    """One qube of the backup. `name` is the broker's choice; `remark` says why it is not taken.

    `notes` says what to know (renamed, another template, what exactly is missing). Of one that is taken,
    `left_out` says which of its settings stay behind; `definition` is how it is set up, on a host that has a
    system. Its template, netvm and default_dispvm can be qubes of the same restore: their keys are told, and
    `fallback_template` is what to take, if anything, should that template fail. A qube can wait for its
    template and netvm to be finished: from qube to qube these two keys never lead back.
    """

    source: ManifestQube
    name: str
    decision: Decision
    remark: str = ""
    error: RestoreError | None = None
    problem: Problem | None = None
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    definition: Definition | None = None
    template_key: str | None = None
    netvm_key: str | None = None
    default_dispvm_key: str | None = None
    fallback_template: str | None = None


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
    options: PlanOptions,
    view: HostView | None,
) -> Plan:
    """Decide for every qube. `view` is the host as it is now; None to only verify.

    dom0's home is verified like everything else, but restored only on request. Raises UsageError for
    names that the backup does not hold.
    """
    in_backup = {qube.name for qube in manifest.qubes} | {qube.name for qube in manifest.refused}
    _check_known((*options.names, *options.exclude), in_backup)
    names, exclude = frozenset(options.names), frozenset(options.exclude)
    qubes = [_selected(qube, names, exclude, options, view) for qube in manifest.qubes]
    if view is not None:
        in_use = NamesInUse(view, in_backup)
        qubes = [_named(qube, in_use, options, view.qubes_system) for qube in qubes]
        if view.qubes_system is not None:
            qubes = _set_up(qubes, view.qubes_system, options, in_backup, manifest.backup_id)
    unlisted = tuple(
        UnlistedQube(qube.name, believed_error(qube.error))
        for qube in manifest.refused
        if qube.name not in exclude and (not names or qube.name in names)
    )
    return Plan(manifest.backup_id, tuple(qubes), unlisted)


# --- What the person wants -----------------------------------------------------------------------


def _check_known(names: Iterable[str], in_backup: set[str]) -> None:
    unknown = [name for name in names if name not in in_backup]
    if unknown:
        raise UsageError(
            f"the backup holds no qube named {', '.join(repr(name) for name in unknown)}",
            advice=f"It holds: {_listed(sorted(in_backup))}.",
        )


def _selected(
    qube: ManifestQube,
    names: frozenset[str],
    exclude: frozenset[str],
    options: PlanOptions,
    view: HostView | None,
) -> PlannedQube:
    is_home = qube.klass == "AdminVM"
    planned = PlannedQube(qube, qube.name, Decision.TAKE)
    if qube.name in exclude:
        return _left_out(planned, Problem.EXCLUDED)
    if qube.name in names or (is_home and options.dom0_home):
        return planned
    if names:
        return _left_out(planned, Problem.NOT_SELECTED)
    if is_home and view is not None:
        return _left_out(planned, Problem.HOME_NOT_ASKED_FOR)
    return planned


# --- Names ---------------------------------------------------------------------------------------


def _named(
    planned: PlannedQube, in_use: NamesInUse, options: PlanOptions, system: QubesView | None
) -> PlannedQube:
    if planned.decision is not Decision.TAKE:
        return planned
    is_home = planned.source.klass == "AdminVM"
    if is_home and system is not None:  # it goes into a new directory beside what is there
        return _home(planned, options, system)
    if not in_use.has(planned.source):
        return planned
    if options.conflicts == "skip":
        return _left_out(planned, Problem.ALREADY_EXISTS)
    reason, advice = "a qube of this name is there already", None if system is None else _CONFLICT_ADVICE
    if system is not None and planned.name not in system.qubes and planned.name in system.policy_names:
        reason, advice = _has_rules(planned.name, system), _RESERVED_ADVICE
    if options.conflicts == "rename" and not is_home:
        if (name := in_use.give(planned.name)) is not None:
            return replace(planned, name=name, notes=(f"will be renamed to '{name}'",))
        reason += f", and so are those with a number up to {MAX_NUMBERED}"
    error = QubeExists(reason, qube=planned.name, advice=advice)
    return _refused(planned, Problem.ALREADY_EXISTS, error)


_CONFLICT_ADVICE = (
    "Rename or remove that one, or use --rename-conflicting to restore this one under another name, or"
    " --skip-conflicting to leave it out."
)

_RESERVED_ADVICE = (
    "Restore it in dom0, or use --rename-conflicting to restore it under another name, or --skip-conflicting"
    " to leave it out."
)


def _has_rules(name: str, system: QubesView) -> str:
    return f"rules of this system's policy are for its name ({system.policy_names[name]})"


def _home(planned: PlannedQube, options: PlanOptions, system: QubesView) -> PlannedQube:
    there, here = planned.source.home_user, system.dom0_user
    if there is None or here is None or there == here:
        return planned
    reason = f"it is the home of the user '{there}', and the user here is '{here}'"
    if options.ignore_username_mismatch:
        return replace(planned, notes=(reason,))
    error = MissingDependency(reason, qube=planned.name, advice=_USER_ADVICE)
    return _refused(planned, Problem.USERNAME_MISMATCH, error)


_USER_ADVICE = "Leave it out, or use --ignore-username-mismatch to restore it all the same."


# --- What a qube needs of others, and its settings ---------------------------------------------------


def _set_up(
    planned: list[PlannedQube],
    system: QubesView,
    options: PlanOptions,
    in_backup: set[str],
    backup_id: str,
) -> list[PlannedQube]:
    candidates = {
        qube.source.key: Candidate(qube.source, qube.name, options.allow.choose(qube.source))
        for qube in planned
        if qube.decision is Decision.TAKE and qube.source.klass != "AdminVM"
    }
    found = set_up(
        tuple(candidates.values()),
        system,
        use_defaults=options.missing == "default",
        in_backup=in_backup,
        restored_tag=restored_tag(backup_id),
    )
    decided = []
    for qube in planned:
        outcome = found.get(qube.source.key)
        if isinstance(outcome, Missing):
            qube = _lacking(qube, outcome, options)
        elif outcome is not None:
            qube = _defined(qube, outcome, system)
        decided.append(qube)
    return decided


def _lacking(planned: PlannedQube, missing: Missing, options: PlanOptions) -> PlannedQube:
    problem = Problem.MISSING_TEMPLATE if missing.what == "template" else Problem.MISSING_NETVM
    if options.missing == "skip":
        return replace(_left_out(planned, problem), notes=(missing.reason,))
    error = MissingDependency(missing.reason, qube=planned.source.name, advice=missing.advice)
    return _refused(planned, problem, error)


def _defined(planned: PlannedQube, found: SetUp, system: QubesView) -> PlannedQube:
    named = (_has_rules(planned.name, system),) if planned.name in system.policy_names else ()
    return replace(
        planned,
        notes=planned.notes + named + found.notes,
        left_out=found.left_out,
        definition=found.definition,
        template_key=found.template_key,
        netvm_key=found.netvm_key,
        default_dispvm_key=found.default_dispvm_key,
        fallback_template=found.fallback_template,
    )


# --- Small things ------------------------------------------------------------------------------------


def _left_out(planned: PlannedQube, problem: Problem) -> PlannedQube:
    source = planned.source  # a name that it would have had, and a note on that, are void
    return PlannedQube(source, source.name, Decision.LEAVE_OUT, problem.value, problem=problem)


def _refused(planned: PlannedQube, problem: Problem, error: RestoreError) -> PlannedQube:
    source = planned.source
    return PlannedQube(source, source.name, Decision.REFUSE, problem.value, error, problem)


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return (", ".join(names[:_MAX_LISTED]) or "none at all") + more
