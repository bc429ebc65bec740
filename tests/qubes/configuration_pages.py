"""What is made from the model of the configuration: the sample file, and the tables of docs/configuration.md.

python -m tests.qubes.configuration_pages      writes both anew
"""

import textwrap
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel

from qubes_restore_svc.broker.settings_table import TABLES, Kind, Rule
from qubes_restore_svc.qubes.config import ANY_CALLER, CONFIG_PATH, Config, GrantConfig
from qubes_restore_svc.qubes.config_file import hints, keys_of

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "etc" / "config.yaml"
PAGE = ROOT / "docs" / "configuration.md"

#: The sections by their names; of `grants`, what each of the names has.
SECTIONS: dict[str, type[BaseModel]] = {
    name: GrantConfig if name == "grants" else type(value) for name, value in Config()
}

_WIDTH = 100
_NAMES = (
    f"The name of the qube that calls, or `{ANY_CALLER}` for all that are not named. A qube that is named has"
    " the rights below its name, and none of the others."
)


def sample() -> str:
    """The file as it is installed: everything in it is a comment, and every key shows its default."""
    lines = [
        f"# {CONFIG_PATH}: how qubes-restore-svc restores, and what a backup may bring back.",
        "# Everything here is a default; remove the # before a key (and before its section) to change it.",
        "# configuration.md, which comes with the package, explains the lists and the settings they name.",
    ]
    for name, section in SECTIONS.items():
        lines += ["", *_comment(f"{section.__doc__}"), f"#{name}:"]
        indent = "  "
        if section is GrantConfig:
            lines += _comment(_NAMES, indent)
            lines.append(f"#{indent}{ANY_CALLER}:")
            indent *= 2
        for key, field in section.model_fields.items():
            lines += _comment(f"{field.description} ({hints(field)[0]})", indent)
            lines.append(f"#{indent}{key}: {_as_yaml(field.default)}")
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"# {indent}", subsequent_indent=f"# {indent}")


def page(current: str) -> str:
    """The page with the tables between its marks made anew."""
    tables = {"keys": _table(["key", "default", "may be", "meaning"], _key_rows())}
    for kind, rules in TABLES.items():
        tables[kind] = _table([kind, "comes back", "values", "why"], _rule_rows(kind, rules))
    for name, table in tables.items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, mark, rest = current.partition(begin)
        _, end_mark, after = rest.partition(end)
        if not mark or not end_mark or begin in after:
            raise ValueError(f"the page has not one place for the table {name}")
        current = before + begin + table + end + after
    return current


def _key_rows() -> Iterable[list[str]]:
    for name, field in keys_of(Config):
        yield [f"`{name}`", f"`{_as_yaml(field.default)}`", hints(field)[0], field.description or ""]


def _as_yaml(default: object) -> str:
    match default:
        case None:
            return "null"
        case bool():
            return "true" if default else "false"
        case tuple():
            return "[" + ", ".join(f'"{entry}"' for entry in default) + "]"
        case Path() | int() | str():
            return str(default)
    raise AssertionError(f"a default that is not known to be YAML: {default!r}")


def _rule_rows(kind: Kind, rules: Iterable[Rule]) -> Iterable[list[str]]:
    """A row for neighbours that differ in their names only."""
    rows: list[tuple[list[str], tuple[str, ...]]] = []
    for rule in rules:
        values = "" if rule.values is None else rule.values.text
        only = "" if rule.only_on is None else f" ({', '.join(sorted(rule.only_on))} only)"
        rest = (rule.standing.value + only, values, rule.why)
        if rows and rows[-1][1] == rest:
            rows[-1][0].append(f"`{rule.pattern}`")
        else:
            rows.append(([f"`{rule.pattern}`"], rest))
    return ([", ".join(names), *rest] for names, rest in rows)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    SAMPLE.write_text(sample())
    PAGE.write_text(page(PAGE.read_text()))
