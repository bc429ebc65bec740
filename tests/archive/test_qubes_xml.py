"""qubes.xml: what is listed, what is refused, what is left out, and what no file may do."""

import gzip
import hashlib
import io
import tarfile
import tracemalloc
from collections.abc import Mapping
from xml.sax.saxutils import escape, quoteattr

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.archive import xml_tree
from qubes_restore_svc.archive.qubes_xml import (
    MAX_QUBES_XML,
    MAX_WARNINGS,
    BackupContent,
    BackupQube,
    parse_qubes_xml,
)
from qubes_restore_svc.errors import BadMetadata
from qubes_restore_svc.wire.messages import (
    DeviceInfo,
    Manifest,
    ManifestQube,
    VolumeInfo,
    encode_message,
)
from qubes_restore_svc.wire.names import MAX_QUBES, strip_control
from tests.support.fixtures import expectation, shared_fixture

# As qubesd writes it (R4.1 and later), shortened to a few qubes.
WRITTEN = b"""<?xml version='1.0' encoding='utf-8'?>
<qubes>
  <labels>
    <label id="label-1" color="0xcc0000">red</label>
    <label id="label-8" color="0x000000">black</label>
  </labels>
  <pools>
    <pool driver="file-reflink" dir_path="/var/lib/qubes" name="varlibqubes"/>
  </pools>
  <properties>
    <property name="default_netvm">sys-firewall</property>
  </properties>
  <domains>
    <domain id="domain-0" class="AdminVM">
      <properties>
        <property name="label">black</property>
        <property name="default_dispvm"></property>
      </properties>
      <features>
        <feature name="backup-content">1</feature>
        <feature name="backup-path">dom0-home/user</feature>
        <feature name="backup-size">20971520</feature>
        <feature name="config.default.qubes-update-check"></feature>
      </features>
      <tags/>
    </domain>
    <domain id="domain-7" class="TemplateVM">
      <properties>
        <property name="label">black</property>
        <property name="name">fedora-41</property>
        <property name="qid">7</property>
        <property name="uuid">e3b8d458-8c4c-4ccb-b00d-b7ae454cb08f</property>
      </properties>
      <features>
        <feature name="backup-content"></feature>
      </features>
      <tags/>
      <volume-config>
        <volume name="root" rw="True" save_on_stop="True" snap_on_start="False" size="21474836480"/>
        <volume name="private" rw="True" save_on_stop="True" snap_on_start="False" size="2147483648"/>
      </volume-config>
    </domain>
    <domain id="domain-9" class="StandaloneVM">
      <properties>
        <property name="kernel"></property>
        <property name="label">label-1</property>
        <property name="maxmem">4000</property>
        <property name="name">builder</property>
        <property name="netvm"></property>
        <property name="qid">9</property>
        <property name="virt_mode">hvm</property>
      </properties>
      <features>
        <feature name="backup-content">1</feature>
        <feature name="backup-path">vm9/</feature>
        <feature name="backup-size">2097152000</feature>
        <feature name="service.cups"></feature>
        <feature name="menu-items">firefox.desktop xterm.desktop</feature>
      </features>
      <tags>
        <tag name="created-by-dom0"/>
        <tag name="project-a"/>
      </tags>
      <devices class="pci">
        <device backend-domain="dom0" id="00_14.0" mode="required" identity="*">
          <option name="no-strict-reset">True</option>
        </device>
      </devices>
      <volume-config>
        <volume name="root" rw="True" save_on_stop="True" snap_on_start="False" size="10737418240"/>
        <volume name="private" rw="True" save_on_stop="True" snap_on_start="False" size="2147483648"/>
        <volume name="volatile" rw="True" save_on_stop="False" snap_on_start="False" size="10737418240"/>
        <volume name="kernel" rw="False" save_on_stop="False" snap_on_start="False"/>
      </volume-config>
    </domain>
    <domain id="domain-20" class="AppVM">
      <properties>
        <property name="label">red</property>
        <property name="name">work</property>
        <property name="qid">20</property>
        <property name="template">fedora-41</property>
      </properties>
      <features>
        <feature name="backup-content">1</feature>
        <feature name="backup-path">vm20/</feature>
        <feature name="backup-size">1</feature>
      </features>
      <tags/>
      <volume-config>
        <volume name="root" rw="True" save_on_stop="False" snap_on_start="True" source="x" size="1"/>
        <volume name="private" rw="True" save_on_stop="True" snap_on_start="False" size="2147483648"/>
      </volume-config>
    </domain>
    <domain id="domain-21" class="DispVM">
      <properties>
        <property name="auto_cleanup">False</property>
        <property name="label">red</property>
        <property name="name">sys-usb</property>
        <property name="netvm">sys-firewall</property>
        <property name="qid">21</property>
        <property name="template">default-dvm</property>
      </properties>
      <features>
        <feature name="backup-content">1</feature>
        <feature name="backup-path">vm21/</feature>
        <feature name="backup-size">0</feature>
      </features>
      <tags/>
      <volume-config>
        <volume name="private" rw="True" save_on_stop="False" snap_on_start="True" source="x" size="1"/>
      </volume-config>
    </domain>
  </domains>
</qubes>
"""


def domain(
    name: str | None = "work",
    *,
    klass: str | None = "AppVM",
    path: str | None = "vm10/",
    label: str | None = "red",
    content: str = "1",
    properties: Mapping[str, str] | None = None,
    features: Mapping[str, str] | None = None,
    more: str = "",
) -> str:
    """The XML of one domain in the backup; None leaves out, `more` is added as it is."""
    texts = {"name": name, "label": label} | dict(properties or {})
    flags = {"backup-content": content, "backup-path": path} | dict(features or {})

    def nodes(kind: str, values: Mapping[str, str | None]) -> str:
        return "".join(
            f"<{kind} name={quoteattr(key)}>{escape(value)}</{kind}>"
            for key, value in values.items()
            if value is not None
        )

    return (
        f"<domain{'' if klass is None else f' class={quoteattr(klass)}'}>"
        f"<properties>{nodes('property', texts)}</properties>"
        f"<features>{nodes('feature', flags)}</features>{more}</domain>"
    )


def parse(*domains: str) -> BackupContent:
    labels = '<labels><label id="label-1">red</label><label id="label-8">black</label></labels>'
    return parse_qubes_xml(f"<qubes>{labels}<domains>{''.join(domains)}</domains></qubes>".encode())


def listed(text: str) -> tuple[ManifestQube, tuple[str, ...]]:
    """The one qube that `text` describes, and the warnings."""
    content = parse(text)
    assert content.refused == ()
    (qube,) = content.qubes
    return qube.info, content.warnings


def reason(text: str) -> str:
    """Why the domain `text` is refused; an innocent one beside it is listed."""
    content = parse(text, domain("innocent", path="vm99/"))
    assert [qube.info.name for qube in content.qubes] == ["innocent"]
    (refused,) = content.refused
    assert refused.error.kind == "bad-metadata"
    return refused.error.reason


def whole_file(document: bytes) -> str:
    with pytest.raises(BadMetadata) as caught:
        parse_qubes_xml(document)
    return caught.value.reason


# --- What the stock writers write ------------------------------------------------------------------


def test_qubes_are_read_as_qubesd_writes_them() -> None:
    content = parse_qubes_xml(WRITTEN)
    dom0, builder, work, sys_usb = content.qubes
    assert content.refused == () and content.warnings == ()
    assert dom0 == BackupQube(
        ManifestQube(
            key="dom0",
            name="dom0",
            klass="AdminVM",
            label="black",
            home_user="user",
            backup_size=20971520,
            volumes=(VolumeInfo(name="home"),),
            properties={"default_dispvm": ""},
            features={"config.default.qubes-update-check": ""},
        ),
        "dom0-home/user",
    )
    assert builder == BackupQube(
        ManifestQube(
            key="vm9",
            name="builder",
            klass="StandaloneVM",
            label="red",
            netvm="",
            backup_size=2097152000,
            volumes=(
                VolumeInfo(name="root", size=10737418240),
                VolumeInfo(name="private", size=2147483648),
            ),
            properties={"kernel": "", "maxmem": "4000", "virt_mode": "hvm"},
            features={"service.cups": "", "menu-items": "firefox.desktop xterm.desktop"},
            tags=("created-by-dom0", "project-a"),
            devices=(
                DeviceInfo(
                    bus="pci",
                    backend="dom0",
                    port="00_14.0",
                    required=True,
                    options={"no-strict-reset": "True"},
                ),
            ),
        ),
        "vm9",
    )
    assert (work.info.template, work.info.netvm, work.path) == ("fedora-41", None, "vm20")
    assert work.info.volumes == (VolumeInfo(name="private", size=2147483648),)
    assert (sys_usb.info.klass, sys_usb.info.netvm, sys_usb.info.volumes) == ("DispVM", "sys-firewall", ())


def _plaintext(container: bytes, passphrase: str) -> bytes:
    log_n, r, p = container[7], int.from_bytes(container[8:12]), int.from_bytes(container[12:16])
    key = hashlib.scrypt(
        passphrase.encode(), salt=container[16:48], n=1 << log_n, r=r, p=p, dklen=32, maxmem=1 << 30
    )
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).decryptor().update(container[96:-32])


def test_a_recorded_backup_lists_its_qubes() -> None:
    backup = shared_fixture("gzip.qbackup")
    facts = expectation(backup)
    with tarfile.open(backup, "r:", ignore_zeros=True) as outer:
        member = next(member for member in outer if member.name == "qubes.xml.000.enc")
        container = outer.extractfile(member)
        assert container
        inner = gzip.decompress(
            _plaintext(container.read(), f"{facts.backup_id}!qubes.xml.000!{facts.passphrase}")
        )
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        document = archive.extractfile("qubes.xml")
        assert document
        content = parse_qubes_xml(document.read())
    volumes = {
        f"{qube.info.name}/{volume.name}": volume.size
        for qube in content.qubes
        for volume in qube.info.volumes
        if volume.name != "home"
    }
    assert volumes == {name: volume.size for name, volume in facts.volumes.items()}
    assert content.refused == () and content.warnings == ()


@pytest.mark.parametrize(
    ("klass", "volumes"),
    [
        ("TemplateVM", ["root", "private"]),
        ("StandaloneVM", ["root", "private"]),
        ("AppVM", ["private"]),
        ("DispVM", []),
    ],
)
def test_without_volume_config_the_class_says_which_volumes_there_are(klass: str, volumes: list[str]) -> None:
    qube, warnings = listed(domain(klass=klass))
    assert [(volume.name, volume.size) for volume in qube.volumes] == [(name, None) for name in volumes]
    assert warnings == ()


# --- Which domains are in the backup -----------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "False", "0", "no"])
def test_a_domain_that_is_not_in_the_backup_is_not_looked_at(content: str) -> None:
    result = parse(domain("\x7f", klass="?", content=content, label=None), domain("work"))
    assert [qube.info.name for qube in result.qubes] == ["work"]
    assert result.refused == () and result.warnings == ()


@pytest.mark.parametrize("content", ["1", "True", "true", "yes"])
def test_every_true_spelling_counts(content: str) -> None:
    assert listed(domain(content=content))[0].name == "work"


def test_a_domain_without_the_feature_is_not_in_the_backup() -> None:
    assert parse("<domain class='AppVM'/>").qubes == ()


# --- Identity: what refuses a qube --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "1work",
        "-rf",
        "a b",
        "wörk",
        "a/b",
        "a" * 32,
        "work\n",
        "a\u202eb",
        "\u009b31m",
        "@default",
        "none",
        "work-dm",
    ],
)
def test_a_name_that_no_qube_can_have_is_refused_and_shown_safely(name: str) -> None:
    assert reason(domain(name)) == "its name is not one that a qube can have"
    shown = parse(domain(name)).refused[0].name
    assert shown.isprintable()


def test_the_name_of_dom0_is_refused() -> None:
    assert reason(domain("dom0")) == "its name is dom0's"


@pytest.mark.parametrize("name", ["Dom0", "DOM0", "domain-0"])
def test_a_name_that_only_looks_like_that_of_dom0_costs_no_qube(name: str) -> None:
    qube, warnings = listed(domain(name))
    assert (qube.name, warnings) == (name, ())


@pytest.mark.parametrize("name", [None, ""])
def test_a_qube_without_a_name_is_refused(name: str | None) -> None:
    assert reason(domain(name)) == "it has no name"
    assert parse(domain(name)).refused[0].name == "(without a name)"


def test_a_long_name_is_cut_when_it_is_shown() -> None:
    assert parse(domain("x" * 100_000)).refused[0].name == "x" * 80 + "…"


@pytest.mark.parametrize("klass", [None, "", "RemoteVM", "QubesVM", "\u009b[2J"])
def test_an_unknown_class_is_refused(klass: str | None) -> None:
    text = reason(domain(klass=klass))
    assert text.startswith("it is of the class '") and text.isprintable()


@pytest.mark.parametrize("label", ["green", "label-5", "la bel", "label-9", "label-7"])
def test_a_label_that_the_file_does_not_define_becomes_red(label: str) -> None:
    labels = '<labels><label id="label-9">a b</label><label id="label-7"/></labels>'
    content = parse_qubes_xml(f"<qubes>{labels}<domains>{domain(label=label)}</domains></qubes>".encode())
    assert [qube.info.label for qube in content.qubes] == ["red"]
    assert content.warnings == ("work: its label cannot be read; it is 'red' now",)


@pytest.mark.parametrize("label", [None, ""])
def test_a_qube_without_a_label_becomes_red(label: str | None) -> None:
    qube, warnings = listed(domain(label=label))
    assert qube.label == "red"
    assert warnings == ("work: its label cannot be read; it is 'red' now",)


def test_dom0_needs_no_label() -> None:
    qube, _ = listed(domain(None, klass="AdminVM", path="dom0-home/user", label=None))
    assert (qube.name, qube.label) == ("dom0", "black")


def test_a_label_can_be_given_by_id_by_name_or_by_reference() -> None:
    reference = domain(label=None).replace(
        "<properties>", '<properties><property name="label" ref="label-1"/>'
    )
    assert [listed(text)[0].label for text in (domain(label="label-1"), domain(label="red"), reference)] == [
        "red",
        "red",
        "red",
    ]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (None, "does not say where"),
        ("", "does not say where"),
        ("/", "does not say where"),
        ("/vm10", "not a plain relative path"),
        ("../vm10", "not a plain relative path"),
        ("vm10/..", "not a plain relative path"),
        ("./vm10", "not a plain relative path"),
        ("vm10//", "not a plain relative path"),
        ("a//b", "not a plain relative path"),
        ("a\\b", "not a plain relative path"),
        ("a b", "not a plain relative path"),
        ("a\nb", "not a plain relative path"),
        ("vm10\n", "not a plain relative path"),
        ("vm１0", "not a plain relative path"),
        ("a" * 256, "not a plain relative path"),
        ("dom0-home/user", "not where a qube of the class AppVM lies"),
        ("dom0-home", "not where a qube of the class AppVM lies"),
    ],
)
def test_a_path_that_is_not_plain_is_refused(path: str | None, why: str) -> None:
    assert why in reason(domain(path=path))


@pytest.mark.parametrize("user", ["user", "a.b-c_1@x", "u" * 245])
def test_whose_home_it_is_stands_in_its_path(user: str) -> None:
    qube, _ = listed(domain(None, klass="AdminVM", path=f"dom0-home/{user}/", label=None))
    assert qube.home_user == user


@pytest.mark.parametrize("path", ["vm0", "dom0-home", "dom0-home/user/x", "qubes.xml"])
def test_dom0_lies_in_dom0_home_only(path: str) -> None:
    assert "class AdminVM" in reason(domain(None, klass="AdminVM", path=path))


@pytest.mark.parametrize(
    ("first", "second"),
    [("vm1", "vm1/"), ("vm1", "vm1/x"), ("vm1/x", "vm1"), ("a/b/c", "a/b"), ("a", "a/b/c/d")],
)
def test_two_qubes_of_which_one_lies_in_the_place_of_the_other_are_both_refused(
    first: str, second: str
) -> None:
    content = parse(domain("one", path=first), domain("two", path=second), domain("three", path="vm3"))
    assert [qube.info.name for qube in content.qubes] == ["three"]
    assert [(qube.name, qube.error.reason) for qube in content.refused] == [
        ("one", "its place in the backup overlaps that of another qube, 'two'"),
        ("two", "its place in the backup overlaps that of another qube, 'one'"),
    ]


def test_of_many_qubes_in_one_place_none_is_listed_and_those_beside_it_are() -> None:
    paths = ["a/b/c", "a.b", "a/b", "a/b/c/d", "a", "a+", "a/b", "b", "a-b/c", "a-b"]
    content = parse(*[domain(f"q{number}", path=path) for number, path in enumerate(paths)])
    assert [qube.path for qube in content.qubes] == ["a.b", "a+", "b"]
    assert [qube.name for qube in content.refused] == ["q0", "q2", "q3", "q4", "q6", "q8", "q9"]
    assert all("overlaps" in qube.error.reason for qube in content.refused)


@pytest.mark.parametrize(
    "refused",
    [
        domain("two", path="vm1", label=None),
        domain("--help", path="vm1"),
        domain("dom0", path="vm1"),
        domain("two", path="vm1", klass="RemoteVM"),
    ],
    ids=["no label", "no name", "dom0's name", "unknown class"],
)
def test_the_place_of_a_refused_qube_is_free_for_no_other(refused: str) -> None:
    one = domain("one", path="vm1")
    for content in (parse(refused, one), parse(one, refused)):
        assert content.qubes == () and len(content.refused) == 2


def test_a_place_that_no_qube_can_have_is_taken_from_none() -> None:
    content = parse(
        domain(None, klass="AdminVM", path="dom0-home/user", label=None),
        domain("one", path="dom0-home/user"),
        domain("two", path="vm1//"),
        domain("three", path="vm1/"),
    )
    assert [qube.info.name for qube in content.qubes] == ["dom0", "three"]


def test_the_other_qube_is_named_in_a_form_fit_for_a_terminal() -> None:
    content = parse(domain("a\x9b2J\u202e" + "b" * 500, path="vm1"), domain("two", path="vm1"))
    assert content.refused[1].error.reason.endswith(f"another qube, 'a\ufffd2J\ufffd{'b' * 75}…'")
    content = parse(domain("", path="vm1"), domain("two", path="vm1"))
    assert content.refused[1].error.reason.endswith("'(without a name)'")


def test_paths_beside_each_other_do_not_overlap() -> None:
    content = parse(*[domain(f"q{n}", path=path) for n, path in enumerate(["a/b", "a/bc", "ab", "a/c/d"])])
    assert [qube.path for qube in content.qubes] == ["a/b", "a/bc", "ab", "a/c/d"]


def test_names_may_differ_in_case_only_and_the_second_of_two_equal_ones_is_refused() -> None:
    content = parse(domain("work", path="vm1"), domain("Work", path="vm2"), domain("work", path="vm3"))
    assert [qube.path for qube in content.qubes] == ["vm1", "vm2"]
    assert {qube.error.reason for qube in content.refused} == {"another qube in the backup has the same name"}


def test_a_second_dom0_is_refused() -> None:
    content = parse(
        domain(None, klass="AdminVM", path="dom0-home/user"),
        domain(None, klass="AdminVM", path="dom0-home/other"),
    )
    assert [qube.path for qube in content.qubes] == ["dom0-home/user"]
    assert [qube.name for qube in content.refused] == ["dom0"]


def test_more_settings_than_a_manifest_takes_stay_behind_and_cost_no_qube() -> None:
    many = {f"p{number}": "" for number in range(600)} | {"default_dispvm": "late"}
    tags = "".join(f'<tag name="t{number}"/>' for number in range(1100))
    features = {f"f{number}": "" for number in range(4200)}
    qube, warnings = listed(domain(properties=many, features=features, more=f"<tags>{tags}</tags>"))
    assert len(qube.properties) <= 512 and qube.properties["default_dispvm"] == ""
    assert len(qube.features) <= 4096 and len(qube.tags) == 1024
    assert warnings[-1].endswith("more settings in qubes.xml are not as Qubes writes them")


def test_the_last_of_a_volume_that_stands_twice_counts() -> None:
    volume = '<volume name="private" save_on_stop="True" size="{}"/>'.format
    qube, _ = listed(domain(more=f"<volume-config>{volume(1)}{volume(2)}</volume-config>"))
    assert qube.volumes == (VolumeInfo(name="private", size=2),)


def test_a_setting_that_cannot_be_read_leaves_the_qube_no_more_open_than_it_was() -> None:
    qube, warnings = listed(
        domain(
            properties={"default_dispvm": "öffnen", "devices_denied": "ü"},
            features={"prohibit-start": "für später"},
        )
    )
    assert qube.properties == {"default_dispvm": "", "devices_denied": "*******"}
    assert qube.features == {"prohibit-start": "the reason cannot be read"}
    assert warnings == (
        "work: the property 'default_dispvm' cannot be read; it is '' now",
        "work: the property 'devices_denied' cannot be read; it is '*******' now",
        "work: the feature 'prohibit-start' cannot be read; it is 'the reason cannot be read' now",
    )


# --- Keys ---------------------------------------------------------------------------------------------


def test_keys_are_the_last_part_of_the_path_or_made_up_when_that_is_taken() -> None:
    paths = ["appvms/work", "servicevms/work", "x/qube4", "y/a.b", "z/dom0", "w/" + "k" * 65, "v/qube3"]
    content = parse(
        *[domain(f"q{number}", path=path) for number, path in enumerate(paths)],
        domain(None, klass="AdminVM", path="dom0-home/user"),
    )
    keys = [qube.info.key for qube in content.qubes]
    assert keys == ["work", "qube2", "qube4", "qube5", "qube6", "qube7", "qube3", "dom0"]


def test_a_key_is_not_made_up_twice() -> None:
    content = parse(domain("a", path="1/qube2"), domain("b", path="2/qube2"), domain("c", path="3/qube3"))
    assert [qube.info.key for qube in content.qubes] == ["qube2", "qube3", "qube4"]


# --- Single settings: what is left out ------------------------------------------------------------------


@pytest.mark.parametrize("netvm", ["", "none", "None"])
def test_an_empty_netvm_is_no_network(netvm: str) -> None:
    qube, warnings = listed(domain(properties={"netvm": netvm}))
    assert qube.netvm == "" and warnings == ()


def test_a_netvm_that_is_no_name_becomes_no_network_instead_of_the_default() -> None:
    qube, warnings = listed(domain(properties={"netvm": "sys net\u009b"}))
    assert qube.netvm == ""
    assert warnings == ("work: its netvm is not the name of a qube; it will have no network",)


@pytest.mark.parametrize(
    ("klass", "template"), [("AppVM", "a b"), ("StandaloneVM", "fedora"), ("DispVM", "1")]
)
def test_a_template_that_cannot_be_is_left_out(klass: str, template: str) -> None:
    qube, warnings = listed(domain(klass=klass, properties={"template": template}))
    assert qube.template is None
    assert warnings == ("work: its template is not one that it can have; left out",)


def test_properties_features_and_tags_without_a_value_are_left_out_with_a_warning() -> None:
    qube, warnings = listed(
        domain(
            properties={"memory": "400", "Bad": "1", "kernelopts": "a\nb", "": "x"},
            features={"gui": "1", "a b": "1", "os": "linüx", "x\u202e": ""},
            more='<tags><tag name="good"/><tag name="b d"/><tag/><tag name="good"/></tags>',
        )
    )
    assert qube.properties == {"memory": "400"}
    assert qube.features == {"gui": "1"}
    assert qube.tags == ("good",)
    assert warnings == (
        "work: the property 'Bad' cannot be restored; left out",
        "work: the property 'kernelopts' cannot be restored; left out",
        "work: the property '' cannot be restored; left out",
        "work: the feature 'a b' cannot be restored; left out",
        "work: the feature 'os' cannot be restored; left out",
        "work: the feature 'x\ufffd' cannot be restored; left out",
        "work: the tag 'b d' cannot be restored; left out",
        "work: the tag '' cannot be restored; left out",
    )


def test_the_last_of_two_equal_names_counts_as_it_does_for_qubesd() -> None:
    text = domain(properties={"netvm": "sys-net", "memory": "1", "vcpus": "1"})
    again = '<property name="{}">{}</property>'.format
    last = again("netvm", "") + again("memory", "2") + again("vcpus", "ü")
    qube, _ = listed(text.replace("</properties>", last + "</properties>"))
    assert qube.netvm == "" and qube.properties == {"memory": "2"}


def test_what_the_manifest_says_elsewhere_is_not_said_again_as_a_setting() -> None:
    identity = {"qid": "1", "uuid": "x", "template": "fedora", "netvm": "sys-net"}
    qube, _ = listed(domain(properties=identity, features={"backup-size": "7"}))
    assert qube.properties == {} and qube.features == {}
    assert (qube.template, qube.netvm, qube.backup_size) == ("fedora", "sys-net", 7)


@pytest.mark.parametrize("size", ["", "-1", "1.5", "1e9", " 1", "9" * 19, "9" * 5000, "٣", "0x10", "None"])
def test_a_size_that_is_no_size_is_left_out_with_a_warning(size: str) -> None:
    volume = (
        f'<volume-config><volume name="private" save_on_stop="True" size={quoteattr(size)}/></volume-config>'
    )
    qube, warnings = listed(domain(features={"backup-size": size}, more=volume))
    assert qube.backup_size == 0 and qube.volumes == (VolumeInfo(name="private"),)
    assert warnings == (
        "work: backup-size is not a size in bytes; left out",
        "work: the size of its volume private is not a size in bytes; left out",
    )


def test_volumes_that_cannot_be_restored_or_are_missing_are_warned_about() -> None:
    config = """<volume-config>
        <volume name="extra\u202e" save_on_stop="True"/>
        <volume name="private" save_on_stop="False"/>
        <volume name="root" save_on_stop="true" size="5"/>
        <volume name="home" save_on_stop="True"/>
        <volume save_on_stop="True"/>
    </volume-config>"""
    qube, warnings = listed(domain(klass="TemplateVM", more=config))
    assert qube.volumes == (VolumeInfo(name="root", size=5),)
    assert warnings == (
        "work: it has a volume 'extra\ufffd', which cannot be restored",
        "work: it has a volume 'home', which cannot be restored",
        "work: it has a volume '', which cannot be restored",
        "work: its list of volumes leaves out private, which comes back if the backup holds it",
    )


def test_dom0_has_a_home_and_no_images_whatever_the_file_says() -> None:
    config = '<volume-config><volume name="root" save_on_stop="True"/></volume-config>'
    qube, _ = listed(domain(None, klass="AdminVM", path="dom0-home/user", more=config))
    assert qube.volumes == (VolumeInfo(name="home"),)


def test_warnings_are_bounded() -> None:
    content = parse(domain(features={f" {number}" + "x" * 500: "" for number in range(1000)}))
    assert len(content.warnings) == MAX_WARNINGS + 1
    assert content.warnings[-1] == "800 more settings in qubes.xml are not as Qubes writes them"
    assert max(map(len, content.warnings)) < 200


def test_text_is_read_as_far_as_qubesd_reads_it() -> None:
    qube, _ = listed(
        domain().replace("</properties>", '<property name="memory">4<!-- 0 -->00</property></properties>')
    )
    assert qube.properties == {"memory": "4"}


# --- The file as a whole --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document",
    [
        b'<!DOCTYPE qubes [<!ENTITY a "x">]><qubes>&a;</qubes>',
        b'<!DOCTYPE qubes [<!ENTITY a "xxxxxxxxxx"><!ENTITY b "&a;&a;&a;&a;">]><qubes>&b;</qubes>',
        b'<!DOCTYPE qubes [<!ENTITY a SYSTEM "file:///etc/passwd">]><qubes>&a;</qubes>',
        b'<!DOCTYPE qubes [<!ENTITY % a SYSTEM "http://127.0.0.1/x"> %a;]><qubes/>',
        b'<!DOCTYPE qubes SYSTEM "http://127.0.0.1/qubes.dtd"><qubes/>',
        b"<!DOCTYPE qubes><qubes/>",
    ],
)
def test_a_document_type_or_an_entity_is_refused(document: bytes) -> None:
    assert whole_file(document) == "qubes.xml declares a document type or entities; Qubes never does"


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"   ",
        b"qubes",
        b"<qubes>",
        b"<qubes></domains>",
        b"<qubes/><qubes/>",
        b"<qubes>&undefined;</qubes>",
        b"<qubes a='1' a='2'/>",
        b"<qubes>\xff</qubes>",
        b"<qubes>\xed\xa0\x80</qubes>",
        b"<qubes>\x1b</qubes>",
        b"<qubes>&#27;</qubes>",
        WRITTEN[:-20],
    ],
)
def test_what_is_not_xml_is_refused_with_its_place_and_without_its_text(document: bytes) -> None:
    text = whole_file(document)
    assert text.startswith("qubes.xml is not well-formed XML (line ")
    assert "undefined" not in text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_only_utf_8_is_read(encoding: str) -> None:
    assert whole_file(WRITTEN.decode().encode(encoding)) == "qubes.xml is not UTF-8 text"


@pytest.mark.parametrize("encoding", ["cp037", "gb2312", "idna", "nonsense", "rot13", "utf-7", "utf-16"])
def test_another_encoding_in_the_declaration_changes_nothing(encoding: str) -> None:
    document = WRITTEN.replace(b"encoding='utf-8'", f"encoding='{encoding}'".encode())
    assert parse_qubes_xml(document) == parse_qubes_xml(WRITTEN)


@pytest.mark.parametrize(
    "document", [b"<x/>", b"<qubes/>", b"<domains/>", b"<q:qubes xmlns:q='u'><domains/></q:qubes>"]
)
def test_another_document_is_refused(document: bytes) -> None:
    assert whole_file(document) == "qubes.xml does not hold a list of qubes"


def test_the_old_form_is_told_apart() -> None:
    assert "Qubes R3.2" in whole_file(
        b"<QubesVmCollection default_kernel='3'><QubesAppVm/></QubesVmCollection>"
    )


def test_a_file_without_any_qube_in_the_backup_lists_nothing() -> None:
    assert parse_qubes_xml(b"<!-- c --><qubes><domains/></qubes>") == BackupContent((), (), ())


def test_a_file_larger_than_the_limit_is_not_parsed() -> None:
    padding = b" " * (MAX_QUBES_XML - len(WRITTEN))
    assert len(parse_qubes_xml(WRITTEN + padding).qubes) == 4
    assert f"at most {MAX_QUBES_XML}" in whole_file(WRITTEN + padding + b" ")


def test_deep_nesting_does_no_harm_even_without_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xml_tree, "MAX_DEPTH", 1 << 30)
    assert whole_file(b"<a>" * 100_000 + b"</a>" * 100_000) == "qubes.xml does not hold a list of qubes"


@pytest.mark.parametrize(
    "document",
    [
        b"<qubes>" + b"<a/>" * 250_000 + b"</qubes>",
        b"<qubes>" + b"<!---->" * 250_000 + b"</qubes>",
        b"<qubes>" + b"<?a?>" * 250_000 + b"</qubes>",
        b"<qubes " + b" ".join(b'a%d=""' % number for number in range(250_000)) + b"/>",
    ],
)
def test_a_flood_of_tags_or_attributes_is_refused_before_it_takes_memory(document: bytes) -> None:
    tracemalloc.start()
    try:
        assert whole_file(document) == "qubes.xml holds more than 200000 tags or attributes"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_too_many_qubes_are_refused() -> None:
    empty = "<domain class='AppVM'/>"
    assert parse(*[empty] * MAX_QUBES).qubes == ()
    with pytest.raises(BadMetadata, match="lists 4097 qubes"):
        parse(*[empty] * (MAX_QUBES + 1))


def test_more_than_a_manifest_holds_is_refused() -> None:
    long = {f"f{number}": "x" * 16_000 for number in range(140)}
    assert len(parse(domain("one", path="vm1", features=long)).qubes) == 1
    with pytest.raises(BadMetadata, match="describes more than the 4 MiB"):
        parse(domain("one", path="vm1", features=long), domain("two", path="vm2", features=long))


def test_room_is_left_for_any_backup_id_and_filter_name() -> None:
    features = {f"f{number}": "x" * 16_000 for number in range(261)}
    (qube,) = parse(domain(features=features)).qubes
    manifest = Manifest(backup_id="1", format=4, compression_filter="gzip", qubes=(qube.info,))
    features["f"] = "x" * (Manifest.max_size - len(encode_message(manifest)) - 50)
    with pytest.raises(BadMetadata, match="describes more than"):
        parse(domain(features=features))


def test_the_most_qubes_there_can_be_are_all_read() -> None:
    config = '<volume-config><volume name="private" save_on_stop="True" size="1"/></volume-config>'
    qubes = [
        domain(f"q{n}", path=f"vm{n}/", properties={"memory": "1"}, more=config) for n in range(MAX_QUBES)
    ]
    assert len(parse(*qubes).qubes) == MAX_QUBES


# --- Anything ---------------------------------------------------------------------------------------------


def check(document: bytes) -> None:
    """`document` is refused as a whole, or what is returned is what a manifest may hold."""
    try:
        content = parse_qubes_xml(document)
    except BadMetadata as error:
        assert error.reason == strip_control(error.reason)
        return
    manifest = Manifest(
        backup_id="x",
        format=4,
        compression_filter="gzip",
        qubes=tuple(ManifestQube.model_validate(qube.info.model_dump()) for qube in content.qubes),
        refused=content.refused,
    )
    encode_message(manifest)
    paths = [qube.path + "/" for qube in content.qubes]
    assert all(first == second or not first.startswith(second) for first in paths for second in paths)
    assert all(".." not in path.split("/") and path[0] != "/" for path in paths)
    texts = [*content.warnings, *(qube.name for qube in content.refused)]
    assert all(text == strip_control(text) and len(text) < 500 for text in texts)


TEXT = st.one_of(
    st.sampled_from(
        ["", "1", "work", "vm1/", "vm1/x", "dom0", "dom0-home/u", "red", "label-1", "None", "-5", "9" * 20]
    ),
    st.text(
        st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\ufffe\uffff"),
        max_size=12,
    ),
)
KLASS = st.sampled_from(["AdminVM", "AppVM", "TemplateVM", "StandaloneVM", "DispVM", "RemoteVM", ""])
NAMES = (
    st.sampled_from(["netvm", "template", "memory", "backup-size", "backup-content", "label", "gui", ""])
    | TEXT
)


@st.composite
def domains(draw: st.DrawFn) -> str:
    volume = st.fixed_dictionaries(
        {"name": st.sampled_from(["root", "private", "home", "volatile"]) | TEXT},
        optional={"size": TEXT, "save_on_stop": st.sampled_from(["True", "False"]) | TEXT},
    )
    volumes = "".join(
        "<volume " + " ".join(f"{key}={quoteattr(value)}" for key, value in one.items()) + "/>"
        for one in draw(st.lists(volume, max_size=3))
    )
    tags = "".join(f"<tag name={quoteattr(tag)}/>" for tag in draw(st.lists(TEXT, max_size=2)))
    return domain(
        draw(TEXT),
        klass=draw(KLASS),
        path=draw(TEXT),
        label=draw(st.sampled_from(["red", "label-8"]) | TEXT),
        properties=draw(st.dictionaries(NAMES, TEXT, max_size=4)),
        features=draw(st.dictionaries(NAMES, TEXT, max_size=4)),
        more=f"<tags>{tags}</tags>"
        + draw(st.sampled_from(["", f"<volume-config>{volumes}</volume-config>"])),
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(domains(), max_size=5))
def test_whatever_is_listed_fits_a_manifest(texts: list[str]) -> None:
    labels = '<labels><label id="label-1">red</label><label id="label-8">black</label></labels>'
    check(f"<qubes>{labels}<domains>{''.join(texts)}</domains></qubes>".encode())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, len(WRITTEN)), st.integers(0, 60))
def test_any_bytes_are_read_or_refused(junk: bytes, start: int, length: int) -> None:
    check(junk)
    check(WRITTEN[:start] + junk + WRITTEN[start + length :])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(WRITTEN)), st.integers(0, len(WRITTEN)), st.integers(0, 200))
def test_pieces_of_the_file_in_other_places_are_read_or_refused(
    source: int, target: int, length: int
) -> None:
    check(WRITTEN[:target] + WRITTEN[source : source + length] + WRITTEN[target:])
