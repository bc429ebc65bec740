"""Damages inside the chunks: compressed streams and inner archives that lie, every chunk authentic."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from qubes_restore_svc import errors

from .backup_writer import BackupWriter, Replacements
from .containers import compress
from .damage_tools import GIB, Breaker, DamageGroup, Errors, victim_file, with_stream, zero_bomb
from .inner_archives import gnu_sparse_tar, pax_sparse_tar, plain_tar
from .outer_archive import RawMember
from .plans import ImagePlan, sample_image
from .tar_blocks import tar_header

INNER_DAMAGES = DamageGroup()


# --- Compressed streams --------------------------------------------------------------------------------


def _victim_stream(change: Callable[[bytes, BackupWriter], Iterable[bytes]]) -> Breaker:
    """The victim's compressed stream changed, every chunk of it authentic."""

    def breaker(writer: BackupWriter) -> Iterator[RawMember]:
        file = victim_file(writer)
        inner = dict(writer.files())[file]
        stream = b"".join(writer.compressed(file, inner))
        return with_stream(writer, file, change(stream, writer))

    return breaker


_STREAMS: Mapping[str, Callable[[bytes, BackupWriter], Iterable[bytes]]] = {
    "data-after-the-compressed-stream": lambda stream, _: [stream, b"trailing data"],
    "compressed-stream-ends-early": lambda stream, _: [stream[: len(stream) * 2 // 3]],
    "compressed-stream-loses-its-end": lambda stream, writer: [
        stream[: -20480 if writer.compression == "none" else -1]  # a tar ends in padding that no one misses
    ],
    "compressed-stream-is-noise": lambda stream, _: [sample_image(1 << 18, 1, 9).extents[0][1]],
    "compressed-stream-is-empty": lambda stream, _: [],
    "compressed-stream-of-another-filter": lambda stream, writer: compress(
        "bzip2" if writer.compression in ("gzip", "pigz") else "gzip", [stream]
    ),
}
for _name, _change_stream in _STREAMS.items():
    # Without compression the same bytes are a malformed inner archive.
    INNER_DAMAGES.add(errors.BadCompression, "qube", errors.BadImage, name=_name)(
        _victim_stream(_change_stream)
    )


# --- Inner archives --------------------------------------------------------------------------------------

MadeArchive = Callable[[str, ImagePlan], Iterable[bytes]]


def _victim_archive(make: MadeArchive) -> Breaker:
    """The victim's inner archive replaced by `make(file name, its image)`."""

    def breaker(writer: BackupWriter) -> Iterator[RawMember]:
        file, image = victim_file(writer), next(iter(writer.qubes[0].volumes.values()))
        return replace(writer, replacements=Replacements(inner={file: make(file, image)})).members()

    return breaker


def _sparse(
    style: str, spans: Callable[[int], list[tuple[int, int]]], *, grown: int = 0, stored: int | None = None
) -> MadeArchive:
    """An archive that claims an image `grown` bytes larger than the true one, with the map that
    `spans` makes for that size, a header that says `stored`, and data for every span."""
    write = gnu_sparse_tar if style == "gnu" else pax_sparse_tar

    def make(file: str, image: ImagePlan) -> Iterator[bytes]:
        size = image.size + grown
        return write(
            file, size, spans(size), [b"x" * length for _, length in spans(size)], stored_size=stored
        )

    return make


_MAP, _IMAGE, _LARGE = errors.BadSparseMap, errors.BadImage, errors.ImageTooLarge
for _style in ("gnu", "pax"):
    _cases: list[tuple[str, Errors, MadeArchive]] = [
        (
            "sparse-map-overlaps",
            [_MAP],
            _sparse(_style, lambda size: [(0, 8192), (4096, 8192), (size, 0)]),
        ),
        (
            "sparse-map-runs-backwards",
            [_MAP],
            _sparse(_style, lambda size: [(8192, 4096), (0, 4096), (size, 0)]),
        ),
        ("sparse-map-past-the-size", [_MAP], _sparse(_style, lambda size: [(size - 4096, 8192)])),
        ("sparse-map-far-past-the-size", [_MAP], _sparse(_style, lambda size: [(1 << 62, 4096)])),
        ("sparse-map-wraps-around", [_MAP], _sparse(_style, lambda size: [((1 << 64) - 4096, 8192)])),
        ("sparse-map-starts-below-zero", [_MAP, _IMAGE], _sparse(_style, lambda size: [(-4096, 8192)])),
        (
            "sparse-map-of-less-than-the-data",
            [_MAP, _IMAGE],
            _sparse(_style, lambda size: [(0, 4096), (size, 0)], stored=65536),
        ),
        (
            "sparse-map-of-more-than-the-data",
            [_MAP, _IMAGE],
            _sparse(_style, lambda size: [(0, 65536), (size, 0)], stored=4096),
        ),
        ("image-of-4-exbibytes", [_LARGE, _IMAGE], _sparse(_style, lambda size: [(size, 0)], grown=1 << 62)),
        ("image-of-a-tebibyte", [_LARGE], _sparse(_style, lambda size: [(size, 0)], grown=1 << 40)),
        (
            "image-of-negative-size",
            [_IMAGE, _LARGE, _MAP],
            _sparse(_style, lambda size: [(0, 4096)], grown=-(1 << 30)),
        ),
    ]
    for _name, _errors, _make in _cases:
        INNER_DAMAGES.add(_errors[0], "qube", *_errors[1:], name=f"{_style}-{_name}")(_victim_archive(_make))

_MIB_OF_DIGITS = b"9" * (1 << 20) + b"\n"
_INNER: Mapping[str, tuple[Errors, MadeArchive]] = {
    "pax-sparse-map-of-no-numbers": (
        [_MAP],
        lambda file, image: pax_sparse_tar(file, image.size, [], [], map_text=b"1\n-1\n0x10\n"),
    ),
    "pax-sparse-map-of-2-to-the-40-entries": (
        [_MAP],
        lambda file, image: pax_sparse_tar(file, image.size, [], [], map_text=b"%d\n" % (1 << 40)),
    ),
    "pax-sparse-map-with-a-huge-number": (
        [_MAP],
        lambda file, image: pax_sparse_tar(file, image.size, [], [], map_text=b"1\n" + _MIB_OF_DIGITS),
    ),
    "gnu-sparse-map-without-end": (
        [_MAP],
        lambda file, image: itertools.chain(
            [tar_header(file, 0, b"S", patches={386: b"0" * 96, 482: b"\1", 483: b"%011o\0" % image.size})],
            itertools.repeat((b"0" * 504 + b"\1").ljust(512, b"\0") * 2048, 64),
        ),
    ),
    "inner-archive-of-another-name": (
        [_IMAGE],
        lambda file, image: plain_tar("vm11/private.img", [bytes(image.size)], image.size),
    ),
    "inner-symbolic-link": ([_IMAGE], lambda file, image: _special(file, b"2")),
    "inner-hard-link": ([_IMAGE], lambda file, image: _special(file, b"1")),
    "inner-device": ([_IMAGE], lambda file, image: _special(file, b"4")),
    "inner-directory": ([_IMAGE], lambda file, image: _special(file + "/", b"5")),
    "inner-archive-with-two-members": (
        [_IMAGE],
        lambda file, image: [*_entry(file, image), *plain_tar("../../etc/passwd", [b"x"], 1)],
    ),
    "inner-archive-ends-early": ([_IMAGE], lambda file, image: _entry(file, image)[:-1]),
    "inner-archive-without-its-end": ([_IMAGE], lambda file, image: _entry(file, image)),
    "inner-archive-with-data-after-its-end": (
        [_IMAGE],
        lambda file, image: [*_entry(file, image), bytes(10240), b"x" * 512],
    ),
    "inner-archive-is-noise": ([_IMAGE], lambda file, image: [sample_image(8192, 1, 5).extents[0][1]]),
    "inner-archive-is-empty": ([_IMAGE], lambda file, image: []),
    "inner-header-with-a-wrong-checksum": (
        [_IMAGE],
        lambda file, image: [b"V" + _entry(file, image)[0][1:], *_entry(file, image)[1:]],
    ),
    "inner-pax-header-of-a-gibibyte": (
        [_IMAGE],
        lambda file, image: [
            tar_header("x", GIB, b"x", flavour="posix"),
            b"1073741824 comment=".ljust(1 << 20),
        ],
    ),
}
for _name, (_errors, _make) in _INNER.items():
    INNER_DAMAGES.add(_errors[0], "qube", *_errors[1:], name=_name)(_victim_archive(_make))


@INNER_DAMAGES.add(errors.ImageTooLarge, "qube")
def volume_bomb(writer: BackupWriter) -> Iterator[RawMember]:
    file = victim_file(writer)
    stream = zero_bomb(writer.compression, tar_header(file, 8 * GIB), 8 * GIB)
    return with_stream(writer, file, stream)


@INNER_DAMAGES.add(errors.BadImage, "qube")
def zeros_without_end_after_the_image(writer: BackupWriter) -> Iterator[RawMember]:
    file = victim_file(writer)
    honest = b"".join(dict(writer.files())[file])
    return with_stream(writer, file, zero_bomb(writer.compression, honest, 8 * GIB))


@INNER_DAMAGES.add(errors.BadMetadata, "qube", errors.BadImage, errors.BadCompression)
def firewall_bomb(writer: BackupWriter) -> Iterator[RawMember]:
    file = f"{victim_file(writer).rpartition('/')[0]}/firewall.xml"
    return with_stream(writer, file, zero_bomb(writer.compression, tar_header(file, 8 * GIB), 8 * GIB))


def _special(file: str, type_flag: bytes) -> list[bytes]:
    return [tar_header(file, 0, type_flag, link_target="/etc/shadow"), bytes(10240 - 512)]


def _entry(file: str, image: ImagePlan) -> list[bytes]:
    """A plain file in an inner archive that has no end: its header and its data."""
    return [tar_header(file, image.size), *[bytes(1 << 16)] * (image.size >> 16)]
