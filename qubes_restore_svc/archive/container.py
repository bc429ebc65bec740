"""The scrypt container: how every member of a backup is encrypted and authenticated.

Strategy: three steps that can only be taken in order. `parse_head` reads the parameters of the key derivation
(all that is needed to start it, long before the rest has arrived). `keys_match` tells a wrong passphrase from
the head alone. `open_container` checks the MAC over the whole container, and decrypts nothing before: there
is no other way to plaintext in this package. None of them copies the content: a container has up to 100 MiB.

Layout, the format of the scrypt program (scrypt 1.3, FORMAT): `scrypt`, version 0, log2 N, r and p as
big-endian u32, salt of 32 bytes, first 16 bytes of SHA-256 over these 48; HMAC-SHA-256 over these 64; the
content under AES-256-CTR from counter 0; HMAC-SHA-256 over everything before it.
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from qubes_restore_svc.archive.members import Buffer
from qubes_restore_svc.errors import AuthenticationFailed, BadContainer
from qubes_restore_svc.kdf.engine import KEYS_SIZE, KdfParameters, KdfRequest, check_cost

#: Bytes before the content.
HEAD_SIZE = 96

#: Bytes after the content.
TAIL_SIZE = 32

#: How much longer a container is than its content, in bytes.
OVERHEAD = HEAD_SIZE + TAIL_SIZE

_MAGIC = b"scrypt"
_PARAMETERS = struct.Struct(">6sBBII32s")
_CHECKSUM_SIZE = 16
_HEAD_MAC_AT = 64
_AES_KEY_SIZE = 32


@dataclass(frozen=True, slots=True)
class ContainerHead:
    """The first HEAD_SIZE bytes of a container, well-formed and not past the cost ceiling; not
    authenticated."""

    parameters: KdfParameters
    salt: bytes
    raw: bytes

    def request(self, passphrase: bytes) -> KdfRequest:
        """The derivation that yields this container's keys."""
        return KdfRequest(self.parameters, self.salt, passphrase)


def parse_head(untrusted_head: Buffer, *, ignore_cost_limit: bool = False) -> ContainerHead:
    """Parse the first HEAD_SIZE bytes of `untrusted_head`. Raises BadContainer, ExcessiveCost (see
    `check_cost`)."""
    raw = bytes(untrusted_head[:HEAD_SIZE])
    if len(raw) < HEAD_SIZE:
        raise BadContainer(
            f"{len(raw)} bytes are too few for an encrypted member, which has {OVERHEAD} or more"
        )
    magic, version, log_n, r, p, salt = _PARAMETERS.unpack_from(raw)
    if magic != _MAGIC:
        raise BadContainer("it does not begin like an encrypted member")
    if version != 0:
        raise BadContainer(f"version {version} of scrypt's format is not known; 0 is")
    checksum = hashlib.sha256(raw[: _PARAMETERS.size]).digest()[:_CHECKSUM_SIZE]
    if raw[_PARAMETERS.size : _HEAD_MAC_AT] != checksum:
        raise BadContainer("the checksum of its beginning is wrong")
    parameters = KdfParameters(log_n, r, p)
    if not parameters.valid:
        raise BadContainer(f"its scrypt parameters N = 2^{log_n}, r = {r}, p = {p} are impossible")
    check_cost(parameters, ignore_cost_limit=ignore_cost_limit)
    return ContainerHead(parameters, salt, raw)


def keys_match(head: ContainerHead, keys: bytes) -> bool:
    """Do `keys` (the KEYS_SIZE bytes derived for this head) belong to it? False: another passphrase, or
    another name of the member. The content is not authenticated by this."""
    _check_size(keys)
    mac = hmac.digest(keys[_AES_KEY_SIZE:], head.raw[:_HEAD_MAC_AT], "sha256")
    return hmac.compare_digest(mac, head.raw[_HEAD_MAC_AT:])


def open_container(untrusted_container: bytearray | memoryview, keys: bytes) -> memoryview:
    """Check the MAC over the whole container, and only then decrypt its content, where it lies.

    The content comes as a view of the caller's buffer, which is no container any more. Raises
    AuthenticationFailed if it is not what was written, BadContainer if it is shorter than OVERHEAD; the
    buffer is as it was then.
    """
    _check_size(keys)
    view = memoryview(untrusted_container)
    if len(view) < OVERHEAD:
        raise BadContainer(
            f"{len(view)} bytes are too few for an encrypted member, which has {OVERHEAD} or more"
        )
    mac = hmac.new(keys[_AES_KEY_SIZE:], view[:-TAIL_SIZE], "sha256").digest()
    if not hmac.compare_digest(mac, view[-TAIL_SIZE:]):
        raise AuthenticationFailed("its content is not what was written (wrong MAC)")
    content = view[HEAD_SIZE:-TAIL_SIZE]
    Cipher(AES256(keys[:_AES_KEY_SIZE]), CTR(bytes(16))).decryptor().update_into(content, content)
    return content.toreadonly()


def open_small(untrusted_container: Buffer, keys: bytes) -> bytes:
    """A copy of the content, for members that are small. Raises like `open_container`."""
    return bytes(open_container(bytearray(untrusted_container), keys))


def _check_size(keys: bytes) -> None:
    if len(keys) != KEYS_SIZE:
        raise ValueError(f"keys have {KEYS_SIZE} bytes")
