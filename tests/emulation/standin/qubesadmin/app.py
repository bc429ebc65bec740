"""The system: the connection to qubesd, the qubes, and the calls of services."""

import builtins
import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import IO, TypedDict, TypeVar, Unpack

import qubesadmin.base
import qubesadmin.config
import qubesadmin.exc
import qubesadmin.label
import qubesadmin.storage
from qubesadmin.vm import Klass, QubesVM

T = TypeVar("T")


class ServiceOptions(TypedDict, total=False):
    """What a call of a service can be given, beside its name; what it does not know goes to `Popen`."""

    user: str | None
    filter_esc: bool
    localcmd: str | None
    wait: bool
    autostart: bool
    prefix_data: bytes | None
    connect_timeout: int
    stdin: int | IO[bytes] | socket.socket | None
    stdout: int | IO[bytes] | socket.socket | None
    stderr: int | IO[bytes] | socket.socket | None
    start_new_session: bool
    process_group: int
    close_fds: bool
    pass_fds: tuple[int, ...]
    env: dict[str, str] | None


class VMCollection:
    """The qubes by name. The list is fetched once, and again after `clear_cache`."""

    def __init__(self, app: "QubesBase") -> None:
        self.app = app
        self._classes: dict[str, str] | None = None
        self._objects: dict[str, QubesVM] = {}

    def clear_cache(self, invalidate_name: str | None = None) -> None:
        self._classes = None
        self._objects.pop(invalidate_name or "", None)

    def refresh_cache(self, force: bool = False) -> dict[str, str]:
        if self._classes is not None and not force:
            return self._classes
        lines = self.app.qubesd_call("dom0", "admin.vm.List").decode("ascii").splitlines()
        words = [line.split() for line in lines]
        self._classes = {name: dict(part.split("=", 1) for part in parts)["class"] for name, *parts in words}
        for name, vm in list(self._objects.items()):
            if self._classes.get(name) != vm._klass and not (vm._klass is None and name in self._classes):
                del self._objects[name]
        return self._classes

    def get_blind(self, item: str) -> QubesVM:
        """The qube of that name, whether it is there or not."""
        if item not in self._objects:
            self._objects[item] = QubesVM(self.app, item, klass=(self._classes or {}).get(item))
        return self._objects[item]

    def __getitem__(self, item: str | QubesVM) -> QubesVM:
        if item not in self:
            raise KeyError(str(item))
        return self.get_blind(str(item))

    def __delitem__(self, key: str) -> None:
        self.app.qubesd_call(key, "admin.vm.Remove")
        self.clear_cache()

    def __contains__(self, item: object) -> bool:
        return isinstance(item, str | QubesVM) and str(item) in self.refresh_cache()

    def __iter__(self) -> Iterator[QubesVM]:
        for name in sorted(self.refresh_cache()):
            yield self[name]

    @typing.overload
    def get(self, item: str | QubesVM) -> QubesVM | None: ...
    @typing.overload
    def get(self, item: str | QubesVM, default: T) -> QubesVM | T: ...
    def get(self, item: str | QubesVM, default: object = None) -> object:
        try:
            return self[item]
        except KeyError:
            return default

    def keys(self) -> list[str]:
        return list(self.refresh_cache())

    def values(self) -> list[QubesVM]:
        return [self[name] for name in self.refresh_cache()]


class QubesBase(qubesadmin.base.PropertyHolder):
    """What every kind of connection to qubesd has."""

    domains: VMCollection
    labels: qubesadmin.base.WrapperObjectsCollection[qubesadmin.label.Label]
    pools: qubesadmin.base.WrapperObjectsCollection[qubesadmin.storage.Pool]
    qubesd_connection_type: str

    if typing.TYPE_CHECKING:
        # Properties that live in qubesd.
        default_template: QubesVM | str | None
        default_netvm: QubesVM | str | None
        default_dispvm: QubesVM | str | None
        management_dispvm: QubesVM | str | None
        default_pool: str
        default_pool_private: str
        default_pool_root: str
        default_kernel: str

    def __init__(self) -> None:
        super().__init__(self, "admin.property.", "dom0")
        self.domains = VMCollection(self)
        self.labels = qubesadmin.base.WrapperObjectsCollection(
            self, "admin.label.List", qubesadmin.label.Label
        )
        self.pools = qubesadmin.base.WrapperObjectsCollection(
            self, "admin.pool.List", qubesadmin.storage.Pool
        )

    def list_vmclass(self) -> list[Klass]:
        return sorted(self.qubesd_call("dom0", "admin.vmclass.List").decode().splitlines())

    def list_deviceclass(self) -> list[str]:
        return sorted(self.qubesd_call("dom0", "admin.deviceclass.List").decode().splitlines())

    def get_label(self, label: str | int) -> qubesadmin.label.Label:
        """By name, or by index; QubesLabelNotFoundError if there is none."""
        if label in self.labels:
            return self.labels[str(label)]
        for candidate in self.labels.values():
            if str(label).isdigit() and candidate.index == int(label):
                return candidate
        raise qubesadmin.exc.QubesLabelNotFoundError(str(label))

    def add_new_vm(
        self,
        cls: str | type[QubesVM],
        name: str,
        label: str | qubesadmin.label.Label,
        template: str | QubesVM | None = None,
        pool: str | qubesadmin.storage.Pool | None = None,
        pools: dict[str, str] | None = None,
    ) -> QubesVM:
        """Create a qube; `template` None is the system's default, `pool` is for all that can be moved."""
        if not isinstance(cls, str):
            cls = cls.__name__
        if " " in name:
            raise ValueError(f"Qube name could not contain space: {name}")
        if pool and pools:
            raise ValueError("only one of pool= and pools= can be used")
        payload = f"name={name} label={label}"
        if pool:
            payload += f" pool={pool}"
        for volume, place in sorted((pools or {}).items()):
            payload += f" pool:{volume}={place}"
        where = "CreateInPool" if pool or pools else "Create"
        argument = None if template is None or template is qubesadmin.base.DEFAULT else str(template)
        self.qubesd_call("dom0", f"admin.vm.{where}.{cls}", argument, payload.encode())
        self.domains.clear_cache()
        return self.domains[name]

    def qubesd_call(
        self,
        dest: str | None,
        method: str,
        arg: str | None = None,
        payload: bytes | None = None,
        payload_stream: IO[bytes] | None = None,
    ) -> bytes:
        raise NotImplementedError

    def run_service(
        self, dest: str, service: str, **kwargs: Unpack[ServiceOptions]
    ) -> subprocess.Popen[bytes]:
        raise NotImplementedError


class QubesLocal(QubesBase):
    """The connection that dom0 has: qubesd's socket, and `qrexec-client`."""

    qubesd_connection_type = "socket"

    def qubesd_call(
        self,
        dest: str | None,
        method: str,
        arg: str | None = None,
        payload: bytes | None = None,
        payload_stream: IO[bytes] | None = None,
    ) -> bytes:
        """One call. With `payload_stream`, a program of dom0 does it, and the stream gets closed."""
        target = dest or "dom0"
        if payload_stream is not None:
            return read_answer(_call_program(target, method, arg, payload, payload_stream))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            try:
                _connect(connection, qubesadmin.config.qubesd_socket())
            except OSError as error:
                raise qubesadmin.exc.QubesDaemonCommunicationError(
                    "Failed to connect to qubesd service: %s", str(error)
                ) from error
            # Past this point an OSError is the caller's, as in the original.
            connection.sendall(f"{method}+{arg or ''} dom0 name {target}\0".encode("ascii"))
            connection.sendall(payload or b"")
            connection.shutdown(socket.SHUT_WR)
            with connection.makefile("rb") as answer:
                return read_answer(answer.read())

    def run_service(
        self, dest: str, service: str, **kwargs: Unpack[ServiceOptions]
    ) -> subprocess.Popen[bytes]:
        """Call a service of a qube, from dom0; stdin, stdout and stderr are pipes unless given.

        The qube is started first, unless `autostart` is False: then QubesVMNotRunningError if it is halted.
        """
        if not dest:
            raise ValueError("Empty destination name allowed only from a VM")
        user = kwargs.pop("user", None)
        filter_esc = kwargs.pop("filter_esc", False)
        localcmd = kwargs.pop("localcmd", None)
        wait = kwargs.pop("wait", True)
        prefix_data = kwargs.pop("prefix_data", None)
        if not wait and localcmd:
            raise ValueError("wait=False incompatible with localcmd")
        if prefix_data and b"\0" in prefix_data:
            raise ValueError("prefix_data cannot contain NUL character")
        if kwargs.pop("autostart", True):
            with contextlib.suppress(qubesadmin.exc.QubesVMNotHaltedError):
                self.qubesd_call(dest, "admin.vm.Start")
        elif not self.domains.get_blind(dest).is_running():
            raise qubesadmin.exc.QubesVMNotRunningError("%s is not running", dest)
        if dest == "dom0":
            raise NotImplementedError("dom0 calls no services of its own here")
        options = [os.fsencode(option) for option in _client_options(dest, filter_esc, localcmd, wait)]
        if prefix_data:
            options += [b"-p", prefix_data]
        if "connect_timeout" in kwargs:
            options += [b"-w", str(kwargs.pop("connect_timeout")).encode()]
        for stream in ("stdin", "stdout", "stderr"):
            kwargs.setdefault(stream, subprocess.PIPE)  # type: ignore[misc] # the three of them are keys
        command = f"{user or 'DEFAULT'}:QUBESRPC {service}{'' if '+' in service else '+'} dom0"
        # What is left is Popen's, whatever it is.
        return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
            [qubesadmin.config.qrexec_client(), *options, command], **kwargs
        )


def read_answer(response: bytes) -> bytes:
    """What qubesd says, or the exception that it says instead."""
    if not response:
        raise qubesadmin.exc.QubesDaemonAccessError(
            "Got empty response from qubesd. See journalctl in dom0 for details."
        )
    if response.startswith(b"0\0"):
        return response[2:]
    if not response.startswith(b"2\0"):
        raise qubesadmin.exc.QubesDaemonCommunicationError("Invalid response format")
    _, kind, _, text, arguments = response.split(b"\0", 4)
    name = kind.decode("ascii")
    error = getattr(qubesadmin.exc, name, None) or _builtin(name)
    raise error(text.decode(), *(argument.decode() for argument in arguments.split(b"\0")[:-1]))


def feed(command: Sequence[str], payload: bytes | None, stream: IO[bytes]) -> tuple[int, bytes, bytes]:
    """Run a program on `payload` and then `stream`, which gets closed: exit code, output, errors."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE if payload else stream,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        if payload:
            assert process.stdin is not None
            process.stdin.write(payload)
            with contextlib.suppress(BrokenPipeError):  # it has said no already, and its answer tells why
                shutil.copyfileobj(stream, process.stdin)
        stream.close()
        output, errors = process.communicate()
    return process.returncode, output, errors


def _connect(connection: socket.socket, path: str) -> None:
    """Connect to a path of any length; an address can only hold 108 bytes."""
    place = os.open(path, os.O_PATH)
    try:
        connection.connect(f"/proc/self/fd/{place}")
    finally:
        os.close(place)


def _client_options(dest: str, filter_esc: bool, localcmd: str | None, wait: bool) -> Iterator[str]:
    yield from ("-d", dest)
    if filter_esc:
        yield "-t"
    try:
        stderr_is_terminal = os.isatty(sys.stderr.fileno())
    except io.UnsupportedOperation:
        stderr_is_terminal = False
    if filter_esc or stderr_is_terminal:
        yield "-T"
    if localcmd:
        yield from ("-l", localcmd)
    if not wait:
        yield "-e"


def _call_program(dest: str, method: str, arg: str | None, payload: bytes | None, stream: IO[bytes]) -> bytes:
    """A call with much data: not qubesd's socket takes it, but a program of dom0, on its standard input."""
    program = os.path.join(qubesadmin.config.services_directory(), method)
    if not os.path.exists(program):
        raise qubesadmin.exc.QubesDaemonCommunicationError(f"{program} not found")
    command = ["env", "QREXEC_REMOTE_DOMAIN=dom0", f"QREXEC_REQUESTED_TARGET={dest}", program]
    _, output, _ = feed(command + ([arg] if arg is not None else []), payload, stream)
    return output


def _builtin(name: str) -> type[Exception]:
    found = getattr(builtins, name, None) if name.endswith("Error") else None
    return (
        found if isinstance(found, type) and issubclass(found, Exception) else qubesadmin.exc.QubesException
    )
