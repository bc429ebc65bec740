"""What a restore dialog says: errors with what to do about them here, and what came of each qube.

Strategy: pure functions to plain text. Dialogs and logs of Qt take a text for HTML if it looks like it, and
some of our texts quote the backup; so nothing here can look like it. Advice that names an option of the
commands is put in the dialog's terms.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from qubes_restore_svc.cli.tables import size_text
from qubes_restore_svc.errors import Cancelled, ExitStatus, RestoreError
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.report import QubeReport, Report

_CONFIG = "/etc/qubes-restore-svc/config.yaml"
#: Instead of an advice that names options of a command line, which a dialog does not have.
_ADVICE = {
    "missing-dependency": "Restore or install it first, or tick “Ignore missing templates and net qubes”.",
    "qube-exists": "Rename or remove the one that is here, or leave this one out.",
    "username-mismatch": "Leave dom0 out, or tick “Ignore dom0 username mismatch”.",
    "budget-too-small": f"Give the worker more memory: worker.memory in {_CONFIG} in dom0.",
    "image-too-large": (
        "If you trust this backup, restore it in a terminal with"
        " “qvm-backup-restore --mgmt-vm --ignore-size-limit”."
    ),
    "excessive-cost": (
        "The file is damaged or was made to attack. If you know that a computer as fast as that wrote it,"
        " restore it in a terminal with “qvm-backup-restore --mgmt-vm --ignore-cost-limit”."
    ),
    "unknown-filter": (
        "If you know how it was compressed, restore it in a terminal with"
        " “qvm-backup-restore --mgmt-vm --compression-filter”."
    ),
    "bad-compression": "The backup is damaged here; look for another copy.",
}
#: Classes of qubes that have software of their own, as old as the backup.
_TO_BE_UPDATED = ("TemplateVM", "StandaloneVM")
#: An option of a command, long or short.
_OPTION = re.compile(r"(?<![\w-])--?[A-Za-z]")
_OTHER_ADVICE = "“qvm-backup-restore --mgmt-vm --help” in a terminal tells of options that may help."


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one qube. `name` is the name that it has here; `reason` and `advice` may be empty."""

    name: str
    succeeded: bool
    word: str  #: `restored`, `verified`, `not restored`, …
    reason: str = ""
    advice: str = ""
    cancelled: bool = False  #: nothing is wrong with it, it was just not its turn any more

    @property
    def explanation(self) -> str:
        """Reason and advice, as sentences."""
        return " ".join(part for part in (sentence(self.reason), self.advice) if part)


def translate(context: str, text: str) -> str:
    """`text` in the person's language, where Qt is loaded and has a translation; it has lupdate's name."""
    qt = sys.modules.get("PyQt6.QtCore")
    return text if qt is None else str(qt.QCoreApplication.translate(context, text))


def plain(text: str) -> str:
    """`text`, such that no reader takes it for HTML."""
    return text.replace("<", "‹").replace(">", "›")


def sentence(clause: str) -> str:
    """A clause as a sentence of its own; "" stays."""
    if not clause:
        return ""
    return f"{clause[:1].upper()}{clause[1:]}" + ("" if clause.endswith((".", "!", "?", "…")) else ".")


def error_text(error: RestoreError) -> str:
    """What is wrong and what to do, for a message box."""
    where = f"{error.place}: " if error.place else ""
    reason = f"{where}{error.reason}" if where else sentence(error.reason).removesuffix(".")
    return plain(" ".join(part for part in (f"{reason}.", advice(error.kind, error.advice)) if part))


def advice(kind: str, text: str) -> str:
    """An advice in terms of a dialog."""
    if not _OPTION.search(text):
        return text
    return _ADVICE.get(kind, _OTHER_ADVICE)


def qube_text(planned: c.PlanQube) -> str:
    """What a qube of the backup is: class, label, size, and what it needs."""
    lines = [
        f"{planned.klass}, {planned.label}",
        translate("Restore", "Size in the backup: {size}").format(size=size_text(planned.backup_size)),
    ]
    if planned.template is not None:
        lines.append(translate("Restore", "Template: {name}").format(name=planned.template))
    if planned.netvm and planned.klass != "AdminVM":
        lines.append(translate("Restore", "Network: {name}").format(name=planned.netvm))
    return plain("\n".join(lines))


def problem_text(planned: c.PlanQube) -> str:
    """Why a qube of the plan is not taken, and what to do."""
    if planned.error is None:
        return plain(sentence(planned.remark or planned.problem or "it cannot be restored"))
    kind = planned.error.kind if planned.problem != "username-mismatch" else planned.problem
    reason = sentence(planned.error.reason)
    return plain(f"{reason} {advice(kind, planned.error.advice)}".rstrip())


def is_cancelled(report: Report) -> bool:
    """Did the person end it?"""
    return report.status == ExitStatus.CANCELLED or (
        report.error is not None and report.error.kind == Cancelled.kind
    )


def outcome(result: QubeReport, mode: str = "restore") -> Outcome:
    """What came of a qube; `mode` is `verify` or `restore`."""
    name = plain(result.name)
    if result.name_in_backup is not None and result.name_in_backup != result.name and result.succeeded:
        name = plain(f"{result.name} (was {result.name_in_backup})")
    if result.succeeded:
        return Outcome(name, True, result.outcome, plain("; ".join(result.warnings)))
    word = result.outcome if result.outcome in ("left out", "incomplete") else _undone(mode)
    error = result.error or next((volume.error for volume in result.volumes if volume.error), None)
    if error is None:
        return Outcome(name, False, word, plain(result.remark))
    cancelled = error.kind == Cancelled.kind
    told = "" if cancelled else advice(error.kind, error.advice)
    return Outcome(name, False, word, plain(_reason(result, error)), plain(told), cancelled)


def outcomes(report: Report) -> list[Outcome]:
    """What came of each qube that was wanted, in the report's order."""
    return [outcome(result, report.mode) for result in report.qubes if result.outcome != "left out"]


def report_text(report: Report) -> str:
    """Which qubes were restored and which not and why, for a message box or a log."""
    found = outcomes(report)
    done = [one.name for one in found if one.succeeded]
    failed = [one for one in found if not one.succeeded]
    verb = "verified" if report.mode == "verify" else "restored"
    head = "Cancelled." if is_cancelled(report) else f"{len(done)} of {len(found)} qubes {verb}."
    lines = [head]
    if report.error is not None and not is_cancelled(report):
        lines.append(error_text(report.error.to_error()))
    lines.append(f"{sentence(verb)[:-1]}: {', '.join(done) if done else 'none'}.")
    lines += [f"{sentence(one.word)[:-1]}: {one.name}. {one.explanation}".rstrip() for one in failed]
    return "\n".join(lines)


def headline(mode: str, found: Iterable[Outcome]) -> str:
    """One line that sums it up."""
    all_of_them = list(found)
    done, total = sum(one.succeeded for one in all_of_them), len(all_of_them)
    verb = "verified" if mode == "verify" else "restored"
    qubes = "qube" if total == 1 else "qubes"
    if total == 0:
        return f"Nothing was {verb}"
    if done == total:
        return {1: f"The qube was {verb}", 2: f"Both qubes were {verb}"}.get(
            total, f"All {total} qubes were {verb}"
        )
    return f"{done} of {total} {qubes} {verb}" if done else f"No qube was {verb}"


def what_next(report: Report) -> str:
    """What there is to say or to do when everything went well; may be empty."""
    if report.mode == "verify":
        return "All that was selected is in the backup, unchanged. Nothing was restored."
    if any(qube.succeeded and qube.klass in _TO_BE_UPDATED for qube in report.qubes):
        return "Install updates in restored templates and standalone qubes before you use them."
    return ""


def _undone(mode: str) -> str:
    return "failed" if mode == "verify" else "not restored"


def _reason(result: QubeReport, error: ErrorInfo) -> str:
    volume = error.volume or next((volume.name for volume in result.volumes if volume.error == error), None)
    if volume is None:
        return error.reason
    chunk = "" if error.chunk is None else f", chunk {error.chunk}"
    return f"{volume_text(volume)}{chunk}: {error.reason}"


def volume_text(volume: str) -> str:
    """A volume, as a person calls it."""
    return "home directory" if volume == "home" else f"{volume} volume"
