"""What the real storage drivers of qubesd make of a volume that is used, and then cloned; as JSON.

Strategy: the drivers are imported from the checkout. file-reflink works on files in DIRECTORY, which it
copies where the file system has no reflinks. Below the LVM driver, `lvm` is a table of names and contents.
In both, a qube is started, writes, is stopped at `STOPPED`, is started again and writes something else. Then
its volume is cloned to another one. Usage: real_storage.py CHECKOUT DIRECTORY
"""

import asyncio
import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.conformance.real_qubesd import stub

SIZE = 1 << 20
#: When the qube was last shut down, and before that, in seconds since 1970.
BEFORE, STOPPED, NOW = 1_700_000_000, 1_700_086_400, 1_700_172_800
CONFIG = {"name": "private", "rw": True, "save_on_stop": True, "snap_on_start": False, "size": SIZE}


def _vm(name: str) -> SimpleNamespace:
    return SimpleNamespace(name=name, dir_path_prefix="appvms", volumes={})


async def reflink(directory: Path) -> dict[str, object]:
    driver: Any = importlib.import_module("qubes.storage.reflink")
    pool = driver.ReflinkPool(name="r", dir_path=str(directory), setup_check=False)
    await pool.setup()
    source, clone = (pool.init_volume(_vm(name), dict(CONFIG)) for name in ("work", "clone"))
    for volume in (source, clone):
        await volume.create()
    for when, text in ((BEFORE, b"before"), (STOPPED, b"stopped")):
        await source.start()
        _write(source.path, text, when)
        await source.stop()
    await source.start()
    _write(source.path, b"running", NOW)
    await clone.import_volume(source)
    paths = {"source": source.path, "clone": clone.path}
    return {"paths": paths, "revisions": list(source.revisions)}


def _write(path: str, text: bytes, when: int) -> None:
    with open(path, "r+b") as file:
        file.write(text)
    os.utime(path, (when, when))


async def thin() -> dict[str, object]:
    driver: Any = importlib.import_module("qubes.storage.lvm")
    contents: dict[str, str] = {}

    async def lvm(command: list[str], _log: object = None) -> None:
        what, *names = command
        if what == "create":
            contents[f"vg/{names[1]}"] = "empty"
        elif what == "clone":
            contents[names[1]] = contents[names[0]]
        elif what == "rename":
            contents[names[1]] = contents.pop(names[0])
        elif what == "remove":
            contents.pop(names[0], None)
        else:
            raise NotImplementedError(command)

    async def reset() -> None:
        entry = {"size": SIZE, "usage": 0, "pool_lv": "pool", "attr": "Vwi-a-tz--", "origin": ""}
        driver.size_cache = {vid: dict(entry) for vid in contents}

    driver.qubes_lvm_coro, driver.reset_cache_coro = lvm, reset
    pool = driver.ThinPool(name="lvm", volume_group="vg", thin_pool="pool")
    source, clone = (pool.init_volume(_vm(name), dict(CONFIG)) for name in ("work", "clone"))
    with mock.patch.object(driver.time, "time") as clock:
        clock.return_value = BEFORE - 1
        for volume in (source, clone):
            await volume.create()
        for when, text in ((BEFORE, "before"), (STOPPED, "stopped")):
            await source.start()
            contents[source._vid_snap] = text
            clock.return_value = when
            await source.stop()
        clock.return_value = NOW
        await source.start()
        contents[source._vid_snap] = "running"
        await clone.import_volume(source)
    return {
        "path": clone.path,
        "content": contents[clone._vid_current],
        "current": clone._vid_current,
        "revisions": list(source.revisions),
    }


def main() -> None:
    directory = Path(sys.argv[2])
    stub()
    programs = directory / "bin"
    programs.mkdir()
    (programs / "lvm").write_text('#!/bin/sh\necho \'{"report": [{"lv": []}]}\'\n')
    (programs / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    os.environ["PATH"] = f"{programs}:/usr/bin:/bin"
    found = {"reflink": asyncio.run(reflink(directory / "pool")), "lvm": asyncio.run(thin())}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
