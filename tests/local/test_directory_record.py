"""Names in the directory, the record, and what is removed as a killed restore's."""

import json
import os
from pathlib import Path

import pytest

from qubes_restore_svc import __version__
from qubes_restore_svc.broker.image_directory import partial_name
from qubes_restore_svc.errors import BadMetadata, HostFailed
from qubes_restore_svc.local.directory import check_name, clear_unfinished, record
from qubes_restore_svc.wire.messages import ErrorInfo, FirewallRule, QubeSettings
from qubes_restore_svc.wire.report import VolumeReport
from tests.local.sample_qubes import new_qube, settings


def make_partial(path: Path, *files: str) -> Path:
    path.mkdir()
    for file in files:
        (path / file).write_text("data")
    return path


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".work",
        "a/b",
        "/etc",
        "../x",
        "work\n",
        "\nwork",
        "a\0b",
        "x" * 32,
        "1st",
        "-f",
        "ö",
        "a b",
    ],
)
def test_a_name_that_could_leave_its_place_is_refused(name: str) -> None:
    with pytest.raises(HostFailed):
        check_name(name)


def test_a_refused_name_is_shown_without_its_control_characters() -> None:
    with pytest.raises(HostFailed) as caught:
        check_name("\x1b[2J" + "x" * 5000)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["a", "dom0", "Work_2-b", "x" * 31])
def test_a_name_that_is_accepted_is_recognised_as_a_leftover(
    directory: int, tmp_path: Path, name: str
) -> None:
    check_name(name)
    make_partial(tmp_path / partial_name(name))
    assert clear_unfinished(directory) == ((partial_name(name),), ())


def test_leftovers_with_our_files_are_removed(directory: int, tmp_path: Path) -> None:
    make_partial(tmp_path / ".b.partial", "private.img", "root.img", "home.tar", "qube.json")
    make_partial(tmp_path / ".a.partial")
    make_partial(tmp_path / "c", "private.img")
    assert clear_unfinished(directory) == ((".a.partial", ".b.partial"), ())
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize(
    "name",
    [".a.partial.bak", "a.partial", "..partial", ".a.partial\n", ".a b.partial", ".a.PARTIAL", ".1.partial"],
)
def test_other_names_are_left_alone(directory: int, tmp_path: Path, name: str) -> None:
    make_partial(tmp_path / name, "private.img")
    assert clear_unfinished(directory) == ((), ())
    assert (tmp_path / name / "private.img").exists()


def test_a_leftover_with_a_file_of_somebody_else_is_kept_whole(directory: int, tmp_path: Path) -> None:
    partial = make_partial(tmp_path / ".a.partial", "private.img", "thesis.odt")
    assert clear_unfinished(directory) == ((), (".a.partial",))
    assert sorted(os.listdir(partial)) == ["private.img", "thesis.odt"]


def test_a_symbolic_link_with_a_leftovers_name_is_not_followed(directory: int, tmp_path: Path) -> None:
    elsewhere = make_partial(tmp_path / "elsewhere", "private.img")
    (tmp_path / ".a.partial").symlink_to("elsewhere")
    assert clear_unfinished(directory) == ((), (".a.partial",))
    assert (elsewhere / "private.img").exists()


def test_a_leftover_that_holds_a_link_or_a_directory_is_kept(directory: int, tmp_path: Path) -> None:
    (make_partial(tmp_path / ".a.partial", "qube.json") / "private.img").symlink_to("/etc/passwd")
    (make_partial(tmp_path / ".b.partial", "qube.json") / "private.img").mkdir()
    (tmp_path / ".c.partial").write_text("a file")
    assert clear_unfinished(directory) == ((), (".a.partial", ".b.partial", ".c.partial"))
    assert (tmp_path / ".a.partial" / "qube.json").exists()
    assert (tmp_path / ".b.partial" / "qube.json").exists()
    assert (tmp_path / ".c.partial").exists()


def rule(**fields: str) -> dict[str, str | None]:
    """A firewall rule as JSON."""
    return dict.fromkeys(FirewallRule.model_fields) | fields


def test_the_record_holds_everything_that_the_backup_says() -> None:
    qube = new_qube("work-2", warnings=("no such template",))
    volumes = [VolumeReport(name="private", outcome="ok", size=1 << 40, fsverity="f" * 64)]
    content = record(qube, settings(), {"private": 1 << 40}, volumes).text()
    assert json.loads(content) == {
        "type": "qube",
        "schema_version": 1,
        "tool_version": __version__,
        "backup_id": "20260101T010203-1234",
        "key": "vm10",
        "name": "work-2",
        "name_in_backup": "work",
        "class": "AppVM",
        "label": "blue",
        "template": "fedora-42",
        "netvm": "",
        "properties": {"memory": "400", "autostart": "True"},
        "features": {"gui": "1"},
        "tags": ["audio", "zoo"],
        "devices": [],
        "home_user": None,
        "backup_size": 0,
        "firewall": [rule(action="accept", dsthost="example.org"), rule(action="drop")],
        "notes": "naïve\nnotes",
        "appmenus": ["firefox.desktop"],
        "volumes": [
            {
                "name": "private",
                "size": 1 << 40,
                "file": "private.img",
                "fsverity": "f" * 64,
                "sha256": None,
            }
        ],
        "complete": True,
        "warnings": ["no such template"],
    }


def test_the_record_is_indented_utf_8_that_begins_with_what_it_is() -> None:
    text = record(new_qube(), settings(), {"root": 1, "private": 2}).text()
    assert "naïve" in text
    assert text.startswith('{\n  "type": "qube",\n  "schema_version": 1,\n  "tool_version": "')
    assert text.endswith("\n}\n")


def test_settings_that_could_not_be_had_are_null_and_a_warning() -> None:
    error = ErrorInfo.of(BadMetadata("firewall.xml is malformed"))
    content = json.loads(record(new_qube(), QubeSettings(key="vm10", error=error), {}).text())
    assert content["firewall"] is content["notes"] is content["appmenus"] is None
    assert "firewall.xml is malformed" in content["warnings"][0]


def test_no_rules_are_not_the_same_as_unknown_rules() -> None:
    content = json.loads(record(new_qube(), QubeSettings(key="vm10", firewall=(), appmenus=()), {}).text())
    assert content["firewall"] == content["appmenus"] == []


def test_a_warning_that_is_not_quite_unicode_still_gives_valid_json() -> None:
    content = record(new_qube(warnings=("/media/\udcff",)), settings(), {}).text().encode()
    assert json.loads(content)["warnings"] == ["/media/\ufffd"]
