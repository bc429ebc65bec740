"""The side that commands a restore and never touches a byte of the archive."""
