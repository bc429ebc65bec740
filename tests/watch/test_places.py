"""The settings of a place: every mistake is one sentence that names the file and the key."""

from pathlib import Path

import pytest

from qubes_restore_svc.errors import BadConfiguration, UsageError
from qubes_restore_svc.watch.places import (
    default_configuration,
    default_state,
    names_of_places,
    read_place,
)


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    directory = tmp_path / "settings"
    directory.mkdir(mode=0o755)
    return directory


def write(settings: Path, text: str, mode: int = 0o644) -> None:
    (settings / "nas.toml").write_text(text)
    (settings / "nas.toml").chmod(mode)


def test_all_keys_are_read_and_those_that_are_not_there_have_defaults(settings: Path) -> None:
    write(settings, 'directory = "/media"\nqube = "sys-usb"\noptions = ["-x", "dom0"]\nmax_age_days = 31')
    place = read_place(settings, "nas")
    assert (place.directory, place.qube, place.options) == ("/media", "sys-usb", ["-x", "dom0"])
    assert (place.pattern, place.settle_minutes, place.max_age_days) == ("qubes-*", 10, 31)
    assert names_of_places(settings) == ["nas"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ": it must have one of the keys file, directory, command"),
        ('file = "a"\ncommand = "b"', ": it must have one of the keys file, directory, command"),
        ('file = "a"\ndirectroy = "b"', ", directroy: there is no such key"),
        ('file = "a"\nmax_age_days = 0', ", max_age_days: Input should be greater than or equal to 1"),
        ('file = "a"\nmax_age_days = "8"', ", max_age_days: Input should be a valid integer"),
        ('file = ""', ", file: "),
        ('file = "a"\nqube = "sys usb"', ", qube: "),
        ('file = "a"\noptions = "-x dom0"', ", options: Input should be a valid list"),
        ("file = a", " is not TOML: "),
        ("file = " + "[" * 100_000, " has too many brackets within each other"),
        ('file = "a"\noptions = ["work"]', ": the options name no qube"),
    ],
)
def test_a_mistake_names_the_file_and_the_key(settings: Path, text: str, told: str) -> None:
    write(settings, text)
    with pytest.raises(BadConfiguration) as caught:
        read_place(settings, "nas")
    assert f"{settings / 'nas.toml'}{told}" in str(caught.value)


def test_settings_that_others_can_write_are_refused(settings: Path) -> None:
    write(settings, 'command = "true"', mode=0o646)
    with pytest.raises(BadConfiguration, match=r"everybody may write to it, and .* which programs run"):
        read_place(settings, "nas")


@pytest.mark.parametrize("name", ["..", "a/b", "", "-x", "a b", "x" * 65, "a\nb"])
def test_a_name_that_could_name_another_file_is_refused(settings: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a place"):
        read_place(settings, name)


def test_root_has_the_places_of_the_system_and_others_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_configuration() == Path("/etc/qubes-restore-svc/watch")
    assert default_state() == Path("/var/lib/qubes-restore-svc/watch")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/states")
    assert default_configuration() == Path("/home/user/.config/qubes-restore-svc/watch")
    assert default_state() == Path("/states/qubes-restore-svc/watch")
