"""How the tests are collected: in which order, and without Python's collector of cycles."""

import gc

import pytest

gc.disable()  # until all modules are imported; see hybridrl/core/importing.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray come first: each takes minutes, and of two processes that take the
    next file when one is done, one would otherwise end long before the other.
    """
    starting = {item.path for item in items if item.get_closest_marker("graph")}
    items.sort(key=lambda item: item.path not in starting)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extensions report what is left at the end
