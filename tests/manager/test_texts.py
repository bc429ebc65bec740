"""What a person reads in the dialog can be translated."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qubes_restore_svc import manager

#: Says why it cannot begin, before there is Qt; and errors, which are in dom0's language everywhere.
UNTRANSLATED = {"launcher.py", "call.py", "entries.py", "options.py"}
FILES = sorted(Path(manager.__file__).parent.glob("*.py"))
MODULES = [path for path in FILES if path.name not in UNTRANSLATED]
#: Words are shown if they are arguments of one of these, and sentences wherever they stand.
SHOWS = re.compile(r"set\w*(Text|Title|ToolTip|Name|_text|_rest)|add(Item|Button)|Q\w*(Label|Button|Box)")
WORD, SENTENCE = re.compile("[A-Za-z]{2}"), re.compile("[A-Za-z]{2,}.* |: .*[A-Za-z]{2}")
#: Of a report, a file, or a command: not shown as they are.
NAMES = {"left out", "failed", "already restored", "qubes-restore-manager", "qvm-backup-restore --mgmt-vm "}


def name_of(call: ast.Call) -> str:
    return str(getattr(call.func, "attr", getattr(call.func, "id", "")))


def bypasses(node: ast.AST, pattern: re.Pattern[str] = SENTENCE) -> Iterator[str]:
    """Texts below `node` that do not go through `translate`."""
    if isinstance(node, ast.Raise | ast.Compare) or (
        isinstance(node, ast.Call) and name_of(node) == "translate"
    ):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # a docstring
    text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
    if pattern.search(text) and text not in NAMES:
        yield text
    shows = isinstance(node, ast.Call) and SHOWS.fullmatch(name_of(node)) is not None
    for child in ast.iter_child_nodes(node):
        yield from bypasses(child, WORD if shows else pattern)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_no_text_of_the_dialog_bypasses_the_translation(module: Path) -> None:
    assert list(bypasses(ast.parse(module.read_text()))) == []


@pytest.mark.parametrize(
    "code", ["f(f'{n} qubes left')", "label.setText('waiting')", "QPushButton('Copy')", "x = 'It is over.'"]
)
def test_a_text_that_bypasses_it_is_found(code: str) -> None:
    assert len(list(bypasses(ast.parse(code)))) == 1
    translated = re.sub(r"f?('.*?')", r"translate('Restore', \1)", code)
    assert list(bypasses(ast.parse(translated))) == []
