"""Which files are wanted, and how the stages of a qube move."""

import threading

import pytest

from qubes_restore_svc.archive.qubes_xml import BackupQube
from qubes_restore_svc.errors import BadImage, MissingVolume, SkippedOnRequest
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.names import VmClass, VolumeName
from qubes_restore_svc.worker.selection import SelectedQube, Selection, Stage

from .support import PATIENCE_S, in_thread, join


def qube(name: str, path: str, *volumes: VolumeName, klass: VmClass = "AppVM") -> BackupQube:
    key = path.replace("/", "-")
    infos = tuple(m.VolumeInfo(name=volume) for volume in volumes)
    return BackupQube(m.ManifestQube(key=key, name=name, klass=klass, label="red", volumes=infos), path)


QUBES = [
    qube("work", "vm10", "private"),
    qube("vault", "vm11", "private"),
    qube("debian", "vm-templates/debian", "root", "private", klass="TemplateVM"),
    qube("dom0", "dom0-home/user", "home", klass="AdminVM"),
]


def select(*names: str) -> tuple[Selection, dict[str, SelectedQube]]:
    chosen = [found.info.key for found in QUBES if found.info.name in names]
    selection = Selection(QUBES, chosen)
    return selection, {selected.info.name: selected for selected in selection}


@pytest.mark.parametrize(
    ("file", "volume"),
    [
        ("vm10/private.img", "private"),
        ("vm-templates/debian/root.img", "root"),
        ("dom0-home/user", "home"),
        ("vm10/firewall.xml", None),
        ("vm10/notes.txt", None),
        ("vm10/whitelisted-appmenus.list", None),
    ],
)
def test_images_homes_and_settings_of_selected_qubes_are_wanted(file: str, volume: str | None) -> None:
    selection, _ = select("work", "debian", "dom0")
    assert selection.wanted(file)
    place = selection.place(file)
    assert place is not None and place.volume == volume


@pytest.mark.parametrize(
    "file",
    [
        "vm11/private.img",
        "vm11/firewall.xml",
        "vm10/icon.png",
        "vm10/empty",
        "vm10/apps.templates/x.desktop",
        "vm10/volatile.img",
        "vm10",
        "private.img",
        "qubes.xml",
        "vm-templates/private.img",
        "vm10/deeper/private.img",
        "dom0-home/user/private.img",
        "dom0-home/user/firewall.xml",
        "dom0-home/other",
    ],
)
def test_every_other_file_is_ignored(file: str) -> None:
    selection, _ = select("work", "debian", "dom0")
    assert not selection.wanted(file)
    assert list(selection.take_remarks()) == []


def test_an_image_that_nothing_promises_is_ignored_with_one_warning() -> None:
    selection, _ = select("work")
    assert not selection.wanted("vm10/root.img")
    assert not selection.wanted("vm10/root.img")
    (remark,) = selection.take_remarks()
    assert remark.key == "vm10" and "root.img" in remark.text and remark.level == "warning"
    assert list(selection.take_remarks()) == []


def test_a_file_that_comes_after_its_qube_was_closed_is_ignored_with_one_warning() -> None:
    selection, qubes = select("work")
    qubes["work"].close()
    assert not selection.wanted("vm10/private.img")
    assert not selection.wanted("vm10/private.img")
    assert [remark.text.split()[0] for remark in selection.take_remarks()] == ["private.img"]


def test_of_a_qube_that_was_given_up_nothing_is_wanted_any_more() -> None:
    selection, qubes = select("work", "vault")
    qubes["work"].give_up(BadImage("broken"))
    assert not selection.wanted("vm10/private.img")
    assert not selection.wanted("vm10/firewall.xml")
    assert selection.wanted("vm11/private.img")


def test_of_a_file_that_failed_nothing_is_wanted_any_more() -> None:
    selection, qubes = select("debian")
    qubes["debian"].spent_files.add("root.img")
    assert not selection.wanted("vm-templates/debian/root.img")
    assert selection.wanted("vm-templates/debian/private.img")


def test_the_first_reason_for_giving_a_qube_up_counts() -> None:
    _, qubes = select("work")
    qubes["work"].give_up(BadImage("broken"))
    qubes["work"].give_up(MissingVolume("gone"))
    assert qubes["work"].settings().error == m.ErrorInfo.of(BadImage("broken"))


def test_a_closed_qube_stays_closed() -> None:
    _, qubes = select("work")
    qubes["work"].close()
    qubes["work"].give_up(SkippedOnRequest("late"))
    assert qubes["work"].stage is Stage.CLOSED
    assert qubes["work"].settings().error is None


def test_a_closed_qube_keeps_none_of_its_settings() -> None:
    _, qubes = select("work")
    qubes["work"].firewall, qubes["work"].notes, qubes["work"].appmenus = (), "notes", ("a.desktop",)
    assert qubes["work"].settings().notes == "notes"
    qubes["work"].close()
    assert qubes["work"].settings() == m.QubeSettings(key="vm10")


def test_skipping_knows_only_what_was_selected() -> None:
    selection, qubes = select("work")
    selection.skip("vm11")
    selection.skip("nonsense")
    assert selection.wanted("vm10/private.img")
    selection.skip("vm10")
    assert qubes["work"].stage is Stage.GIVEN_UP


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("vm10/icon.png", "work"),
        ("vm10/private.img", "work"),
        ("dom0-home/user", "dom0"),
        ("vm11/x", None),
        ("", None),
    ],
)
def test_the_owner_of_a_file_is_the_selected_qube_in_whose_directory_it_lies(
    file: str, name: str | None
) -> None:
    selection, _ = select("work", "dom0")
    owner = selection.owner(file)
    assert (owner.info.name if owner else None) == name


def test_a_reason_that_was_there_before_the_skip_stays() -> None:
    _, qubes = select("work")
    qubes["work"].error = BadImage("broken")
    qubes["work"].give_up(SkippedOnRequest("skipped"))
    assert qubes["work"].settings().error == m.ErrorInfo.of(BadImage("broken"))


def test_a_skip_that_races_with_the_closing_never_opens_the_qube_again() -> None:
    """The thread that skips is held up between its look at the stage and its change of it."""
    selection, qubes = select("work")
    looked, closed = threading.Event(), threading.Event()

    class Slow(list[str]):
        def __bool__(self) -> bool:
            looked.set()
            closed.wait(0.2)
            return False

    qubes["work"].error = Slow()  # type: ignore[assignment] # only its truth is looked at
    thread = in_thread(lambda: selection.skip("vm10"))
    assert looked.wait(PATIENCE_S)
    qubes["work"].close()
    closed.set()
    join(thread)
    assert qubes["work"].stage is Stage.CLOSED
