"""firewall.xml, notes.txt and the menu list: what is read, and that doubt is always an error."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_restore_svc.archive.settings_files import (
    MAX_APPMENUS,
    MAX_COMMENT,
    MAX_RULES,
    MAX_SETTINGS_FILE,
    parse_appmenus,
    parse_firewall,
    parse_notes,
)
from qubes_restore_svc.errors import BadMetadata
from qubes_restore_svc.wire.messages import FirewallRule, QubeSettings, encode_message
from qubes_restore_svc.wire.names import MAX_NOTES

# As qubesd writes it.
WRITTEN = b"""<firewall version="2">
  <rules>
    <rule>
      <properties>
        <property name="action">accept</property>
        <property name="dsthost">www.qubes-os.org</property>
        <property name="proto">tcp</property>
        <property name="dstports">443-445</property>
        <property name="comment">the site: [docs], too</property>
      </properties>
    </rule>
    <rule>
      <properties>
        <property name="action">accept</property>
        <property name="specialtarget">dns</property>
        <property name="expire">1893456000</property>
      </properties>
    </rule>
    <rule>
      <properties>
        <property name="action">accept</property>
        <property name="proto">icmp</property>
        <property name="icmptype">8</property>
      </properties>
    </rule>
    <rule>
      <properties>
        <property name="action">drop</property>
      </properties>
    </rule>
  </rules>
</firewall>
"""


def rule_xml(**fields: str) -> str:
    properties = "".join(f'<property name="{name}">{value}</property>' for name, value in fields.items())
    return f"<rule><properties>{properties}</properties></rule>"


def firewall_xml(*rules: str) -> bytes:
    return f'<firewall version="2"><rules>{"".join(rules)}</rules></firewall>'.encode()


def refusal(untrusted_xml: bytes) -> str:
    with pytest.raises(BadMetadata) as caught:
        parse_firewall(untrusted_xml)
    return caught.value.reason


def test_rules_are_read_as_qubesd_writes_them() -> None:
    assert parse_firewall(b'<?xml version="1.0" encoding="UTF-8"?>\n' + WRITTEN) == (
        FirewallRule(
            action="accept",
            dsthost="www.qubes-os.org",
            proto="tcp",
            dstports="443-445",
            comment="the site: [docs], too",
        ),
        FirewallRule(action="accept", specialtarget="dns", expire="1893456000"),
        FirewallRule(action="accept", proto="icmp", icmptype="8"),
        FirewallRule(action="drop"),
    )


def test_a_list_without_rules_stays_without_rules() -> None:
    assert parse_firewall(b'<firewall version="2"><rules/></firewall>') == ()


@pytest.mark.parametrize(
    "host",
    [
        "192.168.0.0/24",
        "10.1.2.3/8",
        "0.0.0.0/0",
        "1.2.3.4",
        "2001:db8::1",
        "2001:DB8::/32",
        "::/0",
        "::ffff:1.2.3.4/128",
        "a_b.example-1.org",
    ],
)
def test_dsthost_keeps_hosts_addresses_and_networks_as_they_are(host: str) -> None:
    (rule,) = parse_firewall(firewall_xml(rule_xml(action="accept", dsthost=host)))
    assert rule == FirewallRule(action="accept", dsthost=host)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("action", "allow"),
        ("action", "ACCEPT"),
        ("action", " accept"),
        ("proto", "any"),
        ("proto", "tcp\n"),
        ("dsthost", "1.2.3.4/33"),
        ("dsthost", "::1/129"),
        ("dsthost", "1.2.3.0/255.255.255.0"),
        ("dsthost", "1.2.3.4/24/24"),
        ("dsthost", "1.2.3.4/-1"),
        ("dsthost", "1.2.3.4/"),
        ("dsthost", "host/24"),
        ("dsthost", "fe80::1%eth0"),
        ("dsthost", "Host.Example.org"),
        ("dsthost", "h;drop"),
        ("dsthost", "h" * 256),
        ("dsthost", "hôte"),
        ("dsthost", "１.2.3.4"),
        ("dst4", "::1"),
        ("dst4", "example.org"),
        ("dst6", "1.2.3.4"),
        ("dstports", "65536"),
        ("dstports", "2-1"),
        ("dstports", "1-2-3"),
        ("dstports", "-1"),
        ("dstports", "1-"),
        ("dstports", "٤٤٣"),
        ("dstports", "443 "),
        ("icmptype", "256"),
        ("icmptype", "0008"),
        ("specialtarget", "any"),
        ("expire", "soon"),
        ("expire", "999999999999"),
        ("expire", "1e9"),
        ("comment", "&lt;b&gt;"),
        ("comment", "two\nlines"),
        ("comment", "\u009b2J"),
    ],
)
def test_a_value_that_qubesd_does_not_know_names_the_rule_and_the_field_only(field: str, value: str) -> None:
    fields = {"action": "accept", "proto": "icmp" if field == "icmptype" else "tcp"} | {field: value}
    reason = refusal(firewall_xml(rule_xml(action="drop"), rule_xml(**fields)))
    assert reason == f"rule 2 in firewall.xml has a value of {field} that Qubes does not know"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"proto": "tcp"}, "has no action"),
        ({"action": "accept", "dstports": "443"}, "dstports, but proto"),
        ({"action": "accept", "dstports": "443", "proto": "icmp"}, "dstports, but proto"),
        ({"action": "accept", "icmptype": "8"}, "icmptype, but proto"),
        ({"action": "accept", "icmptype": "8", "proto": "udp"}, "icmptype, but proto"),
        ({"action": "accept", "dsthost": "1.2.3.4", "dst4": "0.0.0.0/0"}, "more than one of dsthost"),
        ({"action": "accept", "dst6": "::/0", "dst4": "1.2.3.4"}, "more than one of dsthost"),
    ],
)
def test_fields_that_do_not_belong_together_are_refused(fields: dict[str, str], why: str) -> None:
    reason = refusal(firewall_xml(rule_xml(**fields)))
    assert reason.startswith("rule 1 in firewall.xml") and why in reason


@pytest.mark.parametrize(
    "rule",
    [
        rule_xml(action="accept", source="1.2.3.4"),  # a condition that is not known here
        "<rule><properties><property>accept</property></properties></rule>",
        "<rule/>",
        '<rule address="1.2.3.4"><properties><property name="action">accept</property></properties></rule>',
        rule_xml(action="accept").replace("</rule>", "") + rule_xml(dsthost="1.2.3.4")[len("<rule>") :],
        rule_xml(action="accept").replace("<properties>", '<properties proto="tcp">'),
        rule_xml(action="accept").replace("<properties>", "<properties>proto tcp"),
        rule_xml(action="accept").replace("</properties>", "</properties>tail"),
        rule_xml(action="accept").replace("</property>", '</property><proto name="proto">tcp</proto>'),
        '<rule><properties><property name="action" ref="drop">accept</property></properties></rule>',
        rule_xml(action="drop") + '<drop><properties><property name="action"/></properties></drop>',
    ],
)
def test_a_rule_that_is_not_understood_completely_is_refused(rule: str) -> None:
    refusal(firewall_xml(rule))


@pytest.mark.parametrize("value", ["", "44<!-- -->3", "<!-- x -->443", "44<?x ?>3", "<b>443</b>", "443<b/>"])
def test_a_value_that_is_not_plain_text_is_refused(value: str) -> None:
    reason = refusal(firewall_xml(rule_xml(action="accept", proto="tcp", dstports=value)))
    assert reason == "rule 1 in firewall.xml does not have plain text for dstports"


def test_a_field_that_stands_twice_is_refused() -> None:
    twice = '<property name="action">drop</property><property name="action">accept</property>'
    assert refusal(firewall_xml(f"<rule><properties>{twice}</properties></rule>")) == (
        "rule 1 in firewall.xml says action twice"
    )


def test_a_long_comment_is_cut_because_no_packet_depends_on_it() -> None:
    (rule,) = parse_firewall(firewall_xml(rule_xml(action="drop", comment="x" * 1000)))
    assert rule.comment == "x" * MAX_COMMENT


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"\xff\xfe<",
        b"<firewall",
        b"<rules/>",
        b"<firewall/>",
        b'<firewall version="3"><rules/></firewall>',
        b'<firewall version="1" policy="deny"><rules/></firewall>',
        b'<QubesFirewallRules version="2"><rules/></QubesFirewallRules>',
        b'<Rules policy="deny"><rule address="1.2.3.4"/></Rules>',
        b'<firewall version="2" policy="deny"><rules/></firewall>',
        b'<firewall version="2"/>',
        b'<firewall version="2"><rules/><rules/></firewall>',
        b'<firewall version="2"><rules default="drop"/></firewall>',
        b'<firewall version="2"><rules>drop</rules></firewall>',
        b'<firewall version="2"><rules/>drop</firewall>',
        b'<firewall version="2"><!-- --><rules/></firewall>',
        b'<x:firewall xmlns:x="u" version="2"><rules/></x:firewall>',
    ],
)
def test_another_document_than_a_list_of_rules_is_refused(document: bytes) -> None:
    refusal(document)


def test_a_firewall_that_declares_entities_is_refused() -> None:
    document = b'<!DOCTYPE firewall [<!ENTITY a "accept">]>' + firewall_xml(rule_xml(action="&a;"))
    assert refusal(document) == "firewall.xml declares a document type or entities; Qubes never does"


def test_too_many_rules_are_refused() -> None:
    assert len(parse_firewall(firewall_xml(*[rule_xml(action="drop")] * MAX_RULES))) == MAX_RULES
    assert "4097 rules" in refusal(firewall_xml(*[rule_xml(action="drop")] * (MAX_RULES + 1)))


@pytest.mark.parametrize("parse", [parse_firewall, parse_notes, parse_appmenus])
def test_a_file_larger_than_the_limit_is_refused(parse: object) -> None:
    assert callable(parse)
    with pytest.raises(BadMetadata, match=f"at most {MAX_SETTINGS_FILE}"):
        parse(b"\n" * (MAX_SETTINGS_FILE + 1))


def test_notes_are_text_with_line_feeds() -> None:
    assert parse_notes("\ufeffschlüssel\r\n\tin der\rblauen box\n".encode()) == (
        "schlüssel\n\tin der\nblauen box\n"
    )


def test_notes_that_are_not_utf_8_have_marks_where_bytes_were_bad() -> None:
    assert parse_notes(b"a\xffb\xed\xa0\x80") == "a\ufffdb\ufffd\ufffd\ufffd"


def test_characters_that_could_steer_a_terminal_are_marked() -> None:
    assert parse_notes("a\x1b[2J\u202eb".encode()) == "a\ufffd[2J\ufffdb"


def test_notes_are_counted_in_bytes_of_what_is_handed_on() -> None:
    assert len(parse_notes("😀".encode() * (MAX_NOTES // 4))) == MAX_NOTES // 4
    for too_long in (
        b"x" * (MAX_NOTES + 1),
        "😀".encode() * (MAX_NOTES // 4 + 1),
        b"\xff" * (MAX_NOTES // 2),
    ):
        with pytest.raises(BadMetadata, match="more than 256000 bytes of text"):
            parse_notes(too_long)


def test_menu_entries_stand_one_on_a_line() -> None:
    assert parse_appmenus(b"firefox.desktop\r\n\n  \norg.gnome.Nautilus.desktop\nxterm.desktop") == (
        "firefox.desktop",
        "org.gnome.Nautilus.desktop",
        "xterm.desktop",
    )
    assert parse_appmenus(b"") == ()


@pytest.mark.parametrize(
    "line", [b"a/../b", b"\x1b[2J", "é".encode(), b"x" * 256, b"a\tb", b"$(x)", b"a\x0bb"]
)
def test_a_line_that_is_no_menu_entry_is_named_by_its_number(line: bytes) -> None:
    with pytest.raises(BadMetadata) as caught:
        parse_appmenus(b"xterm.desktop\n" + line + b"\n")
    assert caught.value.reason == "line 2 of the menu list is not the name of a menu entry"


def test_too_many_menu_entries_are_refused() -> None:
    assert len(parse_appmenus(b"x\n" * MAX_APPMENUS)) == MAX_APPMENUS
    with pytest.raises(BadMetadata, match="more than 4096 entries"):
        parse_appmenus(b"x\n" * (MAX_APPMENUS + 1))


VALUES = st.one_of(
    st.sampled_from(
        ["accept", "drop", "tcp", "udp", "icmp", "dns", "8", "443", "1-2", "1.2.3.4/8", "::/0", "h"]
    ),
    st.text(max_size=8),
    st.text("0123456789./:-<>&;", max_size=12),
)
FIELDS = st.sampled_from(
    [
        "action",
        "proto",
        "dsthost",
        "dst4",
        "dst6",
        "dstports",
        "icmptype",
        "specialtarget",
        "expire",
        "comment",
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(FIELDS, VALUES, max_size=5), max_size=4))
def test_whatever_is_read_from_a_firewall_fits_a_message(rules: list[dict[str, str]]) -> None:
    try:
        firewall = parse_firewall(firewall_xml(*[rule_xml(**rule) for rule in rules]))
    except BadMetadata:
        return
    assert len(firewall) == len(rules)
    for parsed, rule in zip(firewall, rules, strict=True):
        assert len(parsed.model_dump(exclude_none=True)) == len(rule)
    encode_message(QubeSettings(key="k", firewall=firewall))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(WRITTEN)), st.integers(0, 40))
def test_any_bytes_are_read_or_refused(junk: bytes, start: int, length: int) -> None:
    damaged = WRITTEN[:start] + junk + WRITTEN[start + length :]
    for content in (junk, damaged):
        with contextlib.suppress(BadMetadata):
            encode_message(QubeSettings(key="k", firewall=parse_firewall(content)))
        encode_message(QubeSettings(key="k", notes=parse_notes(content)))
        with contextlib.suppress(BadMetadata):
            encode_message(QubeSettings(key="k", appmenus=parse_appmenus(content)))


# --- Version 1 ---------------------------------------------------------------------------------------

OLD = '<QubesFirewallRules policy="{}" dns="{}" icmp="{}" yumProxy="deny">{}</QubesFirewallRules>'


def old_rules(policy: str, rules: str, dns: str = "allow", icmp: str = "deny") -> list[dict[str, str]]:
    parsed = parse_firewall(OLD.format(policy, dns, icmp, rules).encode())
    return [rule.model_dump(exclude_none=True) for rule in parsed]


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ('address="1.2.3.4" netmask="24"', {"dsthost": "1.2.3.4/24"}),
        ('address="1.2.3.4"', {"dsthost": "1.2.3.4/32"}),
        ('address="www.qubes-os.org" netmask="32"', {"dsthost": "www.qubes-os.org"}),
        ('proto="udp" port="53"', {"proto": "udp", "dstports": "53-53"}),
        ('port="443" toport="445"', {"proto": "tcp", "dstports": "443-445"}),
        ('proto="any" address="1.2.3.4"', {"dsthost": "1.2.3.4/32"}),
        (
            'proto="tcp" port="80" expire="1893456000"',
            {"proto": "tcp", "dstports": "80-80", "expire": "1893456000"},
        ),
        ("", {}),
    ],
)
@pytest.mark.parametrize(
    ("policy", "last", "inner"), [("allow", "accept", "drop"), ("deny", "drop", "accept")]
)
def test_a_rule_of_version_1_does_the_opposite_of_the_policy(
    rule: str, fields: dict[str, str], policy: str, last: str, inner: str
) -> None:
    assert old_rules(policy, f"<rule {rule}/>") == [
        {"action": "accept", "specialtarget": "dns"},
        {"action": "drop", "proto": "icmp"},
        {"action": inner, **fields},
        {"action": last},
    ]


def test_dns_and_icmp_follow_the_policy_where_version_1_does_not_name_them() -> None:
    parsed = parse_firewall(b'<QubesFirewallRules policy="deny"/>')
    assert [rule.action for rule in parsed] == ["drop", "drop", "drop"]


@pytest.mark.parametrize(
    "xml",
    [
        "<QubesFirewallRules/>",
        '<QubesFirewallRules policy="maybe"/>',
        '<QubesFirewallRules policy="deny" dns="maybe"/>',
        '<QubesFirewallRules policy="deny" http="allow"/>',
        '<QubesFirewallRules policy="deny"><port/></QubesFirewallRules>',
        '<QubesFirewallRules policy="deny"><rule><rule/></rule></QubesFirewallRules>',
        '<QubesFirewallRules policy="deny"><rule action="accept"/></QubesFirewallRules>',
        '<QubesFirewallRules policy="deny"><rule address="*"/></QubesFirewallRules>',
        '<QubesFirewallRules policy="deny"><rule address="1.2.3.4" netmask="33"/></QubesFirewallRules>',
        '<QubesFirewallRules policy="deny"><rule address="1.2.3.4" netmask="-1"/></QubesFirewallRules>',
        '<QubesFirewallRules policy="deny"><rule proto="gre"/></QubesFirewallRules>',
        '<QubesFirewallRules policy="deny"><rule proto="icmp" port="80"/></QubesFirewallRules>',
        '<QubesFirewallRules policy="deny"><rule port="445" toport="443"/></QubesFirewallRules>',
        '<QubesFirewallRules policy="deny"><rule port="http"/></QubesFirewallRules>',
        '<QubesFirewallRules policy="deny"><rule port="80" expire="soon"/></QubesFirewallRules>',
    ],
)
def test_a_firewall_of_version_1_that_is_in_doubt_is_an_error(xml: str) -> None:
    with pytest.raises(BadMetadata):
        parse_firewall(xml.encode())
