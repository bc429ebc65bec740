"""`restore.Start`, `restore.Verify` and `restore.List`: dom0's broker for whoever the policy lets call."""
