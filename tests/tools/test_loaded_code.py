"""What is said of the size of a program is what it loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.loaded_code import (
    PROGRAMS,
    READERS,
    code_lines,
    imports_of,
    lines_of_names,
    loaded_by,
    modules_of,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("", 0),
        ('"""A docstring\nof two lines."""\n', 0),
        ("# a comment\n\nx = 1  # and another\n", 1),
        ('def f() -> str:\n    """Say it."""\n\n    return """two\nlines"""\n', 3),
        ('class A:\n    """One."""\n\n    x = (\n        1,\n    )\n', 4),
        ('x = 1\n"""Not a docstring."""\n', 2),
    ],
)
def test_a_line_of_code_is_neither_comment_nor_docstring_nor_blank(source: str, lines: int) -> None:
    assert code_lines(source) == lines


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        (("f",), 2),
        (("A.g",), 3),
        (("A.x", "y"), 2),
        (("-f",), 6),
        (("-A",), 3),
        (("-A.g", "-y"), 4),
    ],
)
def test_the_lines_of_a_name_are_those_of_what_it_names(names: tuple[str, ...], lines: int) -> None:
    source = (
        "import os\n\n\ndef f() -> None:\n    pass\n\n\nclass A:\n    x: int = 1\n\n    @property\n"
        "    def g(self) -> int:\n        return 1\n\n\ny = 1  # a comment\n"
    )
    assert lines_of_names(source, names) == lines


def test_not_many_lines_read_the_bytes_of_a_worker() -> None:
    modules = modules_of(ROOT)
    assert sum(lines_of_names(modules[name].read_text(), names) for name, names in READERS.items()) <= 500


def test_an_import_counts_wherever_it_stands(tmp_path: Path) -> None:
    package = tmp_path / "qubes_restore_svc"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "low.py").write_text("")
    (package / "high.py").write_text("def f():\n    from qubes_restore_svc import low\n")
    (package / "top.py").write_text("import qubes_restore_svc.high\n")
    modules = modules_of(tmp_path)
    assert imports_of(package / "high.py", modules) == {"low"}
    assert loaded_by(("top",), modules) == {"", "low", "high", "top"}


@pytest.mark.parametrize("program", ["worker", "any machine: command"])
def test_what_is_counted_is_what_an_interpreter_loads(program: str) -> None:
    """But for what is imported late: the interpreter may have loaded less."""
    script = (
        "import json, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        + "".join(f"import qubes_restore_svc.{name}\n" for name in PROGRAMS[program])
        + "print(json.dumps(list(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    names: list[str] = json.loads(done.stdout)
    loaded = {name.removeprefix("qubes_restore_svc").lstrip(".") for name in names if "qubes_re" in name}
    modules = modules_of(ROOT)
    assert loaded & set(modules) <= loaded_by(PROGRAMS[program], modules)
