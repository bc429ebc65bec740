"""The role, run by the real Ansible: on machines that are directories of this one."""

import json
from pathlib import Path

from tests.support.fixtures import REPOSITORY
from tests.watch.support import Machine

from .conftest import Engine

PLAYBOOK = REPOSITORY / "fleet" / "ansible" / "verify.yml"


def test_the_role_verifies_collects_and_says_which_backup_is_not_good(
    engine: Engine, machines: dict[str, Machine], tmp_path: Path
) -> None:
    lines = [f"{name} folder={machine.folder}" for name, machine in machines.items()]
    inventory = tmp_path / "inventory"
    inventory.write_text(
        "\n".join([*lines, "attic ansible_connection=ssh ansible_host=127.0.0.1 ansible_port=1"])
    )
    variables = {
        "ansible_become": False,
        "ansible_python_interpreter": "/usr/bin/python3",
        "qubes_restore_watch_place": "monthly",
        "qubes_restore_watch_settings": (
            "directory = '{{ folder }}/backups'\n"
            "passphrase_file = '{{ folder }}/passphrase'\n"
            "max_age_days = 20\n"
        ),
        "qubes_restore_watch_configuration": "{{ folder }}/settings",
        "qubes_restore_watch_state": "{{ folder }}/reports",
        "qubes_restore_watch_timer": False,
        "qubes_restore_watch_now": True,
        "qubes_restore_watch_reports": str(tmp_path / "collected"),
    }
    (tmp_path / "variables.json").write_text(json.dumps(variables))
    words = ("-c", "local", "-i", inventory, "-e", f"@{tmp_path / 'variables.json'}", PLAYBOOK)
    done = engine("ansible-playbook", *words)
    assert done.returncode != 0
    for told in (
        "attic, -: no report: no report has come",
        "desk, monthly: bad: work: its content is not what was written (wrong MAC)",
        "laptop, monthly: too old: it is 30 days old, and 20 are allowed",
        "office, monthly: no backup: ",
        "1 of 5 good.",
    ):
        assert told in done.stdout
    only_good = engine("ansible-playbook", *words, "--limit", "server")
    assert only_good.returncode != 0  # the reports of the others are here, and are not good
    for name in ("desk", "laptop", "office"):
        (tmp_path / "collected" / name / "monthly.json").unlink()
        (tmp_path / "collected" / name).rmdir()
    only_good = engine("ansible-playbook", *words, "--limit", "server")
    assert (only_good.returncode, only_good.stderr) == (0, ""), only_good.stdout
    assert "1 of 1 good." in only_good.stdout
