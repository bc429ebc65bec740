"""Labels, the colours of qubes."""

import typing

import qubesadmin.exc

if typing.TYPE_CHECKING:
    from qubesadmin.app import QubesBase


class Label:
    """A label by its name."""

    def __init__(self, app: "QubesBase", name: str) -> None:
        self.app = app
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @property
    def color(self) -> str:
        """As `0xcc0000`."""
        return self._get("Get")

    @property
    def index(self) -> int:
        return int(self._get("Index"))

    def _get(self, what: str) -> str:
        try:
            return self.app.qubesd_call("dom0", f"admin.label.{what}", self._name).decode()
        except qubesadmin.exc.QubesDaemonNoResponseError:
            raise qubesadmin.exc.QubesPropertyAccessError(f"label.{what.lower()}") from None

    def __str__(self) -> str:
        return self._name

    def __eq__(self, other: object) -> bool:
        return self.name == other.name if isinstance(other, Label) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.name)
