"""The inner archives: one file of a qube each, a volume's image in any of three forms.

Strategy: a form is one function that believes its arguments, so that a sparse map can lie;
`inner_tar` gives it the arguments that are right for an image. All of them stream.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .plans import DOM0_HOME, ImagePlan
from .tar_blocks import BLOCK, RECORD, padded, pax_records, tar_header, tar_number

WRITER_PID = 13945  # stands in the member's name of a pax sparse archive


def inner_tar(name: str, image: ImagePlan, style: str) -> Iterator[bytes]:
    """The inner archive of a volume, in pieces: `style` is `gnu`, `pax` or `none`.

    Like GNU tar, `gnu` writes an image without holes as a plain file.
    """
    image = _block_aligned(image)
    spans = _spans(image)
    pieces = (data for _, data in image.extents)
    if style == "pax":
        return pax_sparse_tar(name, image.size, spans, pieces)
    if style == "gnu" and spans != [(0, image.size)]:
        return gnu_sparse_tar(name, image.size, spans, pieces)
    if style not in ("gnu", "none"):
        raise ValueError(f"no sparse style {style!r}")
    return plain_tar(name, _dense(image), image.size)


def plain_tar(name: str, data: Iterable[bytes], size: int) -> Iterator[bytes]:
    """A GNU tar archive of one regular file."""
    return _archive([tar_header(name, size)], data, RECORD)


def gnu_sparse_tar(
    name: str,
    image_size: int,
    spans: Sequence[tuple[int, int]],
    data: Iterable[bytes],
    *,
    stored_size: int | None = None,
) -> Iterator[bytes]:
    """A GNU tar archive of one file in old GNU sparse format (type `S`), believing its arguments:
    `spans` are (offset, length); `stored_size` is by default the sum of the lengths."""
    if stored_size is None:
        stored_size = sum(length for _, length in spans)
    entries = [tar_number(offset, 12) + tar_number(length, 12) for offset, length in spans]
    patches = {386: b"".join(entries[:4]), 482: bytes([len(entries) > 4]), 483: tar_number(image_size, 12)}
    blocks = [tar_header(name, stored_size, b"S", patches=patches)]
    for start in range(4, len(entries), 21):
        extension = b"".join(entries[start : start + 21]).ljust(504, b"\0")
        blocks.append(padded(extension + bytes([start + 21 < len(entries)]), BLOCK))
    return _archive(blocks, data, RECORD)


def pax_sparse_tar(
    name: str,
    image_size: int,
    spans: Sequence[tuple[int, int]],
    data: Iterable[bytes],
    *,
    stored_size: int | None = None,
    map_text: bytes | None = None,
) -> Iterator[bytes]:
    """An archive of one file in pax sparse format 1.0 as Qubes' tarwriter makes it, believing its
    arguments; `map_text` replaces the map at the beginning of the data."""
    if map_text is None:
        map_text = "".join(f"{number}\n" for number in [len(spans), *itertools.chain(*spans)]).encode()
    sparse_map = padded(map_text, BLOCK)
    if stored_size is None:
        stored_size = len(sparse_map) + sum(length for _, length in spans)
    records = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(image_size),
    }
    if stored_size >= 8**11:
        records["size"] = str(stored_size)
    extended = pax_records(records)
    folder, _, file = name.rpartition("/")
    head = [
        tar_header("././@PaxHeader", len(extended), b"x", flavour="posix", owner=False, mode=0, mtime=0),
        padded(extended, BLOCK),
        tar_header(
            f"{folder}/GNUSparseFile.{WRITER_PID}/{file}",
            0 if "size" in records else stored_size,
            flavour="posix",
            owner=False,
            mtime=0,
        ),
        sparse_map,
    ]
    return _archive(head, data, BLOCK)


def home_tar() -> Iterator[bytes]:
    """The archive of dom0's home: a directory, a file, a symbolic link."""
    text = b"# dom0\n"
    head = [
        tar_header(f"{DOM0_HOME}/", 0, b"5", mode=0o755),
        tar_header(f"{DOM0_HOME}/.bashrc", len(text)),
        padded(text, BLOCK),
        tar_header(f"{DOM0_HOME}/link", 0, b"2", link_target="/etc/passwd"),
    ]
    return _archive(head, [], RECORD)


def directory_tar(directory: str, images: Mapping[str, ImagePlan], files: Mapping[str, bytes]) -> bytes:
    """The archive of a template's whole directory, as Qubes R3 made it: images, files, and what nobody
    restores."""
    members = [tar_header(f"{directory}/./", 0, b"5", mode=0o755)]
    for name, image in images.items():
        image, path = _block_aligned(image), f"{directory}/./{name}"
        archive = b"".join(inner_tar(path, image, "gnu"))
        # The archive of one member ends at the last block of its data.
        if _spans(image) == [(0, image.size)]:
            used = BLOCK + image.size
        else:
            extensions = -(-max(0, len(_spans(image)) - 4) // 21)
            used = BLOCK * (1 + extensions) + sum(len(data) for _, data in image.extents)
        members.append(padded(archive[:used], BLOCK))
    for name, content in files.items():
        members += [tar_header(f"{directory}/./{name}", len(content)), padded(content, BLOCK)]
    members += [
        tar_header(f"{directory}/./apps.templates/", 0, b"5", mode=0o755),
        tar_header(f"{directory}/./icon.png", 0, b"2", link_target="/usr/share/icons/template.png"),
    ]
    return b"".join(_archive(members, [], RECORD))


def _spans(image: ImagePlan) -> list[tuple[int, int]]:
    """(offset, length) of every run of data as GNU tar and Qubes' writer list them: the last one
    reaches the end of the image, with no bytes in it where the image ends in a hole."""
    spans: list[tuple[int, int]] = []
    for offset, data in image.extents:
        if spans and sum(spans[-1]) == offset:
            spans[-1] = (spans[-1][0], spans[-1][1] + len(data))
        else:
            spans.append((offset, len(data)))
    if not spans or sum(spans[-1]) != image.size:
        spans.append((image.size, 0))
    return spans


def _block_aligned(image: ImagePlan) -> ImagePlan:
    """The same image with extents of whole blocks, as programs that look at a file block by block
    find them. Only an image given with odd extents, as small tests do, is built anew."""

    def is_aligned(offset: int, data: bytes) -> bool:
        end = offset + len(data)
        return offset % BLOCK == 0 and data != b"" and (end % BLOCK == 0 or end == image.size)

    if all(is_aligned(offset, data) for offset, data in image.extents):
        return image
    blocks: dict[int, bytearray] = {}
    for offset, data in image.extents:
        for position, byte in enumerate(data, offset):
            blocks.setdefault(position // BLOCK, bytearray(BLOCK))[position % BLOCK] = byte
    extents = [(number * BLOCK, bytes(block)) for number, block in sorted(blocks.items())]
    return ImagePlan(image.size, [(offset, data[: image.size - offset]) for offset, data in extents])


def _dense(image: ImagePlan) -> Iterator[bytes]:
    position = 0
    for offset, data in itertools.chain(image.extents, [(image.size, b"")]):
        for start in range(position, offset, 1 << 20):
            yield bytes(min(1 << 20, offset - start))
        yield data
        position = offset + len(data)


def _archive(head: Iterable[bytes], data: Iterable[bytes], multiple: int) -> Iterator[bytes]:
    written = 0
    for piece in head:
        written += len(piece)
        yield piece
    for piece in data:
        written += len(piece)
        yield piece
    end = -written % BLOCK + 2 * BLOCK
    yield bytes(end + -(written + end) % multiple)
