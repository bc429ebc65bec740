"""What runs in a GUI domain of the emulation: `python -m tests.emulation.remote_programs PROGRAM …`.

    command WORD…   `qvm-backup-restore` with these words, as in a qube
    client          a program over the client library: reads a request, then `confirm`, a line each
    dialog          a program over the manager's adapter: reads what to do, then `cancel`, if at all

Strategy: real code of the project in a process of its own, whose only way to dom0 is the `qrexec-client-vm`
that is first on the PATH. What a program sees it tells as lines of JSON on standard output, so that a test
can wait for it.
"""

import json
import logging
import shutil
import sys
import threading
from pathlib import Path
from typing import Never

import qubesadmin
from qubesadmin import exc

from qubes_restore_svc.cli import qvm_arguments, qvm_restore
from qubes_restore_svc.client.sync import BlockingRestoreCall, list_backup_blocking
from qubes_restore_svc.client.transports import QrexecTransport
from qubes_restore_svc.errors import RestoreError
from qubes_restore_svc.manager.restore import BackupRestore
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.report import Observer, QubeReport


def main() -> None:
    """The program that the arguments name."""
    program, *words = sys.argv[1:]
    match program:
        case "command":
            _command(words)
        case "client":
            _client()
        case "dialog":
            _dialog()
        case _:
            sys.exit(f"no program {program}")


def tell(event: str, **fields: object) -> None:
    """A line for the test."""
    print(json.dumps({"event": event, **fields}), flush=True)


def _qrexec() -> str:
    program = shutil.which("qrexec-client-vm")
    assert program is not None, "the environment is that of a domain"
    return program


def _command(words: list[str]) -> Never:
    qvm_arguments.QUBESD_SOCKET = Path("/nowhere")
    qvm_arguments.QREXEC_CLIENT = Path(_qrexec())
    qvm_restore.main(words)


class _Telling(Observer):
    def volume_started(self, qube: str, volume: str, image_size: int) -> None:
        tell("volume", name=f"{qube}/{volume}")

    def qube_finished(self, report: QubeReport) -> None:
        tell("qube", name=report.name, outcome=report.outcome)


def _client() -> None:
    request = c.OpenBackup.model_validate_json(sys.stdin.readline())
    transport = QrexecTransport(program=_qrexec())
    try:
        if request.mode == "list":
            tell("plan", plan=list_backup_blocking(transport, request).model_dump(mode="json", by_alias=True))
            return
        with BlockingRestoreCall(transport, request, _Telling()) as call:
            tell("plan", plan=call.plan.model_dump(mode="json", by_alias=True))
            if sys.stdin.readline() == "confirm\n":
                tell("report", report=call.confirm().model_dump(mode="json", by_alias=True))
    except RestoreError as error:
        tell("error", kind=error.kind, reason=error.reason, advice=error.advice)


def _dialog() -> None:
    """What the restore dialog does, in its order; see `script` in the stock manager's `restore.py`."""
    wanted = json.loads(sys.stdin.readline())
    logging.getLogger("qubesadmin.backup").addHandler(_TellingLog())
    logging.getLogger("qubesadmin.backup").setLevel(logging.INFO)
    app = qubesadmin.Qubes()
    qube = app.domains[wanted["qube"]] if wanted["qube"] else None

    def open_call(request: c.OpenBackup, observer: Observer) -> BlockingRestoreCall:
        return BlockingRestoreCall(QrexecTransport(program=_qrexec()), request, observer)

    backup = BackupRestore(app, wanted["location"], qube, wanted["passphrase"], open_call=open_call)
    backup.options.verify_only = wanted.get("verify_only", False)
    backup.progress_callback = lambda percent: tell("percent", percent=percent)

    def obey() -> None:
        if sys.stdin.readline() == "cancel\n":
            backup.canceled = True

    threading.Thread(target=obey, daemon=True).start()
    try:
        info = backup.restore_info_verify(backup.get_restore_info())
        tell("summary", text=backup.get_restore_summary(info), names=sorted(info))
        backup.restore_do(info)
        tell("done")
    except exc.BackupCancelledError as error:
        tell("cancelled", text=str(error))
    except exc.QubesException as error:
        tell("failed", text=str(error), kind=type(error).__name__)


class _TellingLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell("log", level=record.levelname, text=record.getMessage())


if __name__ == "__main__":
    main()
