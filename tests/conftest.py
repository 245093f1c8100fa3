"""Orders the collected tests, and turns Python's garbage collector off while they are collected."""

import gc

import pytest

gc.disable()  # until all modules are imported; see hybridrl/core/importing.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that start Ray first. Each takes minutes; if one of them came last, one of the
    two test processes would be idle while the other one still runs it.
    """
    starting = {item.path for item in items if item.get_closest_marker("graph")}
    items.sort(key=lambda item: item.path not in starting)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extension modules report objects that are left at the end
