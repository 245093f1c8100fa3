"""Tests of the page in a browser run where there is one, and are named where there is none."""

import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MISSING = pytest.StashKey[int]()


def browser() -> str | None:
    """The path of a browser that runs without a display; None: there is none on PATH."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: opens a page in Chromium or Chrome")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("browser")]
    if marked and browser() is None:
        config.stash[MISSING] = len(marked)
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if item not in marked]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if count := config.stash.get(MISSING, 0):
        terminalreporter.write_line(
            f"{count} tests of the report's page were left out: no {' or '.join(BROWSERS)} is on "
            "PATH; the tests of its HTML and SVG have run"
        )


@pytest.fixture
def browser_path() -> str:
    path = browser()
    assert path is not None, "tests marked browser are deselected without one"
    return path
