"""Every kind of error a restore can end in, one class per kind.

Strategy: an error carries *where* it happened (qube, volume, chunk), *why* (`reason`, a clause
without a final stop) and *what the person can do* (`advice`, a sentence). The class gives the
kind: a stable word for reports and for the session protocol, so that the broker can rebuild the
error of a worker from its kind without trusting the worker's wording. The word follows from the name of the
class. Who renames a class changes the protocol; docs/clients.md lists the words.

This module imports the standard library only, so that both sides of the VM boundary can use it.
"""

import enum
import errno
import os.path
import re
import signal
from typing import ClassVar


class ExitStatus(enum.IntEnum):
    """How commands and services end. A report tells it as its `status`.

    A class of errors has the status of a run that ends with such an error. Where that is NOTHING, or where
    there was no error, the report decides: by what has become of the qubes (`wire/report.py`). A class with
    another status is not for a worker to say.
    """

    COMPLETE = 0  #: all that was wanted is there. Of a service: the caller was told how the call ended
    NOTHING = 1  #: nothing is there
    USAGE = 2  #: the command cannot be carried out as it was given
    PARTLY = 3  #: a part is there, or the report or the table could not be written
    DIFFERENT = 4  #: all was compared, and not all is the same
    CANCELLED = 130  #: what shells say of a program that Ctrl-C has ended


#: What each says to a person who runs a command: so in `--help`, and no other words in the manuals and the
#: README.
EXIT_MEANINGS = {
    ExitStatus.COMPLETE: "everything that was asked for is there and verified",
    ExitStatus.NOTHING: "nothing is",
    ExitStatus.USAGE: "the command cannot be carried out as given",
    ExitStatus.PARTLY: "a part of it is there",
    ExitStatus.DIFFERENT: "all of it was compared, and something differs or is missing here",
    ExitStatus.CANCELLED: "cancelled",
}


def how_ended(status: int) -> str:
    """A text that says how a program ended. `status` is negative for a signal.

    Shells, qrexec and bubblewrap make 128 + n of signal n.
    """
    if status < 0:
        return f"was killed by {_signal(-status)}"
    if status - 128 in set(signal.Signals):
        return f"ended with exit code {status}, as after {_signal(status - 128)}"
    return f"ended with exit code {status}"


def _signal(number: int) -> str:
    known = number in set(signal.Signals)
    return f"signal {number} ({signal.Signals(number).name})" if known else f"signal {number}"


class RestoreError(Exception):
    """Base of every error that the outside (archive, person, host, worker) can cause.

    `reason` is a clause that says what is wrong; `qube` and `volume` are names, `chunk` is the
    number of a chunk in its file, counted from 0. `advice` replaces the advice of the class.
    """

    kind: ClassVar[str] = "error"
    exit_status: ClassVar[ExitStatus] = ExitStatus.NOTHING
    default_advice: ClassVar[str] = ""
    #: May a worker say it? Not what only the broker's side can know: that would be its word for ours.
    for_a_worker_to_say: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        """A class of this module that does not say its kind has its name for one: `bad-header`."""
        if cls.__module__ == __name__ and "kind" not in vars(cls):
            cls.kind = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    def __init__(
        self,
        reason: str,
        *,
        qube: str | None = None,
        volume: str | None = None,
        chunk: int | None = None,
        advice: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.qube = qube
        self.volume = volume
        self.chunk = chunk
        self.advice = self.default_advice if advice is None else advice

    def at(
        self, *, qube: str | None = None, volume: str | None = None, chunk: int | None = None
    ) -> "RestoreError":
        """Fill in the places that are not known yet and return the same error, for `raise … from`."""
        self.qube = qube if self.qube is None else self.qube
        self.volume = volume if self.volume is None else self.volume
        self.chunk = chunk if self.chunk is None else self.chunk
        return self

    @property
    def place(self) -> str:
        """`work/private, chunk 3`, as much of it as is known; empty when nothing is."""
        name = "/".join(part for part in (self.qube, self.volume) if part)
        chunk = "" if self.chunk is None else f"chunk {self.chunk}"
        return ", ".join(part for part in (name, chunk) if part)

    def __str__(self) -> str:
        text = f"{self.place}: {self.reason}" if self.place else self.reason
        return f"{text}. {self.advice}" if self.advice else text


# --- The archive is not what it should be -----------------------------------------------------


class EmptyInput(RestoreError):
    """There is not a single byte to read."""

    default_advice = "Check that this is the right file and that it was copied completely."


class NotABackup(RestoreError):
    """The input does not begin like any Qubes backup."""

    default_advice = "Check that this is the right file."


class UnsupportedFormat(RestoreError):
    """A Qubes backup, in a format that this version does not read."""

    default_advice = "Formats 3 (written by Qubes R2 to R3.2) and 4 (R4.0 and later) can be restored."


class ArchiveTruncated(RestoreError):
    """The archive ends in the middle of something."""

    default_advice = (
        "The file was cut off; look for a complete copy. Qubes that lie before the cut can be restored."
    )


class ArchiveUnreadable(RestoreError):
    """The operating system, or the storage VM, could not deliver the archive's bytes."""

    default_advice = "Check the medium; copy the backup to another disk and try again."


class BadArchive(RestoreError):
    """The outer archive (tar or qfile) holds something that no Qubes backup holds."""

    default_advice = "The file is damaged or was made to attack; do not trust it."


class ArchiveDamaged(RestoreError):
    """A part of the archive is not as it was written, and was passed over."""

    default_advice = "The medium or the copy is damaged; look for another copy of what is lost."


class BadHeader(RestoreError):
    """backup-header is malformed, or differs from its authenticated copy."""

    default_advice = "The beginning of the backup is damaged or was tampered with; look for another copy."


class UnknownFilter(RestoreError):
    """The header names a compression program that is not known here."""

    default_advice = "If you know how it was compressed, name it with --compression-filter."


class WrongPassphrase(RestoreError):
    """The header's container does not open with this passphrase."""

    default_advice = "Check the keyboard layout and Caps Lock, and try again."


class BadContainer(RestoreError):
    """A scrypt container is malformed."""

    default_advice = "This part of the backup is damaged; look for another copy."


class ExcessiveCost(RestoreError):
    """scrypt parameters past the fixed ceiling: no Qubes system of today writes them."""

    default_advice = (
        "The file is damaged or was made to attack. If you know that a computer as fast as that wrote it,"
        " --ignore-cost-limit accepts it."
    )


class BudgetTooSmall(RestoreError):
    """One key derivation needs more memory than the budget holds."""

    default_advice = "Grant more memory with --memory MIB."


class AuthenticationFailed(RestoreError):
    """A chunk's MAC does not match: changed, moved, renamed, or from another backup."""

    default_advice = "The backup was damaged or tampered with here; look for another copy."


class FaultyMachine(RestoreError):
    """This computer has computed one thing twice, with two results."""

    default_advice = "The backup may be good: restore it on another computer, and test this one's memory."


class ChunkOutOfOrder(RestoreError):
    """A chunk is missing, repeated, or stands in the wrong place."""

    default_advice = "The backup is incomplete or was tampered with; look for another copy."


#: Advice for a file whose beginning is authentic and whose end is not there.
REST_IS_MISSING = (
    "The end of this file is missing: the backup was cut off, or is damaged there. Look for another copy."
)


class BadCompression(RestoreError):
    """The compressed stream is malformed, ends early, or is followed by something."""

    default_advice = (
        "The backup is damaged here, or was compressed in another way than its header says"
        " (--compression-filter)."
    )


class BadImage(RestoreError):
    """The inner archive is not one file of the expected name."""

    default_advice = "This volume cannot be restored from this backup."


class BadSparseMap(RestoreError):
    """A sparse map overlaps, runs backwards, or reaches past the image."""

    default_advice = "This volume cannot be restored from this backup."


class ImageTooLarge(RestoreError):
    """An image is larger than what qubes.xml, or the fixed ceiling, allows."""

    default_advice = "If you trust this backup, --ignore-size-limit accepts it."


class BadMetadata(RestoreError):
    """qubes.xml, firewall.xml, notes or menu list is malformed or out of bounds."""

    default_advice = "The settings in this backup cannot be used as they are."


class MissingVolume(RestoreError):
    """qubes.xml promises a volume that the archive does not hold."""

    default_advice = "The backup is incomplete; look for a complete copy."


# --- The boundary --------------------------------------------------------------------------------


class ProtocolViolation(RestoreError):
    """The other side sent something that the protocol does not allow, here or now."""

    for_a_worker_to_say = False
    default_advice = "The worker was ended; it may have been taken over by the archive. Do not trust it."


class WorkerLost(RestoreError):
    """The worker, or the connection to it, went away."""

    for_a_worker_to_say = False
    default_advice = (
        "Try again; if it happens again, end other programs, raise the limit of its memory, or report it."
    )


class WorkerStalled(RestoreError):
    """The worker said nothing for too long."""

    for_a_worker_to_say = False
    default_advice = "Check that the medium still answers, and try again."


class SourceStalled(RestoreError):
    """The side that brings the archive sent nothing, or hardly anything, for longer than --stall-timeout."""

    default_advice = "Check that the medium and the qube that holds the backup still answer, and try again."


class SandboxUnavailable(RestoreError):
    """The worker cannot be isolated on this machine."""

    for_a_worker_to_say = False


class WorkerMissing(RestoreError):
    """The disposable template has no worker in it, or there is no such template."""

    for_a_worker_to_say = False


class ResourcesExhausted(RestoreError):
    """A limit on processes, threads, open files or memory was reached."""

    default_advice = "Close other programs, or raise the limit, and try again."


# --- The host ------------------------------------------------------------------------------------


class QubeExists(RestoreError):
    """A qube of that name is there already; it is never overwritten."""

    for_a_worker_to_say = False
    default_advice = "Move it away, or restore to another directory."


class MissingDependency(RestoreError):
    """A template or netvm that a qube needs is neither on the host nor restored with it."""

    for_a_worker_to_say = False
    default_advice = (
        "Restore or install it first, or use --ignore-missing to take the system's default instead, or"
        " --skip-broken to leave such qubes out."
    )


class HostFailed(RestoreError):
    """Creating a qube or writing its volume failed on the host."""

    for_a_worker_to_say = False
    default_advice = "Settle the cause and restore this qube again."


class NoSpace(HostFailed):
    """The target has no room left."""

    default_advice = "Free some space, or restore this qube to another place."


class RestoreInProgress(RestoreError):
    """Another restore holds the lock."""

    for_a_worker_to_say = False
    default_advice = "Wait until it has finished."
    #: There is only a guard that clears up after a restore that was killed: it is worth waiting for.
    ends_soon = False


# --- The person ----------------------------------------------------------------------------------


class NotGranted(RestoreError):
    """The caller has not been given the right to do this, by dom0's policy or by its configuration."""

    for_a_worker_to_say = False


class UsageError(RestoreError):
    """The command cannot be carried out as it was given."""

    kind = "usage"
    for_a_worker_to_say = False
    exit_status = ExitStatus.USAGE


class BadConfiguration(UsageError):
    """The configuration file has a mistake in it, cannot be read, or is not to be trusted."""

    default_advice = "Correct the file; a key that is not in it has its default."


class Cancelled(RestoreError):
    """The person, or a signal, stopped the restore."""

    for_a_worker_to_say = False
    exit_status = ExitStatus.CANCELLED


class SkippedOnRequest(RestoreError):
    """The broker told the worker to leave out the rest of this qube."""

    kind = "skipped"


def _subclasses(base: type[RestoreError]) -> list[type[RestoreError]]:
    return [base] + [found for child in base.__subclasses__() for found in _subclasses(child)]


#: Every kind of error by its word, as used in reports and on the wire.
ERROR_KINDS: dict[str, type[RestoreError]] = {cls.kind: cls for cls in _subclasses(RestoreError)}

_PROCESSES = (
    "no more processes or threads can be started",
    "Close other programs, or raise the limit (ulimit -u, ulimit -v, TasksMax= of a service), and try again.",
)
_MEMORY = ("there is no memory left", "Close other programs, or give --memory MIB with a smaller number.")
_EXHAUSTED = {
    errno.EAGAIN: _PROCESSES,
    errno.EMFILE: ("one process has too many files open", "Raise the limit (ulimit -n), and try again."),
    errno.ENFILE: ("the system has too many files open", "Close other programs, and try again."),
    errno.ENOMEM: _MEMORY,
    errno.ENOBUFS: _MEMORY,
}


def exhausted(error: BaseException, where: str = "on this machine") -> ResourcesExhausted | None:
    """The error to tell if `error` means that a resource has run out; `where` says whose it is."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError):
        number = errno.ENOMEM
    elif isinstance(error, RuntimeError) and "start new thread" in str(error):
        number = errno.EAGAIN
    if number not in _EXHAUSTED:
        return None
    reason, advice = _EXHAUSTED[number]
    return ResourcesExhausted(f"{reason} {where}", advice=advice)


def unforeseen(error: BaseException, where: str = "on this machine") -> RestoreError:
    """The error to tell for one that nobody has provided for.

    Its text is left out: it might quote what is secret, or what the archive says.
    """
    found = error if isinstance(error, RestoreError) else exhausted(error, where)
    if found is not None:
        return found
    trace, place = error.__traceback__, ""
    while trace is not None:
        place = f", {os.path.basename(trace.tb_frame.f_code.co_filename)} line {trace.tb_lineno}"
        trace = trace.tb_next
    return RestoreError(
        f"something failed that must not fail ({type(error).__name__}{place})",
        advice="This is a mistake of the program; please report it.",
    )


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size_text(size: int) -> str:
    """`size` bytes as `1.5 GiB`."""
    value = float(size)
    for unit in _UNITS[:-1]:
        if round(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {_UNITS[-1]}"
