"""The four questions that every tortured restore has to answer.

Strategy: pure functions from what was there before and what is there now to a list of sentences, each one
thing that is wrong. A case says beforehand what it may cost, and nothing else may be lost.

    1. Is the status honest?            3. Is nothing left?
    2. Is no wrong image there?         4. Does the message name the cause?
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from qubes_restore_svc.errors import ExitStatus
from qubes_restore_svc.wire.report import Report

from .sample import Sample, found_in

#: The kinds of error that damage of an archive may end in. All others would blame somebody else.
DAMAGE_KINDS = frozenset(
    {
        "empty-input",
        "not-a-backup",
        "unsupported-format",
        "archive-truncated",
        "bad-archive",
        "archive-damaged",
        "bad-header",
        "unknown-filter",
        "wrong-passphrase",
        "bad-container",
        "excessive-cost",
        "authentication-failed",
        "chunk-out-of-order",
        "bad-compression",
        "bad-image",
        "bad-sparse-map",
        "bad-metadata",
        "missing-volume",
    }
)
OUR_MISTAKE = ("mistake of the program", "Traceback")


@dataclass(frozen=True, slots=True)
class Case:
    """One tortured archive. `may_lose` are the qubes that may fail, and `may_lack` those that may come back
    without a settings file, because nothing in the format shows that it was there."""

    name: str
    archive: bytes
    may_lose: frozenset[str] = frozenset()
    may_lack: frozenset[str] = frozenset()
    sample: Sample = field(repr=False, kw_only=True)


def judge(case: Case, report: Report, target: Path) -> list[str]:
    """What is wrong with the restore of this case into `target`."""
    restored = {qube.name for qube in report.qubes if qube.succeeded}
    wanted = set(case.sample.qubes)
    return [
        *_dishonest(report, restored, wanted),
        *_wrong_content(case, report, target),
        *_left(report, restored, target),
        *_unnamed(report),
        *(f"{name} was lost, which was not hit" for name in sorted(wanted - restored - case.may_lose)),
    ]


def _dishonest(report: Report, restored: Collection[str], wanted: Collection[str]) -> list[str]:
    expected = {ExitStatus.PARTLY if restored else ExitStatus.NOTHING}
    if restored == wanted:
        expected = {ExitStatus.COMPLETE, ExitStatus.PARTLY}
    if report.status == ExitStatus.PARTLY and restored == wanted and report.error is None:
        return ["status 3, though nothing is missing and nothing is said to be"]
    if report.status == ExitStatus.COMPLETE and report.error is not None:
        return [f"status 0 with an error: {report.error.reason}"]
    return [] if report.status in expected else [f"status {report.status} with {sorted(restored)} restored"]


def _wrong_content(case: Case, report: Report, target: Path) -> list[str]:
    restored = {qube.name: qube for qube in report.qubes if qube.succeeded}
    wrong = []
    for name, (images, settings) in found_in(target).items():
        if name not in restored:
            continue  # told by _left
        if images != case.sample.images(name):
            wrong.append(f"{name} has other images than went in")
        for what, value in case.sample.settings(name).items():
            # Without its notes a qube is as closed as before; that they are missing has to be said.
            told = what != "firewall" and (restored[name].warnings or report.warnings)
            lacks = settings[what] is None and (name in case.may_lack or told)
            if settings[what] != value and not lacks:
                wrong.append(f"{name} has the {what} {settings[what]!r}, and {value!r} went in")
    return wrong


def _left(report: Report, restored: Collection[str], target: Path) -> list[str]:
    there = {path.name for path in target.iterdir()} if target.exists() else set()
    # Complete, and called a failure because a settings file of it came too late to be applied.
    late = {
        qube.name for qube in report.qubes if qube.error and "stands behind the files" in qube.error.reason
    }
    there -= late - set(restored)
    return [f"{name} is there and was not restored" for name in sorted(there - set(restored))] + [
        f"{name} was restored and is not there" for name in sorted(set(restored) - there)
    ]


def _unnamed(report: Report) -> list[str]:
    errors = [] if report.error is None else [report.error]
    wrong = []
    for qube in report.qubes:
        told = [error for error in (qube.error, *(volume.error for volume in qube.volumes)) if error]
        # "Left out, because the qube cannot be restored" tells nothing by itself.
        told = [error for error in told if error.kind != "skipped"]
        if not qube.succeeded and not told:
            wrong.append(f"{qube.name} failed, and nothing says why")
        errors += told
    wrong += [
        f"damage is told as {error.kind}: {error.reason}"
        for error in errors
        if error.kind not in DAMAGE_KINDS
    ]
    if report.status != ExitStatus.COMPLETE and not errors:
        wrong.append("it failed, and nothing says why")
    text = report.model_dump_json()
    return wrong + [f"the report says {phrase!r}" for phrase in OUR_MISTAKE if phrase in text]
