"""`qubes-restore-svc`: list, verify and extract backups on any Linux machine.

Strategy: arguments, descriptors and passphrase first, in the foreground, so that whatever can be refused is
refused before anybody has to wait; then one asyncio task that a signal cancels; then the report, the table,
the exit status.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Never

from qubes_restore_svc.broker.client import SessionOptions
from qubes_restore_svc.broker.job import read_manifest, run_job
from qubes_restore_svc.cli.displays import make_display, with_clock
from qubes_restore_svc.cli.inputs import archive_size, check_target, open_archive, read_passphrase
from qubes_restore_svc.cli.process import Interruption, carry_out
from qubes_restore_svc.cli.reports import check_report_path, keep_report, show_report
from qubes_restore_svc.cli.tables import manifest_table
from qubes_restore_svc.cli.terminal import print_result, say_wrapped
from qubes_restore_svc.errors import ExitStatus, RestoreError
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.local.arguments import Arguments, parse_arguments
from qubes_restore_svc.local.directory import DirectoryHost
from qubes_restore_svc.local.sandbox import find_bubblewrap
from qubes_restore_svc.local.sandbox_link import LocalLink
from qubes_restore_svc.wire.messages import Manifest
from qubes_restore_svc.wire.report import Report
from qubes_restore_svc.wire.restore_call import Choice

_PROGRAM = "qubes-restore-svc"

_NO_SANDBOX_WARNING = (
    "warning: without the sandbox, a backup that was made to attack can do whatever you can: read your files,"
    " your keys, and use your network."
)


def main(argv: Sequence[str] | None = None) -> Never:
    """The entry point of the command; exits."""
    carry_out(_PROGRAM, lambda interruption: run(argv, interruption))


def run(argv: Sequence[str] | None, interruption: Interruption) -> int:
    """Carry out one command and return its exit status. Raises RestoreError."""
    arguments = parse_arguments(argv)
    archive_fd = open_archive(arguments.backup)
    try:
        return _run(arguments, archive_fd, interruption)
    finally:
        close_read(archive_fd)


def _run(arguments: Arguments, archive_fd: int, interruption: Interruption) -> int:
    if arguments.command == "list":
        return _list(arguments, archive_fd, interruption)
    started = datetime.now(UTC)
    if arguments.report is not None:
        check_report_path(arguments.report, archive_fd, arguments.passphrase_file, arguments.target)
    try:
        if arguments.target is not None:
            check_target(arguments.target)
        choice = Choice.asked(names=tuple(arguments.qubes), exclude=tuple(arguments.exclude))
        options = _prepare(arguments)
    except RestoreError as error:
        interruption.hold()
        report = Report.begun("verify" if arguments.target is None else "restore", started)
        report.close(error)
        keep_report(_PROGRAM, arguments.report, report)
        raise
    host = None if arguments.target is None else DirectoryHost(arguments.target)
    display = make_display(verbose=arguments.verbose, quiet=arguments.quiet, total=archive_size(archive_fd))
    link = LocalLink(archive_fd, sandbox=arguments.sandbox, memory_limit=arguments.memory, log=display.log)
    try:
        report = interruption.run(
            with_clock(display, run_job(link, host, options, choice, display)), display.ending
        )
    finally:
        display.close()
    written = keep_report(_PROGRAM, arguments.report, report)
    interruption.resume()
    shown = show_report(_PROGRAM, report, quiet=arguments.quiet)
    # Whoever asked for a report, or for the table, relies on it.
    untold = report.status == ExitStatus.COMPLETE and not (written and shown)
    return ExitStatus.PARTLY if untold else report.status


def _list(arguments: Arguments, archive_fd: int, interruption: Interruption) -> int:
    options = _prepare(arguments)
    display = make_display(verbose=arguments.verbose, quiet=arguments.quiet, total=None)
    link = LocalLink(archive_fd, sandbox=arguments.sandbox, memory_limit=arguments.memory, log=display.log)
    try:
        manifest = interruption.run(
            with_clock(display, read_manifest(link, options, display)), display.ending
        )
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
        ignore_cost_limit=arguments.ignore_cost_limit,
        stall_timeout_s=arguments.stall_timeout,
        ahead=arguments.command != "list" and not arguments.qubes,
    )


def _show_manifest(manifest: Manifest, *, as_json: bool) -> int:
    shown = print_result(_PROGRAM, _manifest_json(manifest) if as_json else manifest_table(manifest))
    for refused in manifest.refused:
        say_wrapped(f"not listed: {refused.name}: {refused.error.reason}")
    if shown is False:
        return ExitStatus.NOTHING
    return ExitStatus.PARTLY if manifest.refused else ExitStatus.COMPLETE


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
