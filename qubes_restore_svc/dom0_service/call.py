"""One call of `restore.Start`, `restore.Verify` or `restore.List`, from its first message to its last.

Strategy: the client is judged by its rights before anything of this system is looked at. Then it is a restore
like any other; the client is shown the plan, confirms it, and watches. The work is one task: whatever ends
the call (a cancel, a client that is gone, nonsense, a signal) cancels it, once, and then it undoes what it
did. The last message tells the result: `refused` before a plan was confirmed, the report afterwards.

A backup may lie in a file of dom0. Its path is followed once, to a descriptor that can neither read nor write
(O_PATH), so that nothing happens to what it leads to, be it a device or a pipe. The file is judged by that
descriptor: a regular file, and its real place below the real place of a directory that was granted. Only then
it is opened, through the descriptor, so that nobody can put something else in its place. Every fault gives
the same message, so that a symbolic link does not tell whether its target exists.
"""

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from qubes_restore_svc.dom0_service.conversation import Conversation, Final
from qubes_restore_svc.errors import (
    BadConfiguration,
    Cancelled,
    ExitStatus,
    RestoreError,
    UsageError,
    unforeseen,
)
from qubes_restore_svc.hardening import close_read
from qubes_restore_svc.qubes.backup_source import Dom0File, Location
from qubes_restore_svc.qubes.config import Config, load_config
from qubes_restore_svc.qubes.dom0_restore import PLACES, Dom0Restore, OtherPassphrase, Places, dom0_restore
from qubes_restore_svc.qubes.grants import DOM0, Rights
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.models import MAX_FRAME, ErrorInfo
from qubes_restore_svc.wire.names import MAX_PASSPHRASE, strip_control
from qubes_restore_svc.wire.qrexec_call import HANDED_OVER
from qubes_restore_svc.wire.restore_call import QubePath, QubeService


@dataclass(frozen=True, slots=True)
class HandedOver:
    """Descriptors that a program of dom0 gave to the service that it started; None: there is none.

    `archive` is the backup, for which the location `HANDED_OVER` stands. `passphrase` is a socket: when the
    service has checked what can be checked without the passphrase, it writes a byte to it; then it reads the
    passphrase from it, to the end. The one in the request is not looked at.
    """

    archive: int | None = None
    passphrase: int | None = None


NOTHING = HandedOver()


#: Makes the restore from its parts, as `dom0_restore` does; a test has others. Raises RestoreError.
Assemble = Callable[[Location, c.OpenBackup, Places, Config, str, Callable[[str], None]], Dom0Restore]


class Call:
    """A call of `service` by the domain `caller`; `dom0` has all rights. `note` logs a line in dom0."""

    def __init__(
        self,
        service: str,
        caller: str,
        note: Callable[[str], None],
        places: Places = PLACES,
        assemble: Assemble = dom0_restore,
        handed: HandedOver = NOTHING,
    ) -> None:
        self._service = service
        self._caller = caller
        self._note = note
        self._places = places
        self._assemble = assemble
        self._handed = handed
        self._work: asyncio.Task[Final] | None = None
        self._conversation: Conversation | None = None
        self._running = False

    async def serve(self, read_fd: int, write_fd: int) -> bool:
        """Carry the call out over these descriptors; True if the client has taken the last message.

        Raises HostFailed if they are neither pipes nor sockets.
        """
        hurries = self._caller != DOM0  # a person in dom0 may take his time
        with Conversation(read_fd, write_fd, self._cancel_work, hurries=hurries) as self._conversation:
            self._work = asyncio.ensure_future(self._answer(self._conversation))
            try:
                final = await self._work
            except RestoreError as error:
                final = self._refused(error)
            except asyncio.CancelledError:
                final = self._refused(Cancelled("it was cancelled", advice=""))
            except Exception as error:  # noqa: BLE001 - the client waits for a last word
                final = self._refused(unforeseen(error, "in dom0"))
                self._note(f"{final.error.reason}")
            self._note(f"ended: {_outcome(final)}")
            return await self._conversation.finish(final)

    def cancel(self) -> None:
        """End the call, and undo what it did: for signals."""
        if self._conversation is not None:
            self._conversation.end(Cancelled("dom0 ended it", advice=""))

    def _cancel_work(self) -> None:
        if self._work is not None:
            self._work.cancel()

    # --- The work --------------------------------------------------------------------------------

    async def _answer(self, conversation: Conversation) -> Final:
        request = await conversation.opened()
        config = self._config()
        rights = Rights(self._caller, config, self._places.config)
        rights.check_request(self._service, request)
        with self._located(request.location, rights) as location:
            self._note(f"{request.mode} of a backup in {request.location.qube or self._caller}")
            restore = self._assemble(location, request, self._places, config, self._caller, self._note)
            await restore.check(request.choice.pool)
            if self._handed.passphrase is not None:
                secret = await _passphrase_from(self._handed.passphrase)
                request = request.model_copy(update={"passphrase": SecretStr(secret)})
            size = size_of(location.fd) if isinstance(location, Dom0File) else None
            if request.mode == "list":
                listed = await restore.listed(request, conversation, self._other_passphrase)
                return listed.model_copy(update={"archive_size": size}).fitting()
            return await self._restored(restore, request, conversation, rights, size)

    async def _restored(
        self,
        restore: Dom0Restore,
        request: c.OpenBackup,
        conversation: Conversation,
        rights: Rights,
        archive_size: int | None,
    ) -> Final:
        async def confirm(plan: c.Plan) -> c.Choice | None:
            rights.check_plan(request.mode, plan)
            excess = restore.excess(plan) if request.mode == "restore" else None
            told = None if excess is None else ErrorInfo.of(excess)  # another choice may be within them
            shown = plan.model_copy(update={"archive_size": archive_size, "excess": told})
            answer = await conversation.ask(rights.narrowed(shown).fitting())
            if isinstance(answer, c.Choose):
                rights.check_choice(request.mode, answer.choice)
                return answer.choice
            if excess is not None:
                raise excess
            self._running = True
            return None

        report = await restore.run(request, conversation, confirm, self._other_passphrase)
        if not self._running:
            assert report.error is not None, "it has ended before it was confirmed"
            return self._refused(report.error.to_error())
        if report.status == ExitStatus.CANCELLED and conversation.ended is not None:
            report.error = ErrorInfo.of(conversation.ended)
        return report.fitting(MAX_FRAME)

    @property
    def _other_passphrase(self) -> OtherPassphrase | None:
        """Asks the program of dom0 that gave the first one."""
        fd = self._handed.passphrase
        if fd is None:
            return None

        async def asked() -> str | None:
            with contextlib.suppress(Cancelled):
                return await _passphrase_from(fd)
            return None

        return asked

    def _refused(self, error: RestoreError) -> c.Refused:
        """If something ended the call early, that is the reason, and not the error that followed from it."""
        ended = None if self._conversation is None else self._conversation.ended
        return c.Refused(error=ErrorInfo.of(ended if ended is not None else error))

    def _config(self) -> Config:
        try:
            return load_config(self._places.config)
        except BadConfiguration as error:
            if self._caller == DOM0:
                raise
            self._note(str(error))
            raise BadConfiguration(
                "the configuration of restores in dom0 has a mistake in it",
                advice=f"An administrator finds it in dom0, in /var/log/qubes/qrexec.{self._caller}.log.",
            ) from None

    @contextlib.contextmanager
    def _located(self, location: c.BackupLocation, rights: Rights) -> Iterator[Location]:
        qube = location.qube or self._caller
        if qube == DOM0 and location.service:  # the model lets it pass where no qube is named
            raise UsageError("dom0 has no service that brings a backup", advice="Name a qube, or a file.")
        if qube != DOM0:
            kind = QubeService if location.service else QubePath
            yield kind(qube, location.text)
            return
        if location.text == HANDED_OVER and self._handed.archive is not None:
            yield Dom0File(self._handed.archive)
            return
        directories = None if rights.unlimited else rights.dom0_directories
        with file_in_dom0(location.text, directories) as fd:
            yield Dom0File(fd)


async def _passphrase_from(fd: int) -> str:
    """Ask for the passphrase, and wait for the line with it. Raises Cancelled if none comes."""
    loop = asyncio.get_running_loop()
    untrusted_secret = b""
    with socket.socket(fileno=os.dup(fd)) as connection, contextlib.suppress(OSError):
        connection.setblocking(False)
        await loop.sock_sendall(connection, b"?")
        while (
            not untrusted_secret.endswith(b"\n")
            and len(untrusted_secret) <= 4 * MAX_PASSPHRASE
            and (piece := await loop.sock_recv(connection, 4 * MAX_PASSPHRASE))
        ):
            untrusted_secret += piece
    try:
        secret = untrusted_secret.removesuffix(b"\n").decode()
    except UnicodeDecodeError:
        raise UsageError("the passphrase is not UTF-8 text") from None
    if not secret:
        raise Cancelled("no passphrase was given", advice="")
    if len(secret) > MAX_PASSPHRASE:
        raise UsageError(f"the passphrase is longer than {MAX_PASSPHRASE} characters", advice="")
    return secret


def _outcome(final: Final) -> str:
    """For dom0's log: nothing in it comes from the client or the backup."""
    if isinstance(final, c.Plan):
        return "listed"
    if isinstance(final, c.Refused):
        return f"refused ({final.error.kind})"
    return f"status {final.status}" + ("" if final.error is None else f" ({final.error.kind})")


_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@contextlib.contextmanager
def file_in_dom0(text: str, directories: Sequence[Path] | None) -> Iterator[int]:
    """A descriptor of the file, open for reading, which must lie below one of `directories`; with None, for
    programs of dom0, of any file or device.

    Raises UsageError; where directories are given, always the same.
    """
    fd = _opened(text) if directories is None else _opened_below(text, directories)
    try:
        os.set_blocking(fd, True)
        yield fd
    finally:
        close_read(fd)


def size_of(fd: int) -> int | None:
    """Bytes of the file, if it is one."""
    status = os.fstat(fd)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _opened(text: str) -> int:
    shown = strip_control(text)
    if not os.path.isabs(text):
        raise UsageError(f"{shown} is not a whole path", advice="It has to begin with /.")
    try:
        fd = os.open(text, _READ)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{shown} cannot be opened: {reason}") from None
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
        return fd
    close_read(fd)
    what = "a directory" if stat.S_ISDIR(mode) else "a pipe or a socket"
    raise UsageError(f"{shown} is {what}, not a backup")


def _opened_below(text: str, directories: Sequence[Path]) -> int:
    with contextlib.ExitStack() as held, contextlib.suppress(OSError, ValueError):
        place = os.open(text, os.O_PATH | os.O_CLOEXEC)
        held.callback(close_read, place)
        way = f"/proc/self/fd/{place}"
        real, is_file = Path(os.readlink(way)), stat.S_ISREG(os.fstat(place).st_mode)
        if is_file and any(real.is_relative_to(os.path.realpath(directory)) for directory in directories):
            return os.open(way, _READ)
    raise UsageError(
        f"{strip_control(text)} in dom0 is not a file that can be read from here",
        advice="Name a backup below a directory that is granted to this qube.",
    )
