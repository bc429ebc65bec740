"""A Qubes system as the place to restore to: its qubes, its worker's disposable, its locks and its rights."""
