"""A whole emulated Qubes system: qubesd's state, qrexec between its domains, and dom0 to run commands in.

Strategy: `Qubesd` keeps the qubes and tells the switchboard when one starts or stops; the switchboard asks
`Qubesd` who carries which tag. Both are given real programs: `dom0_environment` and `domain_environment` are
for the project's own commands, run as subprocesses, which find the stand-in for `qubesadmin` there; in the
disposable the real worker is started by the first call, as systemd would. Below the directory:
`domains/NAME/` for each domain that runs, `policy.d/`, and `dom0/` for what is qubesd's.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType

import qubesadmin
import qubesadmin.config

from tests.emulation import dom0_services, storage_services
from tests.emulation.daemon import properties
from tests.emulation.daemon.lifecycle import Machines
from tests.emulation.policy_files import Action
from tests.emulation.qubesd import Qubesd
from tests.emulation.snapshot import Snapshot, take_snapshot
from tests.emulation.stock_policy import STOCK_POLICY
from tests.emulation.switchboard import Question, Switchboard

REPOSITORY = Path(__file__).resolve().parents[2]
STANDIN = REPOSITORY / "tests" / "emulation" / "standin"
TEMPLATES = ("fedora-41-xfce", "debian-12-xfce")
#: What a template says that it can do, before anything of ours is installed in it.
_STOCK_SERVICES = ("qubes.Filecopy", "qubes.RegisterBackupLocation", "qubes.RestoreById", "qubes.VMShell")
_WORKER_SERVICES = ("restore.Archive", "restore.Session", "restore.Volume")
_WORKER = (sys.executable, "-m", "qubes_restore_svc.worker", "--listen")


class EmulatedQubes(AbstractContextManager["EmulatedQubes"]):
    """A typical system in `directory`, alive while the `with` lasts.

    Two templates (fedora-41-xfce, debian-12-xfce), sys-net, sys-firewall and sys-usb, which run, default-dvm,
    default-mgmt-dvm and personal. The worker is installed nowhere yet; `worker` is its command.
    """

    def __init__(self, directory: Path, worker: Sequence[str] = _WORKER) -> None:
        self.root = directory / "domains"
        self.policy = directory / "policy.d"
        self._dom0 = directory / "dom0"
        self._worker = worker
        self._templates: set[str] = set()
        self._stack = ExitStack()
        self.qubesd = Qubesd(self._dom0, Machines(self._start, self._stop, self._removed))
        self.switchboard = Switchboard(self.root, self.policy, self.qubesd)

    def __enter__(self) -> "EmulatedQubes":
        install_policy(self.policy)
        self.root.mkdir(parents=True)
        with self._stack as stack:
            stack.callback(_set_variable, os.environ.get(qubesadmin.config.VARIABLE))
            _set_variable(str(self._dom0))
            stack.enter_context(self.qubesd)
            stack.enter_context(self.switchboard)
            (self._dom0 / "qrexec-client").symlink_to(self.root / "dom0" / "bin" / "qrexec-client")
            self._furnish()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(
        self,
        klass: str,
        name: str,
        template: str = "",
        label: str = "red",
        pool: str | None = None,
        **settings: object,
    ) -> None:
        """Add a qube, leaving no call in the record; `settings` are properties, None stands for no qube."""
        payload = f"name={name} label={label}" + (f" pool={pool}" if pool else "")
        with self.qubesd.lifecycle.lock:
            self.qubesd.lifecycle.create(klass, template, payload.encode(), pool is not None)
            domain = self.qubesd.system.domains[name]
            for key, value in settings.items():
                properties.write(self.qubesd.system, domain, key, _text(value))

    def set_default(self, name: str, value: object) -> None:
        """Set a property of the system, without leaving a call in the record."""
        with self.qubesd.lifecycle.lock:
            properties.write(self.qubesd.system, self.qubesd.system.holder, name, _text(value))

    def install_worker(self, template: str) -> None:
        """What installing our package in a template does: services in what is based on it, told to dom0."""
        self._templates.add(template)
        features = self.qubesd.system.domains[template].features
        features.update({f"supported-rpc.{service}": "1" for service in _WORKER_SERVICES})

    def uninstall_worker(self, template: str) -> None:
        self._templates.discard(template)
        for service in _WORKER_SERVICES:
            self.qubesd.system.domains[template].features.pop(f"supported-rpc.{service}", None)

    def put_backup(self, qube: str, path: Path) -> Path:
        """Copy a file into the home of a domain; brings where it is there."""
        home = self.root / qube / "home"
        home.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(path, home))

    def dom0_environment(self) -> dict[str, str]:
        """The environment for commands in dom0: they see this system, and no setting of the machine."""
        return self.domain_environment("dom0") | {qubesadmin.config.VARIABLE: str(self._dom0)}

    def domain_environment(self, name: str) -> dict[str, str]:
        """The environment for commands in a domain that runs; they are killed with it.

        `qrexec-client-vm` is on the PATH; `qubesadmin.Qubes()` calls the Admin API as a qube does.
        """
        folders = [str(self.root / name / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        return self.switchboard.environment(name) | {
            "PATH": os.pathsep.join(folders),
            "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(STANDIN))),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def client_program(self, name: str) -> Path:
        """The `qrexec-client-vm` of a domain that runs."""
        return self.root / name / "bin" / "qrexec-client-vm"

    def start_domain(self, name: str) -> None:
        """Start a qube and those it needs, leaving no call in the record; nothing if it runs."""
        self.qubesd.start(name)

    def kill_domain(self, name: str) -> None:
        """Stop a qube at once, leaving no call in the record: its processes die, then its calls break."""
        self.qubesd.lifecycle.kill(name)

    def add_gui_domain(self, name: str = "sys-gui") -> None:
        """Add a GUI domain and start it: an AppVM without network that may read all of the Admin API."""
        self.add("AppVM", name, label="black", netvm=None, guivm="dom0")
        self.qubesd.system.domains[name].features["service.guivm-gui-agent"] = "1"
        dom0_services.install_admin_api(self.root / "dom0" / "qubes-rpc", self._dom0 / "qubesd.sock")
        (self.policy / f"50-gui-{name}.policy").write_text(dom0_services.gui_domain_policy(name))
        self.start_domain(name)

    def install_dom0_service(
        self,
        name: str,
        argv: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        arguments: bool = False,
    ) -> Path:
        """Make a command a service of dom0: `NAME` or `NAME+ARG`; brings its file.

        It runs in `dom0_environment`, with `environment` added. The call's argument is in its environment
        and, if `arguments` is true, its last word.
        """
        path = self.root / "dom0" / "qubes-rpc" / name
        whole = self.dom0_environment() | dict(environment or {})
        dom0_services.install_program(path, argv, whole, arguments=arguments)
        return path

    def grant(self, service: str, source: str, action: Action = "allow", extra: str = "") -> None:
        """Add a rule to what the administrator granted: may `source` call that service of dom0?

        It goes to dom0 (as the target, or the preselected one) unless `extra`, the parameters, name another.
        """
        dom0_services.add_grant(self.policy, service, source, action, extra)

    def when_asked(self, answer: Callable[[Question], str | None]) -> None:
        """From now on this answers what a policy asks, with a target or None; see `say_yes`, `say_no`."""
        self.switchboard.person = answer

    def app(self) -> qubesadmin.Qubes:
        """A connection to it from this process."""
        return qubesadmin.Qubes()

    def snapshot(self, ignored_files: Collection[str] = ()) -> Snapshot:
        """The complete state, to be compared; `ignored_files` are patterns like `dom0/home/*.log`."""
        return take_snapshot(self.qubesd, self.root, ignored_files, self.switchboard.processes())

    def settled(self, before: Snapshot, ignored_files: Collection[str] = (), limit_s: float = 15) -> Snapshot:
        """The state as soon as it equals `before`, or as it is in the end if it does not.

        What a command has let go may take a moment to end: processes, an import that misses its data.
        """
        deadline = time.monotonic() + limit_s
        while (now := self.snapshot(ignored_files)) != before and time.monotonic() < deadline:
            time.sleep(0.02)
        return now

    def _furnish(self) -> None:
        for template in TEMPLATES:
            self.add("TemplateVM", template, label="black", netvm=None)
            features = self.qubesd.system.domains[template].features
            features.update({"os": "Linux", "qrexec": "1", "gui": "1"})
            features.update({f"supported-rpc.{service}": "1" for service in _STOCK_SERVICES})
        self.set_default("default_template", TEMPLATES[0])
        self.add("AppVM", "sys-net", label="red", provides_network=True, netvm=None)
        self.add("AppVM", "sys-firewall", label="green", provides_network=True, netvm="sys-net")
        self.set_default("default_netvm", "sys-firewall")
        self.set_default("clockvm", "sys-net")
        self.set_default("updatevm", "sys-firewall")
        self.add("AppVM", "sys-usb", label="red", netvm=None)
        self.add("AppVM", "default-dvm", label="red", template_for_dispvms=True)
        self.add("AppVM", "default-mgmt-dvm", label="black", template_for_dispvms=True, netvm=None)
        self.set_default("default_dispvm", "default-dvm")
        self.set_default("management_dispvm", "default-mgmt-dvm")
        self.add("AppVM", "personal", label="yellow")
        for name in ("sys-firewall", "sys-usb"):
            self.qubesd.start(name)

    def _start(self, name: str) -> None:
        """The machine of a qube starts: its services can be called, its worker among them."""
        self.switchboard.start_domain(name)
        services = self.root / name / "qubes-rpc"
        storage_services.install(services)
        with self.qubesd.lifecycle.lock:
            system = self.qubesd.system
            domain = system.domains[name]
            has_worker = bool(self._templates & {vm.name for vm in system.chain(domain)})
        if domain.klass != "DispVM" or not has_worker:
            return
        calls = self.root / name / "run" / "qubes-restore-worker" / "calls.sock"
        environment = {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
        self.switchboard.socket_activated(name, calls, self._worker, environment)
        configuration = REPOSITORY / "rpc-policy" / "rpc-config"
        for service in _WORKER_SERVICES:
            (services / service).unlink(missing_ok=True)
            (services / service).symlink_to(calls)
            if (configuration / service).exists():
                shutil.copy(configuration / service, self.root / name / "rpc-config")

    def _stop(self, name: str) -> None:
        self.switchboard.stop_domain(name)

    def _removed(self, name: str) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)


def install_policy(folder: Path) -> None:
    """The project's own policy, as its package installs it, beside what a system has by itself."""
    (folder / "include").mkdir(parents=True)
    for name, text in STOCK_POLICY.items():
        (folder / name).write_text(text)
    for path in (REPOSITORY / "rpc-policy").glob("*.policy"):
        shutil.copy(path, folder)
    for path in (REPOSITORY / "rpc-policy" / "include").glob("*"):
        shutil.copy(path, folder / "include")


def _set_variable(value: str | None) -> None:
    if value is None:
        os.environ.pop(qubesadmin.config.VARIABLE, None)
    else:
        os.environ[qubesadmin.config.VARIABLE] = value


def _text(value: object) -> bytes:
    return b"" if value is None else str(value).encode()
