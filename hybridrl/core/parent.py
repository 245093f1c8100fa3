"""Ends a process when its parent process has ended.

vLLM's engine core does not do so by itself: after its worker was killed, it would keep the memory
of its device, and the worker that replaces the first would find too little.
"""

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from threading import Thread

VARIABLE = "HYBRIDRL_END_WITH_PARENT"
"""Set in the environment of the processes that `end_with_parent` ends."""


def end_with_parent() -> None:
    """Start a thread that ends this process when its parent by multiprocessing has ended.

    Does nothing without such a parent, or where VARIABLE is not set.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and VARIABLE in os.environ:
        Thread(target=_wait, args=(parent,), daemon=True, name="end with parent").start()


def _wait(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
