"""A worker that the archive has taken over: it speaks the protocol, and lies.

Each lie is one change to what an honest worker does. In all of them the broker must end the session soon,
leave the directory as it was except for qubes that were complete before the lie, say what it refused, and
never claim success. (`jobs.run` checks that nothing else is left.) Lies in a volume's stream are in
`test_hostile_stream`.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.messages import TRANSITIONS, State
from tests.broker.fake_worker import (
    VAULT,
    WORK,
    HangUp,
    Json,
    Raw,
    Say,
    Script,
    honest,
    manifest,
    renamed,
)
from tests.broker.jobs import Outcome, check_restored, listing, run
from tests.support.wire import frame

Lie = Callable[[Script], Script]

ESCAPES = "\x1b[2J\x1b]0;evil\x07\r\n\x00\u202e\u200b\x9b31m"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A directory that holds something already."""
    path = tmp_path / "restored"
    (path / "mine").mkdir(parents=True)
    (path / "mine" / "private.img").write_bytes(b"precious")
    return path


def refused(outcome: Outcome, reason: str, *, status: int) -> None:
    """The broker said what it refused, with every qube that was not complete, and no success."""
    assert outcome.error.startswith("protocol-violation: ")
    assert reason in outcome.error
    assert outcome.status == status
    for qube in outcome.report.qubes:
        assert qube.outcome == "restored" or (qube.error is not None and qube.outcome == "failed")
    assert printable(outcome)


def printable(outcome: Outcome) -> bool:
    """Nothing that a person gets to see can steer a terminal."""
    report = json.loads(outcome.report.model_dump_json())
    return all(text.isprintable() for text in (*_texts(report), *outcome.observer.lines))


def _texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for entry in value.values() for text in _texts(entry)]
    if isinstance(value, list):
        return [text for entry in value for text in _texts(entry)]
    return [value] if isinstance(value, str) else []


def ready(key: str, volume: str, size: int = 0) -> Say:
    return Say({"type": "volume_ready", "key": key, "volume": volume, "image_size": size})


def settings(key: str, **fields: object) -> Say:
    return Say({"type": "qube_settings", "key": key, **fields})


def taken_back(key: str) -> Say:
    return Say({"type": "qube_incomplete", "key": key, "error": {"kind": "bad-archive", "reason": "late"}})


# --- Frames --------------------------------------------------------------------------------------

FRAMES: dict[str, tuple[bytes, str]] = {
    "of no bytes": (struct.pack("!I", 0), "a frame of 0 bytes"),
    "larger than any": (struct.pack("!I", (4 << 20) + 1), "a frame of 4194305 bytes"),
    "as large as can be": (struct.pack("!I", 0xFFFFFFFF), "a frame of 4294967295 bytes"),
    "not JSON": (frame(b"\x80garbage"), "not JSON"),
    "not UTF-8": (frame(b'{"type": "log", "level": "info", "text": "\xff"}'), "not JSON"),
    "nested a thousandfold": (frame(b"[" * 60_000), "not JSON, or nested too deeply"),
    "not an object": (frame(b'["progress"]'), "not a JSON object"),
    "a key twice": (frame(b'{"type": "progress", "archive_bytes": 1, "archive_bytes": 2}'), "stands twice"),
    "no type": (frame(b'{"archive_bytes": 1}'), "does not validate"),
    "an unknown type": (frame(b'{"type": "exec", "command": "id"}'), "unknown type"),
    "a broker's type": (frame(b'{"type": "skip_qube", "key": "vm1"}'), "unknown type"),
    "an unknown key": (frame(b'{"type": "progress", "archive_bytes": 1, "x": 1}'), "does not validate"),
    "a text for a number": (frame(b'{"type": "progress", "archive_bytes": "1"}'), "does not validate"),
    "a fraction": (frame(b'{"type": "progress", "archive_bytes": 1.0}'), "not an integer"),
    "a negative number": (frame(b'{"type": "progress", "archive_bytes": -1}'), "does not validate"),
    "a number past 2^63": (frame(b'{"type": "progress", "archive_bytes": 9223372036854775808}'), "validate"),
    "a text too long": (
        frame(json.dumps({"type": "log", "level": "info", "text": "x" * 1001}).encode()),
        "does not validate",
    ),
}


@pytest.mark.parametrize("where", ["before the manifest", "while streaming"])
@pytest.mark.parametrize("what", FRAMES)
def test_a_frame_that_is_not_a_message_ends_the_session(target: Path, what: str, where: str) -> None:
    data, reason = FRAMES[what]
    before, script = listing(target), honest()
    if where == "before the manifest":
        outcome = run(script.until(1, Raw(data)), target)
        refused(outcome, reason, status=1)
        assert listing(target) == before
    else:
        outcome = run(script.before(script.find("volume_done", "vm2", "root"), Raw(data)), target)
        refused(outcome, reason, status=3)
        assert listing(target).items() >= before.items()
        assert outcome.outcomes == {"work": "restored", "vault": "failed"}


def test_a_frame_within_the_manifests_limit_is_too_large_once_the_manifest_has_come(target: Path) -> None:
    script = honest()
    large = Raw(struct.pack("!I", (2 << 20) + 1))
    outcome = run(script.before(script.find("volume_ready", "vm2", "root"), large), target)
    refused(outcome, "a frame of 2097153 bytes", status=3)


@pytest.mark.parametrize("length", [0, 2, 4, 30])
def test_a_message_that_breaks_off_is_a_lost_worker(target: Path, length: int) -> None:
    script = honest()
    part = Raw(frame(json.dumps({"type": "finished", "archive_bytes": 1}).encode())[:length])
    outcome = run(script.until(script.find("finished"), part, HangUp()), target)
    assert outcome.error.startswith("worker-lost: the worker hung up")
    assert outcome.status == 3
    assert outcome.outcomes == {"work": "restored", "vault": "restored"}


# --- Messages at the wrong time ------------------------------------------------------------------

_HASH = "0" * 64
MESSAGES: dict[type[m.Message], Json] = {
    m.Manifest: manifest([WORK, VAULT]),
    m.VolumeReady: {"type": "volume_ready", "key": "vm2", "volume": "private", "image_size": 1},
    m.VolumeDone: {
        "type": "volume_done",
        "key": "vm2",
        "volume": "root",
        "outcome": "ok",
        "image_size": 0,
        "data_bytes": 0,
        "fsverity": _HASH,
    },
    m.QubeIncomplete: {"type": "qube_incomplete", "key": "vm1", "error": {"kind": "error", "reason": "?"}},
    m.QubeSettings: {"type": "qube_settings", "key": "vm2"},
    m.Finished: {"type": "finished", "archive_bytes": 0},
}
#: How far the honest script is played to reach a state; what comes while it is LISTED is read after `start`.
PLACES: dict[State, Callable[[Script], int]] = {
    State.OPENING: lambda script: 1,
    State.STREAMING: lambda script: script.find("volume_ready", "vm2", "root"),
    State.VOLUME: lambda script: script.find("stream", "vm2", "root"),
}


FORBIDDEN = [
    pytest.param(state, message, id=f"{message.__name__} while {state.value}")
    for state in PLACES
    for message in MESSAGES
    if (state, message) not in TRANSITIONS
]


@pytest.mark.parametrize(("state", "message"), FORBIDDEN)
def test_a_message_at_the_wrong_time_ends_the_session(
    target: Path, state: State, message: type[m.Message]
) -> None:
    script, before = honest(), listing(target)
    outcome = run(script.until(PLACES[state](script), Say(MESSAGES[message])), target)
    refused(outcome, f"while the session is {state.value}", status=1 if state is State.OPENING else 3)
    assert listing(target).items() >= before.items()
    assert not (target / "vault").exists()


def test_what_comes_after_finished_is_not_looked_at(target: Path) -> None:
    script = honest()
    outcome = run(Script([*script, Raw(frame(b"garbage")), ready("vm2", "root", 1)]), target)
    assert outcome.status == 0
    assert outcome.outcomes == {"work": "restored", "vault": "restored"}


def test_a_failure_that_comes_right_behind_the_manifest_is_heard(target: Path) -> None:
    failure = {"type": "failed", "error": {"kind": "archive-unreadable", "reason": "the medium is gone"}}
    both = b"".join(frame(json.dumps(said).encode()) for said in (manifest([WORK]), failure))
    script = honest()
    outcome = run(script.until(1, Raw(both), HangUp()), target)
    assert outcome.error == "archive-unreadable: the medium is gone"


# --- The manifest --------------------------------------------------------------------------------


def named(name: str) -> Json:
    return manifest([renamed(WORK, name=name)])


MANIFESTS: dict[str, Json] = {
    "a path": named("../mine"),
    "an absolute path": named("/etc"),
    "a hidden name": named(".work"),
    "a partial name": named(".work.partial"),
    "an empty name": named(""),
    "a new line at the end": named("work\n"),
    "an escape sequence": named("work\x1b[2J"),
    "a name that is too long": named("w" * 32),
    "a name that Qubes keeps": named("Domain-0"),
    "a letter that looks alike": named("wоrk"),
    "dom0 as an AppVM": named("dom0"),
    "an AppVM as dom0": manifest([renamed(WORK, klass="AdminVM")]),
    "dom0 with an image": manifest([renamed(WORK, klass="AdminVM", name="dom0")]),
    "an unknown class": manifest([renamed(WORK, klass="RemoteVM")]),
    "a name twice": manifest([WORK, renamed(VAULT, name="work")]),
    "a key twice": manifest([WORK, renamed(VAULT, key="vm1")]),
    "a key that is a path": manifest([renamed(WORK, key="../vm1")]),
    "a key with a dot": manifest([renamed(WORK, key="vm1.private")]),
    "a volume twice": manifest([renamed(WORK, volumes=[{"name": "root"}, {"name": "root"}])]),
    "an unknown volume": manifest([renamed(WORK, volumes=[{"name": "../private"}])]),
    "a negative size": manifest([renamed(WORK, volumes=[{"name": "private", "size": -1}])]),
    "a feature's name with an escape": manifest([renamed(WORK, features={"a\x1b": "1"})]),
    "a tag with a new line": manifest([renamed(WORK, tags=["a\nb"])]),
    "a property's value of two lines": manifest([renamed(WORK, properties={"kernelopts": "a\nb"})]),
    "a label that is a path": manifest([renamed(WORK, label="../red")]),
    "a template with an escape": manifest([renamed(WORK, template="\x1bfedora")]),
    "another format": manifest([WORK], format=5),
    "a backup id with an escape": manifest([WORK], backup_id="\x1b"),
    "an unknown key": manifest([WORK], install=[]),
    "10,000 qubes": {
        **manifest([]),
        "qubes": [renamed(WORK, key=f"v{n}", name=f"v{n}").listed for n in range(10_000)],
    },
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_with_what_no_backup_may_hold_is_refused(target: Path, what: str) -> None:
    before = listing(target)
    outcome = run(honest().with_steps(1, Say(MANIFESTS[what])), target)
    refused(outcome, "a message ", status=1)
    assert listing(target) == before
    assert outcome.report.qubes == ()
    assert outcome.link.calls == ["restore.Session+"]


def test_a_manifest_of_more_than_4_mib_is_refused(target: Path) -> None:
    said = json.dumps(manifest([WORK])).encode()
    padded = said + b" " * ((4 << 20) + 1 - len(said))
    refused(run(honest().with_steps(1, Raw(frame(padded))), target), "a frame of 4194305 bytes", status=1)


def test_a_manifest_of_100_000_qubes_is_refused_before_it_is_read(target: Path) -> None:
    said = {**manifest([]), "qubes": [{"key": f"v{n}"} for n in range(100_000)]}
    refused(run(honest().with_steps(1, Say(said)), target), "4096 members", status=1)


def test_a_worker_cannot_overwrite_what_is_there(target: Path) -> None:
    """Not if it streams it all the same."""
    before = listing(target)
    qubes = (WORK, renamed(VAULT, name="mine"))
    outcome = run(honest(qubes, taken=["work"]), target)
    assert outcome.outcomes == {"work": "restored", "mine": "refused"}
    assert outcome.status == 3
    outcome = run(honest(qubes[1:]), target)
    assert (outcome.outcomes, outcome.status) == ({"mine": "refused"}, 1)
    assert "restore.Volume+vm2.root" not in outcome.link.calls
    assert listing(target).items() >= before.items()


def test_what_the_backup_says_of_a_qube_goes_into_its_record_and_nowhere_else(tmp_path: Path) -> None:
    target = tmp_path / "restored"
    evil = renamed(
        WORK,
        properties={"provides_network": "True", "default_user": "root; reboot"},
        features={"gui-allow-fullscreen": "1", "service.evil": "1"},
        tags=["created-by-dom0"],
        netvm="sys-firewall",
        template="fedora",
    )
    outcome = run(honest((evil,)), target)
    assert outcome.status == 0
    check_restored(target, WORK)
    assert {name: mode for name, (mode, _) in listing(target).items()} == {
        "work": "drwx------",
        "work/private.img": "-rw-------",
        "work/qube.json": "-rw-------",
    }
    record = json.loads((target / "work" / "qube.json").read_text())
    assert record["properties"] == {"provides_network": "True", "default_user": "root; reboot"}


def test_a_qube_that_could_not_be_listed_is_told_and_never_a_success(target: Path) -> None:
    error = {"kind": "cancelled", "reason": f"its label is bad{ESCAPES}", "advice": ESCAPES}
    lost = {"name": f"lost{ESCAPES}", "error": error}
    outcome = run(honest().with_steps(1, Say(manifest([WORK, VAULT], refused=[lost]))), target)
    assert outcome.status == 3
    assert [qube.outcome for qube in outcome.report.qubes] == ["restored", "restored", "refused"]
    told = outcome.report.qubes[2].error
    assert told is not None
    assert told.kind == "error"  # nobody has cancelled anything
    assert printable(outcome)


# --- Claims ---------------------------------------------------------------------------------------

R, P = ("vm2", "root"), ("vm2", "private")
CLAIMS: dict[str, tuple[Lie, str]] = {
    "a volume of a qube that is not in the backup": (
        lambda s: s.before(s.find("volume_ready", *R), ready("vm9", "root", 1)),
        "not asked for",
    ),
    "a volume that the qube does not have": (
        lambda s: s.before(s.find("volume_ready", *R), ready("vm2", "home", 1)),
        "not asked for",
    ),
    "a volume of a finished qube": (
        lambda s: s.before(s.find("volume_ready", *R), ready("vm1", "private", 1)),
        "not asked for",
    ),
    "a volume that has been sent already": (
        lambda s: s.before(s.find("volume_ready", *P), ready("vm2", "root", 50_000)),
        "not asked for",
    ),
    "a volume that had been given up": (
        lambda s: s.before(s.find("volume_ready", *R), _failed(*R)).before(
            s.find("volume_ready", *R) + 2, ready("vm2", "root", 1)
        ),
        "",
    ),
    "a volume larger than qubes.xml says": (
        lambda s: s.changed("volume_ready", *R, image_size=50_001),
        "a volume of 50001 bytes, where 50000 are allowed",
    ),
    "a volume of 2^62 bytes": (
        lambda s: s.changed("volume_ready", *R, image_size=1 << 62),
        "a volume of 4611686018427387904 bytes",
    ),
    "an answer for another volume": (
        lambda s: s.changed("volume_done", *R, volume="private"),
        "another volume than the one that was announced",
    ),
    "an answer for another qube": (lambda s: s.changed("volume_done", *R, key="vm1"), "another volume"),
    "another size in the answer": (
        lambda s: s.changed("volume_done", *R, image_size=49_999),
        "a volume of 49999 bytes, other than was announced",
    ),
    "fewer data bytes in the answer": (
        lambda s: s.changed("volume_done", *R, data_bytes=3999),
        "not what was announced and sent",
    ),
    "more data bytes in the answer": (
        lambda s: s.changed("volume_done", *R, data_bytes=4001),
        "not what was announced and sent",
    ),
    "ok without a hash": (lambda s: s.changed("volume_done", *R, fsverity=...), "validate"),
    "ok with an error": (
        lambda s: s.changed("volume_done", *R, error={"kind": "error", "reason": "?"}),
        "does not validate",
    ),
    "failed with a hash": (lambda s: s.changed("volume_done", *R, outcome="failed"), "does not validate"),
    "failed without an error": (
        lambda s: s.changed("volume_done", *R, outcome="failed", fsverity=...),
        "does not validate",
    ),
    "an outcome of its own": (lambda s: s.changed("volume_done", *R, outcome="fine"), "does not validate"),
    "ok of what was never announced": (
        lambda s: s.with_steps(s.find("volume_ready", *P), instead_of=2),
        "never announced",
    ),
    "an answer twice": (
        lambda s: s.after(s.find("volume_done", *R), s[s.find("volume_done", *R)]),
        "never announced",
    ),
    "failed after ok": (lambda s: s.after(s.find("volume_done", *R), _failed(*R)), "not any more"),
    "a qube taken back that is not over": (
        lambda s: s.before(s.find("volume_ready", *R), taken_back("vm2")),
        "a qube taken back",
    ),
    "settings before the volumes": (
        lambda s: s.before(s.find("volume_ready", *R), settings("vm2")),
        "before all of its volumes",
    ),
    "settings between the volumes": (
        lambda s: s.before(s.find("volume_ready", *P), settings("vm2")),
        "before all of its volumes",
    ),
    "settings of a qube that is not in the backup": (
        lambda s: s.before(s.find("volume_ready", *R), settings("vm9")),
        "settings of a qube that was not asked for",
    ),
    "settings twice": (
        lambda s: s.before(s.find("volume_ready", *R), settings("vm1")),
        "not any more",
    ),
    "a rule with an escape sequence": (
        lambda s: s.changed("qube_settings", "vm2", firewall=[{"action": "accept", "dsthost": "a\x1b[2J"}]),
        "does not validate",
    ),
    "a rule of its own kind": (
        lambda s: s.changed("qube_settings", "vm2", firewall=[{"action": "run"}]),
        "does not validate",
    ),
    "a menu entry that is a path": (
        lambda s: s.changed("qube_settings", "vm2", appmenus=["../x.desktop"]),
        "does not validate",
    ),
    "finished with a qube missing": (
        lambda s: s.until(s.find("volume_ready", *R), s[-1]),
        "'finished' while qubes are missing",
    ),
    "finished with a volume missing": (
        lambda s: s.until(s.find("volume_ready", *P), s[-1]),
        "'finished' while qubes are missing",
    ),
    "finished with settings missing": (
        lambda s: s.until(s.find("qube_settings", "vm2"), s[-1]),
        "'finished' while qubes are missing",
    ),
}


def _failed(key: str, volume: str) -> Say:
    error = {"kind": "bad-image", "reason": "no"}
    return Say({"type": "volume_done", "key": key, "volume": volume, "outcome": "failed", "error": error})


@pytest.mark.parametrize("what", CLAIMS)
def test_a_claim_that_is_not_open_ends_the_session(target: Path, what: str) -> None:
    lie, reason = CLAIMS[what]
    before = listing(target)
    outcome = run(lie(honest()), target)
    refused(outcome, reason, status=3)
    assert outcome.outcomes == {"work": "restored", "vault": "failed"}
    assert {name for name in listing(target) if name not in before} == {
        "work",
        "work/private.img",
        "work/qube.json",
    }
    assert listing(target).items() >= before.items()


def test_a_volume_of_a_qube_that_was_not_selected_is_not_fetched(target: Path) -> None:
    outcome = run(honest(), target, names=["work"])
    assert outcome.error.startswith("protocol-violation: a volume that was not asked for")
    assert outcome.outcomes == {"work": "restored", "vault": "left out"}
    assert outcome.link.calls == ["restore.Session+", "restore.Volume+vm1.private"]
    assert outcome.status == 3


def test_a_qube_cannot_begin_before_the_one_before_has_ended(target: Path) -> None:
    """Else a worker could make as many of them at once as there are descriptors."""
    script = honest()
    outcome = run(script.with_steps(script.find("qube_settings", "vm1")), target)
    refused(outcome, "before the end of the one before", status=1)
    assert listing(target).keys() == {"mine", "mine/private.img"}


def test_a_verify_does_not_believe_another_size_than_was_announced() -> None:
    outcome = run(honest(verify=True).changed("volume_done", *R, image_size=49_999), None)
    assert "other than was announced" in outcome.error
    assert outcome.outcomes == {"work": "verified", "vault": "failed"}


# --- Words ----------------------------------------------------------------------------------------


def test_a_flood_of_log_lines_ends_the_session(target: Path) -> None:
    script = honest()
    line = frame(b'{"type": "log", "level": "info", "text": "x"}')
    at = script.find("volume_ready", *R)
    assert run(script.before(at, Raw(line * 10_000)), target / "enough").status == 0
    refused(run(script.before(at, Raw(line * 10_001)), target / "much"), "10000 lines of log", status=3)


def test_warnings_reach_the_person_and_the_report_without_escape_sequences(target: Path) -> None:
    script = honest()
    warning: Json = {"type": "log", "level": "warning", "text": f"careful{ESCAPES}"}
    steps = [Say(warning), Say({**warning, "key": "vm2"}), Say({**warning, "key": "vm9"})] * 60
    outcome = run(script.before(script.find("volume_ready", *R), *steps).before(1, Say(warning)), target)
    assert outcome.status == 0
    assert outcome.observer.lines[0].startswith("warning: worker: careful\ufffd[2J")
    assert outcome.observer.lines[2].startswith("warning: vault: worker: careful\ufffd[2J")
    assert printable(outcome)
    assert len(outcome.qube("vault").warnings) == 60
    assert len(outcome.report.warnings) == 100


def test_what_a_worker_logs_cannot_pass_for_a_line_of_ours(target: Path) -> None:
    script = honest()
    summary = {"type": "log", "text": "2 of 2 qubes restored." + " " * 60 + "work: restored"}
    said = [Say({**summary, "level": level}) for level in ("info", "warning")]
    outcome = run(script.before(script.find("volume_ready", *R), *said).before(1, *said), target)
    line = "worker: 2 of 2 qubes restored. work: restored"
    assert outcome.observer.lines == [f"info: {line}", f"warning: {line}"] * 2
    assert outcome.report.warnings == (line, line)


def test_a_reason_of_the_workers_leaves_no_gap_on_the_screen(target: Path) -> None:
    error = {"kind": "bad-archive", "reason": "no" + " " * 200 + "2 of 2 qubes restored."}
    outcome = run(honest().until(1, Say({"type": "failed", "error": error})), target)
    assert outcome.report.error is not None
    assert outcome.report.error.reason == "no 2 of 2 qubes restored."


def test_notes_lose_their_escape_sequences(tmp_path: Path) -> None:
    target = tmp_path / "restored"
    outcome = run(honest((WORK,)).changed("qube_settings", "vm1", notes=f"a\n\tb{ESCAPES}"), target)
    assert outcome.status == 0
    notes = json.loads((target / "work" / "qube.json").read_text())["notes"]
    assert notes.startswith("a\n\tb\ufffd[2J")
    assert not set(notes) & set("\x1b\x07\r\x00\u202e\u200b\x9b")


@pytest.mark.parametrize("kind", ["bad-archive", "no-such-kind"])
def test_a_failure_with_hostile_texts_is_told_without_escape_sequences(target: Path, kind: str) -> None:
    error = {"kind": kind, "reason": ESCAPES, "qube": ESCAPES, "volume": ESCAPES, "advice": ESCAPES}
    script = honest()
    at = script.find("volume_done", *R)
    outcome = run(script.until(at, Say({"type": "failed", "error": error})), target)
    assert outcome.status == 3
    assert outcome.error.startswith("bad-archive:" if kind == "bad-archive" else "error:")
    assert printable(outcome)


@pytest.mark.parametrize("kind", ["cancelled", "usage", "protocol-violation", "worker-lost", "qube-exists"])
def test_a_worker_cannot_choose_the_exit_status_by_the_kind_of_its_error(target: Path, kind: str) -> None:
    error = {"kind": kind, "reason": "as it likes"}
    script = honest()
    at = script.find("volume_ready", *R)
    outcome = run(script.until(at, Say({"type": "failed", "error": error})), target)
    assert (outcome.status, outcome.error) == (3, "error: as it likes")
    failed = {"outcome": "failed", "error": error, "fsverity": ..., "image_size": 0, "data_bytes": 0}
    outcome = run(script.changed("volume_done", *R, **failed), target / "2", stall_s=0.5)
    assert outcome.qube("vault").error is not None
    assert outcome.qube("vault").error.kind == "error"  # type: ignore[union-attr]  # it is not None
    settled = run(script.changed("qube_settings", "vm2", error=error), target / "3")
    assert (settled.status, settled.outcomes) == (3, {"work": "restored", "vault": "failed"})
    assert settled.qube("vault").error.kind == "error"  # type: ignore[union-attr]  # it is not None
