"""Verify a backup that is a file of this qube, with asyncio, within an hour: `python verify.py PATH`."""

import asyncio
import sys
from getpass import getpass

from pydantic import SecretStr

from qubes_restore_svc.client.api import (
    BackupLocation,
    OpenBackup,
    RestoreCall,
    RestoreError,
    system_transport,
)


async def verify(path: str, passphrase: str) -> bool:
    """Is every qube of the backup good? Raises RestoreError."""
    request = OpenBackup(mode="verify", location=BackupLocation(text=path), passphrase=SecretStr(passphrase))
    async with RestoreCall(system_transport(), request) as call:
        report = await call.confirm()
    for qube in report.qubes:
        reason = f": {qube.error.reason}" if qube.error else ""
        print(f"{qube.name}: {qube.outcome}{reason}")
    return report.status == 0


async def main(path: str) -> int:
    """The exit status."""
    try:
        async with asyncio.timeout(3600):
            good = await verify(path, getpass("Passphrase of the backup: "))
    except (RestoreError, TimeoutError) as error:
        print(error)
        return 1
    print("the backup is good" if good else "the backup is damaged")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:])))
