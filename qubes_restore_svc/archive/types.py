"""What every reader of the archive shares: the type of a buffer, and how foreign text is shown.

Strategy: text from the archive reaches a message only through `shown`, which lets printable ASCII
pass and nothing else, and cuts it; so no error can carry a terminal sequence or a page of garbage.
"""

from typing import TypeAlias

#: Contiguous bytes, whoever owns them.
Buffer: TypeAlias = bytes | bytearray | memoryview

#: How much of a foreign text a message repeats, in bytes.
SHOWN_LIMIT = 80


def shown(untrusted_text: Buffer | str) -> str:
    """The text in single quotes, fit for a message: other than printable ASCII escaped, the end cut off."""
    if isinstance(untrusted_text, str):
        untrusted_bytes = untrusted_text[: SHOWN_LIMIT + 1].encode("utf-8", "backslashreplace")
    else:
        untrusted_bytes = bytes(untrusted_text[: SHOWN_LIMIT + 1])
    text = "".join(_shown_byte(byte) for byte in untrusted_bytes[:SHOWN_LIMIT])
    return f"'{text}…'" if len(untrusted_bytes) > SHOWN_LIMIT else f"'{text}'"


def _shown_byte(byte: int) -> str:
    if byte in (0x27, 0x5C):
        return "\\" + chr(byte)
    return chr(byte) if 0x20 <= byte <= 0x7E else f"\\x{byte:02x}"
