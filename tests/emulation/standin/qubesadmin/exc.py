"""The original's exceptions: what an error of qubesd is called on the client's side.

`ProtocolError` and `PermissionDenied` are no `QubesException`s, in the original neither.
"""


class QubesException(Exception):
    """What can be shown to the person. The message is a format for the arguments that follow it."""

    def __init__(self, message_format: str, *args: str) -> None:
        super().__init__(message_format % tuple(int(arg) if arg.isdigit() else arg for arg in args))


class _Missing(QubesException, KeyError):
    """A `KeyError` that does not put its message in quotes."""

    def __str__(self) -> str:
        return QubesException.__str__(self)


class QubesVMNotFoundError(_Missing):
    pass


class QubesVMInvalidUUIDError(QubesException):
    pass


class QubesVMError(QubesException):
    pass


class QubesVMInUseError(QubesVMError):
    pass


class QubesVMNotStartedError(QubesVMError):
    pass


class QubesVMNotRunningError(QubesVMNotStartedError):
    pass


class QubesVMNotPausedError(QubesVMNotStartedError):
    pass


class QubesVMNotSuspendedError(QubesVMError):
    pass


class QubesVMNotHaltedError(QubesVMError):
    pass


class QubesVMShutdownTimeoutError(QubesVMError):
    pass


class QubesNoTemplateError(QubesVMError):
    pass


class QubesPoolInUseError(QubesException):
    pass


class QubesValueError(QubesException, ValueError):
    pass


class QubesPropertyValueError(QubesValueError):
    pass


class QubesNoSuchPropertyError(QubesException, AttributeError):
    pass


class QubesNotImplementedError(QubesException, NotImplementedError):
    pass


class BackupCancelledError(QubesException):
    pass


class BackupAlreadyRunningError(QubesException):
    pass


class QubesMemoryError(QubesVMError, MemoryError):
    pass


class QubesFeatureNotFoundError(_Missing):
    pass


class QubesTagNotFoundError(_Missing):
    pass


class QubesLabelNotFoundError(_Missing):
    pass


class ProtocolError(AssertionError):
    """The request is not one that qubesd understands."""


class PermissionDenied(Exception):
    """The request is not one that qubesd lets anybody make."""


class DeviceNotAssigned(QubesException, KeyError):
    pass


class DeviceAlreadyAttached(QubesException, KeyError):
    pass


class DeviceAlreadyAssigned(QubesException, KeyError):
    pass


class UnrecognizedDevice(QubesException, ValueError):
    pass


class UnexpectedDeviceProperty(QubesException, ValueError):
    pass


class StoragePoolException(QubesException):
    pass


class QubesDaemonCommunicationError(QubesException):
    """qubesd could not be reached, or did not answer as it should."""


class BackupRestoreError(QubesException):
    def __init__(self, msg: str, backup_log: bytes | None = None) -> None:
        super().__init__(msg)
        self.backup_log = backup_log


class QubesDaemonAccessError(QubesDaemonCommunicationError):
    """An empty answer: qubesd forbids it, or stumbled over it."""


class QubesPropertyAccessError(QubesDaemonAccessError, AttributeError):
    """A property could be neither read nor written, and qubesd does not say why."""

    def __init__(self, prop: str) -> None:
        super().__init__(f"Failed to access '{prop}' property")


class QubesNotesError(QubesException):
    pass


QubesDaemonNoResponseError = QubesDaemonAccessError
