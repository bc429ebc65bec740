"""Restore Qubes OS backups without letting dom0 touch them."""

__version__ = "0.1.0"
