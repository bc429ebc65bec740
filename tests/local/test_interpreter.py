"""Which files the sandbox shows, and that the worker finds its modules however the package is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qubes_restore_svc
from qubes_restore_svc.kdf.engine import best_engine
from qubes_restore_svc.local import interpreter
from qubes_restore_svc.local.interpreter import needed_paths, same_layout, worker_command, worker_engine


def _binds(options: list[str]) -> list[str]:
    return [options[i + 1] for i in range(0, len(options), 3) if options[i] == "--ro-bind"]


def _links(options: list[str]) -> dict[str, str]:
    return {options[i + 2]: options[i + 1] for i in range(0, len(options), 3) if options[i] == "--symlink"}


def test_a_place_is_bound_under_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert same_layout([f"{tmp_path}/a"]) == ["--ro-bind", f"{tmp_path}/a", f"{tmp_path}/a"]


def test_what_lies_in_a_bound_place_is_not_bound_again(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a-c").mkdir()
    options = same_layout([f"{tmp_path}/a/b", f"{tmp_path}/a", f"{tmp_path}/a-c"])
    assert _binds(options) == [f"{tmp_path}/a", f"{tmp_path}/a-c"]


def test_every_link_on_the_way_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "versions/3.11.7/bin").mkdir(parents=True)
    (tmp_path / "versions/3.11.7/bin/python").touch()
    (tmp_path / "versions/3.11").symlink_to("3.11.7")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(tmp_path / "versions/3.11/bin/python")
    (tmp_path / "bin/python3").symlink_to("../bin/python")
    options = same_layout([f"{tmp_path}/bin/python3"])
    assert _binds(options) == [f"{tmp_path}/versions/3.11.7/bin/python"]
    assert _links(options) == {
        f"{tmp_path}/bin/python3": "../bin/python",
        f"{tmp_path}/bin/python": f"{tmp_path}/versions/3.11/bin/python",
        f"{tmp_path}/versions/3.11": "3.11.7",
    }


def test_a_link_inside_of_a_bound_place_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "lib/link").symlink_to("../elsewhere")
    options = same_layout([f"{tmp_path}/lib", f"{tmp_path}/lib/link"])
    assert _binds(options) == [f"{tmp_path}/elsewhere", f"{tmp_path}/lib"]
    assert _links(options) == {}


def test_nothing_is_shown_for_loops_dead_links_and_the_root(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    (tmp_path / "dead").symlink_to("nowhere")
    (tmp_path / "root").symlink_to("/")
    paths = [f"{tmp_path}/{name}" for name in ("loop", "one", "dead", "root", "absent")]
    assert _binds(same_layout([*paths, "/"])) == []


def test_no_home_and_no_working_directory_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", os.getcwd(), str(Path.home()), "/", *sys.path])
    bound = _binds(same_layout(needed_paths()))
    for place in (Path.home(), Path.cwd(), Path("/")):
        assert not any(place.is_relative_to(path) for path in bound)


def test_this_package_comes_before_an_installed_copy_and_after_the_standard_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent = str(Path(qubes_restore_svc.__path__[0]).parent)
    monkeypatch.setattr(sys, "path", ["", "/stdlib", "relative", "/x/site-packages", "/other"])
    assert interpreter._module_path() == ["/stdlib", parent, "/x/site-packages", "/other"]
    monkeypatch.setattr(sys, "path", ["/x/site-packages", parent])
    assert interpreter._module_path() == ["/x/site-packages", parent]


def test_the_worker_is_found_from_any_directory_and_without_an_environment() -> None:
    done = subprocess.run(
        [*worker_command(), "--help"], env={}, cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--archive-fd" in done.stdout


# --- What derives the keys: asked of the worker, and believed only if it is a name -----------------------


async def test_the_worker_says_what_it_derives_keys_with() -> None:
    assert await worker_engine() == best_engine().name


@pytest.mark.parametrize(
    "program", ["import sys; sys.exit(1)", "print()", "print('\\x1b[2J')", "print('ä')", "print('a\\nb')"]
)
async def test_anything_but_a_name_is_not_repeated(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "worker_command", lambda: [sys.executable, "-c", program])
    assert await worker_engine() is None


async def test_a_worker_that_cannot_be_started_or_hangs_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interpreter, "worker_command", lambda: ["/nonexistent/python"])
    assert await worker_engine() is None
    monkeypatch.setattr(interpreter, "_ENGINE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(
        interpreter, "worker_command", lambda: [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    assert await worker_engine() is None
