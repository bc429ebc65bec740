"""The host that is a Qubes system: restored qubes are created in it.

Strategy: who has the restore lock knows that no other restore is running. So it is safe to remove what an
interrupted one left. `qube.py` takes care of one qube, `dom0_home.py` of dom0's home. What is still
unfinished when the lock is let go is removed; if this process is killed, its guard does the same.
"""

import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qubes_restore_svc.broker.interfaces import (
    HostView,
    NewQube,
    QubesView,
    QubeTransaction,
    RestoredQube,
    restored_tag,
)
from qubes_restore_svc.errors import HostFailed, RestoreError
from qubes_restore_svc.qubes.dom0_home import Dom0Home, clear_unfinished_homes, dom0_user
from qubes_restore_svc.qubes.guard import connect_patiently
from qubes_restore_svc.qubes.locks import RESTORE, RESTORE_LOCK, STOCK_LOCK, Activity, GuardedLock, stock_lock
from qubes_restore_svc.qubes.proof import FEATURE, Proof
from qubes_restore_svc.qubes.qube import QubesQube
from qubes_restore_svc.qubes.system import QubesSystem
from qubes_restore_svc.qubes.tags import UNFINISHED, Leftovers, clear_unfinished_qubes, clear_untagged
from qubes_restore_svc.wire.names import QUBE_NAME, strip_control

#: Directories of the policy: what holds until the next start of the system, what lasts, what R4.0 left.
POLICY = (Path("/run/qubes/policy.d"), Path("/etc/qubes/policy.d"), Path("/etc/qubes-rpc/policy"))

_MAX_LISTED = 5  #: files in a remark

_QUBE_NAME = re.compile(rf"(?:@dispvm:)?({QUBE_NAME})")
_NO_QUBES = frozenset({"allow", "deny", "ask", "dom0"})


class QubesHost:
    """A `Host` that creates qubes in `system`.

    `pool` takes their volumes if no other is chosen, in place of the system's default; `home` is where dom0's
    home goes. `client` is the domain that restores. `policy` are the directories of the policy.
    """

    def __init__(
        self,
        system: QubesSystem,
        *,
        pool: str | None = None,
        home: Path,
        lock_path: Path = RESTORE_LOCK,
        stock_lock_path: Path = STOCK_LOCK,
        client: str = "dom0",
        activity: Activity = "restoring",
        policy: Sequence[Path] = POLICY,
    ) -> None:
        self._system = system
        self._pool = pool
        self._home = home
        self._lock_path = lock_path
        self._stock_lock_path = stock_lock_path
        self._client = client
        self._activity: Activity = activity
        self._policy = policy
        self._mutex = threading.RLock()
        self._is_locked = False
        self._qubes: list[QubeTransaction] = []

    @contextmanager
    def lock(self) -> Iterator[tuple[str, ...]]:
        """The one-restore lock; at its end, qubes that were neither committed nor rolled back are.

        Brings remarks on what an interrupted restore left. Raises RestoreInProgress when somebody else holds
        it; HostFailed if it cannot be had, and at the end if something could not be removed. If the block
        raises a RestoreError, that is told in its advice instead.
        """
        with (
            GuardedLock(
                RESTORE, self._lock_path, self._clear_up_after_kill, self._client, self._activity
            ) as lock,
            stock_lock(self._stock_lock_path),
        ):
            yield from self._locked(lock)

    def _locked(self, lock: GuardedLock) -> Iterator[tuple[str, ...]]:
        found = self._clear_up()
        with self._mutex:
            self._is_locked = True
        try:
            with self._system.watched_by(lock):
                yield (*found.cleared, *found.kept)
        except BaseException as error:
            _tell_what_is_left(self._end_qubes(lock, found.kept), error)
            raise
        _tell_what_is_left(self._end_qubes(lock, found.kept), None)

    def view(self) -> HostView:
        """The system as it is now. Raises HostFailed."""
        qubes = {qube.name: qube for qube in self._system.qubes()}
        policy_names, unread = names_in_policy(self._policy)
        system = QubesView(
            qubes=qubes,
            default_template=self._system.default("default_template"),
            default_dispvm=self._system.default("default_dispvm"),
            labels=self._system.labels(),
            dom0_user=dom0_user(),
            policy_names=policy_names,
        )
        # Who asks from outside dom0 must not get, with a name, what the policy gives to it.
        reserved = frozenset[str]() if self._client == "dom0" else frozenset(system.policy_names)
        return HostView(frozenset(qubes) | reserved, system, _policy_remarks(unread))

    def free_space(self, pool: str | None = None) -> int | None:
        """Bytes that are free in the storage pool, if it tells."""
        return self._system.free_space(pool or self._pool)

    def begin(self, qube: NewQube) -> QubeTransaction:
        """Begin a qube, under the lock; raises QubeExists, NoSpace or HostFailed."""
        with self._mutex:
            if not self._is_locked:
                raise HostFailed("the system is not locked for this restore", qube=qube.name)
            transaction = self._begun(qube)
            self._qubes.append(transaction)
            return transaction

    def _begun(self, qube: NewQube) -> QubeTransaction:
        if qube.source.klass == "AdminVM":
            return Dom0Home(self._home, qube)
        if qube.definition is None:
            raise HostFailed("nothing says how it is to be set up", qube=qube.name)
        return QubesQube(
            self._system,
            qube,
            qube.definition,
            pool=qube.pool or self._pool,
            client=self._client,
            something_freed=self._remove_condemned,
        )

    def set_default_dispvm(self, qube: str, default_dispvm: str) -> None:
        """Give a finished qube its disposable template. Raises HostFailed."""
        self._system.set_default_dispvm(qube, default_dispvm)

    def restored_from(self, backup_id: str) -> Sequence[RestoredQube]:
        """Those that carry a proof, and the tags of a finished qube. Raises HostFailed.

        A caller outside dom0 gets to know only of those that were restored for it.
        """
        return [proof.restored for proof in self._proofs(backup_id)]

    def take_back(self, qube: str, backup_id: str, *, from_before: bool) -> bool:
        """Remove the proof of a finished qube, and take its netvm away if it came in this restore.

        Of one that runs, or is another by now, the netvm is left alone. Raises HostFailed.
        """
        try:
            is_disconnected = not from_before and self._system.disconnect(qube, restored_tag(backup_id))
        finally:  # one of the two does not depend on the other
            if qube in (proof.name for proof in self._proofs(backup_id)):
                self._system.remove_feature(qube, FEATURE)
        return is_disconnected

    def _proofs(self, backup_id: str) -> Iterator[Proof]:
        values = self._system.features_of_tagged(restored_tag(backup_id), UNFINISHED, FEATURE)
        for name, value in values.items():
            proof = Proof.read(value)
            if proof is None or (proof.name, proof.backup_id) != (name, backup_id):
                continue
            if self._client in ("dom0", proof.client):
                yield proof

    # --- Ending ----------------------------------------------------------------------------------

    def _remove_condemned(self) -> None:
        """Remove what was rolled back while others still referred to it, as far as that is possible now."""
        with self._mutex:
            for qube in reversed(self._qubes):
                if isinstance(qube, QubesQube):
                    with suppress(HostFailed):  # at the end it is tried again, and told
                        qube.remove_condemned()

    def _end_qubes(self, lock: GuardedLock, kept_before: Iterable[str]) -> list[str]:
        """Remove what is unfinished; clauses on what is left, if it was not left before this restore."""
        with self._mutex:
            self._is_locked = False
            qubes, self._qubes = self._qubes, []
            left: list[str] = []
            for qube in reversed(qubes):  # what is based on others has mostly begun after them
                try:
                    qube.rollback()
                except HostFailed as error:
                    if isinstance(qube, QubesQube) and qube.is_gone:
                        left.append(f"{qube.name}: {error.reason}")
        try:
            # Whatever is still there of them, for whatever reason.
            kept = [*clear_untagged(self._system, lock.being_created).kept, *self._clear_up().kept]
        except HostFailed as error:
            kept = [error.reason]
        return [*left, *(clause for clause in kept if clause not in kept_before)]

    def _clear_up(self) -> Leftovers:
        """Clear up under the lock what no running restore can own."""
        found = clear_unfinished_qubes(self._system)
        cleared, kept = clear_unfinished_homes(self._home)
        whose = f"in {strip_control(str(self._home))}, left by an interrupted restore,"
        found.cleared += [f"{name} {whose} was removed" for name in cleared]
        found.kept += [f"{name} {whose} cannot be removed safely" for name in kept]
        return found

    def _clear_up_after_kill(self, being_created: Iterable[str]) -> None:
        """What the guard does once this process is gone. Everything is tried; there is nobody to tell.

        The worker has a guard of its own.
        """
        self._system = connect_patiently()
        with ExitStack() as locks:
            with suppress(RestoreError):  # in vain: the stock restore has begun, and has taken its tag away
                locks.enter_context(stock_lock(self._stock_lock_path))
            with suppress(RestoreError):
                clear_untagged(self._system, being_created)
            self._clear_up()


def names_in_policy(directories: Iterable[Path]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The names of qubes in a policy, whether or not there are such qubes; for each the first file.

    The policy is the system's own, and is not judged here: a word that could be a name counts as one. Beside
    the names: clauses on the parts of the policy that cannot be read.
    """
    names, unread = dict[str, str](), list[str]()
    for directory in directories:
        for folder in (directory, directory / "include"):
            try:
                files = sorted(folder.iterdir())
            except FileNotFoundError:
                continue
            except OSError as error:
                unread.append(f"{strip_control(str(folder))} ({error.strerror})")
                continue
            for file in files:
                has_services = file.suffix == ".policy"
                if has_services or folder != directory or directory.name == POLICY[-1].name:
                    _add_names(file, names, unread, ignored_words=2 if has_services else 0)
    return names, tuple(unread)


def _add_names(file: Path, names: dict[str, str], unread: list[str], *, ignored_words: int) -> None:
    try:
        text = file.read_text("utf-8", "replace") if file.is_file() else ""
    except OSError as error:
        unread.append(f"{strip_control(str(file))} ({error.strerror})")
        return
    if "\ufffd" in text:
        unread.append(f"{strip_control(str(file))} (it is not UTF-8)")
    for line in text.splitlines():
        # Commas are between the options of R4.0.
        for word in line.partition("#")[0].replace(",", " ").split()[ignored_words:]:
            key, _, value = word.rpartition("=")
            found = _QUBE_NAME.fullmatch(value)
            if found and key in ("", "target", "default_target") and found[1] not in _NO_QUBES:
                names.setdefault(found[1], file.name)


def _policy_remarks(unread: Sequence[str]) -> tuple[str, ...]:
    if not unread:
        return ()
    more = f", and {len(unread) - _MAX_LISTED} more" if len(unread) > _MAX_LISTED else ""
    return (
        "rules for the names of restored qubes may stand in what cannot be read of this system's policy:"
        f" {', '.join(unread[:_MAX_LISTED])}{more}",
    )


def _tell_what_is_left(left: Sequence[str], error: BaseException | None) -> None:
    if not left:
        return
    if isinstance(error, RestoreError):
        error.advice = f"{error.advice} Left behind: {'; '.join(left)}.".strip()
        return
    raise HostFailed(
        f"not everything could be removed again: {'; '.join(left)}",
        advice="What is left cannot be started; remove it with `qvm-remove`.",
    ) from error
