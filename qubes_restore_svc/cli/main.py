"""`qubes-restore-svc`: list, verify and extract backups on any Linux machine.

Strategy: arguments, descriptors and passphrase first, in the foreground, so that whatever can be refused is
refused before anybody has to wait; then one asyncio task that a signal cancels; then the report, the table,
the exit status.
"""

import json
import os
import resource
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from qubes_restore_svc.broker.client import SessionOptions
from qubes_restore_svc.broker.job import QubeChoice, read_manifest, run_job
from qubes_restore_svc.broker.report import CANCELLED, COMPLETE, NOTHING, PARTLY, USAGE, Report
from qubes_restore_svc.cli.arguments import Arguments, parse_arguments
from qubes_restore_svc.cli.inputs import archive_size, check_target, open_archive, read_passphrase
from qubes_restore_svc.cli.interruption import Interruption
from qubes_restore_svc.cli.progress import make_display, with_clock
from qubes_restore_svc.cli.reports import check_report_path, write_report
from qubes_restore_svc.cli.tables import failures, left_out, manifest_table, report_table
from qubes_restore_svc.cli.terminal import print_result, say, say_wrapped, width_of
from qubes_restore_svc.errors import Cancelled, RestoreError, UsageError
from qubes_restore_svc.host.directory import DirectoryHost
from qubes_restore_svc.link.local import LocalLink
from qubes_restore_svc.link.sandbox import find_bubblewrap
from qubes_restore_svc.wire.messages import Manifest

_NO_SANDBOX_WARNING = (
    "warning: without the sandbox, a backup that was made to attack can do whatever you can: read your files,"
    " your keys, and use your network."
)


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point of the command; exits."""
    _open_standard_streams()
    _forbid_core_dumps()
    interruption = Interruption()
    interruption.install()
    status = run(argv, interruption)
    interruption.finish()
    sys.exit(status)


def run(argv: Sequence[str] | None, interruption: Interruption) -> int:
    """Carry out one command and return its exit status."""
    try:
        arguments = parse_arguments(argv)
        archive_fd = open_archive(arguments.backup)
        try:
            return _run(arguments, archive_fd, interruption)
        finally:
            os.close(archive_fd)
    except UsageError as error:
        say_wrapped(f"qubes-restore-svc: {error}")
        return USAGE
    except Cancelled:
        say("cancelled")
        return CANCELLED
    except RestoreError as error:
        say_wrapped(f"qubes-restore-svc: {error}")
        return NOTHING


def _run(arguments: Arguments, archive_fd: int, interruption: Interruption) -> int:
    if arguments.command == "list":
        return _list(arguments, archive_fd, interruption)
    started = datetime.now(UTC)
    if arguments.report is not None:
        check_report_path(arguments.report, archive_fd, arguments.passphrase_file, arguments.target)
    try:
        if arguments.target is not None:
            check_target(arguments.target)
        options = _prepare(arguments)
    except RestoreError as error:
        interruption.hold()
        report = Report(mode="verify" if arguments.target is None else "restore", started=started)
        report.close(datetime.now(UTC), error)
        _write_report(arguments.report, report)
        raise
    host = None if arguments.target is None else DirectoryHost(arguments.target)
    choice = QubeChoice(arguments.qubes, arguments.exclude)
    link = LocalLink(archive_fd, sandbox=arguments.sandbox, memory_limit=arguments.memory)
    display = make_display(verbose=arguments.verbose, quiet=arguments.quiet, total=archive_size(archive_fd))
    try:
        report = interruption.run(with_clock(display, run_job(link, host, options, choice, display)))
    finally:
        display.close()
    written = _write_report(arguments.report, report)
    interruption.resume()
    _show_report(report, quiet=arguments.quiet)
    # Whoever asked for a report relies on it.
    return report.status if written or report.status != COMPLETE else PARTLY


def _list(arguments: Arguments, archive_fd: int, interruption: Interruption) -> int:
    options = _prepare(arguments)
    link = LocalLink(archive_fd, sandbox=arguments.sandbox, memory_limit=arguments.memory)
    display = make_display(verbose=arguments.verbose, quiet=arguments.quiet, total=None)
    try:
        manifest = interruption.run(with_clock(display, read_manifest(link, options, display)))
    finally:
        display.close()
    interruption.resume()
    return _show_manifest(manifest, as_json=arguments.json)


def _prepare(arguments: Arguments) -> SessionOptions:
    """Whatever else can be known to fail, and then the passphrase."""
    if arguments.sandbox:
        find_bubblewrap()
    else:
        say_wrapped(_NO_SANDBOX_WARNING)
    return SessionOptions(
        passphrase=read_passphrase(arguments.passphrase_file, stdin_is_backup=arguments.backup == "-"),
        memory=arguments.memory,
        jobs=arguments.jobs,
        compression_filter=arguments.compression_filter,
        ignore_size_limit=arguments.ignore_size_limit,
        ahead=arguments.command != "list" and not arguments.qubes,
    )


def _show_manifest(manifest: Manifest, *, as_json: bool) -> int:
    shown = print_result(_manifest_json(manifest) if as_json else manifest_table(manifest))
    for refused in manifest.refused:
        say_wrapped(f"not listed: {refused.name}: {refused.error.reason}")
    return NOTHING if not shown else PARTLY if manifest.refused else COMPLETE


def _manifest_json(manifest: Manifest) -> str:
    qubes = [
        {
            "name": qube.name,
            "class": qube.klass,
            "template": qube.template,
            "netvm": qube.netvm,
            "label": qube.label,
            "size": qube.backup_size,
            "volumes": {volume.name: volume.size for volume in qube.volumes},
        }
        for qube in manifest.qubes
    ]
    refused = [
        {"name": qube.name, "kind": qube.error.kind, "reason": qube.error.reason} for qube in manifest.refused
    ]
    return json.dumps({"backup_id": manifest.backup_id, "qubes": qubes, "refused": refused}, indent=2)


def _show_report(report: Report, *, quiet: bool) -> None:
    table = report_table(report, width_of(sys.stdout))
    if table and not quiet:
        print_result(table)
    width = width_of(sys.stderr)
    for line in failures(report, width):
        say(line)
    if not quiet:
        for line in left_out(report, width):
            say(line)
    wanted = [qube for qube in report.qubes if qube.outcome != "left out"]
    if report.error is not None:
        advice = f" {report.error.advice}" if report.error.advice else ""
        say_wrapped(
            "cancelled"
            if report.status == CANCELLED
            else f"qubes-restore-svc: {report.error.reason}.{advice}"
        )
    if wanted and not quiet:
        done = sum(qube.succeeded for qube in wanted)
        verb = "verified" if report.mode == "verify" else "restored"
        say(f"{done} of {len(wanted)} qube{'s' * (len(wanted) != 1)} {verb}.")


def _write_report(path: Path | None, report: Report) -> bool:
    """False if it could not be written; that has been said, then."""
    if path is not None:
        try:
            write_report(path, report)
        except OSError as error:
            say_wrapped(f"qubes-restore-svc: the report cannot be written: {error.strerror}")
            return False
    return True


def _open_standard_streams() -> None:
    """Started without one of them, the first file that is opened would get its number, and its output."""
    for standard in (0, 1, 2):
        try:
            os.fstat(standard)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _forbid_core_dumps() -> None:
    """A core dump would hold the passphrase. 1: 0 lets the kernel pipe it to a collector (core(5))."""
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except (OSError, ValueError):  # it is lower already
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
