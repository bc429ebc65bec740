"""The restore dialog of Qubes Manager on the isolated restore: runs in dom0 or in a GUI domain."""
