"""What a Qubes system of R4.3 allows, asks and denies by itself, as facts in tables of our own."""

from collections.abc import Iterator

_MGMT, _RESTORED = "@tag:backup-restore-mgmt", "@tag:backup-restore-in-progress"
#: What the stock restore in a disposable may call while it lasts: on dom0, and on the qubes that it creates.
_RESTORE_CREATES = ("AppVM", "StandaloneVM", "TemplateVM")
_RESTORE_SETS = (
    "feature.Set", "firewall.Set", "property.Set", "tag.Set", "volume.Import", "volume.ImportWithSize",
    "volume.Info", "volume.List", "volume.Set.revisions_to_keep",
)  # fmt: skip
#: What every qube may call in dom0, as it does when it starts.
_ASKED_OF_DOM0 = (
    "qubes.FeaturesRequest", "qubes.NotifyTools", "qubes.NotifyUpdates", "qubes.SyncAppMenus",
    "qubes.GetRandomizedTime",
)  # fmt: skip
#: What every qube may call in a disposable of its own, and what becomes of it elsewhere.
_IN_A_DISPOSABLE = {
    "qubes.GetImageRGBA": "ask", "qubes.OpenInVM": "ask", "qubes.OpenURL": "ask", "qubes.StartApp": "ask",
    "qubes.VMShell": "deny", "qubes.VMExec": "deny", "qubes.VMExecGUI": "deny",
}  # fmt: skip
#: What is the same everywhere but in dom0.
_BETWEEN_QUBES = {
    "qubes.Filecopy": "ask", "qubes.ConnectTCP": "deny", "qubes.VMRootShell": "deny",
    "policy.RegisterArgument": "deny",
}  # fmt: skip
#: What Whonix' gateway may call in its workstations.
_OF_A_GATEWAY = (
    ("whonix.SdwdateStatus", "+"),
    ("whonix.GatewayCommand", "+restart"),
    ("whonix.GatewayCommand", "+stop"),
    ("whonix.GatewayCommand", "+showlog"),
)


def _restore() -> Iterator[str]:
    for klass in _RESTORE_CREATES:
        yield f"admin.vm.Create.{klass} * {_MGMT} dom0 allow target=dom0"
    yield f"admin.vm.List * {_MGMT} dom0 allow target=dom0"
    yield f"admin.vm.List * {_MGMT} @anyvm allow target=dom0"
    for key in ("provides_network", "template_for_dispvms"):
        yield f"admin.vm.property.Get +{key} {_MGMT} @anyvm allow target=dom0"
    for method in _RESTORE_SETS:
        yield f"admin.vm.{method} * {_MGMT} {_RESTORED} allow target=dom0"
    yield f"qubes.RestoreById * {_MGMT} @tag:backup-restore-storage allow"


def _default() -> Iterator[str]:
    for service in _ASKED_OF_DOM0:
        yield f"{service} * @anyvm dom0 allow"
    for service, elsewhere in _IN_A_DISPOSABLE.items():
        yield f"{service} * @anyvm @dispvm allow"
        yield f"{service} * @anyvm @anyvm {elsewhere}"
    for service, action in _BETWEEN_QUBES.items():
        yield f"{service} * @anyvm @anyvm {action}"
    yield "policy.RegisterArgument * @anyvm dom0 deny"
    # The time goes to everyone but those who are to stay anonymous.
    yield "qubes.GetDate * @tag:anon-vm @anyvm deny"
    yield "qubes.GetDate * @anyvm @anyvm allow target=dom0"
    yield "qubes.Notifications * @anyvm @default allow target=dom0"
    for updated, proxy in (("@tag:whonix-updatevm", "sys-whonix"), ("@type:TemplateVM", "sys-net")):
        yield f"qubes.UpdatesProxy * {updated} @default allow target={proxy}"
        if updated.startswith("@tag:"):
            yield f"qubes.UpdatesProxy * {updated} @anyvm deny"
    yield "qubes.UpdatesProxy * @anyvm @anyvm deny"


def _whonix() -> Iterator[str]:
    for service, argument in _OF_A_GATEWAY:
        yield f"{service} {argument} @tag:anon-gateway @tag:anon-vm allow autostart=no"
    yield "whonix.NewStatus * @tag:anon-vm @tag:anon-gateway allow autostart=no"
    for service in ("whonix.SdwdateStatus", "whonix.GatewayCommand", "whonix.NewStatus"):
        yield f"{service} * @anyvm @anyvm deny"


def _late() -> Iterator[str]:
    for method in ("admin.vm.property.GetAll", "admin.property.GetAll"):
        for target in ("@anyvm", "@adminvm"):
            yield f"{method} * @anyvm {target} deny notify=no"


#: File name: text, as in /etc/qubes/policy.d.
STOCK_POLICY = {
    name: "".join(f"{line}\n" for line in lines)
    for name, lines in {
        "80-whonix.policy": _whonix(),
        "85-admin-backup-restore.policy": _restore(),
        "90-default-linux.policy": ["qubes.ReceiveUpdates * @anyvm dom0 allow"],
        "90-default.policy": _default(),
        "91-admin-default-deny.policy": _late(),
    }.items()
}
