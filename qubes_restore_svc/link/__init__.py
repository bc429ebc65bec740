"""How broker and worker reach each other: a local sandbox, or qrexec."""
