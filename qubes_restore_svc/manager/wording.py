"""What a restore dialog says: errors with what to do about them here, and what came of each qube.

Strategy: pure functions to plain text. Dialogs and logs of Qt take a text for HTML if it looks like it, and
some of our texts quote the backup; so nothing here can look like it. Advice that names an option of the
commands is put in the dialog's terms.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qubes_restore_svc.errors import Cancelled, ExitStatus, RestoreError, size_text
from qubes_restore_svc.wire import restore_call as c
from qubes_restore_svc.wire.messages import RefusedQube
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.report import QubeReport, Report

#: Errors that an option of the command settles, which is dangerous enough not to be in a dialog.
_IN_A_TERMINAL = {
    "image-too-large": "--ignore-size-limit",
    "excessive-cost": "--ignore-cost-limit",
    "unknown-filter": "--compression-filter",
}
_CONFIG = "/etc/qubes-restore-svc/config.yaml"
#: Classes of qubes that have software of their own, as old as the backup.
_TO_BE_UPDATED = ("TemplateVM", "StandaloneVM")
#: An option of a command, long or short.
_OPTION = re.compile(r"(?<![\w-])--?[A-Za-z]")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one qube. `name` is the name that it has here; `reason` and `advice` may be empty."""

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
    return _advice(kind) if _OPTION.search(text) else text


def _advice(kind: str) -> str:
    """Instead of an advice that names options of a command line, which a dialog does not have."""
    if kind == "missing-dependency":
        return translate(
            "Restore", "Restore or install it first, or tick “Ignore missing templates and net qubes”."
        )
    if kind == "qube-exists":
        return translate("Restore", "Rename or remove the one that is here, or leave this one out.")
    if kind == "username-mismatch":
        return translate("Restore", "Leave dom0 out, or tick “Ignore dom0 username mismatch”.")
    if kind == "budget-too-small":
        return translate("Restore", "Give the worker more memory: worker.memory in {path} in dom0.").format(
            path=_CONFIG
        )
    if kind == "bad-compression":
        return translate("Restore", "The backup is damaged here; look for another copy.")
    if kind in _IN_A_TERMINAL:
        return translate(
            "Restore", "If you trust this backup, restore it in a terminal with “{command}”."
        ).format(command=f"qvm-backup-restore --mgmt-vm {_IN_A_TERMINAL[kind]}")
    return translate(
        "Restore", "“qvm-backup-restore --mgmt-vm --help” in a terminal tells of options that may help."
    )


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


def unlisted_text(qube: RefusedQube) -> str:
    """That a qube of the backup cannot be restored at all, and why."""
    text = translate("Restore", "Cannot be listed: {name}: {reason}")
    return plain(text.format(name=qube.name, reason=sentence(qube.error.reason)))


def problem_text(planned: c.PlanQube) -> str:
    """Why a qube of the plan is not taken, and what to do."""
    if planned.error is None:
        return plain(
            sentence(planned.remark or planned.problem or translate("Restore", "it cannot be restored"))
        )
    kind = planned.error.kind if planned.problem != "username-mismatch" else planned.problem
    what_to_do = settlement_text(planned) or advice(kind, planned.error.advice)
    return plain(f"{sentence(planned.error.reason)} {what_to_do}".rstrip())


def settlement_text(planned: c.PlanQube) -> str:
    """What can be done about a qube that is refused, as far as it is true here; may be empty."""
    settled_by, remedies = planned.settled_by, []
    if "new-name" in settled_by:
        remedies.append(translate("Restore", "give it another name"))
    if "template" in settled_by:
        remedies.append(translate("Restore", "choose a template"))
    if "netvm" in settled_by:
        remedies.append(translate("Restore", "choose a net qube"))
    if "default" in settled_by:
        remedies.append(translate("Restore", "tick “Ignore missing templates and net qubes”"))
    if "ignore" in settled_by:
        remedies.append(translate("Restore", "tick “Ignore dom0 username mismatch”"))
    if "leave-out" in settled_by:
        remedies.append(translate("Restore", "leave it out"))
    return sentence(translate("Restore", ", or ").join(remedies))


def planned_name(planned: c.PlanQube) -> str:
    """The name that a qube gets, and that of the backup if it is another one."""
    return _renamed(planned.new_name, planned.name)


def _renamed(name: str, old: str | None, *, is_there: bool = True) -> str:
    if old is None or old == name:
        return plain(name)
    text = (
        translate("Restore", "{new} (was {old})")
        if is_there
        else translate("Restore", "{old} (new name {new})")
    )
    return plain(text.format(old=old, new=name))


def left_behind_text(settings: Sequence[str]) -> str:
    """Which settings of a qube do not come back; may be empty."""
    if not settings:
        return ""
    return translate(
        "Restore", "These settings stay behind, as dom0's configuration says: {settings}."
    ).format(settings="; ".join(settings))


def is_cancelled(report: Report) -> bool:
    """Did the person end it?"""
    return report.status == ExitStatus.CANCELLED or (
        report.error is not None and report.error.kind == Cancelled.kind
    )


def outcome(result: QubeReport, mode: str = "restore") -> Outcome:
    """What came of a qube; `mode` is `verify` or `restore`."""
    name = _renamed(result.name, result.name_in_backup, is_there=result.outcome in _THERE)
    word = outcome_word(result.outcome, mode)
    if result.succeeded:
        behind = left_behind_text(result.settings_left_out) if mode != "verify" else ""
        return Outcome(name, True, word, plain("; ".join(result.warnings)), plain(behind))
    error = result.error or next((volume.error for volume in result.volumes if volume.error), None)
    if error is None:
        return Outcome(name, False, word, plain(result.remark))
    cancelled = error.kind == Cancelled.kind
    told = "" if cancelled else advice(error.kind, error.advice)
    return Outcome(name, False, word, plain(_reason(result, error)), plain(told), cancelled)


#: Outcomes of a qube that is there, under its new name.
_THERE = ("restored", "already restored", "verified", "incomplete")


def outcome_word(word: str, mode: str) -> str:
    """The outcome of a report in the person's words."""
    if word == "restored":
        return translate("Restore", "restored")
    if word == "already restored":
        return translate("Restore", "already restored")
    if word == "verified":
        return translate("Restore", "verified")
    if word == "incomplete":
        return translate("Restore", "incomplete")
    if word == "left out":
        return translate("Restore", "left out")
    return translate("Restore", "failed") if mode == "verify" else translate("Restore", "not restored")


def outcomes(report: Report) -> list[Outcome]:
    """The result of each wanted qube, in the report's order."""
    return [outcome(result, report.mode) for result in report.qubes if result.outcome != "left out"]


def report_text(report: Report) -> str:
    """Which qubes were restored and which not and why, for a message box or a log."""
    found = outcomes(report)
    done = [one.name for one in found if one.succeeded]
    failed = [one for one in found if not one.succeeded]
    verb = outcome_word("verified" if report.mode == "verify" else "restored", report.mode)
    cancelled = is_cancelled(report)
    head = translate("Restore", "Cancelled") if cancelled else _counted(report.mode, len(done), len(found))
    lines = [f"{head}."]
    if report.error is not None and not cancelled:
        lines.append(error_text(report.error.to_error()))
    lines.append(f"{sentence(verb)[:-1]}: {', '.join(done) if done else translate('Restore', 'none')}.")
    lines += [f"{sentence(one.word)[:-1]}: {one.name}. {one.explanation}".rstrip() for one in failed]
    return "\n".join(lines)


def headline(mode: str, found: Iterable[Outcome]) -> str:
    """One line that sums it up."""
    all_of_them = list(found)
    return _counted(mode, sum(one.succeeded for one in all_of_them), len(all_of_them))


def _counted(mode: str, done: int, total: int) -> str:
    if mode == "verify":
        text = (
            translate("Restore", "Nothing was verified")
            if total == 0
            else translate("Restore", "No qube was verified")
            if done == 0
            else translate("Restore", "{done} of {total} qubes verified")
            if done < total
            else translate("Restore", "The qube was verified")
            if total == 1
            else translate("Restore", "Both qubes were verified")
            if total == 2
            else translate("Restore", "All {total} qubes were verified")
        )
    else:
        text = (
            translate("Restore", "Nothing was restored")
            if total == 0
            else translate("Restore", "No qube was restored")
            if done == 0
            else translate("Restore", "{done} of {total} qubes restored")
            if done < total
            else translate("Restore", "The qube was restored")
            if total == 1
            else translate("Restore", "Both qubes were restored")
            if total == 2
            else translate("Restore", "All {total} qubes were restored")
        )
    return text.format(done=done, total=total)


def what_next(report: Report) -> str:
    """A text for a restore that went well; may be empty."""
    if report.mode == "verify":
        return translate(
            "Restore", "All that was selected is in the backup, unchanged. Nothing was restored."
        )
    if any(qube.succeeded and qube.klass in _TO_BE_UPDATED for qube in report.qubes):
        return translate(
            "Restore", "Install updates in restored templates and standalone qubes before you use them."
        )
    return ""


def _reason(result: QubeReport, error: ErrorInfo) -> str:
    volume = error.volume or next((volume.name for volume in result.volumes if volume.error == error), None)
    if volume is None:
        return error.reason
    if error.chunk is None:
        return f"{volume_text(volume)}: {error.reason}"
    return translate("Restore", "{volume}, chunk {chunk}: {reason}").format(
        volume=volume_text(volume), chunk=error.chunk, reason=error.reason
    )


def volume_text(volume: str) -> str:
    """A volume, as a person calls it."""
    if volume == "home":
        return translate("Restore", "home directory")
    return translate("Restore", "{name} volume").format(name=volume)
