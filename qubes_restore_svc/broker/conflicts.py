"""Names that are taken, and what a qube is called instead.

Strategy: names are compared exactly, as qubesd does: a system can hold `Work` beside `work`, and a backup of
it must come back as it was. Where a file system folds case, it says so itself when the second of two such
names is begun. What is made up here keeps further away: a name of our own choice is never one that differs
from another in case only.

The numbering is that of the stock command: `work` becomes `work-1`, and so on to `work-99`; a name of more
than 29 characters is cut first. (Where the stock command then makes names of 32 characters, with a number of
two digits, we cut one more.)
"""

from collections.abc import Iterable, Iterator

from qubes_restore_svc.broker.host import HostView
from qubes_restore_svc.wire.messages import ListedQube
from qubes_restore_svc.wire.names import is_qube_name

MAX_NUMBERED = 99  #: the last number that is tried

_MAX_NAME = 31  #: characters of a qube's name
_MAX_UNNUMBERED = 29  #: of it without a number

#: In lower case. qubesd would take some of them.
_DOM0_NAMES = frozenset({"dom0", "domain-0"})


class NamesInUse:
    """The names of the host, of the backup, and those given out so far."""

    def __init__(self, view: HostView, in_backup: Iterable[str]) -> None:
        self._is_system = view.qubes_system is not None
        self._on_host = view.names
        self._unavailable = {name.casefold() for name in (*view.names, *in_backup)} | _DOM0_NAMES

    def has(self, qube: ListedQube) -> bool:
        """Is there a qube of this name on the host, or could a person take it for dom0 there?"""
        looks_like_dom0 = qube.klass != "AdminVM" and qube.name.casefold() in _DOM0_NAMES
        return (self._is_system and looks_like_dom0) or qube.name in self._on_host

    def give(self, name: str) -> str | None:
        """A free name for a qube that cannot be called `name`; None if all that it could have are taken.

        It is a valid name, and neither on the host, nor in the backup, nor given out before.
        """
        for candidate in _candidates(name):
            if candidate.casefold() not in self._unavailable and is_qube_name(candidate):
                self._unavailable.add(candidate.casefold())
                return candidate
        return None


def _candidates(name: str) -> Iterator[str]:
    if len(name) > _MAX_UNNUMBERED:
        yield name[:_MAX_UNNUMBERED]
    for number in range(1, MAX_NUMBERED + 1):
        suffix = f"-{number}"
        yield name[: _MAX_NAME - len(suffix)] + suffix
