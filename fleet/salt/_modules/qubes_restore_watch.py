"""Verify the newest backup of Qubes OS on a minion, and tell what was found: a module for Salt.

salt '*' qubes_restore_watch.verify nightly
salt '*' qubes_restore_watch.reports --static --out=json | qubes-restore-watch collect -
"""

import json
import shutil
from pathlib import Path

_COMMAND = "qubes-restore-watch"
_STATE = "/var/lib/qubes-restore-svc/watch"

__virtualname__ = "qubes_restore_watch"


def __virtual__():
    if shutil.which(_COMMAND) is None:
        return False, f"{_COMMAND} is not installed"
    return __virtualname__


def verify(place, configuration="/etc/qubes-restore-svc/watch", state=_STATE):
    """Verify the newest backup in a place; the report. Takes as long as reading the backup."""
    words = [_COMMAND, "verify", place, "--configuration", configuration, "--state", state]
    ended = __salt__["cmd.run_all"](words, python_shell=False)
    __context__["retcode"] = ended["retcode"]
    if ended["retcode"] not in (0, 1, 3):
        return {"error": ended["stderr"]}
    return _report(Path(state, f"{place}.json"))


def reports(state=_STATE):
    """The reports of the last checks, by the name of the place."""
    return {path.stem: _report(path) for path in sorted(Path(state).glob("*.json"))}


def _report(path):
    report = json.loads(path.read_text())
    del report["verification"]  # which qubes and volumes: it stays on the machine
    return report
