"""The Admin API of a Qubes system, as far as a restore needs it: the only module that imports `qubesadmin`.

Strategy: plain values go in and come out. `qubesadmin` is untyped and caches what it has seen, so nothing of
it leaves this module, every look-up is made afresh, and every call stands inside `asking`. The library raises
whatever class qubesd names, and some that it does not mean to (a KeyError, an AssertionError over an answer
that was cut off). `asking` makes of each a HostFailed (or NoSpace, QubeExists, QubeInUse) that names the qube
and what was being done. The library is imported when a system is asked for: only dom0 has it.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, BinaryIO, Literal, Protocol, TypeVar

from qubes_restore_svc.broker.filesystem import reporting
from qubes_restore_svc.broker.interfaces import RESTORED_TAG, HostQube
from qubes_restore_svc.errors import HostFailed, NoSpace, QubeExists, RestoreError
from qubes_restore_svc.wire.messages import DeviceInfo
from qubes_restore_svc.wire.names import MAX_REQUEST, strip_control

#: Seconds until a qube that was killed must be gone. Its cleaning up takes a few on a busy system.
DESTROY_TIMEOUT_S = 60.0

_PAUSE_S = 0.1
_MAX_TEMPLATES = 4  #: how far a chain of templates is followed; real ones have two
_COPYING_FAILED = "error copying data"  #: all that the import tells of a disk that is full, or broken
_SUPPORTED = "supported-rpc."
_Value = TypeVar("_Value", str, bool)
_Answer = TypeVar("_Answer")

#: Characters of a text that are shown: its beginning, and its end, where the reason stands as a rule. It is
#: searched whole: a failed import begins with the command that was run.
_HEAD, _TAIL = 120, 180
_NO_ROOM = re.compile(
    r"no space left|disk quota exceeded|(insufficient|not enough|out of) (free )?(disk )?(space|extents)",
    re.IGNORECASE,
)
_ASK_THE_JOURNAL = "Look at `journalctl -u qubesd` in dom0 for the cause."


class QubeInUse(HostFailed):
    """A qube cannot be removed because others refer to it (as template, netvm or default)."""


class NotEnoughMemory(HostFailed):
    """A qube was not started, because its memory is not there."""


class CreationWatcher(Protocol):
    """Is told which qubes come into being, so that none is lost if this process is killed meanwhile."""

    def creating(self, name: str) -> None:
        """`name`, which is free, will now be asked for."""

    def created(self, name: str) -> None:
        """`name` carries its tags now, or is gone. Not told if it could not be removed again."""


class ServiceProcess(Protocol):
    """The process that carries one qrexec call (`qrexec-client`), a child of this process."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs. Reaps the process."""

    def kill(self) -> None:
        """Kill it, if it still runs."""


class QubesSystem:
    """A Qubes system, seen from dom0. Safe to use from several threads. All calls block."""

    def __init__(self, app: Any) -> None:
        """`app` is a `qubesadmin.Qubes`; see `connect`."""
        self._app = app
        self._cache = threading.RLock()  #: held while `app` fills or empties its list of qubes
        self._watchers: list[CreationWatcher] = []

    @classmethod
    def connect(cls) -> "QubesSystem":
        """The system that this program runs on. Raises HostFailed if this is no dom0, or qubesd is mute."""
        try:
            import qubesadmin
        except ModuleNotFoundError:
            raise HostFailed(
                "this is not the dom0 of a Qubes system",
                advice="Run it in dom0. On any other machine, `qubes-restore-svc` opens the backup.",
            ) from None
        with asking("asking qubesd"):
            app = qubesadmin.Qubes()
            if app.qubesd_connection_type != "socket":
                raise HostFailed("this is not the dom0 of a Qubes system", advice="Run it in dom0.")
            if "dom0" not in app.domains:
                raise HostFailed("asking qubesd failed: it does not know of dom0", advice="")
        return cls(app)

    @contextmanager
    def watched_by(self, watcher: CreationWatcher) -> Iterator[None]:
        """Have `watcher` told of all creations meanwhile."""
        self._watchers.append(watcher)
        try:
            yield
        finally:
            self._watchers.remove(watcher)

    # --- Looking ---------------------------------------------------------------------------------

    def exists(self, name: str) -> bool:
        """Is there a qube of that name?"""
        with asking("looking for the qube", qube=name), self._cache:
            self._app.domains.clear_cache()
            return name in self._app.domains

    def may_exist(self, name: str) -> bool:
        """False if it is known that there is no qube of that name."""
        try:
            return self.exists(name)
        except HostFailed:
            return True

    def qubes(self) -> list[HostQube]:
        """All qubes, dom0 among them."""

        def ask(name: str, qube: Any) -> HostQube:
            return HostQube(
                name,
                str(qube.klass),
                provides_network=_property(qube, "provides_network", False),
                template_for_dispvms=_property(qube, "template_for_dispvms", False),
                restored_tags=frozenset(tag for tag in map(str, qube.tags) if tag.startswith(RESTORED_TAG)),
            )

        return list(self._of_each("listing the qubes", ask))

    def default(self, key: Literal["default_template", "default_dispvm", "management_dispvm"]) -> str | None:
        """The template of new qubes, the disposable template that qubes use unless they name another, or the
        one that dom0 uses to manage qubes."""
        with asking(f"asking for the property {key} of the system"):
            return _property(self._app, key, "") or None

    def labels(self) -> frozenset[str]:
        """The names of all labels."""
        with asking("listing the labels"):
            return frozenset(str(label) for label in self._app.labels)

    def free_space(self, pool: str | None = None) -> int | None:
        """Bytes that are free in `pool` (None: the default pool), if its driver tells."""
        room = self._pool_room(pool)
        return None if room is None else room[0]

    def memory(self) -> int | None:
        """MiB of memory that the computer has, used or not; None where the system does not tell."""
        with suppress(HostFailed, KeyError, ValueError), asking("asking for the computer's memory"):
            # Of dom0 it is the computer's (qubes/vm/adminvm.py there). The library has no name for it.
            answer = self._app.qubesd_call("dom0", "admin.vm.CurrentState").decode("ascii", "replace")
            return int(dict(part.split("=", 1) for part in answer.split())["mem_static_max"]) or None
        return None

    def volume_room(self, name: str, volume: str) -> tuple[int, int] | None:
        """Free bytes and size of the pool in which the volume lies, as far as they can be known."""
        with suppress(HostFailed):
            with asking("asking for its storage pool", qube=name, volume=volume):
                pool = str(self._qube(name).volumes[volume].pool)
            return self._pool_room(pool)
        return None

    def _pool_room(self, pool: str | None) -> tuple[int, int] | None:
        with asking("asking for the free space"):
            name = pool or _property(self._app, "default_pool", "")
            if name not in self._app.pools:
                raise HostFailed(f"there is no storage pool {name!r}", advice="See `qvm-pool`.")
            size, usage = self._app.pools[name].size, self._app.pools[name].usage
            return None if size is None or usage is None else (max(0, int(size) - int(usage)), int(size))

    def template_of(self, name: str) -> str | None:
        """The qube's template; None if it has none."""
        with asking("asking for its template", qube=name):
            return _property(self._qube(name), "template", "") or None

    def is_disposable_template(self, name: str) -> bool | None:
        """Can disposables be made from it? None: there is no such qube."""
        if not self.exists(name):
            return None
        with asking("asking whether it is a disposable template", qube=name):
            return _property(self._qube(name), "template_for_dispvms", False)

    def reports_service(self, name: str, service: str) -> bool | None:
        """Does the qube, or its template, say that it has the service? None if neither says of any."""
        reports: bool | None = None
        qube: str | None = name
        for _ in range(_MAX_TEMPLATES):
            if qube is None:
                break
            with asking("asking which services it has", qube=qube):
                features = self._qube(qube).features
                reported = [feature for feature in features if feature.startswith(_SUPPORTED)]
                if _SUPPORTED + service in reported and features[_SUPPORTED + service]:
                    return True
            reports = False if reported else reports
            qube = self.template_of(qube)
        return reports

    def is_running(self, name: str) -> bool:
        """Is it anything but halted?"""
        with asking("asking for its state", qube=name):
            return bool(self._qube(name).is_running())

    def klass(self, name: str) -> str:
        """The qube's class, such as `AppVM`."""
        with asking("asking for its class", qube=name):
            return str(self._qube(name).klass)

    def tags(self) -> Mapping[str, frozenset[str]]:
        """The tags of every qube, by its name."""
        return dict(
            self._of_each("listing the tags", lambda name, qube: (name, frozenset(map(str, qube.tags))))
        )

    def features_of_tagged(self, tag: str, without: Collection[str], feature: str) -> dict[str, str]:
        """The value of `feature` of each qube that carries `tag`, none of the tags `without`, and has it."""

        def ask(name: str, qube: Any) -> tuple[str, str | None]:
            tags = frozenset(map(str, qube.tags))
            is_asked = tag in tags and tags.isdisjoint(without)
            return name, qube.features.get(feature) if is_asked else None

        found = self._of_each(f"asking for the feature {feature}", ask)
        return {name: str(value) for name, value in found if value is not None}

    def remove_feature(self, name: str, key: str) -> None:
        """Remove a feature, which the qube has."""
        with asking(f"removing feature {key}", qube=name):
            del self._qube(name).features[key]

    def tagged(self, tag: str) -> list[str]:
        """The names of the qubes that carry `tag`."""
        return [name for name, tags in self.tags().items() if tag in tags]

    def saved_volumes(self, name: str) -> frozenset[str]:
        """Its volumes that keep their content when it stops: those that a backup can hold."""
        with asking("listing its volumes", qube=name):
            volumes = self._qube(name).volumes
            return frozenset(str(volume) for volume in volumes if volumes[volume].save_on_stop)

    def saved_volume_pools(self, name: str) -> dict[str, str]:
        """The storage pools of its volumes that keep their content when it stops."""
        with asking("listing its volumes", qube=name):
            volumes = self._qube(name).volumes
            return {
                str(volume): str(volumes[volume].pool) for volume in volumes if volumes[volume].save_on_stop
            }

    def volume_file(self, name: str, volume: str) -> Path:
        """The device or file of a volume, as it is when its qube is halted.

        Raises HostFailed, also for a driver with which nobody has tried to read it.
        """
        return self._volume_place(name, volume)[1]

    def volume_changed(self, name: str, volume: str) -> float | None:
        """When the volume got the content that `clone_volume` clones, in seconds since 1970; None: not known.

        Raises HostFailed, also where `volume_file` does.
        """
        driver, file = self._volume_place(name, volume)
        if (
            driver == "file-reflink"
        ):  # each stop of the qube puts another file here, with the time of its last write
            with reporting(f"looking at {file}", qube=name, volume=volume):
                return file.stat().st_mtime
        with asking("asking for its revisions", qube=name, volume=volume):
            # LVM calls a revision by the time when the next content took its place.
            revisions = [str(one) for one in self._qube(name).volumes[volume].revisions]
            return max((float(one.removesuffix("-back")) for one in revisions), default=None)

    def _volume_place(self, name: str, volume: str) -> tuple[str, Path]:
        with asking("asking where it lies", qube=name, volume=volume):
            # The library has no name for the path.
            answer = self._app.qubesd_call(name, "admin.vm.volume.Info", volume).decode("ascii")
            info = dict(line.split("=", 1) for line in answer.splitlines())
            pool, path = info["pool"], info["path"]
            driver = str(self._app.pools[pool].driver)
        if driver == "lvm_thin":
            return driver, Path(path)
        if driver == "file-reflink":  # qubesd tells the file that a running qube writes to
            return driver, Path(path.removesuffix("-dirty.img") + ".img")
        raise HostFailed(
            f"it lies in the storage pool {pool}, and volumes of the driver {driver} cannot be compared",
            qube=name,
            volume=volume,
            advice="Those of lvm_thin and file-reflink can.",
        )

    # --- Creating and removing -------------------------------------------------------------------

    def create(
        self,
        name: str,
        klass: str,
        label: str,
        *,
        template: str | None = None,
        pool: str | None = None,
        pools: Mapping[str, str] = MappingProxyType({}),
        tags: Sequence[str] = (),
        properties: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Create a qube, with `tags` before `properties`. Raises QubeExists, NoSpace or HostFailed.

        `pool` is for all its volumes, `pools` for single ones; only one of them can be given.

        Then nothing of it is left, or what the error says.
        """
        if self.exists(name):
            raise _taken(name)
        for watcher in self._watchers:
            watcher.creating(name)
        try:
            self._add(klass, name, label, template, pool, pools)
            for tag in tags:
                self.add_tag(name, tag)
            for key, value in properties.items():
                self.set_property(name, key, value)
        except QubeExists:  # it has appeared meanwhile, and is not ours
            self._tell_created(name)
            raise
        except HostFailed as error:
            try:
                self.remove(name)
            except HostFailed as left:
                error.reason += f"; what was created of it is still there, because {left.reason}"
                error.advice = f"Remove it with `qvm-remove {name}`."
            else:
                self._tell_created(name)
            raise
        self._tell_created(name)

    def remove(self, name: str) -> None:
        """Remove a halted qube and its volumes; nothing if it is gone. Raises QubeInUse or HostFailed."""
        if not self.exists(name):
            return
        if self.is_running(name):
            raise HostFailed("removing the qube failed: it is running", qube=name)
        try:
            with asking("removing the qube", qube=name), self._cache:
                del self._app.domains[name]
        except QubeInUse:
            raise
        except HostFailed:
            if self.exists(name):
                raise
        if self.exists(name):
            raise HostFailed("removing the qube failed: it is still there", qube=name)

    def start(self, name: str) -> None:
        """Start a qube and wait until it is up. Raises HostFailed; NotEnoughMemory if its memory is not
        there, and then a disposable is removed."""
        with asking("starting the qube", qube=name):
            self._qube(name).start()

    def destroy(self, name: str) -> None:
        """Kill a disposable, or remove it if it does not run, and wait until it is gone.

        Harmless when it is gone already. Raises HostFailed if it is not gone after `DESTROY_TIMEOUT_S`.
        """

        def attempt() -> None:  # it may be starting, halting, or being removed by somebody else
            if not self.exists(name):
                return
            if self.is_running(name):
                with asking("killing the qube", qube=name):
                    self._qube(name).kill()
            else:
                self.remove(name)
            if self.exists(name):
                raise HostFailed("it was killed, and is still there", qube=name)

        insist(attempt, DESTROY_TIMEOUT_S)

    # --- Setting ---------------------------------------------------------------------------------

    def add_tag(self, name: str, tag: str) -> None:
        """Set a tag; one that it has already stays."""
        qube = self._qube(name)
        try:
            with asking(f"setting tag {tag}", qube=name):
                qube.tags.add(tag)
        except HostFailed:
            # Some tags are qubesd's own business; one of them that is there is as good as set.
            with asking(f"asking for tag {tag}", qube=name):
                if tag in qube.tags:
                    return
            raise

    def discard_tag(self, name: str, tag: str) -> None:
        """Remove a tag; nothing if the qube does not have it, or is gone."""
        if self.exists(name):
            with asking(f"removing tag {tag}", qube=name):
                self._qube(name).tags.discard(tag)

    def set_property(self, name: str, key: str, value: str | None) -> None:
        """Set a property, as text. None makes it the default again; "" means no qube, for a reference."""
        with asking(f"setting property {key}", qube=name):
            qube = self._qube(name)
            # `qubesadmin` takes an assignment to what is an attribute of its own for just that; and setting
            # `name`, which is both, renames the qube.
            if hasattr(type(qube), key) or key not in qube.property_list():
                raise HostFailed(f"setting property {key} failed: the qube has no such property", qube=name)
            if value is None:
                delattr(qube, key)
            else:
                setattr(qube, key, value)

    def set_default_dispvm(self, name: str, dispvm: str) -> None:
        """Give the qube its disposable template; "" is none. qubesd itself would take any qube for one."""
        if dispvm and not self.is_disposable_template(dispvm):
            raise HostFailed(
                f"setting property default_dispvm failed: {dispvm} is no disposable template", qube=name
            )
        self.set_property(name, "default_dispvm", dispvm)

    def disconnect(self, name: str, tag: str) -> bool:
        """Take the netvm away from a halted qube that carries `tag`; says whether it is such a qube."""
        with asking("taking its netvm away", qube=name):
            qube = self._qube(name)
            if tag not in qube.tags or qube.is_running():
                return False
            qube.netvm = None
        return True

    def set_feature(self, name: str, key: str, value: str) -> None:
        """Set a feature; "" means false."""
        with asking(f"setting feature {key}", qube=name):
            self._qube(name).features[key] = value

    def set_notes(self, name: str, notes: str) -> None:
        """Set the qube's notes, as far as qubesd takes them; raises HostFailed if that is not all of them."""
        fitting = notes.encode()[:MAX_REQUEST].decode(errors="ignore")
        with asking("setting its notes", qube=name):
            self._qube(name).set_notes(fitting)
        if fitting != notes:
            raise HostFailed(
                f"its notes end after {len(fitting.encode())} bytes, which is what Qubes takes at once;"
                " the whole text stays in the backup, from where `qubes-restore-svc extract` brings it",
                qube=name,
            )

    def set_firewall(self, name: str, rules: Sequence[str]) -> None:
        """Replace the firewall's rules, given as qubesd writes them; what none of them matches is dropped.

        All of them are set or, with HostFailed, none.
        """
        size = sum(len(rule) + 1 for rule in rules)
        if size > MAX_REQUEST:
            raise HostFailed(
                f"{len(rules)} firewall rules of {size} bytes, and Qubes takes {MAX_REQUEST} at once",
                qube=name,
            )
        with asking("setting its firewall rules", qube=name):
            # Not the rules' own class, which leaves out a destination of 0.0.0.0/0, and thereby lets an IPv4
            # rule match IPv6. `qubesadmin` asks for no more of a rule than its text.
            self._qube(name).firewall.rules = [SimpleNamespace(rule=rule) for rule in rules]

    def assign_device(self, name: str, device: DeviceInfo) -> None:
        """Assign a device of another qube, to be attached whenever the qube starts."""
        with asking(f"assigning {device.bus} device {device.backend}:{device.port}", qube=name):
            from qubesadmin.device_protocol import DeviceAssignment  # R4.3; without it the rest still works

            assignment = DeviceAssignment.new(
                backend_domain=self._qube(device.backend),
                port_id=device.port,
                devclass=device.bus,
                device_id=device.identity,
                options=dict(device.options),
                mode="required" if device.required else "auto-attach",
            )
            self._qube(name).devices[device.bus].assign(assignment)

    # --- Data ------------------------------------------------------------------------------------

    def import_volume(self, name: str, volume: str, stream: BinaryIO, size: int) -> None:
        """Make the volume `size` bytes large and fill it with exactly as many from `stream`; closes it.

        Returns when the data is on the disk. Raises NoSpace or HostFailed, also if more or fewer bytes come;
        the volume is then what it was before.
        """
        try:
            with asking("importing the volume", qube=name, volume=volume):
                found = self._qube(name).volumes[volume]
                found.import_data_with_size(stream, size)
        except HostFailed as error:
            pool = self.volume_room(name, volume) if _COPYING_FAILED in error.reason else None
            if pool is None or pool[0] >= size:
                raise
            free = pool[0]
            # What had been written is discarded already, so this is what there was to begin with.
            room = f"{free >> 20} MiB are free in its storage pool, and it may need {size >> 20}"
            raise NoSpace(f"{error.reason} ({room})", qube=name, volume=volume) from error

    def clone_volume(self, name: str, volume: str, source: str) -> None:
        """Make the volume what that of the qube `source` was when that one was last shut down.

        Raises NoSpace or HostFailed.
        """
        with asking("cloning the volume", qube=source, volume=volume):
            self._qube(name).volumes[volume].clone(self._qube(source).volumes[volume])

    def run_service(self, name: str, service: str, *, stdin: int, stdout: int) -> ServiceProcess:
        """Call a service of a running qube, with these descriptors, which stay the caller's.

        `service` may carry an argument (`NAME+ARG`). Raises HostFailed.
        """
        with asking(f"calling {service}", qube=name), open(os.devnull, "wb") as nowhere:
            process: ServiceProcess = self._qube(name).run_service(
                service,
                stdin=stdin,
                stdout=stdout,
                stderr=nowhere,
                autostart=False,
                start_new_session=True,  # Ctrl-C is for the broker to act on
            )
            return process

    # --- Helpers ---------------------------------------------------------------------------------

    def _qube(self, name: str) -> Any:
        with asking("looking for the qube", qube=name), self._cache:
            self._app.domains.clear_cache()
            if name not in self._app.domains:
                raise HostFailed("there is no such qube", qube=name)
            return self._app.domains[name]

    def _of_each(self, doing: str, ask: Callable[[str, Any], _Answer]) -> Iterator[_Answer]:
        """What `ask` says of each qube, without those that are removed meanwhile."""
        with asking(doing), self._cache:
            self._app.domains.clear_cache()
            qubes = [(str(qube.name), qube) for qube in self._app.domains]
        for name, qube in qubes:
            try:
                with asking(doing, qube=name):
                    answer = ask(name, qube)
            except HostFailed:
                if self.exists(name):
                    raise
                continue
            yield answer

    def _add(
        self,
        klass: str,
        name: str,
        label: str,
        template: str | None,
        pool: str | None,
        pools: Mapping[str, str],
    ) -> None:
        try:
            with asking("creating the qube", qube=name), self._cache:
                self._app.add_new_vm(
                    klass, name=name, label=label, template=template, pool=pool, pools=dict(pools) or None
                )
        except HostFailed as error:
            if "already exists" in error.reason.lower():
                raise _taken(name) from error
            raise

    def _tell_created(self, name: str) -> None:
        for watcher in self._watchers:
            watcher.created(name)


def _property(holder: Any, key: str, default: _Value) -> _Value:
    """A property, in the type of `default`, which is what stands for none."""
    value = getattr(holder, key, None)
    return default if value is None else type(default)(value)


def _taken(name: str) -> QubeExists:
    return QubeExists(
        "a qube of this name is there already",
        qube=name,
        advice="Rename or remove it, or restore under another name.",
    )


def insist(action: Callable[[], _Answer], timeout_s: float) -> _Answer:
    """Do it again and again until it succeeds; raises what it has failed with after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return action()
        except RestoreError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_S)


@contextmanager
def asking(doing: str, *, qube: str | None = None, volume: str | None = None) -> Iterator[None]:
    """Translate what a call to qubesd in the block raises; `doing` reads like "removing the qube".

    Raises QubeInUse, NotEnoughMemory, NoSpace or HostFailed; a RestoreError of the block passes.
    """
    try:
        yield
    except RestoreError:
        raise
    except Exception as error:
        classes = {cls.__name__ for cls in type(error).__mro__}
        kind = HostFailed
        if "QubesVMInUseError" in classes:
            kind = QubeInUse
        elif "QubesMemoryError" in classes:
            kind = NotEnoughMemory
        elif _NO_ROOM.search(str(error)):
            kind = NoSpace
        unclear = "QubesDaemonCommunicationError" in classes or "QubesException" not in classes
        advice = _ASK_THE_JOURNAL if unclear else None
        raise kind(f"{doing} failed: {said_by(error)}", qube=qube, volume=volume, advice=advice) from error


def said_by(error: BaseException) -> str:
    """What `error` says, as a short clause of one line; its class if it says nothing."""
    text = strip_control(" ".join(str(error).split())).rstrip(". ")
    if len(text) > _HEAD + _TAIL:
        text = f"{text[:_HEAD]} \u2026 {text[-_TAIL:]}"
    return text or type(error).__name__
