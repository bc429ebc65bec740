"""The plan: which qubes are restored, under which name and how set up; which are not, and why.

Strategy: a pure function from the manifest, the person's choice and the host as it is to one decision a qube,
in three passes: what the person wants, names (see `NamesInUse`), and, on a Qubes system, what a qube needs of
others (see `references`). The next pass does not look at a qube that one pass leaves out. Nothing is created
here, and later only what is in the plan.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from qubes_restore_svc.broker.allowlist import AllowedSettings, AllowList, with_wildcards
from qubes_restore_svc.broker.interfaces import HostView, QubesView, RestoredQube, restored_tag
from qubes_restore_svc.broker.ledger import believed_error
from qubes_restore_svc.broker.references import (
    MAX_NUMBERED,
    Candidate,
    Missing,
    SetUp,
    Substitutes,
    offers,
    set_up,
)
from qubes_restore_svc.errors import MissingDependency, QubeExists, RestoreError, UsageError
from qubes_restore_svc.wire.messages import ListedQube, Manifest, ManifestQube, RefusedQube
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.names import is_qube_name
from qubes_restore_svc.wire.report import remarks
from qubes_restore_svc.wire.restore_call import (
    MAX_OFFERED,
    Choice,
    Offers,
    Plan,
    PlanQube,
    Problem,
    QubeChoice,
    Settlement,
)

_MAX_NAME = 31  #: characters of a qube's name
_MAX_UNNUMBERED = 29  #: of it without a number

#: In lower case. qubesd would take some of them.
_DOM0_NAMES = frozenset({"dom0", "domain-0"})

#: Most names that an error lists.
_MAX_LISTED = 50

#: Most patterns among the names of a choice: each is held against every qube.
_MAX_PATTERNS = 100

#: Why a qube is not taken, for people.
_REMARKS: dict[Problem, str] = {
    "excluded": "excluded",
    "not-selected": "not selected",
    "already-restored": "already restored",
    "already-exists": "exists already",
    "missing-template": "no template",
    "missing-netvm": "no netvm",
    "username-mismatch": "another user's home",
    "home-not-asked-for": "its home comes only if you name it",
    "home-not-compared": "its home cannot be compared here",
    "not-here": "missing here",
}


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and the parts of it that never leave the broker.

    `sources`: the qubes that are taken as the worker listed them; `set_ups`: how they are set up, on a host
    that has a system; `here`: those that an earlier restore has finished. All by key. From qube to qube, keys
    of templates and netvms never lead back.
    """

    plan: Plan
    sources: Mapping[str, ManifestQube]
    set_ups: Mapping[str, SetUp]
    here: Mapping[str, RestoredQube] = field(default_factory=dict)
    pool: str | None = None  #: the storage pool that the person chose


def make_plan(
    manifest: Manifest,
    choice: Choice,
    view: HostView | None,
    *,
    allow: AllowList | None = None,
    number: int = 1,
    compare: bool = False,
    restored: Iterable[RestoredQube] = (),
) -> Planned:
    """Decide for every qube. `view` is the host as it is now; None to only verify.

    `allow` says which settings may come back (None: none of them), `number` is that of the plan. dom0's home
    is verified like everything else, but restored only on request. With `compare`, the qubes of `view` are
    compared with those of the backup: what is not there is missing, and nothing is set up. `restored` are the
    qubes here that restores of this backup have finished; they stay, if that is chosen. Raises UsageError for
    names that the backup does not hold, and for a choice that allows no plan.
    """
    in_backup = {qube.name for qube in manifest.qubes} | {qube.name for qube in manifest.refused}
    names = _matching(choice.names, in_backup)
    # A script may leave dom0 out of any backup.
    exclude = _matching((name for name in choice.exclude if name != "dom0"), in_backup)
    exclude |= {"dom0"} & set(choice.exclude)
    _matching((qube.name for qube in choice.qubes), in_backup)
    chosen = {qube.name: qube for qube in choice.qubes}
    _check_choices(manifest, chosen)
    if allow is not None:
        allow.check(choice.allow)
    # If a home is here and can be compared, nobody need ask for it. On a Qubes system it cannot: see
    # `_found`.
    is_system = view is not None and view.qubes_system is not None
    spares_home = view is not None and not (compare and (is_system or "dom0" in view.names))
    qubes = [
        _selected(PlanQube.taken(qube), names, exclude, choice, spares_home=spares_home)
        for qube in manifest.qubes
    ]
    sources = {qube.key: qube for qube in manifest.qubes}
    found: Mapping[str, SetUp | Missing] = {}
    here: Mapping[str, RestoredQube] = {}
    finished: dict[str, RestoredQube] = {}
    can_choose = Offers()
    if view is not None and compare:
        qubes = [_found(qube, chosen.get(qube.name), view) for qube in qubes]
    elif view is not None:
        are_here = _by_their_names_in_the_backup(restored)
        for qube in qubes:
            before = _already_restored(qube, are_here.get(qube.name, ()), chosen.get(qube.name))
            if before is not None:
                finished[qube.key] = before
        here = finished if choice.resume else {}
        qubes = [_as_it_is_here(qube, here[qube.key]) if qube.key in here else qube for qube in qubes]
        in_use = NamesInUse(view, in_backup, [one.new_name for one in choice.qubes if one.new_name])
        qubes = [
            _named(
                qube,
                in_use,
                choice,
                chosen.get(qube.name, QubeChoice(name=qube.name)),
                view.qubes_system,
                is_finished=qube.key in finished and finished[qube.key].name == qube.name,
            )
            for qube in qubes
        ]
        if view.qubes_system is not None:
            candidates = [
                Candidate(
                    source,
                    qube.new_name,
                    allow.let_through(source, choice.allow) if allow else AllowedSettings(),
                    None if (one := chosen.get(qube.name)) is None else one.template,
                    None if one is None else one.netvm,
                )
                for qube in qubes
                if qube.decision == "take" and (source := sources[qube.key]).klass != "AdminVM"
            ]
            found = set_up(
                candidates,
                view.qubes_system,
                substitutes=Substitutes(choice.template, choice.netvm, choice.missing == "default"),
                in_backup=in_backup,
                restored_tag=restored_tag(manifest.backup_id),
                here={one.name_in_backup: one.name for one in here.values()},
            )
            qubes = [_set_up(qube, found.get(qube.key), choice, view.qubes_system) for qube in qubes]
            qubes = list(_with_later_dispvms(qubes, here, sources))
            could = dict.fromkeys(name for one in candidates for name in one.allowed.could)
            can_choose = offers(view.qubes_system).model_copy(update={"settings": tuple(could)[:MAX_OFFERED]})
    plan = Plan(
        number=number,
        mode="verify" if view is None else "compare" if compare else "restore",
        backup_id=manifest.backup_id,
        qubes=tuple(qubes),
        unlisted=tuple(
            RefusedQube(name=qube.name, error=ErrorInfo.of(believed_error(qube.error)))
            for qube in manifest.refused
            if qube.name not in exclude and (not names or qube.name in names)
        ),
        offers=can_choose,
    )
    set_ups = {key: one for key, one in found.items() if isinstance(one, SetUp)}
    return Planned(plan, {qube.key: sources[qube.key] for qube in plan.taken}, set_ups, here, choice.pool)


# --- What the person wants -----------------------------------------------------------------------


def _matching(entries: Iterable[str], in_backup: set[str]) -> frozenset[str]:
    """The qubes that fit names and patterns. Raises UsageError for a name or pattern that fits none."""
    found, unknown, patterns = set[str](), list[str](), 0
    for entry in dict.fromkeys(entries):
        if entry in in_backup:
            found.add(entry)
            continue
        is_pattern = "*" in entry or "?" in entry
        patterns += is_pattern
        if patterns > _MAX_PATTERNS:
            raise UsageError(f"there are more than {_MAX_PATTERNS} patterns", advice="Name the qubes.")
        matches = with_wildcards(entry).fullmatch
        fitting = {name for name in in_backup if matches(name)} if is_pattern else None
        if fitting:
            found |= fitting
        else:
            unknown.append(entry)
    if unknown:
        is_pattern = any("*" in entry or "?" in entry for entry in unknown)
        what = "qube that fits" if is_pattern else "qube named"
        similar = get_close_matches(unknown[0][:_MAX_LISTED], sorted(in_backup), 3, 0.6)
        meant = f"Did you mean {' or '.join(similar)}? " if similar else ""
        raise UsageError(
            f"the backup holds no {what} {', '.join(repr(name) for name in unknown)}",
            advice=f"{meant}It holds: {_listed(sorted(in_backup))}.",
        )
    return frozenset(found)


def _check_choices(manifest: Manifest, chosen: Mapping[str, QubeChoice]) -> None:
    """Raises UsageError for what cannot be chosen for a qube of its class."""
    for qube in manifest.qubes:
        one = chosen.get(qube.name)
        if one is None:
            continue
        if one.template is not None and qube.klass not in ("AppVM", "DispVM"):
            raise UsageError(f"{qube.name} has no template: it is of the class {qube.klass}", advice="")
        if one.netvm and qube.klass in ("TemplateVM", "AdminVM"):
            raise UsageError(f"{qube.name} gets no netvm: it is of the class {qube.klass}", advice="")
        if one.new_name not in (None, qube.name) and qube.klass == "AdminVM":
            raise UsageError("dom0's home cannot have another name", advice="")


def _selected(
    qube: PlanQube, names: frozenset[str], exclude: frozenset[str], choice: Choice, *, spares_home: bool
) -> PlanQube:
    is_home = qube.klass == "AdminVM"
    if qube.name in exclude:
        return _left_out(qube, "excluded")
    if is_home and spares_home and not (choice.dom0_home or qube.name in choice.names):
        # No pattern stands for it.
        return _left_out(qube, "home-not-asked-for" if not names or qube.name in names else "not-selected")
    if not names or qube.name in names or (is_home and choice.dom0_home):
        return qube
    return _left_out(qube, "not-selected")


def _found(qube: PlanQube, chosen: QubeChoice | None, view: HostView) -> PlanQube:
    """The qube to compare it with: the one of its name, or of the name that the person chose."""
    name = qube.new_name if chosen is None or chosen.new_name is None else chosen.new_name
    if qube.decision != "take":
        return qube
    if qube.klass == "AdminVM" and view.qubes_system is not None:
        return _left_out(qube, "home-not-compared")
    if name not in view.names:
        return _left_out(qube, "not-here").model_copy(update={"new_name": name})
    return qube.model_copy(update={"new_name": name})


# --- What is here already --------------------------------------------------------------------------


def _by_their_names_in_the_backup(restored: Iterable[RestoredQube]) -> Mapping[str, list[RestoredQube]]:
    found: dict[str, list[RestoredQube]] = {}
    for one in sorted(restored, key=lambda one: one.name):
        found.setdefault(one.name_in_backup, []).append(one)
    return found


def _already_restored(
    qube: PlanQube, here: Iterable[RestoredQube], chosen: QubeChoice | None
) -> RestoredQube | None:
    """The one that this qube has become in an earlier restore, if it is as whole as the backup promises, and
    has the name that the person chose, if one was."""
    name = None if chosen is None else chosen.new_name
    promised = {volume.name for volume in qube.volumes}
    for one in here:
        if (
            qube.decision == "take"
            and name in (None, one.name)
            and promised <= {volume.name for volume in one.volumes}
        ):
            return one
    return None


def _with_later_dispvms(
    qubes: Sequence[PlanQube], here: Mapping[str, RestoredQube], sources: Mapping[str, ManifestQube]
) -> Iterator[PlanQube]:
    """A qube that is here has no default_dispvm, if the restore that has finished it never came to that one.
    It may be in use by now, so it is not given one without being asked for."""
    taken = {qube.name: qube.new_name for qube in qubes if qube.decision == "take"}
    for qube in qubes:
        dispvm = (
            taken.get(sources[qube.key].properties.get("default_dispvm", "")) if qube.key in here else None
        )
        then = f"qvm-prefs {qube.new_name} default_dispvm {dispvm}"
        note = f"its default disposable template comes only now (afterwards: {then})"
        yield qube if dispvm is None else _with(qube, [note])


def _as_it_is_here(qube: PlanQube, here: RestoredQube) -> PlanQube:
    return _left_out(qube, "already-restored").model_copy(update={"new_name": here.name})


# --- Names ---------------------------------------------------------------------------------------


class NamesInUse:
    """The names of the host, of the backup, and those given out so far.

    Names are compared exactly, as qubesd does: a system can hold `Work` beside `work`, and a backup of it
    must come back as it was. Where a file system folds case, it says so itself when the second of two such
    names is begun. A name that is made up here is more careful: it never differs from another name in case
    only.

    The numbering is that of the stock command: `work` becomes `work-1`, and so on to `work-99`; a name of
    more than 29 characters is cut first. (Where the stock command then makes names of 32 characters, with a
    number of two digits, we cut one more.)
    """

    def __init__(self, view: HostView, in_backup: Collection[str], chosen: Iterable[str]) -> None:
        """`chosen`: names that the person has chosen for some."""
        self._is_system = view.qubes_system is not None
        self._on_host = view.names
        self._in_backup = in_backup
        self._taken: set[str] = set()
        self._unavailable = {one.casefold() for one in (*view.names, *in_backup, *chosen)} | _DOM0_NAMES

    def has(self, qube: ListedQube) -> bool:
        """Is there a qube of this name on the host, or could a person confuse the name with dom0?"""
        looks_like_dom0 = qube.klass != "AdminVM" and qube.name.casefold() in _DOM0_NAMES
        return (self._is_system and looks_like_dom0) or qube.name in self._on_host

    def take(self, name: str, of: str) -> str | None:
        """Take a name that the person chose for the qube `of` of the backup; returns the reason if that is
        not possible. The name of another qube of the backup is not possible, nor a numbered form of it: a
        reference to that qube would find this one, now or in a later restore.
        """
        base, _, number = name.rpartition("-")
        if name.casefold() in _DOM0_NAMES:
            return "that is a name of dom0"
        if name in self._on_host:
            return "a qube of this name is there already"
        if name in self._in_backup:
            return "the backup has another qube of this name"
        if number.isdecimal() and base != of and base in self._in_backup:
            return f"'{base}' of the backup is called so if its own name is taken"
        if name in self._taken:
            return "another qube of this restore gets this name"
        self._taken.add(name)
        return None

    def give(self, name: str) -> str | None:
        """A free name for a qube that cannot be called `name`; None if all possible names are taken.

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


def _named(
    qube: PlanQube,
    in_use: NamesInUse,
    choice: Choice,
    chosen: QubeChoice,
    system: QubesView | None,
    *,
    is_finished: bool,
) -> PlanQube:
    if qube.decision != "take":
        return qube
    is_home = qube.klass == "AdminVM"
    if is_home and system is not None:  # it goes into a new directory beside what is there
        return _home(qube, choice, system)
    if chosen.new_name not in (None, qube.name):
        assert chosen.new_name is not None
        why = in_use.take(chosen.new_name, qube.name)
        if why is None:
            return _with(qube, [f"will be renamed to '{chosen.new_name}'"], new_name=chosen.new_name)
        reason = f"it cannot be called '{chosen.new_name}': {why}"
        error = QubeExists(reason, qube=qube.name, advice="")
        return _refused(qube, "already-exists", error, ("new-name", "leave-out"))
    if not in_use.has(qube):
        return qube
    if choice.conflicts == "skip":
        return _left_out(qube, "already-exists")
    reason, advice = "a qube of this name is there already", None if system is None else ""
    if is_finished:
        reason += ": an earlier restore of this backup has finished it"
        reason += " (--skip-existing leaves it as it is)" if system is None else ""
        advice = None if system is None else "Leave it as it is, and restore the others (--resume). Or:"
    elif choice.resume:
        reason += ", and nothing proves that an earlier restore of this backup has finished it"
    if system is not None and qube.name not in system.qubes and qube.name in system.policy_names:
        reason, advice = _has_rules(qube.name, system), "Restore it in dom0. Or:"
    settled_by: tuple[Settlement, ...] = ("leave-out",)
    if not is_home:
        name = in_use.give(qube.name)
        if choice.conflicts == "rename" and name is not None:
            return _with(qube, [f"will be renamed to '{name}'"], new_name=name)
        if name is None:
            reason += f", and so are those with a number up to {MAX_NUMBERED}"
        settled_by = ("new-name", *(("number",) if name else ()), "leave-out")
    error = QubeExists(reason, qube=qube.name, advice=advice)
    return _refused(qube, "already-exists", error, settled_by)


def _has_rules(name: str, system: QubesView) -> str:
    return f"rules of this system's policy are for its name ({system.policy_names[name]})"


def _home(qube: PlanQube, choice: Choice, system: QubesView) -> PlanQube:
    there, here = qube.home_user, system.dom0_user
    if there is None or here is None or there == here:
        return qube
    reason = f"it is the home of the user '{there}', and the user here is '{here}'"
    if choice.ignore_username_mismatch:
        return _with(qube, [reason])
    error = MissingDependency(reason, qube=qube.name, advice="")
    return _refused(qube, "username-mismatch", error, ("ignore", "leave-out"))


# --- What a qube needs of others, and its settings ---------------------------------------------------


def _set_up(qube: PlanQube, found: SetUp | Missing | None, choice: Choice, system: QubesView) -> PlanQube:
    if isinstance(found, Missing):
        problem: Problem = "missing-template" if found.what == "template" else "missing-netvm"
        if choice.missing == "skip":
            return _with(_left_out(qube, problem), [found.reason])
        error = MissingDependency(found.reason, qube=qube.name, advice="")
        return _refused(qube, problem, error, found.settled_by, found.default)
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
    as_it_was = PlanQube.taken(qube)  # its new name, and the note on that, count no more
    fields = {"decision": "leave-out", "problem": problem, "remark": _REMARKS[problem]}
    return as_it_was.model_copy(update=fields)


#: What a person does about a problem on the command line; `{default}`: what the system's default is.
_REMEDIES: dict[tuple[Problem, Settlement], str] = {
    ("already-exists", "new-name"): "give it another name (--name QUBE=NEW)",
    ("already-exists", "number"): "have a number added to it (--rename-conflicting)",
    ("already-exists", "leave-out"): "leave it out (--skip-conflicting)",
    ("missing-template", "template"): "choose one that is here (--template QUBE=TEMPLATE)",
    ("missing-template", "default"): "take the default, {default} (--ignore-missing)",
    ("missing-template", "leave-out"): "leave it out (--skip-broken)",
    ("missing-netvm", "netvm"): "choose one that is here, or none (--netvm QUBE=NETVM, --netvm QUBE=none)",
    ("missing-netvm", "default"): "take the default netvm (--ignore-missing)",
    ("missing-netvm", "leave-out"): "leave it out (--skip-broken)",
    ("username-mismatch", "ignore"): "restore it all the same (--ignore-username-mismatch)",
    ("username-mismatch", "leave-out"): "leave it out",
}


def _advice(problem: Problem, settled_by: Sequence[Settlement], default: str) -> str:
    """A sentence with everything that solves it; the options are those of `qvm-backup-restore`."""
    remedies = [_REMEDIES[problem, one].format(default=default) for one in settled_by]
    text = ", or ".join(remedies)
    return f"{text[0].upper()}{text[1:]}."


def _refused(
    qube: PlanQube,
    problem: Problem,
    error: RestoreError,
    settled_by: Sequence[Settlement],
    default: str | None = None,
) -> PlanQube:
    if error.advice != error.default_advice:  # outside of a Qubes system there are no such options
        error.advice = f"{error.advice} {_advice(problem, settled_by, default or '')}".strip()
    fields = {"decision": "refuse", "error": ErrorInfo.of(error), "settled_by": tuple(settled_by)}
    return _left_out(qube, problem).model_copy(update=fields)


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return (", ".join(names[:_MAX_LISTED]) or "none at all") + more
