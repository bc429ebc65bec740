"""qubes.xml as qubesd writes it, for the qubes of a plan.

Strategy: XML is written as text, so that what a plan says stands in the file whatever it is: what
has a meaning in XML is escaped, what XML forbids is left as it is.
"""

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape, quoteattr

from .plans import DEFAULT_TEMPLATE, DOM0_HOME, FIRST_QID, LABELS, SNAPSHOT_CLASSES, QubePlan


def qubes_xml(
    qubes: Sequence[QubePlan], *, dom0_home: bool = False, default_template: str = DEFAULT_TEMPLATE
) -> bytes:
    """qubes.xml of a system with dom0, these qubes, and the templates and netvms they refer to.

    Characters that XML forbids are written as they are: the result is then malformed on purpose.
    """
    names = {qube.name for qube in qubes}
    templates = {default_template, *(qube.template for qube in qubes)} - names - {None}
    netvms = {qube.netvm for qube in qubes} - names - {None, ""}
    home = {"backup-content": "True", "backup-path": DOM0_HOME, "backup-size": "4096"} if dom0_home else {}
    domains = [_domain("AdminVM", 0, {"label": "label-8"}, home)]
    outside = [("TemplateVM", name) for name in sorted(map(str, templates))]
    outside += [("AppVM", name) for name in sorted(map(str, netvms))]
    for number, (klass, name) in enumerate(outside):
        qid = number + 1 if number + 1 < FIRST_QID else FIRST_QID + len(qubes) + number
        domains.append(_domain(klass, qid, {"name": name, "label": "label-8"}, {"backup-content": "False"}))
    domains += [_qube_domain(qube, position) for position, qube in enumerate(qubes)]
    labels = "".join(
        f'<label id="label-{number}" color="0x000000">{label}</label>'
        for number, label in enumerate(LABELS, 1)
    )
    settings = _named("property", {"default_template": default_template})
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<qubes version="4.0"><labels>{labels}</labels><properties>{settings}</properties>'
        f"<domains>{''.join(domains)}</domains></qubes>\n"
    ).encode()


def _qube_domain(qube: QubePlan, position: int) -> str:
    label = qube.label
    if label in LABELS and not qube.label_by_name:
        label = f"label-{LABELS.index(label) + 1}"
    properties = {"name": qube.name, "label": label}
    if qube.klass in SNAPSHOT_CLASSES and qube.template is not None:
        properties["template"] = qube.template
    if qube.netvm is not None:
        properties["netvm"] = qube.netvm
    features = {"backup-content": str(qube.included)}
    if qube.included:
        disk = sum(len(data) for image in qube.volumes.values() for _, data in image.extents)
        features |= {"backup-path": qube.backup_path(position), "backup-size": str(disk)}
    return _domain(
        qube.klass,
        FIRST_QID + position,
        properties | dict(qube.properties),
        features | dict(qube.features),
        qube.tags,
        qube.devices,
        _volume_config(qube),
    )


def _domain(
    klass: str,
    qid: int,
    properties: Mapping[str, str],
    features: Mapping[str, str],
    tags: Sequence[str] = (),
    devices: Sequence[tuple[str, str, str]] = (),
    volumes: str = "",
) -> str:
    classes = dict.fromkeys(["pci", *(device_class for device_class, _, _ in devices)])
    attached = "".join(
        f"<devices class={quoteattr(device_class)}>"
        + "".join(
            f"<device backend-domain={quoteattr(backend)} id={quoteattr(ident)}/>"
            for other_class, backend, ident in devices
            if other_class == device_class
        )
        + "</devices>"
        for device_class in classes
    )
    own = {"qid": str(qid)} if qid else {}
    return (
        f'<domain id="domain-{qid}" class={quoteattr(klass)}>'
        f"<properties>{_named('property', own | dict(properties))}</properties>"
        f"<features>{_named('feature', features)}</features>{attached}"
        f"<tags>{''.join(f'<tag name={quoteattr(tag)}/>' for tag in tags)}</tags>"
        f"<volume-config>{volumes}</volume-config></domain>"
    )


def _volume_config(qube: QubePlan) -> str:
    lines = [
        f'<volume name={quoteattr(name)} pool="default" revisions_to_keep="1" rw="True" save_on_stop="True"'
        f' size="{image.size}" vid={quoteattr(f"appvms/{qube.name}/{name}")}/>'
        for name, image in qube.volumes.items()
    ]
    if qube.klass in SNAPSHOT_CLASSES and "root" not in qube.volumes:
        lines.append('<volume name="root" pool="default" size="10737418240" snap_on_start="True"/>')
    if qube.klass == "DispVM" and "private" not in qube.volumes:
        lines.append('<volume name="private" pool="default" size="2147483648" snap_on_start="True"/>')
    lines.append('<volume name="volatile" pool="default" rw="True" size="10737418240"/>')
    return "".join(lines)


def _named(element: str, values: Mapping[str, str]) -> str:
    return "".join(
        f"<{element} name={quoteattr(name)}>{escape(value)}</{element}>" for name, value in values.items()
    )
