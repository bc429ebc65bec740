"""The methods of the Admin API that are about firewall rules, devices, labels, pools and volumes."""

import secrets
import string

from tests.emulation.daemon import devices, firewall
from tests.emulation.daemon.calls import Answer, Call, lines, method
from tests.emulation.daemon.errors import bad_value, denied, protocol
from tests.emulation.daemon.state import DEVICE_CLASSES

# --- Firewall and devices ------------------------------------------------------------------------


@method("admin.vm.firewall.Get", dom0=False)
def _firewall_get(call: Call) -> Answer:
    return lines(firewall.current(call.dest.firewall))


@method("admin.vm.firewall.Set", payload=None, dom0=False)
def _firewall_set(call: Call) -> Answer:
    if not call.payload.isascii():
        raise protocol("Rules contains non-ASCII characters")
    call.dest.firewall = firewall.current(firewall.parse_rules(call.payload))
    return None


@method("admin.deviceclass.List", dom0=True)
def _device_classes(_call: Call) -> Answer:
    return lines(DEVICE_CLASSES)


for _class in DEVICE_CLASSES:

    @method(f"admin.vm.device.{_class}.Assigned", arg=None)
    def _assigned(call: Call) -> Answer:
        return devices.assigned(call.dest, call.method.split(".")[3])

    @method(f"admin.vm.device.{_class}.Assign", arg=True, payload=True)
    def _assign(call: Call) -> Answer:
        devices.assign(call.system, call.dest, call.method.split(".")[3], call.arg, call.payload)
        return None

    @method(f"admin.vm.device.{_class}.Unassign", arg=True)
    def _unassign(call: Call) -> Answer:
        devices.unassign(call.system, call.dest, call.method.split(".")[3], call.arg)
        return None


# --- Labels and storage --------------------------------------------------------------------------


@method("admin.label.List", dom0=True)
def _label_list(call: Call) -> Answer:
    return lines(list(call.system.labels))


@method("admin.label.Get", "admin.label.Index", arg=True, dom0=True)
def _label(call: Call) -> Answer:
    if call.arg not in call.system.labels:
        raise bad_value("")
    index, color = call.system.labels[call.arg]
    return color if call.method.endswith("Get") else str(index)


@method("admin.pool.List", dom0=True)
def _pool_list(call: Call) -> Answer:
    return lines(list(call.system.pools))


@method("admin.pool.Info", "admin.pool.UsageDetails", arg=True, dom0=True)
def _pool(call: Call) -> Answer:
    if call.arg not in call.system.pools:
        raise denied("Argument not in 'pools'")
    pool = call.system.pools[call.arg]
    if call.method.endswith("Info"):
        return f"driver={pool.driver}\nname={pool.name}\nrevisions_to_keep=1\n"
    if pool.size is None:
        return ""
    return f"data_size={pool.size}\ndata_usage={call.parts.volumes.pool_usage(pool.name)}\n"


@method("admin.vm.volume.List")
def _volume_list(call: Call) -> Answer:
    return lines(list(call.dest.volumes))


@method("admin.vm.volume.Info", arg=True)
def _volume_info(call: Call) -> Answer:
    volume = call.volume
    return lines(
        [
            f"pool={volume.pool}",
            f"vid={volume.vid}",
            f"size={volume.size}",
            f"usage={call.parts.volumes.usage(volume)}",
            f"rw={volume.rw}",
            f"source={volume.source}",
            f"path={call.parts.volumes.told_path(volume)}",
            f"save_on_stop={volume.save_on_stop}",
            f"snap_on_start={volume.snap_on_start}",
            "revisions_to_keep=1",
            "ephemeral=False",
        ]
    )


@method("admin.vm.volume.ListSnapshots", arg=True)
def _volume_snapshots(call: Call) -> Answer:
    return lines(call.volume.revisions)


@method("admin.vm.volume.CloneFrom", arg=True)
def _volume_clone_from(call: Call) -> Answer:
    token = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(32))
    call.system.pending_clones[token] = call.volume
    return token


@method("admin.vm.volume.CloneTo", arg=True, payload=True)
def _volume_clone_to(call: Call) -> Answer:
    volume = call.volume
    if not call.payload.isascii():
        raise protocol("Token contains non-ASCII characters")
    source = call.system.pending_clones.pop(call.payload.decode("ascii").strip(), None)
    if source is None:
        raise protocol("Token to clone volume of qube was not found")
    call.parts.volumes.clone(volume, source)
    return None


@method("admin.vm.volume.Resize", arg=True, payload=True)
def _volume_resize(call: Call) -> Answer:
    call.parts.volumes.resize(call.volume, _number(call.payload.strip(), "Volume size"))
    return None


@method("admin.vm.volume.Clear", arg=True)
def _volume_clear(call: Call) -> Answer:
    call.parts.volumes.clear(call.dest, call.volume)
    return None


@method("internal.vm.volume.ImportBegin", arg=True, payload=None)
def _import_begin(call: Call) -> Answer:
    if call.arg not in call.dest.volumes:
        raise protocol(f"Argument not in {call.dest.name} volumes")
    size = _number(call.payload, "Size of new data") if call.payload else None
    return call.parts.volumes.begin_import(call.dest, call.volume, size)


@method("internal.vm.volume.ImportEnd", arg=True, payload=True)
def _import_end(call: Call) -> Answer:
    call.parts.volumes.end_import(call.volume, call.payload.decode("ascii"))
    return None


def _number(data: bytes, what: str) -> int:
    if not data.isdigit():
        raise protocol(f"{what} contains non ASCII digits")
    if len(data) >= 20:
        raise protocol(f"{what} is bigger than 19 decimal digits")
    if data.startswith(b"0") and data != b"0":
        raise protocol(f"{what} contains spurious leading zeros")
    return int(data)
