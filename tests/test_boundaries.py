"""The boundary between the side that parses a backup and the side that is trusted, held in the tree.

The import graph is read from the source (every `import` statement, wherever it stands, also in functions and
under TYPE_CHECKING), and once more from a fresh interpreter. A package may import what its line in the tables
says and nothing else; the trusted side can neither reach the parsers nor bring its own.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PACKAGE = "qubes_restore_svc"
ROOT = Path(__file__).resolve().parents[1]

#: What parses the archive. Everything else in the package is trusted, and may run in dom0.
UNTRUSTED = {"archive", "kdf", "worker"}

#: Part of the package: parts, or single modules, of ours that it may import. (The root holds the version.)
OURS: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli", "local", "hardening"},
    "errors": set(),
    "system_memory": {"errors"},
    "waiting": {"errors"},
    "hardening": {"errors"},
    "owners": {"errors", "hardening"},
    "report_file": {"wire", "owners"},
    "wire": {"wire", "errors"},
    "kdf": {"kdf", "errors"},
    "archive": {"archive", "kdf", "wire", "errors"},
    "worker": {"worker", "archive", "kdf", "wire", "errors", "system_memory", "hardening"},
    "broker": {"broker", "wire", "errors", "waiting", "hardening"},
    "qubes": {"qubes", "broker", "wire", "errors", "owners", "waiting", "hardening", "report_file"},
    "dom0_service": {"dom0_service", "qubes", "wire", "errors", "hardening"},
    "client": {"client", "wire", "errors", "waiting", "hardening"},
    # dom0's command asks the configuration whether a restore is its own.
    "cli": {
        "cli", "client", "qubes.config", "wire", "errors", "owners", "hardening", "report_file", "__init__",
    },
    "local": {
        "local", "cli", "broker", "wire", "errors", "owners", "waiting", "hardening", "system_memory",
        "report_file", "__init__",
    },
    # It verifies with the command of this machine, in its own process.
    "watch": {
        "watch", "cli", "local", "wire", "errors", "owners", "hardening", "report_file", "__init__",
    },
    # The dialog shows plans and figures as the commands do.
    "manager": {
        "manager", "client", "cli.tables", "cli.displays", "wire", "errors", "hardening", "__init__",
    },
}  # fmt: skip

#: Part of the package: the libraries beside the standard one that it may import.
LIBRARIES: dict[str, set[str]] = {
    "wire": {"pydantic"},
    "kdf": {"cryptography"},
    "archive": {"pydantic", "cryptography", "isal", "zstandard", "defusedxml"},
    "worker": {"pydantic"},
    "broker": {"pydantic"},
    "qubes": {"qubesadmin", "pydantic", "yaml"},
    "dom0_service": {"pydantic"},
    "local": {"pydantic"},
    "cli": {"tqdm", "pydantic"},
    "watch": {"pydantic"},
    "manager": {"PyQt6", "pydantic", "qubesadmin", "qubesmanager"},
}

#: Of the standard library, what nothing of ours may import: code that is not in the source, data that runs,
#: files that are staged.
FORBIDDEN = {
    "importlib", "imp", "runpy", "pkgutil", "zipimport", "code", "codeop", "marshal", "pickle", "shelve",
    "dbm", "tempfile",
}  # fmt: skip

#: … and what the trusted side may not: parsers, decompressors, and modules that lead to these.
#: `codecs` decodes "zlib" and "bz2"; `shutil` unpacks archives.
FORBIDDEN_IF_TRUSTED = {
    "tarfile", "zipfile", "zlib", "gzip", "bz2", "lzma", "compression", "binhex", "codecs", "encodings",
    "xml", "xmlrpc", "plistlib", "html", "email", "shutil", "subprocess", "multiprocessing", "ctypes",
}  # fmt: skip

#: renameat2 with RENAME_NOREPLACE, which `os` does not have.
EXCEPTIONS = {("broker.filesystem", "ctypes")}

#: Functions that nothing of ours calls, by their plain name …
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
#: … and attributes: a shell, and on the trusted side any program, which could be one that decompresses.
FORBIDDEN_ATTRIBUTES = {"system", "popen", "create_subprocess_shell", "import_module", "eval", "__import__"}
PROCESSES = {
    "create_subprocess_exec", "subprocess_exec", "fork", "forkpty", "posix_spawn", "posix_spawnp", "execv",
    "execve", "execvp", "execvpe", "execl", "execle", "execlp", "execlpe", "spawnv", "spawnve", "spawnvp",
    "spawnvpe", "spawnl", "spawnle", "spawnlp", "spawnlpe",
}  # fmt: skip
#: A client reaches dom0 through qrexec-client-vm, and in dom0 it starts the service's own program.
MAY_START_PROCESSES = {"client", *UNTRUSTED}
#: Single modules, and the one function that each may use: the command becomes the stock command; whoever
#: holds the lock leaves a process behind that clears up should it be killed; a program
#: reads dom0's backup; the worker is one, in a sandbox that is another, and a
#: third asks for its control group; a command of the person's brings the backup that is to be verified.
MAY_USE = {
    "cli.qvm_backup_restore": {"execv"},
    "qubes.guard": {"fork"},
    "qubes.backup_source": {"create_subprocess_exec"},
    "local.sandbox": {"create_subprocess_exec"},
    "local.memory": {"create_subprocess_exec"},
    "local.worker_process": {"create_subprocess_exec"},
    "watch.newest": {"posix_spawn"},
}


# --- The checker ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the package: its dotted name without the package's, and what its source does."""

    name: str
    imports: frozenset[str] = field(default_factory=frozenset)  # absolute dotted names, as written
    calls: frozenset[str] = field(default_factory=frozenset)
    attributes: frozenset[str] = field(default_factory=frozenset)

    @property
    def part(self) -> str:
        return self.name.split(".")[0]


def read_modules(root: Path) -> dict[str, Module]:
    """All modules of the package below `root`, by their name within it (`__init__` is the package itself)."""
    modules = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        package = (PACKAGE, *parts[:-1])
        tree = ast.parse(path.read_bytes(), str(path))
        modules[name] = Module(
            name,
            frozenset(found for node in ast.walk(tree) for found in imported_by(node, package)),
            frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)),
            frozenset(node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)),
        )
    return modules


def imported_by(node: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """The absolute names that an import statement in a module of `package` names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else ()
        module = ".".join((*base, *([node.module] if node.module else ())))
        yield from (f"{module}.{alias.name}" for alias in node.names)


def own_imports(module: Module, modules: dict[str, Module]) -> set[str]:
    """The modules of ours that `module` loads by its own statements: what they name, and its packages."""
    found = set()
    for name in module.imports:
        parts = name.split(".")
        if parts[0] == PACKAGE:
            prefixes = {".".join(parts[1:end]) for end in range(2, len(parts) + 1)}
            found |= {"__init__"} | {prefix for prefix in prefixes if prefix in modules}
    return found


def reachable(start: str, modules: dict[str, Module]) -> dict[str, str]:
    """Every module of ours that importing `start` loads, each with the one that asked for it."""
    asked_by = {start: ""}
    todo = [start]
    while todo:
        current = todo.pop()
        for name in own_imports(modules[current], modules):
            if name not in asked_by:
                asked_by[name] = current
                todo.append(name)
    return asked_by


def violations(root: Path) -> list[str]:
    """All that is wrong with the package below `root`, a line each."""
    modules = read_modules(root)
    found = []
    for module in modules.values():
        if module.part not in OURS:
            found.append(f"{module.name}: belongs to no part that is known here")
            continue
        found += [f"{module.name}: {problem}" for problem in problems(module, modules)]
        if module.part not in UNTRUSTED:
            for name, asker in reachable(module.name, modules).items():
                if name.split(".")[0] in UNTRUSTED:
                    found.append(f"{module.name}: reaches {name} through {asker}")
    return found


def problems(module: Module, modules: dict[str, Module]) -> Iterator[str]:
    trusted = module.part not in UNTRUSTED
    for name in own_imports(module, modules) - {"__init__", module.name}:
        allowed = OURS[module.part]
        # Importing broker.interfaces loads the package `broker` too, which has to be empty of code.
        is_package_of_allowed = any(other.startswith(f"{name}.") for other in allowed)
        if name.split(".")[0] not in allowed and name not in allowed and not is_package_of_allowed:
            yield f"imports {name} of ours"
    for name in module.imports:
        top = name.split(".")[0]
        if top == PACKAGE:
            continue
        if top not in sys.stdlib_module_names:
            if top not in LIBRARIES.get(module.part, set()):
                yield f"imports the library {top}"
        elif top in FORBIDDEN or (
            trusted and top in FORBIDDEN_IF_TRUSTED and (module.name, top) not in EXCEPTIONS
        ):
            yield f"imports {top}"
    yield from (f"calls {name}" for name in module.calls & FORBIDDEN_CALLS)
    yield from (f"uses .{name}" for name in module.attributes & FORBIDDEN_ATTRIBUTES)
    if module.part not in MAY_START_PROCESSES:
        allowed_here = MAY_USE.get(module.name, set())
        yield from (f"uses .{name}" for name in (module.attributes & PROCESSES) - allowed_here)
        yield from (f"imports {name}" for name in module.imports if name.split(".")[-1] in PROCESSES)


# --- The package ---------------------------------------------------------------------------------


def test_the_package_keeps_its_boundaries() -> None:
    assert violations(ROOT) == []


def import_table(modules: dict[str, Module]) -> dict[str, tuple[str, str]]:
    """The last two cells of each part's row in docs/architecture.md, as they should be."""
    rows = {}
    for part in {module.part for module in modules.values()} - {"__init__", "__main__"}:
        members = [module for module in modules.values() if module.part == part]
        ours = {name.split(".")[0] for module in members for name in own_imports(module, modules)}
        named = {name.split(".")[0] for module in members for name in module.imports}
        libraries = named - sys.stdlib_module_names - {PACKAGE}
        rows[part] = (_listed(ours - {part, "__init__"}), _listed(libraries))
    return rows


def documented_imports() -> list[tuple[str, str, str]]:
    """The rows of that table: a part, and those two cells."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    return re.findall(r"^\| `(\w+)(?:/|\.py)` \| [^|]+ \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "-"


def test_the_table_of_imports_in_the_documentation_is_true() -> None:
    found = {part: (ours, libraries) for part, ours, libraries in documented_imports()}
    assert found == import_table(read_modules(ROOT))


def test_a_part_imports_only_parts_above_it_in_the_documentation() -> None:
    above: set[str] = set()
    for part, ours, _ in documented_imports():
        assert set(ours.split(", ")) - {"-"} <= above, part
        above.add(part)


def test_every_module_that_the_documentation_names_exists() -> None:
    named = re.findall(
        r"`(\w+/\w+\.py)(?::\w+)?`", "".join(p.read_text() for p in sorted((ROOT / "docs").glob("*.md")))
    )
    assert len(named) > 20
    missing = {n for n in named if not (ROOT / PACKAGE / n).exists() and not (ROOT / n).exists()}
    assert missing == set()


#: What brings a chunk to those who unpack it. They take what comes, and call nobody who stands before them.
_BEFORE_THE_UNPACKING = ("archive_access", "intake", "keys", "memory", "source", "storage_qube")


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("files", _BEFORE_THE_UNPACKING),
        ("pipeline", _BEFORE_THE_UNPACKING),
        ("output", _BEFORE_THE_UNPACKING),
        ("session", (*_BEFORE_THE_UNPACKING, "chunk", "opening", "pipeline", "selection")),
    ],
)
def test_a_chunk_goes_one_way_through_the_worker(module: str, never: tuple[str, ...]) -> None:
    modules = read_modules(ROOT)
    assert {f"worker.{name}" for name in never} <= set(modules)
    assert not own_imports(modules[f"worker.{module}"], modules) & {f"worker.{name}" for name in never}


def test_the_check_sees_the_whole_package() -> None:
    modules = read_modules(ROOT)
    assert {module.part for module in modules.values()} == set(OURS)
    assert "archive" in reachable("worker.pipeline", modules)
    assert {"wire.names", "errors", "wire", "__init__"} <= set(reachable("wire.messages", modules))


@pytest.mark.parametrize("part", sorted(part for part in OURS if (ROOT / PACKAGE / part).is_dir()))
def test_importing_a_package_runs_no_code(part: str) -> None:
    """An `__init__.py` is loaded with each of its modules, whoever asked: it holds a docstring only."""
    tree = ast.parse((ROOT / PACKAGE / part / "__init__.py").read_bytes())
    assert [
        node
        for node in tree.body
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ] == []


_FORBIDDEN_AT_RUN_TIME = (
    f"{PACKAGE}.archive", f"{PACKAGE}.worker", "cryptography", "defusedxml", "xml", "lxml", "zstandard",
    "isal", "tarfile", "gzip", "multiprocessing", "pickle", "compression", "xmlrpc", "plistlib",
)  # fmt: skip
#: pydantic loads its plugins with importlib.metadata, and tqdm asks it for its version. That imports zipfile,
#: and that shutil, and that every decompressor. So these may be in memory, if it was not us who asked.
_ONLY_THROUGH_LIBRARIES = ("zlib", "bz2", "lzma", "zipfile", "shutil", "tempfile")

_SPY = """
import json, sys

class Spy:
    # Notes which file outside the standard library first asked for a module.
    def find_spec(self, name, path, target=None):
        frame = sys._getframe(1)
        while frame and (
            "importlib" in frame.f_code.co_filename or frame.f_globals.get("__name__", "").split(".")[0]
            in sys.stdlib_module_names and frame.f_globals["__name__"] != "__main__"
        ):
            frame = frame.f_back
        askers[name] = frame.f_globals["__name__"] if frame else "?"

askers = {}
sys.path.insert(0, sys.argv[1])
sys.meta_path.insert(0, Spy())
for name in sys.argv[2:]:
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        if error.name != "qubesadmin":  # comes with dom0, on no package index
            raise
print(json.dumps({name: askers.get(name, "") for name in sys.modules}))
"""


def loaded_by(*names: str, root: Path = ROOT) -> dict[str, str]:
    """What is in memory after a fresh interpreter imported `names`, and who asked for it first."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", _SPY, str(root), *names], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, str] = json.loads(done.stdout)
    return answer


def run_time_violations(loaded: dict[str, str]) -> list[str]:
    found = []
    for name, asker in loaded.items():
        if any(name == bad or name.startswith(f"{bad}.") for bad in _FORBIDDEN_AT_RUN_TIME):
            found.append(f"{name}, asked for by {asker}")
        if name in _ONLY_THROUGH_LIBRARIES and asker.split(".")[0] not in ("pydantic", "tqdm"):
            found.append(f"{name}, asked for by {asker}")
    return found


@pytest.mark.parametrize(
    "command", ["local.command", "cli.qvm_restore", "dom0_service.program", "watch.command"]
)
def test_a_command_runs_without_a_parser_in_memory(command: str) -> None:
    loaded = loaded_by(f"{PACKAGE}.{command}")
    assert f"{PACKAGE}.{command}" in loaded
    assert f"{PACKAGE}.wire.messages" in loaded
    assert run_time_violations(loaded) == []


def test_nothing_on_the_trusted_side_loads_a_parser() -> None:
    modules = read_modules(ROOT)
    names = [f"{PACKAGE}.{module.name}" for module in modules.values() if module.part not in UNTRUSTED]
    names = [name for name in names if not name.endswith(("__main__", "__init__"))]
    assert len(names) > 10
    loaded = loaded_by(*names, "tqdm")
    assert f"{PACKAGE}.broker.plan" in loaded
    assert run_time_violations(loaded) == []


# --- The checker sees what it should -------------------------------------------------------------

GOOD = {
    "__init__.py": "__version__ = '1'",
    "errors.py": "import enum",
    "wire/__init__.py": "",
    "wire/names.py": "import re, pydantic\nfrom qubes_restore_svc.errors import X",
    "broker/interfaces.py": "from ..wire import names",
    "broker/filesystem.py": "import ctypes",
    "broker/link.py": "import socket",
    "qubes/__init__.py": "",
    "qubes/host.py": "import qubes_restore_svc.broker.interfaces",
    "local/__init__.py": "",
    "local/worker_process.py": "import asyncio\nasyncio.create_subprocess_exec('bwrap')",
    "broker/__init__.py": "",
    "broker/plan.py": "from qubes_restore_svc.broker.interfaces import Host\nfrom .link import Link",
    "archive/__init__.py": "",
    "archive/tar.py": "import zlib, lzma, cryptography.x, zstandard\nfrom defusedxml import ElementTree",
    "worker/__init__.py": "",
    "worker/daemon.py": "from qubes_restore_svc.archive import tar",
    "local/command.py": "import re\nre.compile('x')\nfrom qubes_restore_svc.broker import plan",
    "cli/__init__.py": "",
    "cli/qvm_backup_restore.py": "import os\nos.execv('/usr/bin/stock', [])",
}


def tree(root: Path, changes: dict[str, str]) -> Path:
    for name, source in {**GOOD, **changes}.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return root


def test_a_package_that_keeps_its_boundaries_passes(tmp_path: Path) -> None:
    assert violations(tree(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"broker/plan.py": "import qubes_restore_svc.archive.tar"},
         "broker.plan: imports archive.tar of ours"),
        ({"broker/plan.py": "from qubes_restore_svc import archive"}, "broker.plan: imports archive of ours"),
        ({"broker/plan.py": "from ..archive import tar"}, "broker.plan: imports archive.tar of ours"),
        ({"broker/plan.py": "from .. import worker"}, "broker.plan: imports worker of ours"),
        ({"wire/names.py": "def f():\n    from ..archive.tar import x"},
         "wire.names: imports archive.tar of ours"),
        ({"wire/names.py": "if TYPE_CHECKING:\n    import qubes_restore_svc.worker.daemon"},
         "wire.names: imports worker.daemon of ours"),
        ({"errors.py": "from qubes_restore_svc.archive import tar"}, "errors: imports archive of ours"),
        ({"__init__.py": "from .archive import tar"}, "__init__: imports archive of ours"),
        # Through another module of ours, which is a violation of each one on the way.
        ({"broker/interfaces.py": "from qubes_restore_svc.archive import tar"},
         "broker.plan: reaches archive.tar through broker.interfaces"),
        ({"broker/__init__.py": "from ..worker import daemon"},
         "qubes.host: reaches worker.daemon through broker"),
        ({"broker/__init__.py": "from ..worker import daemon"},
         "local.command: reaches archive.tar through worker.daemon"),
        ({"__init__.py": "from .worker import daemon"},
         "wire.names: reaches archive.tar through worker.daemon"),
        # The table.
        ({"broker/plan.py": "from qubes_restore_svc.qubes.host import X"},
         "broker.plan: imports qubes.host of ours"),
        ({"broker/plan.py": "from qubes_restore_svc.cli import tables"}, "broker.plan: imports cli of ours"),
        ({"qubes/host.py": "import qubes_restore_svc.local.sandbox_link"},
         "qubes.host: imports local of ours"),
        ({"broker/link.py": "import qubes_restore_svc.qubes.host"},
         "broker.link: imports qubes.host of ours"),
        ({"wire/names.py": "import qubes_restore_svc.broker.interfaces"},
         "wire.names: imports broker.interfaces of ours"),
        ({"archive/tar.py": "import qubes_restore_svc.worker.daemon"},
         "archive.tar: imports worker.daemon of ours"),
        ({"worker/daemon.py": "import qubes_restore_svc.broker.plan"},
         "worker.daemon: imports broker.plan of ours"),
        ({"extra.py": ""}, "extra: belongs to no part that is known here"),
        ({"gui/__init__.py": ""}, "gui: belongs to no part that is known here"),
        # Libraries.
        ({"wire/names.py": "import tqdm"}, "wire.names: imports the library tqdm"),
        ({"broker/plan.py": "import cryptography.hazmat"}, "broker.plan: imports the library cryptography"),
        ({"local/command.py": "from defusedxml import ElementTree"},
         "local.command: imports the library defusedxml"),
        ({"local/command.py": "import lxml.etree"}, "local.command: imports the library lxml"),
        ({"archive/tar.py": "import lxml.etree"}, "archive.tar: imports the library lxml"),
        ({"errors.py": "import pydantic"}, "errors: imports the library pydantic"),
        # The standard library.
        *(({"broker/plan.py": f"import {name}"}, f"broker.plan: imports {name.split('.')[0]}")
          for name in ["tarfile", "zlib", "gzip", "bz2", "lzma", "zipfile", "xml.etree.ElementTree",
                       "subprocess", "ctypes", "multiprocessing", "shutil", "tempfile", "pickle",
                       "importlib", "codecs", "runpy", "marshal"]),
        ({"broker/link.py": "def f():\n    try:\n        from lzma import x\n    except E: pass"},
         "broker.link: imports lzma"),
        ({"broker/link.py": "import ctypes"}, "broker.link: imports ctypes"),
        ({"worker/daemon.py": "import importlib.util"}, "worker.daemon: imports importlib"),
        ({"archive/tar.py": "import tempfile"}, "archive.tar: imports tempfile"),
        # What runs other code.
        *(({"local/command.py": f"{name}('x')"}, f"local.command: calls {name}")
          for name in ["eval", "exec", "__import__", "compile"]),
        ({"archive/tar.py": "f = __import__"}, "archive.tar: calls __import__"),
        ({"archive/tar.py": "import builtins\nbuiltins.eval(x)"}, "archive.tar: uses .eval"),
        ({"worker/daemon.py": "import os\nos.system('tar')"}, "worker.daemon: uses .system"),
        ({"local/worker_process.py": "asyncio.create_subprocess_shell('tar')"},
         "local.worker_process: uses .create_subprocess_shell"),
        ({"broker/plan.py": "asyncio.create_subprocess_exec('tar')"},
         "broker.plan: uses .create_subprocess_exec"),
        ({"qubes/host.py": "os.posix_spawn('tar')"}, "qubes.host: uses .posix_spawn"),
        # What one module may do, no other may, and it may do no more.
        ({"local/command.py": "os.execv('tar', [])"}, "local.command: uses .execv"),
        ({"broker/stock.py": "os.execv('tar', [])"}, "broker.stock: uses .execv"),
        ({"cli/qvm_backup_restore/more.py": "os.execv('tar', [])"},
         "cli.qvm_backup_restore.more: uses .execv"),
        ({"cli/qvm_backup_restore.py": "os.execve('tar', [], {})"}, "cli.qvm_backup_restore: uses .execve"),
        ({"cli/qvm_backup_restore.py": "os.posix_spawn('tar')"}, "cli.qvm_backup_restore: uses .posix_spawn"),
        ({"local/command.py": "from os import execv\nexecv('tar', [])"}, "local.command: imports os.execv"),
        ({"cli/qvm_backup_restore.py": "from os import posix_spawn as harmless"},
         "cli.qvm_backup_restore: imports os.posix_spawn"),
    ],
)  # fmt: skip
def test_a_violation_is_seen(tmp_path: Path, changes: dict[str, str], expected: str) -> None:
    assert expected in violations(tree(tmp_path, changes))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import tarfile", "tarfile, asked for by qubes_restore_svc.local.command"),
        ("import xml.etree.ElementTree", "xml.etree, asked for by qubes_restore_svc.local.command"),
        ("from qubes_restore_svc.worker import daemon",
         "qubes_restore_svc.worker, asked for by qubes_restore_svc.local.command"),
        ("import bz2", "bz2, asked for by qubes_restore_svc.local.command"),
        ("import shutil", "lzma, asked for by qubes_restore_svc.local.command"),
        ("__import__('ta' + 'rfile')", "tarfile, asked for by qubes_restore_svc.local.command"),
    ],
)  # fmt: skip
def test_a_violation_is_seen_at_run_time(tmp_path: Path, source: str, expected: str) -> None:
    root = tree(tmp_path, {"local/command.py": source, "worker/daemon.py": ""})
    assert expected in run_time_violations(loaded_by(f"{PACKAGE}.local.command", root=root))
