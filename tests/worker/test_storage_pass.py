"""What is asked of a storage service: one line, of which nothing that qubes.xml says can make more."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_restore_svc.archive.qubes_xml import BackupQube
from qubes_restore_svc.errors import BadMetadata
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.worker.storage_qube import BEGINNING, paths_of, request_line

from ..support.damage import sample_backup
from .stock_storage import tar2qfile


def qube(path: str, klass: str = "AppVM") -> BackupQube:
    name = "dom0" if klass == "AdminVM" else "work"
    volumes = ({"name": "home"},) if klass == "AdminVM" else ()
    fields = {"key": "k", "name": name, "klass": klass, "label": "red", "volumes": volumes}
    return BackupQube(m.ManifestQube.model_validate(fields), path)


def names(paths: tuple[str, ...]) -> list[str]:
    """The members that the stock program sends for `paths`."""
    found: list[str] = []

    def write(data: bytes) -> None:
        text = data[32:]
        if len(data) < 200 and text.endswith(b".enc\0"):
            found.append(text[:-1].decode())

    tar2qfile(io.BytesIO(sample_backup(log_n=2).to_bytes()), paths, write)
    return found


def test_a_qube_is_asked_for_by_its_directory_and_dom0s_home_by_the_one_it_lies_in() -> None:
    qubes = [qube("vm10"), qube("appvms/work"), qube("dom0-home/user", "AdminVM")]
    assert paths_of(qubes) == ("vm10/", "appvms/work/", "dom0-home/")


def test_a_directory_brings_no_other_one_whose_name_begins_like_it() -> None:
    assert {name.split("/")[0] for name in names(paths_of([qube("vm10")]))} == {"vm10"}
    assert names(paths_of([qube("vm1")])) == []


def test_the_beginning_is_the_header_its_copy_and_qubes_xml() -> None:
    assert request_line(BEGINNING) == b"backup-header.hmac backup-header qubes.xml\n"
    assert names(BEGINNING) == ["qubes.xml.000.enc"]  # the other two do not end in .enc
    # A member counts for the first path that fits, and only when each has fitted the sender stops.
    for position, path in enumerate(BEGINNING):
        assert not any(path.startswith(earlier) for earlier in BEGINNING[:position])


@pytest.mark.parametrize(
    "path",
    [
        "", " ", "a b/", "a/\nb/", "a/\n", "-rf/", "--help/", "*/", "a?/", "[a]/", "~/", "$HOME/", "a;b/",
        "'a'/", "é/", "a\0/", "a\t/", "\\/", "x" * 301,
    ],
)  # fmt: skip
def test_a_path_that_could_be_more_than_one_place_is_not_asked_for(path: str) -> None:
    for paths in ([path], ["vm10/", path], [path, "vm10/"]):
        with pytest.raises(BadMetadata):
            request_line(paths)


def test_everything_is_never_asked_for() -> None:
    with pytest.raises(BadMetadata):
        request_line([])


@given(st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_a_line_holds_the_paths_and_nothing_else(paths: list[str]) -> None:
    try:
        line = request_line(paths)
    except BadMetadata:
        return
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert line.decode("ascii").split() == paths
