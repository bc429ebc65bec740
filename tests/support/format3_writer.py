"""A writer of backup format 3, for tests: what Qubes R2 to R3.2 wrote with tar and openssl.

Strategy: the same plans as for format 4, put into the other layers: the pieces of one encrypted stream, each
with the line of its MAC behind it. What openssl writes is made here with a library, as it is quicker; the
tests of `archive/openssl.py` compare the reader with the real program.
"""

import hashlib
import hmac
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import quoteattr

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from .backup_writer import PASSPHRASE
from .containers import chunks, compress
from .inner_archives import directory_tar, home_tar, inner_tar, plain_tar
from .outer_archive import RawMember, join_members
from .plans import DEFAULT_TEMPLATE, DOM0_HOME, QubePlan, expectation_of

_ELEMENTS = {"AppVM": "QubesAppVm", "StandaloneVM": "QubesHVm", "TemplateVM": "QubesTemplateVm"}


@dataclass(frozen=True, slots=True)
class Format3Writer:
    """All that one backup is made of; a TemplateVM is one archive of its directory.

    `digest` is hashlib's name, `header` replaces the header's text, `attributes` are more of them in
    qubes.xml, by qube. `inner` replaces the inner archive of a file, not compressed.
    """

    qubes: Sequence[QubePlan]
    passphrase: str = PASSPHRASE
    compression: str = "gzip"
    piece_size: int = 100 << 20
    digest: str = "sha512"
    key_size: int = 32
    encrypted: bool = True
    dom0_home: bool = False
    header: bytes | None = None
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    inner: Mapping[str, bytes] = field(default_factory=dict)

    def members(self) -> Iterator[RawMember]:
        """The members of the outer archive, in order."""
        yield from self.sealed("backup-header", self.header_text() if self.header is None else self.header)
        for name, inner in self.files():
            stream = compress(self.compression, [self.inner[name]] if name in self.inner else inner)
            if self.encrypted:
                stream = iter([self.encrypt(b"".join(stream), name)])
            for number, piece in enumerate(chunks(stream, self.piece_size)):
                if piece or not number:
                    yield from self.sealed(f"{name}.{number:03d}", piece)

    def expectation(self) -> dict[str, object]:
        """What a restore must give, for JSON. The format has no backup id."""
        return expectation_of(self.qubes, self.passphrase, "")

    def to_bytes(self) -> bytes:
        """The whole backup."""
        return join_members(self.members())

    def sealed(self, name: str, content: bytes) -> tuple[RawMember, RawMember]:
        """A member and its MAC."""
        number = hmac.new(self.passphrase.encode(), content, self.digest).hexdigest()
        line = f"{self.digest.upper()}(stdin)= {number}\n".encode()
        return RawMember(name, content), RawMember(f"{name}.hmac", line)

    def header_text(self) -> bytes:
        """The text of backup-header."""
        compressed = self.compression != "none"
        lines = [
            "version=3",
            f"hmac-algorithm={self.digest.upper()}",
            f"crypto-algorithm=aes-{self.key_size * 8}-cbc",
            f"encrypted={self.encrypted}",
            f"compressed={compressed}",
        ]
        lines += [f"compression-filter={self.compression}"] if compressed else []
        return "".join(f"{line}\n" for line in lines).encode()

    def encrypt(self, content: bytes, name: str) -> bytes:
        """What `openssl enc -md MD5` makes of it; the salt depends on the name alone."""
        salt = hashlib.sha256(name.encode()).digest()[:8]
        material, block = b"", b""
        while len(material) < self.key_size + 16:
            block = hashlib.md5(block + self.passphrase.encode() + salt).digest()
            material += block
        key, iv = material[: self.key_size], material[self.key_size : self.key_size + 16]
        encryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
        count = 16 - len(content) % 16
        return b"Salted__" + salt + encryptor.update(content + bytes([count]) * count) + encryptor.finalize()

    def path(self, qube: QubePlan) -> str:
        """The qube's directory in the archive."""
        if qube.path is not None:
            return qube.path.rstrip("/")
        return f"{'vm-templates' if qube.klass == 'TemplateVM' else 'appvms'}/{qube.name}"

    def files(self) -> Iterator[tuple[str, Iterable[bytes]]]:
        """Every file of the backup with its inner archive, not compressed, in order."""
        content = self.qubes_xml()
        yield "qubes.xml", plain_tar("qubes.xml", [content], len(content))
        for qube in self.qubes:
            if not qube.included:
                continue
            path, images = self.path(qube), {f"{name}.img": image for name, image in qube.volumes.items()}
            if qube.klass == "TemplateVM":
                yield f"{path}/.", [directory_tar(path, images, qube.small_files())]
                continue
            for name, image in images.items():
                yield f"{path}/{name}", inner_tar(f"{path}/{name}", image, "gnu")
            for name, data in qube.small_files().items():
                yield f"{path}/{name}", plain_tar(f"{path}/{name}", [data], len(data))
        if self.dom0_home:
            yield DOM0_HOME, home_tar()

    def qubes_xml(self) -> bytes:
        """qubes.xml in the old schema: dom0, a template, a net VM, and the qubes of the plan."""
        home = {"backup_content": "True", "backup_path": DOM0_HOME, "backup_size": "4096"}
        elements = [
            _element("QubesAdminVm", {"name": "dom0", "qid": "0"} | (home if self.dom0_home else {})),
            _element("QubesTemplateVm", {"name": DEFAULT_TEMPLATE, "qid": "1", "template_qid": "none"}),
            _element("QubesNetVm", {"name": "netvm", "qid": "2", "template_qid": "1"}),
        ]
        for number, qube in enumerate(self.qubes, 10):
            attributes = {
                "name": qube.name,
                "qid": str(number),
                "label": qube.label,
                "template_qid": "1" if qube.klass == "AppVM" else "none",
                "netvm_qid": "none" if qube.netvm == "" else "2",
                "uses_default_netvm": str(qube.netvm is None),
                "backup_content": str(qube.included),
                "backup_path": self.path(qube),
                "backup_size": "4096",
            }
            elements.append(
                _element(_ELEMENTS[qube.klass], attributes | dict(self.attributes.get(qube.name, {})))
            )
        root = '<QubesVmCollection default_netvm="2" default_template="1" updatevm="2" clockvm="2">'
        return f"{root}{''.join(elements)}</QubesVmCollection>\n".encode()


def _element(tag: str, attributes: Mapping[str, str]) -> str:
    return f"<{tag} {' '.join(f'{name}={quoteattr(value)}' for name, value in attributes.items())}/>"
