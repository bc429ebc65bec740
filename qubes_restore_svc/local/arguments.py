"""The command line of `qubes-restore-svc`.

Strategy: argparse checks the form, the result is one value with types, and everything
that can be known to be wrong before anything happens is a UsageError. Options may stand before, between and
after the names; argparse alone would not take `verify BACKUP -p FILE QUBE`. They cannot be abbreviated:
one of them turns the sandbox off, and that should not happen with `--no`.
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qubes_restore_svc import __version__
from qubes_restore_svc.cli.argument_types import (
    MAX_MIB,
    add_compression_filter,
    add_exclude,
    add_limits,
    add_passphrase_file,
    add_stall_timeout,
    number_up_to,
    path,
)
from qubes_restore_svc.errors import UsageError
from qubes_restore_svc.local.sandbox import worker_engine

_EPILOG = """\
exit status: 0 everything that was asked for is there and verified; 1 nothing was;
2 the command cannot be carried out as given; 3 a part of it; 130 cancelled.
"""

_MAX_JOBS = 1024  #: as many as the worker accepts


class Arguments(argparse.Namespace):
    """What the person asked for. `memory` in bytes."""

    command: Literal["list", "verify", "extract"]
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
    qubes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    target: Path | None = None
    json: bool = False


def parse_arguments(argv: Sequence[str] | None) -> Arguments:
    """The arguments of the process, or `argv`. Exits with 2 and a usage message where the form is wrong."""
    main_parser, parsers = _parsers()
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
    return arguments


def _mebibytes(text: str) -> int:
    return number_up_to(MAX_MIB)(text) << 20


class _Version(argparse.Action):
    """Print the version, and what derives the keys; the worker is asked only when somebody wants to know."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        engine = asyncio.run(worker_engine()) or "unknown (the worker cannot be started)"
        with contextlib.suppress(OSError):  # `carry_out` tells it, as argparse leaves it to do for the help
            sys.stdout.write(f"qubes-restore-svc {__version__}\nkey derivation: {engine}\n")
        parser.exit()


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="qubes-restore-svc",
        description="Recover a Qubes OS backup on any Linux machine; a worker in a sandbox reads it.",
        epilog=_EPILOG,
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
        "--to", dest="target", metavar="DIR", type=path, required=True, help="where; made if it is not there"
    )
    _add_selection(extract, "restore")
    return parser, {"list": listing, "verify": verify, "extract": extract}


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        allow_abbrev=False,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=_EPILOG,
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
    parser.add_argument(
        "qubes", metavar="QUBE", nargs="*", default=[], help=f"{verb} these qubes (default: all)"
    )
    add_exclude(parser)
    parser.add_argument("--report", metavar="FILE", type=path, help="write what happened as JSON")
