"""The qubes that a backup may lie in, and the file selection, which here selects nothing."""

import typing

if typing.TYPE_CHECKING:
    from qubesmanager.restore import RestoreVMsWindow


def fill_appvms_list(dialog: "RestoreVMsWindow") -> None:
    """Running qubes, standalone ones and the GUI domain among them, but no templates."""
    dialog.appvm_combobox.addItem("dom0")
    for vm in dialog.qubes_app.domains:
        if vm.klass not in ("TemplateVM", "AdminVM") and vm.is_running():
            dialog.appvm_combobox.addItem(vm.name)


def select_path_button_clicked(
    dialog: "RestoreVMsWindow", select_file: bool = False, read_only: bool = False
) -> None:
    """The original shows it, and does not come back before it is closed."""
    raise AssertionError("a test says what is selected")
