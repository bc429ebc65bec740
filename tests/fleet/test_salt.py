"""States and module, run by the real Salt: a minion without a master for each machine."""

import json
from pathlib import Path

from tests.support.fixtures import REPOSITORY
from tests.watch.support import Machine, states_in, watch

from .conftest import Engine


def minion(machine: Machine, folder: Path) -> Path:
    """The configuration of a minion, whose pillar has one place."""
    configuration, pillar = folder / machine.name, folder / machine.name / "pillar"
    pillar.mkdir(parents=True)
    (pillar / "top.sls").write_text("base: {'*': [watch]}\n")
    place = {
        "directory": str(machine.backups),
        "passphrase_file": str(machine.folder / "passphrase"),
        "max_age_days": 20,
        "options": ["-x", "vault"],
    }
    places = {
        "configuration": str(machine.settings),
        "state": str(machine.reports),
        "timer": False,
        "places": {"monthly": place},
    }
    (pillar / "watch.sls").write_text(json.dumps({"qubes_restore_watch": places}))
    settings = {
        "id": machine.name,
        "file_client": "local",
        "root_dir": str(configuration / "root"),
        "file_roots": {"base": [str(REPOSITORY / "fleet" / "salt")]},
        "pillar_roots": {"base": [str(pillar)]},
    }
    (configuration / "minion").write_text(json.dumps(settings))
    return configuration


def test_states_and_module_verify_and_what_they_return_is_collected(
    engine: Engine, machines: dict[str, Machine], tmp_path: Path
) -> None:
    answers, statuses = {}, {}
    for name, machine in machines.items():
        call = ("--local", "-c", minion(machine, tmp_path / "minions"), "--out=json", "--log-level=quiet")
        done = engine(
            "salt-call", *call, "--retcode-passthrough", "state.apply", "qubes_restore_watch.verify"
        )
        states = json.loads(done.stdout)["local"]
        assert len(states) == 2 and all("qubes_restore_watch" in state for state in states)
        statuses[name] = done.returncode
        engine("salt-call", *call, "saltutil.sync_modules")
        where = (f"configuration={machine.settings}", f"state={machine.reports}")
        done = engine("salt-call", *call, "qubes_restore_watch.reports", "--out-indent=-1", *where)
        assert done.stdout.count("\n") == 1
        answers[name] = json.loads(done.stdout)["local"]
        assert answers[name].pop("nas") is None  # it has settings, and was not verified
        assert list(answers[name]) == ["monthly"]
    assert {name for name, status in statuses.items() if status == 0} == {"server"}

    # With a master, this is what `salt '*' qubes_restore_watch.reports --out=json --out-indent=-1` prints.
    lines = [json.dumps({name: answer}) for name, answer in {**answers, "attic": False}.items()]
    done = watch("collect", "-", input="\n".join(lines))
    assert done.returncode == 1
    assert states_in(done.stdout) == {
        "attic": "no report",
        "desk": "bad",
        "laptop": "too old",
        "office": "no backup",
        "server": "good",
    }


def test_the_module_verifies_and_returns_the_report(
    engine: Engine, machines: dict[str, Machine], tmp_path: Path
) -> None:
    desk = machines["desk"]
    call = ("--local", "-c", minion(desk, tmp_path / "minions"), "--out=json", "--log-level=quiet")
    engine("salt-call", *call, "saltutil.sync_modules")
    where = (f"configuration={desk.settings}", f"state={desk.reports}")
    done = engine("salt-call", *call, "--retcode-passthrough", "qubes_restore_watch.verify", "nas", *where)
    assert done.returncode == 1
    assert json.loads(done.stdout)["local"]["state"] == "bad"
    done = engine("salt-call", *call, "--retcode-passthrough", "qubes_restore_watch.verify", "none", *where)
    assert done.returncode == 2
    assert "there is no place none" in json.loads(done.stdout)["local"]["error"]
