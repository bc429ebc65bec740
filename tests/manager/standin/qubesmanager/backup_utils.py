"""The file selection: here it selects nothing, and counts how often it was asked for."""

import typing

if typing.TYPE_CHECKING:
    from qubesmanager.restore import RestoreVMsWindow

asked: list[tuple[bool, bool]] = []


def select_path_button_clicked(
    dialog: "RestoreVMsWindow", select_file: bool = False, read_only: bool = False
) -> None:
    asked.append((select_file, read_only))
