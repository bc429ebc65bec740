"""A qube's tags: ASCII letters, digits, `_` and `-`."""

import contextlib
import typing
from collections.abc import Iterable, Iterator

if typing.TYPE_CHECKING:
    from qubesadmin.vm import QubesVM


class Tags:
    """Like a set, but every operation is a call; `remove` of an absent tag is a `KeyError`."""

    def __init__(self, vm: "QubesVM") -> None:
        self.vm = vm

    def add(self, elem: str) -> None:
        self.vm.qubesd_call(self.vm.name, "admin.vm.tag.Set", elem)

    def remove(self, elem: str) -> None:
        self.vm.qubesd_call(self.vm.name, "admin.vm.tag.Remove", elem)

    def discard(self, elem: str) -> None:
        with contextlib.suppress(KeyError):
            self.remove(elem)

    def update(self, *others: Iterable[str]) -> None:
        for other in others:
            for elem in other:
                self.add(elem)

    def __iter__(self) -> Iterator[str]:
        return iter(self.vm.qubesd_call(self.vm.name, "admin.vm.tag.List").decode().splitlines())

    def __contains__(self, elem: str) -> bool:
        return self.vm.qubesd_call(self.vm.name, "admin.vm.tag.Get", elem) == b"1"
