"""The native part of the package; all else about it stands in pyproject.toml.

The extension is optional: where it cannot be built the package installs without it, and the worker
derives keys with OpenSSL.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("qubes_restore_svc/kdf/_scrypt")

setup(
    ext_modules=[
        Extension(
            "qubes_restore_svc.kdf._romix",
            sources=sorted(str(path) for path in SOURCES.glob("*.c")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            # Vectors stay in registers only where the loops over them are unrolled.
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
            optional=True,
        )
    ],
)
