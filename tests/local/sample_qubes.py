"""Qubes as a broker would hand them to a host."""

from qubes_restore_svc.broker.interfaces import Host, NewQube
from qubes_restore_svc.wire.messages import FirewallRule, ManifestQube, QubeSettings, VolumeInfo

DOM0 = ManifestQube(
    key="dom0", name="dom0", klass="AdminVM", label="black", volumes=(VolumeInfo(name="home"),)
)


def new_qube(name: str = "work", warnings: tuple[str, ...] = ()) -> NewQube:
    """An AppVM with a private volume, `vm10` and `work` in its backup."""
    source = ManifestQube(
        key="vm10",
        name="work",
        klass="AppVM",
        label="blue",
        template="fedora-42",
        netvm="",
        volumes=(VolumeInfo(name="private"),),
        properties={"memory": "400", "autostart": "True"},
        features={"gui": "1"},
        tags=("zoo", "audio"),
    )
    return NewQube(name, source, "20260101T010203-1234", warnings)


def settings(key: str = "vm10") -> QubeSettings:
    """Settings files with something in each of them."""
    return QubeSettings(
        key=key,
        firewall=(FirewallRule(action="accept", dsthost="example.org"), FirewallRule(action="drop")),
        notes="naïve\nnotes",
        appmenus=("firefox.desktop",),
    )


def restore(host: Host, name: str, size: int = 10) -> None:
    """Restore one qube through the protocol, which is what the broker knows of a host."""
    qube = host.begin(new_qube(name))
    sink = qube.create_volume("private", size)
    sink.finish(size)
    qube.commit(settings(), None)
