"""The command, and one quick run of everything."""

import json
from pathlib import Path

import pytest

from . import processes, shapes, sides
from .__main__ import SCENARIOS, main, parse
from .model import MEASURED_CORES


def test_all_scenarios_run_unless_some_are_named_and_always_in_their_order() -> None:
    assert parse([])[0] == list(SCENARIOS)
    assert parse(["model", "compare"])[0] == ["compare", "model"]


def test_options_take_the_place_of_the_defaults_also_of_the_quick_ones() -> None:
    _, options = parse(["--memory", "700,300", "--no-manual", "--modes", "verify"])
    assert (options.memory, options.manual, options.modes) == ([700, 300], False, ["verify"])
    assert (options.size, options.rounds, options.log_n) == (1024, 3, None)
    _, quick = parse(["--quick", "--rounds", "2"])
    assert (quick.size, quick.rounds, quick.log_n) == (8, 2, 10)


@pytest.mark.parametrize(
    "arguments",
    [
        ["everything"],
        ["--modes", "list"],
        ["--rounds", "0"],
        ["--memory", "0"],
        ["--sizes", "a"],
        ["--stock", "/nonexistent"],
        ["--before", "/nonexistent"],
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        parse(arguments)
    assert refused.value.code == 2


def test_a_quick_run_measures_everything_and_keeps_what_others_have_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in {"_DATA_MIB": 8, "_CHUNKS": 200, "_QUBES": 5}.items():
        monkeypatch.setattr(shapes, name, count)
    (tmp_path / "results.json").write_text('{"earlier": 1}')
    main(["--quick", "--directory", str(tmp_path), "--size", "4", "--sizes", "1,2", "--modes", "extract"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["earlier", *SCENARIOS]
    rows = {row["mode"]: row for row in results["compare"]["rows"]}
    assert set(rows) == {"extract", *(() if sides.missing_programs() else ["manual"])}
    assert rows["extract"]["crossing_bytes"] > results["stages"]["data_bytes"]
    assert rows["extract"]["runs"][0]["measured"]["others_written"] <= 64 << 10
    assert len(results["linear"]["sizes"]) == 2
    assert results["stages"]["containers"] == {"2^10": 5}
    assert 0 < results["listing"]["bytes_from_disk"] <= 4 << 20
    small, large = results["sparse"]["rows"]
    assert (small["sample"], large["sample"]) == ("1 GiB", "100 GiB")
    assert 8 << 20 <= large["runs"][0]["waited_written"] < 9 << 20  # the data, and nothing for the holes
    assert [row["sample"] for row in results["shapes"]["rows"]] == ["large chunks", "200 chunks", "5 qubes"]
    there = [row["cores"] for row in results["cores"]["rows"] if row["measured_s"] is not None]
    assert there == [count for count in MEASURED_CORES if count <= processes.cores()]
    assert capsys.readouterr().out.count("\n| ---") == 13  # tables, on standard output
