"""Random changes to what an honest worker says and sends.

Whatever they are, the broker comes back in time with a report, and the report is true: the qubes that it
calls restored are there, with exactly the bytes that came for them, and no others are.
"""

import copy
import json
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qubes_restore_svc.wire.volume import MAX_RECORD
from tests.broker.fake_worker import EMPTY, VAULT, WORK, Die, Raw, Say, Script, Step, Stream, honest
from tests.broker.jobs import Outcome, run

HONEST = honest((WORK, VAULT, EMPTY))
CONTENT = {
    (qube.key, volume): image.content
    for qube in (WORK, VAULT, EMPTY)
    for volume, image in qube.volumes.items()
}

VALUES: list[object] = [
    None, True, 0, 1, -1, 4096, 49_999, 50_000, 70_000, 1 << 44, 1 << 62, 1 << 63, "", "ok", "failed",
    "skipped", "vm1", "vm2", "vm3", "work", "vault", "mine", "MINE", "../mine", ".work.partial", "root",
    "private", "home", "\x1b[2J", "0" * 64, [], {}, ["vm1"], {"kind": "cancelled", "reason": "\x1b"},
    "DispVM", "AdminVM",
]  # fmt: skip


def images(data: bytes) -> bytes | None:
    """What a stream says, read in the simplest way; None if it is not one."""
    size, position = int.from_bytes(data[12:20], "big"), 20
    if data[:12] != b"QRSVOLUM\0\0\0\1" or size > 1 << 20:
        return None
    content, count = bytearray(size), 0
    while data[position : position + 12] != b"\xff" * 8 + bytes(4):
        offset = int.from_bytes(data[position : position + 8], "big")
        length = int.from_bytes(data[position + 8 : position + 12], "big")
        piece = data[position + 12 : position + 12 + length]
        if len(piece) != length or not 0 < length <= MAX_RECORD or offset + length > size:
            return None
        content[offset : offset + length] = piece
        position, count = position + 12 + length, count + length
    return bytes(content) if data[position + 12 :] == count.to_bytes(8, "big") else None


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """The honest script after one to four changes."""
    steps: list[Step] = copy.deepcopy(list(HONEST))
    for _ in range(draw(st.integers(1, 4))):
        change = draw(st.sampled_from((_drop, _repeat, _swap, _edit, _edit, _damage, _damage, _insert)))
        change(draw, steps)
    return Script(steps)


def _index(draw: st.DrawFn, steps: list[Step]) -> int:
    return draw(st.integers(0, max(0, len(steps) - 1)))


def _drop(draw: st.DrawFn, steps: list[Step]) -> None:
    if steps:
        steps.pop(_index(draw, steps))


def _repeat(draw: st.DrawFn, steps: list[Step]) -> None:
    if steps:
        steps.insert(_index(draw, steps), steps[_index(draw, steps)])


def _swap(draw: st.DrawFn, steps: list[Step]) -> None:
    if steps:
        one, other = _index(draw, steps), _index(draw, steps)
        steps[one], steps[other] = steps[other], steps[one]


def _edit(draw: st.DrawFn, steps: list[Step]) -> None:
    """Put another value somewhere in a message."""
    said = [step for step in steps if isinstance(step, Say)]
    if not said:
        return
    place: object = draw(st.sampled_from(said)).message
    while True:
        assert isinstance(place, dict | list)
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
            # A value of its own: the next change may go inside it.
            place[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
            return
        place = inner


def _damage(draw: st.DrawFn, steps: list[Step]) -> None:
    """Change, cut or lengthen a stream, mostly where it is not just data."""
    streams = [index for index, step in enumerate(steps) if isinstance(step, Stream)]
    if not streams:
        return
    index = draw(st.sampled_from(streams))
    step = steps[index]
    assert isinstance(step, Stream)
    data = bytearray(step.data)
    at = draw(st.sampled_from((0, 8, 11, 19, 20, 27, 31, 32, len(data) - 20, len(data) - 1, len(data))))
    at = min(max(at, 0), len(data))
    piece = draw(st.binary(max_size=8))
    how = draw(st.sampled_from(("change", "cut", "insert")))
    if how == "cut":
        del data[at:]
    else:
        data[at : at + (len(piece) if how == "change" else 0)] = piece
    steps[index] = Stream(step.key, step.volume, bytes(data), keep_open=draw(st.booleans()))


def _insert(draw: st.DrawFn, steps: list[Step]) -> None:
    what: tuple[Step, ...] = (Die(), Raw(b"\0\0\0\0"), Raw(b"\0\0\0\x02{}"), Raw(b"\0\0"))
    steps.insert(_index(draw, steps), draw(st.sampled_from(what)))


def streamed(script: Script) -> dict[tuple[str, str], set[bytes | None]]:
    """For each volume, what the script streams for it."""
    found: dict[tuple[str, str], set[bytes | None]] = {}
    for step in script:
        if isinstance(step, Stream):
            found.setdefault((step.key, step.volume), set()).add(images(step.data))
    return found


def check_truth(outcome: Outcome, script: Script, target: Path) -> None:
    there = {path.name for path in target.iterdir()} - {"mine"}
    assert there == {name for name, what in outcome.outcomes.items() if what == "restored"}
    sent = streamed(script)
    for name in there:
        record = json.loads((target / name / "qube.json").read_text())
        assert record["name"] == name
        report = outcome.qube(name)
        assert {path.name for path in (target / name).iterdir()} == {
            "qube.json",
            *(f"{volume.name}.img" for volume in report.volumes),
        }
        for volume in report.volumes:
            content = (target / name / f"{volume.name}.img").read_bytes()
            assert (volume.outcome, volume.size) == ("ok", len(content))
            assert any(
                content in images for (_, sent_name), images in sent.items() if sent_name == volume.name
            )
    assert (target / "mine" / "private.img").read_bytes() == b"precious"
    if outcome.status == 0:
        assert outcome.report.error is None
        assert set(outcome.outcomes.values()) == {"restored"}
    else:
        assert outcome.status == (3 if there else 1)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=scripts())
def test_no_change_to_what_a_worker_does_makes_the_report_untrue(script: Script) -> None:
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory)
        (target / "mine").mkdir()
        (target / "mine" / "private.img").write_bytes(b"precious")
        outcome = run(script, target, stall_s=0.15, thorough=False)
        check_truth(outcome, script, target)


def test_the_check_itself_finds_a_volume_that_is_not_what_was_sent(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "private.img").write_bytes(b"precious")
    outcome = run(HONEST, tmp_path)
    check_truth(outcome, HONEST, tmp_path)
    assert {key: {content} for key, content in CONTENT.items()} == streamed(HONEST)
    (tmp_path / "work" / "private.img").write_bytes(bytes(70_000))
    try:
        check_truth(outcome, HONEST, tmp_path)
    except AssertionError:
        return
    raise AssertionError("nothing was found")
