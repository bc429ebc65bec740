"""Verify the newest backup of Qubes OS on a minion, and tell what was found: a module for Salt.

salt '*' qubes_restore_watch.verify nightly
salt '*' qubes_restore_watch.reports --out=json --out-indent=-1 | qubes-restore-watch collect -
"""

import json
import shutil
from pathlib import Path

_COMMAND = "qubes-restore-watch"
_CONFIGURATION = "/etc/qubes-restore-svc/watch"
_STATE = "/var/lib/qubes-restore-svc/watch"

__virtualname__ = "qubes_restore_watch"


def __virtual__():
    if shutil.which(_COMMAND) is None:
        return False, f"{_COMMAND} is not installed"
    return __virtualname__


def verify(place, configuration=_CONFIGURATION, state=_STATE):
    """Verify the newest backup in a place; the report. Takes as long as reading the backup."""
    words = [_COMMAND, "verify", place, "--configuration", configuration, "--state", state]
    ended = __salt__["cmd.run_all"](words, python_shell=False)
    __context__["retcode"] = ended["retcode"]
    if ended["retcode"] not in (0, 1):  # then the report may be that of an earlier check
        return {"error": ended["stderr"]}
    return _report(Path(state, f"{place}.json"))


def reports(configuration=_CONFIGURATION, state=_STATE):
    """The reports of the last checks, by the name of the place; None for settings without one."""
    found = {path.stem: None for path in Path(configuration).glob("*.toml")}
    for path in sorted(Path(state).glob("*.json")):
        if not path.name.startswith("."):  # it is not complete yet
            found[path.stem] = _report(path)
    return found


def _report(path):
    try:
        report = json.loads(path.read_text())
        report.pop("verification", None)  # which qubes and volumes: it stays on the machine
    except (AttributeError, OSError, ValueError) as error:
        return {"error": str(error)}
    return report
