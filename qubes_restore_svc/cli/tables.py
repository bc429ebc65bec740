"""Tables, sizes and times as people read them.

Strategy: pure functions from a manifest, a plan or a report to text. `width` is that of the terminal in
columns, None where there is none; then nothing is wrapped and every row is one line, for other programs to
read. Names have passed the models, remarks are ours.
"""

from collections.abc import Iterable, Sequence

from qubes_restore_svc.cli.terminal import wrapped
from qubes_restore_svc.errors import size_text
from qubes_restore_svc.wire.messages import Manifest, ManifestQube
from qubes_restore_svc.wire.models import ErrorInfo
from qubes_restore_svc.wire.names import shortened
from qubes_restore_svc.wire.report import Difference, QubeReport, Report, VolumeReport
from qubes_restore_svc.wire.restore_call import Plan, PlanQube, Problem

#: What a digest is, and how it is made of an image file.
_FS_VERITY, _SHA256 = "DIGEST (fsverity digest FILE)", "DIGEST (sha256sum FILE)"
_LEAST_CELL = 14  #: columns that a name gets at least, while others can be left out for it
_MOST_NAMES = 8  #: in a line that says something of several qubes


def duration_text(seconds: float) -> str:
    """`seconds` as `1 h 05 min`, `4 min 10 s`, `4 min` or `12 s`."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s".removesuffix(" 00 s")
    return f"{whole} s"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart; no trailing spaces."""
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (headings, *rows)
    ]
    return "\n".join(lines)


_Row = tuple[str, ...]


def fitted(
    headings: _Row,
    rows: Sequence[_Row],
    width: int | None,
    *,
    gap: int,
    spare: Sequence[int],
    cut: Sequence[int],
) -> tuple[_Row, list[_Row]]:
    """The headings and rows as they fit on a terminal, on which each column takes `gap` more than its text.

    The columns `spare` are left out one by one, until there is room for much of the columns `cut`; what is
    still too long there ends with `…`.
    """
    columns = list(range(len(headings)))
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    if width is None:
        return headings, list(rows)
    for column in (*spare, None):
        room = width - 1 - sum(gap + (0 if one in cut else widths[one]) for one in columns)
        if sum(widths[one] for one in cut) <= room or room >= _LEAST_CELL * len(cut) or column is None:
            break
        columns.remove(column)
    for number, one in enumerate(sorted(cut, key=lambda one: widths[one])):
        widths[one] = min(widths[one], max(_LEAST_CELL // 2, room // (len(cut) - number)))
        room -= widths[one]

    def kept(row: _Row) -> _Row:
        return tuple(shortened(row[one], widths[one]) for one in columns)

    return kept(headings), [kept(row) for row in rows]


def manifest_table(manifest: Manifest, width: int | None = None) -> str:
    """The qubes of a backup."""
    rows = [
        (
            qube.name,
            qube.klass,
            qube.template or "-",
            netvm_text(qube),
            qube.label,
            size_text(qube.backup_size),
        )
        for qube in manifest.qubes
    ]
    headings = ("NAME", "CLASS", "TEMPLATE", "NETVM", "LABEL", "SIZE")
    return table(*fitted(headings, rows, width, gap=2, spare=(4, 1), cut=(2, 3)))


def netvm_text(qube: ManifestQube) -> str:
    """A qube's netvm: its name, `default`, or `-` for none."""
    if qube.klass == "AdminVM" or qube.netvm == "":
        return "-"
    return qube.netvm or "default"


def report_table(report: Report, width: int | None = None) -> str:
    """One row a volume, and one for each qube that has none; qubes that were not wanted have no row.

    A digest has 64 characters. Where the rows would be wider than the terminal, it stands in a line of its
    own when verifying, which is about these digests, and only in the JSON report otherwise.
    """
    rows = [row for qube in report.qubes if qube.outcome != "left out" for row in _rows(report, qube)]
    if not rows:
        return ""
    plain = any(volume.sha256 for qube in report.qubes for volume in qube.volumes)
    headings = ("QUBE", "VOLUME", "SIZE", "RESULT", _SHA256 if plain else _FS_VERITY)
    text = table(headings, rows)
    if width is None or max(map(len, text.splitlines())) <= width:
        return text
    head, *lines = table(headings[:-1], [row[:-1] for row in rows]).splitlines()
    if report.mode != "verify":
        return "\n".join([head, *lines])
    digests = [headings[-1], *(row[-1] for row in rows)]
    return "\n".join(
        f"{line}\n  {digest}" if digest else line
        for line, digest in zip([head, *lines], digests, strict=True)
    )


def failures(report: Report, width: int | None = None) -> list[str]:
    """What failed, with the reason and what to do, each reason once; not what the whole run ended with."""
    places: dict[tuple[str, str], list[str]] = {}
    for qube in report.qubes:
        for place, error in _errors(qube):
            if not _is_same(error, report.error):
                places.setdefault((error.reason, error.advice), []).append(place)
    return [
        wrapped(f"{listed(names)}: {reason}. {advice}".rstrip(), width)
        for (reason, advice), names in places.items()
    ]


def differences(report: Report, width: int | None = None) -> list[str]:
    """What a comparison has found not to be the same, with the places; what is missing comes first."""
    missing, lines = list[str](), list[str]()
    for qube in report.qubes:
        if qube.outcome == "missing" and all(volume.outcome == "missing" for volume in qube.volumes):
            missing.append(qube.name)
            continue
        for volume in qube.volumes:
            name = f"{qube.name}/{volume.name}"
            if volume.outcome == "missing":
                missing.append(name)
            elif volume.difference is not None:
                text = "; ".join(_difference_texts(volume, volume.difference))
                lines.append(wrapped(f"{name}: {text}", width))
    return [wrapped(f"missing here: {listed(missing)}", width), *lines] if missing else lines


def _difference_texts(volume: VolumeReport, difference: Difference) -> Iterable[str]:
    if volume.outcome == "newer":
        yield "written to after the backup"
    if difference.different_bytes:
        places = [f"{place.length} bytes at {place.offset}" for place in difference.places]
        if difference.more_places:
            places.append(f"{difference.more_places} more places")
        yield f"{size_text(difference.different_bytes)} differ: {', '.join(places)}"
    if difference.size != volume.size:
        yield f"it has {difference.size} bytes here, and {volume.size} in the backup"


def left_out(report: Report, width: int | None = None) -> list[str]:
    """Which qubes were left out, a line for each reason."""
    names: dict[str, list[str]] = {}
    for qube in report.qubes:
        if qube.outcome == "left out":
            names.setdefault(qube.remark, []).append(qube.name)
    return [
        wrapped(f"left out ({remark}): {listed(those)}" if remark else f"left out: {listed(those)}", width)
        for remark, those in names.items()
    ]


def listed(names: Sequence[str]) -> str:
    """Some names in a line, and how many more there are."""
    shown = "; " if any("," in name for name in names) else ", "
    text = shown.join(names[:_MOST_NAMES])
    return text if len(names) <= _MOST_NAMES else f"{text} and {len(names) - _MOST_NAMES} more"


def _rows(report: Report, qube: QubeReport) -> list[tuple[str, str, str, str, str]]:
    rows: list[tuple[str, str, str, str, str]] = [
        (
            qube.name,
            volume.name,
            "-" if volume.size is None else size_text(volume.size),
            _volume_result(report, qube, volume),
            volume.fsverity or volume.sha256 or "",
        )
        for volume in qube.volumes
    ]
    # The volumes of a qube that failed for another reason do not look like a failure.
    if not rows or (not qube.succeeded and all(row[3] in _GOOD for row in rows)):
        rows.append((qube.name, "-", "-", qube.outcome, ""))
    return rows if qube.outcome != "refused" else rows[-1:]


_GOOD = ("verified", "restored", "already restored", "same")


def _volume_result(report: Report, qube: QubeReport, volume: VolumeReport) -> str:
    """What is true of a volume now: one that came whole, with a qube that failed, is not there."""
    if volume.difference is not None:
        size = volume.difference.different_bytes
        extent = f"differs in {size_text(size)}" if size else "differs in size"
        return f"newer, {extent}" if volume.outcome == "newer" else extent
    if volume.outcome != "ok":
        return volume.outcome
    if report.mode == "verify":
        return "verified"
    if qube.outcome == "already restored":
        return qube.outcome
    return "restored" if qube.succeeded or qube.outcome == "incomplete" else "rolled back"


def _errors(qube: QubeReport) -> Iterable[tuple[str, ErrorInfo]]:
    found = [
        (f"{qube.name}/{volume.name}" + _chunk(volume.error), volume.error)
        for volume in qube.volumes
        if volume.outcome == "failed" and volume.error is not None
    ]
    if qube.error is not None and not any(_is_same(qube.error, error) for _, error in found):
        found.insert(0, (qube.name + _chunk(qube.error), qube.error))
    return found


def _chunk(error: ErrorInfo | None) -> str:
    return "" if error is None or error.chunk is None else f", chunk {error.chunk}"


def _is_same(one: ErrorInfo, other: ErrorInfo | None) -> bool:
    return other is not None and (one.kind, one.reason) == (other.kind, other.reason)


# --- The plan --------------------------------------------------------------------------------------

# Columns, values and remarks are those that a user of the stock command knows.
_PLAN_HEADINGS = ("name", "type", "template", "netvm", "label")
_PLAN_TITLE = "The following qubes are in the backup:"

#: The remark on a qube that is left out, for each reason.
_LEFT_OUT: dict[Problem, str] = {
    "excluded": "excluded",
    "home-not-asked-for": "only with --dom0-home",
    "home-not-compared": "that cannot be compared",
    "not-here": "missing here",
    "already-restored": "already restored",
    "already-exists": "there already",
    "missing-template": "without a template here",
    "missing-netvm": "without their netvm here",
}

_MOST_SETTINGS = 12  #: lines, unless all are asked for


def plan_table(plan: Plan, width: int | None) -> str:
    """What cannot be restored, then what will be; of the other qubes, how many there are."""
    shown = sorted(
        (planned for planned in plan.qubes if planned.decision != "leave-out"),
        key=lambda planned: planned.decision == "take",
    )
    headings, rows = fitted(
        _PLAN_HEADINGS, [_plan_cells(one) for one in shown], width, gap=3, spare=(4, 1), cut=(2, 3)
    )
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    rule = "".join(f"{'':-^{width}}--+" for width in widths)
    lines = [_PLAN_TITLE, "", rule, _plan_line(headings, widths), rule]
    for planned, cells in zip(shown, rows, strict=True):
        lines += _with_remark(_plan_line(cells, widths), _plan_remark(planned), width)
    if rest := names_with("not-selected", plan):
        lines.append(f"{len(rest)} not selected")
    for problem, what in _LEFT_OUT.items():
        left_out = [one for one in plan.qubes if (one.problem, one.decision) == (problem, "leave-out")]
        names = [
            one.name if one.new_name == one.name else f"{one.name} as {one.new_name}" for one in left_out
        ]
        if names:
            lines.append(wrapped(f"{len(names)} {what}: {listed(names)}", width))
    lines += [wrapped(f"not listed: {qube.name}: {qube.error.reason}", width) for qube in plan.unlisted]
    return "\n".join(lines)


def settings_left_behind(plan: Plan, *, everything: bool) -> list[str]:
    """Which settings of the qubes that are taken do not come back: a line each, with the qubes."""
    qubes: dict[str, list[str]] = {}
    for planned in plan.taken:
        for setting in planned.settings_left_out:
            qubes.setdefault(setting, []).append(planned.new_name)
    if not qubes:
        return []
    lines = [f"  {setting}: {listed(names)}" for setting, names in qubes.items()]
    if not everything and len(lines) > _MOST_SETTINGS:
        rest = len(lines) - _MOST_SETTINGS
        lines[_MOST_SETTINGS:] = [f"  and {rest} more (all with -v)"]
    return ["These settings stay behind, because the configuration does not allow them:", *lines]


def names_with(problem: Problem, plan: Plan) -> list[str]:
    """The qubes that are not taken for this reason."""
    return [planned.name for planned in plan.qubes if planned.problem == problem]


def takes_dom0_home(plan: Plan) -> bool:
    """Will dom0's home be restored?"""
    return any(planned.klass == "AdminVM" for planned in plan.taken)


def _plan_cells(qube: PlanQube) -> tuple[str, ...]:
    netvm = "(default)" if qube.netvm is None else qube.netvm or "-"
    return (
        qube.name,
        qube.klass,
        qube.template or "n/a",
        "-" if qube.klass == "AdminVM" else netvm,
        qube.label,
    )


def _plan_line(cells: Sequence[str], widths: Iterable[int]) -> str:
    return "".join(f" {cell:>{width}} |" for cell, width in zip(cells, widths, strict=True))


def _plan_remark(planned: PlanQube) -> str:
    if planned.error is not None:
        return f"{planned.error.reason}!"
    return "; ".join(planned.notes) or planned.remark


def _with_remark(row: str, remark: str, width: int | None) -> list[str]:
    if not remark:
        return [row]
    one_line = f"{row} <-- {remark}"
    if width is None or len(one_line) < width:
        return [one_line]
    return [row, *(f"   {line}" for line in wrapped(f"<-- {remark}", width - 3).splitlines())]
