"""How the stand-in for qubesd says no.

The Admin API sends the name of an exception and a text. An exception that the original's handler did not mean
to raise is not sent: the connection ends with an empty answer, and the client is left to guess.
"""


class AdminError(Exception):
    """Sent to the client as an exception of the name `kind`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __repr__(self) -> str:
        return f"{self.kind}: {self}"


class StumbleError(Exception):
    """What the original keeps to itself, a refusal or a mistake of its own: the answer is empty."""


def not_found(name: str) -> AdminError:
    return AdminError("QubesVMNotFoundError", f"No such domain: {name!r}")


def not_halted(name: str) -> AdminError:
    return AdminError("QubesVMNotHaltedError", f"Domain is not powered off: {name!r}")


def not_started(name: str) -> AdminError:
    return AdminError("QubesVMNotStartedError", f"Domain is powered off: {name!r}")


def bad_value(message: str) -> AdminError:
    """Refused while the value is read."""
    return AdminError("QubesValueError", message)


def bad_property(message: str) -> AdminError:
    """Refused by the property."""
    return AdminError("QubesPropertyValueError", message)


def protocol(message: str) -> StumbleError:
    """The request itself is malformed, which the original only writes into its journal."""
    return StumbleError(message)


def denied(message: str) -> StumbleError:
    """Nobody may do that, which the original only writes into its journal."""
    return StumbleError(message)


def storage(message: str) -> AdminError:
    return AdminError("StoragePoolException", message)
