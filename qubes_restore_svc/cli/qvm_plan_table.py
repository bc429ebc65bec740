"""The plan as the person sees it before anything is created: the table, and what is to be said about it.

Strategy: pure functions from a plan to text. Columns, values and remarks are those that a user of the stock
command knows. `width` is that of the terminal in columns, None where there is none; then a row is one line,
and otherwise a remark that has no room in its row stands below it. Names have passed the models, remarks are
ours.
"""

from collections.abc import Iterable, Sequence

from qubes_restore_svc.cli.tables import listed
from qubes_restore_svc.cli.terminal import wrapped
from qubes_restore_svc.wire.restore_call import Plan, PlanQube, Problem

_HEADINGS = ("name", "type", "template", "netvm", "label")
_TITLE = "The following qubes are in the backup:"

#: What a row says of a qube that was not asked for. Of others, the plan says what is wrong.
_REMARKS: dict[Problem | None, str] = {
    "excluded": "excluded from restore",
    "not-selected": "not selected",
    "home-not-asked-for": "only with --dom0-home",
}

_MOST_SETTINGS = 12  #: lines, unless all are asked for


def plan_table(plan: Plan, width: int | None) -> str:
    """All qubes of the backup, with what will become of them where that is not simply a restore."""
    rows = [_cells(planned) for planned in plan.qubes]
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
    rule = "".join(f"{'':-^{width}}--+" for width in widths)
    lines = [_TITLE, "", rule, _line(_HEADINGS, widths), rule]
    for planned, cells in zip(plan.qubes, rows, strict=True):
        lines += _with_remark(_line(cells, widths), _remark(planned), width)
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


def _cells(qube: PlanQube) -> tuple[str, ...]:
    netvm = "(default)" if qube.netvm is None else qube.netvm or "-"
    return (
        qube.name,
        qube.klass,
        qube.template or "n/a",
        "-" if qube.klass == "AdminVM" else netvm,
        qube.label,
    )


def _line(cells: Sequence[str], widths: Iterable[int]) -> str:
    return "".join(f" {cell:>{width}} |" for cell, width in zip(cells, widths, strict=True))


def _remark(planned: PlanQube) -> str:
    if planned.problem in _REMARKS:
        return _REMARKS[planned.problem]
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
