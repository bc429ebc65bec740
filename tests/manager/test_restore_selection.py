import pytest
from qubesadmin import exc

from qubes_restore_svc.errors import (
    QubeExists,
)
from qubes_restore_svc.manager.restore import BackupRestore
from qubes_restore_svc.wire.models import ErrorInfo
from tests.manager.adapters import QUBES, adapter
from tests.manager.script import (
    Script,
    finish,
    qube,
    refused,
)


def test_what_was_removed_from_the_info_is_not_asked_for() -> None:
    script = Script(QUBES)
    backup = adapter(script)
    info = backup.get_restore_info()
    del info["vault"], info["dom0"]
    assert backup.restore_info_verify(info) is info
    assert script.chosen[-1].names == ("debian-12", "work")
    assert not script.chosen[-1].dom0_home


def test_an_info_with_nothing_in_it_never_means_everything() -> None:
    script = Script(QUBES, steps=[finish("work")])
    backup = adapter(script)
    backup.get_restore_info()
    assert backup.restore_info_verify({}) == {}
    assert script.chosen == []
    with pytest.raises(exc.QubesException, match="No qube is left"):
        backup.restore_do({})
    assert not script.calls[0].confirmed.is_set()


def test_dom0s_home_comes_only_if_it_is_left_in_the_info() -> None:
    script = Script(QUBES, steps=[finish("dom0")])
    backup = adapter(script)
    info = backup.get_restore_info()
    backup.restore_do({"dom0": info["dom0"]})
    assert script.calls[0].plan.taken[0].name == "dom0"
    assert len(script.calls[0].plan.taken) == 1


@pytest.mark.parametrize(
    ("here", "verify", "offered", "there"),
    [("dom0", False, True, True), ("dom0", False, False, False), ("sys-gui", False, True, False),
     ("sys-gui", True, True, True)],
)  # fmt: skip
def test_dom0s_home_is_offered_where_it_can_be_had(
    here: str, verify: bool, offered: bool, there: bool
) -> None:
    script = Script(QUBES)
    backup = adapter(script, here=here)
    backup.options.verify_only, backup.options.dom0_home = verify, offered
    assert ("dom0" in backup.get_restore_info()) is there
    assert script.opens[0].choice.dom0_home is there


def test_an_info_that_is_not_ours_is_refused_before_dom0_is_asked() -> None:
    script = Script(QUBES)
    backup = adapter(script)
    info = backup.get_restore_info()
    for wrong, word in (
        ({"nobody": info["work"]}, "nobody"),
        ({"work": "work"}, "work"),
        ({**info, "vault": info["work"]}, "vault"),
    ):
        with pytest.raises(exc.QubesException, match=f"'{word}'.* is not an entry"):
            backup.restore_info_verify(wrong)  # type: ignore[arg-type]
    assert script.chosen == []


def test_a_name_of_the_callers_own_choice_is_refused() -> None:
    backup = adapter(Script(QUBES))
    info = backup.get_restore_info()
    info["work"].name = "other"
    with pytest.raises(exc.QubesException, match="cannot be restored as 'other'"):
        backup.restore_info_verify(info)


def test_the_summary_is_the_stock_table_and_says_what_is_wrong() -> None:
    taken = qube("work").model_copy(update={"new_name": "work-1", "notes": ("will be renamed to 'work-1'",)})
    exists = refused(
        qube("vault"), "already-exists", QubeExists("it is there", advice="Use --rename-conflicting.")
    )
    text = BackupRestore.get_restore_summary(adapter(Script([taken, exists])).get_restore_info())
    assert "name |" in text
    assert "| red | ← will be renamed to 'work-1'" in " ".join(text.split())
    assert "vault: It is there. Rename or remove the one that is here, or leave this one out." in text
    assert "--rename" not in text
    again = exists.model_copy(update={"error": ErrorInfo.of(QubeExists("it is " + "there " * 40))})
    text = BackupRestore.get_restore_summary(adapter(Script([again])).get_restore_info())
    assert max(map(len, text.splitlines())) < 100, "it is wider than the dialog"
    assert text.count("there") == 80
