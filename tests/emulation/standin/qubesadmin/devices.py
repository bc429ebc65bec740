"""The devices of a qube, by class."""

import typing
from collections.abc import Iterator

import qubesadmin.exc
from qubesadmin.device_protocol import DeviceAssignment, VirtualDevice

if typing.TYPE_CHECKING:
    from qubesadmin.vm import QubesVM

_CAN_BE_REQUIRED = ("pci", "testclass", "block")
_CAN_BE_AUTOMATIC = ("testclass", "usb", "block", "mic", "pci")


class DeviceCollection:
    """The devices of one class."""

    def __init__(self, vm: "QubesVM", class_: str) -> None:
        self._vm = vm
        self._class = class_

    def assign(self, assignment: DeviceAssignment) -> None:
        """Give the qube a device, for all its future starts."""
        if assignment.required and assignment.devclass not in _CAN_BE_REQUIRED:
            raise qubesadmin.exc.QubesValueError("Only pci and block devices can be assigned as required.")
        if assignment.devclass == "pci" and not assignment.required:
            raise qubesadmin.exc.QubesValueError("PCI devices cannot be assigned as not required.")
        if assignment.attach_automatically and assignment.devclass not in _CAN_BE_AUTOMATIC:
            raise qubesadmin.exc.QubesValueError(
                f"{assignment.devclass} devices cannot be assigned to be automatically attached."
            )
        assignment.frontend_domain = assignment.frontend_domain or self._vm
        self._check(assignment, "assign")
        self._vm.qubesd_call(
            None,
            f"admin.vm.device.{self._class}.Assign",
            assignment.repr_for_qarg,
            assignment.serialize(),
        )

    def unassign(self, assignment: DeviceAssignment) -> None:
        """Take it back."""
        self._check(assignment, "unassign")
        method = f"admin.vm.device.{self._class}.Unassign"
        self._vm.qubesd_call(None, method, assignment.repr_for_qarg)

    def get_assigned_devices(self, required_only: bool = False) -> Iterator[DeviceAssignment]:
        answer = self._vm.qubesd_call(None, f"admin.vm.device.{self._class}.Assigned").decode()
        for line in answer.splitlines():
            head, _, rest = line.partition(" ")
            device = VirtualDevice.from_qarg(head, self._class, self._vm.app.domains, blind=True)
            assignment = DeviceAssignment.deserialize(rest.encode("ascii"), expected_device=device)
            if assignment.required or not required_only:
                yield assignment

    def _check(self, assignment: DeviceAssignment, action: str) -> None:
        if assignment.frontend_domain and assignment.frontend_domain != self._vm:
            raise qubesadmin.exc.QubesValueError(
                f"Trying to {action} device belonging to other domain: {assignment.frontend_domain}"
            )
        if assignment.devclass != self._class:
            raise qubesadmin.exc.QubesValueError(
                f"Device class does not match to expected: {assignment.devclass} != {self._class}"
            )


class DeviceManager:
    """All of them; iterates over the classes that there are."""

    def __init__(self, vm: "QubesVM") -> None:
        self._vm = vm
        self._collections: dict[str, DeviceCollection] = {}

    def __getitem__(self, key: str) -> DeviceCollection:
        return self._collections.setdefault(key, DeviceCollection(self._vm, key))

    def __iter__(self) -> Iterator[str]:
        return iter(self._vm.app.list_deviceclass())

    def keys(self) -> list[str]:
        return self._vm.app.list_deviceclass()
