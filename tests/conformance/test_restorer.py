"""The stock restorer, as `make bench` runs it, restores what this project restores."""

from collections.abc import Callable
from pathlib import Path

from tests.bench import sides
from tests.bench.small_sample import write_small


def test_the_stock_restorer_brings_every_image_back(checkout: Callable[[str], Path], tmp_path: Path) -> None:
    outcome = sides.stock(write_small(tmp_path, log_n=10), checkout("qubes-core-admin-client"), tmp_path)
    assert outcome.on_disk > 0
