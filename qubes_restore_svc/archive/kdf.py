"""Key derivation: scrypt (RFC 7914), which turns a passphrase and a salt into the two keys of a container.

Strategy: a derivation is a value (`KdfRequest`) and an engine is whoever can carry it out, so that the
pipeline can choose among engines and run several at once. The parameters come from the archive,
unauthenticated, and they say how much memory and time is spent: `check_cost` holds them under a fixed
ceiling, and every engine calls it before it allocates anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cryptography.hazmat.backends.openssl import backend
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from qubes_restore_svc.archive.types import human_size
from qubes_restore_svc.errors import BudgetTooSmall, ExcessiveCost

#: Bytes that every derivation yields: 32 for AES-256, then 32 for HMAC-SHA-256.
KEYS_SIZE = 64

#: Ceiling for the memory of one derivation, in bytes: a table of 16 GiB, and room for what stands beside
#: it. The writer takes as much as its machine works through in five seconds, 2 GiB on today's.
MAX_MEMORY = 17 << 30

#: Ceiling for the work of one derivation, N·r·p. It is its own limit, because scrypt raises p instead of N
#: when the writer has little memory. The largest that was seen is 2^21 · 8 · 1 = 2^24.
MAX_WORK = 1 << 28


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
        """N·r·p, which the time is proportional to."""
        return (1 << self.log_n) * self.r * self.p


@dataclass(frozen=True, slots=True)
class KdfRequest:
    """One derivation to carry out. `passphrase` is the complete one, with the member's name in it."""

    parameters: KdfParameters
    salt: bytes
    passphrase: bytes = field(repr=False)


class KdfEngine(Protocol):
    """Carries out derivations. It is called from several threads at once; each call blocks until it is done
    and holds up no other thread (the interpreter lock is released)."""

    @property
    def name(self) -> str:
        """What carries them out, for reports: `OpenSSL 3.0.2`."""
        ...

    @property
    def lanes(self) -> int:
        """How many requests one call carries out side by side; each of them needs its own memory."""
        ...

    def derive(self, requests: Sequence[KdfRequest]) -> list[bytes]:
        """KEYS_SIZE bytes for each request, in the same order.

        Raises ExcessiveCost before anything is allocated, BudgetTooSmall when the memory cannot be had.
        """
        ...


def check_cost(parameters: KdfParameters) -> None:
    """Raise ExcessiveCost, with the memory or the work that is asked for, past the fixed ceilings."""
    if parameters.memory > MAX_MEMORY:
        raise ExcessiveCost(
            f"its key derivation asks for {human_size(parameters.memory)} of memory;"
            f" more than {human_size(MAX_MEMORY)} are refused"
        )
    if parameters.work > MAX_WORK:
        raise ExcessiveCost(
            f"its key derivation asks for {parameters.work:,} block operations"
            f" (N = 2^{parameters.log_n}, r = {parameters.r}, p = {parameters.p});"
            f" more than {MAX_WORK:,} are refused"
        )


class OpensslEngine:
    """The KdfEngine that is always there: one derivation after the other, by the OpenSSL that
    `cryptography` has."""

    @property
    def name(self) -> str:
        return " ".join(backend.openssl_version_text().split()[:2])

    @property
    def lanes(self) -> int:
        return 1

    def derive(self, requests: Sequence[KdfRequest]) -> list[bytes]:
        for request in requests:
            if not request.parameters.valid:
                raise ValueError(f"{request.parameters} are no scrypt parameters")
            check_cost(request.parameters)
        return [_derive(request) for request in requests]


def _derive(request: KdfRequest) -> bytes:
    cost = request.parameters
    try:
        kdf = Scrypt(salt=request.salt, length=KEYS_SIZE, n=1 << cost.log_n, r=cost.r, p=cost.p)
        return kdf.derive(request.passphrase)
    except MemoryError:
        raise BudgetTooSmall(
            f"the {human_size(cost.memory)} of memory that a key derivation needs could not be had",
            advice="Close something, or run this where more memory is free.",
        ) from None
