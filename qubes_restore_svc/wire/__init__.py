"""All that crosses the VM boundary: sans-I/O, bounded everywhere, standard library and pydantic only."""
