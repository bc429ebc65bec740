"""Volumes in the stand-in for qubesd: which a qube has, what an import does, what is left if it fails."""

import os
import threading
import time
from io import BytesIO

import pytest
import qubesadmin
from qubesadmin import exc

from tests.emulation.qubesd import Qubesd


def test_each_class_keeps_the_volumes_that_it_should(app: qubesadmin.Qubes) -> None:
    app.add_new_vm("StandaloneVM", "alone", "red")
    kept = {
        name: {volume.name for volume in app.domains[name].volumes.values() if volume.save_on_stop}
        for name in ("fedora", "work", "alone")
    }
    assert kept == {"fedora": {"root", "private"}, "work": {"private"}, "alone": {"root", "private"}}
    volumes = app.domains["work"].volumes
    assert list(volumes) == ["root", "private", "volatile", "kernel"]
    assert {name: volume.pool for name, volume in volumes.items()} == {
        "root": "vm-pool", "private": "lvm", "volatile": "lvm", "kernel": "linux-kernel",
    }  # fmt: skip
    assert volumes["root"].snap_on_start
    assert volumes["root"].source == app.domains["fedora"].volumes["root"].vid


def test_an_import_replaces_content_and_size(qubesd: Qubesd, app: qubesadmin.Qubes) -> None:
    data = os.urandom(300_000) + bytes(1_000_000) + b"end"
    stream = BytesIO(data)
    app.domains["work"].volumes["private"].import_data_with_size(stream, len(data))
    assert stream.closed
    path = qubesd.volume_path("work", "private")
    assert path.read_bytes() == data
    assert app.domains["work"].volumes["private"].size == len(data)
    assert path.stat().st_blocks * 512 < 600_000, "zeros are left out"


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"abc" * 99, "not enough data"), (b"abc" * 101, "too much data"), (b"", "not enough")],
)
def test_an_import_of_another_size_leaves_the_volume_as_it_was(
    qubesd: Qubesd, app: qubesadmin.Qubes, data: bytes, words: str
) -> None:
    private = app.domains["work"].volumes["private"]
    private.import_data_with_size(BytesIO(b"before"), 6)
    with pytest.raises(exc.QubesException, match=words):
        private.import_data_with_size(BytesIO(data), 300)
    assert qubesd.volume_path("work", "private").read_bytes() == b"before"
    assert sorted(path.name for path in qubesd.volume_path("work", "private").parent.iterdir()) == [
        "vm-work-private"
    ]
    private.import_data_with_size(BytesIO(b"again"), 5)
    assert private.size == 5


def test_a_full_pool_breaks_an_import_and_nothing_is_left_of_it(
    qubesd: Qubesd, app: qubesadmin.Qubes
) -> None:
    private = app.domains["work"].volumes["private"]
    qubesd.limit_pool("lvm", 200_000)
    with pytest.raises(exc.QubesException, match="error copying data"):
        private.import_data_with_size(BytesIO(os.urandom(1 << 20)), 1 << 20)
    assert app.pools["lvm"].usage == 0
    private.import_data_with_size(BytesIO(bytes(1 << 20)), 1 << 20)
    qubesd.limit_pool("lvm", None)
    private.import_data_with_size(BytesIO(os.urandom(1 << 20)), 1 << 20)
    assert app.pools["lvm"].usage == 1 << 20


def test_only_one_import_at_a_time(app: qubesadmin.Qubes) -> None:
    work = app.domains["work"]
    work.qubesd_call(None, "internal.vm.volume.ImportBegin", "private", b"5")
    with pytest.raises(exc.StoragePoolException, match="in progress"):
        work.volumes["private"].import_data_with_size(BytesIO(b"12345"), 5)
    with pytest.raises(exc.QubesException, match="failed: because"):
        work.qubesd_call(None, "internal.vm.volume.ImportEnd", "private", b"fail\nbecause")
    with pytest.raises(exc.StoragePoolException, match="No import operation"):
        work.qubesd_call(None, "internal.vm.volume.ImportEnd", "private", b"ok")


@pytest.mark.parametrize("size", [b"01", b"1x", b"9" * 20, b"-1"])
def test_a_size_that_is_no_number_is_refused(app: qubesadmin.Qubes, size: bytes) -> None:
    with pytest.raises(exc.QubesDaemonAccessError):
        app.domains["work"].qubesd_call(None, "internal.vm.volume.ImportBegin", "private", size)


def test_removing_a_qube_removes_its_volumes(qubesd: Qubesd, app: qubesadmin.Qubes) -> None:
    path = qubesd.volume_path("work", "private")
    assert path.exists()
    del app.domains["work"]
    assert not path.exists()


def test_an_import_whose_caller_was_killed_fails_by_itself(qubesd: Qubesd, app: qubesadmin.Qubes) -> None:
    reading, writing = os.pipe()

    def feed() -> None:
        with os.fdopen(reading, "rb") as stream, pytest.raises(exc.QubesException, match="not enough"):
            app.domains["work"].volumes["private"].import_data_with_size(stream, 1 << 20)

    feeding = threading.Thread(target=feed)
    feeding.start()
    os.write(writing, bytes(200_000))
    begun = qubesd.volume_path("work", "private").with_suffix(".import")
    deadline = time.monotonic() + 10
    while not begun.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.close(writing)
    feeding.join()
    assert not begun.exists()
    assert app.domains["work"].volumes["private"].size == 2 << 30
