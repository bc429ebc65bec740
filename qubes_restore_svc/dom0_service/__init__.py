"""`restore.Start`, `restore.Verify` and `restore.List`: dom0's broker, for the domains that the policy lets
call."""
