"""The stand-in for qubesd answers as the real one's own code does, byte for byte.

Both are asked the same, one request after the other, from an empty system on. Left out is what depends on
packages that are no part of the sources (a storage driver's own texts, classes of devices) or on programs (of
the characters of notes, which a library judges, only ASCII is compared),
and what the original fails over after
it has done it: dom0 as `clockvm` or `default_netvm` of the system,
dom0 or a template as its `default_dispvm`.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conformance.real_qubesd import CLONE_FROM, TOKEN
from tests.emulation.qubesd import Qubesd

PROGRAM = Path(__file__).parent / "real_qubesd.py"
NAMES = ("ok", "Work", "work", "a" * 31, "a" * 32, "9x", "-x", "_x", ".x", "a.b-c_d", "é", "a b", "Domain-0",
         "none", "default", "x-dm", "dom0", "")  # fmt: skip
CREATIONS = ("", "name=p", "label=red", "name=p label=", "name=p label=pink", "name=p label=0x1",
             "name=p label=3",
             "name=p label=re/d", "name=p  label=red", "name=p label=red x=y",
             "name=p label=red pool=varlibqubes",
             "name=p label=red name=q", "name=p label=red\n", "name=ok label=red")  # fmt: skip
POOLS = ("pool=linux-kernel", "pool=nopool", "pool=varlibqubes", "pool:private=varlibqubes",
         "pool:x=varlibqubes", "pool=varlibqubes pool:private=varlibqubes",
         "pool:root=linux-kernel")  # fmt: skip
VALUES = ("", "None", "0", "1", "-1", "true", "False", "x", "t", "a", "net", "dvm", "nobody", "dom0", "é",
          "@", "9x",
          "10000000000", "1.2.3.4", "fe80::1", "a\nb", "us++", "de+neo+x:y", "us++/", "pvh", "hvm", "PV",
          "00:16:3e:5e:6c:01", "uuid:0", "x" * 600, "b" + "0" * 6)  # fmt: skip
PROPERTIES = (
    "name", "label", "netvm", "default_dispvm", "template", "memory", "maxmem", "vcpus", "kernel",
    "kernelopts",
    "autostart", "debug", "include_in_backups", "provides_network", "template_for_dispvms", "virt_mode",
    "default_user", "mac", "ip", "ip6", "guivm", "audiovm", "management_dispvm", "qrexec_timeout",
    "shutdown_timeout", "backup_timestamp", "keyboard_layout", "devices_denied", "installed_by_rpm",
    "nothing",
    "klass", "icon", "uuid", "qid", "stubdom_mem", "updateable", "visible_ip", "gateway", "dns",
    "visible_gateway", "visible_netmask", "start_time",
)  # fmt: skip
GLOBALS = ("default_netvm", "management_dispvm", "default_template", "updatevm", "nothing", "default_kernel",
           "default_guivm", "default_audiovm")  # fmt: skip
TAGS = ("x", "x-1", "x_1", "x.1", "é", "", "a" * 100, "created-by-dom0", "created-by-nobody", "guivm-x",
        "guivm-dom0",
        "audiovm-x", "disp-created-by-dom0", "backup-restore-in-progress",
        "restored-from-backup-1")  # fmt: skip
FEATURES = ("x", "x.y", "x-y_z", "x+y", "é", "", "a" * 300, "service.x", "service.", "service.meminfo-writer",
            "vm-config.", "vm-config.x", "vm-config.9", "vm-config." + "x" * 52, "vm-config." + "x" * 53,
            "qubes-firewall", "preload-dispvm", "prohibit-start", "os", "gui-x", "service..",
            "service." + "s" * 49, "service.app-dispvm." + "s" * 99,
            "custom-persist.", "custom-persist.k", "custom-persist." + "k" * 55)  # fmt: skip
TEXTS = (
    "",
    "1",
    "é",
    "a\nb",
    "x" * 500,
    "\x7f",
    "/p",
    "dir:a:b:7777:/p",
    "dir:a:b:17777:/p",
    "x:a:b:1:/p",
    "dir:/p",
)
RULES = (
    "", "action=accept", "action=accept\n", "action=drop dsthost=1.2.3.4\n", "\n", "action=maybe\n",
    "proto=tcp\n",
    "action=accept dst4=1.2.3.0/24 proto=tcp dstports=80\n", "action=accept dst6=fe80::/10\n",
    "action=accept dsthost=example.com proto=udp dstports=1-2\n", "action=accept proto=icmp icmptype=8\n",
    "action=accept icmptype=8\n", "action=accept dstports=80\n", "action=accept specialtarget=dns\n",
    "action=accept comment=hello world\n", "action=accept comment=a=b\n", "action=accept comment=é\n",
    "action=accept expire=1\n", "action=accept expire=99999999999\n", "action=accept expire=x\n",
    "action=accept dst4=1.2.3.4/33\n", "action=accept dst4=1.2.3\n",
    "action=accept proto=tcp dstports=70000\n",
    "action=accept proto=tcp dstports=2-1\n", "action=accept proto=tcp dstports=1-2-3\n",
    "action=accept dsthost=Ex_ample\n", "action=accept foo=bar\n", "action=accept\n\naction=drop\n",
    "action=accept action=drop\n", " action=accept\n", "action=accept  proto=tcp\n",
    "action=accept dst4=0.0.0.0/0\n",
    "action=accept dst4=1.2.3.4 dst6=fe80::1\n", "action=accept dst4=fe80::1\n",
    "action=accept dst4=10.0.0.1/8\n",
    "action=accept proto=tcp dstports=0-65535\n", "action=accept dst6=FE80::1/64\n",
    "action=accept dstname=x.y\n",
    "action=accept comment=x expire=1\n", "action=accept proto=icmp icmptype=256\n",
    "action=accept dst4=01.2.3.4\n",
    "action=drop\naction=accept\n",
)  # fmt: skip


def requests() -> Iterator[tuple[str, str, str]]:
    """What is asked: the method with its argument, the qube, the payload."""
    yield from _of_the_system()
    yield from _creations()
    for name in ("a", "sa", "t", "disp1"):
        for method in (
            "property.List",
            "volume.List",
            "feature.List",
            "tag.List",
            "firewall.Get",
            "notes.Get",
        ):
            yield f"admin.vm.{method}+", name, ""
    for key in PROPERTIES:
        for value in VALUES:
            yield f"admin.vm.property.Set+{key}", "a", value
            if key != "uuid" and value != "False":
                yield f"admin.vm.property.Get+{key}", "a", ""
        yield f"admin.vm.property.Reset+{key}", "a", ""
        if key != "uuid":
            yield f"admin.vm.property.GetDefault+{key}", "a", ""
    yield from _changes_of_the_system()
    yield from _tags_and_features()
    for rules in RULES:
        yield "admin.vm.firewall.Set+", "a", rules
        yield "admin.vm.firewall.Get+", "a", ""
    yield from (("admin.vm.firewall.Set+x", "a", RULES[1]), ("admin.vm.firewall.Set+", "dom0", RULES[1]))
    for notes in ("", "hi", "a\nb\t", "\x00\x01", "\x1b[0m", "\xff", "x" * 60000):
        yield "admin.vm.notes.Set+", "a", notes
        yield "admin.vm.notes.Get+", "a", ""
    yield from (("admin.vm.notes.Get+", "dom0", ""), ("admin.vm.notes.Set+", "dom0", "x"))
    for size in ("x", "-1", "01", "9" * 20, ""):
        yield "admin.vm.volume.Resize+private", "a", size
    yield from (("admin.vm.volume.Resize+nix", "a", "1"), ("admin.vm.volume.Info+nix", "a", ""))
    for size in ("x", "01", "9" * 20, "-1"):
        yield "internal.vm.volume.ImportBegin+private", "a", size
    yield from (
        ("internal.vm.volume.ImportBegin+nix", "a", "1"),
        ("internal.vm.volume.ImportEnd+nix", "a", "ok"),
    )
    for status in ("fail\nwhy", "junk", "ok"):
        yield "internal.vm.volume.ImportBegin+private", "a", "4194304"
        yield "internal.vm.volume.ImportEnd+private", "a", status
    yield from _clones()
    yield from _ends()


def _of_the_system() -> Iterator[tuple[str, str, str]]:
    for call in ("label.List+", "label.Get+red", "label.Index+red", "label.Get+pink", "pool.Info+none",
                 "pool.UsageDetails+linux-kernel", "no.Such+", "vm.List+", "vm.List+x"):  # fmt: skip
        yield f"admin.{call}", "dom0", ""
    for dest in ("nobody", "9x", "uuid:00000000-0000-0000-0000-000000000000", "uuid:0", "uuid:" + "9" * 36):
        yield "admin.vm.List+", dest, ""


def _creations() -> Iterator[tuple[str, str, str]]:
    yield "admin.vm.Create.AppVM+", "dom0", "name=x label=red"
    yield "admin.vm.Create.TemplateVM+", "dom0", "name=t label=black"
    yield "admin.property.Set+default_template", "dom0", "t"
    for klass in ("TemplateVM", "StandaloneVM", "FooVM"):
        yield f"admin.vm.Create.{klass}+t", "dom0", "name=p label=red"
    for name in (*NAMES, "a"):
        yield "admin.vm.Create.AppVM+t", "dom0", f"name={name} label=red"
    for payload in CREATIONS:
        yield "admin.vm.Create.AppVM+t", "dom0", payload
    for template in ("nobody", "a"):
        yield f"admin.vm.Create.AppVM+{template}", "dom0", "name=p label=red"
        yield f"admin.vm.Create.DispVM+{template}", "dom0", "name=p label=red"
    for number, pool in enumerate(POOLS):
        yield "admin.vm.CreateInPool.AppVM+t", "dom0", f"name=p{number} label=red {pool}"
    yield "admin.vm.Create.StandaloneVM+", "dom0", "name=sa label=green"
    yield "admin.vm.CreateInPool.StandaloneVM+", "dom0", "name=sb label=green pool=linux-kernel"
    yield "admin.vm.Create.AppVM+t", "dom0", "name=dvm label=red"
    for call, value in (
        ("property.Set+template_for_dispvms", "True"),
        ("tag.Set+mine", ""),
        ("feature.Set+f", "1"),
    ):
        yield f"admin.vm.{call}", "dvm", value
    for template in ("dvm", "", "t"):
        yield f"admin.vm.Create.DispVM+{template}", "dom0", "name=disp1 label=red"
    yield "admin.vm.Create.AppVM+t", "dom0", "name=net label=red"
    yield "admin.property.Set+default_netvm", "dom0", "net"
    for name, key, value in (("net", "provides_network", "True"), ("net", "netvm", ""), ("t", "netvm", "")):
        yield f"admin.vm.property.Set+{key}", name, value
    yield "admin.property.Set+default_netvm", "dom0", "net"


def _changes_of_the_system() -> Iterator[tuple[str, str, str]]:
    for key in GLOBALS:
        for value in VALUES:
            if (key, value) == ("default_netvm", "dom0"):
                continue
            yield f"admin.property.Set+{key}", "dom0", value
            yield f"admin.property.Get+{key}", "dom0", ""
        yield "admin.vm.tag.List+", "ok", ""
    for key, value in (("default_template", "t"), ("default_dispvm", "dvm"), ("default_netvm", "net"),
                       ("default_guivm", "dom0"), ("default_kernel", "pvgrub2-pvh")):  # fmt: skip
        yield f"admin.property.Set+{key}", "dom0", value
    for name, value in (("t", "net"), ("net", "net"), ("net", "")):
        yield "admin.vm.property.Set+netvm", name, value
    yield "admin.vm.property.Set+provides_network", "net", "False"
    yield "admin.vm.property.Set+template_for_dispvms", "dvm", "False"


def _tags_and_features() -> Iterator[tuple[str, str, str]]:
    for tag in TAGS:
        for method in ("Set", "Get", "List", "Remove", "Remove"):
            yield f"admin.vm.tag.{method}+{'' if method == 'List' else tag}", "a", ""
    yield "admin.vm.tag.Set+x", "a", "payload"
    for feature in FEATURES:
        for value in TEXTS:
            yield f"admin.vm.feature.Set+{feature}", "a", value
            yield f"admin.vm.feature.Get+{feature}", "a", ""
        for method in ("CheckWithTemplate", "Remove", "Remove"):
            yield f"admin.vm.feature.{method}+{feature}", "a", ""
    yield from (("admin.vm.feature.List+", "a", ""), ("admin.vm.property.Get+maxmem", "a", ""))


def _clones() -> Iterator[tuple[str, str, str]]:
    for call in ("ListSnapshots", "CloneFrom"):
        yield f"admin.vm.volume.{call}+nix", "a", ""
        yield f"admin.vm.volume.{call}+", "a", ""
    for volume in ("private", "volatile", "kernel"):
        yield f"admin.vm.volume.ListSnapshots+{volume}", "sa", ""
    for payload in ("", "x" * 32, "\xff"):
        yield "admin.vm.volume.CloneTo+private", "sa", payload
    # What becomes of a volume that is cloned to itself, or that is not kept, is up to the driver.
    for source, volume, target in (
        ("a", "private", "private"),
        ("a", "private", "root"),
        ("sa", "private", "volatile"),
        ("a", "private", "nix"),
    ):
        yield f"admin.vm.volume.CloneFrom+{volume}", source, ""
        yield f"admin.vm.volume.CloneTo+{target}", "sa", TOKEN.decode()
        yield f"admin.vm.volume.CloneTo+{target}", "sa", TOKEN.decode()


def _ends() -> Iterator[tuple[str, str, str]]:
    for name in ("t", "dvm", "net", "dom0", "nobody", "a", "a", "disp1", "sa"):
        yield "admin.vm.Remove+", name, ""
    for call in ("Kill+", "Shutdown+", "Shutdown+x"):
        yield f"admin.vm.{call}", "ok", ""
    yield from (("admin.vm.Kill+", "dom0", ""), ("admin.vm.Start+", "dom0", ""))
    yield "admin.vm.tag.Set+backup-restore-in-progress", "ok", ""
    yield "admin.vm.Start+", "ok", ""
    yield "admin.vm.feature.Set+prohibit-start", "Work", "because"
    yield "admin.vm.Start+", "Work", ""
    yield "admin.vm.List+", "dom0", ""


def ask_real(checkout: Callable[[str], Path], directory: Path, asked: list[str]) -> list[str]:
    """The answers of the real code, in order."""
    for module in ("docutils", "jinja2", "lxml"):
        pytest.importorskip(module, reason=f"the real qubesd needs {module}: pip install '.[conformance]'")
    sources = [checkout("qubes-core-admin"), checkout("qubes-core-qrexec")]
    done = subprocess.run(
        [sys.executable, PROGRAM, sources[0], directory],
        input="".join(f"{json.dumps(request)}\n" for request in asked),
        env={"PYTHONPATH": ":".join(map(str, sources)), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def comparable(request: str, answer: str) -> str:
    """An answer without what differs from one run to the next, and a list without its order."""
    answer = re.sub(r"uuid=[0-9a-f-]{36}", "uuid=…", answer)
    answer = re.sub(r"<(\w+) at 0x[^>]*>", r"<\1>", answer)
    answer = re.sub(r"(?<=^0\0\d{7} )\S+$", "PATH", answer)
    answer = re.sub(r"(?<=^0\0)[A-Za-z0-9]{32}$", "TOKEN", answer) if "Clone" in request else answer
    if ".List+" in request:
        return "\n".join(sorted(re.split("[\0\n]", answer)))
    return answer


def test_the_stand_in_answers_as_the_real_code(checkout: Callable[[str], Path], tmp_path: Path) -> None:
    asked = [f"{call} dom0 name {dest}\0{payload}" for call, dest, payload in requests()]
    (tmp_path / "real").mkdir()
    real = ask_real(checkout, tmp_path / "real", asked)
    stand_in = Qubesd(tmp_path / "ours")
    ours, token = list[str](), b""
    for request in asked:
        answer = stand_in.respond(request.encode("latin-1").replace(TOKEN, token))
        token = answer.removeprefix(b"0\0") if CLONE_FROM.decode() in request else token
        ours.append(answer.decode("latin-1"))
    different = [
        f"{request[:200]!r}\n  real {expected[:300]!r}\n  ours {answer[:300]!r}"
        for request, expected, answer in zip(asked, real, ours, strict=True)
        if comparable(request, expected) != comparable(request, answer)
    ]
    print(f"{len(asked)} answers, {len(different)} of them different")
    assert not different, "\n".join(different[:40])
