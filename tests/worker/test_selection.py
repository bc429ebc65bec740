"""Which files are wanted, and how the stages of a qube move."""

import threading

import pytest

from qubes_restore_svc.archive.members import Damage
from qubes_restore_svc.archive.qubes_xml import BackupContent, BackupQube
from qubes_restore_svc.errors import ArchiveDamaged, BadImage, MissingVolume, SkippedOnRequest
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.names import VmClass, VolumeName
from qubes_restore_svc.worker.selection import SelectedQube, Selection, Stage, might_be_wanted

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
    selection = Selection(BackupContent(tuple(QUBES), (), ()), chosen)
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
        ("vm-templates/debian/.", None),  # all of its directory, in format 3
    ],
)
def test_images_homes_and_settings_of_selected_qubes_are_wanted(file: str, volume: str | None) -> None:
    selection, _ = select("work", "debian", "dom0")
    assert selection.wanted(file)
    assert might_be_wanted(file), "and before anybody has selected them"
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


@pytest.mark.parametrize(
    ("klass", "file", "belongs"),
    [
        ("StandaloneVM", "root.img", True),
        ("StandaloneVM", "private.img", True),
        ("TemplateVM", "root.img", True),
        ("AppVM", "private.img", True),
        ("AppVM", "root.img", False),
        ("DispVM", "root.img", False),
        ("DispVM", "private.img", False),
        ("StandaloneVM", "volatile.img", False),
    ],
)
def test_an_image_that_nothing_promises_belongs_to_a_qube_of_a_class_that_keeps_it(
    klass: VmClass, file: str, belongs: bool
) -> None:
    backup = qube("win", "vm10", klass=klass)
    selection = Selection(BackupContent((backup,), (), ()), ["vm10"])
    assert selection.wanted(f"vm10/{file}") == belongs


@pytest.mark.parametrize(
    ("file", "foreign", "named"),
    [
        ("vm10/root.img", False, True),  # work is an AppVM
        ("vm10/what-is-this", False, True),
        ("vm99/private.img", False, True),
        ("dom0-home/other", False, True),
        ("vm10/private.img", True, True),  # a member that is called so, and is no chunk
        ("vm10/private.img", False, False),
        ("vm10/firewall.xml", False, False),
        ("vm10/icon.png", False, False),
        ("vm10/apps.templates/x.desktop", False, False),
        ("vm10/empty", False, False),
        ("vm11/root.img", False, False),  # vault was not selected
        ("vm11/what-is-this", False, False),
        ("vm20/private.img", False, False),  # of a qube that was refused
        ("dom0-home/user", False, False),
    ],
)
def test_what_no_qube_claims_is_named(file: str, foreign: bool, named: bool) -> None:
    selection = Selection(BackupContent(tuple(QUBES), (), (), ("vm20",)), ["vm10"])
    selection.see(file, foreign=foreign)
    log = selection.unclaimed()
    assert (log is not None and f"'{file}', which no qube in its list claims" in log.text) == named


def test_of_many_files_that_no_qube_claims_a_few_are_named_and_the_rest_counted() -> None:
    selection, _ = select("work")
    for number in range(1000):
        selection.see(f"vm99/{number}\x1b{'x' * 900}")
    log = selection.unclaimed()
    assert log is not None and "and 992 more, which no qube" in log.text
    assert len(log.text) < 1000 and log.text.replace("…", "").isascii() and "\x1b" not in log.text


@pytest.mark.parametrize(
    ("file", "matters"), [("private.img", True), ("firewall.xml", True), ("notes.txt", False)]
)
@pytest.mark.parametrize("come", [True, False])
def test_a_file_of_a_closed_qube_is_wanted_if_the_qube_is_worth_less_without_it(
    file: str, matters: bool, come: bool
) -> None:
    selection, qubes = select("work")
    if come:
        qubes["work"].come.add(file)
    qubes["work"].close()
    assert selection.wanted(f"vm10/{file}") == selection.wanted(f"vm10/{file}") == (matters and not come)
    remarks = [remark.text.split()[0] for remark in selection.take_remarks()]
    assert remarks == ([] if matters and not come else [file])


def damage(name: str) -> Damage:
    return Damage(4096, 9216, "a wrong checksum", name.encode("latin-1"))


@pytest.mark.parametrize(
    ("name", "doubts"),
    [
        ("vm11/firewall.xml.000.enc", {"vault": {"firewall.xml"}, "work": {"firewall.xml"}}),  # a bit apart
        ("vm1\xb1/private.img.000.enc", {"vault": {"private.img"}}),
        ("vm11o`rivate.img.000.enc", {"work": {""}}),  # two bits: it could be anything
        ("vm11oprivate.img.000.enc", {"vault": {"private.img"}}),
        ("vm11/private.img.000.enc", {"vault": {"private.img"}, "work": {"private.img"}}),
        ("vm-templates/debian/root.img.007.enc", {"debian": {"root.img"}}),
        ("vm11/empty.000.enc", {}),
        ("vm11/root.img.000.enc", {}),  # of an AppVM
        ("", {"work": {""}}),
        ("\xff\xfe", {"work": {""}}),
    ],
)
def test_damage_raises_doubts_about_what_its_header_names_but_for_a_bit(
    name: str, doubts: dict[str, set[str]]
) -> None:
    selection, qubes = select("work", "vault", "debian", "dom0")
    selection.doubt(damage(name), "vm10/private.img")
    assert {name: set(qube.doubts) for name, qube in qubes.items() if qube.doubts} == doubts


def test_a_doubt_is_settled_by_the_file_that_comes() -> None:
    selection, qubes = select("work")
    selection.doubt(damage("vm10/firewall.xml.000.enc"), "vm10/private.img")
    qubes["work"].come.add("firewall.xml")
    qubes["work"].settle_doubts()
    assert qubes["work"].error is None
    selection.doubt(damage("vm10/notes.txt.000.enc"), "vm10/firewall.xml")
    qubes["work"].settle_doubts()
    assert isinstance(qubes["work"].error, ArchiveDamaged)
    assert "from byte 4096 to 9216" in qubes["work"].error.reason


def test_damage_of_what_was_not_selected_raises_no_doubts() -> None:
    selection, qubes = select("work")
    selection.doubt(damage("vm-templates/debian/root.img.000.enc"), "vm10/private.img")
    selection.doubt(damage(""), "vm11/private.img")
    assert not qubes["work"].doubts


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
