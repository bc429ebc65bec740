"""`qubes-restore-watch`: verify the newest backup in a place, without anybody being there.

Strategy: `verify` does one check and keeps what it found, as a document and as metrics; then the exit status
says it too. `show` and `collect` only read such documents.
"""

import argparse
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Never

from qubes_restore_svc import __version__
from qubes_restore_svc.cli.inputs import number_up_to, path
from qubes_restore_svc.cli.process import Interruption, carry_out
from qubes_restore_svc.cli.qvm_arguments import way_to_dom0
from qubes_restore_svc.cli.qvm_restore import Way
from qubes_restore_svc.cli.terminal import print_result, say_wrapped
from qubes_restore_svc.errors import BadConfiguration, ExitStatus, HostFailed
from qubes_restore_svc.report_file import write_whole
from qubes_restore_svc.watch import collected
from qubes_restore_svc.watch.check import check, not_ended, verifier
from qubes_restore_svc.watch.documents import WatchReport
from qubes_restore_svc.watch.metrics import metrics
from qubes_restore_svc.watch.places import (
    Place,
    default_configuration,
    default_state,
    names_of_places,
    read_place,
)
from qubes_restore_svc.wire.names import strip_control

PROGRAM = "qubes-restore-watch"

EXIT_STATUS = """\
exit status:
  0   every backup is good
  1   one is not, or is not known to be: the table and the report say why
  2   the command cannot be carried out as given
  3   the report could not be written; or the backup is good, and the metrics could not be
  130 cancelled
"""


class Arguments(argparse.Namespace):
    """What the person asked for."""

    command: Literal["verify", "show", "collect"]
    place: str
    places: list[str]
    reports: str
    configuration: Path | None = None
    state: Path | None = None
    expect: list[str]
    stale_after: int


def main(argv: Sequence[str] | None = None, way: Way = way_to_dom0) -> Never:
    """The entry point of the command; exits."""
    carry_out(PROGRAM, lambda interruption: run(argv, interruption, way))


def run(argv: Sequence[str] | None, interruption: Interruption, way: Way) -> int:
    """Carry out one command and return its exit status. Raises RestoreError."""
    arguments = watch_parser().parse_args(argv, Arguments())
    configuration = arguments.configuration or default_configuration()
    state = arguments.state or default_state()
    if arguments.command == "verify":
        return _verify(arguments.place, configuration, state, interruption, way)
    if arguments.command == "show":
        machine = strip_control(socket.gethostname()) or "localhost"
        untrusted: collected.Untrusted = {
            machine: collected.of_places(state, arguments.places, names_of_places(configuration))
        }
    elif arguments.reports == "-":
        untrusted = collected.from_stream(arguments.expect)
    else:
        untrusted = collected.in_directory(Path(arguments.reports), arguments.expect)
    return _show(collected.rows(untrusted, datetime.now(UTC), arguments.stale_after))


def _verify(name: str, configuration: Path, state: Path, interruption: Interruption, way: Way) -> int:
    kept = state / f"{name}.json"
    try:
        place = read_place(configuration, name)
    except BadConfiguration as error:
        if kept.exists():  # what it says is of other settings
            _begin(kept, state, not_ended(name, str(error), Place.model_fields["max_age_days"].default))
        raise
    try:
        state.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise HostFailed(f"{strip_control(str(state))} cannot be created: {error.strerror}") from None
    metrics_directory = Path(place.metrics_directory or state).expanduser()
    begun = "the check has begun, and has not ended"
    _begin(kept, metrics_directory, not_ended(name, begun, place.max_age_days))
    report = check(name, place, state, verifier(place, interruption, way))
    interruption.hold()
    is_kept, is_measured = _keep(kept, metrics_directory, report)
    interruption.resume()
    say_wrapped(f"{name}: {report.state}: {report.reason}")
    return _status(report, is_kept=is_kept, is_measured=is_measured)


def _status(report: WatchReport, *, is_kept: bool, is_measured: bool) -> ExitStatus:
    if report.verification is not None and report.verification.status == ExitStatus.CANCELLED:
        return ExitStatus.CANCELLED
    if not is_kept:
        return ExitStatus.PARTLY
    if report.state != "good":
        return ExitStatus.NOTHING
    return ExitStatus.COMPLETE if is_measured else ExitStatus.PARTLY


def _begin(kept: Path, metrics_directory: Path, report: WatchReport) -> None:
    """Put this in the place of what the last check found, which must not stand for the one that begins.

    If that cannot be written, say so, and remove what is old.
    """
    written = _keep(kept, metrics_directory, report)
    for file, is_new in zip((kept, _metrics_file(metrics_directory, report)), written, strict=True):
        if not is_new and file.is_file():
            try:
                file.unlink()
            except OSError as error:
                say_wrapped(f"{PROGRAM}: {strip_control(str(file))} is old, and stays: {error.strerror}")


def _keep(kept: Path, metrics_directory: Path, report: WatchReport) -> tuple[bool, bool]:
    """Write the report, and the metrics. Could each be written?"""
    measured = _metrics_file(metrics_directory, report)
    return _kept(kept, report.text(), 0o600), _kept(measured, metrics(report), 0o644)


def _metrics_file(directory: Path, report: WatchReport) -> Path:
    return directory / f"{PROGRAM}-{report.place}.prom"


def _kept(file: Path, text: str, mode: int) -> bool:
    try:
        write_whole(file, text.encode(), mode)
    except OSError as error:
        say_wrapped(f"{PROGRAM}: {strip_control(str(file))} cannot be written: {error.strerror}")
        return False
    return True


def _show(found: list[collected.Row]) -> int:
    shown = print_result(PROGRAM, collected.text_of(found))
    for row in found:
        if not row.is_good:
            say_wrapped(f"{row.machine}, {row.place}: {row.state}: {row.reason}")
    good = sum(row.is_good for row in found)
    say_wrapped(f"{good} of {len(found)} good.")
    if good < len(found) or not found:
        return ExitStatus.NOTHING
    return ExitStatus.COMPLETE if shown is not False else ExitStatus.PARTLY


def watch_parser() -> argparse.ArgumentParser:
    """The options, and the help that explains them."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog=PROGRAM,
        description="Verify the newest backup in a place, for a timer, and tell which of many are bad.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    verify = commands.add_parser("verify", help="verify the newest backup in a place", allow_abbrev=False)
    verify.add_argument("place", metavar="PLACE", help="the name of its settings, PLACE.toml")
    show = commands.add_parser("show", help="show what the last checks here found", allow_abbrev=False)
    show.add_argument("places", metavar="PLACE", nargs="*", help="only of these places (default: all)")
    collect = commands.add_parser(
        "collect", help="show what the last checks of many machines found", allow_abbrev=False
    )
    text = "the directory with MACHINE/PLACE.json, or - for what Salt writes, a machine a line"
    collect.add_argument("reports", metavar="REPORTS", help=text)
    text = "a machine that must be among them; may be repeated"
    collect.add_argument("--expect", metavar="MACHINE", action="append", default=[], help=text)
    for command in (verify, show):
        text = "where the settings are (default: /etc/qubes-restore-svc/watch; yours if you are not root)"
        command.add_argument("--configuration", metavar="DIR", type=path, help=text)
        text = "where the reports are (default: /var/lib/qubes-restore-svc/watch; yours if you are not root)"
        command.add_argument("--state", metavar="DIR", type=path, help=text)
    for command in (show, collect):
        text = "a report is too old after so many days (default: 2)"
        command.add_argument("--stale-after", metavar="DAYS", type=number_up_to(3650), default=2, help=text)
    return parser
