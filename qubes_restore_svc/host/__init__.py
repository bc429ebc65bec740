"""Where qubes are created: a directory of sparse images, or a Qubes system."""
