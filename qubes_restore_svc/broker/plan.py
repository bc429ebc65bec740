"""What is to be restored, under which name and how set up, and what is not, and why.

Strategy: a pure function from the manifest, the person's choice and the host as it is to one decision a
qube, in three passes: what the person wants, names (see `NamesInUse`), and, on a Qubes system, what a qube
needs of others (see `references`). What one pass does not take, the next does not look at. Nothing is
created here, and nothing that is not in the plan will be.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qubes_restore_svc.broker.allowlist import AllowedSettings, AllowList
from qubes_restore_svc.broker.interfaces import HostView, QubesView, restored_tag
from qubes_restore_svc.broker.ledger import believed_error
from qubes_restore_svc.broker.references import MAX_NUMBERED, Candidate, Missing, SetUp, set_up
from qubes_restore_svc.errors import MissingDependency, QubeExists, RestoreError, UsageError
from qubes_restore_svc.wire.messages import ListedQube, Manifest, ManifestQube, RefusedQube
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.names import is_qube_name
from qubes_restore_svc.wire.report import remarks
from qubes_restore_svc.wire.restore_call import Choice, Plan, PlanQube, Problem

_MAX_NAME = 31  #: characters of a qube's name
_MAX_UNNUMBERED = 29  #: of it without a number

#: In lower case. qubesd would take some of them.
_DOM0_NAMES = frozenset({"dom0", "domain-0"})

#: Most names that an error lists.
_MAX_LISTED = 50

#: Why a qube is not taken, for people.
_REMARKS: dict[Problem, str] = {
    "excluded": "excluded",
    "not-selected": "not selected",
    "already-exists": "exists already",
    "missing-template": "no template",
    "missing-netvm": "no netvm",
    "username-mismatch": "another user's home",
    "home-not-asked-for": "its home comes only if you name it",
}


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and beside it what never leaves the broker.

    `sources`: the qubes that are taken as the worker listed them; `set_ups`: how they are set up, on a host
    that has a system. Both by key. From qube to qube, keys of templates and netvms never lead back.
    """

    plan: Plan
    sources: Mapping[str, ManifestQube]
    set_ups: Mapping[str, SetUp]


def make_plan(
    manifest: Manifest,
    choice: Choice,
    view: HostView | None,
    *,
    allow: AllowList | None = None,
    number: int = 1,
) -> Planned:
    """Decide for every qube. `view` is the host as it is now; None to only verify.

    `allow` says which settings may come back (None: none of them), `number` is that of the plan. dom0's home
    is verified like everything else, but restored only on request. Raises UsageError for names that the
    backup does not hold.
    """
    in_backup = {qube.name for qube in manifest.qubes} | {qube.name for qube in manifest.refused}
    _check_known((*choice.names, *choice.exclude), in_backup)
    names, exclude = frozenset(choice.names), frozenset(choice.exclude)
    qubes = [_selected(PlanQube.taken(qube), names, exclude, choice, view) for qube in manifest.qubes]
    sources = {qube.key: qube for qube in manifest.qubes}
    found: Mapping[str, SetUp | Missing] = {}
    if view is not None:
        in_use = NamesInUse(view, in_backup)
        qubes = [_named(qube, in_use, choice, view.qubes_system) for qube in qubes]
        if view.qubes_system is not None:
            candidates = [
                Candidate(source, qube.new_name, allow.choose(source) if allow else AllowedSettings())
                for qube in qubes
                if qube.decision == "take" and (source := sources[qube.key]).klass != "AdminVM"
            ]
            found = set_up(
                candidates,
                view.qubes_system,
                use_defaults=choice.missing == "default",
                in_backup=in_backup,
                restored_tag=restored_tag(manifest.backup_id),
            )
            qubes = [_set_up(qube, found.get(qube.key), choice, view.qubes_system) for qube in qubes]
    plan = Plan(
        number=number,
        mode="verify" if view is None else "restore",
        backup_id=manifest.backup_id,
        qubes=tuple(qubes),
        unlisted=tuple(
            RefusedQube(name=qube.name, error=ErrorInfo.of(believed_error(qube.error)))
            for qube in manifest.refused
            if qube.name not in exclude and (not names or qube.name in names)
        ),
    )
    set_ups = {key: one for key, one in found.items() if isinstance(one, SetUp)}
    return Planned(plan, {qube.key: sources[qube.key] for qube in plan.taken}, set_ups)


# --- What the person wants -----------------------------------------------------------------------


def _check_known(names: Iterable[str], in_backup: set[str]) -> None:
    unknown = [name for name in names if name not in in_backup]
    if unknown:
        raise UsageError(
            f"the backup holds no qube named {', '.join(repr(name) for name in unknown)}",
            advice=f"It holds: {_listed(sorted(in_backup))}.",
        )


def _selected(
    qube: PlanQube, names: frozenset[str], exclude: frozenset[str], choice: Choice, view: HostView | None
) -> PlanQube:
    is_home = qube.klass == "AdminVM"
    if qube.name in exclude:
        return _left_out(qube, "excluded")
    if qube.name in names or (is_home and choice.dom0_home):
        return qube
    if names:
        return _left_out(qube, "not-selected")
    if is_home and view is not None:
        return _left_out(qube, "home-not-asked-for")
    return qube


# --- Names ---------------------------------------------------------------------------------------


class NamesInUse:
    """The names of the host, of the backup, and those given out so far.

    Names are compared exactly, as qubesd does: a system can hold `Work` beside `work`, and a backup of it
    must come back as it was. Where a file system folds case, it says so itself when the second of two such
    names is begun. What is made up here keeps further away: it never differs from another name in case only.

    The numbering is that of the stock command: `work` becomes `work-1`, and so on to `work-99`; a name of
    more than 29 characters is cut first. (Where the stock command then makes names of 32 characters, with a
    number of two digits, we cut one more.)
    """

    def __init__(self, view: HostView, in_backup: Iterable[str]) -> None:
        self._is_system = view.qubes_system is not None
        self._on_host = view.names
        self._unavailable = {name.casefold() for name in (*view.names, *in_backup)} | _DOM0_NAMES

    def has(self, qube: ListedQube) -> bool:
        """Is there a qube of this name on the host, or could a person take it for dom0 there?"""
        looks_like_dom0 = qube.klass != "AdminVM" and qube.name.casefold() in _DOM0_NAMES
        return (self._is_system and looks_like_dom0) or qube.name in self._on_host

    def give(self, name: str) -> str | None:
        """A free name for a qube that cannot be called `name`; None if all that it could have are taken.

        It is a valid name, and neither on the host, nor in the backup, nor given out before.
        """
        for candidate in _candidates(name):
            if candidate.casefold() not in self._unavailable and is_qube_name(candidate):
                self._unavailable.add(candidate.casefold())
                return candidate
        return None


def _candidates(name: str) -> Iterator[str]:
    if len(name) > _MAX_UNNUMBERED:
        yield name[:_MAX_UNNUMBERED]
    for number in range(1, MAX_NUMBERED + 1):
        suffix = f"-{number}"
        yield name[: _MAX_NAME - len(suffix)] + suffix


def _named(qube: PlanQube, in_use: NamesInUse, choice: Choice, system: QubesView | None) -> PlanQube:
    if qube.decision != "take":
        return qube
    is_home = qube.klass == "AdminVM"
    if is_home and system is not None:  # it goes into a new directory beside what is there
        return _home(qube, choice, system)
    if not in_use.has(qube):
        return qube
    if choice.conflicts == "skip":
        return _left_out(qube, "already-exists")
    reason, advice = "a qube of this name is there already", None if system is None else _CONFLICT_ADVICE
    if system is not None and qube.name not in system.qubes and qube.name in system.policy_names:
        reason, advice = _has_rules(qube.name, system), _RESERVED_ADVICE
    if choice.conflicts == "rename" and not is_home:
        if (name := in_use.give(qube.name)) is not None:
            return _with(qube, [f"will be renamed to '{name}'"], new_name=name)
        reason += f", and so are those with a number up to {MAX_NUMBERED}"
    return _refused(qube, "already-exists", QubeExists(reason, qube=qube.name, advice=advice))


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


def _home(qube: PlanQube, choice: Choice, system: QubesView) -> PlanQube:
    there, here = qube.home_user, system.dom0_user
    if there is None or here is None or there == here:
        return qube
    reason = f"it is the home of the user '{there}', and the user here is '{here}'"
    if choice.ignore_username_mismatch:
        return _with(qube, [reason])
    error = MissingDependency(reason, qube=qube.name, advice=_USER_ADVICE)
    return _refused(qube, "username-mismatch", error)


_USER_ADVICE = "Leave it out, or use --ignore-username-mismatch to restore it all the same."


# --- What a qube needs of others, and its settings ---------------------------------------------------


def _set_up(qube: PlanQube, found: SetUp | Missing | None, choice: Choice, system: QubesView) -> PlanQube:
    if isinstance(found, Missing):
        problem: Problem = "missing-template" if found.what == "template" else "missing-netvm"
        if choice.missing == "skip":
            return _with(_left_out(qube, problem), [found.reason])
        error = MissingDependency(found.reason, qube=qube.name, advice=found.advice)
        return _refused(qube, problem, error)
    if found is None:
        return qube
    rules = [_has_rules(qube.new_name, system)] if qube.new_name in system.policy_names else []
    return _with(
        qube,
        [*rules, *found.notes],
        settings_left_out=remarks(found.left_out),
        new_template=found.definition.template,
        new_netvm=found.definition.netvm,
    )


# --- Small things ------------------------------------------------------------------------------------


def _with(qube: PlanQube, notes: Iterable[str], **fields: object) -> PlanQube:
    return qube.model_copy(update={"notes": remarks((*qube.notes, *notes)), **fields})


def _left_out(qube: PlanQube, problem: Problem) -> PlanQube:
    as_it_was = PlanQube.taken(qube)  # a name that it would have had, and a note on that, are void
    fields = {"decision": "leave-out", "problem": problem, "remark": _REMARKS[problem]}
    return as_it_was.model_copy(update=fields)


def _refused(qube: PlanQube, problem: Problem, error: RestoreError) -> PlanQube:
    fields = {"decision": "refuse", "error": ErrorInfo.of(error)}
    return _left_out(qube, problem).model_copy(update=fields)


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return (", ".join(names[:_MAX_LISTED]) or "none at all") + more
