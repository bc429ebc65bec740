"""The command line of `qvm-backup-restore --mgmt-vm`, and the request to dom0 that it makes.

Strategy: every option of the stock command, under its names and with its meaning, and a few more; the result
is one value with types. Options that contradict each other are a UsageError before anything happens. argparse
gets the options only: it would not take `LOCATION -p FILE QUBE`, and what it does after `--` depends on its
version. Long options can be abbreviated as in the stock command, because somebody's script may rely on it.

dom0's service carries out every restore. In dom0 it is started as a child with all rights, which is handed
the backup, if that is a file there, and the passphrase. A qube calls it through qrexec. A request that cannot
be made is refused here, before anybody types a passphrase.
"""

import argparse
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from qubes_restore_svc import __version__
from qubes_restore_svc.cli.inputs import (
    EXIT_STATUS,
    FILTERS,
    MAX_MIB,
    add_compression_filter,
    add_digest,
    add_exclude,
    add_limits,
    add_passphrase_file,
    add_stall_timeout,
    auto_or,
    not_empty,
    number_up_to,
    path,
)
from qubes_restore_svc.client import transports
from qubes_restore_svc.client.transports import Handed, ProgramTransport, QrexecTransport, Transport
from qubes_restore_svc.errors import HostFailed, NotGranted, UsageError
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.names import DigestKind, is_qube_name, strip_control
from qubes_restore_svc.wire.qrexec_call import HANDED_OVER
from qubes_restore_svc.wire.report import RunMode
from qubes_restore_svc.wire.restore_call import Auto, QubePath, QubeService

_MAX_VCPUS = 1024

#: What stands for no netvm; no qube can be called so.
NONE = "none"

_USAGE = "qvm-backup-restore --mgmt-vm [option ...] LOCATION [QUBE ...]"

_DESCRIPTION = """\
Restore qubes from a backup, or verify it. A throw-away qube without network
reads the backup; dom0 never does. Without --mgmt-vm, this is the stock
qvm-backup-restore, which reads it in dom0. In a qube, dom0 is asked to do it,
and its policy and configuration say what this qube may ask for.

  LOCATION              the backup: a file here; or with -d QUBE a file
                        there, a command that is run there and writes the
                        backup to its standard output, or, with
                        --location-is-service, a service there
  QUBE                  restore only these qubes (default: all of them, and
                        not dom0's home); * and ? stand for characters
"""

_EPILOG = f"""\
You see the plan, and are asked what is to become of qubes that do not fit
here, and before anything is created, unless you gave -p or --yes, or only
verify.

{EXIT_STATUS}
"""


class RestoreArguments(argparse.Namespace):
    """What the person asked for.

    `storage_qube` holds the backup; None: it is a file here, or in dom0 if `in_dom0`, which is the same in
    dom0. `dom0_home` is None if nothing was said about it.
    `memory` in MiB. `loudness` counts -v up and -q down; 0 is ordinary.
    """

    location: str
    storage_qube: str | None
    location_is_service: bool
    qubes: tuple[str, ...]
    exclude: tuple[str, ...]
    verify_only: bool
    compare: bool
    skip_broken: bool
    ignore_missing: bool
    skip_conflicting: bool
    rename_conflicting: bool
    resume: bool
    dom0_home: bool | None
    ignore_username_mismatch: bool
    ignore_size_limit: bool
    ignore_cost_limit: bool
    stall_timeout: int | None
    compression_filter: str | None
    passphrase_file: str | None
    yes: bool
    mgmt_template: str | None
    memory: int | Auto | None
    vcpus: int | Auto | None
    pool: str | None
    name: list[tuple[str, str]]  #: names in the backup, and what is chosen; no name: for all that miss it
    template: list[tuple[str, str]]
    netvm: list[tuple[str, str]]
    allow: list[str]
    report: Path | None
    digest: DigestKind | None
    loudness: int
    in_dom0: bool
    dest_vm: str | None  #: as it was given, and so are the next two
    verbose: int
    quiet: int

    @property
    def conflicts(self) -> Literal["refuse", "skip", "rename"]:
        """What to do about names that are taken; as in the stock command, renaming goes first."""
        return "rename" if self.rename_conflicting else "skip" if self.skip_conflicting else "refuse"

    @property
    def missing(self) -> Literal["refuse", "skip", "default"]:
        """What to do about missing templates and netvms; here too, what restores more goes first."""
        return "default" if self.ignore_missing else "skip" if self.skip_broken else "refuse"

    @property
    def must_ask(self) -> bool:
        """Is somebody to be asked before qubes are created?"""
        return not (self.mode != "restore" or self.yes or self.passphrase_file is not None)

    @property
    def mode(self) -> RunMode:
        """What is done with the qubes of the backup."""
        return "verify" if self.verify_only else "compare" if self.compare else "restore"


def parse_restore_arguments(words: Sequence[str]) -> RestoreArguments:
    """The arguments of the process, without its name.

    Exits with 2 and a usage message where the form is wrong; raises UsageError for contradictions.
    """
    end = words.index("--") if "--" in words else len(words)
    parser = restore_parser()
    options, rest = parser.parse_known_args(words[:end], RestoreArguments())
    unknown = [word for word in rest if word.startswith("-") and word != "-"]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    location, *qubes = (*rest, *words[end + 1 :]) or ("",)
    if not location:
        parser.error("the LOCATION of the backup is missing")
    dest_vm = options.dest_vm
    options.location, options.qubes = location, tuple(dict.fromkeys(qubes))
    options.storage_qube = None if dest_vm == "dom0" else dest_vm
    options.in_dom0 = dest_vm == "dom0"
    options.exclude = tuple(dict.fromkeys(options.exclude))
    options.loudness = options.verbose - options.quiet
    _check(options)
    return options


def _check(arguments: RestoreArguments) -> None:
    if arguments.location_is_service and arguments.storage_qube is None:
        raise UsageError("--location-is-service requires -d with another qube than dom0", advice="")
    if arguments.compare and (arguments.dom0_home or "dom0" in arguments.qubes):
        raise UsageError("dom0's home cannot be compared", advice="Leave it out, or verify it.")
    if arguments.dom0_home is False and "dom0" in arguments.qubes:
        raise UsageError("dom0 is named, and --skip-dom0-home leaves its home out", advice="")
    if arguments.storage_qube is None and (arguments.location, arguments.passphrase_file) == ("-", "-"):
        raise UsageError(
            "the backup and the passphrase cannot both come from standard input",
            advice="Give the passphrase in a file (-p FILE), or type it.",
        )


def restore_parser() -> argparse.ArgumentParser:
    """The options, and the help that explains them."""
    parser = argparse.ArgumentParser(
        prog="qvm-backup-restore",
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    _add_what(parser.add_argument_group("what is restored"))
    _add_misfits(parser.add_argument_group("what does not fit here"))
    _add_backup(parser.add_argument_group("the backup"))
    _add_worker(parser.add_argument_group("the qube that reads it"))
    _add_rest(parser.add_argument_group("the rest"))
    return parser


def _flag(group: "argparse._ArgumentGroup", text: str, *names: str) -> None:
    group.add_argument(*names, action="store_true", help=text)


def _named(group: "argparse._ArgumentGroup", name: str, text: str) -> None:
    group.add_argument(name, metavar="NAME", type=not_empty, help=text)


def _add_what(group: "argparse._ArgumentGroup") -> None:
    text = "read the backup to its last byte and check it; nothing is created, and nobody is asked"
    instead = group.add_mutually_exclusive_group()
    _flag(instead, text, "--verify-only")
    text = "compare the backup with the qubes that are here; none of them is changed. In dom0 only, as root"
    _flag(instead, text, "--compare")
    text = (
        "go on where an earlier restore of this backup stopped: qubes that it has finished stay as they are"
    )
    _flag(instead, text, "--resume")
    add_exclude(group)
    home = group.add_mutually_exclusive_group()
    home.add_argument(
        "--dom0-home",
        action="store_const",
        const=True,
        help="restore dom0's home too, as one unopened archive in a new directory (or name dom0 as a QUBE)",
    )
    home.add_argument(
        "--skip-dom0-home",
        action="store_const",
        dest="dom0_home",
        const=False,
        help="do not restore dom0's home; this is the default with --mgmt-vm",
    )
    _named(group, "--pool", "storage pool for the restored qubes")
    group.add_argument(
        "--allow",
        metavar="SETTING",
        action="append",
        default=[],
        help="let a setting come back this time that the configuration leaves behind, if it permits that:"
        " property:NAME, feature:NAME, tag:NAME or device:CLASS; may be repeated",
    )


def _add_misfits(group: "argparse._ArgumentGroup") -> None:
    _flag(group, "leave out qubes whose names are taken here", "--skip-conflicting")
    text = "restore qubes whose names are taken under other names, with numbers at the end"
    _flag(group, text, "--rename-conflicting")

    def choice(name: str, metavar: str, pair: Callable[[str], tuple[str, str]], text: str) -> None:
        group.add_argument(name, metavar=metavar, type=pair, action="append", default=[], help=text)

    choice("--name", "OLD=NEW", _for_one, "restore the qube OLD under the name NEW; may be repeated")
    choice(
        "--template",
        "[QUBE=]NAME",
        _for_one_or_all,
        "base QUBE, or all qubes that miss their template, on this one; may be repeated",
    )
    choice(
        "--netvm",
        "[QUBE=]NAME",
        _for_one_or_all,
        "connect QUBE, or all qubes that miss their netvm, to this one, or to none; may be repeated",
    )
    text = "leave out qubes whose template or netvm is neither here nor in the backup"
    _flag(group, text, "--skip-broken")
    _flag(group, "restore them all the same, with the default template or netvm", "--ignore-missing")
    text = "restore dom0's home even if it is that of another user name"
    _flag(group, text, "--ignore-username-mismatch")
    add_limits(group)


def _add_backup(group: "argparse._ArgumentGroup") -> None:
    add_stall_timeout(group)
    group.add_argument(
        "-d",
        "--dest-vm",
        metavar="QUBE",
        type=not_empty,
        help="the qube that holds the backup (default: the one you are in, or dom0 if you are there)",
    )
    text = "LOCATION is a qrexec service of that qube, possibly with an argument after a +"
    _flag(group, text, "--location-is-service")
    add_passphrase_file(group)
    add_compression_filter(group)
    # As the stock command abbreviates it; without these, they could also stand for --compare.
    hidden = ("--c", "--co", "--com", "--comp")
    group.add_argument(*hidden, dest="compression_filter", choices=FILTERS, help=argparse.SUPPRESS)


def _add_worker(group: "argparse._ArgumentGroup") -> None:
    _flag(group, "let a throw-away qube read the backup; cannot be abbreviated", "--mgmt-vm")
    text = "the disposable template to make it from (default: the configuration's, or management_dispvm)"
    _named(group, "--mgmt-template", text)
    group.add_argument(
        "--memory",
        metavar="MIB",
        type=auto_or(number_up_to(MAX_MIB)),
        help="its memory, or auto for what there is; more of it derives more keys at once",
    )
    group.add_argument(
        "--vcpus",
        metavar="N",
        type=auto_or(number_up_to(_MAX_VCPUS)),
        help="its virtual processors, or auto for as many as there are",
    )


def _for_one(text: str) -> tuple[str, str]:
    qube, found, name = text.partition("=")
    if not found or not is_qube_name(qube) or not is_qube_name(name):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name, =, and another name")
    return qube, name


def _for_one_or_all(text: str) -> tuple[str, str]:
    qube, _, name = text.rpartition("=")
    if (qube and not is_qube_name(qube)) or not (name == NONE or is_qube_name(name)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name, nor a qube, =, and a name")
    return qube, name


def _add_rest(group: "argparse._ArgumentGroup") -> None:
    _flag(group, "create the qubes without asking", "--yes")
    group.add_argument("--report", metavar="FILE", type=path, help="write what happened as JSON")
    add_digest(group, default=None)
    group.add_argument("-v", "--verbose", action="count", default=0, help="say more")
    text = "say less: nothing but errors, warnings and questions"
    group.add_argument("-q", "--quiet", action="count", default=0, help=text)
    _flag(group, "accepted; --mgmt-vm isolates the restore already", "--paranoid-mode", "--plan-b")
    _flag(group, "accepted; there is no window to be closed", "--auto-close")
    # As far as the stock command lets it be abbreviated; without this, it would not be clear from --allow.
    group.add_argument("--a", action="store_true", dest="auto_close", help=argparse.SUPPRESS)
    _flag(group, "accepted; root is not refused", "--force-root")
    group.add_argument(
        "--version",
        action="version",
        help="show what this is and leave; without --mgmt-vm, the stock version",
        version=f"qvm-backup-restore --mgmt-vm (qubes-restore-svc {__version__})",
    )
    group.add_argument(
        "-h", "--help", action="help", help="show this and leave; without --mgmt-vm, the stock help"
    )


#: There in dom0 only, and there in every qube.
QUBESD_SOCKET = transports.QUBESD_SOCKET
QREXEC_CLIENT = Path(transports.QREXEC_PROGRAM)


def in_a_qube() -> bool:
    """Is this a qube, from which dom0 can be asked?"""
    return not QUBESD_SOCKET.exists() and QREXEC_CLIENT.exists()


def is_file_here(arguments: RestoreArguments) -> bool:
    """Is the backup a file of the domain that the command runs in?"""
    return arguments.storage_qube is None and not (arguments.in_dom0 and in_a_qube())


def way_to_dom0(handed: Handed) -> Transport:
    """The way from the domain that the command runs in; only in dom0 itself, something can be handed over."""
    return QrexecTransport(program=str(QREXEC_CLIENT)) if in_a_qube() else ProgramTransport(handed=handed)


def check_way(way: Transport) -> None:
    """Raises HostFailed if dom0 cannot be called at all; all else is told when the call is made."""
    if isinstance(way, QrexecTransport) and not Path(way.program).exists():
        raise HostFailed(f"there is no {way.program}", advice="Run it in a qube, or in dom0.")


def restore_request(arguments: RestoreArguments, archive_fd: int | None, way: Transport) -> c.OpenBackup:
    """What is asked for, without the passphrase. Raises UsageError, and NotGranted for what no qube may ask.

    `archive_fd`: the backup, open, if it is a file here.
    """
    if arguments.compare and isinstance(way, QrexecTransport):
        raise NotGranted(
            "a backup is compared with the qubes of this system for dom0 alone",
            advice="Run it in dom0, or verify the backup.",
        )
    left_out = ("dom0",) if arguments.dom0_home is False else ()
    names, templates = dict(arguments.name), dict(arguments.template)
    netvms = {qube: "" if name == NONE else name for qube, name in arguments.netvm}
    choice = c.Choice.asked(
        names=tuple(arguments.qubes),
        exclude=(*arguments.exclude, *left_out),
        conflicts=arguments.conflicts,
        resume=arguments.resume,
        missing=arguments.missing,
        dom0_home=arguments.dom0_home is True,
        ignore_username_mismatch=arguments.ignore_username_mismatch,
        pool=arguments.pool,
        qubes=tuple(
            c.QubeChoice(
                name=qube, new_name=names.get(qube), template=templates.get(qube), netvm=netvms.get(qube)
            )
            for qube in {**names, **templates, **netvms}
            if qube
        ),
        template=templates.get(""),
        netvm=netvms.get(""),
        allow=tuple(dict.fromkeys(arguments.allow)),
    )
    qube, text = _location(arguments, archive_fd, way)
    template, memory, vcpus = arguments.mgmt_template, arguments.memory, arguments.vcpus
    return c.OpenBackup.asked(
        mode=arguments.mode,
        location={"qube": qube, "text": text, "service": arguments.location_is_service},
        passphrase="",
        choice=choice,
        compression_filter=arguments.compression_filter,
        ignore_size_limit=arguments.ignore_size_limit,
        ignore_cost_limit=arguments.ignore_cost_limit,
        digest=arguments.digest,
        stall_timeout=arguments.stall_timeout,
        worker={"template": template, "memory": memory, "vcpus": vcpus},
    )


def _location(arguments: RestoreArguments, archive_fd: int | None, way: Transport) -> tuple[str | None, str]:
    """Where the backup lies: the qube (None: this one), and what there."""
    qube = arguments.storage_qube
    if qube is not None and arguments.location_is_service:
        return qube, QubeService(qube, arguments.location).service
    if qube is not None:
        line = QubePath(qube, arguments.location).line
        return qube, line.decode("utf-8", "surrogateescape").rstrip("\n")
    if isinstance(way, ProgramTransport):
        return "dom0", HANDED_OVER
    if arguments.in_dom0:
        return "dom0", arguments.location
    assert archive_fd is not None, "a backup in this qube has been opened before"
    return None, _file_here(arguments.location, archive_fd)


def _file_here(location: str, archive_fd: int) -> str:
    """The absolute path of a backup that is a file of this qube: dom0 will ask this qube for it."""
    if location == "-":
        raise UsageError(
            "a backup on standard input cannot be restored from here",
            advice="Put it into a file, or name a command that writes it, with -d and the name of this qube.",
        )
    path = os.path.realpath(location)
    shown = strip_control(location)
    # What is no file, the agent here would take for a command; and it drops spaces (qubes.RestoreById).
    if not stat.S_ISREG(os.fstat(archive_fd).st_mode):
        raise UsageError(f"{shown} is not a file", advice="Copy the backup into one.")
    if path != path.strip():
        raise UsageError(f"the name of {shown} ends with a space", advice="Rename it.")
    return path
