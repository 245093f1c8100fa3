"""Faster imports of large libraries."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Import torch, vLLM or DeepSpeed in the block, without Python's collector of cycles.

    It would look through the modules' objects again and again, a seventh of the time of an import,
    and find nothing, as they live until the process ends. So it leaves those that exist at the end
    of the block out from then on too, until the process ends: extensions such as Triton's print
    what is not collected then.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.unregister(gc.unfreeze)
        atexit.register(gc.unfreeze)
