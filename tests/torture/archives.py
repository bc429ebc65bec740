"""Damaged archives: every bit flipped, every length cut, and games with chunks.

Strategy: a campaign is a sequence of cases. The case at an index is always the same, so a campaign can be cut
into ranges, sampled, and a fault looked at again by its number.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Protocol

from qubes_restore_svc.archive.filters import FILTERS
from tests.support.backup_writer import RawMember
from tests.support.damage_tools import flip_bit
from tests.support.tar_blocks import BLOCK

from .judge import Case
from .sample import Sample, chunky_sample, joined, tight_sample


class Campaign(Protocol):
    """Cases by their number, from 0."""

    def __len__(self) -> int: ...

    def case(self, number: int) -> Case:
        """The case of this number."""
        ...


class Bits:
    """One bit of the archive flipped. It costs the qube whose member it hit, and no other.

    A bit of the filling may cost the qube before it or the one behind it.
    """

    def __init__(self) -> None:
        self._sample = tight_sample()

    def __len__(self) -> int:
        return 8 * len(self._sample.archive)

    def case(self, number: int) -> Case:
        byte = number // 8
        spans = self._sample.spans
        place = next(place for place, span in enumerate(spans) if byte < span.end)
        hit = spans[place : place + 1 + (byte >= spans[place].content_end)]
        owners = {span.owner for span in hit}
        may_lose = self._sample.qubes if None in owners else [owner for owner in owners if owner]
        return Case(
            f"bit {number % 8} of byte {byte}, in {spans[place].member.name}",
            flip_bit(self._sample.archive, number),
            frozenset(may_lose),
            sample=self._sample,
        )


class Cuts:
    """The archive cut at each length. The qube of the last content and all behind it may be lost.

    What the last qube has behind its last image can be missing without a trace, if the cut is between
    members.
    """

    def __init__(self) -> None:
        self._sample = tight_sample()

    def __len__(self) -> int:
        return len(self._sample.archive)

    def case(self, number: int) -> Case:
        names = self._sample.qubes
        begun = [span for span in self._sample.spans if span.content < number]
        owner = begun[-1].owner if begun else None
        may_lack = set()
        if owner == names[-1] and begun[-1].content_end <= number <= begun[-1].end and number % BLOCK == 0:
            may_lack = {owner}
        return Case(
            f"cut at byte {number}" + (f", behind the head of {begun[-1].member.name}" if begun else ""),
            self._sample.archive[:number],
            frozenset(names[names.index(owner) :] if owner else names),
            frozenset(may_lack),
            sample=self._sample,
        )


_Game = Callable[[list[RawMember], int, Sample], list[RawMember]]


def _drop(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    return members[:place] + members[place + 1 :]


def _drop_two(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    return members[:place] + members[place + 2 :]


def _repeat(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    return members[: place + 1] + members[place:]


def _repeat_at_the_end(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    return [*members, members[place]]


def _move_to_the_end(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    return [*_drop(members, place, sample), members[place]]


def _move_forward(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    rest = _drop(members, place, sample)
    first = next(number for number, member in enumerate(rest) if sample.owner(member.name))
    return [*rest[:first], members[place], *rest[first:]]


def _swap_places(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    return [*members[:place], *reversed(members[place : place + 2]), *members[place + 2 :]]


def _swap_contents(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    other = (place + 1) % len(members)
    changed = list(members)
    changed[place] = replace(members[place], data=members[other].data)
    changed[other] = replace(members[other], data=members[place].data)
    return changed


def _take_the_content_of_the_next(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    other = members[(place + 1) % len(members)]
    return _changed(members, place, data=other.data)


def _move_to_another_file(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    other = members[-1].name if members[-1].name != members[place].name else members[3].name
    return _changed(members, place, name=other)


def _give_a_later_number(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    return _changed(
        members, place, name=members[place].name.replace(".000.", ".001.").replace(".002.", ".005.")
    )


def _shorten(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    return _changed(members, place, data=members[place].data[:-1])


def _empty(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    return _changed(members, place, data=b"")


def _lengthen(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    return _changed(members, place, data=members[place].data + b"\0")


def _zero(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    return _changed(members, place, data=bytes(len(members[place].data)))


def _from_an_older_backup(members: list[RawMember], place: int, sample: Sample) -> list[RawMember]:
    older = list(replace(sample.writer, backup_id="20251231T235959-99").members())
    return _changed(members, place, data=older[place].data)


def _changed(
    members: list[RawMember], place: int, *, name: str | None = None, data: bytes | None = None
) -> list[RawMember]:
    member = members[place]
    member = replace(member, name=name or member.name, data=member.data if data is None else data)
    return [*members[:place], member, *members[place + 1 :]]


GAMES: tuple[_Game, ...] = (
    _drop,
    _drop_two,
    _repeat,
    _repeat_at_the_end,
    _move_to_the_end,
    _move_forward,
    _swap_places,
    _swap_contents,
    _take_the_content_of_the_next,
    _move_to_another_file,
    _give_a_later_number,
    _shorten,
    _empty,
    _lengthen,
    _zero,
    _from_an_older_backup,
)


class Games:
    """Members dropped, swapped, repeated and moved, with every filter.

    A game costs the qubes whose members it touched. A settings file that is gone whole leaves no trace,
    because qubes.xml promises images only.
    """

    @cached_property
    def _games(self) -> list[tuple[str, int, _Game]]:
        return [
            (filter_name, place, game)
            for filter_name in FILTERS
            for place in range(len(chunky_sample(filter_name).members))
            for game in GAMES
        ]

    def __len__(self) -> int:
        return len(self._games)

    def case(self, number: int) -> Case:
        filter_name, place, game = self._games[number]
        sample = chunky_sample(filter_name)
        before = list(sample.members)
        after = game(list(before), place, sample)
        touched = {name for name, _ in _contents(before) ^ _contents(after)}
        touched |= {before[place].name, before[(place + 1) % len(before)].name}
        owners = {sample.owner(name) for name in touched}
        names = frozenset(sample.qubes)
        may_lose = names if None in owners else frozenset(owner for owner in owners if owner)
        gone = {member.name for member in before} - {member.name for member in after}
        may_lack = frozenset(owner for name in gone if ".img." not in name and (owner := sample.owner(name)))
        label = f"{game.__name__.strip('_').replace('_', ' ')}: {before[place].name}, {filter_name}"
        return Case(label, joined(after), may_lose, may_lack, sample=sample)


def _contents(members: list[RawMember]) -> set[tuple[str, bytes]]:
    return {(member.name, member.data) for member in members}


CAMPAIGNS: dict[str, Callable[[], Campaign]] = {"bits": Bits, "cuts": Cuts, "games": Games}


def chosen(size: int, first: int, last: int | None, sample: int | None, seed: int) -> list[int]:
    """The numbers of the cases in a range, or `sample` of them, drawn with `seed`."""
    numbers = range(size)[first:last]
    if sample is None or sample >= len(numbers):
        return list(numbers)
    return sorted(random.Random(seed).sample(numbers, sample))
