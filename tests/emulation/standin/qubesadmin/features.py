"""A qube's features: names with a value, a string. True is "1", False is the empty string."""

import typing
from collections.abc import Iterator
from typing import TypeVar

if typing.TYPE_CHECKING:
    from qubesadmin.vm import QubesVM

T = TypeVar("T")


class Features:
    """Like a mapping, but every operation is a call; an absent feature is a `KeyError`."""

    def __init__(self, vm: "QubesVM") -> None:
        self.vm = vm

    def __setitem__(self, key: str, value: object) -> None:
        text = ("1" if value else "") if isinstance(value, bool) else str(value)
        self.vm.qubesd_call(self.vm.name, "admin.vm.feature.Set", key, text.encode())

    def __delitem__(self, key: str) -> None:
        self.vm.qubesd_call(self.vm.name, "admin.vm.feature.Remove", key)

    def __getitem__(self, item: str) -> str:
        return self.vm.qubesd_call(self.vm.name, "admin.vm.feature.Get", item).decode()

    def __iter__(self) -> Iterator[str]:
        return iter(self.vm.qubesd_call(self.vm.name, "admin.vm.feature.List").decode().splitlines())

    keys = __iter__

    def items(self) -> Iterator[tuple[str, str]]:
        for key in self:
            yield key, self[key]

    NO_DEFAULT = object()

    @typing.overload
    def get(self, item: str) -> str | None: ...
    @typing.overload
    def get(self, item: str, default: T) -> str | T: ...
    def get(self, item: str, default: object = None) -> object:
        try:
            return self[item]
        except KeyError:
            if default is self.NO_DEFAULT:
                raise
            return default

    @typing.overload
    def check_with_template(self, feature: str) -> str | None: ...
    @typing.overload
    def check_with_template(self, feature: str, default: T) -> str | T: ...
    def check_with_template(self, feature: str, default: object = None) -> object:
        """The qube's own feature, or that of its template, or of the template's template."""
        try:
            answer = self.vm.qubesd_call(self.vm.name, "admin.vm.feature.CheckWithTemplate", feature)
        except KeyError:
            if default is self.NO_DEFAULT:
                raise
            return default
        return answer.decode()
