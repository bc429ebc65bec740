"""What proves that a chunk of a backup is authentic, in the two formats.

Strategy: a proof is made of the chunk's head, before there is room for the rest. In format 4 the MAC is
inside the chunk, and its key is derived from the head, which comes first; so the derivation begins while the
rest is still coming in. In format 3 the MAC is the next member, and its key is the passphrase.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from qubes_restore_svc.archive.container import (
    HEAD_SIZE,
    OVERHEAD,
    ContainerHead,
    keys_match,
    open_container,
    parse_head,
)
from qubes_restore_svc.archive.members import ChunkName, parse_chunk_name, parse_piece_name
from qubes_restore_svc.archive.openssl import MAX_MAC_LINE, PieceMac, open_piece, parse_mac
from qubes_restore_svc.errors import AuthenticationFailed, BadContainer, FaultyMachine
from qubes_restore_svc.kdf.engine import KdfParameters, KdfRequest
from qubes_restore_svc.worker.keys import Key, KeyScheduler
from qubes_restore_svc.worker.source import MemberStream

#: Gets a line for the person.
Remark = Callable[[str], None]


# --- Format 4: a scrypt container, its MAC at its end, its key from its head ---------------------------


class ContainerProofs:
    """Those of a backup of format 4. `passphrase_of` makes the scrypt passphrase of a chunk from its member
    name without `.enc`. `label` names the chunk to people, unless its number does."""

    head_size = HEAD_SIZE  #: bytes at the beginning of a chunk without which there is no proof

    def __init__(
        self, scheduler: KeyScheduler, passphrase_of: Callable[[str], bytes], *, label: str = ""
    ) -> None:
        self._scheduler = scheduler
        self.passphrase_of = passphrase_of
        self._label = label

    def parse_name(self, untrusted_name: str) -> ChunkName:
        """The name of a member, taken apart; None for a proof beside its chunk. Raises BadArchive."""
        return parse_chunk_name(untrusted_name)

    def prove(self, name: ChunkName, size: int, untrusted_head: bytearray) -> "ContainerProof":
        """The proof of a chunk of `size` bytes. Raises BadContainer, ExcessiveCost."""
        if size < OVERHEAD:
            raise BadContainer(f"it has {size} bytes, fewer than an empty container", chunk=name.number)
        costs = self._scheduler.costs
        head = parse_head(untrusted_head, ignore_cost_limit=costs.ignored)
        costs.check(head.parameters)
        request = head.request(self.passphrase_of(name.member))
        label = self._label or f"chunk {name.number}"
        return ContainerProof(head, request, label, self._scheduler)


class ContainerProof:
    """The proof inside a container, which needs a derived key. `label` names the container to people."""

    def __init__(self, head: ContainerHead, request: KdfRequest, label: str, scheduler: KeyScheduler) -> None:
        self._head = head
        self._request = request
        self._label = label
        self._scheduler = scheduler
        self._costs = scheduler.costs
        self._key = Key()

    @property
    def parameters(self) -> KdfParameters:
        """Those of its key derivation; None for a proof that has none."""
        return self._head.parameters

    def begin(self, check: Callable[[], None], *, urgent: bool) -> None:
        """There is room: derive the key, unless `check` raises when its turn comes."""

        def check_all() -> None:
            check()
            self._costs.check(self.parameters)

        self._key = self._scheduler.submit(self._request, urgent=urgent, check=check_all)

    def derive_again(self, passphrase: bytes) -> None:
        """Derive the key from another scrypt passphrase; blocks. Raises what engines raise."""
        request = self._head.request(passphrase)
        derived = Key()
        derived.set_result(self._scheduler.derive_again(request)[0])
        self._request, self._key = request, derived

    def complete(self, members: MemberStream) -> None:
        """The chunk's content has passed; nothing stands behind it."""

    def when_settled(self, waker: Callable[[], object]) -> None:
        """Call `waker` when the key is there, or will not be; at once if that is so."""
        self._key.add_done_callback(lambda _: waker())

    @property
    def ready(self) -> bool:
        """Would `verify` neither wait for the key nor derive it once more?"""
        return self._key.done() and not self._key.cancelled() and not self.failed() and self.fits()

    @property
    def derived(self) -> float:
        """How much of the key is there, 0 to 1. From any thread."""
        return self._key.part

    def failed(self) -> bool:
        """Wait for the key: could it not be derived?"""
        return self._key.exception() is not None

    def fits(self) -> bool:
        """Does the key, as it was derived first, fit the head? Blocks, and raises what engines raise."""
        return keys_match(self._head, self._key.result())

    def verify(self, untrusted_content: Callable[[], memoryview], remark: Remark) -> memoryview:
        """Check the MAC over the content, which is asked for when the key is there."""
        key = self.fitting_key(remark)
        if key is None:
            raise AuthenticationFailed("it does not belong to this backup, or not to this place in it")
        return open_container(untrusted_content(), key)

    def fitting_key(self, remark: Remark) -> bytes | None:
        """The key; None if none fits the head, whoever derives it. Blocks. Raises what `Chunk.open` raises.

        `remark` is told when one that did not fit was the fault of this computer.
        """
        key = self._key.result()
        if keys_match(self._head, key):
            self._costs.fitted(self.parameters)
            return key
        self._costs.check(self.parameters)  # nobody derives a second time what would be refused by now
        again, by = self._scheduler.derive_again(self._request)
        if keys_match(self._head, again):
            first = self._scheduler.engine_name
            remark(
                f"the key of {self._label} came out wrong from {first} and right from {by}:"
                " the processor or the memory of this computer may be faulty"
            )
            self._costs.fitted(self.parameters)
            return again
        if again != key:
            raise FaultyMachine(
                "its key was derived twice, with two results, and neither is right: the processor or the"
                " memory of this computer is faulty"
            )
        self._costs.misfitted(self.parameters)
        return None

    def withdraw(self) -> None:
        """It is needed no more; safe to repeat."""
        self._key.cancel()


# --- Format 3: a piece of a stream, its MAC a line in the member behind it -----------------------------


@dataclass(frozen=True, slots=True)
class MacLineProofs:
    """Those of a backup of format 3, whose MACs are made with `digest`."""

    head_size: ClassVar = 0

    digest: str
    passphrase: bytes = field(repr=False)

    def parse_name(self, untrusted_name: str) -> ChunkName | None:
        return parse_piece_name(untrusted_name)

    def prove(self, name: ChunkName, size: int, untrusted_head: bytearray) -> "MacLineProof":
        return MacLineProof(name, self)


class MacLineProof:
    """The line that `openssl dgst -hmac` printed over one piece."""

    parameters = None
    derived = 1.0  #: there is no key
    ready = True

    def __init__(self, name: ChunkName, proofs: MacLineProofs) -> None:
        self._name = name
        self._proofs = proofs
        self.mac = PieceMac("", b"")

    def begin(self, check: Callable[[], None], *, urgent: bool) -> None:
        """No key is derived."""

    def complete(self, members: MemberStream) -> None:
        """The chunk's content has passed: take what stands behind it. Raises BadContainer."""
        member = members.next_member()
        if member is not None and member.name == f"{self._name.member}.hmac" and member.size <= MAX_MAC_LINE:
            self.mac = parse_mac(members.read_content(member.size), self._proofs.digest)
            return
        if member is not None:
            members.push_back(member)
        raise BadContainer("its MAC does not follow it", chunk=self._name.number)

    def when_settled(self, waker: Callable[[], object]) -> None:
        waker()

    def verify(self, untrusted_content: Callable[[], memoryview], remark: Remark) -> memoryview:
        return open_piece(untrusted_content(), self.mac, self._proofs.passphrase)

    def withdraw(self) -> None:
        """Nothing runs for it."""


#: What shows that one chunk is authentic. It is made of the chunk's head, before there is room for it.
Proof = ContainerProof | MacLineProof
#: How the chunks of one backup are proven, and named.
Proofs = ContainerProofs | MacLineProofs
