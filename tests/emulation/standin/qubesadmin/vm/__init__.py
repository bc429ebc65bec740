"""Qubes."""

import logging
import subprocess
import typing
import warnings
from collections.abc import Iterator
from typing import IO, Unpack

import qubesadmin.devices
import qubesadmin.exc
import qubesadmin.features
import qubesadmin.firewall
import qubesadmin.storage
import qubesadmin.tags
from qubesadmin.base import PropertyHolder

if typing.TYPE_CHECKING:
    from qubesadmin.app import QubesBase, ServiceOptions
    from qubesadmin.label import Label

Klass = str


class QubesVM(PropertyHolder):
    """A qube by its name. Equal to another of that name, and to the name itself."""

    log: logging.Logger
    tags: qubesadmin.tags.Tags
    features: qubesadmin.features.Features
    devices: qubesadmin.devices.DeviceManager
    firewall: qubesadmin.firewall.Firewall

    if typing.TYPE_CHECKING:
        # Properties that live in qubesd; a qube that does not have one raises AttributeError.
        label: Label | str
        template: "QubesVM | str"
        netvm: "QubesVM | str | None"
        default_dispvm: "QubesVM | str | None"
        management_dispvm: "QubesVM | str | None"
        memory: int
        maxmem: int
        vcpus: int
        autostart: bool
        auto_cleanup: bool
        include_in_backups: bool
        provides_network: bool
        template_for_dispvms: bool
        qrexec_timeout: int

    def __init__(self, app: "QubesBase", name: str, klass: Klass | None = None) -> None:
        super().__init__(app, "admin.vm.property.", name)
        self._volumes: dict[str, qubesadmin.storage.Volume] | None = None
        self._klass = klass
        self.log = logging.getLogger(name)
        self.tags = qubesadmin.tags.Tags(self)
        self.features = qubesadmin.features.Features(self)
        self.devices = qubesadmin.devices.DeviceManager(self)
        self.firewall = qubesadmin.firewall.Firewall(self)

    @property
    def name(self) -> str:
        return self._method_dest

    @property
    def klass(self) -> Klass:
        if self._klass is None:
            answer = self.qubesd_call(None, "admin.vm.List").decode("ascii")
            self._klass = dict(part.split("=", 1) for part in answer.split()[1:])["class"]
        return self._klass

    def start(self) -> None:
        """Start it; nothing happens if it runs."""
        self.qubesd_call(None, "admin.vm.Start")

    def shutdown(self, force: bool = False, wait: bool = False) -> None:
        options = "+".join(name for name, given in (("force", force), ("wait", wait)) if given)
        self.qubesd_call(None, "admin.vm.Shutdown", options or None)

    def kill(self) -> None:
        """Stop it at once; QubesVMNotStartedError if it does not run."""
        self.qubesd_call(None, "admin.vm.Kill")

    def force_shutdown(self) -> None:
        warnings.warn("use kill() instead", DeprecationWarning, stacklevel=2)
        self.kill()

    def get_power_state(self) -> str:
        """`Running`, `Halted`, `Transient` …; `NA` if there is no such qube."""
        try:
            answer = self.qubesd_call(None, "admin.vm.CurrentState").decode("ascii")
        except (qubesadmin.exc.QubesDaemonNoResponseError, qubesadmin.exc.QubesVMNotFoundError):
            return "NA"
        return dict(part.split("=", 1) for part in answer.split())["power_state"]

    def is_running(self) -> bool:
        return self.get_power_state() not in ("Halted", "NA")

    def is_halted(self) -> bool:
        return self.get_power_state() == "Halted"

    def is_paused(self) -> bool:
        return self.get_power_state() == "Paused"

    @property
    def volumes(self) -> dict[str, qubesadmin.storage.Volume]:
        """By name; asked for once."""
        if self._volumes is None:
            names = self.qubesd_call(None, "admin.vm.volume.List").decode("ascii").splitlines()
            self._volumes = {name: qubesadmin.storage.Volume(self.app, self.name, name) for name in names}
        return self._volumes

    def run_service(self, service: str, **kwargs: "Unpack[ServiceOptions]") -> subprocess.Popen[bytes]:
        """Call a qrexec service of it; see `QubesBase.run_service`."""
        return self.app.run_service(self._method_dest, service, **kwargs)

    def run_service_for_stdio(
        self,
        service: str,
        input: bytes | None = None,
        timeout: float | None = None,
        **kwargs: "Unpack[ServiceOptions]",
    ) -> tuple[bytes, bytes]:
        """Call a service with `input`, bring its output; CalledProcessError if it does not exit with 0."""
        process = self.run_service(service, **kwargs)
        output, errors = process.communicate(input=input, timeout=timeout)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, service, output, errors)
        return output, errors

    @property
    def appvms(self) -> Iterator["QubesVM"]:
        """The qubes that it is the template of."""
        for vm in self.app.domains:
            try:
                if vm.template == self:
                    yield vm
            except AttributeError:
                pass

    @property
    def connected_vms(self) -> Iterator["QubesVM"]:
        """The qubes that it is the netvm of."""
        for vm in self.app.domains:
            try:
                if vm.netvm == self:
                    yield vm
            except AttributeError:
                pass

    def get_notes(self) -> str:
        return self.qubesd_call(None, "admin.vm.notes.Get").decode()

    def set_notes(self, notes: str) -> None:
        self.qubesd_call(None, "admin.vm.notes.Set", payload=str(notes).encode())

    def qubesd_call(
        self,
        dest: str | None,
        method: str,
        arg: str | None = None,
        payload: bytes | None = None,
        payload_stream: IO[bytes] | None = None,
    ) -> bytes:
        return super().qubesd_call(dest, method, arg, payload, payload_stream)

    def __str__(self) -> str:
        return self._method_dest

    def __lt__(self, other: object) -> bool:
        return self.name < other.name if isinstance(other, QubesVM) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if isinstance(other, QubesVM | str):
            return self.name == str(other)
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self.name)
