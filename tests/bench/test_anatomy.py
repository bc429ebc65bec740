"""What a backup is made of."""

from collections import Counter
from pathlib import Path

import pytest

from qubes_restore_svc.archive.filters import decompress
from qubes_restore_svc.archive.inner_tar import read_image
from qubes_restore_svc.errors import AuthenticationFailed
from qubes_restore_svc.kdf.engine import best_engine

from .anatomy import derive_keys, dissect, opened
from .samples import Sample
from .small_sample import write_small


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return write_small(tmp_path)


def test_all_containers_are_found_where_they_lie_in_archive_order(sample: Sample) -> None:
    found = dissect(sample)
    content = sample.backup.read_bytes()
    assert found.filter == "gzip"
    assert [container.file for container in found.containers[:3]] == [
        "backup-header.hmac",
        "qubes.xml",
        "vm10/private.img",
    ]
    assert Counter(container.file for container in found.containers)["vm10/private.img"] > 1
    for container in found.containers:
        assert content[container.offset :].startswith(container.head.raw)
    assert content.count(b"scrypt\x00") >= len(found.containers)


def test_images_are_told_apart_and_nothing_else_is_among_them(sample: Sample) -> None:
    images = dissect(sample).images()
    assert list(images) == ["vm10/private.img", "vm11/root.img", "vm11/private.img", "vm12/private.img"]


def test_the_derived_keys_open_every_image(sample: Sample) -> None:
    found = dissect(sample)
    engine = best_engine()
    keys = derive_keys(engine, found.containers)
    assert engine.memory_held == 0
    assert list(keys) != [] and set(keys) == set(found.containers)
    for (file, containers), volume in zip(
        found.images().items(), sample.expected.volumes.values(), strict=True
    ):
        image = read_image(
            decompress(found.filter, opened(sample.backup, containers, keys)), file, volume.size
        )
        assert image.size == volume.size
        assert list(image.extents)


def test_a_key_opens_its_own_container_only(sample: Sample) -> None:
    containers = dissect(sample).containers
    keys = derive_keys(best_engine(), containers)
    anothers = {containers[-1]: keys[containers[0]]}
    with pytest.raises(AuthenticationFailed):
        list(opened(sample.backup, [containers[-1]], anothers))
