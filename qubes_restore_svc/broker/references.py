"""How qubes are set up on a Qubes system: their references, and the settings that may come back.

Strategy: begin with all qubes, and strike out each that lacks something that it needs. Then look again at
those that refer to it, until no more are struck out. The result does not depend on the order of the qubes,
and each is looked at only as often as something it refers to was struck out. What a reference finds:

    first    a qube of this restore, by its name in the backup, if it can serve: under its name here
    then     one that an earlier restore of the same backup brought, under this name or a numbered one
    then     a qube of the host, by the same name, if it can serve
    else     what the person chose for all that miss theirs, or the system's default, if that was chosen

What the person chose for this very qube goes before all of them. It is a qube of the host. The stock command
knows the first, the third and the last of these. But it decides in one pass, so that a qube can outlive its
template, and a default's name leads it to a qube of the backup, if one has that name.

A reference gives rights, and a backup must not give itself rights over the qubes that are here. Template and
netvm stand in the plan, where the person reads them. Two references do not stand there, and have narrower
rules. A `default_dispvm` gives the qube a shell in disposables of that template: only the system's default,
none, or a qube of this backup, unless the configuration allows it. A template gets no netvm, as a new one has
none. In doubt, a qube gets no netvm: the system's default could give it access that it must not have.

A template is a TemplateVM. The template of a DispVM is a qube that serves disposables, and only an AppVM or a
StandaloneVM can do that. So templates alone never lead in a circle, whatever a backup says. Netvms can: see
`netvms_to_give_up`.

The allow-list has already decided which settings may come back. Here, a label that this system does not know
is replaced, and a device without its backend here stays behind.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from qubes_restore_svc.broker.allowlist import AllowedSettings
from qubes_restore_svc.broker.interfaces import Definition, HostQube, QubesView
from qubes_restore_svc.wire.messages import DeviceInfo, ManifestQube
from qubes_restore_svc.wire.names import is_qube_name
from qubes_restore_svc.wire.restore_call import MAX_OFFERED, Offers, Settlement

MAX_NUMBERED = 99  #: the last number that is tried for a qube whose name is taken

#: What a qube gets whose label does not exist here, as with the stock command: the least trusted one.
_LABEL_FOR_UNKNOWN = "red"

#: The report names at most so many devices of one qube.
_MAX_TOLD = 20

#: Properties that are decided here or by qubesd. A backup never decides them, even if an allow-list lets them
#: pass.
_NOT_AS_PROPERTY = frozenset(
    {"name", "klass", "qid", "uuid", "dispid", "label", "template", "netvm", "default_dispvm"}
)

#: How qubesd writes a property that is set, in qubes.xml.
_TRUE = "True"

#: … and in lower case, how it writes that a property names no qube: now, and in R4.0.
_NONE = ("", "none")

_MAX_SHOWN = 31  #: characters of a name in a note


@dataclass(frozen=True, slots=True)
class Candidate:
    """A qube that is to be restored under `name`; `allowed`: which of its settings come back.

    `template` and `netvm` are qubes of the host that the person chose for it; `netvm` "": none. Other
    qubes can depend on its serving as netvm or disposable template only if that may come back.
    """

    source: ManifestQube
    name: str
    allowed: AllowedSettings
    template: str | None = None
    netvm: str | None = None

    def as_restored(self) -> HostQube:
        """What the qube will be on the host."""
        klass, properties = self.source.klass, self.allowed.properties
        return HostQube(
            self.name,
            klass,
            provides_network=properties.get("provides_network") == _TRUE,
            template_for_dispvms=properties.get("template_for_dispvms") == _TRUE
            and klass in ("AppVM", "StandaloneVM"),
        )


@dataclass(frozen=True, slots=True)
class Target:
    """The target of a reference: a qube's name here, and its key if this restore brings it.

    No name: the system's default (of a template: has none); "": none at all.
    """

    name: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class SetUp:
    """How a qube that can be restored is set up here.

    Its template, netvm and default_dispvm can be qubes of the same restore: their keys are told.
    `fallback_template` is the template to take if that one fails, if there is any. `notes` say what differs
    from the backup, `left_out` which of its settings stay behind.
    """

    definition: Definition
    template_key: str | None
    netvm_key: str | None
    default_dispvm_key: str | None
    fallback_template: str | None
    notes: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Missing:
    """What a qube lacks; `reason` is a clause that names it, `settled_by` what helps here."""

    what: Literal["template", "netvm"]
    reason: str
    settled_by: tuple[Settlement, ...]
    default: str | None = None  #: of the system, in its place


@dataclass(frozen=True, slots=True)
class Substitutes:
    """For qubes that lack their template or netvm, the substitute: what the person chose, or else `default`s.

    The names are of qubes of the host, which may not exist, or may not fit; `netvm` "": none at all.
    """

    template: str | None = None
    netvm: str | None = None
    defaults: bool = False


def set_up(
    candidates: Sequence[Candidate],
    system: QubesView,
    *,
    substitutes: Substitutes,
    in_backup: Collection[str],
    restored_tag: str,
    here: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, SetUp | Missing]:
    """How each candidate is set up, or why it cannot be, by its key. dom0 is no candidate.

    `in_backup`: all names in the backup; `restored_tag`: the tag of its qubes after they are
    restored. `here`: the qubes of the backup that stay, because an earlier restore has finished them, with
    their names here. The keys of templates and netvms make no circle.
    """
    search = _Search(candidates, system, substitutes, in_backup, restored_tag, here)
    search.strike_out()
    search.break_circles()
    return {qube.source.key: search.result(qube) for qube in candidates}


@dataclass
class _Search:
    """The state of it. Qubes of the backup go by their names there. The first six are those of `set_up`."""

    candidates: Sequence[Candidate]
    qubes_system: QubesView
    substitutes: Substitutes
    in_backup: Collection[str]
    restored_tag: str
    here: Mapping[str, str]

    def __post_init__(self) -> None:
        self._came_before = {
            name for name, qube in self.qubes_system.qubes.items() if self.restored_tag in qube.restored_tags
        }
        self._before: dict[str, list[str]] = {}  # what `_restored_before` has found
        self._standing = {qube.source.name: qube for qube in self.candidates}
        self._restored = {qube.source.name: qube.as_restored() for qube in self.candidates}
        self._without_netvm: frozenset[str] = frozenset()  # it would lead in a circle

    def strike_out(self) -> None:
        """Keep only the candidates that have everything they need."""
        referring: dict[str | None, list[Candidate]] = {}
        for qube in self._standing.values():
            for name in {qube.source.template, _wanted_netvm(qube)}:
                referring.setdefault(name, []).append(qube)
        to_look_at = list(self._standing.values())
        while to_look_at:
            qube = to_look_at.pop()
            lacks = isinstance(self._template(qube), Missing) or isinstance(self._netvm(qube), Missing)
            if lacks and self._standing.pop(qube.source.name, None) is not None:
                to_look_at.extend(referring.get(qube.source.name, ()))

    def break_circles(self) -> None:
        """Find out whose netvm must be given up."""
        templates: dict[str, str] = {}
        netvms: dict[str, str] = {}
        for qube in self._standing.values():
            for found, references in ((self._template(qube), templates), (self._netvm(qube), netvms)):
                if isinstance(found, Target) and found.key is not None:
                    references[qube.source.key] = found.key
        self._without_netvm = netvms_to_give_up(templates, netvms)

    def result(self, qube: Candidate) -> SetUp | Missing:
        """The result for a candidate."""
        template, netvm = self._template(qube), self._netvm(qube)
        if isinstance(template, Missing):
            return template
        if isinstance(netvm, Missing):
            return netvm
        source, allowed, notes = qube.source, qube.allowed, []
        if template.key is None and template.name is not None and template.name != source.template:
            notes.append(f"template change to '{template.name}'{self._origin(source.template, template)}")
        if source.key in self._without_netvm:
            notes.append(_without_netvm(qube, netvm))
            netvm = Target("")
        elif source.netvm and not _wanted_netvm(qube):
            then = _afterwards(qube, "netvm", self._find(source.netvm, _NETVM))
            notes.append(f"a template gets no netvm{then}")
        elif netvm.name != source.netvm and netvm.key is None and self._was_chosen(qube, netvm):
            notes.append(f"netvm change to {repr(netvm.name) if netvm.name else 'none'}, as you chose")
        elif netvm.name is None and source.netvm is not None:
            notes.append(f"netvm change to the system's default: {self._why(source.netvm, _NETVM)}")
        elif netvm.name and netvm.key is None and netvm.name != source.netvm:
            notes.append(f"netvm change to '{netvm.name}'{self._origin(source.netvm, netvm)}")
        dispvm = self._default_dispvm(qube)
        notes += self._dispvm_notes(qube, dispvm)
        label = source.label if source.label in self.qubes_system.labels else _LABEL_FOR_UNKNOWN
        if label != source.label:
            notes.append(f"label change to '{label}'")
        # A backend that this restore brings need not be there yet when its frontend is finished.
        devices = [device for device in allowed.devices if device.backend in self.qubes_system.qubes]
        stranded = [device for device in allowed.devices if device.backend not in self.qubes_system.qubes]
        notes += allowed.notes
        notes += (
            f"{_named(device)} is assigned, as the configuration allows" for device in devices[:_MAX_TOLD]
        )
        if len(devices) > _MAX_TOLD:
            notes.append(f"{len(devices) - _MAX_TOLD} more devices are assigned")
        properties = allowed.properties.items()
        return SetUp(
            Definition(
                label=label,
                template=template.name,
                netvm=netvm.name,
                default_dispvm=dispvm.name,
                properties={name: value for name, value in properties if name not in _NOT_AS_PROPERTY},
                features=allowed.features,
                tags=allowed.tags,
                devices=tuple(devices),
            ),
            template_key=template.key,
            netvm_key=netvm.key,
            default_dispvm_key=dispvm.key,
            fallback_template=self._substitute(source) if template.key else None,
            notes=tuple(notes),
            left_out=(
                *allowed.left_out,
                *(f"{_named(device)} (its backend is not here)" for device in stranded),
            ),
        )

    # --- What a reference finds --------------------------------------------------------------------

    def _template(self, qube: Candidate) -> Target | Missing:
        source = qube.source
        if source.klass not in _TEMPLATE_ROLES:
            return Target()
        role = _TEMPLATE_ROLES[source.klass]
        default = self._default(source)
        if qube.template is not None:
            if self._serves(qube.template, role):
                return Target(qube.template)
            reason = self._unfit(qube.template, role)
        elif source.template is not None and (found := self._find(source.template, role)) is not None:
            return found
        elif (substitute := self._substitute(source)) is not None:
            return Target(substitute)
        elif source.template is None and default is not None:
            return Target(default)
        else:
            reason = "it is based on the system's default"
            if source.template is not None:
                reason = f"its template {self._why(source.template, role)}"
            if self.substitutes.template is not None:
                reason += f", and {self._unfit(self.substitutes.template, role)}"
            elif default is None and (self.substitutes.defaults or source.template is None):
                reason += f", and there is no default {role.noun.removeprefix('a ')} here"
        can_choose = any(role.fits(there) for there in self.qubes_system.qubes.values())
        has_default = default is not None and not self.substitutes.defaults
        helps: dict[Settlement, bool] = {"template": can_choose, "default": has_default, "leave-out": True}
        settled_by = tuple(one for one, is_true in helps.items() if is_true)
        return Missing("template", reason, settled_by, default)

    def _netvm(self, qube: Candidate) -> Target | Missing:
        netvm, instead = _wanted_netvm(qube), self.substitutes.netvm
        if qube.netvm is not None:
            if not qube.netvm or self._serves(qube.netvm, _NETVM):
                return Target(qube.netvm)
            reason = self._unfit(qube.netvm, _NETVM)
        elif not netvm:
            return Target(netvm)
        elif (found := self._find(netvm, _NETVM)) is not None:
            return found
        elif instead is not None and (not instead or self._serves(instead, _NETVM)):
            return Target(instead)
        elif instead is None and self.substitutes.defaults:
            return Target()
        else:
            reason = f"its netvm {self._why(netvm, _NETVM)}"
            if instead is not None:
                reason += f", and {self._unfit(instead, _NETVM)}"
        return Missing("netvm", reason, ("netvm", "default", "leave-out"))

    def _was_chosen(self, qube: Candidate, netvm: Target) -> bool:
        return netvm.name is not None and netvm.name in (qube.netvm, self.substitutes.netvm)

    def _default_dispvm(self, qube: Candidate) -> Target:
        untrusted_dispvm = qube.source.properties.get("default_dispvm")
        if untrusted_dispvm is None:
            return Target()
        found = self._find(untrusted_dispvm, _DISPVM_TEMPLATE)
        if found is not None and (
            found.key is not None
            or found.name == self.qubes_system.default_dispvm
            or found.name in self._restored_before(untrusted_dispvm)
            or "default_dispvm" in qube.allowed.properties
        ):
            return found
        return Target("")

    def _dispvm_notes(self, qube: Candidate, dispvm: Target) -> Iterator[str]:
        untrusted_wanted = qube.source.properties.get("default_dispvm", "")
        if untrusted_wanted.lower() in _NONE or dispvm.key is not None:
            return
        if not dispvm.name:
            then = _afterwards(qube, "default_dispvm", self._find(untrusted_wanted, _DISPVM_TEMPLATE))
            yield f"it will have no default_dispvm: {self._why(untrusted_wanted, _DISPVM_TEMPLATE)}{then}"
        elif dispvm.name in self._restored_before(untrusted_wanted):
            if dispvm.name != untrusted_wanted:
                origin = self._origin(untrusted_wanted, dispvm)
                yield f"default_dispvm change to '{dispvm.name}'{origin}"
        elif dispvm.name != self.qubes_system.default_dispvm:
            yield f"its default_dispvm is '{dispvm.name}' of this system, as the configuration allows"

    def _find(self, name: str, role: "_Role") -> Target | None:
        qube = self._standing.get(name)
        if qube is not None and role.fits(self._restored[name]):
            return Target(qube.name, qube.source.key)
        for there in (*self._restored_before(name), name):
            if there in self.qubes_system.qubes and role.fits(self.qubes_system.qubes[there]):
                return Target(there)
        return None

    def _restored_before(self, name: str) -> list[str]:
        """The qubes that earlier restores made from the backup's qube `name`: under its name, or a numbered
        one.

        No number counts that would make the name of another qube in the backup.
        """
        if not self._came_before or name not in self.in_backup:
            return []
        if name not in self._before:
            numbered = (f"{name}-{number}" for number in range(1, MAX_NUMBERED + 1))
            names = [name, *(other for other in numbered if other not in self.in_backup)]
            found = [there for there in names if there in self._came_before]
            here = [self.here[name]] if name in self.here else []
            self._before[name] = [*here, *(one for one in found if one not in here)]
        return self._before[name]

    def _origin(self, wanted: str | None, target: Target) -> str:
        """Says of a target with another name that it comes from an earlier restore, if it does."""
        before = [] if wanted is None else self._restored_before(wanted)
        if target.name not in before:
            return ""
        others = [f"'{name}'" for name in before if name != target.name]
        also = f" (so were {', '.join(others[:3])})" if others else ""
        return f", which was restored from this backup before{also}"

    def _serves(self, name: str, role: "_Role") -> bool:
        """Is a qube of this name here, and fit?"""
        return name in self.qubes_system.qubes and role.fits(self.qubes_system.qubes[name])

    def _unfit(self, name: str, role: "_Role") -> str:
        """Why a choice of the person is not possible."""
        is_here = name in self.qubes_system.qubes
        return f"'{name}', which you chose, is {f'not {role.noun}' if is_here else 'not here'}"

    def _substitute(self, source: ManifestQube) -> str | None:
        """The template that it gets if its own cannot be had."""
        chosen = self.substitutes.template
        if chosen is not None and self._serves(chosen, _TEMPLATE_ROLES[source.klass]):
            return chosen
        # One that does not fit may be for other qubes; one that is not here is a slip, and is told.
        is_slip = chosen is not None and chosen not in self.qubes_system.qubes
        return self._default(source) if self.substitutes.defaults and not is_slip else None

    def _default(self, source: ManifestQube) -> str | None:
        """The template that the system gives a qube that names none."""
        is_disposable = source.klass == "DispVM"
        name = self.qubes_system.default_dispvm if is_disposable else self.qubes_system.default_template
        there = self.qubes_system.qubes.get(name or "")
        return name if there is not None and _TEMPLATE_ROLES[source.klass].fits(there) else None

    def _why(self, name: str, role: "_Role") -> str:
        """Why `name`, which was not found, cannot be had: `'x' is here, but is not a template`."""
        if name in self._standing:
            why = f"will be restored, but not as {role.noun}"
        elif name in self.qubes_system.qubes and role.fits(self.qubes_system.qubes[name]):
            why = "is of this system, and not of this backup"
        elif name in self.qubes_system.qubes:
            why = f"is here, but is not {role.noun}"
        elif name in self.in_backup:
            why = "is in the backup, but will not be restored"
        else:
            why = "is neither here nor in the backup"
        return f"'{name[:_MAX_SHOWN]}' {why}"


def _without_netvm(qube: Candidate, netvm: Target) -> str:
    if netvm.key == qube.source.key:
        return "it will have no netvm: it is its own"
    return f"it will have no netvm, because '{netvm.name}' depends on it{_afterwards(qube, 'netvm', netvm)}"


def _afterwards(qube: Candidate, key: str, there: Target | None) -> str:
    return "" if there is None else f" (afterwards: qvm-prefs {qube.name} {key} {there.name})"


def _named(device: DeviceInfo) -> str:
    return f"device {device.bus} {device.backend}:{device.port}"


def _wanted_netvm(qube: Candidate) -> str | None:
    """The netvm to look for; a template gets none, whatever the backup says."""
    return "" if qube.source.klass == "TemplateVM" and qube.source.netvm else qube.source.netvm


@dataclass(frozen=True, slots=True)
class _Role:
    """What a qube must be to serve in a role."""

    noun: str
    fits: Callable[[HostQube], bool]


_TEMPLATE = _Role("a template", lambda qube: qube.klass == "TemplateVM")
_DISPVM_TEMPLATE = _Role("a disposable template", lambda qube: qube.template_for_dispvms)
_NETVM = _Role("a netvm", lambda qube: qube.provides_network)

#: The classes that have a template, and what it must be.
_TEMPLATE_ROLES = {"AppVM": _TEMPLATE, "DispVM": _DISPVM_TEMPLATE}


def offers(system: QubesView) -> Offers:
    """The qubes of a system that a person can choose."""

    def fitting(role: _Role) -> tuple[str, ...]:
        names = sorted(name for name, qube in system.qubes.items() if role.fits(qube) and is_qube_name(name))
        return tuple(names[:MAX_OFFERED])

    return Offers(
        templates=fitting(_TEMPLATE), disposable_templates=fitting(_DISPVM_TEMPLATE), netvms=fitting(_NETVM)
    )


# --- Circles --------------------------------------------------------------------------------------


def netvms_to_give_up(templates: Mapping[str, str], netvms: Mapping[str, str]) -> frozenset[str]:
    """The qubes that must not wait for their netvm; without those, nothing leads back to itself.

    `templates` and `netvms` give a qube's template and netvm, for those that have one; `templates` alone
    must be free of circles.

    A qube is finished after its template and its netvm. There are two kinds of circles. One leads through a
    template. A Qubes system can be in that state: a template with the netvm sys-firewall, which is based on
    it; a disposable template with that netvm, sys-firewall being a disposable of it. There the template
    gives its netvm up, and nobody else has to. The other kind is a loop of netvms alone, which qubesd does
    not allow: all of its members give theirs up.

    The graph comes from a backup, with up to thousands of qubes in a row: time is linear, and nothing
    recurses.
    """
    qubes = templates.keys() | netvms.keys() | set(templates.values()) | set(netvms.values())
    group = _groups(
        {qube: [found[qube] for found in (templates, netvms) if qube in found] for qube in sorted(qubes)}
    )
    in_a_circle = {qube for qube, netvm in netvms.items() if group[netvm] == group[qube]}
    used_in_a_circle = {template for qube, template in templates.items() if group[template] == group[qube]}
    through_templates = in_a_circle & used_in_a_circle
    kept = {qube: netvms[qube] for qube in sorted(in_a_circle - through_templates)}
    group = _groups({qube: [netvm] for qube, netvm in kept.items()})
    return frozenset(
        through_templates | {qube for qube, netvm in kept.items() if group[netvm] == group[qube]}
    )


def _groups(edges: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """For each node, one that stands for all nodes from which it can be reached and that it can reach.

    A path-based search for strongly connected components (Gabow, 2000), its stack kept by hand.
    """
    group: dict[str, str] = {}
    order: dict[str, int] = {}
    path: list[str] = []  # nodes without a group yet, as they were met
    firsts: list[str] = []  # of these, each that may be the first of its group

    def enter(node: str) -> tuple[str, Iterator[str]]:
        order[node] = len(order)
        path.append(node)
        firsts.append(node)
        return node, iter(edges.get(node, ()))

    for start in edges:
        todo = [enter(start)] if start not in order else []
        while todo:
            node, rest = todo[-1]
            following = next(rest, None)
            if following is None:
                todo.pop()
                if firsts[-1] == node:
                    firsts.pop()
                    while node not in group:
                        group[path.pop()] = node
            elif following not in order:
                todo.append(enter(following))
            elif following not in group:
                while order[firsts[-1]] > order[following]:
                    firsts.pop()
    return group
