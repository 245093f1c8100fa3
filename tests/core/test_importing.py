"""Python's garbage collector is off while modules are imported."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridrl.core.importing import collection_paused
from hybridrl.runtime.host import build


class Node:
    """An object that refers to itself, so that only the garbage collector can free it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.freeze()  # restores the state that tests/conftest.py has set


def test_nothing_is_collected_in_the_block_and_what_was_made_in_it_stays_afterwards():
    with collection_paused():
        assert not gc.isenabled()
        made = Node()
    assert gc.isenabled() and gc.get_freeze_count() > 0
    seen = weakref.ref(made)
    del made
    gc.collect()
    assert seen() is not None
    later = Node()
    seen = weakref.ref(later)
    del later
    gc.collect()
    assert seen() is None, "what is made later is collected"


def test_a_module_that_cannot_be_imported_leaves_the_collector_on():
    with pytest.raises(ModuleNotFoundError), collection_paused():
        import no_such_module  # noqa: F401
    assert gc.isenabled()


def test_a_process_that_has_switched_the_collector_off_keeps_it_off():
    gc.disable()
    try:
        with collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_worker_is_imported_without_the_collector_and_works_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "recording.py").write_text(
        "import gc\nIMPORTED = gc.isenabled()\n"
        "class Worker:\n    seen = property(lambda self: (IMPORTED, gc.isenabled()))\n"
    )
    assert build("recording:Worker", {}).seen == (False, True)
