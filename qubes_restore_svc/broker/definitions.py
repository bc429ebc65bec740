"""How a qube is set up on a Qubes system: its references, and of its settings those that may come back.

Strategy: the allow-list and the search for references have decided; here their answers meet. What this
system does not know is replaced (a label) or left behind (a device whose backend is not here).
"""

from dataclasses import dataclass

from qubes_restore_svc.broker.host import Definition, QubesView
from qubes_restore_svc.broker.references import Candidate, References

#: What a qube gets whose label does not exist here, as with the stock command: the least trusted one.
LABEL_FOR_UNKNOWN = "red"

#: Most devices of one qube that are told one by one.
MAX_TOLD = 20

#: What is decided here, or by qubesd, and not by a backup, whatever an allow-list says.
_NOT_AS_PROPERTY = frozenset(
    {"name", "klass", "qid", "uuid", "dispid", "label", "template", "netvm", "default_dispvm"}
)


@dataclass(frozen=True, slots=True)
class SetUp:
    """A definition, notes on what differs from the backup, and which settings stay behind."""

    definition: Definition
    notes: tuple[str, ...]
    left_out: tuple[str, ...]


def set_up(qube: Candidate, references: References, system: QubesView) -> SetUp:
    """The definition of `qube` on `system`."""
    source, allowed = qube.source, qube.allowed
    label = source.label if source.label in system.labels else LABEL_FOR_UNKNOWN
    change = () if label == source.label else (f"label change to '{label}'",)
    # A backend that this restore brings need not be there yet when its frontend is finished.
    devices = [device for device in allowed.devices if device.backend in system.qubes]
    stranded = [device for device in allowed.devices if device.backend not in system.qubes]
    definition = Definition(
        label=label,
        template=references.template.name,
        netvm=references.netvm.name,
        default_dispvm=references.default_dispvm.name,
        properties={
            name: value for name, value in allowed.properties.items() if name not in _NOT_AS_PROPERTY
        },
        features=allowed.features,
        tags=allowed.tags,
        devices=tuple(devices),
    )
    left_out = (
        f"device {device.bus} {device.backend}:{device.port} (its backend is not here)" for device in stranded
    )
    assigned = (
        f"device {device.bus} {device.backend}:{device.port} is assigned, as the configuration allows"
        for device in devices[:MAX_TOLD]
    )
    more = (f"{len(devices) - MAX_TOLD} more devices are assigned",) if len(devices) > MAX_TOLD else ()
    notes = (*references.notes, *change, *allowed.notes, *assigned, *more)
    return SetUp(definition, notes, (*allowed.left_out, *left_out))
