"""What every reader of the archive shares: the type of a buffer, and how foreign text is shown.

Strategy: text from the archive reaches a message only through `shown`, which lets printable ASCII
pass and nothing else, and cuts it; so no error can carry a terminal sequence or a page of garbage.
"""

from typing import TypeAlias

#: Contiguous bytes, whoever owns them.
Buffer: TypeAlias = bytes | bytearray | memoryview

#: How much of a foreign text a message repeats, in bytes.
SHOWN_LIMIT = 80

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB")


def shown(untrusted_text: Buffer | str) -> str:
    """The text in single quotes, fit for a message: other than printable ASCII escaped, the end cut off."""
    if isinstance(untrusted_text, str):
        untrusted_bytes = untrusted_text[: SHOWN_LIMIT + 1].encode("utf-8", "backslashreplace")
    else:
        untrusted_bytes = bytes(untrusted_text[: SHOWN_LIMIT + 1])
    text = "".join(_shown_byte(byte) for byte in untrusted_bytes[:SHOWN_LIMIT])
    return f"'{text}…'" if len(untrusted_bytes) > SHOWN_LIMIT else f"'{text}'"


def human_size(size: int) -> str:
    """`size` bytes in the largest binary unit that leaves at least one: 1536 is `1.5 KiB`. At most three
    digits and a half, except past the last unit."""
    unit = min(max(size.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    if unit == 0:
        return f"{size} bytes"
    value = f"{size / (1 << 10 * unit):,.1f}".removesuffix(".0")
    return f"{value} {_UNITS[unit]}"


def _shown_byte(byte: int) -> str:
    if byte in (0x27, 0x5C):
        return "\\" + chr(byte)
    return chr(byte) if 0x20 <= byte <= 0x7E else f"\\x{byte:02x}"
