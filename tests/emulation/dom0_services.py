"""What a test puts into dom0 for qubes to call: programs, the Admin API, and the rules that let them call.

Strategy: plain files in the places where dom0's qrexec looks, so that nothing here knows of a call. The Admin
API is a socket service as on a real system: each method is a symlink to qubesd's socket, which is sent the
descriptor of the call and what the caller writes.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from .daemon.calls import METHODS
from .policy import Policy
from .policy_files import Action

#: The file of the project's policy that grants its services, below the policy's folder.
GRANTS = Path("include", "qubes-restore-svc")
#: Where an action sends the call, if the rule does not say.
_TO_DOM0: Mapping[Action, str] = {"allow": "target=dom0", "ask": "default_target=dom0", "deny": ""}
#: How the names of those methods end that tell something and change nothing.
_READING = (
    ".List", ".Get", ".GetAll", ".GetDefault", ".Info", ".CheckWithTemplate", ".CurrentState", ".Index",
    ".Assigned", ".UsageDetails",
)  # fmt: skip


def install_program(
    path: Path, argv: Sequence[str], environment: Mapping[str, str], *, arguments: bool
) -> None:
    """Make `path` a service that runs `argv` with `environment` beside what qrexec sets.

    The argument of the call, if it has one, follows as the last word if `arguments` is true; it is in the
    environment in any case.
    """
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    command = shlex.join(argv) + (' "$@"' if arguments else "")
    path.unlink(missing_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *exports, f"exec {command}", "")))
    path.chmod(0o755)


def add_grant(policy: Path, service: str, source: str, action: Action, extra: str) -> None:
    """Append a rule for calls of dom0 to the file that grants; raises PolicyError for what is no rule.

    `extra` are further parameters; the target is dom0 unless they name another.
    """
    parameters = extra.split()
    if not any(word.startswith(("target=", "default_target=")) for word in parameters):
        parameters.insert(0, _TO_DOM0[action])
    with (policy / GRANTS).open("a") as file:
        file.write(" ".join(("\n" + service, "*", source, "@adminvm", action, *parameters)) + "\n")
    Policy.load(policy)


def install_admin_api(services: Path, qubesd_socket: Path) -> None:
    """Let qubes call the Admin API, as far as the policy lets them."""
    for method in METHODS:
        link = services / method
        if method.startswith("admin.") and not link.is_symlink():
            link.symlink_to(qubesd_socket)


def gui_domain_policy(name: str) -> str:
    """The rules of a GUI domain that may look at everything and change nothing."""
    methods = (method for method in METHODS if method.startswith("admin.") and method.endswith(_READING))
    return "".join(
        f"{method} * {name} {target} allow target=dom0\n"
        for method in sorted(methods)
        for target in ("@adminvm", "@anyvm")
    )
