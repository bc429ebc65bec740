"""Objects with properties that live in qubesd, and collections of named ones.

A public attribute that is not declared in the class is a property: reading it asks qubesd, assigning sets it,
`del` resets it to its default. Nothing is cached, as the original does not unless told to.
"""

import typing
from collections.abc import Iterator
from typing import IO, Generic, TypeAlias, TypeVar

import qubesadmin.exc

if typing.TYPE_CHECKING:
    from qubesadmin.app import QubesBase
    from qubesadmin.label import Label
    from qubesadmin.vm import QubesVM

#: Assigned to a property: give it its default again.
DEFAULT = object()

VMProperty: TypeAlias = "str | int | bool | QubesVM | Label | None"


class PropertyHolder:
    """Something that has properties: a qube, or the system."""

    app: "QubesBase"

    def __init__(self, app: "QubesBase", method_prefix: str, method_dest: str) -> None:
        self.app = app
        self._method_prefix = method_prefix
        self._method_dest = method_dest

    def qubesd_call(
        self,
        dest: str | None,
        method: str,
        arg: str | None = None,
        payload: bytes | None = None,
        payload_stream: IO[bytes] | None = None,
    ) -> bytes:
        """One call of the Admin API; `dest` None is the object itself. Raises what qubesd answers."""
        return self.app.qubesd_call(dest or self._method_dest, method, arg, payload, payload_stream)

    def property_list(self) -> list[str]:
        """The names of all properties it has."""
        return self._property_call("List", None).decode("ascii").splitlines()

    def property_is_default(self, item: str) -> bool:
        """Whether the property has its default value, which may change with the rest of the system."""
        return self._guarded("Get", item).startswith(b"default=True ")

    def property_get_default(self, item: str) -> VMProperty:
        """The value that the property would have if it were reset."""
        answer = self._guarded("GetDefault", item)
        if not answer:
            raise AttributeError(f"{item} has no default")
        kind, value = answer.split(b" ", 1)
        return self._value(item, kind, value)

    def __getattr__(self, item: str) -> VMProperty:
        if item.startswith("_"):
            raise AttributeError(item)
        _, kind, value = self._guarded("Get", item).split(b" ", 2)
        return self._value(item, kind, value)

    def __setattr__(self, key: str, value: object) -> None:
        if key.startswith("_") or key in self._local_properties():
            super().__setattr__(key, value)
        elif value is DEFAULT:
            self._guarded("Reset", key)
        else:
            self._guarded("Set", key, ("" if value is None else str(value)).encode())

    def __delattr__(self, name: str) -> None:
        if name.startswith("_") or name in self._local_properties():
            super().__delattr__(name)
        else:
            self._guarded("Reset", name)

    @classmethod
    def _local_properties(cls) -> set[str]:
        """Attributes that are Python's own, and must not be looked for in qubesd."""
        return {key for base in cls.__mro__ for key in (*vars(base), *vars(base).get("__annotations__", ()))}

    def _property_call(self, what: str, item: str | None, payload: bytes | None = None) -> bytes:
        return self.qubesd_call(self._method_dest, self._method_prefix + what, item, payload)

    def _guarded(self, what: str, item: str, payload: bytes | None = None) -> bytes:
        """A call whose failure for no known reason is said to be the property's."""
        try:
            return self._property_call(what, item, payload)
        except (qubesadmin.exc.QubesDaemonNoResponseError, qubesadmin.exc.QubesVMNotFoundError):
            raise qubesadmin.exc.QubesPropertyAccessError(item) from None

    def _value(self, item: str, kind: bytes, data: bytes) -> VMProperty:
        value = data.decode()
        match kind:
            case b"type=str":
                return value
            case b"type=bool" | b"type=int" if not value:
                raise AttributeError(item)
            case b"type=bool":
                return value == "True"
            case b"type=int":
                return int(value)
            case b"type=vm":
                return self.app.domains.get_blind(value) if value else None
            case b"type=label":
                return self.app.labels.get_blind(value) if value else None
        raise qubesadmin.exc.QubesDaemonCommunicationError(f"Received invalid value type: {kind!r}")


class _Named(typing.Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=_Named)


class WrapperObjectsCollection(Generic[T]):
    """Labels or pools by name. The names are fetched once, and again after `clear_cache`."""

    def __init__(self, app: "QubesBase", list_method: str, object_class: "type[T]") -> None:
        self.app = app
        self._list_method = list_method
        self._object_class = object_class
        self._names: list[str] | None = None
        self._objects: dict[str, T] = {}

    def clear_cache(self, invalidate_name: str | None = None) -> None:
        self._names = None
        self._objects.pop(invalidate_name or "", None)

    def refresh_cache(self, force: bool = False) -> list[str]:
        if self._names is None or force:
            self._names = self.app.qubesd_call("dom0", self._list_method).decode("ascii").splitlines()
        return self._names

    def get_blind(self, item: str) -> T:
        """The object of that name, whether it is there or not."""
        if item not in self._objects:
            # The classes that are collected here take the application and the name.
            self._objects[item] = self._object_class(self.app, item)  # type: ignore[call-arg]
        return self._objects[item]

    def __getitem__(self, item: str) -> T:
        if item not in self:
            raise KeyError(item)
        return self.get_blind(item)

    def __contains__(self, item: object) -> bool:
        return item in self.refresh_cache()

    def __iter__(self) -> Iterator[str]:
        return iter(self.refresh_cache())

    def keys(self) -> list[str]:
        return list(self.refresh_cache())

    def values(self) -> list[T]:
        return [self.get_blind(name) for name in self.refresh_cache()]

    def items(self) -> list[tuple[str, T]]:
        return [(name, self.get_blind(name)) for name in self.refresh_cache()]
