"""What `--version` says of the worker's engine: asked of the worker, and believed only if it is a name."""

import sys

import pytest

from qubes_restore_svc.kdf.engine import best_engine
from qubes_restore_svc.local import interpreter
from qubes_restore_svc.local.interpreter import worker_engine


async def test_the_worker_says_what_it_derives_keys_with() -> None:
    assert await worker_engine() == best_engine().name


@pytest.mark.parametrize(
    "program", ["import sys; sys.exit(1)", "print()", "print('\\x1b[2J')", "print('ä')", "print('a\\nb')"]
)
async def test_anything_but_a_name_is_not_repeated(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "worker_command", lambda: [sys.executable, "-c", program])
    assert await worker_engine() is None


async def test_a_worker_that_cannot_be_started_or_hangs_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interpreter, "worker_command", lambda: ["/nonexistent/python"])
    assert await worker_engine() is None
    monkeypatch.setattr(interpreter, "_ENGINE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(
        interpreter, "worker_command", lambda: [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    assert await worker_engine() is None
