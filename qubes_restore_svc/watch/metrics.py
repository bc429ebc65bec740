"""What a check found, for a collector of metrics: the text format of Prometheus.

Strategy: one sample a line, of gauges only. There are moments and no ages, because the file is read for as
long as no newer one takes its place: an age is `time()` less the moment.
"""

from collections.abc import Iterator
from typing import get_args

from qubes_restore_svc.watch.documents import State, WatchReport

_PREFIX = "qubes_backup_"


def metrics(report: WatchReport) -> str:
    """The text of the file. Every metric has the label `place`."""
    return "".join(f"{line}\n" for line in _lines(report))


def _lines(report: WatchReport) -> Iterator[str]:
    for name, help_text, value in _gauges(report):
        yield from _head(name, help_text)
        yield f"{_PREFIX}{name}{_labels(place=report.place)} {value}"
    yield from _head("state", "1 for the state of the newest backup, 0 for the others.")
    for state in get_args(State):
        yield f"{_PREFIX}state{_labels(place=report.place, state=state)} {int(state == report.state)}"


def _gauges(report: WatchReport) -> Iterator[tuple[str, str, int]]:
    yield "good", "1 if the newest backup is whole and not too old.", int(report.state == "good")
    yield "checked_timestamp_seconds", "When the last check ended.", int(report.finished.timestamp())
    duration = int((report.finished - report.started).total_seconds())
    yield "check_duration_seconds", "How long the last check took.", duration
    yield "max_age_seconds", "How old a backup may be.", report.max_age_days * 86_400
    if report.backup_time is not None:
        yield "timestamp_seconds", "When the newest backup was made.", int(report.backup_time.timestamp())
    if report.verification is not None:
        qubes = [qube for qube in report.verification.qubes if qube.outcome != "left out"]
        sizes = [volume.size or 0 for qube in qubes for volume in qube.volumes if volume.is_whole]
        yield "image_bytes", "Size of all disk images that were verified, holes included.", sum(sizes)
        yield "qubes", "How many qubes were to be verified.", len(qubes)
        failed = sum(not qube.succeeded for qube in qubes)
        yield "failed_qubes", "How many of them are not whole.", failed


def _head(name: str, help_text: str) -> Iterator[str]:
    yield f"# HELP {_PREFIX}{name} {help_text}"
    yield f"# TYPE {_PREFIX}{name} gauge"


def _labels(**labels: str) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
