"""The client of dom0's restore service; see `api` for what a program needs of it."""
