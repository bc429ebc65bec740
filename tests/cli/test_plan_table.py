"""The table before the question, as a user of the stock command knows it."""

import pytest

from qubes_restore_svc.cli.tables import (
    names_with,
    plan_table,
    settings_left_behind,
    takes_dom0_home,
)

from .plans import ONE_OF_EACH, conflicting, lacking, not_wanted, plan, source, taken

IN_A_PIPE = """\
The following qubes are in the backup:

-----------+------------+-----------+--------------+-------+
      name |       type |  template |        netvm | label |
-----------+------------+-----------+--------------+-------+
   sys-usb |      AppVM | fedora-41 |    (default) |   red | <-- a qube of this name is there already!
       lab |      AppVM | fedora-41 |    (default) |   red | <-- its template 'arch' is nowhere to be found!
      work |      AppVM | fedora-41 | sys-firewall |   red |
     vault |      AppVM | fedora-41 |            - | black | <-- will be renamed to 'vault-1'
       old |      AppVM | fedora-38 |    (default) |   red | <-- template change to 'fedora-41'; and more
 debian-12 | TemplateVM |       n/a |    (default) | black |
1 not selected
1 excluded: mail
1 only with --dom0-home: dom0
not listed: broken: its label is malformed"""

ON_80_COLUMNS = """\
   sys-usb |      AppVM | fedora-41 |    (default) |   red |
   <-- a qube of this name is there already!
       lab |      AppVM | fedora-41 |    (default) |   red |
   <-- its template 'arch' is nowhere to be found!
      work |      AppVM | fedora-41 | sys-firewall |   red |
     vault |      AppVM | fedora-41 |            - | black |
   <-- will be renamed to 'vault-1'
       old |      AppVM | fedora-38 |    (default) |   red |
   <-- template change to 'fedora-41'; and more
"""


def test_in_a_pipe_a_qube_is_a_line() -> None:
    assert plan_table(ONE_OF_EACH, None) == IN_A_PIPE


def test_on_a_terminal_a_remark_without_room_stands_below() -> None:
    text = plan_table(ONE_OF_EACH, 80)
    assert ON_80_COLUMNS in text
    assert max(map(len, text.splitlines())) < 80


@pytest.mark.parametrize("width", [*range(61, 121)])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_lost(width: int) -> None:
    text = plan_table(ONE_OF_EACH, width)
    assert max(map(len, text.splitlines())) < width
    assert text.split() == IN_A_PIPE.split()


@pytest.mark.parametrize("width", [60, 80, 100, 130, None])
def test_columns_stay_columns_however_long_the_names_are(width: int | None) -> None:
    long = "a-name-of-exactly-31-characters"
    text = plan_table(plan(taken(source(long, "TemplateVM", long, long)), taken(source("work"))), width)
    lines = text.splitlines()[2:]
    assert width is None or max(map(len, lines)) < width
    assert len({tuple(at for at, char in enumerate(line) if char in "|+") for line in lines}) == 1
    assert [line.split("|")[0].strip() for line in lines[3:]] == [long, "work"]
    assert ("type" in text, "label" in text) == ((width or 200) > 80,) * 2


def test_of_many_that_are_not_selected_only_the_number_is_told() -> None:
    others = (not_wanted(source(f"q{number}"), "not-selected") for number in range(59))
    found = plan(taken(source("work")), *others, not_wanted(source("mail"), "already-exists"))
    assert plan_table(found, 80).splitlines()[5:] == [
        " work | AppVM | fedora-41 | (default) |   red |",
        "59 not selected",
        "1 there already: mail",
    ]


def test_an_empty_backup_has_an_empty_table() -> None:
    assert plan_table(plan(), 80).splitlines()[3] == " name | type | template | netvm | label |"


def test_a_setting_that_stays_behind_is_told_once_with_its_qubes() -> None:
    found = plan(
        taken(source("work"), "", (), "property kernelopts", "tag secret"),
        taken(source("vault"), "vault-1", (), "property kernelopts"),
        not_wanted(source("mail"), "excluded"),
    )
    assert settings_left_behind(found, everything=False) == [
        "These settings stay behind, because the configuration does not allow them:",
        "  property kernelopts: work, vault-1",
        "  tag secret: work",
    ]
    assert settings_left_behind(plan(taken(source("work"))), everything=True) == []


def test_many_settings_are_told_only_on_request() -> None:
    many = plan(taken(source("work"), "", (), *(f"feature f{number}" for number in range(30))))
    short = settings_left_behind(many, everything=False)
    assert len(short) == 14
    assert short[-1] == "  and 18 more (all with -v)"
    assert len(settings_left_behind(many, everything=True)) == 31


def test_who_has_which_problem() -> None:
    found = plan(conflicting("a"), lacking("b", "missing-netvm", "x"), conflicting("c"))
    assert names_with("already-exists", found) == ["a", "c"]
    assert names_with("missing-netvm", found) == ["b"]
    assert names_with("missing-template", found) == []


def test_dom0s_home_is_taken_or_not() -> None:
    assert takes_dom0_home(plan(taken(source("dom0", "AdminVM", None))))
    assert not takes_dom0_home(ONE_OF_EACH)
