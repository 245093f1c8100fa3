"""Modules of tools/ in the workers of a Ray that a test starts itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@contextmanager
def importable_benchmarks() -> Iterator[None]:
    """A Ray that starts meanwhile has workers that can import `benchmarks`.

    pytest adds tools/ to the import path of its own process only.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'tools'}:{ROOT}")
        yield
