"""One volume on standard output: its bytes and nothing else, its holes in a file, and the exit status."""

import os
import shutil
import subprocess
import threading
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from qubes_restore_svc.errors import HostFailed
from qubes_restore_svc.local.command import parse_arguments
from qubes_restore_svc.local.volume_pipe import PipeSink, VolumePipe
from tests.cli.terminal import on_terminal
from tests.local.sample_qubes import new_qube, settings
from tests.support.backup_writer import BackupWriter, QubePlan, join_members
from tests.support.damage import edited, flip_bit, sample_backup, victim_chunks
from tests.support.fixtures import REPOSITORY, expectation, shared_fixture
from tests.support.format3_writer import Format3Writer
from tests.support.inner_archives import directory_tar
from tests.support.plans import sample_qube
from tests.support.reports import kept_report
from tests.system.support import command, environment, passphrase_file

FAR = 1 << 20
IMAGE = b"begin".ljust(FAR, b"\0") + b"middle".ljust(FAR, b"\0")


def write_image(output: int) -> PipeSink:
    """The image, whose end is a hole as well."""
    sink = PipeSink(output, "private")
    sink.write(0, memoryview(b"begin"))
    sink.write(FAR, memoryview(b"middle"))
    sink.finish(2 * FAR)
    return sink


@pytest.mark.parametrize(
    ("mode", "before", "after", "has_holes"),
    [
        (os.O_TRUNC, b"", IMAGE + b"!", True),
        (os.O_APPEND, b"", IMAGE + b"!", False),
        (os.O_APPEND, b"old", b"old" + IMAGE + b"!", False),
        (0, b"x" * (2 * FAR + 2), IMAGE + b"!x", False),
    ],
    ids=["new", "appended-to-nothing", "appended", "over-old-bytes"],
)
def test_a_hole_is_left_only_where_it_reads_as_zeros(
    tmp_path: Path, mode: int, before: bytes, after: bytes, has_holes: bool
) -> None:
    path = tmp_path / "image"
    path.write_bytes(before)
    output = os.open(path, os.O_WRONLY | mode)
    write_image(output)
    os.write(output, b"!")  # whoever writes next stands behind the image
    os.close(output)
    assert path.read_bytes() == after
    assert (path.stat().st_blocks * 512 < FAR) == has_holes


def test_it_begins_where_the_file_stands(tmp_path: Path) -> None:
    output = os.open(tmp_path / "image", os.O_WRONLY | os.O_CREAT)
    os.write(output, b"head")
    write_image(output)
    os.close(output)
    assert (tmp_path / "image").read_bytes() == b"head" + IMAGE
    assert (tmp_path / "image").stat().st_blocks * 512 < FAR


def test_a_write_that_waits_for_its_reader_ends_when_it_is_given_up() -> None:
    reader, output = os.pipe()
    sink = PipeSink(output, "private")
    failures: list[HostFailed] = []

    def write() -> None:
        try:
            sink.write(0, memoryview(bytes(FAR)))
        except HostFailed as error:
            failures.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    sink.abandon()
    thread.join(5)
    assert not thread.is_alive()
    assert [error.reason for error in failures] == ["it was given up"]
    os.close(reader)
    os.close(output)


def test_no_success_without_the_end_of_the_volume_and_others_are_dropped(tmp_path: Path) -> None:
    with (tmp_path / "image").open("wb") as output:
        qube = VolumePipe("private", output.fileno()).begin(new_qube())
        other = qube.create_volume("root", 10)
        other.write(0, memoryview(b"root"))
        other.finish(10)
        with pytest.raises(HostFailed, match="not complete"):
            qube.commit(settings(), None)
        qube.create_volume("private", 10).finish(10)
        assert qube.commit(settings(), None) == ()
    assert (tmp_path / "image").read_bytes() == bytes(10)


# --- The command ---------------------------------------------------------------------------------


BACKUP = sample_backup()
VICTIM = BACKUP.qubes[0].volumes["private"]


def image() -> bytes:
    """The private volume of `work`."""
    whole = bytearray(VICTIM.size)
    for offset, data in VICTIM.extents:
        whole[offset : offset + len(data)] = data
    return bytes(whole)


def with_a_flipped_bit() -> bytes:
    """The backup with a damage in the last chunk of that volume."""
    members = list(BACKUP.members())
    last = members[victim_chunks(BACKUP, members)[-1]].name
    return join_members(edited(members, last, lambda data: flip_bit(data, -100)))


def extracted(folder: Path, archive: bytes, shell: str) -> subprocess.CompletedProcess[bytes]:
    """What comes of a line in a shell, in which "$@" is the command with the backup."""
    (folder / "backup").write_bytes(archive)
    words = command("extract", folder / "backup", "--to", "-", "-p", passphrase_file(folder))
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell, "bash", *words],
        env={**environment("x"), "PYTHONPATH": str(REPOSITORY)},
        cwd=folder, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_standard_output_is_the_image_and_nothing_else(tmp_path: Path) -> None:
    line = '"$@" --volume private work | tee copy && "$@" -q --volume private work > file'
    done = extracted(tmp_path, join_members(BACKUP.members()), line)
    assert (done.returncode, done.stdout) == (0, image())
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "file").read_bytes() == image()
    assert (tmp_path / "file").stat().st_blocks * 512 < VICTIM.size
    assert done.stderr.count(b"1 of 1 qube restored.\n") == 1  # -q says nothing


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
@pytest.mark.parametrize(
    ("line", "is_damaged", "status", "said"),
    [
        ('"$@" --volume private work', True, 1, "work/private"),
        ('"$@" --volume private work | head -c 1 >/dev/null', False, 1, "has ended before it had all"),
        ('"$@" --volume root work', False, 2, "this qube has no volume root in the backup. It has: private."),
        ('"$@" --volume private work >&-', False, 2, "standard output is closed"),
    ],
)
def test_what_is_not_all_of_the_volume_is_no_success(
    tmp_path: Path, line: str, is_damaged: bool, status: int, said: str
) -> None:
    done = extracted(tmp_path, with_a_flipped_bit() if is_damaged else join_members(BACKUP.members()), line)
    assert done.returncode == status
    assert said in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    assert image().startswith(done.stdout)
    assert len(done.stdout) < VICTIM.size


TWO_VOLUMES = BackupWriter(
    [QubePlan("lone", "StandaloneVM", volumes=dict.fromkeys(("root", "private"), VICTIM)), *BACKUP.qubes],
    log_n=4,
    chunk_size=1 << 16,
    dom0_home=True,
)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
@pytest.mark.parametrize(("damaged", "wanted"), [("root", "private"), ("private", "root")])
def test_another_volume_of_the_qube_is_neither_read_nor_missed(
    tmp_path: Path, damaged: str, wanted: str
) -> None:
    members = list(TWO_VOLUMES.members())
    name = next(one.name for one in members if f"/{damaged}.img.000" in one.name)
    archive = join_members(edited(members, name, lambda data: flip_bit(data, -100)))
    done = extracted(tmp_path, archive, f'"$@" --volume {wanted} lone --report report.json')
    assert (done.returncode, done.stdout) == (0, image())
    assert "1 of 1 qube restored." in done.stderr.decode()
    report = kept_report(tmp_path / "report.json")
    (lone,) = (qube for qube in report.qubes if qube.name == "lone")
    assert [(volume.name, volume.outcome) for volume in lone.volumes] == [(wanted, "ok")]
    assert report.derivations == 12  # those of the header, of qubes.xml, and of this volume


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_another_volume_in_the_same_directory_does_not_count(tmp_path: Path) -> None:
    template = sample_qube("tpl", 1 << 16, 0.5, "TemplateVM")
    inner = directory_tar(
        "vm-templates/tpl", {f"{name}.img": template.volumes[name] for name in ("private", "root")}, {}
    )
    writer = Format3Writer([template], inner={"vm-templates/tpl/.": inner}, dom0_home=False)
    done = extracted(tmp_path, writer.to_bytes(), '"$@" --volume root tpl --report report.json')
    assert (done.returncode, sha256(done.stdout).hexdigest()) == (0, template.volumes["root"].sha256())
    (reported,) = kept_report(tmp_path / "report.json").qubes
    assert [volume.name for volume in reported.volumes] == ["root"]


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
@pytest.mark.parametrize(("qube", "status"), [("win", 0), ("work", 2)])
def test_a_volume_that_the_backups_list_leaves_out_is_found(tmp_path: Path, qube: str, status: int) -> None:
    backup = shared_fixture("hvm-root.qbackup")
    done = extracted(tmp_path, backup.read_bytes(), f'"$@" --volume root {qube}')
    assert done.returncode == status
    if status == 0:
        facts = expectation(backup).volumes[f"{qube}/root"]
        assert sha256(done.stdout).hexdigest() == facts.sha256


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_a_volume_that_is_nowhere_is_no_success(tmp_path: Path) -> None:
    whole = TWO_VOLUMES.qubes[0]
    lacking = replace(TWO_VOLUMES, qubes=[replace(whole, volumes={"private": VICTIM}), *BACKUP.qubes])
    done = extracted(tmp_path, join_members(lacking.members()), '"$@" --volume root lone')
    assert (done.returncode, done.stdout) == (1, b"")
    assert "the volume is not complete" in done.stderr.decode()


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_a_backup_that_was_cut_off_behind_the_volume_has_all_of_it(tmp_path: Path) -> None:
    members = list(TWO_VOLUMES.members())
    first = next(one.name.partition(".img.")[0] for one in members if one.name.startswith("vm"))
    other = next(place for place, one in enumerate(members) if f"{first}.img" < one.name[: len(first) + 4])
    archive = join_members(members[:other])
    done = extracted(tmp_path, archive, f'"$@" --volume {first.partition("/")[2]} lone')
    assert (done.returncode, done.stdout) == (0, image())
    assert "what else there is of it is not whole: it holds nothing of" in " ".join(
        done.stderr.decode().split()
    )


@pytest.mark.parametrize(
    "words",
    ["work --to -", "work --to dir --volume private", "--to - --volume private",
     "a b --to - --volume private", "w* --to - --volume private", "work --to - --volume data"],
)  # fmt: skip
def test_standard_output_takes_one_volume_of_one_qube(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["extract", "backup", *words.split()])
    assert ended.value.code == 2
    assert "--volume" in capsys.readouterr().err


def test_a_volume_is_not_written_to_a_terminal(tmp_path: Path) -> None:
    seen = on_terminal("extract", "/dev/null", "work", "--to", "-", "--volume", "private")
    assert seen.status == 2
    assert "a volume is not written to a terminal" in seen.raw
