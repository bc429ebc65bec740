"""The adapter over a script, and threads to use it from."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from qubesadmin import exc

from qubes_restore_svc.errors import AuthenticationFailed
from qubes_restore_svc.manager.restore import BackupRestore
from tests.manager.script import LONG_S, Script, qube


@dataclass(frozen=True)
class Named:
    name: str


@dataclass(frozen=True)
class App:
    local_name: str = "dom0"


QUBES = (qube("debian-12", "TemplateVM"), qube("work"), qube("vault"), qube("dom0", "AdminVM"))
MAC = AuthenticationFailed("the MAC does not match", volume="private", chunk=3)


def adapter(script: Script, vm: str | None = None, here: str = "dom0") -> BackupRestore:
    location = "/home/user/backup"
    return BackupRestore(App(here), location, vm and Named(vm), "secret", open_call=script)  # type: ignore[arg-type]


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except exc.QubesException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def joined(thread: threading.Thread) -> bool:
    thread.join(LONG_S)
    return not thread.is_alive()
