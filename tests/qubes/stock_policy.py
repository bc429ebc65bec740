"""What a Qubes system allows and asks by itself, in our words: enough to see that ours comes first."""

_KEEP_REVISIONS = (
    "admin.vm.volume.Set.revisions_to_keep  *"
    "  @tag:backup-restore-mgmt  @tag:backup-restore-in-progress  allow target=dom0"
)
#: File name: text, as in /etc/qubes/policy.d.
STOCK_POLICY = {
    "85-admin-backup-restore.policy": f"""\
# The stock restore in a disposable: what it may call while it lasts.
admin.vm.Create.AppVM         *  @tag:backup-restore-mgmt  dom0                             allow target=dom0
admin.vm.Create.StandaloneVM  *  @tag:backup-restore-mgmt  dom0                             allow target=dom0
admin.vm.Create.TemplateVM    *  @tag:backup-restore-mgmt  dom0                             allow target=dom0
admin.vm.List                 *  @tag:backup-restore-mgmt  dom0                             allow target=dom0
admin.vm.List                 *  @tag:backup-restore-mgmt  @anyvm                           allow target=dom0
admin.vm.property.Get  +provides_network      @tag:backup-restore-mgmt  @anyvm            allow target=dom0
admin.vm.property.Get  +template_for_dispvms  @tag:backup-restore-mgmt  @anyvm            allow target=dom0
admin.vm.feature.Set          *  @tag:backup-restore-mgmt  @tag:backup-restore-in-progress  allow target=dom0
admin.vm.firewall.Set         *  @tag:backup-restore-mgmt  @tag:backup-restore-in-progress  allow target=dom0
admin.vm.property.Set         *  @tag:backup-restore-mgmt  @tag:backup-restore-in-progress  allow target=dom0
admin.vm.tag.Set              *  @tag:backup-restore-mgmt  @tag:backup-restore-in-progress  allow target=dom0
admin.vm.volume.Import        *  @tag:backup-restore-mgmt  @tag:backup-restore-in-progress  allow target=dom0
admin.vm.volume.ImportWithSize * @tag:backup-restore-mgmt  @tag:backup-restore-in-progress  allow target=dom0
admin.vm.volume.Info          *  @tag:backup-restore-mgmt  @tag:backup-restore-in-progress  allow target=dom0
admin.vm.volume.List          *  @tag:backup-restore-mgmt  @tag:backup-restore-in-progress  allow target=dom0
{_KEEP_REVISIONS}
qubes.RestoreById             *  @tag:backup-restore-mgmt  @tag:backup-restore-storage      allow
""",
    "90-default.policy": """\
policy.RegisterArgument  *  @anyvm  @anyvm    deny
qubes.ConnectTCP         *  @anyvm  @anyvm    deny
qubes.FeaturesRequest    *  @anyvm  dom0      allow
qubes.NotifyTools        *  @anyvm  dom0      allow
qubes.NotifyUpdates      *  @anyvm  dom0      allow
qubes.SyncAppMenus       *  @anyvm  dom0      allow
qubes.GetRandomizedTime  *  @anyvm  dom0      allow
qubes.GetDate            *  @anyvm  @anyvm    allow target=dom0
qubes.Notifications      *  @anyvm  @default  allow target=dom0
qubes.Filecopy           *  @anyvm  @anyvm    ask
qubes.GetImageRGBA       *  @anyvm  @dispvm   allow
qubes.GetImageRGBA       *  @anyvm  @anyvm    ask
qubes.OpenInVM           *  @anyvm  @dispvm   allow
qubes.OpenInVM           *  @anyvm  @anyvm    ask
qubes.OpenURL            *  @anyvm  @dispvm   allow
qubes.OpenURL            *  @anyvm  @anyvm    ask
qubes.StartApp           *  @anyvm  @dispvm   allow
qubes.StartApp           *  @anyvm  @anyvm    ask
qubes.VMShell            *  @anyvm  @dispvm   allow
qubes.VMShell            *  @anyvm  @anyvm    deny
qubes.UpdatesProxy       *  @type:TemplateVM  @default  allow target=sys-net
qubes.UpdatesProxy       *  @anyvm  @anyvm    deny
""",
    "91-admin-default-deny.policy": """\
admin.vm.List            *  @anyvm  @anyvm    deny
admin.vm.List            *  @anyvm  dom0      deny
""",
}
