"""`qubes-restore-watch`: verify the newest backup in a place, and say of all machines which backup is bad."""
