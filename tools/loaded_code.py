#!/usr/bin/env python3
"""Print how many modules and lines of code each program of the package loads.

    tools/loaded_code.py [--modules PROGRAM]

What a program loads is what its entry imports, and what that imports, wherever the statement stands. A line
of code is one that holds more than a comment, a docstring or white space. With --modules, the modules of one
program are printed, the largest first.
"""

import argparse
import ast
import io
import tokenize
from pathlib import Path

PACKAGE = "qubes_restore_svc"
#: The programs, each with the modules that it begins with.
PROGRAMS = {
    "dom0: command": ("cli.qvm_backup_restore",),
    "dom0: service": ("service.__main__", "service.local"),
    "dom0: command and service": ("cli.qvm_backup_restore", "service.__main__", "service.local"),
    "dom0: dialog": ("manager.launcher",),
    "worker": ("worker.__main__",),
    "any machine: command": ("__main__",),
}

_NO_CODE = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
)  # fmt: skip


def code_lines(source: str) -> int:
    """How many lines of the module with this source are code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def modules_of(root: Path) -> dict[str, Path]:
    """The files of the package below `root`, by their dotted names in it; that of the package is ""."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of the package that the file imports; the package names none of them relatively."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix(f"{PACKAGE}.") for name in named} & set(modules)


def loaded_by(starts: tuple[str, ...], modules: dict[str, Path]) -> set[str]:
    """All modules of the package that these load, and they themselves."""
    found: set[str] = set()
    todo = list(starts)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [name.rpartition(".")[0], *imports_of(modules[name], modules)]
    return found


def main() -> None:
    """Print the table, or the modules of one program."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--modules", metavar="PROGRAM", choices=PROGRAMS, help="list what PROGRAM loads")
    arguments = parser.parse_args()
    modules = modules_of(Path(__file__).resolve().parents[1])
    lines = {name: code_lines(path.read_text()) for name, path in modules.items()}
    if arguments.modules:
        for name in sorted(loaded_by(PROGRAMS[arguments.modules], modules), key=lambda name: -lines[name]):
            print(f"{lines[name]:6} {name or PACKAGE}")
        return
    rows = [("the whole package", set(modules))]
    rows += [(program, loaded_by(starts, modules)) for program, starts in PROGRAMS.items()]
    print(f"{'':26}{'modules':>8}{'lines':>8}")
    for title, loaded in rows:
        count = sum(modules[name].name != "__init__.py" for name in loaded)
        print(f"{title:26}{count:8}{sum(lines[name] for name in loaded):8}")


if __name__ == "__main__":
    main()
