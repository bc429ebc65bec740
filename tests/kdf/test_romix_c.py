"""The C sources of the scrypt engine, without Python and under the sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest

import qubes_restore_svc.kdf

SOURCES = Path(qubes_restore_svc.kdf.__file__).parent / "_scrypt"
CHECK = Path(__file__).parent / "romix_check.c"


@pytest.mark.parametrize("sanitizer", ["address,undefined", None])
def test_every_kernel_gives_the_vectors_of_the_rfc_and_stays_in_its_memory(
    sanitizer: str | None, tmp_path: Path
) -> None:
    checked = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer is not None else []
    options = ["-O1", "-g", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-Wl,--wrap=munmap", f"-I{SOURCES}"]
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    if shutil.which("cc") is None or compile_c([empty], checked, tmp_path / "empty").returncode != 0:
        pytest.skip("there is no C compiler here, or it lacks the sanitizer")
    program = tmp_path / "romix_check"
    sources = [path for path in SOURCES.glob("*.c") if not path.name.startswith("python_")]

    built = compile_c([CHECK, *sources], [*options, *checked], program)
    assert built.returncode == 0, built.stderr

    ran = subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)

    assert (ran.returncode, ran.stderr) == (0, "")
    assert "portable" in ran.stdout.split()


def compile_c(sources: list[Path], options: list[str], program: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["cc", *options, "-o", program, *sources], capture_output=True, text=True, check=False, timeout=300
    )
