"""The backups that are restored."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.fixtures import REPOSITORY

from . import samples
from .samples import make_sample, scaled, shared_tool


def test_the_default_size_is_the_backup_of_a_gigabyte() -> None:
    assert scaled(1024) == {"work": (2048, 0.5), "vault": (1024, 0.3), "tiny": (64, 0.05)}


def test_other_sizes_are_scaled_and_no_volume_vanishes() -> None:
    assert scaled(256) == {"work": (512, 0.5), "vault": (256, 0.3), "tiny": (16, 0.05)}
    assert scaled(1) == {"work": (2, 0.5), "vault": (1, 0.3), "tiny": (1, 0.05)}


def test_a_sample_is_written_once_and_has_its_expectation_beside_it(tmp_path: Path) -> None:
    sample = make_sample(tmp_path, 2, 4, "own")
    assert list(sample.expected.volumes) == ["work/private", "vault/private", "tiny/private"]
    assert sample.expected.volumes["work/private"].size == 4 << 20
    assert sample.size == sample.backup.stat().st_size > 1 << 20
    before = sample.backup.stat().st_mtime_ns
    assert make_sample(tmp_path, 2, 4, "own") == sample
    assert sample.backup.stat().st_mtime_ns == before


def test_samples_that_differ_have_different_names(tmp_path: Path) -> None:
    made = {make_sample(tmp_path, size, log_n, "own").backup for size in (1, 2) for log_n in (3, 4)}
    assert len(made) == 4


def test_a_sample_that_was_broken_off_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_off(target: Path, *_: object) -> None:
        target.write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(samples, "_write_ourselves", broken_off)
        make_sample(tmp_path, 1, 4, "own")
    assert make_sample(tmp_path, 1, 4, "own").size > len("half of it")
    assert not list(tmp_path.glob("*.partial*"))


def test_the_shared_tool_lies_beside_the_clone_and_needs_its_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shared_tool(tmp_path) is None
    tool = tmp_path / "shared" / "tools" / "make_backup.py"
    tool.parent.mkdir(parents=True)
    tool.touch()
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    assert shared_tool(tmp_path) == tool
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "scrypt" else program)
    assert shared_tool(tmp_path) is None


def test_without_the_shared_tool_the_own_writer_is_used_unless_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "shared_tool", lambda: None)
    assert "own" in make_sample(tmp_path, 1, 4, "auto").backup.name
    with pytest.raises(SystemExit):
        make_sample(tmp_path, 1, 4, "shared")


@pytest.mark.skipif(shared_tool(REPOSITORY.parent) is None, reason="the shared tool is not beside this clone")
def test_the_shared_tool_writes_the_same_qubes(tmp_path: Path) -> None:
    sample = make_sample(tmp_path, 1, 10)
    assert "shared" in sample.backup.name
    facts = json.loads(sample.backup.with_name(sample.backup.name + ".json").read_text())
    assert {name: volume["size"] >> 20 for name, volume in facts["volumes"].items()} == {
        "work/private": 2,
        "vault/private": 1,
        "tiny/private": 1,
    }
