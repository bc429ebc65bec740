"""A plain random mutator: what fuzzing is where atheris is not, and what the quick part in `make test` uses.

Strategy: an input is a seed with one to eight edits: bits flipped, bytes changed to interesting ones, pieces
cut out, repeated, moved, or taken from another seed, words of the dictionary put in. Drawn from a seed, so a
finding can be made again.
"""

import random
from collections.abc import Iterator, Sequence

_BYTES = (0, 1, 0x20, 0x2D, 0x2F, 0x7F, 0x80, 0xFF)
_LONGEST = 1 << 16


def inputs(seeds: Sequence[bytes], words: Sequence[bytes], seed: int) -> Iterator[bytes]:
    """The seeds themselves, then mutations of them without end."""
    drawn = random.Random(seed)
    yield from (b"", *seeds)
    while True:
        data = bytearray(drawn.choice(seeds))
        for _ in range(drawn.choice((1, 1, 1, 2, 3, 8))):
            _edit(data, seeds, words, drawn)
        yield bytes(data[:_LONGEST])


def _edit(data: bytearray, seeds: Sequence[bytes], words: Sequence[bytes], drawn: random.Random) -> None:
    begin = drawn.randrange(len(data) + 1)
    end = min(len(data), begin + drawn.choice((1, 1, 2, 4, 8, 64, 512)))
    match drawn.randrange(8):
        case 0 | 1 if begin < len(data):
            data[begin] ^= 1 << drawn.randrange(8)
        case 2 if begin < len(data):
            data[begin] = drawn.choice(_BYTES)
        case 3:
            del data[begin:end]
        case 4:
            data[begin:begin] = data[begin:end] * drawn.choice((1, 1, 2, 20))
        case 5:
            other = drawn.choice(seeds)
            place = drawn.randrange(len(other) + 1)
            data[begin:end] = other[place : place + drawn.choice((1, 8, 64, 512))]
        case 6 if words:
            data[begin : drawn.choice((begin, end))] = drawn.choice(words)
        case 7:
            del data[begin:]
        case _:
            data[begin:begin] = drawn.randbytes(drawn.choice((1, 2, 4, 8)))
