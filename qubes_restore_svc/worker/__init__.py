"""The daemon that reads the archive: it runs in a DisposableVM or a sandbox, never in dom0."""
