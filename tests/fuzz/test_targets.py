"""Every fuzz target takes its seeds, withstands a few hundred mutations of them, and would tell a finding."""

import pytest

from .__main__ import main
from .mutator import inputs
from .targets import TARGETS, Target

RUNS = 150


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_parser_takes_its_seeds_and_refuses_or_takes_what_comes_of_them(target: Target) -> None:
    assert all(target.run(seed) for seed in target.seeds())
    mutations = inputs(target.seeds(), target.words, 7)
    for _ in range(RUNS):
        target.run(next(mutations))


def test_the_same_seed_gives_the_same_inputs() -> None:
    first, second = (inputs([b"abcdef" * 9], [b"word"], 5) for _ in range(2))
    found = [next(first) for _ in range(100)]
    assert found == [next(second) for _ in range(100)]
    assert len(set(found)) > 80


def test_what_a_parser_may_not_raise_is_a_finding_that_is_kept(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("fuzz"))

    def parse(data: bytes) -> None:
        if len(data) > 3:
            raise IndexError("past the end")

    monkeypatch.setitem(TARGETS, "broken", Target("broken", parse, lambda: [b"abc"]))
    assert main(["--plain", "--runs", "500", "broken"]) == 1
    said = capsys.readouterr().out
    assert "IndexError: past the end" in said and "build/fuzz/broken-" in said
    assert main(["--plain", "--runs", "50", "text"]) == 0
