"""A stand-in for Qubes' own package of this name, which comes with dom0 and is on no package index.

Strategy: it speaks the Admin API of the original (the same methods, payloads and answers, on a Unix socket,
or through qrexec in a qube) to the stand-in for qubesd in this test suite; the public names, their signatures
and the exceptions they raise are the original's, as far as a restore needs them. What the original does not
have is not here either, and what is not here fails loudly. Put the parent directory on `sys.path` to have it
instead of the original.
"""

import typing

import qubesadmin.app
import qubesadmin.base
import qubesadmin.config
import qubesadmin.remote

DEFAULT = qubesadmin.base.DEFAULT

if typing.TYPE_CHECKING or qubesadmin.config.in_dom0():
    Qubes = qubesadmin.app.QubesLocal
else:
    Qubes = qubesadmin.remote.QubesRemote
