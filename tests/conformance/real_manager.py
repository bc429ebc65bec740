"""Qubes Manager's own dialog, from the public sources, on the real `qubesadmin`: a plugin for pytest.

Strategy: `build` makes a package `qubesmanager` of the sources, as their build does: a module from each .ui
file. What the dialog imports and never uses is an empty module. As a plugin (`-p`) this lets the real
`qubesadmin` find the tests' stand-in for qubesd.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

#: Modules of others that some window of Qubes Manager needs, and what is asked for when they are imported.
_UNUSED = {
    "qasync": "",
    "qubesimgconverter": "",
    "xdg/__init__": "",
    "xdg/BaseDirectory": "xdg_cache_home = xdg_config_home = '/nonexistent'",
    "qubesmanager/resources": "",
}


def build(manager: Path, client: Path, directory: Path) -> tuple[Path, ...]:
    """Make the package in `directory`; brings what belongs on `sys.path`."""
    package = directory / "qubesmanager"
    package.mkdir(parents=True)
    for source in (manager / "qubesmanager").glob("*.py"):
        (package / source.name).symlink_to(source)
    for ui in (manager / "ui").glob("*.ui"):
        target = package / f"ui_{ui.stem}.py"
        subprocess.run([sys.executable, "-m", "PyQt6.uic.pyuic", "-o", target, ui], check=True)
    for name, text in _UNUSED.items():
        module = directory / f"{name}.py"
        module.parent.mkdir(exist_ok=True)
        module.write_text(f"{text}\n")
    return directory, client


def pytest_configure() -> None:
    """The emulation names its directory in the environment, and may do so at any time."""
    import qubesadmin.app
    import qubesadmin.config

    real: Any = qubesadmin
    real.config.VARIABLE = "QUBES_EMULATION"

    class Qubes(qubesadmin.app.QubesLocal):
        def qubesd_call(self, *arguments: Any, **keywords: Any) -> Any:
            real.config.QUBESD_SOCKET = os.path.join(os.environ["QUBES_EMULATION"], "qubesd.sock")
            return super().qubesd_call(*arguments, **keywords)

    real.Qubes = Qubes
