"""Makes modules of tools/ importable in the workers of a Ray that a test starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@contextmanager
def importable_benchmarks() -> Iterator[None]:
    """Let the workers of a Ray that is started in the `with` block import `benchmarks`.

    pytest adds tools/ only to the import path of its own process.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'tools'}:{ROOT}")
        yield
