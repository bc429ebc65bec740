"""Any other Linux machine: a worker in a sandbox, and a directory of disk images."""
