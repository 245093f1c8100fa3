"""A process that ends with the one that started it.

vLLM's engine core does not: when the worker around it is killed, it would retain its device's
memory, and the worker that is started in its place would find too little.
"""

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from threading import Thread

VARIABLE = "HYBRIDRL_END_WITH_PARENT"
"""Set in the environment of processes that end so."""


def end_with_parent() -> None:
    """End this process, from a thread of its own, when the process that started it by
    multiprocessing has ended; nothing where VARIABLE is not set.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and VARIABLE in os.environ:
        Thread(target=_wait, args=(parent,), daemon=True, name="end with parent").start()


def _wait(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
