"""What all tests share: signals as a terminal would leave them.

A shell without job control starts what runs in the background with SIGINT ignored, and nohup does the same
with SIGHUP; every child inherits it, and a command that was told to ignore Ctrl-C rightly does so.
"""

import gc
import signal

for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_collection_finish() -> None:
    """Twelve thousand tests are a lot of objects: no collection of garbage is to look through them again."""
    gc.collect()
    gc.freeze()
