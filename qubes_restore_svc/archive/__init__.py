"""Everything that parses the backup. Runs in the worker only, never on the trusted side."""
