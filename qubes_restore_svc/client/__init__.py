"""The client of dom0's restore service: what a program needs to list, verify or restore a backup."""
