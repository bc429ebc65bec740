"""Key derivation: scrypt (RFC 7914), which turns a passphrase and a salt into the two keys of a container.

Strategy: a derivation is a value (`KdfRequest`) and an engine is an object that can carry it out, so that the
pipeline can choose among engines and run several at once. The parameters come from the archive,
unauthenticated, and they say how much memory and time is spent. So there is one bound, `check_cost`, which
the head of a container has to pass. Every engine can carry out what passes it; the engines themselves
check only `check_possible`, before they allocate anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from types import TracebackType
from typing import Protocol, Self

from cryptography.hazmat.backends.openssl import backend
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from qubes_restore_svc.errors import BudgetTooSmall, ExcessiveCost, size_text

#: Bytes that every derivation yields: 32 for AES-256, then 32 for HMAC-SHA-256.
KEYS_SIZE = 64

#: Ceiling for the work of one derivation, in the unit of `KdfParameters.work`.
#:
#: The scrypt program of the writer measures how many Salsa20/8 cores its processor computes in a second, and
#: takes N, r = 8 and p so that N·r·p is at most a quarter of five seconds' worth; p is more than 1 only where
#: an eighth of the memory is too little for such an N. The largest that was seen is 2^21 · 8 · 1 = 2^24. A
#: processor that computes a core in 20 ns, and none is faster, comes to 2^26. This is three times that; it
#: takes 24 GiB of memory at the most, and about as long as twelve of the largest that were seen.
MAX_WORK = 3 << 26

#: How many times the work of the dearest key that fitted is accepted in any case: it varies so in a backup.
VARIATION = 4

#: Ceiling for r·p, which no option lifts, because the engines rely on it. It is what the program would take
#: with the least memory that it ever uses, 1 MiB, where N·r·p is 2^26: p = 2^13.
MAX_BLOCKS = 1 << 16

#: Ceiling for log2 N, which no option lifts either.
MAX_LOG_N = 32

#: What PBKDF2 computes for every block of 128 bytes, in steps of scryptROMix, rounded up.
_PBKDF2_STEPS = 8


@dataclass(frozen=True, slots=True)
class KdfParameters:
    """The cost of a derivation: N = 2^log_n rounds over blocks of 128·r bytes, p times."""

    log_n: int
    r: int
    p: int

    @property
    def valid(self) -> bool:
        """Within the limits of RFC 7914: N larger than 1 and less than 2^(128·r/8), r·p less than 2^30; N at
        most 2^63."""
        return (
            self.r >= 1
            and self.p >= 1
            and self.r * self.p < 1 << 30
            and 1 <= self.log_n < min(64, 16 * self.r)
        )

    @property
    def memory(self) -> int:
        """Bytes that OpenSSL allocates for the derivation: p blocks, the table of N blocks, two to work
        in."""
        return 128 * self.r * (self.p + (1 << self.log_n) + 2)

    @property
    def work(self) -> int:
        """N·r·p, which the time is proportional to, and what PBKDF2 adds to it."""
        return ((1 << self.log_n) + _PBKDF2_STEPS) * self.r * self.p


@dataclass(frozen=True, slots=True)
class KdfRequest:
    """One derivation to carry out. `passphrase` is the complete one, with the member's name in it."""

    parameters: KdfParameters
    salt: bytes
    passphrase: bytes = field(repr=False)


class KdfLanes(Protocol):
    """Derivations of one thread that run side by side; a context manager, which gives up what still runs."""

    @property
    def free(self) -> int:
        """How many more could run."""
        ...

    def begin(self, request: KdfRequest, stride: int, limit: int) -> int | None:
        """Begin a derivation; returns the ticket that `advance` will name.

        None if its memory does not fit: all arenas of the engine together may take `limit` bytes. Raises
        ExcessiveCost before anything is allocated, BudgetTooSmall when the system has not got the memory.
        """
        ...

    def take_over(self, other: Self, ticket: int) -> int:
        """Go on with a derivation that `other`, of the same engine, has begun; returns its ticket here.

        A lane has to be free, and nobody may be advancing either of them.
        """
        ...

    def advance(self) -> list[tuple[int, bytes]]:
        """Compute for a while, without the interpreter lock; ticket and key of what is finished."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None: ...


class KdfEngine(Protocol):
    """Carries out derivations, for any number of threads; each has lanes of its own."""

    @property
    def name(self) -> str:
        """What carries them out, for reports: `OpenSSL 3.0.2`."""
        ...

    @property
    def lanes(self) -> int:
        """How many derivations one thread can run side by side; each of them needs its own memory."""
        ...

    @property
    def lanes_for_one(self) -> int:
        """How many lanes take hardly longer than one does."""
        ...

    @property
    def step_times(self) -> Mapping[int, float]:
        """By the number of lanes that are filled: how long a step of all of them takes, in steps of one lane.

        A number that is not in it takes as long as the next one that is; `lanes` is in it."""

    @property
    def lanes_for_few(self) -> int:
        """How many lanes a thread fills while nobody knows yet how many derivations come."""
        ...

    @property
    def strides(self) -> Sequence[int]:
        """The strides that there are, rising from 1: with the stride s, every s-th block is stored."""
        ...

    @property
    def memory_held(self) -> int:
        """Bytes that the engine holds: of running derivations, and kept for the next ones."""
        ...

    @property
    def memory_idle(self) -> int:
        """Bytes of `memory_held` that no derivation uses."""
        ...

    @property
    def largest_idle(self) -> int:
        """Bytes of the largest arena that no derivation uses."""
        ...

    def memory(self, parameters: KdfParameters, stride: int = 1) -> int:
        """Bytes that one derivation takes while it runs."""
        ...

    def advances(self, parameters: KdfParameters, stride: int) -> float:
        """How often lanes have to `advance` for one derivation, about."""
        ...

    def trim(self, keep: int = 0) -> int:
        """Give back idle memory until at most `keep` bytes are held; the bytes given back."""
        ...

    def open_lanes(self) -> KdfLanes:
        """Lanes for one thread."""
        ...

    def derive(self, requests: Sequence[KdfRequest]) -> list[bytes]:
        """KEYS_SIZE bytes for each request, in the same order; blocks until all are done.

        Raises ExcessiveCost before anything is allocated, BudgetTooSmall when the memory cannot be had.
        """
        ...


def check_possible(parameters: KdfParameters) -> None:
    """Raise ExcessiveCost for what no engine carries out, ValueError for what is not scrypt at all."""
    if not parameters.valid:
        raise ValueError(f"{parameters} are no scrypt parameters")
    if parameters.log_n > MAX_LOG_N or parameters.r * parameters.p > MAX_BLOCKS:
        raise ExcessiveCost(
            f"its key derivation has N = 2^{parameters.log_n}, r = {parameters.r}, p = {parameters.p};"
            f" more than N = 2^{MAX_LOG_N}, or r times p = {MAX_BLOCKS:,}, is not possible here",
            advice="The file is damaged or was made to attack; do not trust it.",
        )


def check_cost(parameters: KdfParameters, *, ignore_cost_limit: bool = False) -> None:
    """Raise ExcessiveCost unless the derivation is possible, and of no more work than MAX_WORK, which
    `ignore_cost_limit` lifts. ValueError for what is not scrypt at all."""
    check_possible(parameters)
    if parameters.work > MAX_WORK and not ignore_cost_limit:
        raise ExcessiveCost(
            f"its key derivation (N = 2^{parameters.log_n}, r = {parameters.r}, p = {parameters.p}) is"
            f" {-(-parameters.work // MAX_WORK):,} times the most that is accepted, and takes"
            f" {size_text(parameters.memory)} of memory"
        )


class CostLimit:
    """What the keys of one backup may cost together, where heads are forged; `ignored`: whatever they like.

    Anybody can forge a head that asks for all that `check_cost` admits, for every file of a backup. So the
    work of every key that did not fit is subtracted from MAX_WORK. A later head may ask for what is left, or
    for VARIATION times the work of the dearest key that did fit, whichever is more. For any thread.
    """

    def __init__(self, *, ignored: bool = False) -> None:
        self.ignored = ignored
        self._left = MAX_WORK
        self._dearest = 0

    def fitted(self, parameters: KdfParameters) -> None:
        """A key with these parameters has fitted its head."""
        self._dearest = max(self._dearest, parameters.work)

    def misfitted(self, parameters: KdfParameters) -> None:
        """A key with these parameters did not fit, no matter which engine derived it."""
        self._left = max(0, self._left - parameters.work)

    def refuses(self, parameters: KdfParameters) -> bool:
        """Is a derivation too dear by now?"""
        return not self.ignored and parameters.work > max(self._left, VARIATION * self._dearest)

    def check(self, parameters: KdfParameters) -> None:
        """Raise ExcessiveCost if a derivation is too dear by now."""
        if self.refuses(parameters):
            raise ExcessiveCost(
                f"its key derivation (N = 2^{parameters.log_n}, r = {parameters.r}, p = {parameters.p}) asks"
                f" for more than {VARIATION} times the work of any key that fitted; too much went for keys"
                " that did not fit"
            )


class OpensslEngine:
    """The KdfEngine that is always there: one derivation after the other, by the OpenSSL that
    `cryptography` has."""

    @property
    def name(self) -> str:
        return " ".join(backend.openssl_version_text().split()[:2])

    def __init__(self) -> None:
        self._lock = Lock()
        self._held = 0

    @property
    def lanes(self) -> int:
        return 1

    @property
    def lanes_for_one(self) -> int:
        return 1

    @property
    def step_times(self) -> Mapping[int, float]:
        return {1: 1.0}

    @property
    def lanes_for_few(self) -> int:
        return 1

    @property
    def strides(self) -> Sequence[int]:
        return (1,)

    @property
    def memory_held(self) -> int:
        return self._held

    @property
    def memory_idle(self) -> int:
        return 0

    @property
    def largest_idle(self) -> int:
        return 0

    def memory(self, parameters: KdfParameters, stride: int = 1) -> int:
        return parameters.memory

    def advances(self, parameters: KdfParameters, stride: int) -> float:
        return 1

    def trim(self, keep: int = 0) -> int:
        return 0

    def open_lanes(self) -> "OpensslLane":
        return OpensslLane(self)

    def count(self, memory: int, limit: int | None = None) -> bool:
        """Count `memory` bytes more, or fewer if negative; False if that would be more than `limit`."""
        with self._lock:
            if limit is not None and self._held + memory > limit:
                return False
            self._held += memory
            return True

    def derive(self, requests: Sequence[KdfRequest]) -> list[bytes]:
        for request in requests:
            check_possible(request.parameters)
        return [_derive(request) for request in requests]


class OpensslLane:
    """The one lane of a thread: a derivation waits in it until `advance` carries it out."""

    def __init__(self, engine: OpensslEngine) -> None:
        self._engine = engine
        self._request: KdfRequest | None = None
        self._ticket = 0

    @property
    def free(self) -> int:
        """One or none."""
        return int(self._request is None)

    def begin(self, request: KdfRequest, stride: int, limit: int) -> int | None:
        """See KdfLanes. There is no other stride than 1."""
        check_possible(request.parameters)
        if not self._engine.count(request.parameters.memory, limit):
            return None
        self._request = request
        self._ticket += 1
        return self._ticket

    def take_over(self, other: Self, ticket: int) -> int:
        """See KdfLanes."""
        assert other._request is not None and self._request is None, "it has begun there, and none here"
        self._request, other._request = other._request, None
        self._ticket += 1
        return self._ticket

    def advance(self) -> list[tuple[int, bytes]]:
        """Carry it out, to its end."""
        if self._request is None:
            return []
        try:
            (key,) = self._engine.derive([self._request])
        finally:
            self._give_back()
        return [(self._ticket, key)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._request is not None:
            self._give_back()

    def _give_back(self) -> None:
        assert self._request is not None
        self._engine.count(-self._request.parameters.memory)
        self._request = None


def best_engine() -> KdfEngine:
    """The native engine where it was built and can be loaded, OpenSSL's elsewhere."""
    try:
        from qubes_restore_svc.kdf.native import NativeEngine
    except ImportError:
        return OpensslEngine()
    return NativeEngine()


def _derive(request: KdfRequest) -> bytes:
    cost = request.parameters
    try:
        kdf = Scrypt(salt=request.salt, length=KEYS_SIZE, n=1 << cost.log_n, r=cost.r, p=cost.p)
        return kdf.derive(request.passphrase)
    except MemoryError:
        raise out_of_memory(cost.memory) from None


def out_of_memory(size: int) -> BudgetTooSmall:
    """What to say when the system has not got the `size` bytes of a derivation."""
    return BudgetTooSmall(
        f"the {size_text(size)} of memory that a key derivation needs could not be had",
        advice="Close something, or run this where more memory is free.",
    )
