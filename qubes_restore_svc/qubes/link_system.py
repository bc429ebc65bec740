"""What the link over qrexec needs of a Qubes system, and the tags that it sets there.

Strategy: a Protocol, so that the link knows neither qubesadmin nor the host. All of it blocks, some of it for
a minute (a qube's start): the link calls it in threads. What fails is a RestoreError, HostFailed mostly.
"""

from collections.abc import Sequence
from typing import Protocol

#: On the worker's qube. The policy lets a qube so tagged fetch the archive, and do nothing else.
WORKER_TAG = "restore-svc-worker"
#: On the qube that holds the backup: the one from which the archive may be fetched.
STORAGE_TAG = "restore-svc-storage"


class ServiceProcess(Protocol):
    """The process that carries one qrexec call (`qrexec-client`), a child of this process."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs. Reaps the process."""
        ...

    def kill(self) -> None:
        """Kill it, if it still runs."""
        ...


class QubesSystem(Protocol):
    """The part of a Qubes system that a link touches; names are names of qubes."""

    def management_dispvm(self) -> str | None:
        """The disposable template that the system uses for its own management; None if none is set."""
        ...

    def template_of(self, name: str) -> str | None:
        """The qube's template, None if it has none."""
        ...

    def reports_service(self, name: str, service: str) -> bool | None:
        """Does the qube, or its template, say that it has this service? None if it names no services."""
        ...

    def is_disposable_template(self, name: str) -> bool | None:
        """Can disposables be made from it? None if there is no such qube."""
        ...

    def exists(self, name: str) -> bool: ...

    def klass(self, name: str) -> str:
        """The qube's class, `DispVM` for a disposable."""
        ...

    def create_disposable(
        self, name: str, template: str, *, memory: int, vcpus: int, tags: Sequence[str]
    ) -> None:
        """A named disposable without a netvm, not started; `memory` in MiB. It goes when it is killed."""
        ...

    def start(self, name: str) -> None:
        """Start the qube and wait until it can be called; does nothing to one that runs."""
        ...

    def destroy(self, name: str) -> None:
        """Kill the disposable and remove it, started or not; nothing if it is gone."""
        ...

    def add_tag(self, name: str, tag: str) -> None: ...

    def discard_tag(self, name: str, tag: str) -> None: ...

    def tagged(self, tag: str) -> list[str]:
        """The qubes that carry the tag."""
        ...

    def run_service(self, name: str, service: str, *, stdin: int, stdout: int) -> ServiceProcess:
        """Call `NAME+ARG` in a running qube with these descriptors, which stay the caller's."""
        ...
