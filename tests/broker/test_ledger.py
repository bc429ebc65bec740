"""What a worker may claim, and that it may do so once."""

import pytest

from qubes_restore_svc.broker.ledger import Ledger, believed_error
from qubes_restore_svc.errors import ERROR_KINDS, ProtocolViolation, RestoreError
from qubes_restore_svc.wire import messages as m
from qubes_restore_svc.wire.names import MAX_NUMBER, VolumeName
from qubes_restore_svc.wire.volume import MAX_IMAGE_SIZE

HASH = "0" * 64


def entry(key: str, **sizes: int | None) -> m.ManifestQube:
    volumes = tuple({"name": name, "size": size} for name, size in sizes.items())
    admin = {"klass": "AdminVM", "name": "dom0"} if "home" in sizes else {"klass": "AppVM", "name": key}
    return m.ManifestQube.model_validate({"key": key, "label": "red", "volumes": volumes, **admin})


def ledger(*qubes: m.ManifestQube, ignore_size_limit: bool = False) -> Ledger:
    return Ledger(
        qubes or (entry("a", root=100, private=200),), "sha256", ignore_size_limit=ignore_size_limit
    )


def ready(key: str, volume: VolumeName, size: int = 100) -> m.VolumeReady:
    return m.VolumeReady(key=key, volume=volume, image_size=size)


def ok(key: str, volume: VolumeName, size: int = 100) -> m.VolumeDone:
    return m.VolumeDone(key=key, volume=volume, outcome="ok", image_size=size, sha256=HASH)


def failed(key: str, volume: VolumeName) -> m.VolumeDone:
    error = m.ErrorInfo(kind="error", reason="no")
    return m.VolumeDone(key=key, volume=volume, outcome="failed", error=error)


def settings(key: str) -> m.QubeSettings:
    return m.QubeSettings(key=key)


def test_an_honest_worker_gets_through() -> None:
    book = ledger(entry("a", root=100, private=None), entry("b"), entry("c", home=None), entry("d", root=1))
    book.announce(ready("a", "root"))
    book.answer(ok("a", "root"))
    book.announce(ready("a", "private", MAX_IMAGE_SIZE))
    book.answer(ok("a", "private", MAX_IMAGE_SIZE))
    book.settle(settings("a"))
    book.announce(ready("c", "home", MAX_IMAGE_SIZE))
    book.settle(settings("b"))  # one that has no volumes is nobody else's beginning or end
    book.answer(ok("c", "home", 17))
    book.settle(settings("c"))
    book.answer(failed("d", "root"))  # missing: never announced
    book.settle(settings("d"))
    book.finish()


def test_a_volume_without_the_digest_that_was_asked_for_is_refused() -> None:
    book = ledger()
    book.announce(ready("a", "root"))
    with pytest.raises(ProtocolViolation, match="without the digest that was asked for, sha256"):
        book.answer(ok("a", "root").model_copy(update={"fsverity": HASH, "sha256": None}))
    book.answer(ok("a", "root"))


@pytest.mark.parametrize(
    ("size", "promised", "allowed"),
    [(100, 100, True), (101, 100, False), (1, 0, False), (0, 0, True), (MAX_NUMBER, MAX_NUMBER, False)],
)
def test_a_volume_is_no_larger_than_promised(size: int, promised: int, allowed: bool) -> None:
    book = ledger(entry("a", root=promised))
    if allowed:
        book.announce(ready("a", "root", size))
        return
    with pytest.raises(ProtocolViolation, match="are allowed"):
        book.announce(ready("a", "root", size))


@pytest.mark.parametrize("promised", [100, None])
def test_without_the_limit_there_is_still_the_largest_of_all(promised: int | None) -> None:
    book = ledger(entry("a", root=promised, private=1), ignore_size_limit=True)
    book.announce(ready("a", "root", MAX_IMAGE_SIZE))
    with pytest.raises(ProtocolViolation, match="are allowed"):
        book.announce(ready("a", "private", MAX_IMAGE_SIZE + 1))


@pytest.mark.parametrize(("key", "volume"), [("b", "root"), ("a", "home"), ("", "root")])
def test_nothing_is_announced_or_answered_that_the_plan_does_not_name(key: str, volume: VolumeName) -> None:
    with pytest.raises(ProtocolViolation, match="not asked for"):
        ledger().announce(m.VolumeReady.model_construct(key=key, volume=volume, image_size=1))
    with pytest.raises(ProtocolViolation, match="not asked for"):
        ledger().answer(m.VolumeDone.model_construct(key=key, volume=volume, outcome="failed"))
    with pytest.raises(ProtocolViolation, match="not asked for"):
        ledger().settle(m.QubeSettings.model_construct(key="b"))


def test_each_volume_is_announced_and_answered_once() -> None:
    book = ledger()
    book.announce(ready("a", "root"))
    with pytest.raises(ProtocolViolation, match="not any more"):
        book.announce(ready("a", "root"))
    book.answer(ok("a", "root"))
    for again in (ok("a", "root"), failed("a", "root")):
        with pytest.raises(ProtocolViolation, match="not any more"):
            book.answer(again)
    book.answer(failed("a", "private"))
    with pytest.raises(ProtocolViolation, match="not any more"):
        book.announce(ready("a", "private"))
    book.settle(settings("a"))
    with pytest.raises(ProtocolViolation, match="not any more"):
        book.settle(settings("a"))


@pytest.mark.parametrize("size", [0, 99, 101, 200])
def test_an_answer_has_the_size_of_the_announcement(size: int) -> None:
    book = ledger(entry("a", root=200))
    book.announce(ready("a", "root", 100))
    with pytest.raises(ProtocolViolation, match="other than was announced"):
        book.answer(ok("a", "root", size))


def test_ok_needs_an_announcement() -> None:
    with pytest.raises(ProtocolViolation, match="other than was announced"):
        ledger().answer(ok("a", "root", 100))


def test_a_home_is_at_most_as_long_as_announced() -> None:
    book = ledger(entry("dom0-home", home=None))
    book.announce(ready("dom0-home", "home", 1000))
    with pytest.raises(ProtocolViolation, match="other than was announced"):
        book.answer(ok("dom0-home", "home", 1001))


@pytest.mark.parametrize(
    ("klass", "volume", "admitted"),
    [
        ("StandaloneVM", "root", True),
        ("TemplateVM", "private", True),
        ("AppVM", "private", True),
        ("AppVM", "root", False),
        ("DispVM", "private", False),
        ("StandaloneVM", "home", False),
    ],
)
def test_what_nothing_promises_may_come_once_if_the_class_keeps_it(
    klass: str, volume: VolumeName, admitted: bool
) -> None:
    qube = m.ManifestQube.model_validate({"key": "a", "name": "a", "label": "red", "klass": klass})
    book = ledger(qube, entry("b", private=1))
    if not admitted:
        with pytest.raises(ProtocolViolation, match="not asked for"):
            book.announce(ready("a", volume))
        return
    with pytest.raises(ProtocolViolation, match="not asked for"):
        ledger(qube).answer(failed("a", volume))  # it has to be announced
    with pytest.raises(ProtocolViolation, match="are allowed"):
        ledger(qube).announce(ready("a", volume, MAX_IMAGE_SIZE + 1))
    book.announce(ready("a", volume))
    with pytest.raises(ProtocolViolation, match="before all of its volumes"):
        book.settle(settings("a"))
    book.answer(ok("a", volume))
    with pytest.raises(ProtocolViolation, match="not asked for"):
        book.announce(ready("a", volume))
    book.settle(settings("a"))


def test_nothing_comes_without_a_promise_when_its_qube_is_settled() -> None:
    qube = m.ManifestQube.model_validate({"key": "a", "name": "a", "label": "red", "klass": "StandaloneVM"})
    book = ledger(qube)
    book.settle(settings("a"))
    with pytest.raises(ProtocolViolation, match="not asked for"):
        book.announce(ready("a", "root"))


def test_a_qube_is_taken_back_once_and_only_when_it_was_over() -> None:
    book = ledger(entry("a"), entry("b"))
    back = m.QubeIncomplete(key="a", error=m.ErrorInfo(kind="error", reason="no"))
    with pytest.raises(ProtocolViolation, match="taken back"):
        book.take_back(back)
    book.settle(settings("a"))
    book.take_back(back)
    with pytest.raises(ProtocolViolation, match="taken back"):
        book.take_back(back)
    with pytest.raises(ProtocolViolation, match="taken back"):
        book.take_back(m.QubeIncomplete(key="b", error=back.error))


def test_a_qube_is_not_settled_before_its_volumes_are_answered_for() -> None:
    book = ledger()
    with pytest.raises(ProtocolViolation, match="before all of its volumes"):
        book.settle(settings("a"))
    book.answer(failed("a", "root"))
    book.announce(ready("a", "private"))
    with pytest.raises(ProtocolViolation, match="before all of its volumes"):
        book.settle(settings("a"))


def test_one_qube_after_the_other() -> None:
    book = ledger(entry("a", root=100), entry("b", root=100))
    book.announce(ready("a", "root"))
    book.answer(ok("a", "root"))
    with pytest.raises(ProtocolViolation, match="before the end of the one before"):
        book.announce(ready("b", "root"))
    book.settle(settings("a"))
    book.announce(ready("b", "root"))


def test_nothing_is_finished_while_something_is_open() -> None:
    with pytest.raises(ProtocolViolation, match="qubes are missing"):
        ledger().finish()
    with pytest.raises(ProtocolViolation, match="qubes are missing"):
        ledger(entry("b")).finish()


FOREIGN = {
    "usage", "cancelled", "protocol-violation", "worker-lost", "worker-stalled", "sandbox-unavailable",
    "qube-exists", "host-failed", "no-space", "restore-in-progress", "worker-missing", "bad-configuration",
    "missing-dependency", "not-granted",
}  # fmt: skip


@pytest.mark.parametrize("kind", [*ERROR_KINDS, "made-up"])
def test_a_worker_tells_of_the_archive_and_not_of_the_host_or_the_person(kind: str) -> None:
    info = m.ErrorInfo(kind=kind, reason="r", qube="q", volume="v", chunk=3, advice="a")
    error = believed_error(info)
    assert (error.reason, error.qube, error.volume, error.chunk, error.advice) == ("r", "q", "v", 3, "a")
    expected = RestoreError if kind in FOREIGN or kind == "made-up" else ERROR_KINDS[kind]
    assert type(error) is expected
