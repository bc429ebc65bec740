"""`qubes-restore-svc`: list, verify, extract and compare backups on any Linux machine.

Strategy: arguments, descriptors and passphrase first, in the foreground, so that whatever can be refused is
refused before anybody has to wait; then one asyncio task that a signal cancels; then the report, the table,
the exit status.

argparse checks the form of the arguments, and the result is one value with types. Options may stand before,
between and after the names; argparse alone would not take `verify BACKUP -p FILE QUBE`. They cannot be
abbreviated: one of them turns the sandbox off, and that should not happen with `--no`.
"""

import argparse
import asyncio
import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Never, get_args

from qubes_restore_svc import __version__
from qubes_restore_svc.broker.client import SessionOptions
from qubes_restore_svc.broker.interfaces import Host
from qubes_restore_svc.broker.job import OtherPassphrase, read_manifest, run_job
from qubes_restore_svc.cli.displays import Display, make_display, with_clock
from qubes_restore_svc.cli.inputs import (
    EXIT_STATUS,
    MAX_MIB,
    Passphrases,
    add_compression_filter,
    add_digest,
    add_exclude,
    add_limits,
    add_passphrase_file,
    add_stall_timeout,
    archive_size,
    check_compared,
    check_target,
    number_up_to,
    open_archive,
    path,
)
from qubes_restore_svc.cli.process import Interruption, carry_out
from qubes_restore_svc.cli.report_output import check_report_path, keep_report, show_report
from qubes_restore_svc.cli.tables import manifest_table
from qubes_restore_svc.cli.terminal import print_result, say_wrapped, width_of
from qubes_restore_svc.errors import ExitStatus, RestoreError, UsageError
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.local.comparison import ComparedDirectory
from qubes_restore_svc.local.directory import DirectoryHost
from qubes_restore_svc.local.documents import BackupList
from qubes_restore_svc.local.sandbox import find_bubblewrap, worker_engine
from qubes_restore_svc.local.sandbox_link import LocalLink
from qubes_restore_svc.local.volume_pipe import VolumePipe
from qubes_restore_svc.wire.messages import Manifest, RefusedQube
from qubes_restore_svc.wire.names import DigestKind, VolumeName, strip_control
from qubes_restore_svc.wire.report import Report, RunMode
from qubes_restore_svc.wire.restore_call import Choice

_PROGRAM = "qubes-restore-svc"

_NO_SANDBOX_WARNING = (
    "warning: without the sandbox, a backup that was made to attack can do whatever you can: read your files,"
    " your keys, and use your network."
)


_STDOUT, _STDOUT_FD = Path("/dev/stdout"), 1

_MAX_JOBS = 1024  #: as many as the worker accepts


class Arguments(argparse.Namespace):
    """What the person asked for. `memory` in bytes."""

    command: Literal["list", "verify", "extract", "compare"]
    backup: str
    passphrase_file: str | None
    memory: int | None
    jobs: int | None
    compression_filter: str | None
    ignore_size_limit: bool
    ignore_cost_limit: bool
    stall_timeout: int | None
    sandbox: bool
    verbose: bool
    quiet: bool
    report: Path | None = None
    digest: DigestKind = "fsverity"
    qubes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    target: Path | None = None
    compared: Path | None = None
    skip_existing: bool = False
    volume: VolumeName | None = None  #: the one that standard output gets; `target` is that then
    json: bool = False


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
        directory = arguments.target or arguments.compared
        check_report_path(arguments.report, archive_fd, arguments.passphrase_file, directory)
    try:
        if arguments.volume is not None:
            _check_standard_output()
        elif arguments.target is not None:
            check_target(arguments.target)
        elif arguments.compared is not None:
            check_compared(arguments.compared)
        choice = Choice.asked(
            names=tuple(arguments.qubes), exclude=tuple(arguments.exclude), resume=arguments.skip_existing
        )
        passphrases = _passphrases(arguments)
        options = _prepare(arguments, passphrases)
    except RestoreError as error:
        interruption.hold()
        report = Report.begun(_MODES[arguments.command], started)
        report.close(error)
        keep_report(_PROGRAM, arguments.report, report)
        raise
    host: Host | None = None
    if arguments.volume is not None:
        host = VolumePipe(arguments.volume, _STDOUT_FD)
    elif arguments.target is not None:
        host = DirectoryHost(arguments.target)
    elif arguments.compared is not None:
        host = ComparedDirectory(arguments.compared)
    display = make_display(
        verbose=arguments.verbose,
        quiet=arguments.quiet,
        total=archive_size(archive_fd),
        creates=arguments.command == "extract",
    )
    link = LocalLink(archive_fd, sandbox=arguments.sandbox, memory_limit=arguments.memory, log=display.log)
    try:
        report = interruption.run(
            with_clock(
                display,
                run_job(
                    link,
                    host,
                    options,
                    choice,
                    display,
                    other_passphrase=_other(passphrases, display, interruption),
                    compare=arguments.command == "compare",
                    only=arguments.volume,
                ),
            ),
            display.ending,
        )
    finally:
        display.close()
    written = keep_report(_PROGRAM, arguments.report, report)
    interruption.resume()
    is_piped = arguments.volume is not None
    what_next = [] if is_piped or arguments.target is None else list(_what_next(report, arguments.target))
    shown = show_report(_PROGRAM, report, quiet=arguments.quiet, with_table=not is_piped, what_next=what_next)
    # A person who asked for a report, or for the table, relies on it.
    untold = report.status == ExitStatus.COMPLETE and not (written and shown)
    return ExitStatus.PARTLY if untold else report.status


def _what_next(report: Report, target: Path) -> Iterator[str]:
    """Where the images are, and how to look into them; each line of a command stands alone, to be copied."""
    restored = [qube for qube in report.qubes if qube.succeeded]
    if restored:
        yield f"They are in {strip_control(str(target.absolute()))}, a directory each."
    for volume, (before, *commands) in _LOOK_INTO.items():
        qubes = [qube.name for qube in restored if any(one.name == volume for one in qube.volumes)]
        if qubes:
            yield before
            image = shlex.quote(str(target.absolute() / qubes[0] / f"{volume}.img"))
            yield from (f"  {strip_control(command.format(image))}" for command in commands)


#: For each volume: a sentence about its images, and the commands that mount them. `noload`: if the qube ran
#: during the backup, mounting would try to repair the image, and cannot, because it is read-only.
#: `nosuid,nodev`: files in the image give nobody rights.
_LOOK_INTO = {
    "private": (
        "To see the files of a qube, in /mnt/home:",
        "sudo mount -o loop,ro,noload,nosuid,nodev {} /mnt",
    ),
    "root": (
        "To see the system of a template (losetup prints the N; the file system is the third partition):",
        "sudo losetup --find --show --read-only --partscan {}",
        "sudo mount -o ro,noload,nosuid,nodev /dev/loopNp3 /mnt",
    ),
}


_MODES: dict[str, RunMode] = {"verify": "verify", "extract": "restore", "compare": "compare"}


def _check_standard_output() -> None:
    if sys.stdout is None:
        raise UsageError("standard output is closed", advice="Send it to a file or to a program.")
    if os.isatty(_STDOUT_FD):
        raise UsageError(
            "a volume is not written to a terminal", advice="Send standard output to a file or to a program."
        )


def _list(arguments: Arguments, archive_fd: int, interruption: Interruption) -> int:
    passphrases = _passphrases(arguments)
    options = _prepare(arguments, passphrases)
    display = make_display(verbose=arguments.verbose, quiet=arguments.quiet, total=None, creates=False)
    link = LocalLink(archive_fd, sandbox=arguments.sandbox, memory_limit=arguments.memory, log=display.log)
    try:
        manifest = interruption.run(
            with_clock(
                display,
                read_manifest(
                    link, options, display, other_passphrase=_other(passphrases, display, interruption)
                ),
            ),
            display.ending,
        )
    finally:
        display.close()
    interruption.resume()
    return _show_manifest(manifest, as_json=arguments.json)


def _passphrases(arguments: Arguments) -> Passphrases:
    return Passphrases(arguments.passphrase_file, stdin_is_backup=arguments.backup == "-")


def _other(passphrases: Passphrases, display: Display, interruption: Interruption) -> OtherPassphrase | None:
    """Asks for another one, within the job; None if there is none, so that keys are derived ahead at once."""

    async def asked() -> str | None:
        with display.paused(), interruption.raising():
            return passphrases.other()

    return asked if passphrases.has_other else None


def _prepare(arguments: Arguments, passphrases: Passphrases) -> SessionOptions:
    """Whatever else can be known to fail, and then the passphrase."""
    if arguments.sandbox:
        find_bubblewrap()
    else:
        say_wrapped(_NO_SANDBOX_WARNING)
    return SessionOptions(
        passphrase=passphrases.first(),
        memory=arguments.memory,
        jobs=arguments.jobs,
        compression_filter=arguments.compression_filter,
        ignore_size_limit=arguments.ignore_size_limit,
        ignore_cost_limit=arguments.ignore_cost_limit,
        digest=arguments.digest,
        stall_timeout_s=arguments.stall_timeout,
        # Of what is there already, no key is to be derived.
        ahead=arguments.command != "list" and not arguments.qubes and not arguments.skip_existing,
    )


def _show_manifest(manifest: Manifest, *, as_json: bool) -> int:
    shown = print_result(
        _PROGRAM, _manifest_json(manifest) if as_json else manifest_table(manifest, width_of(sys.stdout))
    )
    for refused in manifest.refused:
        say_wrapped(f"not listed: {refused.name}: {refused.error.reason}")
    if shown is False:
        return ExitStatus.NOTHING
    return ExitStatus.PARTLY if manifest.refused else ExitStatus.COMPLETE


def _manifest_json(manifest: Manifest) -> str:
    refused = tuple(
        RefusedQube(name=qube.name, error=qube.error.without_place()) for qube in manifest.refused
    )
    listed = BackupList(backup_id=manifest.backup_id, qubes=manifest.qubes, refused=refused)
    return listed.text().rstrip("\n")


# --- The command line ------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> Arguments:
    """The arguments of the process, or `argv`. Exits with 2 and a usage message where the form is wrong."""
    main_parser, parsers = command_parsers()
    arguments, rest = main_parser.parse_known_args(argv, Arguments())
    rest = [word for word in rest if word != "--"]
    unknown = [word for word in rest if word.startswith("-")]
    if unknown or (rest and arguments.command == "list"):
        parsers[arguments.command].error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if arguments.backup == "-" and arguments.passphrase_file == "-":
        raise UsageError(
            "the backup and the passphrase cannot both come from standard input",
            advice="Give the passphrase in a file (-p FILE), or type it.",
        )
    arguments.qubes = tuple(dict.fromkeys((*arguments.qubes, *rest)))
    arguments.exclude = tuple(dict.fromkeys(arguments.exclude))
    if (arguments.target == _STDOUT) != (arguments.volume is not None):
        parsers[arguments.command].error("--to - and --volume need each other")
    if arguments.volume is not None and (len(arguments.qubes) != 1 or set("*?") & set(arguments.qubes[0])):
        parsers[arguments.command].error("--to - takes one volume of one QUBE, by its name")
    if arguments.volume is not None and arguments.skip_existing:
        parsers[arguments.command].error("--skip-existing takes a directory")
    return arguments


def _target(text: str) -> Path:
    return _STDOUT if text == "-" else path(text)


def _mebibytes(text: str) -> int:
    return number_up_to(MAX_MIB)(text) << 20


class _Version(argparse.Action):
    """Print the version, and what derives the keys; the worker is asked only when somebody wants to know."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        engine = asyncio.run(worker_engine()) or "unknown (the worker cannot be started)"
        with contextlib.suppress(OSError):  # `carry_out` tells it, as argparse leaves it to do for the help
            sys.stdout.write(f"qubes-restore-svc {__version__}\nkey derivation: {engine}\n")
        parser.exit()


def command_parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command, and those of its subcommands."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="qubes-restore-svc",
        description="Recover a Qubes OS backup on any Linux machine; a worker in a sandbox reads it.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show what this is and leave")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    listing = _command(commands, "list", "show which qubes a backup holds")
    listing.add_argument("--json", action="store_true", help="print JSON instead of a table")

    verify = _command(commands, "verify", "read a backup to its last byte and check it; writes nothing")
    _add_selection(verify, "verify")

    extract = _command(commands, "extract", "restore qubes as disk images and settings in a directory")
    extract.add_argument(
        "--to",
        dest="target",
        metavar="DIR",
        type=_target,
        required=True,
        help="where; made if it is not there. -: standard output, which gets one volume of one qube",
    )
    extract.add_argument(
        "--volume",
        choices=get_args(VolumeName),
        help="with --to -: the volume. Its bytes flow before all of it is checked: only status 0 says that it"
        " is complete",
    )
    extract.add_argument(
        "--skip-existing",
        action="store_true",
        help="go on where an earlier run stopped: leave what it finished from this backup as it is there",
    )
    _add_selection(extract, "restore")

    compare = _command(commands, "compare", "compare a backup with what was extracted; writes nothing")
    compare.add_argument(
        "--with",
        dest="compared",
        metavar="DIR",
        type=path,
        required=True,
        help="the directory that `extract` restored to",
    )
    _add_selection(compare, "compare")
    return parser, {"list": listing, "verify": verify, "extract": extract, "compare": compare}


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        allow_abbrev=False,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("backup", metavar="BACKUP", help="the backup file, or - for standard input")
    add_passphrase_file(parser)
    parser.add_argument(
        "--memory",
        metavar="MIB",
        type=_mebibytes,
        help="memory that the worker may use (default: what is free, 4 GiB or 1 GiB a core at most)",
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=number_up_to(_MAX_JOBS),
        help="key derivations at once (default: one a core)",
    )
    add_compression_filter(parser)
    add_limits(parser)
    add_stall_timeout(parser)
    parser.add_argument(
        "--no-sandbox",
        dest="sandbox",
        action="store_false",
        help="let the worker run without isolation: a hostile backup may then take over your account",
    )
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-v", "--verbose", action="store_true", help="say more")
    loudness.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors and warnings")
    return parser


def _add_selection(parser: argparse.ArgumentParser, verb: str) -> None:
    which = f"{verb} these qubes, or those that fit, with * and ? (default: all)"
    parser.add_argument("qubes", metavar="QUBE", nargs="*", default=[], help=which)
    add_exclude(parser)
    text = "leave out dom0's home, if the backup has one; the same as -x dom0"
    parser.add_argument("--skip-dom0-home", dest="exclude", action="append_const", const="dom0", help=text)
    parser.add_argument("--report", metavar="FILE", type=path, help="write what happened as JSON")
    add_digest(parser, default="fsverity")
