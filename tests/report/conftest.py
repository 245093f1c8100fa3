"""Skips the tests that open the page in a browser if there is no browser on PATH."""

import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def browser() -> str | None:
    """The path of a browser that can run without a display; None: there is none on PATH."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: opens a page in Chromium or Chrome")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if browser() is not None:
        return
    reason = f"no {' or '.join(BROWSERS)} is on PATH; the tests of the page's HTML and SVG have run"
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def browser_path() -> str:
    path = browser()
    assert path is not None, "tests marked browser are skipped without one"
    return path
