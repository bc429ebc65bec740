"""The real qubesd's own code, asked the same as the stand-in: run beside a checkout of qubes-core-admin.

Strategy: `qubes` is imported from the checkout, with nothing below it: libvirt and the hypervisor are mocks,
and the volumes of its `file` pool lie in a directory that is thrown away. Requests come on stdin as lines of
JSON (bytes in Latin-1), and so go the answers, byte for byte as the real protocol class writes them.
Usage: real_qubesd.py CHECKOUT DIRECTORY
"""

import ast
import asyncio
import importlib
import importlib.metadata
import json
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

KERNELS = ("6.12.59-1.fc41", "pvgrub2-pvh")

#: In a payload, the last answer to a request of this method.
TOKEN, CLONE_FROM = b"@TOKEN@", b"admin.vm.volume.CloneFrom"


class _Transport:
    """What the protocol writes to."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def write_eof(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        self.written = b""


def entry_points(checkout: Path) -> dict[str, list[importlib.metadata.EntryPoint]]:
    """What the checkout would register if it were installed, as its setup.py says."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for node in ast.walk(ast.parse((checkout / "setup.py").read_text())):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and str(key.value).startswith("qubes."):
                    texts = [leaf.value for leaf in ast.walk(value) if isinstance(leaf, ast.Constant)]
                    pairs = [str(text).split(" = ") for text in texts if " = " in str(text)]
                    found[str(key.value)] = [
                        importlib.metadata.EntryPoint(name, place, str(key.value)) for name, place in pairs
                    ]
    return found


def stub() -> None:
    """`libvirt` and `pyinotify`, of which only the names are needed."""
    inotify: Any = types.ModuleType("pyinotify")
    inotify.ProcessEvent = object
    inotify.__getattr__ = lambda name: 0 if name.startswith("IN_") else mock.Mock()
    sys.modules["pyinotify"] = inotify
    module: Any = types.ModuleType("libvirt")
    module.libvirtError = type("libvirtError", (Exception,), {})
    module.virConnect = module.virDomain = object
    module.__getattr__ = lambda name: sum(map(ord, name)) if name.startswith("VIR_") else mock.Mock()
    sys.modules["libvirt"] = module


async def serve(checkout: Path, directory: Path) -> None:
    """Answer every line until there are no more."""
    qubes: Any = importlib.import_module("qubes")
    api: Any = importlib.import_module("qubes.api")
    admin: Any = importlib.import_module("qubes.api.admin")
    internal: Any = importlib.import_module("qubes.api.internal")
    for module in ("app", "config", "ext", "vm.qubesvm", "vm.adminvm", "storage"):
        importlib.import_module(f"qubes.{module}")
    config = qubes.config
    config.system_path["qubes_base_dir"] = config.qubes_base_dir = str(directory)
    config.defaults["pool_configs"]["varlibqubes"]["dir_path"] = str(directory)
    qubes.vm.LocalVM.start_qdb_watch = lambda *_args, **_kwargs: None
    for kernel in KERNELS:
        kernels = directory / config.system_path["qubes_kernels_base_dir"] / kernel
        kernels.mkdir(parents=True)
        for name in ("vmlinuz", "initramfs"):
            (kernels / name).touch()
    qubes.app.QubesHost.memory_total = 16384 << 10
    app = qubes.Qubes(str(directory / "qubes.xml"), load=False, offline_mode=True)
    app.vmm = mock.Mock(spec=qubes.app.VMMConnection)
    app.vmm.offline_mode = False
    libvirt = sys.modules["libvirt"]
    app.vmm.libvirt_conn.lookupByUUID.return_value.isActive.return_value = False
    app.vmm.libvirt_conn.lookupByUUID.return_value.state.return_value = [libvirt.VIR_DOMAIN_SHUTOFF]
    pure = mock.Mock()
    pure.qubes_pure_code_point_safe_for_display = lambda code: 32 <= code < 127
    admin.CDLL = lambda _name: pure
    app.load_initial_values()
    await app.setup_pools()
    app.default_kernel = KERNELS[0]
    app.save = mock.Mock()
    token = b""
    for line in sys.stdin:
        request = json.loads(line).encode("latin-1").replace(TOKEN, token)
        handler = internal.QubesInternalAPI if request.startswith(b"internal.") else admin.QubesAdminAPI
        protocol = api.QubesDaemonProtocol(handler, app=app, debug=False)
        transport = _Transport()
        protocol.connection_made(transport)
        protocol.data_received(request)
        before = asyncio.all_tasks()
        protocol.eof_received()
        await asyncio.gather(*(asyncio.all_tasks() - before))
        if CLONE_FROM in request:
            token = transport.written.removeprefix(b"0\0")
        print(json.dumps(transport.written.decode("latin-1")), flush=True)


def main() -> None:
    checkout, directory = map(Path, sys.argv[1:])
    points = entry_points(checkout)
    patch: Any = importlib.metadata
    patch.entry_points = lambda group, name=None: [
        point for point in points.get(group, ()) if name in (None, point.name)
    ]
    stub()
    programs = directory / "bin"
    programs.mkdir()
    (programs / "sudo").write_text("#!/bin/sh\n")  # autostart is a unit that it would enable
    (programs / "sudo").chmod(0o755)
    os.environ["PATH"] = f"{programs}:/usr/bin:/bin"
    logging.disable(logging.NOTSET if os.environ.get("VERBOSE") else logging.CRITICAL)
    asyncio.run(serve(checkout, directory))


if __name__ == "__main__":
    main()
