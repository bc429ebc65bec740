#!/usr/bin/env python3
"""Print how many modules and lines of code each program of the package loads.

    tools/loaded_code.py [--modules PROGRAM | --worker-bytes]

What a program loads is what its entry imports, and what that imports, wherever the statement stands. A line
of code is one that holds more than a comment, a docstring or white space. With --modules, the modules of one
program are printed, the largest first. With --worker-bytes, the lines are counted through which what a
worker sends comes to the broker's side, until it is a message that can be believed, or in a volume.
"""

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "qubes_restore_svc"
#: The programs, each with the modules that it begins with.
PROGRAMS = {
    "dom0: command": ("cli.qvm_backup_restore",),
    "dom0: service": ("dom0_service.__main__", "dom0_service.child"),
    "dom0: command and service": ("cli.qvm_backup_restore", "dom0_service.__main__", "dom0_service.child"),
    "dom0: dialog": ("manager.launcher",),
    "worker": ("worker.__main__",),
    "any machine: command": ("__main__",),
    "watch": ("watch.__main__",),
}

#: What reads the bytes of a worker on the broker's side: names of each module, or all but those behind a "-".
#: Statements that import count nowhere: they read nothing.
READERS = {
    "wire.connection": ("-Connection.send",),
    "wire.models": (
        "-Passphrase", "-_encodable", "-ProtocolVersion", "-encode_message", "-encoded_size",
        "-ErrorInfo.of", "-ErrorInfo.without_place", "-ErrorInfo.within", "-_Form", "-fullest",
    ),
    "wire.names": (
        "-KEPT_VOLUMES", "-MAX_REQUEST", "-MAX_STALL_TIMEOUT", "-MAX_PASSPHRASE", "-LocationId", "-PoolName",
        "-SettingName",
        "-StallTimeout", "-LocationText", "-_one_line", "-TIMESTAMP", "-Timestamp", "-_moment", "-_seconds",
        "-_QUBE_NAME", "-is_qube_name", "-DigestKind", "-_LOG_MARKS", "-last_words", "-backup_time",
    ),
    "wire.messages": (
        "-Storage", "-Open", "-QubeHere", "-Start", "-SkipQube", "-Cancel", "-BrokerMessage", "-worker_end",
    ),
    "wire.volume": ("-MAX_IMAGE_SIZE", "-encode_header", "-encode_record", "-encode_end"),
    "broker.client": (
        "MAX_LOG_LINES", "MAX_PROGRESS", "PACE_S", "WORKER_SAYS", "_READ_SIZE", "_GRACE_S",
        "SessionClient._receive", "SessionClient._read_in_time", "SessionClient._read", "SessionClient._pace",
    ),
    "broker.receiver": ("receive_volume", "_receive_exactly", "_receive"),
    "broker.ledger": ("_MAX_PHRASE", "believed_error", "one_phrase"),
}  # fmt: skip

_NO_CODE = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
)  # fmt: skip


def code_lines(source: str) -> int:
    """How many lines of the module with this source are code."""
    return len(_code(source))


def _code(source: str) -> set[int]:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines -= _span(first)
    return lines


def _span(node: ast.stmt) -> set[int]:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return set(range(first, (node.end_lineno or first) + 1))


def lines_of_names(source: str, names: tuple[str, ...]) -> int:
    """How many lines of code these top-level names and `Class.name`s have; or all others, with "-" before."""
    tree = ast.parse(source)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = _code(source).difference(*map(_span, imports))
    found = dict(_named(tree))
    named = set().union(*(found[name.removeprefix("-")] for name in names))
    return len(lines - named if names[0].startswith("-") else lines & named)


def _named(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, set[int]]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, _span(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((prefix + ast.unparse(target), _span(node)) for target in targets)
        if isinstance(node, ast.ClassDef):
            yield from _named(node, f"{node.name}.")


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
    parser.add_argument("--worker-bytes", action="store_true", help="count what reads a worker's bytes")
    arguments = parser.parse_args()
    modules = modules_of(Path(__file__).resolve().parents[1])
    if arguments.worker_bytes:
        counts = {name: lines_of_names(modules[name].read_text(), READERS[name]) for name in READERS}
        for name, count in (*counts.items(), ("together", sum(counts.values()))):
            print(f"{name:26}{count:8}")
        return
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
