"""A stand-in for Qubes Manager, which comes with dom0 and is on no package index: what its restore dialog has
that the launcher builds on, under the same names, and no more."""
