"""The configuration: what it says, and what is said about a mistake in it."""

import os
import re
import stat
from pathlib import Path

import pytest

from qubes_restore_svc.errors import BadConfiguration, UsageError
from qubes_restore_svc.owners import MAX_SIZE, writers_besides
from qubes_restore_svc.qubes.config import (
    CONFIG_PATH,
    Config,
    GrantConfig,
    load_config,
    parse_config,
)
from qubes_restore_svc.qubes.config_file import hints, keys_of
from qubes_restore_svc.wire.messages import ManifestQube
from tests.qubes import configuration_pages as pages

_NO_MEMORY = "line 1, worker.memory: expected 256 to 1048576 MiB, or auto, found "


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path / "config.yaml"


def load(file: Path, content: str | bytes) -> Config:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    file.chmod(0o644)
    return load_config(file)


def mistake(text: str) -> str:
    """What is said of a text, after the name of the file."""
    with pytest.raises(BadConfiguration) as caught:
        parse_config(text)
    prefix = f"{CONFIG_PATH}, "
    assert caught.value.reason.startswith(prefix)
    assert caught.value.advice
    return caught.value.reason.removeprefix(prefix)


# --- What it says ----------------------------------------------------------------------------------


def test_without_a_file_everything_is_the_default(tmp_path: Path) -> None:
    assert load_config(tmp_path / "none.yaml") == Config()
    assert load_config(tmp_path / "none" / "none.yaml") == Config()


@pytest.mark.parametrize(
    "text", ["", "\n", "# nothing\n", "---\n", "worker:\n", "worker: {}\nlog:\n", "\ufeff"]
)
def test_a_file_that_says_nothing_is_the_default(file: Path, text: str) -> None:
    assert load(file, text) == Config()


def test_what_stands_in_the_file_holds(file: Path) -> None:
    config = load(
        file,
        """
        worker: {template: mgmt-dvm, memory: 8192, vcpus: 4, start_timeout: 300}
        restore:
          properties: ["@default", "guivm"]
          features: [menu-items, 'x-*']
          tags: []
          autostart: yes
          kernel: true
          kernelopts: on
          devices: [pci, block]
          choosable: ["property:debug", "feature:my-*", "device:usb"]
          pool: vm-pool_2
        limits: {qubes: 20, volume_size: 500, total_size: 2000, stall_timeout: 600}
        report: {directory: /srv/reports, keep: 5}
        log: {file: /var/log/restore.log}
        grants:
          default: {verify_only: true}
          sys-gui:
            storage: [sys-usb, "nas-*"]
            services: ["my.Backup+*"]
            dom0_directories: [/srv/backups]
            pools: ["*"]
            templates: [dvm]
            choosable: ["property:debug"]
            max_memory: 8192
            max_vcpus: 4
        """,
    )
    assert load(file, "worker: {memory: auto, vcpus: auto}") == Config()
    assert config.worker.model_dump() == {
        "template": "mgmt-dvm",
        "memory": 8192,
        "vcpus": 4,
        "start_timeout": 300,
    }
    assert config.restore.model_dump() == {
        "properties": ("@default", "guivm"),
        "features": ("menu-items", "x-*"),
        "tags": (),
        "autostart": True,
        "kernel": True,
        "kernelopts": True,
        "devices": ("pci", "block"),
        "choosable": ("property:debug", "feature:my-*", "device:usb"),
        "pool": "vm-pool_2",
    }
    assert config.limits.stall_timeout == 600
    assert (config.limits.qubes, config.limits.volume_size, config.limits.total_size) == (20, 500, 2000)
    assert (config.report.directory, config.report.keep) == (Path("/srv/reports"), 5)
    assert config.log.file == Path("/var/log/restore.log")
    assert config.grant("anybody") == GrantConfig(verify_only=True)
    assert config.grant("sys-gui").model_dump() == {
        "verify_only": False,
        "storage": ("sys-usb", "nas-*"),
        "services": ("my.Backup+*",),
        "dom0_directories": (Path("/srv/backups"),),
        "pools": ("*",),
        "templates": ("dvm",),
        "choosable": ("property:debug",),
        "max_memory": 8192,
        "max_vcpus": 4,
    }


@pytest.mark.parametrize(
    "text", ["", "grants:", "grants: {}", "grants:\n  default:", "grants:\n  sys-gui:\n  other: {}"]
)
def test_a_caller_without_a_section_has_that_of_all_others_or_the_defaults(text: str) -> None:
    for caller in ("sys-gui", "default", "other", "nobody"):
        assert parse_config(text).grant(caller) == GrantConfig()
    with_default = parse_config("grants: {default: {max_vcpus: 9}, sys-gui: }")
    assert with_default.grant("sys-gui").max_vcpus is None
    assert with_default.grant("other").max_vcpus == 9


def test_the_defaults_are_the_safe_ones() -> None:
    config = Config()
    grant = config.grant("sys-gui")
    assert (grant.storage, grant.services, grant.dom0_directories, grant.pools) == ((),) * 4
    assert config.worker.template is None
    assert (config.restore.autostart, config.restore.kernel, config.restore.kernelopts) == (False,) * 3
    assert config.restore.devices == ()
    assert config.limits.of_sizes is False


def test_null_is_no_template_no_pool_no_limit_no_report_and_no_log(file: Path) -> None:
    text = "worker: {template: null}\nrestore: {pool: ~}\nlimits: {qubes: null}\n"
    config = load(file, text + "report: {directory: null}\nlog: {file: null}\n")
    assert (config.worker.template, config.restore.pool, config.limits.qubes) == (None,) * 3
    assert (config.report.directory, config.log.file) == (None, None)


def test_each_key_of_the_restore_section_reaches_the_allow_list() -> None:
    settings = {
        "properties": "[guivm]",
        "features": "[internal]",
        "tags": "[sd-a]",
        "devices": "[usb]",
        "autostart": "true",
        "kernel": "true",
        "kernelopts": "true",
    }
    qube = ManifestQube.model_validate(
        {
            "key": "vm1",
            "name": "work",
            "klass": "AppVM",
            "label": "red",
            "properties": {"guivm": "x", "autostart": "True", "kernel": "6", "kernelopts": "quiet"},
            "features": {"internal": "1"},
            "tags": ("sd-a",),
            "devices": ({"bus": "usb", "backend": "sys-usb", "port": "2-1"},),
        }
    )
    told = {
        "properties": "property guivm",
        "features": "feature internal",
        "tags": "tag sd-a",
        "devices": "device usb sys-usb:2-1",
        "autostart": "property autostart",
        "kernel": "property kernel",
        "kernelopts": "property kernelopts",
    }
    for key, value in settings.items():
        allowed = parse_config(f"restore: {{{key}: {value}}}").restore.policy().let_through(qube)
        assert set(allowed.left_out) == {text for name, text in told.items() if name != key}
    assert set(Config().restore.policy().let_through(qube).left_out) == set(told.values())


# --- Mistakes in a value -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\nworker:\n  memory: 12", "line 4, worker.memory: 12 is less than 256 (MiB)"),
        ("worker:\n  memory: 2000000", "line 2, worker.memory: 2000000 is more than 1048576 (MiB)"),
        ("worker:\n  vcpus: 0", "line 2, worker.vcpus: 0 is less than 1"),
        ("worker: {memory: '4000'}", _NO_MEMORY + "'4000'"),
        ("worker: {vcpus: all}", "line 1, worker.vcpus: expected 1 to 128, or auto, found 'all'"),
        ("worker: {memory: 4 GiB}", _NO_MEMORY + "'4 GiB'"),
        ("worker: {memory: true}", _NO_MEMORY + "true"),
        ("worker: {memory: null}", _NO_MEMORY + "nothing"),
        ("worker:\n  memory:", "line 2, worker.memory: expected 256 to 1048576 MiB, or auto, found nothing"),
        ("worker: {memory: [1]}", _NO_MEMORY + "a list"),
        ("worker: {memory: {a: 1}}", _NO_MEMORY + "keys"),
        ("worker:\n  template: my dvm",
         "line 2, worker.template: expected the name of a qube, or null, found 'my dvm'"),
        ("worker: {template: no}",
         "line 1, worker.template: expected the name of a qube, or null, found false"),
        ("restore: {autostart: 1}", "line 1, restore.autostart: expected true or false, found 1"),
        ("restore: {autostart: 'no'}", "line 1, restore.autostart: expected true or false, found 'no'"),
        ("restore:\n  tags: sd-a",
         "line 2, restore.tags: expected a list of names and patterns, found 'sd-a'"),
        ("restore:\n  tags:\n  - sd-a\n  - 5", "line 4, restore.tags, entry 2: expected a text, found 5"),
        ("restore:\n  devices:\n  - pci\n  - pcie",
         "line 4, restore.devices, entry 2: expected 'block', 'mic', 'pci', 'usb' or 'webcam', found 'pcie'"),
        ("restore: {pool: a/b}",
         "line 1, restore.pool: expected the name of a storage pool, or null, found 'a/b'"),
        ("log: {file: restore.log}",
         "line 1, log.file: expected an absolute path without .., found 'restore.log'"),
        ("log: {file: /var/../etc/x}",
         "line 1, log.file: expected an absolute path without .., found '/var/../etc/x'"),
        ("log: {file: 5}", "line 1, log.file: expected an absolute path, or null, found 5"),
        ("report: {keep: -1}", "line 1, report.keep: -1 is less than 1"),
        ("worker: 5",
         "line 1, worker: expected keys, each on a line of its own below the section's name, found 5"),
        ("worker:\n- memory: 5",
         "line 1, worker: expected keys, each on a line of its own below the section's name, found a list"),
        ("- worker", "line 1: expected sections: worker, restore, limits, report, log, command, grants"),
        ("5", "line 1: expected sections: worker, restore, limits, report, log, command, grants"),
        ("grants:\n  sys-gui:\n    storage: sys-usb",
         "line 3, grants.sys-gui.storage: expected a list of names and patterns, found 'sys-usb'"),
        ("grants:\n  sys-gui:\n    storage:\n    - sys-usb\n    - 'a b'",
         "line 5, grants.sys-gui.storage, entry 2: expected the name of a qube, or a pattern with * or ?"),
        ("grants:\n  sys-gui:\n    storage:\n    - 5",
         "line 4, grants.sys-gui.storage, entry 1: expected a text, found 5"),
        ("grants: {gui: {services: ['a/b']}}",
         "line 1, grants.gui.services, entry 1: expected the name of a service, or a pattern with * or ?"),
        ("grants: {sys-gui: {dom0_directories: [/a, b]}}",
         "line 1, grants.sys-gui.dom0_directories, entry 2: expected an absolute path without .., found 'b'"),
        ("grants:\n  default:\n    max_memory: 5",
         "line 3, grants.default.max_memory: 5 is less than 256 (MiB)"),
        ("grants:\n  default: {}\n  my gui: {}",
         "line 3, grants.my gui: expected the name of a qube, or default"),
        ("grants:\n  dom0: {}", "line 2, grants.dom0: dom0 needs no grant, and none narrows what it may do"),
        ("grants: [a]",
         "line 1, grants: expected names, each with keys below it: the name of a qube, or default,"
         " found a list"),
        ("grants:\n  sys-gui: true", "line 2, grants.sys-gui: expected keys, each on a line of its own below"
         " that name, found true"),
        ("worker: {vcpus: 0}\nlimits:\n  qubes: 0\nreport: {keep: 0}",
         "line 1, worker.vcpus: 0 is less than 1 (and 2 more)"),
        ("report:\n  keep: 0\nworker:\n  vcpus: 0", "line 2, report.keep: 0 is less than 1 (and 1 more)"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_line_key_and_what_is_expected(text: str, expected: str) -> None:
    assert mistake(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("worker:\n  memroy: 5", "line 2, worker.memroy: there is no such key; did you mean memory?"),
        ("wroker:\n  memory: 5", "line 1, wroker: there is no such section; did you mean worker?"),
        ("memory: 5", "line 1, memory: there is no such section; did you mean worker.memory?"),
        ("restore: {memory: 5}", "line 1, restore.memory: there is no such key; did you mean worker.memory?"),
        (
            "grants:\n  sys-gui:\n    storge: 5",
            "line 3, grants.sys-gui.storge: there is no such key; did you mean storage?",
        ),
        (
            "grants: {sys-gui: {memory: 5}}",
            "line 1, grants.sys-gui.memory: there is no such key; did you mean max_memory?",
        ),
        (
            "restore: {storage: 5}",
            "line 1, restore.storage: there is no such key; did you mean grants.NAME.storage?",
        ),
        ("log:\n  zzz: 5", "line 2, log.zzz: there is no such key; there are file"),
        (
            "zzz: 5",
            "line 1, zzz: there is no such section; there are worker, restore, limits, report, log, command,"
            " grants",
        ),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest(text: str, expected: str) -> None:
    assert mistake(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('restore:\n  tags:\n    - "@default"\n    - guivm-sys-gui\n',
         "line 4, restore.tags, entry 2: the tag guivm-sys-gui is never restored: a GUI domain's rights over"
         " the qube go by it; the system sets it itself where it belongs"),
        ("restore: {properties: [kernelopts]}",
         "line 1, restore.properties, entry 1: no list decides about the property kernelopts, but"
         " restore.kernelopts does: it can switch off what protects a qube's system, that of its template"
         " included"),
        ("restore:\n  features: ['a b']",
         "line 2, restore.features, entry 1: expected the name of a feature, a pattern with * or ?, or"
         " @default"),
    ],
)  # fmt: skip
def test_an_entry_that_a_list_cannot_have_is_told_with_the_reason(text: str, expected: str) -> None:
    assert mistake(text) == expected


def test_a_value_is_shown_shortly_and_cannot_steer_a_terminal() -> None:
    assert mistake(f"worker: {{template: {'x' * 500}}}").endswith(f"found '{'x' * 60}…'")
    said = (
        mistake('worker: {template: "\\e[2J\\u202e"}')
        + mistake('"\\e[2J": 1')
        + mistake('log: {file: "\\a"}')
    )
    assert said.isprintable()


def test_a_mistake_is_one_of_usage_with_advice() -> None:
    with pytest.raises(UsageError, match=r"config\.yaml, line 1, .* Correct the file"):
        parse_config("a: 1")


# --- Mistakes in the YAML ----------------------------------------------------------------------------

_NO_MEMORY = "line 1, worker.memory: expected 256 to 1048576 MiB, or auto, found "
_QUOTES = 'a text that begins with *, &, ! or @ has to stand in quotes, as "*"'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("worker:\n\tmemory: 5", "line 2: a tab stands where only spaces may"),
        ("worker:\n  memory: 5\n memory: 6", "line 3: this is not YAML: "),
        ("worker: {memory: 5", "line 1: this is not YAML: "),
        ("a: b: c", "line 1: this is not YAML: mapping values are not allowed here"),
        ("worker: {vcpus: 1, memory: 300,\n memory: 400}",
         "line 2, worker.memory: this key is there already, in line 1"),
        ("log:\nworker:\nlog:", "line 3, log: this key is there already, in line 1"),
        ("restore:\n  tags: [@default]", f"line 2: {_QUOTES}"),
        ("restore:\n  tags: [*]", f"line 2: {_QUOTES}"),
        ("restore:\n  tags: [*a]", f"line 2: anchors and aliases are not read; {_QUOTES}"),
        ("worker: &a {}\nlog: *a", f"line 1: anchors and aliases are not read; {_QUOTES}"),
        ("log: {}\nworker: &a\n  vcpus: 1", f"line 2: anchors and aliases are not read; {_QUOTES}"),
        ("worker: !!python/object/apply:os.system ['reboot']", f"line 1: tags are not read; {_QUOTES}"),
        ("log: {}\nworker: {memory: !!int '400'}", f"line 2: tags are not read; {_QUOTES}"),
        ("worker: {<<: {memory: 400}}", "line 1, worker: a key must be a word"),
        ("5: 6", "line 1: a key must be a word"),
        ("? [a]\n: 6", "line 1: a key must be a word"),
        ("worker: {}\n---\nlog: {}", "line 2: a second document begins (---)"),
        ("worker: {memory: 1:30}", "line 1, worker.memory: 1:30 is not a whole number in plain digits"),
        ("worker: {memory: 0x1000}", "line 1, worker.memory: 0x1000 is not a whole number in plain digits"),
        ("worker: {memory: 010000}", "line 1, worker.memory: 010000 is not a whole number in plain digits"),
        ("worker: {memory: 4e3}", _NO_MEMORY + "'4e3'"),
        ("worker: {memory: 4000.0}", "line 1, worker.memory: 4000.0 is not a whole number in plain digits"),
        ("worker: {memory: " + "9" * 5000 + "}", "line 1, worker.memory: 9999"),
        ("a: " + "[" * 100_000, "line 1: it is nested too deep"),
        ("\n".join(f"{' ' * depth}a:" for depth in range(50)), "line 17: it is nested too deep"),
        ("worker: {}\n\x00", "line 2: the character U+0000 cannot stand in such a file"),
        ("log:\n  file: '\x1b[2J'", "line 2: the character U+001B cannot stand in such a file"),
    ],
)  # fmt: skip
def test_what_is_not_plain_yaml_is_told_with_its_line(text: str, expected: str) -> None:
    said = mistake(text)
    assert said.startswith(expected)
    assert len(said) < 200


def test_an_alias_cannot_multiply_what_is_there() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join(['*' + previous] * 9)}]\n"
        for previous, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
    )
    assert "anchors" in mistake(bomb)


# --- The file ----------------------------------------------------------------------------------------


def refusal(file: Path) -> str:
    with pytest.raises(BadConfiguration) as caught:
        load_config(file)
    return caught.value.reason


def test_a_mistake_names_the_file_that_was_read(file: Path) -> None:
    with pytest.raises(BadConfiguration) as caught:
        load(file, "worker: {vcpus: 0}")
    assert caught.value.reason == f"{file}, line 1, worker.vcpus: 0 is less than 1"


def test_a_directory_and_a_pipe_are_no_configuration(file: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} is a directory"
    os.mkfifo(file)
    assert refusal(file) == f"{file} is no regular file"


def test_a_file_that_cannot_be_read_is_not_taken_for_one_that_is_not_there(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file.parent / "file").touch()
    assert refusal(file.parent / "file" / "config.yaml").endswith("cannot be read (Not a directory)")

    def forbidden(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    load(file, "")
    monkeypatch.setattr(os, "open", forbidden)
    assert refusal(file) == f"{file} cannot be read (Permission denied)"


def test_a_link_is_followed_unless_it_leads_nowhere(file: Path) -> None:
    file.symlink_to("real.yaml")
    assert refusal(file) == f"{file} is a link to a file that is not there"
    load(file.parent / "real.yaml", "report: {keep: 7}")
    assert load_config(file).report.keep == 7


def test_what_is_not_utf_8_is_told_with_its_line(file: Path) -> None:
    with pytest.raises(BadConfiguration, match=r"line 3: this is not UTF-8"):
        load(file, b"# \xc3\xa4\nworker:\n  template: \xe4\n")


def test_a_file_that_is_too_large_is_not_read(file: Path) -> None:
    assert load(file, "#" * MAX_SIZE) == Config()
    with pytest.raises(BadConfiguration, match="is larger than 1024 KiB"):
        load(file, "#" * (MAX_SIZE + 1))


def test_a_file_that_everybody_may_write_is_refused_with_the_way_to_mend_it(file: Path) -> None:
    load(file, "")
    file.chmod(0o646)
    with pytest.raises(BadConfiguration) as caught:
        load_config(file)
    assert caught.value.reason == (
        f"{file}: everybody may write to it, and who can do that decides what a backup may bring back"
    )
    assert f"chmod go-w {file}" in caught.value.advice


def test_so_is_one_in_a_directory_where_everybody_may_write(file: Path) -> None:
    load(file, "")
    file.parent.chmod(0o757)
    assert refusal(file).startswith(f"{file.parent}: everybody may write to it")
    link = file.parent.parent / f"{file.parent.name}-link"
    link.symlink_to(file)
    assert refusal(link).startswith(f"{file.parent}: everybody may write to it")
    link.unlink()


FILE, DIRECTORY = stat.S_IFREG, stat.S_IFDIR


@pytest.mark.parametrize(
    ("mode", "owner", "group", "expected"),
    [
        (FILE | 0o644, 0, 0, None),
        (FILE | 0o664, 0, 0, None),
        (FILE | 0o600, 1234, 1234, None),
        (FILE | 0o644, 0, 54321, None),
        (FILE | 0o600, 54321, 0, "its owner, user 54321,"),
        (FILE | 0o400, 54321, 0, "its owner, user 54321,"),
        (FILE | 0o664, 0, 54321, "the group 54321"),
        (FILE | 0o620, 1234, 54321, "the group 54321"),
        (FILE | 0o602, 0, 0, "everybody"),
        (FILE | 0o666, 0, 54321, "everybody"),
        (DIRECTORY | 0o755, 0, 0, None),
        (DIRECTORY | 0o777, 0, 0, "everybody"),
        (DIRECTORY | 0o1777, 0, 0, None),
        (DIRECTORY | 0o1777, 54321, 0, "its owner, user 54321,"),
        (FILE | 0o1666, 0, 0, "everybody"),
    ],
)
def test_who_else_may_write(mode: int, owner: int, group: int, expected: str | None) -> None:
    status = os.stat_result((mode, 0, 0, 1, owner, group, 0, 0, 0, 0))
    assert writers_besides(status, 1234) == expected


def test_the_group_qubes_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {98: "qubes", 100: "users"}
    monkeypatch.setattr("qubes_restore_svc.owners._group_name", lambda number: names[number])
    for group, expected in ((98, None), (100, "the group users")):
        status = os.stat_result((FILE | 0o664, 0, 0, 1, 0, group, 0, 0, 0, 0))
        assert writers_besides(status, 0) == expected


# --- The pages -----------------------------------------------------------------------------------------


def test_the_sample_file_is_up_to_date() -> None:
    assert pages.SAMPLE.read_text() == pages.sample(), "run: python -m tests.qubes.configuration_pages"


def test_the_reference_is_up_to_date() -> None:
    current = pages.PAGE.read_text()
    assert current == pages.page(current), "run: python -m tests.qubes.configuration_pages"


def test_the_sample_file_changes_nothing_and_shows_every_default(file: Path) -> None:
    text = pages.SAMPLE.read_text()
    assert load(file, text) == Config()
    keys = [line[1:] for line in text.splitlines() if re.match(r"#(  ){0,2}[a-z0-9_]+:", line)]
    config = parse_config("\n".join(keys))
    assert config == Config()
    assert config.model_fields_set == Config.model_fields.keys()
    for section in (
        *(getattr(config, name) for name in Config.model_fields if name != "grants"),
        config.grant("any"),
    ):
        assert section.model_fields_set == type(section).model_fields.keys()


def test_every_key_is_explained() -> None:
    for section in pages.SECTIONS.values():
        assert (section.__doc__ or "").endswith(".")
    keys = dict(keys_of(Config))
    assert len(keys) == sum(len(section.model_fields) for section in pages.SECTIONS.values())
    for name, key in keys.items():
        assert (key.description or "").endswith("."), name
        assert hints(key)[0], name
