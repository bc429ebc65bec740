#!/bin/sh
# Tell dom0 that this template has the worker of qubes-restore-svc, so that a restore that cannot work is
# refused before anything is started. The agent's own script, which runs before this one, reports only what is
# there at this moment: links to a socket are not, as long as nobody listens, which is so right after the
# installation. 90-qubes-core-agent.sh sends what is said here.

# dpkg leaves this file behind when it removes the package.
[ -e /usr/lib/systemd/system/qubes-restore-worker.socket ] || exit 0

# Only a qube whose root file system stays speaks for it.
[ "$(qubesdb-read /qubes-vm-persistence 2>/dev/null || echo full)" = full ] || exit 0

for service in restore.Session restore.Volume restore.Archive; do
    qvm-features-request "supported-rpc.$service=1"
done
